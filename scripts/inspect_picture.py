"""The docs' picture of `fastvid inspect --html`: python scripts/inspect_picture.py [docs/inspect.png]

Draws a clip, makes its features with a small CLIP tower of random weights, inspects a record about it, and renders the
page. Rendering needs two packages that nothing else does: pip install weasyprint pypdfium2
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
WIDTH, HEIGHT, FRAMES = 320, 180, 90
PAGE = 1180, 1770  # CSS pixels of the picture
QUESTION = "What moves through the picture, and where to?\n<video>"
ANSWER = "A yellow ball flies from the left to the right, and below it a red box slides to the left."


def picture(number):
    """[H, W, 3] uint8: a ball that flies to the right over a box that slides to the left."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([40 + y * 0.3, 90 + y * 0.4, 200 - y * 0.5], -1)
    pixels[y > 130] = 70, 130, 60
    share = number / FRAMES
    pixels[(x - 20 - share * 280) ** 2 + (y - 50 - 25 * np.sin(number / 12)) ** 2 < 22**2] = 250, 210, 60
    pixels[(abs(x - 300 + share * 260) < 26) & (abs(y - 135) < 14)] = 200, 40, 40
    return pixels.clip(0, 255).astype(np.uint8)


def draw(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(stream.encode(None))


def build(folder):
    """A tower of 16 × 16 patches, and a model's folder with a tokenizer."""
    import sentencepiece
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    CLIPVisionModel(
        CLIPVisionConfig(
            image_size=224,
            patch_size=14,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            initializer_range=0.2,
        )
    ).save_pretrained(folder / "tower")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "mm_hidden_size": 64}))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([QUESTION, ANSWER]),
        model_prefix=str(folder / "model" / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )


def render(page, target):
    """A PNG of the page as WeasyPrint lays it out."""
    import pypdfium2
    from weasyprint import CSS, HTML

    width, height = PAGE
    sheet = CSS(string=f"@page {{ size: {width}px {height}px; margin: 0 }}")
    document = pypdfium2.PdfDocument(HTML(str(page)).write_pdf(stylesheets=[sheet]))
    document[0].render(scale=96 / 72).to_pil().quantize(256).save(target, optimize=True)


def main(target="docs/inspect.png"):
    from fastvid import extract, inspection

    target = Path(target).absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        folder = Path(folder)
        (folder / "videos").mkdir()
        draw(folder / "videos" / "ball.mp4")
        build(folder)
        record = {
            "id": "ball",
            "video": "ball.mp4",
            "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
        }
        (folder / "train.json").write_text(json.dumps([record]))
        code = extract.main(
            [
                "--video_dir_path",
                "videos",
                "--clip_feat_path",
                "features",
                "--vision_tower",
                "tower",
                "--num_frames",
                "10",
                "--device",
                "cpu",
            ]
        )
        code = code or inspection.main(
            [
                "--model_name_or_path",
                "model",
                "--data_path",
                "train.json",
                "--video_folder",
                "features",
                "--video_dir_path",
                "videos",
                "--mm_use_vid_start_end",
                "--index",
                "0",
                "--html",
                "page.html",
            ]
        )
        render(folder / "page.html", target)
    return code


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(*sys.argv[1:]))
