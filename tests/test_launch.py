"""The launch scripts, with stand-ins for torchrun and Slurm's commands that write down how they were called."""

import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT

COMMANDS = {
    "torchrun": 'echo "torchrun $*" >> "$CALLS"; echo "restarts after ${TORCH_ELASTIC_SHUTDOWN_TIMEOUT}" >> "$CALLS"\n'
    'echo "keeps $TORCH_FR_BUFFER_SIZE collectives, dump $TORCH_NCCL_DUMP_ON_TIMEOUT" >> "$CALLS"\n'
    'trap "echo torchrun stops >> $CALLS; exit ${ENDS:-143}" TERM\nfor i in $(seq "${STEPS:-0}"); do sleep '
    "0.1; done",
    "srun": 'echo "srun $1 $2" >> "$CALLS"; shift 2; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then printf "gpu07\\ngpu09\\n"; else echo "scontrol $*" >> "$CALLS"; fi',
}


@pytest.fixture
def launch(tmp_path):
    """Function that starts a launch script; its calls lie in `calls`."""
    for name, body in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}

    def start(script, *flags, stderr=None, text=None, **variables):
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / script), *flags],
            env=environment | variables,
            cwd=tmp_path,
            stderr=stderr,
            text=text,
        )

    start.calls = tmp_path / "calls"
    return start


SLURM = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "gpu[07,09]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "4711",
    "SLURM_CPUS_PER_TASK": "64",
}


def test_one_machine(launch):
    assert launch("launch_train.sh", "--max_steps", "7", OUTPUT="there").wait(20) == 0
    called = launch.calls.read_text()
    assert called.startswith("torchrun --nproc_per_node 4 --max_restarts 3 --master_port 29001 ")
    assert "scripts/train.py --model_name_or_path" in called and "--output_dir there " in called
    assert "--lazy_preprocess True --tokens_per_batch auto --max_steps 7\n" in called and "restarts after 300" in called


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, variables, fills",
    [
        ([], {}, True),
        (["--model_max_length", "4096"], {}, True),
        ([], {"BATCH": "4"}, False),
        ([], {"BATCH": "8"}, False),
        (["--per_device_train_batch_size", "3"], {}, False),
        (["--tokens-per-batch=500"], {}, False),
        (["--rows_per_batch", "500"], {}, False),
        (["--gradient_accumulation_steps", "2"], {}, False),
        ([], {"ACCUMULATION": "2"}, False),
        (["--parity", "reference"], {}, False),
        (["--config", "mine.yaml"], {}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_batches_fill_the_cards_where_none_is_given(launch, tmp_path, flags, variables, fills):
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.001\n")
    assert launch("launch_train.sh", *flags, **variables).wait(20) == 0
    called = launch.calls.read_text()
    assert f"--per_device_train_batch_size {variables.get('BATCH', 8)} " in called
    assert ("--tokens_per_batch auto" in called) == fills


@pytest.mark.slow
@pytest.mark.parametrize("script", ["launch_train.sh", "launch_train.slurm"])
@pytest.mark.parametrize(
    "given, kept",
    [
        ({}, "2000 collectives, dump 1"),
        ({"TORCH_FR_BUFFER_SIZE": "9", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}, "9 collectives, dump 0"),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}, "7 collectives, dump 1"),
    ],
)
def test_nccl_keeps_its_last_collectives(launch, script, given, kept):
    assert launch(script, **(SLURM if script.endswith("slurm") else {}), **given).wait(20) == 0
    assert f"keeps {kept}\n" in launch.calls.read_text()


@pytest.mark.slow
def test_slurm_starts_torchrun_on_every_node(launch):
    assert launch("launch_train.slurm", "--shard", "hybrid", **SLURM).wait(20) == 0
    called = launch.calls.read_text()
    assert called.startswith("srun --kill-on-bad-exit=1 --cpus-per-task=64\ntorchrun --nproc_per_node 8 ")
    assert "--nnodes 2 --rdzv_backend c10d --rdzv_endpoint gpu07:29001 --rdzv_id 4711 " in called
    assert "--shard hybrid\n" in called and "requeue" not in called


def stop(job, calls):
    """Slurm's signal, once torchrun runs."""
    while not calls.exists() or "torchrun" not in calls.read_text():
        time.sleep(0.05)
    time.sleep(0.3)  # until the stand-in's trap is set
    job.send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_slurm_job_whose_time_is_over_saves_and_queues_again(launch):
    job = launch("launch_train.slurm", STEPS="200", **SLURM)
    stop(job, launch.calls)
    assert job.wait(20) == 143
    assert launch.calls.read_text().splitlines()[-2:] == ["torchrun stops", "scontrol requeue 4711"]


@pytest.mark.slow
def test_a_slurm_job_that_was_done_when_its_time_was_over_is_not_queued_again(launch):
    job = launch("launch_train.slurm", STEPS="200", ENDS="0", **SLURM)
    stop(job, launch.calls)
    assert job.wait(20) == 0
    assert launch.calls.read_text().splitlines()[-1] == "torchrun stops"


# Stands for torchrun, whose restarts are as many as it is told, with two ranks that meet the same mistake.
RESTARTS = """while [[ $1 != *.py ]]; do [[ $1 != --max_restarts ]] || restarts=$2; shift; done
for attempt in $(seq 0 "$restarts"); do
  echo "attempt" >> "$CALLS"
  for rank in 0 1; do RANK=$rank python3 "$@"; done
done
echo "torchrun's own report" >&2; exit 1
"""


def test_a_wrong_flag_is_told_before_torchrun_starts(launch):
    job = launch("launch_train.sh", "--learning_rat", "1", "--fp16", "True", stderr=subprocess.PIPE, text=True)
    [line] = job.communicate(timeout=20)[1].splitlines()
    assert job.returncode == 2 and not launch.calls.exists()
    assert "unknown flag --learning_rat, did you mean --learning_rate?" in line and "--bf16 True" in line


def test_a_wrong_flag_of_alignment_is_told_before_anything_is_extracted(launch):
    job = launch("launch_align.sh", "--learning_rat", "1", stderr=subprocess.PIPE, text=True)
    assert "did you mean --learning_rate?" in job.communicate(timeout=20)[1]
    assert job.returncode == 2 and not launch.calls.exists()


@pytest.mark.slow
def test_a_mistake_is_told_last_and_not_tried_again(launch, tmp_path):
    (tmp_path / "bin" / "torchrun").write_text(f"#!/usr/bin/env bash\n{RESTARTS}")
    begin = time.monotonic()
    job = launch(
        "launch_train.sh",
        MODEL=str(tmp_path / "nowhere"),
        MAX_RESTARTS="9",
        TMPDIR=str(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = job.communicate(timeout=60)[1].splitlines()
    assert job.returncode == 1 and launch.calls.read_text().count("attempt") == 10
    assert lines[-2] == "torchrun's own report"
    assert lines[-1].startswith("fastvid train: error: ") and str(tmp_path / "nowhere") in lines[-1]
    assert sum("error: " in line for line in lines) == 2, "once when it is met, by one rank, and once at the end"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]
    assert time.monotonic() - begin < 40


@pytest.mark.slow
def test_alignment_extracts_images_and_then_trains_a_projector(launch):
    assert launch("launch_align.sh", "--max_steps", "7", MODEL="qwen", TOWER="siglip", NNODES="1").wait(20) == 0
    extraction, training = (line for line in launch.calls.read_text().splitlines() if line.startswith("torchrun --n"))
    assert "features.py --images True --video_dir_path data/LLaVA-Pretrain --clip_feat_path" in extraction
    assert extraction.endswith("--vision_tower siglip") and "--model_name_or_path qwen " in training
    assert "--video_folder data/LLaVA-Pretrain-features --tune_mm_mlp_adapter True" in training
    assert "--learning_rate 1e-3" in training and "--output_dir output/align" in training
    assert training.endswith("--version auto --mm_projector_type mlp2x_gelu --max_steps 7")
    launch.calls.unlink()
    assert launch("launch_align.sh", IMAGES="").wait(20) == 0
    assert "--images" not in launch.calls.read_text()
