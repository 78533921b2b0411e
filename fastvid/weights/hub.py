"""Exports on the Hugging Face Hub."""

import logging
from collections.abc import Iterable
from pathlib import Path

from fastvid.files import shown
from fastvid.weights.card import CARD

log = logging.getLogger("fastvid")


class Repository:
    """A model's repository, which need not be there yet.

    Args:
        name: ``owner/name``, or ``name`` below the user's own.

    Raises:
        ValueError: nobody is logged in, or the name is none.
    """

    def __init__(self, name: str):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
        from huggingface_hub.utils import validate_repo_id

        self._api = HfApi()
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"--hub_model_id {shown(name)} is no name of a repository ({error}); give owner/name"
            ) from None
        try:
            user = self._api.whoami()["name"]
        except LocalTokenNotFoundError:
            raise ValueError("--push_to_hub True: nobody is logged in; run `hf auth login`, or set HF_TOKEN") from None
        except (HfHubHTTPError, OSError) as error:
            raise ValueError(
                f"--push_to_hub True: the hub does not answer, or refuses the token ({_first_line(error)}); look at "
                "the network and at `hf auth whoami`, or leave the flag out"
            ) from None
        self.name = name if "/" in name else f"{user}/{name}"

    def push(self, paths: Iterable[Path], card: str, *, private: bool | None = None) -> str:
        """Upload files, in one commit; all of them or none.

        A model card that is there already stays: its owner may have written it.

        Args:
            paths: files; each gets its own name.
            card: the model card, where `paths` hold none.
            private: of a repository that is made now; None: as its owner's settings say.

        Returns:
            The repository's address.

        Raises:
            ValueError: the upload failed; says how to try it again.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        paths = list(paths)
        files: dict[str, Path | bytes] = {path.name: path for path in paths}
        files.setdefault(CARD, card.encode())
        written = paths[0] if len(paths) == 1 else paths[0].parent
        try:
            url = self._api.create_repo(self.name, private=private, exist_ok=True)
            if self._api.file_exists(self.name, CARD):
                log.warning("%s has a %s already, which stays as it is", self.name, CARD)
                del files[CARD]
            operations = [
                CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()
            ]
            self._api.create_commit(self.name, operations, commit_message="Upload a model trained with fastvid")
        except (HfHubHTTPError, OSError) as error:
            raise ValueError(
                f"the export is whole, but could not be uploaded ({_first_line(error)}); try it again: "
                f"`hf upload {self.name} {written}`"
            ) from error
        return str(url)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
