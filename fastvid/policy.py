"""What ``--parity`` means: one frozen table of values for each of its settings."""

from dataclasses import dataclass


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
