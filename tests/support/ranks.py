"""Processes that stand for ranks."""

import gc
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from forks import FORKS


def on_ranks(world_size, function, tmp_path, *args, timeout=60):
    """Results of `function(rank, *args)`, run by `world_size` processes that a gloo group joins.

    A collective that lasts `timeout` seconds fails.
    """
    store = tmp_path / f"store-{len(list(tmp_path.glob('store-*')))}"
    with ProcessPoolExecutor(world_size, mp_context=FORKS) as pool:
        futures = [
            pool.submit(_as_rank, rank, world_size, str(store), function, args, timeout) for rank in range(world_size)
        ]
        return [future.result(timeout=120) for future in futures]


def _as_rank(rank, world_size, store, function, args, timeout):
    gc.freeze()  # of what was imported no page need be copied
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    try:
        return function(rank, *args)
    finally:
        dist.destroy_process_group()


def leave():
    """End a rank whose work is done, past the interpreter's shutdown.

    Once something was sharded, gloo's threads outlive the process group, and one that drops its last tensor while the
    interpreter shuts down aborts the process. Commands leave the same way (`fastvid.cli.run`).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
