"""The chat template of an export, as Jinja: what transformers and vLLM render of messages is fastvid's own prompt.

Messages may hold parts of text and of pictures. Wherever these stand, pictures go where those of training stood, and
there is no white space of the template's own around them in v1. A picture is one placeholder, which a processor makes
as many of as it has rows. A video's pooled rows are a picture, too.

The files: prompt_v1.jinja is the whole of v1; prompt_family.jinja goes before a family's own template, which takes
texts alone; prompt_parts.jinja is within both. By its loop vLLM sees that a message may have parts.
"""

import json
from importlib import resources

from fastvid.data.conversation import SYSTEM
from fastvid.data.names import END, PATCH, START
from fastvid.data.tokenizer import ModelTokenizer


def exported_template(tokenizer: ModelTokenizer, conv_mode: str | None, question_order: str | None) -> str:
    """The Jinja of a model's prompts.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        conv_mode: whose system text v1 has, one of `SYSTEM`; others, and None: training's.
        question_order: "reference" or "video_first"; None: "reference".
    """
    picture = PATCH if tokenizer.tokens.start is None else START + PATCH + END
    names = {
        "PARTS": _file("parts").replace("PICTURE", json.dumps(picture)),
        "VIDEO_FIRST": json.dumps(question_order == "video_first"),
        "SYSTEM": json.dumps(SYSTEM.get(conv_mode or "", SYSTEM["vicuna_v1_1"])),
    }
    text = _file("v1" if tokenizer.template is None else "family")
    for name, value in names.items():
        text = text.replace(name, value)
    if tokenizer.template is None:
        return text
    own = tokenizer.template.source
    return own if text in own else text + own


def _file(name):
    return resources.files("fastvid.data").joinpath(f"prompt_{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
