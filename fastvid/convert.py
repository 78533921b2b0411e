"""``fastvid convert``: VideoInstruct JSON to training JSON."""

import sys
from dataclasses import dataclass

from fastvid import config as configs
from fastvid.data import annotations
from fastvid.flags import parse

LISTED = 20  # dropped records that are named one by one


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        total: records read.
        retained: records written.
        dropped: malformed records left out, as (index, field, reason).
    """

    total: int
    retained: int
    dropped: list[tuple[int, str, str]]

    @property
    def without_features(self) -> int:
        return self.total - self.retained - len(self.dropped)


def convert(config: configs.ConvertConfig) -> Conversion:
    """Convert one file to another; the output appears whole or not at all.

    Raises:
        ValueError: a malformed record under on_bad="error"; a file that is no JSON; a feature folder that is none.
    """
    ids = None if config.clip_feature_path is None else annotations.feature_ids(config.clip_feature_path)
    records = annotations.read_records(config.input_json_file)
    converted, dropped = annotations.convert_records(records, ids, config.on_bad, config.input_json_file)
    annotations.write_records(config.output_json_file, converted)
    return Conversion(len(records), len(converted), dropped)


def main(argv=None) -> int:
    config = parse(configs.ConvertConfig, argv)
    done = convert(config)
    if done.dropped:
        print(f"{config.input_json_file}: {len(done.dropped)} malformed records dropped:", file=sys.stderr)
        for index, *fault in done.dropped[:LISTED]:
            print(f"  record {index} (from 0): {annotations.describe(fault)}", file=sys.stderr)
        if len(done.dropped) > LISTED:
            print(f"  … and {len(done.dropped) - LISTED} more", file=sys.stderr)
    if done.without_features:
        print(f"{done.without_features} records left out: no features in {config.clip_feature_path}", file=sys.stderr)
    print(f"Total annotations retained: {done.retained}")  # the reference's line
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("convert")
