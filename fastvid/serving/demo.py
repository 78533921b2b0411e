"""A page to try the model: its files, and what it shows of a video."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastvid.batch import by_tower
from fastvid.page.pictures import frame_uri, heat_map_uri, scale_uri, strip_svg
from fastvid.page.view import VideoView, show_features
from fastvid.serving.features import Look
from fastvid.serving.service import Service

_MOST_FRAMES = 100  # on the page
_KINDS = {"demo.html": "text/html", "demo.js": "text/javascript", "demo.css": "text/css"}
# Nothing from elsewhere, and no script but the page's own file.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes(
    service: Service,
    body: Callable[[Request, str], Awaitable[bytes]],
    while_there: Callable[[Request, Coroutine[Any, Any, Any], float], Awaitable[Any]],
) -> list[Route]:
    """The page's addresses.

    Args:
        service: that answers.
        body: reads a request's body of a content type, which is held until `Service.release`.
        while_there: the result of some work, unless the client leaves or a time of the event loop's clock comes.
    """

    async def seen(content):
        return await asyncio.to_thread(_shown, await service.look(content), service.num_frames, service.pooling)

    async def look(request: Request) -> Response:
        """POST /demo/look: a video's bytes to what the page shows of it."""
        deadline = asyncio.get_running_loop().time() + service.config.request_timeout
        content = await body(request, "application/octet-stream")
        with ExitStack() as held:
            held.callback(service.release, content)
            held.enter_context(service.admitted())
            return JSONResponse(await while_there(request, seen(content), deadline))

    page = [
        Route(f"/{name}" if name != "demo.html" else "/", _file(name, kind, service)) for name, kind in _KINDS.items()
    ]
    return [*page, Route("/demo/look", look, methods=["POST"])]


def _file(name, kind, service):
    async def file(_: Request) -> Response:
        content = resources.files("fastvid.serving").joinpath(name).read_bytes()
        content = content.replace(b"MOST_MIB", b"%d" % service.config.max_body_mib)  # in demo.html
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(content, headers=headers, media_type=kind)

    return file


def _shown(seen: Look, num_frames: int, pooling: str):
    """What the page shows of a video, as JSON: pictures are data URIs, the strip is SVG."""
    view = VideoView("video", seen.frames, seen.numbers, seen.seconds, seen.info.width / seen.info.height)
    show_features(view, by_tower(seen.features_RC)[0], {"pooling": pooling}, num_frames)
    view.aspect = min(max(view.aspect, 1 / 16), 16)
    count = len(seen.frames)
    some = range(count) if count <= _MOST_FRAMES else [i * count // _MOST_FRAMES for i in range(_MOST_FRAMES)]
    assert view.temporal is not None
    filled = view.temporal[view.temporal > 0]
    low, span = (filled.min(), filled.max() - filled.min() or 1) if len(filled) else (0, 1)
    split = view.spatial is not None
    # Steps of time; of the recipe's pooling those behind the last frame are padding.
    steps = view.temporal[:count] if split and not view.grids else view.temporal
    labels = [f"row {row}: {norm:.4g}" for row, norm in enumerate(steps)]
    frames = [
        {
            "src": frame_uri(seen.frames[i], view.aspect),
            "number": seen.numbers[i],
            "seconds": seen.seconds[i] if i < len(seen.seconds) else None,
            "norm": float((steps[i * len(steps) // count] - low) / span) if split else None,
        }
        for i in some
    ]
    return {
        "video": seen.key,
        "width": seen.info.width,
        "height": seen.info.height,
        "duration": seen.info.duration,
        "total_frames": seen.info.frames,
        "rows": len(seen.features_RC),
        "frames": frames,
        "strip": strip_svg(steps, labels),
        "heat": heat_map_uri(view.spatial, view.aspect) if view.spatial is not None else None,
        "middle": frame_uri(seen.frames[count // 2], view.aspect, 420),
        "scale": scale_uri(),
    }
