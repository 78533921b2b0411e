"""The chat template of an export: what transformers makes of messages is fastvid's prompt, token for token."""

import re

import pytest
from family_folders import KINDS, write_tokenizer
from training_run import write_run

from fastvid.data.conversation import inference_prompt
from fastvid.data.exported_template import exported_template
from fastvid.data.names import PATCH
from fastvid.data.tokenizer import load_tokenizer

ROWS = 5
HISTORY = [("What does the cat see?", "two people")]


def messages(question, history):
    """A conversation about a picture, whose part stands where training never had it."""
    texts = [text for turn in history for text in turn] + [question]
    made = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    first = [{"type": "image"}, {"type": "text", "text": texts[0]}]
    return [{"role": "user", "content": first}, *made[1:]]


@pytest.mark.parametrize("order", ["reference", "video_first"])
@pytest.mark.parametrize("start_end", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_familys_prompts_are_those_of_chat(tmp_path, kind, start_end, order):
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "base", kind)
    tokenizer = load_tokenizer(folder, start_end)
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_bytes((folder / "config.json").read_bytes())
    template = exported_template(tokenizer, "chat_template", order)
    (tmp_path / "saved" / "chat_template.jinja").write_text(template)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "saved", start_end)
    assert exported_template(again, "chat_template", order) == again.template.source, "it is put before once"
    for history in ([], HISTORY):
        options = {"history": history, "question_order": order, "use_start_end": start_end}
        options |= {"video_tokens": ROWS, "conv_mode": "chat_template"}
        wanted = inference_prompt("why so fast?", tokenizer, **options)
        text = theirs.apply_chat_template(messages("why so fast?", history), add_generation_prompt=True, tokenize=False)
        assert text.count(PATCH) == 1
        assert theirs(text.replace(PATCH, PATCH * ROWS), add_special_tokens=False).input_ids == wanted
        assert wanted == inference_prompt("why so fast?", again, **options)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_servers_see_that_messages_may_have_parts(tmp_path, kind):
    """vLLM looks for a loop over a message's content itself (`_detect_content_format`): without one it writes pictures
    into the text, in words of its own, and the prompt has no placeholder. Seen with vLLM 0.32."""
    jinja2 = pytest.importorskip("jinja2")
    folder = write_run(tmp_path) / "model" if kind is None else write_tokenizer(tmp_path / "base", kind)
    template = exported_template(load_tokenizer(folder, True), None if kind is None else "chat_template", None)
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers' own
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    loops = [loop.iter for loop in tree.find_all(jinja2.nodes.For)]
    over = [each for each in loops if isinstance(each, jinja2.nodes.Getitem) and each.arg.as_const() == "content"]
    assert over and all(each.node.name == "message" for each in over)
