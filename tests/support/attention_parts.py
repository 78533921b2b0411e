"""Attention with log-sum-exps on a CPU: in plain torch, by torch's FlashAttention for CPUs, and in wrong ways.

They stand in for what libraries have for GPUs (`fastvid.model.flash`).
"""

import torch

from fastvid.model.attention import SDPA, Attention
from fastvid.model.branches import Parts


def _cut(layout, q, k):
    q_sizes, k_sizes = layout.lengths
    assert (sum(q_sizes), sum(k_sizes)) == (len(q), len(k)), "a library reads and writes what the lengths say, no more"
    assert min(q_sizes) > 0 and min(k_sizes) > 0, "none is asked about an empty segment"
    return q_sizes, k_sizes


def _scores(q, k, causal):
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    hidden = ~torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return scores.masked_fill(hidden, float("-inf")) if causal else scores


def _wide(x, heads):
    """In fp32, keys and values as many as queries."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def plain_forward(q, k, v, layout, causal):
    q_sizes, k_sizes = _cut(layout, q, k)
    outs, sums = [], []
    for q_part, k_part, v_part in zip(q.split(q_sizes), k.split(k_sizes), v.split(k_sizes)):
        k_part, v_part = (_wide(x, q.shape[1]) for x in (k_part, v_part))
        scores = _scores(q_part.float(), k_part, causal)
        sums.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_part))
    return torch.cat(outs).to(q.dtype), torch.cat(sums, 1)


def plain_backward(grad, q, k, v, out, lse, layout, causal):
    q_sizes, k_sizes = _cut(layout, q, k)
    heads, kv_heads = q.shape[1], k.shape[1]
    found = []
    for rows, keys in zip(
        zip(*(x.split(q_sizes) for x in (grad, q, out, lse.T))), zip(*(x.split(k_sizes) for x in (k, v)))
    ):
        grad_part, q_part, out_part, lse_part = (x.float() for x in rows)
        k_part, v_part = (_wide(x, heads) for x in keys)
        p = (_scores(q_part, k_part, causal) - lse_part.T[:, :, None]).exp()
        of_p = torch.einsum("qhd,khd->hqk", grad_part, v_part) - (grad_part * out_part).sum(-1).T[:, :, None]
        of_scores = p * of_p * q.shape[-1] ** -0.5
        of_keys = torch.einsum("hqk,qhd->khd", of_scores, q_part), torch.einsum("hqk,qhd->khd", p, grad_part)
        found.append(
            (
                torch.einsum("hqk,khd->qhd", of_scores, k_part),
                *(x.unflatten(1, (kv_heads, -1)).sum(2) for x in of_keys),
            )
        )
    return tuple(torch.cat(parts).to(q.dtype) for parts in zip(*found))


def _dense(x, heads):
    """[n, K, d] → [1, H, n, d]."""
    return x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1)[None]


def _mask(queries, keys, causal, dtype):
    """Its own causal masks are aligned at the first row."""
    if not causal:
        return {"is_causal": False}
    if queries == keys:
        return {"is_causal": True}
    hidden = ~torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return {"is_causal": False, "attn_mask": torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)}


def cpu_forward(q, k, v, layout, causal):
    q_sizes, k_sizes = _cut(layout, q, k)
    outs, sums = [], []
    for q_part, k_part, v_part in zip(q.split(q_sizes), k.split(k_sizes), v.split(k_sizes)):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_dense(x, q.shape[1]) for x in (q_part, k_part, v_part)),
            0.0,
            **_mask(len(q_part), len(k_part), causal, q.dtype),
        )
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0].float())
    return torch.cat(outs), torch.cat(sums, 1)


def cpu_backward(grad, q, k, v, out, lse, layout, causal):
    q_sizes, k_sizes = _cut(layout, q, k)
    heads, kv_heads = q.shape[1], k.shape[1]
    found = []
    for rows, keys, lse_part in zip(
        zip(*(x.split(q_sizes) for x in (grad, q, out))),
        zip(*(x.split(k_sizes) for x in (k, v))),
        lse.split(q_sizes, 1),
    ):
        grad_part, q_part, out_part = (_dense(x, heads) for x in rows)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_part,
            q_part,
            *(_dense(x, heads) for x in keys),
            out_part,
            lse_part.contiguous()[None],
            0.0,
            **_mask(len(rows[0]), len(keys[0]), causal, q.dtype),
        )
        of_q, *of_keys = (x[0].transpose(0, 1) for x in grads)
        found.append((of_q, *(x.unflatten(1, (kv_heads, -1)).float().sum(2).to(x.dtype) for x in of_keys)))
    return tuple(torch.cat(parts) for parts in zip(*found))


PLAIN = Attention("plain, in parts", SDPA.call, parts=Parts(plain_forward, plain_backward))
CPU = Attention("torch's for CPUs, in parts", SDPA.call, parts=Parts(cpu_forward, cpu_backward))
