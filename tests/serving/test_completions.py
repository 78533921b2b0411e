"""Answers over HTTP: those of `Chat.ask`, whoever else asks, in one piece or many."""

import io
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from clips import draw
from PIL import Image
from serving_run import asking, held_answers, served, text_of, uri
from waiting import wait_until

from fastvid.features.file import save_features
from fastvid.serving.text import AnswerText
from fastvid.video.decode import decode

pytestmark = pytest.mark.usefixtures("forked")  # decoders

QUESTIONS = ["what plays?", "who is the assistant", "cards", "what who is? plays", "large user: cards?"]


@pytest.mark.slow
def test_concurrent_answers_are_those_of_chat(server, serving_chat, serving_folder):
    """Several videos and questions, some with turns before, streamed and not, by file and by content, all at once."""
    rng = random.Random(0)
    videos = [serving_folder / "videos" / f"{frames}.mp4" for frames in (4, 9, 30)]
    wanted, asked = {}, []
    for number in range(48):
        video, question = rng.choice(videos), rng.choice(QUESTIONS)
        history = rng.choice([(), (("what?", "cards"),), (("what?", "plays"), ("who is?", "a large user"))])
        case = (video, question, history)
        if case not in wanted:
            wanted[case] = serving_chat.ask(video, question, history)
        asked.append((case, bool(number % 2), f"file://{video}" if number % 3 else uri(video)))

    def answer(each):
        (_, question, history), streamed, url = each
        if streamed:
            return text_of(server.stream(url, question, history))[0]
        status, content = server.ask(url, question, history)
        assert status == 200, content
        return text_of(content)[0]

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(answer, asked))
    assert answers == [wanted[case] for case, _, _ in asked]
    assert len(set(answers)) > 5
    assert server.metric('fastvid_feature_cache_total{found="no"}') == 3  # a video's features are made once
    assert server.metric("fastvid_prefix_cache_hits") > 10


def test_a_completion_is_as_openai_has_it(server, serving_folder):
    url = f"file://{serving_folder}/videos/9.mp4"
    status, answer = server.ask(url, model="model", max_tokens=5, user="somebody", n=1, logprobs=False, tools=[])
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "model"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "length"
    counted = answer["usage"]
    assert counted["completion_tokens"] == 5
    assert counted["prompt_tokens"] > 12 + 4  # the video's rows are tokens
    assert counted["total_tokens"] == counted["prompt_tokens"] + 5

    events = server.stream(url, model="model", max_completion_tokens=5, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"] == counted
    assert events[-2]["choices"] == []
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(events) == text_of(answer)
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events[:-1]}) == 1


def test_stop_texts_end_an_answer(server, serving_folder):
    url = f"file://{serving_folder}/videos/9.mp4"
    (whole, _), (middle, size) = text_of(server.ask(url)[1]), (0, 3)
    middle = len(whole) // 2
    stop = whole[middle : middle + size]
    cut = whole[: whole.index(stop)].rstrip()
    for answer in (server.ask(url, stop=["never said", stop])[1], server.stream(url, stop=stop)):
        assert text_of(answer) == (cut, "stop")
    assert text_of(server.ask(url, stop=["never said"])[1])[0] == whole


def test_draws_follow_the_seed(server, serving_folder):
    url = f"file://{serving_folder}/videos/9.mp4"
    greedy = text_of(server.ask(url)[1])[0]

    def drawn(**fields):
        return text_of(server.ask(url, temperature=1.5, **fields)[1])[0]

    first = [drawn(seed=seed) for seed in (1, 2, -3)]
    assert first == [drawn(seed=seed) for seed in (1, 2, -3)]
    assert len({*first, greedy}) == 4
    assert len({drawn() for _ in range(4)}) > 1  # without one, no two are alike
    assert drawn(top_p=1e-6, seed=1) == greedy
    assert drawn(top_p=1, seed=1) == first[0]
    assert drawn(top_p=0, seed=1) == text_of(server.ask(url, temperature=1e-40)[1])[0] == greedy


def test_pictures_stand_for_frames(server, serving_chat, serving_folder, tmp_path):
    """PNGs of a video's frames have the features of the video; as many as there are are spread as its frames are."""
    for frames in (9, 30):
        path = draw(tmp_path / f"{frames}.avi", frames, codec="ffv1", pixels="bgr0")
        pixels, info = decode(path, indices=range(frames))
        pictures = []
        for each in pixels:
            file = io.BytesIO()
            Image.fromarray(each).save(file, "png")
            pictures.append(uri(file.getvalue(), "image/png"))
        assert info.frames == frames
        answer = text_of(server.ask(pictures)[1])[0]
        assert answer == serving_chat.ask(path, "what plays?")
        assert answer == text_of(server.ask(pictures[:-1] + pictures[-1:])[1])[0]


def test_feature_files_are_asked_about(server, serving_chat, serving_folder):
    features = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).half()
    path = serving_folder / "videos" / "made.safetensors"
    save_features(path, features, {})
    assert text_of(server.ask(f"file://{path}")[1])[0] == serving_chat.ask(path, "what plays?")
    save_features(path, features[:, :8].contiguous(), {})
    status, content = server.ask(f"file://{path}")
    assert status == 400
    assert "[16, 8], the projector takes [rows, 16]" in content["error"]["message"]


def test_the_model_is_named(server):
    _, _, models = server.call("GET", "/v1/models")
    assert [each["id"] for each in models["data"]] == ["model"]
    assert server.call("GET", "/v1/models/model")[2]["object"] == "model"
    assert server.call("GET", "/health")[2] == {"status": "ok"}
    assert server.call("GET", "/v1/models/other")[0] == 404


@pytest.mark.slow
def test_the_openai_package_is_served(server, serving_chat, serving_folder):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    video = serving_folder / "videos" / "9.mp4"
    messages = asking(uri(video))["messages"]
    wanted = serving_chat.ask(video, "what plays?")
    answer = client.chat.completions.create(model="model", messages=messages)
    assert answer.choices[0].message.content == wanted
    assert answer.usage.completion_tokens == 12
    pieces = list(client.chat.completions.create(model="model", messages=messages, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    assert [each.id for each in client.models.list()] == ["model"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="n: must be 1"):
        client.chat.completions.create(model="model", messages=messages, n=2)


@pytest.mark.slow
def test_features_are_kept_up_to_a_budget(serving_chat, serving_folder, tmp_path):
    with served(serving_chat, serving_folder / "model", feature_cache_mib=0) as none:
        for _ in range(2):
            assert none.ask(uri(serving_folder / "videos" / "4.mp4"))[0] == 200
        assert none.metric('fastvid_feature_cache_total{found="no"}') == 2
        assert none.metric("fastvid_feature_cache_bytes") == 0
    with served(serving_chat, serving_folder / "model") as some:
        store = some.service._features
        store._budget = 2 * 16 * 16 * 2  # of two videos
        for frames in (4, 9, 4, 30, 4, 9):  # 9 goes for 30, as 4 was used later
            some.ask(uri(serving_folder / "videos" / f"{frames}.mp4"))
        assert some.metric('fastvid_feature_cache_total{found="no"}') == 4
        assert some.metric("fastvid_feature_cache_bytes") == store._budget


def test_a_failing_model_costs_the_answers_in_hand(serving_chat, serving_folder, caplog):
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model") as running:
        wanted = running.ask(url)
        batcher = running.service._engine._batcher
        step, batcher.step = batcher.step, lambda: 1 / 0
        status, content = running.ask(url)
        assert (status, content["error"]["type"]) == (500, "server_error")
        events = running.stream(url)
        assert events[-1]["error"]["message"] == "the model failed; the server's log says how"
        batcher.step = step
        assert text_of(running.ask(url)[1]) == text_of(wanted[1])
        assert running.metric("fastvid_requests_in_flight") == 0
    assert "ZeroDivisionError" in caplog.text


def test_a_request_that_cannot_be_begun_costs_its_own_answer(serving_chat, serving_folder, monkeypatch):
    """The thread that answers everybody goes on, and /health tells where it does not."""
    url = uri(serving_folder / "videos" / "4.mp4")
    with served(serving_chat, serving_folder / "model", request_timeout=20.0) as running:
        engine = running.service._engine
        with monkeypatch.context() as patch:
            patch.setattr(engine._batcher, "add", lambda _: 1 // 0)
            assert running.ask(url)[0] == 500
        assert running.ask(url)[0] == running.call("GET", "/health")[0] == 200
        engine.close()
        status, _, content = running.call("GET", "/health")
        assert (status, content) == (503, {"status": "failed"})


def test_a_draw_that_fails_costs_its_own_answer(serving_chat, serving_folder, caplog):
    url = uri(serving_folder / "videos" / "4.mp4")
    settings = {"request_timeout": 20.0}
    with served(serving_chat, serving_folder / "model", **settings) as running, ThreadPoolExecutor(2) as pool:
        wanted = running.ask(url)
        batcher = running.service._engine._batcher
        take = batcher._take

        def failing(some, logits_BV):
            logits_BV[[each.generator is not None for each in some]] = torch.nan
            return take(some, logits_BV)

        batcher._take = failing
        with held_answers(running):
            other, bad = pool.submit(running.ask, url), pool.submit(running.ask, url, temperature=1.0)
            wait_until(lambda: len(running.service._engine._answers) == 2)
        assert bad.result()[0] == 500
        assert text_of(other.result()[1]) == text_of(wanted[1])
        assert running.metric("fastvid_requests_in_flight") == 0
    assert "an answer is lost: there is no next token" in caplog.text


@pytest.mark.parametrize("stops", [(), ("ab",), ("xyz", "y"), (" ",), ("é",)])
def test_pieces_of_text_are_the_text(stops):
    """Tokens are bytes, so that characters come in halves."""
    rng = random.Random(1)

    def decode_bytes(ids):
        return bytes(ids).decode(errors="replace")

    for _ in range(200):
        whole = "".join(
            rng.choice(["a", "b", "x", "y", "z", " ", "é", "語", "\n", "\ufffd"]) for _ in range(rng.randrange(12))
        )
        ids, cuts = list(whole.encode()), sorted(rng.randrange(40) for _ in range(4))
        text, pieces = AnswerText(decode_bytes, stops), []
        for first, end in zip([0, *cuts], [*cuts, None]):
            if not text.stopped:
                pieces.append(text.add(ids[first:end]))
        pieces.append(text.end())
        found = [at for at in map(whole.lstrip().find, stops) if at >= 0]
        assert "".join(pieces) == (whole.lstrip()[: min(found)].rstrip() if found else whole.strip())
        assert text.stopped == bool(found)
        assert text.tokens <= len(ids)
