"""What flags decide, as frozen values: ``--parity`` (one table for each of its settings), and what is trained."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Policy:
    """Everything that ``--parity reference`` decides. Read where a value applies; nothing else asks about parity.

    Attributes:
        mask_by_retokenizing: labels are found as the reference finds them, by re-tokenizing prefixes, which masks a
            whole sample when the count disagrees. Otherwise labels come from the template's own spans.
        mean_of_means: loss = mean over ranks and micro-batches of each one's token mean. Otherwise the sum over
            supervised tokens divided by their global count.
        upstream_order: samples come in the order of Hugging Face's Trainer 4.28, which depends on the number of ranks,
            with a short last batch in each epoch. Otherwise in one stream that does not.
        fp32_residual: under ``--bf16`` the residual stream stays fp32, as autocast leaves it. Otherwise it is bf16.
        tune_tables_without_start_end: adapter tuning without start and end tokens also trains the embedding table
            and the head (the reference does so by accident). Otherwise the projector alone.
        plain_products: matrices are multiplied as torch does it. Otherwise also as sums of another order.
        one_video_length: every video must have as many rows as the first. Otherwise each has what its file holds.
        plain_tower: a CPU's tower computes in fp32, none in bf16 or FP8. Otherwise in bf16 on CPUs that multiply it.
        ffmpeg_colours: videos become RGB as by the reference's decoder, so DALI is refused.
        recipe_pooling: a video's rows are means of its frames and of its patches. Otherwise as ``--pooling`` says.
        one_tower: features are of one vision tower. Otherwise also of two, side by side.
    """

    mask_by_retokenizing: bool
    mean_of_means: bool
    upstream_order: bool
    fp32_residual: bool
    tune_tables_without_start_end: bool
    plain_products: bool
    one_video_length: bool
    plain_tower: bool
    ffmpeg_colours: bool
    recipe_pooling: bool
    one_tower: bool


POLICIES = {"none": Policy(*[False] * 11), "reference": Policy(*[True] * 11)}


# A layer's matrices as LoRA's targets, by the names of transformers' modules, in the order of data; and words for some.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_WORDS = {"all": LORA_TARGETS, "attention": LORA_TARGETS[:4], "mlp": LORA_TARGETS[4:]}


@dataclass(frozen=True)
class Lora:
    """Low-rank matrices beside frozen ones (arXiv:2106.09685): y = x·Wᵀ + `scaling` · dropout(x)·Aᵀ·Bᵀ.

    Attributes:
        rank: rows of A and columns of B.
        alpha: what `scaling` is made of.
        dropout: share of x's values that A does not see in training.
        targets: matrices that have them, of each layer: some of `LORA_TARGETS`, in their order.
        rslora: `scaling` is alpha / √rank (arXiv:2312.03732), otherwise alpha / rank.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = LORA_TARGETS
    rslora: bool = False

    @classmethod
    def of_flags(cls, flags: Mapping[str, Any]) -> Self | None:
        """What training's flags, or those that a checkpoint keeps, ask for; None: no LoRA.

        Raises:
            ValueError: ``--lora_targets`` names what is no matrix of a layer.
        """
        if not flags.get("lora_enable"):
            return None
        targets = lora_targets(flags["lora_targets"])
        return cls(flags["lora_r"], flags["lora_alpha"], flags["lora_dropout"], targets, flags["use_rslora"])

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def lora_targets(words: Iterable[str]) -> tuple[str, ...]:
    """The targets that words of ``--lora_targets`` name, one or several in each, with commas.

    Raises:
        ValueError: a word is none of `LORA_WORDS` and `LORA_TARGETS`, or there is none.
    """
    known = {**LORA_WORDS, **{target: (target,) for target in LORA_TARGETS}}
    given = [word for text in words for word in text.replace(",", " ").split()]
    unknown = [word for word in given if word not in known]
    if unknown or not given:
        fault = f"{unknown[0]!r} names no matrix of a layer" if unknown else "names nothing"
        raise ValueError(f"--lora_targets {fault}; give {', '.join(LORA_WORDS)}, or some of {', '.join(LORA_TARGETS)}")
    chosen = {target for word in given for target in known[word]}
    return tuple(target for target in LORA_TARGETS if target in chosen)


@dataclass(frozen=True)
class Trainable:
    """The parts of the model that get a gradient. Iterating gives their names, in the order in which data passes them.

    Attributes:
        projector: from the vision tower's channels to the decoder's.
        boundary: the embeddings of <vid_start> and <vid_end>, a [2, D] parameter beside the frozen table.
        embed: the whole embedding table.
        decoder: layers and final norm.
        lora: low-rank matrices beside those of the layers, which are frozen then; None: there are none.
        head: the table of the output.

    Raises:
        ValueError: `boundary` together with `embed`, which holds it; `lora` together with `decoder`.
    """

    projector: bool = False
    boundary: bool = False
    embed: bool = False
    decoder: bool = False
    lora: Lora | None = None
    head: bool = False

    def __post_init__(self) -> None:
        if self.lora and self.decoder:
            raise ValueError('trainable: "lora" is beside a frozen "decoder"; choose one')
        if self.boundary and self.embed:
            raise ValueError('trainable: "boundary" is part of "embed"; choose one')

    def __iter__(self) -> Iterator[str]:
        return (part.name for part in fields(self) if getattr(self, part.name))

    def __bool__(self) -> bool:
        return any(self)

    @property
    def adapter_only(self) -> bool:
        """Whether the language model stays as it was, so that a projector file holds all that is trained."""
        return not (self.own_weights or self.lora)

    @property
    def own_weights(self) -> bool:
        """Whether weights of the language model itself are trained, which only a whole model folder holds."""
        return self.embed or self.decoder or self.head

    @property
    def text_is_constant(self) -> bool:
        """Whether plain text enters and passes the decoder as it did before training: its keys and values can be kept,
        and it needs no gradient."""
        return not (self.embed or self.decoder or self.lora)
