"""A decoder in few bits: loading, the whole model's loss and gradients, training, memory, contradictions."""

import dataclasses
import math

import pytest
import torch
from model_cases import (
    ADAPTER,
    assert_same_gradients,
    loss_and_gradients,
    model_config,
    pack,
    pack_frozen,
    random_model,
    random_sample,
)
from training_run import config_of, flags, losses, start, write_run
from weight_folders import CONFIG, LLAMA, TOKENS, llava_state, our_state, write_folder

from bench.frozen_dtype import compared, table
from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.config.policy import Trainable
from fastvid.dist import parallel
from fastvid.model import quantize
from fastvid.model.attention import SDPA
from fastvid.model.config import Precision
from fastvid.model.quantize import FORMATS, QuantizedLinear, matrix_bytes
from fastvid.model.video_llava import VideoLlava
from fastvid.training import checks, planning
from fastvid.training.live_bytes import LiveBytes
from fastvid.training.memory import estimate
from fastvid.weights.loading import load_weights
from fastvid.weights.model_config import read_model_config

PREFIX = [5, 6, 7, 8]
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
EXACT = ["int8", "nf4"]  # both products multiply by one matrix


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """Test models are smaller than FP8 units want them."""
    monkeypatch.setattr(quantize, "FP8_SIDE", 4)


def quantized_linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def random_quantized(frozen_dtype, config=None, **options):
    """A random model, its decoder's matrices quantised; and that model."""
    plain = random_model(config)
    model = random_model(plain.config, frozen_dtype=frozen_dtype, **options)
    values = dict(plain.named_parameters())
    with torch.no_grad():
        for name in quantized_linears(model):
            values[f"{name}.weight"] *= 0.2  # larger ones make attention jump from row to row
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    for name, linear in quantized_linears(model).items():
        linear.quantize_(values[f"{name}.weight"].detach())
    return model, plain


def batches():
    """The same samples with all rows alike, and with the prefix kept and the frozen rows apart."""
    generator = torch.Generator().manual_seed(0)
    samples = [random_sample(generator, **shape) for shape in ({}, {"text": (4, 12), "answer": 5}, {"text": (9, 2)})]
    for ids, _ in samples:
        ids[: len(PREFIX)] = PREFIX
    plain = pack(samples, generator=generator)
    return plain, pack_frozen(samples, len(PREFIX), plain.features).parted()


def loaded(folder, frozen_dtype, compute_dtype=torch.float32):
    with torch.device("meta"):
        model = VideoLlava(
            read_model_config(folder, vocab_size=TOKENS.vocab_size),
            trainable=ADAPTER,
            precision=Precision(compute_dtype, frozen=frozen_dtype),
        )
    model.to_empty(device="cpu")
    load_weights(model, folder, tokens=TOKENS)
    return model


@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_matrices_are_quantised_from_what_the_files_hold(tmp_path, frozen_dtype):
    state = llava_state(dtype=torch.float16)
    model = loaded(write_folder(tmp_path / "m", state, files=3), frozen_dtype, torch.bfloat16)
    linears, expected = quantized_linears(model), our_state(state)
    held = {f"{name}.weight" for name in linears} | set(dict(model.named_parameters()))
    assert held == {*expected, "boundary.weight"}
    assert len(linears) == 4 * LLAMA["num_hidden_layers"]
    for name, linear in linears.items():
        weight = expected[f"{name}.weight"]
        alone = FORMATS[frozen_dtype](*reversed(weight.shape))
        alone.quantize_(weight)
        for key, buffer in alone.named_buffers():
            assert torch.equal(getattr(linear, key).float(), buffer.float()), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_matrices_are_quantised_one_after_the_other(tmp_path, monkeypatch, frozen_dtype):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
    for key, value in sizes.items():
        monkeypatch.setitem(LLAMA, key, value)
    monkeypatch.setattr("weight_folders.D", 64)
    folder = write_folder(tmp_path / "m", llava_state(), {**CONFIG, **sizes})
    with LiveBytes() as live:
        model = loaded(folder, frozen_dtype)
        held = live.now
    whole = sum(4 * linear.inputs * linear.outputs for linear in quantized_linears(model).values())
    largest = 4 * 2 * 128 * 64
    assert live.peak - held < 5 * largest < whole / 4


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("frozen_dtype", EXACT)
def test_model_equals_a_plain_one_that_holds_the_same_matrices(frozen_dtype, recompute):
    model, plain = random_quantized(frozen_dtype, recompute=recompute)
    with torch.no_grad():
        for name, linear in quantized_linears(model).items():
            plain.get_submodule(name).weight.copy_(linear.dequantized(torch.float32))
    rows, parted = batches()
    expected_loss, expected = loss_and_gradients(plain, rows)
    model.keep_prefix(PREFIX)
    for batch in (rows, parted):
        loss, found = loss_and_gradients(model, batch)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_same_gradients(found, expected, 1e-4)


@pytest.mark.parametrize(
    "frozen_dtype, loss_error, least_cosine", [("fp8", 0.002, 0.998), ("int8", 0.0005, 0.9999), ("nf4", 0.02, 0.97)]
)
def test_model_is_near_one_that_is_not_quantised(frozen_dtype, loss_error, least_cosine):
    model, plain = random_quantized(frozen_dtype, model_config(**SIZES))
    rows, parted = batches()
    expected_loss, expected = loss_and_gradients(plain, rows)
    model.keep_prefix(PREFIX)
    for batch in (rows, parted):
        loss, found = loss_and_gradients(model, batch)
        assert loss == pytest.approx(expected_loss, rel=loss_error) and loss != expected_loss
        for name, gradient in found.items():
            assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > least_cosine, name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_fp8_is_recomputed_to_the_same_bits(recompute):
    _, parted = batches()
    results = []
    for mode in ("none", recompute):
        model, _ = random_quantized("fp8", recompute=mode)
        model.keep_prefix(PREFIX)
        results.append(loss_and_gradients(model, parted))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_only_the_frozen_decoder_is_quantised():
    model, _ = random_quantized("nf4")
    assert all(name.startswith("decoder.layers.") for name in quantized_linears(model))
    full = VideoLlava(
        model_config(),
        trainable=Trainable(projector=True, embed=True, head=True, decoder=True),
        precision=Precision(frozen="nf4"),
    )
    assert not quantized_linears(full)


# --- training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def curve(run, output, *flags):
    """Losses of 30 steps."""
    config = config_of(
        run,
        output,
        "--bf16",
        "True",
        "--max_steps",
        "30",
        "--save_strategy",
        "no",
        "--dataloader_num_workers",
        "0",
        *flags,
    )
    assert train.train(config) == 0
    return list(losses(output).values())


@pytest.fixture(scope="module")
def plain_curve(run):
    found = curve(run, run / "plain")
    assert found[-1] < found[0] - 0.1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype, most", [("fp8", 0.005), ("int8", 0.005), ("nf4", 0.02)])
def test_loss_curve_is_near_that_of_bf16(run, plain_curve, tmp_path, frozen_dtype, most):
    """The full comparison, over 200 steps of a task that is learnt, is bench/frozen_dtype.py."""
    found = curve(run, tmp_path, "--frozen_dtype", frozen_dtype)
    assert found != plain_curve and abs(sum(found) / sum(plain_curve) - 1) < most


@pytest.mark.slow
def test_checkpoint_holds_what_was_trained_and_resumes_in_the_same_format(run, tmp_path):
    output = tmp_path / "out"
    more = ["--save_steps", "2", "--lr_scheduler_type", "constant", "--dataloader_num_workers", "0"]
    assert train.train(config_of(run, output, *more, "--frozen_dtype", "int8", "--max_steps", "2")) == 0
    held = checkpoint.read_full(output / "checkpoint-2", "model")
    assert {name.split(".")[0] for name in held} == {"projector", "boundary"}
    with pytest.raises(ValueError, match="frozen_dtype"):
        train.train(config_of(run, output, *more, "--frozen_dtype", "nf4", "--max_steps", "4"))
    assert train.train(config_of(run, output, *more, "--frozen_dtype", "int8", "--max_steps", "4")) == 0
    straight = run / "straight"
    assert train.train(config_of(run, straight, *more, "--frozen_dtype", "int8", "--max_steps", "4")) == 0
    assert losses(output) == losses(straight)


@pytest.mark.slow
def test_ranks_hold_the_whole_decoder(run, tmp_path):
    more = ["--frozen_dtype", "int8", "--max_steps", "3", "--save_strategy", "no", "--dataloader_num_workers", "0"]
    done = start(["-m", "fastvid.train"], flags(run, tmp_path / "two", *more), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "trained parts are sharded over the ranks, frozen ones replicated" in done.stderr + done.stdout
    assert train.train(config_of(run, tmp_path / "one", *more, "--per_device_train_batch_size", "4")) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


REFUSED = {
    "decoder is trained": (["--tune_mm_mlp_adapter", "False", "--frozen_dtype", "nf4"], "the decoder is trained"),
    "parity": (["--parity", "reference", "--frozen_dtype", "int8"], "parity reference computes with them as they are"),
    "fp8 without bf16": (["--frozen_dtype", "fp8"], "come out in bf16; add --bf16 True"),
    "sharded": (["--shard", "full", "--frozen_dtype", "int8"], "--shard full shards it; use --shard auto or none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(run, tmp_path, case):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        checks.checked(config_of(run, tmp_path / "out", *given))


def test_a_dry_run_refuses_a_gpu_without_fp8(run, tmp_path, monkeypatch):
    world = dataclasses.replace(parallel.start(), device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
    config = config_of(run, tmp_path / "out", "--bf16", "True", "--frozen_dtype", "fp8")
    with pytest.raises(ValueError, match="RTX 3090"):
        planning.plan(config, planning.precision_of(config), None, None, world, SDPA)


# --- memory


def llama(hidden, intermediate, layers, heads):
    return model_config(
        mm_hidden_size=1024,
        vocab_size=32003,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
    )


SEVEN, THIRTEEN = llama(4096, 11008, 32, 32), llama(5120, 13824, 40, 40)
GB = 10**9


def smallest(config, frozen_dtype):
    """The estimate for one sample of the longest kind that the reference trains on, everything recomputed."""
    return estimate(
        config,
        trainable=ADAPTER,
        rows=2048,
        supervised_rows=1024,
        video_rows=676,
        recompute="full",
        compute_dtype=torch.bfloat16,
        frozen_dtype=frozen_dtype,
    )


@pytest.mark.parametrize(
    "config, frozen_dtype, most",
    [
        (SEVEN, None, 24),
        (SEVEN, "fp8", 24),
        (SEVEN, "int8", 16),
        (SEVEN, "nf4", 12),
        (THIRTEEN, "int8", 24),
        (THIRTEEN, "nf4", 16),
    ],
)
def test_smallest_mode_fits_the_card(config, frozen_dtype, most):
    assert 0.2 * most * GB < smallest(config, frozen_dtype).total < most * GB


@pytest.mark.parametrize("frozen_dtype", FORMATS)
def test_estimate_counts_the_stored_bytes(frozen_dtype):
    c = SEVEN.decoder
    shapes = [(4096, 3 * 4096), (4096, 4096), (4096, 2 * 11008), (11008, 4096)]
    matrices = c.num_layers * sum(matrix_bytes(frozen_dtype, *shape) for shape in shapes)
    plain = c.num_layers * sum(2 * math.prod(shape) for shape in shapes)
    assert smallest(SEVEN, frozen_dtype).weights - matrices == smallest(SEVEN, None).weights - plain


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("frozen_dtype", EXACT)
def test_a_step_takes_no_more_than_over_plain_matrices(frozen_dtype, recompute):
    """What the estimate says of everything but the weights holds for quantised ones as it does for plain ones."""
    generator = torch.Generator().manual_seed(0)
    config = model_config(num_layers=4, **SIZES)
    batch = pack([random_sample(generator, text=(9, 30), video=150, answer=20) for _ in range(2)], generator=generator)
    options = {"compute_dtype": torch.bfloat16, "recompute": recompute}
    peaks, estimates = [], []
    for model, stored in (
        (random_model(config, **options), None),
        (random_quantized(frozen_dtype, config, **options)[0], frozen_dtype),
    ):
        model(batch).backward()
        with LiveBytes() as live:
            model(batch).backward()
        peaks.append(live.peak)
        expected = estimate(
            config,
            trainable=ADAPTER,
            rows=batch.num_rows,
            supervised_rows=batch.num_supervised,
            video_rows=300,
            frozen_dtype=stored,
            on_cpu=True,
            **options,
        )
        estimates.append(expected.total - expected.weights)
        assert expected.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01) and estimates[1] == pytest.approx(estimates[0], rel=0.01)


# --- the benchmark of loss curves


def test_curves_are_compared_with_bf16():
    plain = [2.0] * 40
    figures = compared([2.02] * 20 + [2.0] * 20, plain)
    assert figures == pytest.approx(
        {"mean": 2.01, "mean_last": 2.0, "difference": 0.005, "first_difference": 0.01, "largest_gap": 0.01}
    )
    rows = [
        {"way": way, "seed": seed, **compared([2.0 * factor] * 40, plain)}
        for seed in (0, 1)
        for way, factor in (("bf16", 1.0), ("fp8", 1.01 + 0.02 * seed))
    ]
    assert table(rows).splitlines()[2].split() == ["fp8", "2", "2.0400", "+2.00%", "1.00%", "+2.00%", "2.0400", "2.00%"]
