"""Two vision towers side by side: against transformers' LLaMA with both projected blocks put in place by hand."""

from dataclasses import replace

import pytest
import torch
from model_cases import (
    ADAPTER,
    END,
    FULL,
    LORA,
    PATCH,
    START,
    assert_same_gradients,
    llama_of,
    loss_and_gradients,
    model_config,
    random_model,
    random_sample,
    to_llama,
)
from torch.utils.flop_counter import FlopCounterMode

from fastvid.batch import FeaturePair, VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.training.flops import Formula
from fastvid.training.layer_memory import BatchRows
from fastvid.training.live_bytes import LiveBytes
from fastvid.training.memory import estimate, parameter_counts
from fastvid.training.planning import rows_of

TOKENS = VideoTokens(PATCH, START, END, 100)
CHANNELS = 12, 7
PREFIX = [5, 6, 7, 8]


def config(projector_type="mlp2x_gelu", **changes):
    return replace(model_config(projector_type, **changes), mm_hidden_size_2=CHANNELS[1])


def samples(rows=((4, 2), (1, 3), (4, 2)), names="aba", text=(9, 5, 9)):
    """(EncodedSample, [FeaturePair]) of each video; those of one name are one video."""
    generator = torch.Generator().manual_seed(0)
    found, videos = [], {}
    for (first, second), name, before in zip(rows, names, text):
        ids, supervised = random_sample(generator, text=(before, 3), video=first + second)
        ids[: len(PREFIX)] = PREFIX
        if name not in videos:
            blocks = (torch.randn(rows, each, generator=generator) for rows, each in zip((first, second), CHANNELS))
            videos[name] = FeaturePair(*blocks)
        spans = [(supervised.start + 1, supervised.stop + 1)]
        found.append((EncodedSample(f"{name}{len(found)}", ids, spans, [name]), [videos[name]]))
    return found


def packed(given, **options):
    return pack(given, TOKENS, CHANNELS, **options)


def by_hand(model, given):
    """(loss, its gradients by our names) of transformers' model, sample by sample, with plain matrices."""
    llama = llama_of(model)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def projected(x_RC, prefix):
        x_RD = x_RC @ weights[f"{prefix}0.weight"].T + weights[f"{prefix}0.bias"]
        if f"{prefix}2.weight" in weights:
            x_RD = torch.nn.functional.gelu(x_RD) @ weights[f"{prefix}2.weight"].T + weights[f"{prefix}2.bias"]
        return x_RD

    loss = torch.zeros(())
    for sample, (video,) in given:
        ids = torch.tensor(sample.token_ids)
        x_ND = llama.model.embed_tokens(ids)
        if "boundary.weight" in weights:
            for token, row in zip((START, END), weights["boundary.weight"]):
                x_ND = torch.where((ids == token)[:, None], row, x_ND)
        at = sample.token_ids.index(PATCH)
        blocks = [projected(video.first, "projector."), projected(video.second, "projector.second.")]
        x_ND = torch.cat([x_ND[:at], *blocks, x_ND[at + len(video) :]])
        logits = llama(inputs_embeds=x_ND[None]).logits[0]
        ((start, end),) = sample.supervised
        loss = loss + torch.nn.functional.cross_entropy(logits[start - 1 : end - 1], ids[start:end], reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad for name, p in weights.items() if p.grad is not None}, llama


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
def test_an_adapter_step_is_transformers_with_both_blocks_in_place(projector_type):
    model, given = random_model(config(projector_type)), samples()
    expected_loss, expected, _ = by_hand(model, given)
    loss, found = loss_and_gradients(model, packed(given))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected)
    assert {name.rpartition(".")[0] for name in found} >= {"projector.0", "projector.second.0", "boundary"}


@pytest.mark.slow
def test_a_full_step_is_transformers_with_both_blocks_in_place():
    model, given = random_model(config(), FULL), samples()
    expected_loss, expected, llama = by_hand(model, given)
    loss, found = loss_and_gradients(model, packed(given))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients({name: found.pop(name) for name in expected}, expected)
    theirs = {name: p.grad for name, p in llama.named_parameters()}
    assert_same_gradients(to_llama(model, found), theirs)


@pytest.mark.parametrize("trainable", [ADAPTER, FULL, LORA], ids=["adapter", "full", "lora"])
def test_packed_is_one_by_one(trainable):
    model, given = random_model(config(), trainable), samples()
    expected_loss, expected = loss_and_gradients(model, *(packed([each]) for each in given))
    for options in ({}, {"share": True}):
        loss, found = loss_and_gradients(model, packed(given, **options))
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_same_gradients(found, expected)


@pytest.mark.parametrize("share", [False, True])
def test_frozen_rows_and_shared_videos_equal_all_rows(share):
    given = samples(text=(4, 8, 4))
    expected_loss, expected = loss_and_gradients(random_model(config()), packed(given))
    model = random_model(config())
    model.keep_prefix(PREFIX)
    batch = packed(given, prefix=PREFIX, frozen=True, share=share)
    assert batch.frozen_rows and batch.second_rows == (5 if share else 7)
    loss, found = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(found, expected)


def test_a_batch_without_videos_reaches_both_projectors():
    model = random_model(config())
    found = loss_and_gradients(model, packed([]))[1]
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(gradient.any() for gradient in found.values())


def test_one_tower_has_the_parameters_it_had():
    names = [name for name, _ in random_model(model_config()).named_parameters()]
    both = [name for name, _ in random_model(config()).named_parameters()]
    assert [name for name in both if ".second." not in name] == names


# --- what a run plans with


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
def test_operations_are_what_torch_counts(projector_type):
    model, batch = random_model(config(projector_type)), packed(samples())
    with FlopCounterMode(display=False) as counter:
        features = batch.features, batch.features_2
        model.projector(*features).sum().backward()
    formula = Formula(model.config, ADAPTER)
    bare = replace(batch, video_rows=batch.video_rows[:0], features_2=None)
    assert formula.of_batch(batch) - formula.of_batch(bare) == counter.get_total_flops()


@pytest.mark.parametrize("trainable", [ADAPTER, FULL, LORA], ids=["adapter", "full", "lora"])
def test_memory_is_what_a_step_leaves_alive(trainable):
    model, batch = random_model(config(), trainable), packed(samples(rows=((40, 90), (3, 50), (40, 90))))
    assert sum(parameter_counts(model.config, trainable).values()) == sum(p.numel() for p in model.parameters())
    with LiveBytes() as live:
        loss = model(batch)
        alive = live.now - loss.nbytes
    rows = rows_of(batch)
    assert rows["second_rows"] == 230 and set(rows) <= set(BatchRows.__dataclass_fields__)
    planned = estimate(
        model.config,
        trainable=trainable,
        compute_dtype=torch.float32,
        on_cpu=True,
        one_call_per_segment=True,
        **rows,
    )
    assert alive <= planned.activations <= 1.02 * alive
