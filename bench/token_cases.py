"""Rows of the kernels that place keys and videos, and of the head with its loss.

Dimensions: H heads of d channels, R rows of a video, D channels, V tokens, L supervised rows.
"""

import torch
from fastvid_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fastvid_kernels.rope_keys import rope_keys, rope_keys_reference
from fastvid_kernels.splice_video import splice_video, splice_video_reference
from fastvid_kernels.way_back import WayBack

from bench.cases import Case, Gradients, forward, in_fp32, library, normal, ways_of, with_compiled
from bench.decoder_cases import BYTES, DTYPE, rope_inputs


def _keys_cases(H, d, shared, in_parts=False):
    """Eight samples behind a kept prompt; or four videos of 676 rows, and eight or seven questions about each.

    In parts (`fastvid.batch.Branches`), questions have no copies of their video's keys.
    """
    prompt, video, text = 34, 676, 120
    segments = [[(0, prompt), (prompt + i * (video + text), video + text)] for i in range(8)]
    if shared:
        segments, row = [], prompt
        for questions in (8, 7, 8, 7):
            segments.append([(0, prompt), (row, video)])
            before = [] if in_parts else [(0, prompt), (row, video)]
            segments += [[*before, (row + video + i * text, text)] for i in range(questions)]
            row += video + questions * text
    job = f"30 questions share 4 videos{', in parts' if in_parts else ''}" if shared else "8 samples"
    return _placed(H, d, prompt, segments, job)


def _placed(H, d, prompt, segments, job):
    rows_M = torch.cat([torch.arange(size) + start for runs in segments for start, size in runs])
    N, M = int(rows_M.max()) + 1 - prompt, len(rows_M)
    shapes = {"N": N, "M": M, "H": H, "d": d, "dtype": "bfloat16"}
    way_back = WayBack.of(rows_M, prompt, N)

    def ours(qkv, positions, inv_freq, k, v, rows_M, starts, places):
        return rope_keys(
            qkv, positions, inv_freq, H, H, rows_M=rows_M, way_back=WayBack(starts, places, prompt), constant=(k, v)
        )

    def reference(qkv, positions, inv_freq, k, v, rows_M, *_):
        return rope_keys_reference(qkv, positions, inv_freq, H, H, rows_M=rows_M, constant=(k, v))

    functions = {"ours": ours, "eager": reference}

    def inputs(generator, device):
        qkv, positions, inv_freq = rope_inputs(generator, device, N, H, d)
        return (
            qkv,
            positions,
            inv_freq,
            *(normal(generator, device, prompt, H, d) for _ in range(2)),
            *(x.to(device) for x in (rows_M, way_back.starts_N1, way_back.places)),
        )

    def inputs_and_gradients(generator, device):
        return *inputs(generator, device), tuple(normal(generator, device, rows, H, d) for rows in (N, M, M))

    row = H * d * BYTES  # queries are read and written, keys and values read once and written to every place
    yield Case(
        "rope_keys",
        f"forward, {job}",
        shapes,
        inputs,
        ways_of(forward, functions),
        in_fp32(forward(reference)),
        (4 * N + 2 * M) * row,
    )
    # Plain torch adds up in bf16 what comes back to a row from all its places, and rounds that before it is rotated
    # back. Each addition may err as much as one result may. The kernel adds in fp32 and rounds once.
    additions = int((way_back.starts_N1[1:] - way_back.starts_N1[:-1]).max()) - 1
    summed = 2**-7 * max(additions, 1)
    yield Case(
        "rope_keys",
        f"backward, {job}",
        shapes,
        inputs_and_gradients,
        ways_of(Gradients, functions),
        in_fp32(Gradients(reference)),
        (4 * N + 2 * M) * row,
        looser={"eager": summed, "torch.compile": summed},
    )


def _splice_cases(videos, R, text, D, V):
    """Each video between its boundary rows, and `text` rows of words after it."""
    segment = R + 2 + text
    N = videos * segment
    shapes = {"N": N, "D": D, "V": V, "videos": videos, "dtype": "bfloat16"}
    start = segment * torch.arange(videos)
    video_rows = (start[:, None] + 1 + torch.arange(R)).flatten()
    boundary_rows = torch.stack([start, start + R + 1], dim=1).flatten()
    is_text = torch.ones(N, dtype=torch.bool)
    is_text[video_rows] = is_text[boundary_rows] = False

    functions = with_compiled(
        {
            "ours": lambda ids, table, *video: splice_video(ids, table, *video, dtype=DTYPE),
            "eager": lambda ids, table, *video: splice_video_reference(ids, table, *video, dtype=DTYPE),
        }
    )

    def inputs(generator, device):
        # Distinct words, so that the rows to read are as many as the text's.
        ids = torch.randperm(V, generator=generator, device=device).repeat(-(-N // V))[:N]
        return (
            ids,
            normal(generator, device, V, D),
            normal(generator, device, videos * R, D),
            video_rows.to(device),
            normal(generator, device, 2, D),
            boundary_rows.to(device),
        )

    def inputs_and_gradient(generator, device):
        return *inputs(generator, device), (normal(generator, device, N, D),)

    def reference(*inputs):
        return splice_video_reference(*inputs, dtype=torch.float32)

    gathered = int(is_text.sum()) + videos * R + 2
    yield Case(
        "splice_video",
        "forward",
        shapes,
        inputs,
        ways_of(forward, functions),
        in_fp32(forward(reference)),
        (N + gathered) * D * BYTES + 8 * N,
    )
    yield Case(
        "splice_video",
        "backward",
        shapes,
        inputs_and_gradient,
        ways_of(lambda function: Gradients(function, (2, 4)), functions),
        in_fp32(Gradients(reference, (2, 4))),
        (2 * videos * R + 2 * videos + 2) * D * BYTES,
    )


def _loss_case(L, V, D):
    """Forward and backward with a frozen head as one job: the gradient of the rows is computed while their logits are
    there."""

    def both(function):
        def prepare(h, weight, targets):
            h = h.detach().requires_grad_()

            def call():
                loss = function(h, weight, targets)[0]
                return loss, *torch.autograd.grad(loss, h)

            return call

        return prepare

    functions = with_compiled({"ours": linear_cross_entropy, "eager": linear_cross_entropy_reference})
    functions |= library("liger_kernel", "Liger", _liger_loss, triton=True) | library("quack", "quack", _quack_loss)

    def inputs(generator, device):
        return (
            normal(generator, device, L, D),
            normal(generator, device, V, D, scale=D**-0.5),
            torch.randint(V, (L,), generator=generator, device=device),
        )

    return Case(
        "linear_cross_entropy",
        "both ways",
        {"L": L, "V": V, "D": D, "dtype": "bfloat16"},
        inputs,
        ways_of(both, functions),
        in_fp32(both(linear_cross_entropy_reference)),
        flops=4 * L * V * D,
        tolerance=2**-6,
    )


def _liger_loss():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(h, weight, targets):
        return LigerFusedLinearCrossEntropyFunction.apply(h, weight, targets, None, None, -100, 0.0, 0.0, "sum")

    return loss


def _quack_loss():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda *inputs: (chunked_linear_cross_entropy(*inputs, reduction="sum"),)


def cases(small):
    if small:
        yield from _placed(2, 8, 3, [[(0, 3), (3, 4)], [(0, 3), (3, 4), (7, 2)]], "2 samples")
        yield from _splice_cases(2, 5, 3, 16, 50)
        yield _loss_case(8, 50, 16)
        return
    for shared, in_parts in ((False, False), (True, False), (True, True)):
        yield from _keys_cases(32, 128, shared, in_parts)
    yield from _splice_cases(20, 676, 150, 4096, 32003)
    yield _loss_case(4096, 32003, 4096)
