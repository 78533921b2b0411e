"""Exports on the hub, by a stand-in that takes only what the hub's client takes."""

from unittest import mock

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file
from training_run import flags, write_run

from fastvid import export, train


@pytest.fixture
def hub(monkeypatch):
    """The client's methods, autospecced: arguments that it does not know are refused."""
    api = mock.create_autospec(HfApi, instance=True)
    api.whoami.return_value = {"name": "me"}
    api.create_repo.side_effect = lambda name, **_: f"https://huggingface.co/{name}"
    api.file_exists.return_value = False
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    return api


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("hub"))
    words = ["--lora_enable", "True", "--lora_r", "4", "--max_steps", "1", "--save_steps", "1"]
    assert train.main(flags(folder, folder / "lora", *words)) == 0
    assert train.main(flags(folder, folder / "adapter", "--max_steps", "1", "--save_steps", "1")) == 0
    return folder


def exported(run, output, *more):
    return export.main(["--checkpoint", str(run), "--output", str(output), "--push_to_hub", "True", *more])


def uploaded(hub):
    """{name: bytes} of the one commit, and whose."""
    (name, operations), options = hub.create_commit.call_args
    assert hub.create_commit.call_count == 1 and set(options) == {"commit_message"}
    assert all(isinstance(operation, CommitOperationAdd) for operation in operations)
    found = {}
    for operation in operations:
        with operation.as_file() as file:
            found[operation.path_in_repo] = file.read()
    return name, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "run, kind, said",
    [
        ("adapter", "projector", "library_name: fastvid"),
        ("lora", "peft", "library_name: peft"),
        ("lora", "llama", "library_name: transformers"),
    ],
)
def test_what_is_written_is_uploaded_in_one_commit_with_a_card(hub, made, tmp_path, capsys, run, kind, said):
    output = tmp_path / ("mine.safetensors" if kind == "projector" else "mine")
    assert exported(made / run, output, "--format", kind, "--hub_private_repo", "True") == 0
    hub.create_repo.assert_called_once_with("me/mine", private=True, exist_ok=True)
    name, files = uploaded(hub)
    written = [output] if output.is_file() else list(output.iterdir())
    card = files.pop("README.md").decode()
    assert name == "me/mine" and files == {path.name: path.read_bytes() for path in written}
    assert said in card and "--learning_rate" in card and "fastvid chat" in card and "$" not in card
    assert str(tmp_path) not in card and str(made) not in card, "folders of this machine are nobody's business"
    assert "uploaded to https://huggingface.co/me/mine" in capsys.readouterr().out


@pytest.mark.slow
def test_a_card_that_is_there_stays_and_a_name_is_taken_as_given(hub, made, tmp_path, caplog):
    hub.file_exists.return_value = True
    assert exported(made / "adapter", tmp_path / "a.bin", "--hub_model_id", "lab/model") == 0
    hub.create_repo.assert_called_once_with("lab/model", private=None, exist_ok=True)
    assert uploaded(hub)[1].keys() == {"a.bin"}
    assert "has a README.md already, which stays" in caplog.text


@pytest.mark.slow
def test_nothing_is_made_for_one_who_cannot_upload(hub, made, tmp_path):
    for error, said in (
        (LocalTokenNotFoundError("none"), "nobody is logged in; run `hf auth login`, or set HF_TOKEN"),
        (refused(401), "or refuses the token .* look at the network and at `hf auth whoami`"),
        (OSError("no route"), r"does not answer, .*no route"),
    ):
        hub.whoami.side_effect = error
        with pytest.raises(ValueError, match=said):
            exported(made / "adapter", tmp_path / "a.safetensors")
    assert export.main(["--checkpoint", str(made / "adapter"), "--output", str(tmp_path / "b.safetensors")]) == 0
    (tmp_path / "b.safetensors").unlink()
    hub.whoami.side_effect = None  # logged in
    with pytest.raises(ValueError, match="--hub_model_id a//b is no name of a repository .* give owner/name"):
        exported(made / "adapter", tmp_path / "a.safetensors", "--hub_model_id", "a//b")
    assert not list(tmp_path.iterdir()) and not hub.create_repo.called
    assert exported(made / "adapter", tmp_path / "a.safetensors", "--hub_model_id", "a/b") == 0
    assert uploaded(hub)[0] == "a/b"


@pytest.mark.slow
def test_an_upload_that_fails_leaves_the_export_and_says_how_to_go_on(hub, made, tmp_path):
    hub.create_commit.side_effect, output = refused(500), tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=f"the export is whole, .*try it again: `hf upload me/a {output}`"):
        exported(made / "adapter", output)
    assert load_file(output)


def refused(status):
    response = httpx2.Response(status, request=httpx2.Request("POST", "https://huggingface.co/api"))
    return HfHubHTTPError(f"{status}", response=response)
