"""One answer, token by token: the prompt through the packed forward pass into a KV cache, then one row at a time.

Dimensions: N rows of the prompt, K key/value heads, d channels per head, D channels of the decoder.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from fastvid.batch import AttentionLayout, PackedBatch
from fastvid.model.cache import LayerCache
from fastvid.model.video_llava import VideoLlava

_GREEDY_BELOW = 1e-5  # a temperature below it would leave one token, or overflow


@torch.inference_mode()
def generate(
    model: VideoLlava,
    batch: PackedBatch,
    *,
    max_new_tokens: int,
    stops: Collection[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continue one prompt.

    Args:
        model: not sharded.
        batch: the prompt alone, on the model's device; its supervised rows are ignored.
        max_new_tokens: longest answer.
        stops: ids that end the answer; they are not part of what is returned.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        generator: of the draws, on the model's device.

    Returns:
        Ids of the answer.

    Raises:
        ValueError: several samples in the batch, a negative temperature, a prompt that fills the model's context, or
            logits that are not finite.
    """
    if batch.layout.cu_seqlens_q.numel() != 2 or batch.num_rows == 0:
        raise ValueError(f"generate continues one prompt; the batch holds {batch.layout.cu_seqlens_q.numel() - 1}")
    if temperature < 0:
        raise ValueError(f"temperature {temperature}: 0 is greedy, higher is more random; it cannot be negative")
    max_new_tokens = min(max_new_tokens, rows_left(model.config.decoder.context, batch.num_rows))
    cache = [LayerCache(batch.num_rows + max_new_tokens) for _ in model.decoder.layers]
    h_1D = model.hidden(batch, cache)[-1:]
    answer = []
    while len(answer) < max_new_tokens:
        logits_V = model.logits(h_1D)[0]
        if not logits_V.amax().isfinite():
            raise ValueError(f"there is no next token behind {len(answer)} of the answer: the logits are not finite")
        token = next_token(logits_V, temperature, generator)
        if int(token) in stops:
            break
        answer.append(int(token))
        if len(answer) < max_new_tokens:
            h_1D = _next_row(model, token, cache)
    return answer


def rows_left(context: int, rows: int) -> int:
    """Tokens that may follow a prompt of so many rows in a model of some context.

    Raises:
        ValueError: none may.
    """
    if rows >= context:
        raise ValueError(
            f"the prompt has {rows} tokens, the model's context {context}: shorten the question or use fewer frames"
        )
    return context - rows


def is_greedy(temperature: float) -> bool:
    """Whether the likeliest token is taken at a temperature: at 0, and where it is too near to 0 to divide by."""
    return temperature < _GREEDY_BELOW


def next_token(logits_V: Tensor, temperature: float, generator: torch.Generator | None, top_p: float = 1.0) -> Tensor:
    """The likeliest token, or one that is drawn where the temperature is not greedy; [1] int64.

    `top_p` below 1: of the likeliest tokens alone, as few as have that probability together (arXiv:1904.09751), and
    at least one.
    """
    if is_greedy(temperature):
        return logits_V.argmax(-1, keepdim=True)
    p_V = ((logits_V - logits_V.max()) / temperature).softmax(-1)
    if top_p < 1:
        sorted_V, order_V = p_V.sort(descending=True, stable=True)
        dropped_V = sorted_V.cumsum(-1) - sorted_V >= top_p
        dropped_V[0] = False
        p_V[order_V[dropped_V]] = 0
    return torch.multinomial(p_V, 1, generator=generator)


def _next_row(model, token_1, cache):
    """The row of one more text token after all those in the cache, after the final norm: [1, D]."""
    length = cache[0].length
    x_1D = model.embed.weight[token_1].to(model.precision.residual)
    layout = AttentionLayout.of_lengths([1], [length + 1]).map(lambda bounds_2: bounds_2.to(token_1.device))
    return model.decoder(x_1D, torch.full_like(token_1, length), layout, cache)
