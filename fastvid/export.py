"""``fastvid export``: a checkpoint to the reference's projector file, or to a Hugging Face folder.

- projector: ``mm_projector.bin`` or ``.safetensors``, as the reference's training leaves it.
- peft: a LoRA adapter in PEFT's format, and the projector beside it.
- llama: a folder in LLaVA-1.5's own layout: LLaMA's names and ``model.mm_projector``. Its model_type is "llama", so
  that ``LlamaForCausalLM`` and ``AutoModelForCausalLM`` load the language model; fastvid starts from it too.
- llava: a folder in llava-hf's layout, tower included, which ``LlavaForConditionalGeneration`` loads.

A LoRA adapter is merged into the matrices of a llama or llava folder.
"""

from collections.abc import Sequence
from pathlib import Path

from fastvid.config import ExportConfig
from fastvid.flags import parse
from fastvid.weights.export import card_of, export
from fastvid.weights.hub import Repository


def main(argv: Sequence[str] | None = None) -> int:
    """The command; prints what was written, with sizes, and where it was uploaded to."""
    config = parse(ExportConfig, argv)
    repository = None
    if config.push_to_hub:  # before hours of work turn out to be for nobody
        repository = Repository(config.hub_model_id or Path(config.output).absolute().stem)
    paths = export(config)
    for path in paths:
        print(f"{path.stat().st_size / 1e6:12,.1f} MB  {path}")
    if repository is not None:
        private = True if config.hub_private_repo else None
        print(f"uploaded to {repository.push(paths, card_of(config), private=private)}")
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("export")
