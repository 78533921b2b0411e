"""Which checkpoint or projector file a path means."""

from pathlib import Path

from fastvid.checkpoints import checkpoint
from fastvid.files import StrPath, is_url, shown

_PROJECTOR_FILES = ("mm_projector.bin", "mm_projector.safetensors")  # in the order in which a folder is searched


def checkpoint_folder(path: StrPath) -> Path:
    """The checkpoint that `path` is, or the newest valid one in it; verified.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if is_url(path):
        raise ValueError(f"--checkpoint {shown(path)} is a URL: download the checkpoint's folder and give its path")
    path = Path(path)
    folder = checkpoint.named(path)
    if folder is None:
        hint = "; a projector file is chat's --projector or train's --pretrain_mm_mlp_adapter" * path.is_file()
        raise ValueError(f"--checkpoint {path}: neither a checkpoint-N folder nor an --output_dir that holds one{hint}")
    return folder


def projector_path(path: StrPath, flag: str) -> Path:
    """The projector file or checkpoint folder that a flag means: of an --output_dir what training left at its end.

    A checkpoint is verified.

    Raises:
        ValueError: there is none; it is damaged; a URL.
    """
    if is_url(path):
        raise ValueError(f"{flag} {shown(path)} is a URL: download the file and give its path")
    path = Path(path)
    if path.is_file():
        return path
    for name in _PROJECTOR_FILES:
        if (path / name).is_file():
            return path / name
    found = checkpoint.named(path)
    if found is None:
        if not path.exists():
            raise ValueError(
                f"{flag} {shown(path)} does not exist; give a projector file, a checkpoint-N folder or "
                "the --output_dir of its training"
            )
        raise ValueError(
            f"{flag} {path}: neither a projector file (.bin, .safetensors) nor a checkpoint-N folder "
            "or an --output_dir that holds one"
        )
    return found
