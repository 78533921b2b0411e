"""Many answers at once: each is what `generate` gives of its prompt alone, whoever else runs."""

import random
from dataclasses import replace

import pytest
import torch
from model_cases import END, PATCH, START, model_config, random_model

from fastvid.batch import VideoTokens
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.inference.batching import Batcher
from fastvid.inference.generate import generate, next_token
from fastvid.inference.requests import Request

TOKENS = VideoTokens(patch=PATCH, start=START, end=END, vocab_size=100)
EOS, CHANNELS = 2, 12
FEATURES = {
    name: torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(rows))
    for name, rows in (("a", 6), ("b", 11), ("c", 3))
}


def request(key, rng, *, video="drawn", opening=None, **settings):
    """A prompt of 1 to 20 words behind or around a video; prompts of one `opening` and video begin alike."""
    video = rng.choice([*FEATURES, None]) if video == "drawn" else video
    words = random.Random(opening if opening is not None else rng.random())
    before = [words.randrange(3, PATCH) for _ in range(4 if opening is not None else rng.randrange(1, 9))]
    after = [rng.randrange(3, PATCH) for _ in range(rng.randrange(1, 12))]
    features = FEATURES.get(video)
    placeholder = [START] + [PATCH] * len(features) + [END] if video else []
    settings.setdefault("max_new_tokens", rng.randrange(1, 15))
    return Request(key, before + placeholder + after, features, video, **settings)


def alone(model, asked):
    """The answer of `generate`."""
    batch = pack([(EncodedSample("alone", asked.token_ids), asked.videos)], TOKENS, CHANNELS)
    return generate(
        model,
        batch,
        max_new_tokens=asked.max_new_tokens,
        stops=(EOS,),
        temperature=asked.temperature,
        generator=torch.Generator().manual_seed(asked.seed),
    )


def batcher(model, *, rows=600, **settings):
    row_bytes = Batcher(model, TOKENS, stops=(EOS,), cache_bytes=0).row_bytes
    return Batcher(model, TOKENS, stops=(EOS,), cache_bytes=rows * row_bytes, **settings)


def likely_to_end(model):
    """Raise the score of EOS, so that some answers end by it."""
    with torch.no_grad():
        model.head.weight[EOS] += 0.2 * model.head.weight.norm(dim=1).mean()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}])
def test_two_hundred_prompts_equal_one_by_one(changes):
    """Shared and unshared videos, or none; several lengths. They wait for each other, for there is little room."""
    model, rng = likely_to_end(random_model(model_config(**changes))), random.Random(7)
    asked = [request(i, rng, opening=rng.choice([None, 1, 2])) for i in range(220)]
    answers = dict(batcher(model, rows=300, at_once=9, prefill_rows=60).run(iter(asked)))
    assert answers == {each.key: alone(model, each) for each in asked}
    ended_early = sum(len(answers[each.key]) < each.max_new_tokens for each in asked)
    assert 20 < ended_early < 200  # both ways to end were tried


def test_who_joins_a_running_batch_changes_nothing():
    model, rng = random_model(), random.Random(3)
    batch = batcher(model)
    asked = [request(i, rng, video="b", opening=5, max_new_tokens=12 + i) for i in range(12)]
    answers = {}
    for each in asked:  # each joins while its forerunners, whose video it shares, are at other tokens
        batch.add(each)
        answers.update(batch.step())
    while len(batch):
        answers.update(batch.step())
    assert answers == {each.key: alone(model, each) for each in asked}


def test_a_shared_beginning_is_computed_once(monkeypatch):
    model, rng = random_model(), random.Random(4)
    rows = []
    monkeypatch.setattr(model.decoder, "forward", _counting(model.decoder.forward, rows))
    batch = batcher(model)
    asked = [request(i, rng, video="b", opening=5, max_new_tokens=9) for i in range(4)]
    end = 4 + len(FEATURES["b"]) + 2
    tails = [len(each.token_ids) - end for each in asked]
    for each in asked[:3]:
        batch.add(each)
    batch.step()
    assert rows == [end + sum(tails[:3]) + 3, 3]  # and a row of each that stands for what is to be predicted
    batch.add(asked[3])
    batch.step()
    assert rows[2:] == [tails[3], 4]


def _counting(forward, rows):
    def counted(x_ND, *arguments, **options):
        rows.append(len(x_ND))
        return forward(x_ND, *arguments, **options)

    return counted


@pytest.mark.slow
def test_draws_depend_on_the_request_alone():
    model, rng = random_model(), random.Random(5)
    asked = [request(i, rng, temperature=(0.0, 0.7, 1.5)[i % 3], seed=i) for i in range(24)]
    few, many = (dict(batcher(model, at_once=n).run(iter(asked))) for n in (2, 24))
    assert few == many == {each.key: alone(model, each) for each in asked}


def test_bf16_answers_are_near_ties_at_most():
    """Each token is nearly the likeliest after what was answered before it."""
    model, rng = random_model(compute_dtype=torch.bfloat16), random.Random(6)
    with torch.no_grad():
        model.head.weight[PATCH:] = 0  # `pack` would look for the features of a placeholder in an answer
    asked = [request(i, rng, opening=1, max_new_tokens=10) for i in range(8)]
    for key, answer in batcher(model).run(iter(asked)):
        each = asked[key]
        ids = [*each.token_ids, *answer]
        spans = [(len(each.token_ids), len(ids))]
        again = pack([(EncodedSample("again", ids, spans), each.videos)], TOKENS, CHANNELS)
        with torch.no_grad():
            logits = model.logits(model.hidden(again)[again.loss_rows])
        top = logits.max(-1).values
        assert torch.all(top - logits.gather(1, torch.tensor(answer)[:, None])[:, 0] <= 0.02 * top.abs())


def test_the_context_ends_an_answer():
    model, rng = random_model(model_config(max_position_embeddings=40)), random.Random(8)
    each = request(0, rng, video="a", max_new_tokens=500)
    ((_, answer),) = batcher(model).run([each])
    assert answer == alone(model, each)
    with pytest.raises(ValueError, match="the prompt has 40 tokens, the model's context 40: shorten"):
        batcher(model).add(Request("long", [5] * 40))


def test_what_can_never_be_answered_is_refused():
    batch = batcher(random_model(), rows=30)
    with pytest.raises(ValueError, match="prompt of 20 tokens and an answer of 11 .* raise --kv_cache_gib"):
        batch.add(Request("long", [5] * 20, max_new_tokens=11))
    with pytest.raises(ValueError, match="temperature -1"):
        batch.add(Request("cold", [5], temperature=-1))
    batch.add(Request("shorter", [5] * 20, max_new_tokens=10))
    assert [key for key, _ in batch.run([])] == ["shorter"]
    larger = batcher(random_model(), rows=31)
    assert [key for key, _ in larger.run([Request("long", [5] * 20, max_new_tokens=11)])] == ["long"]


def test_memory_is_bounded():
    """The buffer has the rows that it was given, however many wait."""
    model, rng = random_model(), random.Random(9)
    batch = batcher(model, rows=120)
    answers = dict(batch.run(request(i, rng) for i in range(30)))
    assert len(answers) == 30
    assert {buffer.shape[0] for layer in batch._pool.layers for buffer in layer.buffers} == {120}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [70, 90, 300])
def test_kept_beginnings_change_no_answer(rows):
    """They come and go as there is room, and are found again."""
    model, rng = random_model(), random.Random(10)
    batch = batcher(model, rows=rows, at_once=3, keep_beginnings=True)
    asked = [request(i, rng, opening=rng.choice([None, 1, 2, 3]), max_new_tokens=5 + i % 7) for i in range(60)]
    answers = {}
    for each in asked:
        batch.add(each)
        answers.update(batch.step())
    while len(batch):
        answers.update(batch.step())
    assert answers == {each.key: alone(model, each) for each in asked}
    assert 0 < batch.kept_bytes <= rows * batch.row_bytes
    assert batch.found > (10 if rows == 300 else 0)


def test_a_kept_beginning_is_not_computed_again(monkeypatch):
    model, rng = random_model(), random.Random(4)
    rows = []
    monkeypatch.setattr(model.decoder, "forward", _counting(model.decoder.forward, rows))
    first, second = (request(i, rng, video="b", opening=5, max_new_tokens=1) for i in range(2))
    for keep, found in ((True, len(second.token_ids) - 4 - len(FEATURES["b"]) - 2), (False, len(second.token_ids) + 1)):
        batch = batcher(model, keep_beginnings=keep)
        for each in (first, second):
            list(batch.run([each]))
        assert rows.pop() == found
        assert bool(batch.kept_bytes) == keep


def test_the_beginning_in_the_way_of_its_own_prompt_goes():
    """A prompt that fills the buffer finds its beginning there, in the middle."""
    model, rng = random_model(), random.Random(12)
    other = request("other", rng, video="c", opening=1, max_new_tokens=9)
    small, large = (request(name, rng, video="b", opening=5, max_new_tokens=1) for name in ("small", "large"))
    large = replace(large, max_new_tokens=80 - len(large.token_ids))
    batch, answers = batcher(model, rows=80, keep_beginnings=True), {}
    for each in (other, small, large):
        batch.add(each)
    for _ in range(100):
        answers.update(batch.step())
    assert answers == {each.key: alone(model, each) for each in (other, small, large)}


def test_who_is_given_up_frees_its_place():
    model, rng = random_model(), random.Random(11)
    batch = batcher(model, rows=200, at_once=4)
    asked = [request(i, rng, video="b", opening=5, max_new_tokens=14) for i in range(8)]
    for each in asked:
        batch.add(each)
    batch.step()
    assert sorted(key for key, _ in batch.running()) == [0, 1, 2, 3]
    assert all(len(ids) == 2 for _, ids in batch.running())
    for key in (0, 2, 5, "nobody"):  # one whose rows others begin with, one that runs, one that waits
        batch.cancel(key)
    answers = dict(batch.run([]))
    assert answers == {each.key: alone(model, each) for each in asked if each.key not in (0, 2, 5)}
    assert batch._runs == []
    assert batch._bases == {}


def test_draws_are_of_the_likeliest_tokens_that_reach_top_p():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    for top_p, possible in ((1e-9, {1}), (0.4, {1}), (0.41, {1, 3}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        generator = torch.Generator().manual_seed(0)
        drawn = {int(next_token(logits, 1.0, generator, top_p)) for _ in range(200)}
        assert drawn == possible


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.0}, {"temperature": 1e-40}, {"temperature": 1e-50}, {"temperature": 1e-5, "top_p": 0.5}]
)
def test_the_least_randomness_takes_the_likeliest(settings):
    """No division overflows, and no choice is left without a token."""
    model, rng = random_model(), random.Random(8)
    greedy = request("one", rng)
    drawn = replace(greedy, **{"temperature": 1.0, **settings})
    assert dict(batcher(model).run([drawn])) == {"one": alone(model, greedy)}
    logits = torch.tensor([3e38, -3e38, 1.0])
    generator = torch.Generator().manual_seed(0)
    assert next_token(logits, drawn.temperature, generator, drawn.top_p).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_nothing_tells_ends_its_request_alone(temperature):
    model, rng = random_model(), random.Random(9)
    asked = [request(key, rng, video="b", opening=5, max_new_tokens=6) for key in range(3)]
    asked[1] = replace(asked[1], temperature=temperature)
    wanted = {key: alone(model, asked[key]) for key in (0, 2)}
    take = Batcher._take

    class Failing(Batcher):
        def _take(self, running, logits_BV):
            logits_BV[[each.waiting.request.key == 1 for each in running]] = torch.nan
            return take(self, running, logits_BV)

    row_bytes = Batcher(model, TOKENS, stops=(EOS,), cache_bytes=0).row_bytes
    batch, answers, failed = Failing(model, TOKENS, stops=(EOS,), cache_bytes=600 * row_bytes), {}, {}
    for each in asked:
        batch.add(each)
    while len(batch):
        answers.update(batch.step())
        failed.update(batch.failed)
    assert answers == wanted
    assert list(failed) == [1]
    assert batch._runs == []
    with pytest.raises(ArithmeticError, match="there is no next token"):
        list(batch.run(asked))
    batch.reset()
    lost = {}
    assert dict(batch.run(asked, lost.__setitem__)) == wanted and list(lost) == [1]
