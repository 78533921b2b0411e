"""What flags decide, as frozen values: ``--parity`` (one table for each of its settings), and what is trained."""

from collections.abc import Iterator
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Policy:
    """Everything that ``--parity reference`` decides. Read where a value applies; nothing else asks about parity.

    Attributes:
        mask_by_retokenizing: labels are found as the reference finds them, by re-tokenizing prefixes, which masks a
            whole sample when the count disagrees. Otherwise labels come from the template's own spans.
        mean_of_means: loss = mean over ranks and micro-batches of each one's token mean. Otherwise the sum over
            supervised tokens divided by their global count.
        reference_order: samples come in the order of Hugging Face's Trainer 4.28, which depends on the number of ranks,
            with a short last batch in each epoch. Otherwise in one stream that does not.
        fp32_residual: under ``--bf16`` the residual stream stays fp32, as autocast leaves it. Otherwise it is bf16.
        tune_tables_without_start_end: adapter tuning without start and end tokens also trains the embedding table
            and the head (the reference does so by accident). Otherwise the projector alone.
        plain_products: matrices are multiplied as torch does it. Otherwise also as sums of another order.
        one_video_length: every video must have as many rows as the first. Otherwise each has what its file holds.
        plain_tower: a CPU's tower computes in fp32, none in bf16 or FP8. Otherwise in bf16 on CPUs that multiply it.
        ffmpeg_colours: videos become RGB as by the reference's decoder, so DALI is refused.
    """

    mask_by_retokenizing: bool
    mean_of_means: bool
    reference_order: bool
    fp32_residual: bool
    tune_tables_without_start_end: bool
    plain_products: bool
    one_video_length: bool
    plain_tower: bool
    ffmpeg_colours: bool


POLICIES = {"none": Policy(*[False] * 9), "reference": Policy(*[True] * 9)}


@dataclass(frozen=True)
class Trainable:
    """The parts of the model that get a gradient. Iterating gives their names, in the order in which data passes them.

    Attributes:
        projector: from the vision tower's channels to the decoder's.
        boundary: the embeddings of <vid_start> and <vid_end>, a [2, D] parameter beside the frozen table.
        embed: the whole embedding table.
        decoder: layers and final norm.
        head: the table of the output.

    Raises:
        ValueError: `boundary` together with `embed`, which holds it.
    """

    projector: bool = False
    boundary: bool = False
    embed: bool = False
    decoder: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        if self.boundary and self.embed:
            raise ValueError('trainable: "boundary" is part of "embed"; choose one')

    def __iter__(self) -> Iterator[str]:
        return (part.name for part in fields(self) if getattr(self, part.name))

    def __bool__(self) -> bool:
        return any(self)

    @property
    def adapter_only(self) -> bool:
        """Whether the language model stays as it was, so that a projector file holds all that is trained."""
        return not (self.embed or self.decoder or self.head)

    @property
    def text_is_constant(self) -> bool:
        """Whether plain text enters and passes the decoder as it did before training: its keys and values can be kept,
        and it needs no gradient."""
        return not (self.embed or self.decoder)
