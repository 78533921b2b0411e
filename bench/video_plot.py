"""What extraction takes, as a picture: python -m bench.video_plot

It shows the committed results of bench/decode.py and bench/extract.py, on a CPU, and the decoder rows of the GPU check.
The picture goes to bench/plots/extract.png.
"""

import json
import re
from pathlib import Path

from matplotlib.figure import Figure

from bench.roofline import GRID, INK, OURS, QUIET

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
THEIRS = "#868e96"
_CPU = {
    "reference": "the reference's script",
    "fastvid, fp32": "fastvid, fp32",
    "fastvid, bf16": "fastvid, bf16",
    "fastvid": "fastvid",
    "pyav": "PyAV alone, every frame, nothing converted",
}
_NVDEC, _PYAV = re.compile(r"NVDEC, 720p, (\d+) videos at a time"), "PyAV, 720p, one clip at a time, "


def panels(decode, extract, gpu):
    """[(title, what the axis shows, where it is from, [(label, value, whether it is fastvid's)])] of the results.

    Args:
        decode, extract: what bench/decode.py and bench/extract.py write.
        gpu: rows of the GPU check.
    """
    found = [
        (
            "Video to features (60 s of 720p, ViT-B/32), two cores",
            "seconds per video",
            _from(extract["environment"]),
            [
                (_CPU[row["row"]], row["seconds"] / row["clips"], row["row"] != "reference")
                for row in sorted(extract["rows"], key=lambda row: -row["seconds"])
            ],
        ),
        (
            "Video to the tower's input (100 frames of 336 pixels), two cores",
            "seconds per video",
            _from(decode["environment"]),
            [
                (_CPU[row["row"]], row["seconds"], row["row"] == "fastvid")
                for row in sorted(decode["rows"], key=lambda row: -row["seconds"])
            ],
        ),
    ]
    bars, card = [], None
    for row in gpu:
        if match := _NVDEC.fullmatch(row.get("row", "")):
            word = "video" if match[1] == "1" else "videos"
            bars.append((f"fastvid, NVDEC, {match[1]} {word} at a time", row["decoded_frames_per_second"], True))
            card = row
        elif row.get("row", "").startswith(_PYAV):
            threads = (
                row["row"]
                .removeprefix(_PYAV)
                .replace("1 threads", "one thread")
                .replace("all threads", f"{row['cores']} cores")
            )
            bars.append((f"PyAV, one video at a time, {threads}", row["frames_per_second"], False))
    if card is not None:
        found.append(
            (
                "Decoding 720p H.264 on a GPU's machine",
                "decoded frames per second",
                f"{card['card']}; commit {card['commit']}, {card['date']}",
                bars,
            )
        )
    return found


def _from(about):
    return f"{about['device']}; commit {about['commit']}, {about['date']}"


def draw(found) -> Figure:
    """A figure of `panels`."""
    rows = sum(len(bars) for *_, bars in found)
    height = 0.42 * rows + 1.35 * len(found)
    figure = Figure(figsize=(9.5, height), dpi=130, facecolor="white")
    top = height
    for title, label, source, bars in found:
        thick = 0.42 * len(bars)
        axis = figure.add_axes((0.38, (top - 0.72 - thick) / height, 0.52, thick / height))
        figure.text(0.02, (top - 0.28) / height, title, fontsize=12.5, fontweight="bold", color=INK, va="center")
        figure.text(0.02, (top - 0.53) / height, source, fontsize=9, color=QUIET, va="center")
        for at, (_, value, ours) in enumerate(bars):
            axis.barh(at, value, 0.66, color=OURS if ours else THEIRS)
            axis.text(
                value, at, f" {value:,.0f}" if value >= 100 else f" {value:.2f}", fontsize=9, color=INK, va="center"
            )
        axis.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=9.5, color=INK)
        axis.set_ylim(len(bars) - 0.5, -0.5)
        axis.set_xlim(0, 1.15 * max(value for _, value, _ in bars))
        axis.set_xlabel(label, fontsize=9, color=QUIET)
        axis.xaxis.grid(True, color=GRID)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=9, colors=INK)
        for side in axis.spines.values():
            side.set_visible(False)
        top -= 1.35 + thick
    return figure


def main():
    decode, extract = (json.loads((RESULTS / name).read_text()) for name in ("decode-cpu.json", "extract-cpu.json"))
    gpu = [json.loads(line) for line in (RESULTS / "gpu-h200.jsonl").read_text().splitlines()]
    path = ROOT / "bench/plots/extract.png"
    draw(panels(decode, extract, gpu)).savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
