"""Video-ChatGPT / PG-Video-LLaVA: projector, splice, decoder, loss on supervised rows (arXiv:2306.05424, 2311.13435).

Dimensions: N packed rows, D channels of the decoder, P projected rows of all videos, C channels of the vision tower,
L supervised rows.
"""

from collections.abc import Sequence
from functools import partial

import torch
from fastvid_kernels.linear_cross_entropy import linear_cross_entropy
from fastvid_kernels.splice_video import splice_video
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastvid.batch import AttentionLayout, PackedBatch
from fastvid.config.policy import Trainable
from fastvid.model.attention import SDPA, Attention
from fastvid.model.cache import Cache, LayerCache
from fastvid.model.config import ModelConfig, Precision
from fastvid.model.decoder import Decoder
from fastvid.model.linear import Linear
from fastvid.model.noise import Noise, with_noise
from fastvid.model.rows import take_rows


class Table(nn.Module):
    """A [rows, D] parameter that its owner reads."""

    def __init__(self, rows: int, channels: int, *, dtype: torch.dtype, trained: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, channels, dtype=dtype), requires_grad=trained)


class VideoLlava(nn.Module):
    """The model. Parameters are uninitialised; `fastvid.weights.loading.load_weights` fills them.

    Args:
        config: sizes.
        trainable: parts that get a gradient.
        precision: what it is stored and computed in.
        recompute: "none", "selective", "full" or a number of layers; see `Decoder`.
        attention: `choose_attention` and `settle_attention` choose one; SDPA serves on every device.

    Attributes:
        noise: what is added to the embeddings of text; None: nothing. No row of text is constant with it.

    Raises:
        ValueError: an unknown mode or projector.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        trainable: Trainable,
        precision: Precision,
        recompute: str | int = "none",
        attention: Attention = SDPA,
    ):
        super().__init__()
        sizes = config.decoder
        self.config = config
        self.trainable = trainable
        self.precision = precision
        self.noise: Noise | None = None
        self._prefix: list[tuple[Tensor, Tensor]] | None = None  # not buffers: no checkpoint holds them

        table = partial(Table, sizes.vocab_size, sizes.hidden_size)
        self.embed = table(dtype=precision.trained if trainable.embed else precision.residual, trained=trainable.embed)
        if trainable.boundary:
            self.boundary = Table(2, sizes.hidden_size, dtype=precision.trained, trained=True)
        self.projector = make_projector(
            config, dtype=precision.stored(trainable.projector), trained=trainable.projector
        )
        self.decoder = Decoder(
            sizes,
            trained=trainable.decoder,
            precision=precision,
            recompute=recompute,
            attention=attention,
            lora=trainable.lora,
        )
        if not sizes.tie_word_embeddings:
            self.head = table(dtype=precision.stored(trainable.head), trained=trainable.head)

    def forward(self, batch: PackedBatch, cache: Cache | None = None) -> Tensor:
        """Cross-entropy summed over the batch's supervised rows, fp32 scalar.

        Its graph reaches every trained parameter, whatever the batch lacks (videos, supervised rows), so that
        all ranks take part in the same collectives.

        Args:
            cache: receives all rows' keys and values; None without.
        """
        if batch.loss_layout is None or not batch.num_supervised or cache is not None:
            h_LD = take_rows(self.hidden(batch, cache), batch.loss_rows)
        else:
            h_LD = self._supervised(batch)
        return linear_cross_entropy(h_LD, self.head_weight, batch.targets)[0]

    def hidden(self, batch: PackedBatch, cache: Cache | None = None) -> Tensor:
        """All rows after the final norm, [N, D] in the compute dtype."""
        return self.decoder(self.splice(batch), batch.positions, batch.layout, cache, prefix=self._prefix_of(batch))

    def _supervised(self, batch):
        """Supervised rows after the final norm, [L, D] in the compute dtype."""
        prefix = self._prefix_of(batch)
        if batch.parts is None:
            return self.decoder(
                self.splice(batch),
                batch.positions,
                batch.layout,
                prefix=prefix,
                supervised=(batch.loss_rows, batch.loss_layout),
            )
        assert self.trainable.text_is_constant, "no row is frozen where its embedding or the decoder is trained"
        words_FD = self.embed.weight[batch.token_ids[: batch.frozen_rows]].to(self.precision.residual)
        return self.decoder(
            self.splice(batch, batch.frozen_rows),
            batch.positions,
            batch.layout,
            prefix=prefix,
            supervised=(batch.loss_rows, batch.loss_layout),
            frozen=(words_FD, batch.parts),
        )

    def keep_prefix(self, token_ids: Sequence[int]) -> None:
        """Compute once what each layer attends to in the text with which all samples begin, and keep it.

        Batches with `prefix_rows` need it. All ranks call it; frozen weights must be as they will stay.

        Args:
            token_ids: the text, from the sample's first token on.
        """
        assert self.trainable.text_is_constant, "the prefix changes with what is trained"
        device, rows, second = self.embed.weight.device, len(token_ids), self.config.mm_hidden_size_2
        none = torch.empty(0, dtype=torch.int64, device=device)
        batch = PackedBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.arange(rows, device=device),
            layout=AttentionLayout.of_lengths([rows]).map(lambda tensor: tensor.to(device)),
            video_rows=none,
            features=torch.empty(0, self.config.mm_hidden_size, device=device),
            features_2=None if second is None else torch.empty(0, second, device=device),
            boundary_rows=none,
            loss_rows=none,
            targets=none,
        )
        cache = [LayerCache(rows) for _ in self.decoder.layers]
        with torch.no_grad():
            self(batch, cache)  # not `hidden`: FSDP gathers for a forward pass
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what it would keep for the backward pass
        self._prefix = [layer.views() for layer in cache]

    def keep_casts(self, keep: bool) -> None:
        """`Linear.keep_casts` of every trained matrix; the micro-batches of a step share what they cast.

        Not where layers are recomputed: there no copy lives until backward, which saves memory.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.keep_casts(keep and not self.decoder.recomputed)

    def _prefix_of(self, batch):
        """Keys and values of the batch's constant prefix, by layer; None without one."""
        if not batch.prefix_rows:
            return None
        assert self._prefix and len(self._prefix[0][0]) == batch.prefix_rows, "keep_prefix was not told this prefix"
        return self._prefix

    def splice(self, batch: PackedBatch, first: int = 0) -> Tensor:
        """Rows that enter the decoder, from `first` (after which all videos lie), [N - first, D] in the residual
        dtype."""
        features = [each.to(self.precision.compute) for each in (batch.features, batch.features_2) if each is not None]
        video_PD = self.projector(*features)
        boundary_2D = self.boundary.weight if self.trainable.boundary else None
        rows = (batch.video_rows, batch.boundary_rows)
        video_rows, boundary_rows = rows if not first else (x - first for x in rows)
        x_ND = splice_video(
            batch.token_ids[first:],
            self.embed.weight,
            video_PD,
            video_rows,
            boundary_2D,
            boundary_rows,
            self.precision.residual,
        )
        if self.noise is None:
            return x_ND
        assert not (first or batch.prefix_rows), "no row of text is constant with noise"
        return with_noise(x_ND, self.noise, longest=batch.layout.max_seqlen_k, video_rows=video_rows)

    def logits(self, h_ND: Tensor) -> Tensor:
        """Scores of the next token, [N, vocabulary] fp32."""
        return (h_ND @ self.head_weight.to(h_ND.dtype).T).float()

    @property
    def head_weight(self) -> Tensor:
        return (self.embed if self.config.decoder.tie_word_embeddings else self.head).weight


class TwoProjectors(nn.Module):
    """The projectors of two vision towers side by side. One module, which every batch calls once: a unit of FSDP2's.

    Its parameters are `0.weight` and so on of the first, `second.0.weight` and so on of the other.
    """

    def __init__(self, first: nn.Sequential, second: nn.Sequential):
        super().__init__()
        self._of_first = [name for name, _ in first.named_children()]
        for name, module in first.named_children():
            self.add_module(name, module)
        self.second = second

    def forward(self, first_PC: Tensor, second_PC: Tensor) -> Tensor:
        """[P_1 + P_2, D] of [P_1, C_1] and [P_2, C_2]."""
        for name in self._of_first:
            first_PC = self.get_submodule(name)(first_PC)
        return torch.cat([first_PC, self.second(second_PC)])


def make_projector(config: ModelConfig, *, dtype: torch.dtype, trained: bool) -> nn.Module:
    """From the tower's channels to the decoder's; parameters `0.weight`, `0.bias` (and `2.…`), which hold nothing yet.

    It is called with the features of each tower, of which there are one or two (`TwoProjectors`).

    Raises:
        ValueError: an unknown projector.
    """
    first = _projector(config, config.mm_hidden_size, dtype, trained)
    second = config.mm_hidden_size_2
    return first if second is None else TwoProjectors(first, _projector(config, second, dtype, trained))


def _projector(config, inputs, dtype, trained):
    outputs = config.decoder.hidden_size
    first = Linear(inputs, outputs, bias=True, dtype=dtype, trained=trained)
    if config.projector_type == "linear":
        return nn.Sequential(first)
    if config.projector_type == "mlp2x_gelu":
        return nn.Sequential(first, nn.GELU(), Linear(outputs, outputs, bias=True, dtype=dtype, trained=trained))
    raise ValueError(f"projector_type {config.projector_type!r}: choose linear or mlp2x_gelu")
