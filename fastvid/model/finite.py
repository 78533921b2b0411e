"""Which tensors hold NaN or infinity."""

import torch

from fastvid.dist.sharding import local_shard


def not_finite(tensors: dict) -> list[str]:
    """Names of the tensors with a value that is not finite; of a DTensor this rank's part is looked at.

    One pass over each and one wait for the device: a sum is finite unless a value is not, or it overflows.
    """
    held = {name: local_shard(tensor.detach()) for name, tensor in tensors.items()}
    held = {name: tensor for name, tensor in held.items() if tensor.is_floating_point() and tensor.numel()}
    if not held:
        return []
    device = next(iter(held.values())).device
    sums = torch.stack([tensor.sum().float().to(device) for tensor in held.values()])
    suspects = [name for name, finite in zip(held, torch.isfinite(sums).tolist()) if not finite]
    return [name for name in suspects if not torch.isfinite(held[name]).all()]
