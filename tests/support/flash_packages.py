"""Stand-ins for packages of FlashAttention, which compute on the CPU.

They have the signatures of flash-attn 2.8.3, of FlashAttention 3 (`hopper/` of its repository, before and after its
functions became operations), and of flash-attn-4 4.0.0b36.
"""

import functools

import torch
from attention_parts import cpu_backward, cpu_forward

from fastvid.batch import AttentionLayout
from fastvid.model.attention import SDPA


class Calls:
    """Computes what a stand-in was asked for, and notes how."""

    def __init__(self):
        self.seen = []

    def forward(self, q, k, v, cu_q, cu_k, causal, **noted):
        self.seen.append(noted | {"causal": causal})
        layout = AttentionLayout(cu_q, 0, cu_k, 0)
        if torch.is_grad_enabled():  # it would bring its own backward
            assert causal
            return SDPA.call(q, k, v, layout), None
        return cpu_forward(q, k, v, layout, causal)

    def backward(self, grads, dout, q, k, v, out, lse, cu_q, cu_k, causal, **noted):
        self.seen.append(noted | {"backward": causal})
        assert lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0]) and lse.dtype == torch.float32
        for into, grad in zip(grads, cpu_backward(dout, q, k, v, out, lse, AttentionLayout(cu_q, 0, cu_k, 0), causal)):
            assert into.is_contiguous()
            into.copy_(grad)


def flash_attn_2(calls):
    """2.8.3: the backward is an operation, which takes no defaults and writes to dq, dk, dv.

    It brings a folder of the name of FlashAttention 4's, which wants a package that it does not require.
    """

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        longest = max_seqlen_q, max_seqlen_k
        out, lse = calls.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, longest=longest, repeatable=deterministic)
        return (out, lse, None) if return_attn_probs else out

    def _flash_attn_varlen_backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dq: torch.Tensor | None,
        dk: torch.Tensor | None,
        dv: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        deterministic: bool,
        rng_state: torch.Tensor | None = None,
        zero_tensors: bool = False,
    ) -> torch.Tensor:
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        calls.backward(
            (dq, dk, dv),
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            cu_seqlens_q,
            cu_seqlens_k,
            causal,
            scale=softmax_scale,
            repeatable=deterministic,
        )
        return softmax_lse.clone()

    backward = torch.library.custom_op(
        "fastvid_stand_in::flash_attn_2_backward", _flash_attn_varlen_backward, mutates_args=("dq", "dk", "dv")
    )
    return {
        "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
        "flash_attn.flash_attn_interface": {"_flash_attn_varlen_backward": backward},
        "flash_attn.cute": _CUTE_OF_2025,
    }


_CUTE_OF_2025 = """
import cutlass

def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
    raise NotImplementedError("FlashAttention 4 has no backward of packed rows yet")
"""


def flash_attn_3(calls):
    """Of 2026."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        out, lse = calls.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, repeatable=deterministic)
        return (out, lse) if return_attn_probs else out

    def _flash_attn_backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        sequed_q: torch.Tensor | None = None,
        sequed_k: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: torch.Tensor | None = None,
        dk: torch.Tensor | None = None,
        dv: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> torch.Tensor:
        calls.backward(
            (dq, dk, dv), dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, is_causal, scale=softmax_scale
        )
        return softmax_lse.clone()

    backward = torch.library.custom_op(
        "fastvid_stand_in::flash_attn_3_backward", _flash_attn_backward, mutates_args=("dq", "dk", "dv")
    )
    return {
        "flash_attn_interface": {
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "_flash_attn_backward": backward,
        }
    }


def flash_attn_3_before(calls):
    """Of 2025: always returns the log-sum-exp too; its backward is a plain function that wants a window."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        deterministic=False,
    ):
        return calls.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        sequed_q,
        sequed_k,
        max_seqlen_q,
        max_seqlen_k,
        dq,
        dk,
        dv,
        softmax_scale,
        causal,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        calls.backward((dq, dk, dv), dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, causal)
        return dq, dk, dv, softmax_lse

    return {
        "flash_attn_interface": {
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "_flash_attn_backward": _flash_attn_backward,
        }
    }


def flash_attn_4(calls):
    """4.0.0b36, of which `flash_attn` is no module but a folder that another package may share."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        return_lse=False,
    ):
        out, lse = calls.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, repeatable=deterministic)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        m_block_size=64,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
        dlse=None,
        learnable_sink=None,
    ):
        assert (window_size_left, window_size_right, dlse) == (None, None, None)
        calls.backward((dq, dk, dv), dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, scale=softmax_scale)
        return dq, dk, dv

    return {
        "flash_attn.cute": {"flash_attn_varlen_func": flash_attn_varlen_func},
        "flash_attn.cute.interface": {"_flash_attn_bwd": _flash_attn_bwd},
    }


def _made(make):
    """(What notes the package's calls, {module: {name: function}, or its text})."""
    calls = Calls()
    return calls, make(calls)


_MAKE = {
    "FlashAttention 2": flash_attn_2,
    "FlashAttention 3": flash_attn_3,
    "FlashAttention 3, 2025": flash_attn_3_before,
    "FlashAttention 4": flash_attn_4,
}

DISTRIBUTIONS = {"FlashAttention 4": "flash_attn_4-4.0.0b36"}  # whose name is asked for
PACKAGES = {name: functools.partial(_made, make) for name, make in _MAKE.items()}
