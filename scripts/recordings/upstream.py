"""Upstream's modules from a checkout, and everything that stands in for what a small machine lacks.

Upstream is written for a GPU, for CLIP ViT-L/14 of 1024 channels, and for models that a hub holds. Each stand-in is one
function here, says in STAND_INS what it replaces, and leaves upstream's own code as it is.
"""

import contextlib
import importlib
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

USED = ("scripts", "video_chatgpt")
SCRIPT = Path("scripts", "save_spatio_temporal_clip_features.py")
STAND_INS = {
    "cuda": "`.cuda()` of tensors and modules returns what it is called on: everything runs on a CPU",
    "width": "the literal 1024, the channels of CLIP ViT-L/14, is the width of a tiny tower or feature",
    "tower": "CLIPVisionModel and CLIPImageProcessor of the hub are a tiny tower's folder, in float32",
    "reader": "decord.VideoReader returns frames that are drawn in memory (features.npz, preprocess.json)",
    "float32": "feature files of the training runs hold float32: without autocast no projector takes float16",
    "model": "`generate` ends before its first token and the tower sees no frames where only the prompt is recorded",
    "barrier": "one process of gloo's is the process group",
    "flash": "train.py is run, not train_mem.py: flash-attn needs a GPU",
}


def versions(checkout):
    """Of everything that decides a number, upstream's commit among them."""
    import importlib.metadata as metadata

    def git(*words):
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    names = ("torch", "transformers", "tokenizers", "sentencepiece", "numpy", "pillow", "decord", "av")
    return {
        "upstream_commit": git("rev-parse", "HEAD") or "unknown: the checkout has no history",
        "upstream_changes": (git("status", "--porcelain", "--untracked-files=no", "--", *USED) or "").splitlines(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def check(checkout):
    """End the program where the folder is no checkout of upstream."""
    for path in (Path(checkout, SCRIPT), Path(checkout, "video_chatgpt", "train", "train.py")):
        if not path.is_file():
            raise SystemExit(f"{path} is not there: name a checkout of mbzuai-oryx/Video-LLaVA")


def load(checkout):
    """Make upstream's package importable, and return its feature script as a module.

    Raises:
        SystemExit: its code does not run with the packages that are installed.
    """
    sys.path.insert(0, str(checkout))
    try:
        spec = importlib.util.spec_from_file_location("upstream_features", Path(checkout, SCRIPT))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        importlib.import_module("video_chatgpt.train.train")
    except (ImportError, AttributeError) as error:
        raise SystemExit(
            f"upstream's code does not run here ({error}): install tests/golden/requirements.txt"
        ) from error
    return module


class Torch:
    """torch as a module of upstream sees it, but that its literal 1024 means `width`."""

    def __init__(self, width):
        self._width = width

    def __getattr__(self, name):
        import torch

        made = getattr(torch, name)
        if name not in ("zeros", "FloatTensor"):
            return made
        return lambda *shape, **options: made(*(self._width if size == 1024 else size for size in shape), **options)


@contextlib.contextmanager
def without_gpu():
    import torch

    with (
        mock.patch.object(torch.Tensor, "cuda", lambda self, *a, **k: self),
        mock.patch.object(torch.nn.Module, "cuda", lambda self, *a, **k: self),
    ):
        yield


class Reader:
    """decord's VideoReader over frames in memory: `videos[name of the file]`."""

    def __init__(self, videos):
        self.videos = videos

    def __call__(self, path, ctx=None):
        return _Frames(self.videos[Path(path).name])


class _Frames:
    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return len(self.frames)

    def get_batch(self, indices):
        return mock.Mock(asnumpy=lambda: self.frames[indices])


@contextlib.contextmanager
def feature_script(module, tower, reader=None):
    """`module.main()` with a folder's tower for the hub's, and frames in memory if a reader is given."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionModel

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = CLIPVisionModel.from_pretrained(tower)

        def forward(self, pixels, **options):
            return self.model(pixels.float(), **options)

        @classmethod
        def from_pretrained(cls, name, **options):
            return cls()

    class Processor:
        @classmethod
        def from_pretrained(cls, name, **options):
            return CLIPImageProcessor.from_pretrained(tower)

    changed = {"CLIPVisionModel": Tower, "CLIPImageProcessor": Processor, "tqdm": list}
    changed["torch"] = Torch(CLIPVisionModel.from_pretrained(tower).config.hidden_size)
    if reader is not None:
        changed["VideoReader"] = reader
    with without_gpu(), mock.patch.multiple(module, **changed):
        yield


@contextlib.contextmanager
def tiny_models(width):
    """Models whose features have `width` channels, on a CPU, in a process group of one."""
    import torch
    from video_chatgpt.model import video_chatgpt as models

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with without_gpu(), mock.patch.object(models, "torch", Torch(width)):
        yield
