"""Generation with a KV cache: against transformers' generate, with video rows, sampling, limits."""

from dataclasses import replace

import pytest
import torch
from model_cases import FULL, llama_of, model_config, pack, random_model, random_sample

from fastvid.inference.generate import generate
from fastvid.model.cache import LayerCache


def prompt(ids):
    return pack([(ids, range(0))])


def video_prompt(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids, _ = random_sample(generator, text=(5, 4), video=6, answer=0)
    return pack([(ids, range(0))], generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"tie_word_embeddings": True}])
def test_greedy_ids_equal_transformers(changes):
    model = random_model(model_config(**changes), FULL)
    ids = torch.randint(3, 90, (9,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = (
        llama_of(model)
        .generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=0)[
            0, len(ids) :
        ]
        .tolist()
    )
    expected = expected[: expected.index(2)] if 2 in expected else expected
    assert generate(model, prompt(ids), max_new_tokens=40, stops=(2,)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_video_equals_the_whole_sequence_again(dtype):
    """Each token is the likeliest after prompt and answer so far, computed without a cache."""
    model, batch = random_model(compute_dtype=dtype), video_prompt()
    answer = generate(model, batch, max_new_tokens=12, stops=(-1,))
    assert len(answer) == 12
    ids = batch.token_ids.tolist() + answer
    again = replace(pack([(ids, range(len(ids) - 13, len(ids) - 1))]), features=batch.features)
    with torch.no_grad():
        logits = model.logits(model.hidden(again)[again.loss_rows])
    top = logits.max(-1).values
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    # bf16 rounds one row and many rows differently; a near tie may fall either way.
    assert torch.all(top - chosen <= (0 if dtype == torch.float32 else 0.02) * top.abs())


def test_stops_before_eos():
    model, batch = random_model(), video_prompt()
    answer = generate(model, batch, max_new_tokens=10, stops=(-1,))
    eos = answer[4]
    assert generate(model, batch, max_new_tokens=10, stops=(eos,)) == answer[: answer.index(eos)]


@pytest.mark.slow
def test_sampling_follows_temperature_and_seed():
    model, batch = random_model(), video_prompt()

    def draw(seed, temperature, tokens=8):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, batch, max_new_tokens=tokens, stops=(-1,), temperature=temperature, generator=generator)

    greedy = generate(model, batch, max_new_tokens=8, stops=(-1,))
    assert draw(0, 1.0) == draw(0, 1.0) != draw(1, 1.0)
    assert draw(0, 1e-4) == greedy
    firsts = [draw(seed, 1.0, tokens=1)[0] for seed in range(150)]
    with torch.no_grad():
        p = model.logits(model.hidden(batch)[-1]).softmax(-1)
    token = p.argmax().item()
    assert abs(firsts.count(token) / 150 - p[token].item()) < 4 * (p[token] * (1 - p[token]) / 150).sqrt().item()


def test_stops_at_the_context():
    model = random_model(model_config(max_position_embeddings=20))
    batch = video_prompt()
    assert len(generate(model, batch, max_new_tokens=50, stops=(-1,))) == 20 - batch.num_rows
    with pytest.raises(ValueError, match="the prompt has 17 tokens, the model's context 17: shorten"):
        generate(random_model(model_config(max_position_embeddings=17)), batch, max_new_tokens=5, stops=(-1,))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_tell_no_token(temperature, value, monkeypatch):
    model = random_model()
    made = model.logits
    monkeypatch.setattr(model, "logits", lambda h: made(h).index_fill(-1, torch.tensor(3), value))
    with pytest.raises(ValueError, match="no next token behind 0 of the answer: the logits are not finite"):
        generate(model, video_prompt(), max_new_tokens=5, stops=(2,), temperature=temperature)


def test_refuses_several_prompts_and_negative_temperature():
    model = random_model()
    with pytest.raises(ValueError, match="one prompt; the batch holds 2"):
        generate(model, pack([([5, 6], range(0)), ([7], range(0))]), max_new_tokens=5, stops=(2,))
    with pytest.raises(ValueError, match="temperature -1"):
        generate(model, prompt([5, 6]), max_new_tokens=5, stops=(2,), temperature=-1)


def test_recomputation_does_not_disturb_generation():
    batch = video_prompt()
    plain = generate(random_model(), batch, max_new_tokens=6, stops=(-1,))
    assert generate(random_model(recompute="full"), batch, max_new_tokens=6, stops=(-1,)) == plain


def test_cache_returns_all_rows_so_far():
    cache = LayerCache(5)
    first, second = torch.randn(3, 2, 4), torch.randn(1, 2, 4)
    cache.append(first, -first)
    keys, values = cache.append(second, -second)
    assert torch.equal(keys, torch.cat([first, second])) and torch.equal(values, -keys)
