"""Where the ranks of one attempt meet."""

import time
import uuid

import torch.distributed as dist


def store_of_this_attempt(store, rank, size, timeout):
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
