"""Start a run on ten million records, and on all of them tokenized: seconds, CPU seconds and peak memory.

python bench/records.py [--records 10000000] [--tokenized 1000000] [--folder /tmp] [--json FILE]

Records are VideoInstruct's in the training form: 7.5 about a video. Each row is a process of its own, which looks at
all of them as training does before its first step; whether their features are there is not asked. "tokenized" is what
--tokens_per_batch does besides. The files take 540 bytes a record, and are removed.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conversion import WORDS
from harness import ROOT, write_results

BODIES = 20_000  # conversations that differ
LOOK = """
import sys
from fastvid.data.annotations import examine
from fastvid.data.table import RecordTable
from fastvid.config.policy import POLICIES
path, processes = sys.argv[1:]
table = RecordTable(
    lambda record, number: examine(record, number, policy=POLICIES["none"], use_start_end=True),
    lambda name: None,
    int(processes),
)
table.add(path)
print(len(table))
"""
TOKENIZE = """
import sys
import torch
from fastvid.config import TrainConfig
from fastvid.data.dataset import SampleSet
from fastvid.data.lengths import measure
from fastvid.data.tokenizer import load_tokenizer
from fastvid.dist.parallel import World
path, processes, model = sys.argv[1:]
config = TrainConfig(model, [path], output_dir="unused", dataloader_num_workers=int(processes))
samples = SampleSet([path], load_tokenizer(model, False), None, config)
packing = {"prefix": (), "share": False, "frozen": False}
world = World(0, 1, 0, torch.device("cpu"), False)
print(len(measure(samples, world, packing=packing, processes=int(processes)).own))
"""


def bodies(placeholder):
    """JSON of conversations, which goes on after the fields before it."""
    rng = random.Random(0)
    words = [word for word in WORDS if word.isascii()] + ["café"]

    def text(least, most):
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    for _ in range(BODIES):
        turns = [{"from": "human", "value": text(5, 20) + "?" + placeholder}, {"from": "gpt", "value": text(10, 120)}]
        yield f'"conversations": {json.dumps(turns)}}}'


def write(path, count, form, about="video"):
    """Records as JSONL, as one JSON array or as Parquet; or a model's folder."""
    if form == "model":
        return write_model(path)
    video = about == "video"
    made = list(bodies("\n<video>" * video))

    def record(i):
        named = f'"video": "v_{i * 2 // 15:07d}.mp4", ' if video else ""
        return f'{{"id": "{i}", {named}{made[i % BODIES]}'

    if form == "parquet":
        return write_parquet(path, (record(i) for i in range(count)))
    begin, between, end = {"jsonl": ("", "\n", "\n"), "json": ("[", ", ", "]")}[form]
    with open(path, "w") as file:
        file.write(begin)
        for first in range(0, count, BODIES):
            file.write(between * (first > 0) + between.join(map(record, range(first, min(count, first + BODIES)))))
        file.write(end)


def write_parquet(path, records):
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    writer, records = None, iter(records)
    while some := [json.loads(each) for each in itertools.islice(records, 100_000)]:
        table = pyarrow.Table.from_pylist(some)
        writer = writer or ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def run(program, *arguments) -> tuple[str, dict]:
    """(output, figures) of a program in a process of its own, and of the processes that it starts."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "the program failed"
    return said, {
        "seconds": round(time.perf_counter() - begin, 2),
        "user_seconds": round(usage.ru_utime, 2),
        "system_seconds": round(usage.ru_stime, 2),
        "peak_gib": round(usage.ru_maxrss / 2**20, 3),  # of the largest of the processes
    }


def write_model(folder):
    """A folder with a tokenizer of LLaMA's kind: its vocabulary's size decides little about its speed."""
    sys.path.insert(0, str(ROOT))
    from bench.train_data import write_config, write_tokenizer
    from bench.train_presets import PRESETS

    folder.mkdir()
    write_config(folder, PRESETS["cpu-110m"].shape)
    write_tokenizer(folder, random.Random(0))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--tokenized", type=int, default=1_000_000)
    parser.add_argument("--forms", nargs="+", default=["jsonl", "json", "parquet"])
    parser.add_argument("--processes", nargs="+", type=int, default=[0, 2], help="--dataloader_num_workers")
    parser.add_argument("--folder", help="where there is room for the files")
    parser.add_argument("--write", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []

    def add(what, form, count, processes, program, *more):
        said, figures = run(program, path, processes, *more)
        assert int(said.split()[-1]) == count
        rows.append({"row": what, "form": form, "records": count, "processes": processes, **figures})
        print(rows[-1], flush=True)

    if arguments.write:
        return write(Path(arguments.write[0]), arguments.records, *arguments.write[1:])

    def make(path, count, *how):
        """In a process of its own: what one takes counts in the peak of those that it starts."""
        command = [sys.executable, __file__, "--records", str(count), "--write", path, *how]
        subprocess.run(command, check=True)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["TMPDIR"] = folder  # where Parquet is unpacked to
        path = Path(folder) / "data"
        for form in arguments.forms:
            make(path, arguments.records, form)
            for processes in arguments.processes:
                add("start", form, arguments.records, processes, LOOK)
        if arguments.tokenized:
            make(Path(folder) / "model", 0, "model")
            make(path, arguments.tokenized, "jsonl", "text")
            for processes in arguments.processes:
                add("tokenized", "jsonl", arguments.tokenized, processes, TOKENIZE, Path(folder) / "model")
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
