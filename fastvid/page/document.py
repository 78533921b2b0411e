"""One HTML page that holds everything it shows: no script, nothing from elsewhere, every text escaped."""

import html
from collections.abc import Iterable

from fastvid.page.pictures import MAP, frame_uri, heat_map_uri, scale_uri, strip_svg
from fastvid.page.view import VideoView
from fastvid.provenance import Provenance

_MOST_FRAMES = 100  # on a page
_LONGEST = 200  # characters of a value in the table
_NOT_TOLD = "not told"
# The browser is told as well that nothing may be fetched and nothing run.
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1f2933 }}
body {{ max-width: 1100px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.15em; margin: 1.6em 0 .4em; overflow-wrap: anywhere }}
h3 {{ font-size: 1em; margin: 1.2em 0 .3em }}
p, figcaption, .quiet {{ color: #52606d; margin: .3em 0; overflow-wrap: anywhere }}
figure {{ display: inline-block; margin: 0 8px 10px 0; vertical-align: top }}
figcaption {{ font-size: .8em; line-height: 1.3 }} img {{ display: block; border-radius: 3px }}
.strip {{ width: 100%; height: 90px; display: block; border-bottom: 1px solid #7b8794 }}
.prompt {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7fa; border-radius: 4px; padding: .8em 1em }}
.supervised {{ background: #c6f0d0; color: #0b5227; font-weight: 600 }} .placeholder {{ color: #7b8794 }}
.warning {{ background: #fff3c4; border-left: 4px solid #f0b429; padding: .4em .8em; color: #513c06 }}
table {{ border-collapse: collapse }} td, th {{ text-align: left; padding: .15em 1.2em .15em 0; vertical-align: top }}
td {{ font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .9em; overflow-wrap: anywhere }}
th {{ font-weight: 400; color: #52606d; white-space: nowrap }}
</style></head><body>
"""


def document(
    views: Iterable[VideoView],
    *,
    title: str,
    prompt: tuple[str, Iterable[tuple[str, str]]] | None = None,
    warning: str | None = None,
) -> bytes:
    """The page.

    Args:
        views: `fastvid.page.view.VideoView` of each video.
        title: its heading.
        prompt: (summary, pieces), of which each is (text, "supervised", "placeholder" or ""); None: no record.
        warning: why training would refuse the record, or what is unusual about it.
    """
    parts = [_HEAD.format(title=_text(title)), f"<h1>{_text(title)}</h1>"]
    if warning:
        parts.append(f'<p class="warning">{_text(warning)}</p>')
    if prompt is not None:
        summary, pieces = prompt
        parts += [
            "<h2>Prompt</h2>",
            f'<p>{_text(summary)} The model is trained to predict what is <span class="supervised">green</span>.</p>',
            '<div class="prompt">',
            *(f'<span class="{kind}">{_text(text)}</span>' if kind else _text(text) for text, kind in pieces),
            "</div>",
        ]
    for view in views:
        parts += _video(view)
    return ("".join(parts) + "</body></html>\n").encode("utf-8", "xmlcharrefreplace")


def _video(view):
    yield f"<h2>{_text(view.name)}</h2>"
    for note in view.notes:
        yield f"<p>{_text(note)}</p>"
    if view.temporal is not None:
        yield from _strip(view)
    if view.spatial is not None:
        yield from _heat_map(view)
    if view.rows is not None:
        yield from _table(view)
    if view.frames is not None:
        yield from _frames(view)


def _strip(view):
    padding = int((view.temporal == 0).sum())
    kind = "rows" if view.spatial is None else "temporal rows"
    if view.grids:
        _, height, width = view.grids[-1]
        kind = f"steps of time, each the mean of {height} × {width} rows"
    filled = view.temporal[view.temporal > 0]
    caption = f"{len(view.temporal):,} {kind}, in order"
    if len(filled):
        caption += f", from the lowest bar, {filled.min():.4g}, to the tallest, {filled.max():.4g}"
    caption += ". Point at a bar for its value."
    if padding:
        caption += f" {padding:,} rows are zero, the padding of a short video: grey."
    name = "step" if view.grids else "row"
    labels = [f"{name} {row}{_place(view, row)}: {norm:.4g}" for row, norm in enumerate(view.temporal)]
    yield f"<h3>Norms over time</h3>{strip_svg(view.temporal, labels)}<p>{_text(caption)}</p>"


def _place(view, row):
    """The frame and time of a temporal row; none of a step that is no frame."""
    if view.grids and len(view.temporal) != len(view.numbers):
        return ""
    frame = f", frame {view.numbers[row]}" if row < len(view.numbers) and view.spatial is not None else ""
    return frame + (f" at {view.seconds[row]:.2f} s" if frame and row < len(view.seconds) else "")


def _heat_map(view):
    H, W = view.spatial.shape
    yield "<h3>Norms over the frame</h3>"
    yield (
        f'<figure><img alt="heat map of norms" src="{heat_map_uri(view.spatial, view.aspect)}"><figcaption>'
        f"{_what_is_mapped(view, H, W)}</figcaption></figure>"
    )
    if view.frames is not None:
        middle = len(view.frames) // 2
        yield (
            f'<figure><img alt="frame" src="{frame_uri(view.frames[middle], view.aspect, MAP)}"><figcaption>'
            f"the frame in the middle, number {view.numbers[middle]}</figcaption></figure>"
        )
    yield (
        f'<figure><img alt="scale" src="{scale_uri()}"><figcaption>{view.spatial.min():.4g} (least) to '
        f"{view.spatial.max():.4g} (largest)</figcaption></figure>"
    )


def _what_is_mapped(view, height, width):
    if not view.grids:
        return f"{height} × {width} patches, means over all frames"
    steps = "all steps of time" if len(view.grids) == 1 else f"the {view.grids[0][0]} frames of the slow group"
    return f"{height} × {width} cells, means over {steps}"


def _frames(view):
    count = len(view.frames)
    some = range(count) if count <= _MOST_FRAMES else [i * count // _MOST_FRAMES for i in range(_MOST_FRAMES)]
    yield (
        f"<h3>Frames</h3><p>{len(some)} of {count:,} frames that stand for the video, in as many pixels as the "
        "tower takes.</p>"
    )
    for i in some:
        time = f"{view.seconds[i]:.2f} s" if i < len(view.seconds) else "time unknown"
        yield (
            f'<figure><img alt="frame {view.numbers[i]}" src="{frame_uri(view.frames[i], view.aspect)}"><figcaption>'
            f"{time}, frame {view.numbers[i]}</figcaption></figure>"
        )


def _table(view):
    header, (R, C, stored) = view.header, view.rows
    video = header.get("video") if isinstance(header.get("video"), dict) else {}
    frames = header.get("num_frames", _NOT_TOLD)
    if "total_frames" in header:
        frames = f"{frames}, chosen from {header['total_frames']}"
    known = [
        ("tower", header.get("tower", _NOT_TOLD)),
        ("revision", header.get("tower_revision", _NOT_TOLD)),
        ("frames", frames),
        ("pooling", header.get("pooling", Provenance.of_header(header).pooling or _NOT_TOLD)),
        ("rows × channels", f"{R} × {C}"),
        (
            "dtype",
            f"{stored} in the file, "
            f"{header.get('dtype', _NOT_TOLD)} in the tower"
            + ", its matrices in FP8"
            * (header.get("tower_dtype") == "fp8"),
        ),
        ("decoder", video.get("decoder", _NOT_TOLD)),
        ("conversion", video.get("conversion", header.get("conversion", _NOT_TOLD))),
    ]
    known += [
        (name, header[key])
        for name, key in (
            ("pixels of a picture", "image_size"),
            ("pixels of a patch", "patch_size"),
            ("video", "source"),
            ("its bytes", "source_bytes"),
            ("its sha256", "source_sha256"),
            ("fastvid", "fastvid"),
        )
        if key in header
    ]
    known += [
        (name, video[key])
        for name, key in (
            ("codec", "codec"),
            ("width", "width"),
            ("height", "height"),
            ("frames per second", "fps"),
            ("seconds", "duration"),
            ("turned by, degrees", "rotation"),
            ("damaged frames", "damaged"),
        )
        if key in video
    ]
    cells = "".join(f"<tr><th>{name}</th><td>{_text(_short(value))}</td></tr>" for name, value in known)
    yield f"<h3>What the header says</h3><table>{cells}</table>"


def _short(value):
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _text(value):
    """A text as HTML, with characters of control made visible: a page has no use for them."""
    shown = "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in str(value))
    return html.escape(shown, quote=True)
