"""Where the ranks of one attempt meet, and the groups that they form."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed import DeviceMesh, Store

if TYPE_CHECKING:
    from fastvid.dist.parallel import World


def store_of_this_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A part of `store` that only the ranks of this attempt use; all ranks call it.

    torchrun's restarted ranks meet in the store of those before, where they would find addresses of the dead.

    Raises:
        ConnectionError: on rank 0, names ranks that did not come within `timeout`.
    """
    me = uuid.uuid4().hex
    if rank:
        store.set(f"greeting/{rank}", me)
        attempt = store.get(f"attempt/{me}").decode()  # rank 0's answer to nobody else, so not one of long ago
        store.set(f"joined/{attempt}/{rank}", me)
        return dist.PrefixStore(attempt, store)
    missing, deadline = range(1, size), time.monotonic() + timeout.total_seconds()
    while missing := [other for other in missing if not store.check([f"joined/{me}/{other}"])]:
        if time.monotonic() > deadline:
            raise ConnectionError(f"ranks {', '.join(map(str, missing))} did not come within {timeout}")
        for other in missing:  # some greetings are of earlier attempts, and nobody reads the answer
            if store.check([f"greeting/{other}"]):
                store.set(f"attempt/{store.get(f'greeting/{other}').decode()}", me)
        time.sleep(0.05)
    return dist.PrefixStore(me, store)


def mesh_of(world: World, size: int, *, copies: bool) -> DeviceMesh:
    """The mesh of ranks over which a model is sharded; all ranks call it.

    Args:
        world: `fastvid.dist.parallel.World`.
        size: ranks that hold one copy of the model.
        copies: whether the mesh has a dimension of copies before that of shards, be there one copy.
    """
    if copies:  # torchrun numbers ranks node by node: those of a row of the mesh share one
        mesh = dist.init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("copies", "shards"))
    else:
        mesh = dist.init_device_mesh(world.device.type, (size,))
    if world.timeout:
        for group in mesh.get_all_groups():  # which torch makes with a timeout of its own
            dist.distributed_c10d._set_pg_timeout(world.timeout, group)
    return mesh
