"""Sums of gradients over ranks, sent in fewer bits than those in which they are kept."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class ReduceScatterIn:
    """Reduce-scatter as FSDP2 calls it (`FSDPModule.set_custom_reduce_scatter`), whose values are sent in `dtype`.

    FSDP2's own `reduce_dtype` would also be that in which a rank adds up micro-batches. Here it adds them up as ever;
    each sum is rounded once before it is sent, and the library's sums of it are in `dtype`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what FSDP2 packs, and for what comes back, in its own dtype."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """This rank's part of the sum of `input_tensor` over `group`, into `output_tensor`."""
        assert not async_op, "nobody would convert what comes back"
        sent = input_tensor.to(self.dtype)
        received = sent.new_empty(output_tensor.shape)
        dist.reduce_scatter_tensor(received, sent, op=op, group=group)
        output_tensor.copy_(received)


def all_reduce_in(dtype: torch.dtype, gradients: list[Tensor]) -> None:
    """Sum `gradients` over all ranks, in place, in one all-reduce in `dtype`; of float32, as they are."""
    sent = gradients if dtype == torch.float32 else [g.to(dtype) for g in gradients]
    flat = torch.cat([g.reshape(-1) for g in sent])
    dist.all_reduce(flat)
    torch._foreach_copy_(
        gradients, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients)]
    )
