"""Record what the reference computes: python scripts/record_upstream.py CHECKOUT OUT

CHECKOUT is a checkout of PG-Video-LLaVA (mbzuai-oryx/Video-LLaVA), which you fetch: nothing is downloaded here. Its own
code runs, on a CPU, in an environment of its own (tests/golden/requirements.txt). OUT takes the recordings that tests
compare with. `FASTVID_REFERENCE_DATA=OUT pytest` reads them; without it tests read tests/golden.
"""

import argparse
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]
from recordings import pictures, texts, training, upstream, videos  # noqa: E402 found beside this file

RECIPE = ROOT / "tests" / "golden" / "tiny.py"
MOST_BYTES = 2_000_000


def load_recipe(path):
    """tiny.py as a module: it reads the tokenizer beside it."""
    spec = importlib.util.spec_from_file_location("tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Writes recordings to the empty folder `out`, on models below the folder `made`."""

    def __init__(self, checkout, out, made, tokenizer):
        self.out, self.made = out, made
        if tokenizer:
            shutil.copy(tokenizer, out / "tokenizer.model")
        else:
            texts.train_tokenizer(out / "tokenizer.model")  # before decord is imported: it crashes after
        shutil.copy(RECIPE, out)
        self.recipe = load_recipe(out / RECIPE.name)
        # In a process of its own: PyAV and decord bring an FFmpeg each.
        subprocess.run([sys.executable, videos.__file__, out / "videos"], check=True, stderr=subprocess.DEVNULL)
        self.checkout, self.script = checkout, upstream.load(checkout)
        self.versions = upstream.versions(checkout)
        self.towers = {variant: made / f"clip{variant}" for variant in self.recipe.SIZES}
        self.rows = {variant: self._models(variant) for variant in self.recipe.SIZES}

    def _models(self, variant):
        """Write a model before and after upstream adds its tokens; {kind: [3, D]}, the rows that it adds."""
        import numpy as np

        recipe, tokenizer, tower = self.recipe, self.out / "tokenizer.model", self.towers[variant]
        recipe.write_tower(tower, recipe.SIZES[variant])
        for folder in ("before", "after"):
            recipe.write_data(self.made / folder / f"data{variant}", variant, np.float32)
        recipe.write_model(self.made / "before" / f"model{variant}", variant, tower, tokenizer)
        rows = training.first_rows(self.made / "before", variant, recipe)
        recipe.write_model(self.made / "after" / f"model{variant}", variant, tower, tokenizer, rows)
        return rows

    def write(self, name, recorded, *stand_ins):
        told = {key: upstream.STAND_INS[key] for key in stand_ins}
        recorded["meta"] |= {"versions": self.versions, "stand_ins": told}
        pictures.write(self.out / name, recorded)
        print("\n    ".join([f"{name}: {recorded['meta']['function']}", *told.values()]), flush=True)

    def record_pictures(self):
        import numpy as np

        drawn = {name: self.recipe.clip_video(name) for name in self.recipe.FRAMES}
        for folder in ("filmed", "known"):
            (self.made / folder).mkdir()
        for name in videos.CLIPS:
            if name in videos.WITH_FEATURES:
                shutil.copy(self.out / "videos" / name, self.made / "filmed")
            if name not in videos.NOT_DECORDS:
                shutil.copy(self.out / "videos" / name, self.made / "known")
        self.write("frames.json", pictures.frames(self.script))
        self.write("preprocess.json", pictures.preprocess(self.script, self.towers["336"]), "reader")
        arrays, meta = pictures.pool(self.script)
        np.savez_compressed(self.out / "pool.npz", **arrays)
        self.write("pool.meta.json", meta)
        for name, source in (("features", drawn), ("features_real", self.made / "filmed")):
            np.savez_compressed(self.out / f"{name}.npz", **pictures.features(self.script, self.towers, source))
        meta = {"function": "the whole script: features.npz of frames in memory, features_real.npz of files by decord"}
        self.write("features.meta.json", {"meta": meta}, "cuda", "width", "tower", "reader")
        self.write("clips.json", pictures.clips(self.script, self.made / "known"))

    def record_texts(self):
        rows = {variant: 100 + (size // 14) ** 2 for variant, size in self.recipe.SIZES.items()}
        models = {variant: self.made / "before" / f"model{variant}" for variant in rows}
        self.write("convert.json", texts.convert(self.checkout))
        self.write("tokens.json", texts.tokens(models, rows), "model", "cuda")

    def record_training(self):
        import torch
        from safetensors.torch import save_file

        before, after, recipe = self.made / "before", self.made / "after", self.recipe
        variants, tensors = training.model(after, before, recipe)
        place = f"rows_{recipe.BASE_VOCAB}_{recipe.BASE_VOCAB + 2}"
        for variant, tables in self.rows.items():
            tensors |= {f"{variant}/init/{kind}_{place}": torch.from_numpy(x) for kind, x in tables.items()}
        runs, saved = {}, {}
        for name, more in (
            ("336_main_r0", []),
            ("336_accumulated_r0", ["--gradient_accumulation_steps", "2", "--num_train_epochs", "2"]),
            ("224_main_r0", []),
        ):
            argv = training.argv(name[:3], name, *training.ADAPTER, *more)
            runs[name], steps, bins = training.run(after, argv, recipe)
            runs[name]["argv"], saved[name] = argv, {"bins": bins}
            if name == "336_main_r0":
                tensors |= {f"336/train_main/{key}": x for key, x in steps.items()}
        save_file({name: x.contiguous().clone() for name, x in tensors.items()}, self.out / "model.safetensors")
        (self.out / "model.safetensors").chmod(0o644)
        stand_ins = ("cuda", "width", "float32", "barrier", "flash")
        meta = {"function": "train() as far as its trainer, one forward and backward; whole runs of train()"}
        table = training.trainable(before, recipe)
        recorded = {"meta": meta, "variants": variants, "trainable": table, "train": {"runs": runs}}
        self.write("model.json", recorded, *stand_ins)
        self.write("checkpoint.json", {"meta": {"function": "what these runs saved"}, "runs": saved}, *stand_ins)
        self.write("order.json", training.order(self.made / "none"))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of upstream's repository")
    parser.add_argument("out", type=Path, help="folder for the recordings; files of earlier ones are replaced")
    parser.add_argument(
        "--tokenizer", type=Path, help="a sentencepiece model, in place of one of 512 pieces trained here"
    )
    arguments = parser.parse_args(argv)
    upstream.check(arguments.checkout)
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as made:
        recorder = Recorder(arguments.checkout.resolve(), Path(out), Path(made), arguments.tokenizer)
        recorder.record_pictures()
        recorder.record_texts()
        recorder.record_training()
        size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise SystemExit(f"the recordings take {size} bytes, more than {MOST_BYTES}")
        shutil.copytree(out, arguments.out, dirs_exist_ok=True)
    print(f"{size} bytes of recordings in {arguments.out}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    main(sys.argv[1:])
