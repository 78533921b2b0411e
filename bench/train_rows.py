"""One row of the training benchmark, in a process of its own: python -m bench.train_rows ROW --folder F --dtype bf16 …

Reads commands from stdin, one a line, and answers each with a line of JSON on stdout:

    first  a step at learning rate 0 with its floating-point operations counted: loss, norm, samples, rows, flops
    step   a timed step: seconds, loss, norm
    end    peak_bytes, and start_bytes that the process held before it built anything

The row "matmul" answers `step` with the rate of a large square matrix product instead.
"""

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import replace

import torch

from bench.executed import executed_flops, matmul_rate
from bench.train_presets import ROWS

LEARNING_RATE = 2e-5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def config_of(row, folder, dtype, micro_batch):
    """The configuration of a row of fastvid's, on the files that `bench.train_data.write` wrote into `folder`."""
    from fastvid.config import TrainConfig
    from fastvid.flags import parse

    adapter = () if row.full else ("--tune_mm_mlp_adapter", "True")
    batch = (
        ("--gradient_accumulation_steps", "2")
        if row.budget
        else ("--per_device_train_batch_size", str(row.micro_batch or micro_batch))
    )
    return parse(
        TrainConfig,
        [
            "--model_name_or_path",
            f"{folder}/model",
            "--data_path",
            f"{folder}/{'budget' if row.budget else 'train'}.json",
            "--video_folder",
            f"{folder}/feats",
            "--output_dir",
            f"{folder}/out",
            "--mm_use_vid_start_end",
            *adapter,
            "--bf16",
            str(dtype == torch.bfloat16),
            "--max_steps",
            "1000",
            "--warmup_steps",
            "1",
            "--lr_scheduler_type",
            "constant_with_warmup",
            "--learning_rate",
            str(LEARNING_RATE),
            "--dataloader_num_workers",
            "0",
            *batch,
            *row.flags,
        ],
    )


def packed(row, loader, micro_batch):
    """The micro-batches of one optimizer step of a row, from its `Loader`; under a budget of rows its own first."""
    from fastvid.data.packing import pack

    samples, packing = loader.samples, loader.packing
    if row.budget:
        batches = loader.read(0)[0]
    else:
        if not row.apart:
            packing = packing | {"prefix": (), "frozen": False}
        read = [samples.read(i) for i in range(len(samples))]
        batches = [
            pack(read[i : i + micro_batch], samples.tokenizer.tokens, samples.channels, **packing)
            for i in range(0, len(read), micro_batch)
        ]
    return batches if row.last_layer else [replace(batch, loss_layout=None) for batch in batches]


class Fastvid:
    """`fastvid.train.train_step` on the state that `fastvid.train.build` makes of a training command line.

    The packer is called here, as the state's loader calls it, so that every row takes the same samples in the same
    micro-batches, and so that ideas can be left out. Under a budget of rows the batches are the loader's own.
    """

    def __init__(self, row, folder, dtype, micro_batch):
        from fastvid import train
        from fastvid.dist import parallel

        self.folder, self.dtype, self.train_step = folder, dtype, train.train_step
        self.state = train.build(config_of(row, self.folder, self.dtype, micro_batch), parallel.start())
        self.device = self.state.world.device
        self.starting = {name: p.detach().clone() for name, p in self._adapter(row).items()}
        self._pack(row, micro_batch)

    def take(self, row, micro_batch):
        """Become another row with the same model: its batches, and the weights that all rows start from."""
        from fastvid.data.dataset import SampleSet
        from fastvid.data.loader import training_loader

        state, config = self.state, config_of(row, self.folder, self.dtype, micro_batch)
        samples = SampleSet(config.data_path, state.tokenizer, state.loader.samples.features, config)
        samples.fit(state.model.config.channels)
        self.state = replace(state, config=config, loader=training_loader(config, samples, state.world), step=0)
        with torch.no_grad():
            for name, parameter in self._adapter(row).items():
                parameter.copy_(self.starting[name])
        self._pack(row, micro_batch)

    def _adapter(self, row):
        return {} if row.full else self.state.optimizer.parameters

    def _pack(self, row, micro_batch):
        state = self.state
        self.batches = packed(row, state.loader, row.micro_batch or micro_batch)
        if self.device.type == "cuda":
            self.batches = [batch.pin_memory() for batch in self.batches]  # as the loader does
        self.samples = sum(len(batch.sample_ids) for batch in self.batches)
        self.rows = sum(batch.num_rows for batch in self.batches)
        self.sample_rows = sum(batch.sample_rows for batch in self.batches)

    @property
    def in_parts(self):
        """Whether attention takes shared videos in two merged parts, instead of gathering their keys."""
        parts = self.state.model.decoder.layers[0].attention.parts
        return parts is not None and any(batch.layout.branches is not None for batch in self.batches)

    def step(self):
        result = self.train_step(self.state, self.batches)
        return result.loss.item(), result.gradient_norm.item()


class Matmul:
    def __init__(self, dtype):
        self.dtype, self.device = dtype, default_device()

    def rate(self):
        return matmul_rate(self.dtype, self.device)


def step_samples(row, folder):
    """(tokens, samples of one optimizer step as `fastvid.data` encodes them) for a row of transformers' model."""
    from fastvid.config import TrainConfig
    from fastvid.data.dataset import SampleSet
    from fastvid.data.tokenizer import load_tokenizer
    from fastvid.features.folder import FeatureFolder
    from fastvid.flags import parse

    tokenizer = load_tokenizer(f"{folder}/model", True)
    config = parse(
        TrainConfig,
        [
            "--model_name_or_path",
            f"{folder}/model",
            "--data_path",
            f"{folder}/train.json",
            "--output_dir",
            f"{folder}/out",
            "--mm_use_vid_start_end",
            *row.flags,
        ],
    )
    samples = SampleSet(config.data_path, tokenizer, FeatureFolder(f"{folder}/feats"), config)
    return tokenizer.tokens, [samples.read(i) for i in range(len(samples))]


def baseline(row, folder, dtype, micro_batch):
    from bench import baselines

    kinds = {
        "reference": baselines.Reference,
        "strong": baselines.Strong,
        "tuned": baselines.Tuned,
        "unpadded": baselines.Unpadded,
        "compiled": baselines.Compiled,
        "lora": baselines.Lora,
        "lora_recipe": baselines.LoraRecipe,
    }
    tokens, samples = step_samples(row, folder)
    return kinds[row.kind](
        f"{folder}/model",
        samples,
        tokens,
        dtype=dtype,
        micro_batch=row.micro_batch or micro_batch,
        device=default_device(),
        learning_rate=LEARNING_RATE,
    )


def make(name, folder, dtype, micro_batch):
    if name == "matmul":
        return Matmul(dtype)
    row = ROWS[name]
    build = Fastvid if row.kind == "fastvid" else baseline
    return build(row, folder, dtype, micro_batch)


def default_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def answer(row, command):
    if command == "step" and isinstance(row, Matmul):
        return {"rate": row.rate()}
    if command == "first" and isinstance(row, Matmul):
        return {}
    if command == "first":
        (loss, norm), flops = executed_flops(row.step)
        return {
            "loss": loss,
            "norm": norm,
            "samples": row.samples,
            "rows": row.rows,
            "sample_rows": row.sample_rows,
            "flops": flops,
        }
    if command == "step":
        begin, worked = time.perf_counter(), time.process_time()
        loss, norm = row.step()
        return {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - worked,
            "loss": loss,
            "norm": norm,
        }
    raise ValueError(f"no command is called {command!r}")


def peak_bytes():
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("row")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--micro_batch", type=int, required=True)
    arguments = parser.parse_args(argv)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import transformers  # noqa: F401  every row starts with it, so that its memory is in all of them

    start = peak_bytes()
    row = make(arguments.row, arguments.folder, DTYPES[arguments.dtype], arguments.micro_batch)
    print(json.dumps({"ready": arguments.row}), file=answers, flush=True)
    for command in map(str.strip, sys.stdin):
        if command == "end":
            print(json.dumps({"peak_bytes": peak_bytes(), "start_bytes": start}), file=answers, flush=True)
            return
        print(json.dumps(answer(row, command)), file=answers, flush=True)


if __name__ == "__main__":
    main()
