"""The pages as a web application: which address shows what, and what an open page hears. It only reads.

Nothing is asked of another machine: style, scripts and charts come from here, and the browser is told to allow no more.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from mlx_empire.errors import UserError
from mlx_empire.open.guard import Guard
from mlx_empire.page import render
from mlx_empire.page.board import boards, named, run_rows
from mlx_empire.page.charts import compared
from mlx_empire.page.live import Message, PanelFeed, RunFeed, screen
from mlx_empire.page.samples import samples_beside
from mlx_empire.page.watch import Gallery, held_still
from mlx_empire.run.compare import differences, figures
from mlx_empire.run.overview import look_at

POLL_SECONDS = 0.5  # between two looks for an open page
LIST_SECONDS = 2.0  # the same for one that shows many runs
SIGN_SECONDS = 15.0  # so often a silent stream says that it lives


def make_app(gallery: Gallery, hosts: Sequence[str], token: str | None) -> Starlette:
    """The application for the runs of `gallery`. hosts: by which names it may be called; token: who has it may look."""
    pages = Pages(gallery)
    routes = [
        Route("/", pages.runs),
        Route("/people", pages.people),
        Route("/compare", pages.compare),
        Route("/run/{name:path}", pages.run),
        Route("/events/runs", pages.runs_events),
        Route("/events/people", pages.people_events),
        Route("/events/run/{name:path}", pages.run_events),
        Route("/static/{name}", static),
    ]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        Middleware(Guard, token=token),
    ]
    return Starlette(routes=routes, middleware=middleware)


class Pages:
    """What each address answers."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery

    def runs(self, request: Request) -> Response:
        """The list of runs."""
        panels = self._runs_panels()
        return _html(render.live_page("runs", "/events/runs", root=str(self._gallery.root), panels=panels))

    def people(self, request: Request) -> Response:
        """The board of daughters."""
        panels = render.people_panels(boards(self._gallery))
        return _html(render.live_page("people", "/events/people", panels=panels))

    def run(self, request: Request) -> Response:
        """One run."""
        name = request.path_params["name"]
        watched = self._gallery.run(name)
        try:
            look = watched.look() if watched is not None else None
        except UserError as error:
            return _missing(name, str(error), 500)
        if look is None:
            return _missing(name, f"No run is called so in {self._gallery.root}.", 404)
        run, panels = look.once(screen)
        return _html(render.live_page("run", f"/events/run/{render.quote(name)}", run=run, panels=panels))

    def compare(self, request: Request) -> Response:
        """Runs beside each other."""
        try:
            looks = list(named(self._gallery, request.query_params.getlist("run")))
            runs = [look_at(look.overview.folder) for look in looks]
        except UserError as error:
            return _missing("Compare", str(error), 500)
        if len(looks) < 2:
            return _missing("Compare", "Tick two runs or more in the list of runs.", 400)
        tables = [
            ("What differs in their recipes", list(differences(runs))),
            ("What came of it", list(figures(runs, curves=False))),
        ]
        with held_still(looks):
            document = [chart.document() for chart in compared(looks)]
        values = {
            "names": [look.name for look in looks],
            "tables": tables,
            "document": document,
            "samples": render.samples_panel(samples_beside(looks)),
        }
        return _html(render.live_page("compare", None, **values))

    def runs_events(self, request: Request) -> Response:
        """What is new in the list."""
        return _stream(request, PanelFeed(self._runs_panels).news, LIST_SECONDS)

    def people_events(self, request: Request) -> Response:
        """What is new on the board."""
        return _stream(
            request, PanelFeed(lambda: render.people_panels(boards(self._gallery))).news, LIST_SECONDS
        )

    def run_events(self, request: Request) -> Response:
        """What is new of a run."""
        watched = self._gallery.run(request.path_params["name"])
        return (
            PlainTextResponse("no such run", 404)
            if watched is None
            else _stream(request, RunFeed(watched).news)
        )

    def _runs_panels(self) -> Any:
        return render.runs_panels(run_rows(self._gallery, time.time()))


def static(request: Request) -> Response:
    """Style and scripts, with the chart library's own from where it is installed."""
    match request.path_params["name"]:
        case "page.css":
            return Response(render.style(), media_type="text/css")
        case "page.js":
            return FileResponse(render.HERE / "static" / "page.js")
        case "plotly.js":
            return FileResponse(chart_library(), headers={"Cache-Control": "max-age=86400"})
    return PlainTextResponse("no such file", 404)


def chart_library() -> Path:
    """The script in the installed plotly package, which is not imported for it. UserError where there is none."""
    found = importlib.util.find_spec("plotly")
    for folder in found.submodule_search_locations or () if found is not None else ():
        script = Path(folder) / "package_data" / "plotly.min.js"
        if script.is_file():
            return script
    raise UserError("plotly: its script is not where it is looked for; install mlx-empire again")


def _html(page: str, status: int = 200) -> Response:
    return HTMLResponse(page, status)


def _missing(title: str, sentence: str, status: int) -> Response:
    return _html(render.live_page("missing", None, title=title, sentence=sentence), status)


def _stream(request: Request, news: Callable[[], Message | None], pause: float = POLL_SECONDS) -> Response:
    """Server-sent events of what `news` says."""

    async def events() -> AsyncIterator[str]:
        silent = 0.0
        while not await request.is_disconnected():
            try:
                message = await run_in_threadpool(news)
            except (
                UserError,
                OSError,
            ):  # a file that is damaged or just being replaced: the next look may be better
                message = None
            silent = 0.0 if message else silent + pause
            if message:
                yield f"data: {json.dumps(message, allow_nan=False, separators=(',', ':'))}\n\n"
            elif silent >= SIGN_SECONDS:
                silent = 0.0
                yield ": \n\n"
            await anyio.sleep(pause)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
