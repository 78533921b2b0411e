"""The whole model: against the reference's recordings, what is trained, empty batches, FSDP2."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.distributed as dist
from forks import FORKS
from model_cases import (
    ADAPTER,
    FULL,
    assert_close,
    assert_same_gradients,
    gradients,
    loss_and_gradients,
    model_config,
    pack,
    prepared,
    random_batch,
    random_model,
    random_sample,
    with_prefix,
)
from ranks import leave
from safetensors.torch import load_file

from fastvid.batch import AttentionLayout, PackedBatch
from fastvid.config.policy import Trainable
from fastvid.model.config import DecoderConfig, ModelConfig, Precision
from fastvid.model.video_llava import VideoLlava

PROJECTORS = {"336": "mlp2x_gelu", "224": "linear"}


@pytest.fixture(scope="module")
def recorded(golden, recipe):
    """(tiny.py, tensors, values) of the reference's recordings."""
    return recipe, load_file(golden / "model.safetensors"), json.loads((golden / "model.json").read_text())


def new_rows(recorded, variant, kind):
    """[3, D]: the rows that the reference gave the three video tokens."""
    tiny, tensors, _ = recorded
    return tensors[f"{variant}/init/{kind}_rows_{tiny.BASE_VOCAB}_{tiny.BASE_VOCAB + 2}"]


def recorded_model(recorded, variant, rows, head_rows, trainable):
    """The tiny model with new embedding and head rows; boundary rows from the embedding's, if they are trained."""
    tiny, _, _ = recorded
    new = {"embed": rows.numpy(), "lm_head": head_rows.numpy()}
    state = {name: torch.from_numpy(x) for name, x in tiny.llava_state(variant, new).items()}
    config = ModelConfig(
        DecoderConfig(
            vocab_size=tiny.BASE_VOCAB + len(rows),
            hidden_size=tiny.HIDDEN,
            num_layers=tiny.LAYERS,
            intermediate_size=tiny.INTERMEDIATE,
            num_heads=tiny.HEADS,
            num_kv_heads=tiny.HEADS,
            head_dim=tiny.HIDDEN // tiny.HEADS,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
        ),
        tiny.MM_HIDDEN,
        PROJECTORS[variant],
        None,
        0.02,
    )
    ours = {
        "embed.weight": state["model.embed_tokens.weight"],
        "head.weight": state["lm_head.weight"],
        "decoder.norm.weight": state["model.norm.weight"],
    }
    for name, tensor in state.items():
        if "mm_projector" in name:
            name = name.removeprefix("model.mm_projector.")
            ours["projector." + (name if name[0].isdigit() else "0." + name)] = tensor
    if trainable.boundary:
        ours["boundary.weight"] = rows[1:3]
    for i in range(tiny.LAYERS):
        layer = {name.removeprefix(f"model.layers.{i}."): x for name, x in state.items() if f"layers.{i}." in name}
        fused = {
            "input_norm": ["input_layernorm"],
            "post_norm": ["post_attention_layernorm"],
            "qkv": [f"self_attn.{x}_proj" for x in "qkv"],
            "o": ["self_attn.o_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "down": ["mlp.down_proj"],
        }
        for name, parts in fused.items():
            ours[f"decoder.layers.{i}.{name}.weight"] = torch.cat([layer[part + ".weight"] for part in parts])
    model = VideoLlava(config, trainable=trainable, precision=Precision())
    model.load_state_dict(ours, strict=True)
    return model


def recorded_batch(recorded, variant, key, *, start_end):
    """The padded batch of records 0 and 1, packed."""
    tiny, tensors, values = recorded
    lengths = values["variants"][variant]["video"]["lengths"] if start_end else None
    ids, labels = (tensors[f"{key}/{name}"].long() for name in ("input_ids", "labels"))
    lengths = lengths or [int((row != 0).sum()) for row in ids]
    tokens = torch.cat([row[:n] for row, n in zip(ids, lengths)])
    targets = torch.cat([row[:n] for row, n in zip(labels, lengths)])
    # A row predicts the next row's label; a sample's first label is never predicted.
    predicted = (targets >= 0).nonzero()[:, 0]
    boundaries = [(tokens == token).nonzero()[:, 0] for token in (tiny.BASE_VOCAB + 1, tiny.BASE_VOCAB + 2)]
    features = torch.cat([torch.from_numpy(tiny.features(variant, i)) for i in (0, 1)])
    return PackedBatch(
        token_ids=tokens,
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        layout=AttentionLayout.of_lengths(lengths),
        video_rows=(tokens == tiny.BASE_VOCAB).nonzero()[:, 0],
        features=features,
        boundary_rows=torch.stack(boundaries, 1).flatten() if start_end else torch.empty(0, dtype=torch.int64),
        loss_rows=predicted - 1,
        targets=targets[predicted],
    )


def per_row(padded, batch):
    """[2, longest, …] → [N, …]."""
    bounds = batch.layout.cu_seqlens_q.tolist()
    return torch.cat([padded[i, : b - a] for i, (a, b) in enumerate(itertools.pairwise(bounds))])


def check_loss_and_lse(model, batch, loss, lse):
    with torch.no_grad():
        logits = model.logits(model.hidden(batch))
    assert_close(logits.logsumexp(-1), per_row(lse, batch), 1e-5 / lse.max().item())
    total, found = loss_and_gradients(model, batch)
    assert total / batch.num_supervised == pytest.approx(loss, abs=1e-5)
    for gradient in found.values():
        gradient /= batch.num_supervised
    return logits, found


def check_gradients(found, tensors, key):
    """Of the projector and, where they are trained apart, the boundary rows."""
    names = [name for name in tensors if name.startswith(f"{key}/grad/")]
    assert len(names) in (3, 4, 5)
    for name in names:
        part = name.removeprefix(f"{key}/grad/").removeprefix("model.mm_projector.")
        ours = (
            "boundary.weight" if "embed_rows" in part else "projector." + (part if part[0].isdigit() else "0." + part)
        )
        assert_close(found[ours], tensors[name])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["336", "224"])
def test_recorded_video_batch(recorded, variant):
    _, tensors, values = recorded
    values, key = values["variants"][variant], f"{variant}/video"
    model = recorded_model(
        recorded,
        variant,
        new_rows(recorded, variant, "embed"),
        new_rows(recorded, variant, "lm_head"),
        ADAPTER,
    )
    batch = recorded_batch(recorded, variant, key, start_end=True)
    assert batch.num_supervised == values["video"]["n_supervised"]
    logits, found = check_loss_and_lse(model, batch, values["video"]["loss"], tensors[f"{key}/lse"])
    check_gradients(found, tensors, key)

    with torch.no_grad():
        hidden, spliced = model.hidden(batch), model.splice(batch)
    start = 0
    for i, positions in enumerate(values["video"]["positions"]):
        rows = torch.tensor(positions) + start
        start += values["video"]["lengths"][i]
        inside = torch.tensor(positions) < values["video"]["lengths"][i]
        rows = rows[inside]
        assert_close(spliced[rows], tensors[f"{key}/inputs_embeds_sel"][i][inside])
        assert_close(hidden[rows], tensors[f"{key}/hidden_sel"][i][inside])
        assert_close(logits[rows][:, values["vocab_sel"]], tensors[f"{key}/logits_sel"][i][inside])
    log_probabilities = logits[batch.loss_rows].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert_close(log_probabilities, tensors[f"{key}/label_logprob"])


@pytest.mark.slow
def test_recorded_distinct_boundary_rows(recorded):
    """At initialisation start and end rows are equal; here they are not, so that their order counts."""
    tiny, tensors, values = recorded
    rows = new_rows(recorded, "336", "embed").clone()
    rows[1:] = tensors[f"336/distinct/embed_rows_{tiny.BASE_VOCAB + 1}_{tiny.BASE_VOCAB + 2}"]
    model = recorded_model(recorded, "336", rows, new_rows(recorded, "336", "lm_head"), ADAPTER)
    batch = recorded_batch(recorded, "336", "336/video", start_end=True)
    _, found = check_loss_and_lse(
        model, batch, values["variants"]["336"]["distinct"]["loss"], tensors["336/distinct/lse"]
    )
    check_gradients(found, tensors, "336/distinct")


@pytest.mark.slow
def test_recorded_batch_without_start_and_end_tokens(recorded):
    tiny, tensors, values = recorded
    values = values["variants"]["336"]["nose"]
    model = recorded_model(
        recorded,
        "336",
        tensors[f"336/nose/embed_row_{tiny.BASE_VOCAB}"],
        tensors[f"336/nose/lm_head_row_{tiny.BASE_VOCAB}"],
        Trainable(projector=True, embed=True, head=True),
    )
    batch = recorded_batch(recorded, "336", "336/nose", start_end=False)
    _, found = check_loss_and_lse(model, batch, values["loss"], tensors["336/nose/lse"])
    check_gradients(found, tensors, "336/nose")
    touched = found["embed.weight"].abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == values["embed_rows_with_nonzero_grad"]


def test_boundary_rows_are_the_tables_rows_when_the_table_is_trained():
    """The same values and gradients, whether start and end live in the table or beside it."""
    batch = random_batch()
    adapter, full = random_model(), random_model(trainable=Trainable(projector=True, embed=True))
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            parameter.copy_(adapter.get_parameter(name))
        adapter.boundary.weight.copy_(full.embed.weight[98:])
    loss, apart = loss_and_gradients(adapter, batch)
    full_loss, together = loss_and_gradients(full, batch)
    assert loss == full_loss
    assert_close(apart["boundary.weight"], together["embed.weight"][98:])
    assert_close(apart["projector.0.weight"], together["projector.0.weight"])
    assert not together["embed.weight"][97].any()  # the placeholder's row is never read


@pytest.mark.parametrize(
    "trainable",
    [
        ADAPTER,
        FULL,
        Trainable(embed=True, head=True),
        Trainable(projector=True),
        Trainable(boundary=True),
        Trainable(head=True),
    ],
    ids="+".join,
)
def test_gradients_reach_exactly_what_is_trained(trainable):
    model = random_model(trainable=trainable, compute_dtype=torch.bfloat16)
    loss_and_gradients(model, random_batch())
    for name, parameter in model.named_parameters():
        trained = name.split(".")[0] in trainable
        assert parameter.requires_grad == trained
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16)
    assert hasattr(model, "boundary") == trainable.boundary


@pytest.mark.parametrize("trainable", [ADAPTER, FULL], ids=["adapter", "full"])
@pytest.mark.parametrize("lacking", ["videos", "supervised rows", "both", "rows"])
def test_batches_that_lack_something_reach_every_trained_parameter(trainable, lacking):
    shape = {"video": 0} if lacking in ("videos", "both") else {}
    batch = random_batch(shapes=[] if lacking == "rows" else [shape, shape])
    if lacking in ("supervised rows", "both"):
        none = torch.empty(0, dtype=torch.int64)
        batch = dataclasses.replace(batch, loss_rows=none, targets=none)
    model = random_model(trainable=trainable)
    loss = model(batch)
    assert loss.dtype == torch.float32 and loss.requires_grad
    assert (loss.item() == 0) == (batch.num_supervised == 0)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert batch.num_supervised or not parameter.grad.any()


def test_several_videos_in_a_sample_and_mixed_samples():
    """One packed batch of text, one and two videos equals the samples one by one."""
    generator = torch.Generator().manual_seed(4)
    one, two = random_sample(generator), random_sample(generator, text=(5, 3))
    text = random_sample(generator, video=0)
    joined = two[0] + one[0], [len(two[0]) + row for row in one[1]]
    samples = [one, text, joined]
    whole = pack(samples, generator=generator)
    first, last = pack([one]), pack([joined])
    parts = [
        dataclasses.replace(first, features=whole.features[:6]),
        pack([text]),
        dataclasses.replace(last, features=whole.features[6:]),
    ]
    loss, together = loss_and_gradients(random_model(), whole)
    total, apart = loss_and_gradients(random_model(), *parts)
    assert loss == pytest.approx(total, rel=1e-6)
    assert_same_gradients(together, apart)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match='"boundary" is part of "embed"'):
        Trainable(boundary=True, embed=True)
    with pytest.raises(ValueError, match="projector_type 'mlp3x': choose linear or mlp2x_gelu"):
        random_model(model_config("mlp3x"))


# FSDP2 on two gloo ranks. Each rank has a batch of its own; gradients are summed.

SHARDED = {
    "adapter": {"trainable": ADAPTER},
    "adapter bf16": {"trainable": ADAPTER, "compute_dtype": torch.bfloat16},
    "full": {"trainable": FULL},
    "full bf16": {"trainable": FULL, "compute_dtype": torch.bfloat16},
    "tied": {"trainable": FULL, "config": model_config(tie_word_embeddings=True)},
    "recompute full": {"trainable": FULL, "recompute": "full"},
    "recompute selective": {"trainable": FULL, "recompute": "selective"},
    "frozen rows": {"trainable": ADAPTER},
    "frozen rows, recompute full": {"trainable": ADAPTER, "recompute": "full"},
}


def rank_batches(name):
    """Ranks whose batches differ in all that may lack; as one process has them, and as they are computed."""
    if name.startswith("frozen rows"):
        return zip(*(with_prefix(text_only=i == 0, seed=i) for i in (0, 1)))
    return 2 * [[random_batch(5), random_batch(6, [{"video": 0}])]]


def run_rank(rank, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for name, options in SHARDED.items():
        model = random_model(**options)
        policy = MixedPrecisionPolicy(
            cast_forward_inputs=False, reduce_dtype=torch.float32, param_dtype=options.get("compute_dtype")
        )
        for module in [*model.decoder.layers, model.projector, model]:
            fully_shard(module, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
        _, batches = rank_batches(name)
        if batches[rank].prefix_rows:
            prepared(model)
        loss = model(batches[rank].parted())
        loss.backward()
        full = {key: gradient.full_tensor().numpy() for key, gradient in gradients(model).items()}
        queue.put((name, rank, loss.item(), full))
    dist.barrier()
    dist.destroy_process_group()
    leave()


@pytest.mark.slow
def test_fsdp2_equals_one_process(tmp_path):
    queue = FORKS.SimpleQueue()
    processes = torch.multiprocessing.start_processes(
        run_rank, (tmp_path / "store", queue), nprocs=2, join=False, start_method=FORKS.get_start_method()
    )
    found = {}
    while len(found) < 2 * len(SHARDED):
        while queue.empty():
            processes.join(timeout=0.05)
        name, rank, loss, sums = queue.get()
        found[name, rank] = loss, {key: torch.from_numpy(x) for key, x in sums.items()}
    while not processes.join():
        pass

    for name, options in SHARDED.items():
        # In bf16 FSDP2 also rounds the norms' gains: as far from one process as that is from fp32.
        loss_tolerance, tolerance = (0.02, 0.15) if "compute_dtype" in options else (1e-5, 1e-5)
        model = random_model(**options)
        plain, _ = rank_batches(name)
        losses = [model(batch) for batch in plain]
        torch.stack(losses).sum().backward()
        for rank in (0, 1):
            loss, sums = found[name, rank]
            assert loss == pytest.approx(losses[rank].item(), rel=loss_tolerance)
            assert_same_gradients(sums, gradients(model), tolerance)


def test_fp32_residual_keeps_embeddings_and_norms_unrounded():
    model = VideoLlava(model_config(), trainable=ADAPTER, precision=Precision(torch.bfloat16, fp32_residual=True))
    dtypes = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in dtypes if name == "embed.weight" or "norm" in name
    }
