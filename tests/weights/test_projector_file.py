"""The projector file: the reference's forms, LLaVA's, checkpoints, and writing it."""

import json
import os
import resource
import sys

import pytest
import torch
from forks import FORKS
from safetensors.torch import load_file, save_file
from weight_folders import (
    ADAPTER,
    CONFIG,
    LLAMA,
    TOKENS,
    D,
    RunsCode,
    V,
    assert_same,
    llava_state,
    load,
    our_state,
    write_folder,
)

from fastvid.batch import VideoTokens
from fastvid.checkpoints import checkpoint
from fastvid.config.policy import Trainable
from fastvid.dist.sharding import LocalShard
from fastvid.weights.model_config import read_model_config
from fastvid.weights.projector_file import read_projector, save_tensors
from fastvid.weights.trained import write_upstream_projector


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_llama_and_projector_file(tmp_path, prefix, ending, kind):
    state = llava_state(kind)
    language = {name: tensor for name, tensor in state.items() if "mm_projector" not in name}
    projector = {name.replace("model.mm_projector.", prefix): state[name] for name in state if "mm_projector" in name}
    folder = write_folder(tmp_path / "m", language, {"model_type": "llama", **LLAMA})
    file = tmp_path / f"mm_projector.{ending}"
    save_file(projector, file) if ending == "safetensors" else torch.save(projector, file)
    assert_same(load(folder, projector=file), state)


def test_projector_file_goes_before_the_folders_own(tmp_path):
    state, other = llava_state("linear"), llava_state()
    folder = write_folder(tmp_path / "m", state, {**CONFIG, "mm_projector_type": "linear"})
    torch.save({name: other[name] for name in other if "mm_projector" in name}, tmp_path / "p.bin")
    language = {name: state[name] for name in state if "mm_projector" not in name}
    assert_same(
        load(folder, projector=tmp_path / "p.bin"),
        {**language, **{name: other[name] for name in other if "mm_projector" in name}},
    )
    with pytest.raises(ValueError, match="p.bin holds a mlp2x_gelu projector, --mm_projector_type linear"):
        read_model_config(folder, projector=tmp_path / "p.bin", projector_type="linear")


@pytest.mark.parametrize("table_rows", [2, V + 3])
@pytest.mark.parametrize("trainable", [ADAPTER, Trainable(projector=True)])
def test_start_and_end_rows_of_a_projector_file(tmp_path, table_rows, trainable):
    state = llava_state()
    folder = write_folder(tmp_path / "m", state)
    table = torch.randn(table_rows, D)
    torch.save(
        {"model.embed_tokens.weight": table, **{name: state[name] for name in state if "mm_projector" in name}},
        tmp_path / "p.bin",
    )
    model = load(folder, projector=tmp_path / "p.bin", trainable=trainable)
    assert torch.equal(model.embed.weight[-2:], table[-2:])
    assert hasattr(model, "boundary") == trainable.boundary
    if trainable.boundary:
        assert torch.equal(model.boundary.weight, table[-2:])
    assert torch.equal(model.head.weight, load(folder).head.weight)


@pytest.mark.parametrize(
    "rows, fits",
    [(2, True), (V + 3, True), (64, True), (128, True), (256, True), (V + 6, False), (1, False), (192, False)],
)
def test_a_table_of_another_tokenizer_is_refused(tmp_path, rows, fits):
    """Two rows, or the tokenizer's own number, which may be padded to a multiple of 64, 128 or 256."""
    state = llava_state()
    table = torch.randn(rows, D)
    torch.save(
        {"model.embed_tokens.weight": table, **{name: state[name] for name in state if "mm_projector" in name}},
        tmp_path / "p.bin",
    )
    if not fits:
        with pytest.raises(ValueError, match=rf"p.bin: .* is \[{rows}, 24\], the tokenizer .* has 43 tokens"):
            read_projector(tmp_path / "p.bin", TOKENS)
        read_projector(tmp_path / "p.bin", VideoTokens(V, None, None, V + 1, (V,)))  # whose rows are not asked for
    else:
        found = read_projector(tmp_path / "p.bin", TOKENS)["boundary.weight"]
        assert torch.equal(found, table if rows == 2 else table[[V + 1, V + 2]])


def test_start_and_end_embeddings_that_are_not_finite_are_the_projector_files(tmp_path):
    state = llava_state()
    folder = write_folder(tmp_path / "m", state)
    torch.save(
        {
            "model.embed_tokens.weight": torch.full((2, D), torch.nan),
            **{name: state[name] for name in state if "mm_projector" in name},
        },
        tmp_path / "p.bin",
    )
    with pytest.raises(ValueError, match=r"p\.bin: 48 of 48 values of the start and end embeddings are not finite"):
        load(folder, projector=tmp_path / "p.bin")


def test_projector_from_a_checkpoint_folder(tmp_path):
    state, trained = llava_state(), our_state(llava_state())
    trained = {name: tensor + 1 for name, tensor in trained.items() if name.startswith("projector.")}
    trained["boundary.weight"] = torch.randn(2, D)
    rows = {name: LocalShard(tensor, tuple(tensor.shape), 0) for name, tensor in trained.items()}
    folder = checkpoint.save(tmp_path, 3, groups={"model": rows}, state={})
    model = load(write_folder(tmp_path / "m", state), projector=folder)
    for name, tensor in trained.items():
        assert torch.equal(model.get_parameter(name), tensor)
    larger = checkpoint.save(tmp_path, 4, groups={"model": trained | {"head.weight": torch.ones(2, 2)}}, state={})
    with pytest.raises(ValueError, match="checkpoint-4 holds more than a projector .*fastvid export"):
        read_projector(larger)


def test_projector_from_a_sharded_checkpoint(tmp_path):
    trained = {name: tensor for name, tensor in our_state(llava_state()).items() if name.startswith("projector.")}
    for rank, (start, stop) in enumerate([(0, 13), (13, D)]):
        places = {name: {"shape": list(tensor.shape), "offset": start} for name, tensor in trained.items()}
        save_file(
            {name: tensor[start:stop].contiguous() for name, tensor in trained.items()},
            tmp_path / f"model-{1 - rank:05d}-of-00002.safetensors",
            {"shards": str(places).replace("'", '"')},
        )

    def list_files():
        files = {path.name: {"bytes": 0, "sha256": ""} for path in tmp_path.glob("model-*")}
        (tmp_path / "checksums.json").write_text(json.dumps({"format": 1, "files": files}))

    list_files()
    found = read_projector(tmp_path)
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    next(tmp_path.glob("model-00000*")).unlink()
    list_files()
    with pytest.raises(ValueError, match="projector.* is incomplete"):
        read_projector(tmp_path)


def test_projector_files_that_do_not_serve(tmp_path):
    state = {name: tensor for name, tensor in llava_state().items() if "mm_projector" in name}
    folder, file = write_folder(tmp_path / "m", llava_state()), tmp_path / "p.bin"

    def refused(tensors, message):
        torch.save(tensors, file)
        with pytest.raises(ValueError, match=message):
            load(folder, projector=file)

    refused({"model.embed_tokens.weight": torch.ones(2, D)}, "p.bin holds no projector")
    refused({name: state[name] for name in state if "0.bias" not in name}, r"p.bin lacks model.mm_projector.0.bias")
    refused(state | {"model.mm_projector.4.weight": torch.ones(1)}, "an mlp3x_gelu projector .*4.weight.*not computed")
    refused(state | {"model.mm_projector.6.bias": torch.ones(1)}, "an mlp4x_gelu projector")
    refused(state | {"model.mm_projector.net.0.weight": torch.ones(1)}, "a projector of another kind .*net.0.weight")
    refused(state | {"model.norm.weight": torch.ones(1)}, "p.bin holds more than a projector .*--model_name_or_path")
    refused(state | {"model.mm_projector.2.weight": torch.ones(D, 2)}, r"p.bin: projector.2.weight is \[24, 2\]")
    refused(state | {"model.embed_tokens.weight": torch.ones(V, D)}, r"is \[40, 24\], the tokenizer .* 43 tokens")
    refused(state | {"model.embed_tokens.weight": torch.ones(2, 3)}, "start and end embeddings is")
    with pytest.raises(ValueError, match="nowhere.bin does not exist"):
        load(folder, projector=tmp_path / "nowhere.bin")
    with pytest.raises(ValueError, match="m/checksums.json is missing: not a checkpoint"):
        load(folder, projector=folder)


def test_a_projector_that_runs_code_is_refused(tmp_path):
    torch.save({"model.mm_projector.weight": RunsCode(tmp_path / "executed")}, tmp_path / "p.bin")
    with pytest.raises(ValueError, match="could run code: it was not loaded"):
        read_projector(tmp_path / "p.bin")
    assert not (tmp_path / "executed").exists()


def keys_and_shapes(path):
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()]


@pytest.mark.parametrize("variant", ["336", "224"])
def test_keys_and_shapes_of_the_reference(golden, recipe, tiny, tmp_path, variant):
    recorded = json.loads((golden / "checkpoint.json").read_text())["runs"][f"{variant}_main_r0"]["bins"]
    V = recipe.BASE_VOCAB
    tokens = VideoTokens(V, V + 1, V + 2, V + 3)
    model = load(tiny / f"model{variant}", tokens=tokens)
    trained = {name: p.detach() + 1 for name, p in model.named_parameters() if p.requires_grad}
    write_upstream_projector(tmp_path / "mm_projector.bin", trained, tiny / f"model{variant}", tokens)
    assert keys_and_shapes(tmp_path / "mm_projector.bin") == recorded["mm_projector.bin"]
    write_upstream_projector(tmp_path / "p.safetensors", trained, tiny / f"model{variant}", tokens)
    assert sorted(keys_and_shapes(tmp_path / "p.safetensors")) == sorted(recorded["mm_projector.bin"])
    table = torch.load(tmp_path / "mm_projector.bin", weights_only=True)["model.embed_tokens.weight"]
    assert torch.equal(table[V + 1 :], trained["boundary.weight"])
    assert torch.equal(table[: V + 1], model.embed.weight[: V + 1])
    assert (tmp_path / "mm_projector.bin").stat().st_size < 1.01 * table.nbytes + 1e5
    assert not list(tmp_path.glob(".*")), "temporary files are gone"


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_projector_reads_back_bit_for_bit(tmp_path, ending, kind, dtype):
    folder = write_folder(tmp_path / "m", llava_state(kind, dtype), {**CONFIG, "mm_projector_type": kind})
    model = load(folder, dtype=dtype)
    trained = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    path = tmp_path / f"out.{ending}"
    write_upstream_projector(path, trained, folder, TOKENS)
    again = load(folder, dtype=dtype, projector=path)
    for name, tensor in trained.items():
        assert torch.equal(again.get_parameter(name), tensor), name
    table = (load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True))[
        "model.embed_tokens.weight"
    ]
    assert table.dtype == torch.float32 and torch.equal(table[: V + 1].to(dtype), model.embed.weight[: V + 1])


def test_what_was_not_trained_comes_from_where_training_took_it(tmp_path):
    """Frozen projector: the file holds the one that training started from, its rows too, and the same new rows."""
    state, other = llava_state(), our_state(llava_state())
    folder = write_folder(tmp_path / "m", state)
    first = tmp_path / "first.bin"
    write_upstream_projector(
        first,
        {name: tensor + 1 for name, tensor in other.items() if "projector" in name}
        | {"boundary.weight": torch.randn(2, D)},
        folder,
        TOKENS,
        seed=3,
    )
    model = load(folder, projector=first, seed=3)
    write_upstream_projector(tmp_path / "out.bin", {}, folder, TOKENS, projector=first, seed=3)
    again = load(folder, projector=tmp_path / "out.bin", seed=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    table = torch.load(tmp_path / "out.bin", weights_only=True)["model.embed_tokens.weight"]
    assert torch.equal(table, model.embed.weight)


def test_padded_table_is_cut_to_the_tokenizer(tmp_path):
    tokens = VideoTokens(V - 9, V - 8, V - 7, V - 6, (V - 9, V - 8, V - 7))
    folder = write_folder(tmp_path / "m", llava_state())
    write_upstream_projector(tmp_path / "out.bin", {}, folder, tokens)
    table = torch.load(tmp_path / "out.bin", weights_only=True)["model.embed_tokens.weight"]
    assert table.shape == (V - 6, D) and table.untyped_storage().nbytes() == table.nbytes


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, ending):
    folder, path = write_folder(tmp_path / "m", llava_state()), tmp_path / f"out.{ending}"
    write_upstream_projector(path, {}, folder, TOKENS, seed=1)
    before = path.read_bytes()

    def fails(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        write_upstream_projector(path, {}, folder, TOKENS, seed=2)
    assert path.read_bytes() == before and {entry.name for entry in tmp_path.iterdir()} == {"m", path.name}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_stays_of_a_write_that_was_killed(tmp_path, monkeypatch, kind):
    """safetensors writes under a name of its own, beside the one that it is given."""
    path, left = tmp_path / "mm_projector.safetensors", tmp_path / ".mm_projector.safetensors.tmp"

    def interrupted(tensors, to, metadata):
        to.with_name(".tmpAbCdEf").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("safetensors.torch.save_file", interrupted)
        save_tensors(path, {"one": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []
    if kind == "folder":
        left.mkdir()
    (left / ".tmpAbCdEf" if kind == "folder" else left).touch()  # a killed process's; as versions before left it
    save_tensors(path, {"one": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == [path]


def test_another_ending_is_refused(tmp_path):
    folder = write_folder(tmp_path / "m", llava_state())
    with pytest.raises(ValueError, match="out.pt: a projector file ends in .bin"):
        write_upstream_projector(tmp_path / "out.pt", {}, folder, TOKENS)
    assert not (tmp_path / "out.pt").exists()


def write_with_little_room(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        save_tensors(path, {"a": torch.ones(10_000)})
    except OSError as error:
        sys.exit(0 if str(path) in str(error) and "File too large" in str(error) else 2)
    sys.exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, ending):
    child = FORKS.Process(target=write_with_little_room, args=(tmp_path / f"p{ending}",))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and list(tmp_path.iterdir()) == []
