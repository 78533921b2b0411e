"""The picture of what extraction takes, drawn from committed results."""

import json

from bench.video_plot import RESULTS, draw, panels


def _committed():
    decode, extract = (json.loads((RESULTS / name).read_text()) for name in ("decode-cpu.json", "extract-cpu.json"))
    return decode, extract, [json.loads(line) for line in (RESULTS / "gpu-h200.jsonl").read_text().splitlines()]


def test_every_result_is_a_bar():
    decode, extract, gpu = _committed()
    found = panels(decode, extract, gpu)
    assert [len(bars) for *_, bars in found] == [len(extract["rows"]), len(decode["rows"]), 5]
    slowest = max(row["seconds"] / row["clips"] for row in extract["rows"])
    assert found[0][3][0] == ("the reference's script", slowest, False)
    assert [name for name, _, ours in found[2][3] if ours][-1] == "fastvid, NVDEC, 14 videos at a time"
    texts = {text.get_text().strip() for axis in draw(found).axes for text in axis.texts}
    assert f"{slowest:.2f}" in texts and f"{found[2][3][-1][1]:,.0f}" in texts


def test_without_a_gpu_there_are_two_panels():
    decode, extract, _ = _committed()
    assert len(panels(decode, extract, [])) == len(draw(panels(decode, extract, [])).axes) == 2
