"""The chat template of an export: what transformers makes of messages is fastvid's prompt, token for token."""

import pytest
from family_folders import KINDS, write_tokenizer

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
