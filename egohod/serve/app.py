"""The server of ``egohod serve``: its addresses, who may ask, and what a browser may do with the answers."""

from __future__ import annotations

import hmac
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.requests import cookie_parser

from egohod.data.storage import VideoError
from egohod.errors import UserError
from egohod.runtime import usable_cores
from egohod.serve.index import Library, Made, Marks, Moment, Tracks

log = logging.getLogger(__name__)

# A mark is some hundred bytes; nothing else is ever sent to the server.
_LONGEST_BODY, _LONGEST_QUERY = 1 << 14, 1000
_MOST_HITS = 200
_HERE = Path(__file__).parent
_FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
# Nothing is fetched from elsewhere, and no script or style runs but the two files of the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Token needed</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/page.css">
<main class="login"><h1>This page needs its token</h1><p>{}</p><form action="/" method="get">
<label>Token <input name="token" type="password" autocomplete="off" autofocus required></label>
<button>Open</button></form></main></html>"""

_NO_PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 160 120"><rect width="160" height="120" fill="#8895a1"/>'
    '<text x="80" y="64" text-anchor="middle" font-family="sans-serif" font-size="13" fill="#fff">no picture</text>'
    "</svg>"
)


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server on ``host``."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass
class Access:
    """Who may ask: programs of this machine, or whoever has the token."""

    host: str
    token: str = ""
    last: float = 0.0
    """When the last request came, in seconds of ``time.monotonic``."""

    def refusal(self, headers: dict[str, str], method: str, token: str) -> tuple[int, str] | None:
        """Status and reason if a request is refused, None if it may pass."""
        try:
            target, origin = urlsplit(f"//{headers.get('host', '')}"), urlsplit(headers.get("origin", ""))
        except ValueError:
            return 400, "Host or Origin is no address"
        # A page elsewhere can lead its own name to 127.0.0.1, and would then read the answers.
        if is_loopback(self.host) and not is_loopback(target.hostname or ""):
            return 403, "this server answers on this machine only; --host opens it to others"
        if method not in ("GET", "HEAD") and "origin" in headers and origin.netloc != target.netloc:
            return 403, "the request comes from another page"
        # Such a page cannot read the answers either, but its pictures and players could keep the decoders busy.
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return 403, "the request comes from another page"
        # In constant time: the time of an ordinary comparison betrays how many characters are right.
        if self.token and not hmac.compare_digest(token.encode(), self.token.encode()):
            wrong = "The token is wrong. " if token else ""
            return 401, f"{wrong}Open the address that egohod serve printed, which contains it."
        return None


class Guard:
    """ASGI middleware in front of everything: access, security headers, and bodies of bounded size."""

    def __init__(self, app: Any, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request or pass it on."""
        if scope["type"] != "http":  # start and end of the server; there are no web sockets
            await self._app(scope, receive, send)
            return
        self._access.last = time.monotonic()
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        # Cookies belong to a host, whatever the port: two servers must not exchange theirs.
        cookie = f"egohod_{(scope.get('server') or ('', 0))[1]}"
        token = given or headers.get("authorization", "").removeprefix("Bearer ")
        # Not by http.cookies, which stops at the first cookie of another program that breaks its rules.
        token = token or unquote(cookie_parser(headers.get("cookie", "")).get(cookie, ""))
        refusal = self._access.refusal(headers, scope["method"], token)
        page = scope["path"] == "/"

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                named = {name for name, _ in message["headers"]}
                # The page and its answers are never stored: marks change, and an index may be private.
                more = _HEADERS | ({} if b"cache-control" in named else {"cache-control": "no-store"})
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in more.items())]
            await send(message)

        response: Response | None = None
        if refusal and not (refusal[0] == 401 and scope["path"] in ("/page.css", "/icon.svg")):
            status, reason = refusal
            response = JSONResponse({"error": reason}, status)
            if status == 401 and page:
                response = Response(_LOGIN.format(reason), 401, media_type="text/html")
        elif self._access.token and given and page:
            # Out of the address, which is in the history and on the screen.
            response = Response(status_code=303, headers={"location": "/"})
            response.set_cookie(cookie, quote(token), httponly=True, samesite="strict")
        elif scope["method"] not in ("GET", "HEAD") and not headers.get("content-length", "").isdecimal():
            response = JSONResponse({"error": "a request with a body must have a Content-Length"}, 411)
        elif int(headers.get("content-length", "0") or 0) > _LONGEST_BODY:
            # Before a byte of it is read.
            response = JSONResponse({"error": f"at most {_LONGEST_BODY} bytes can be sent"}, 413)
        await (response or self._app)(scope, receive, guarded)


class NewMark(BaseModel):
    """What the page sends for a mark; None takes it away."""

    side: int
    row: int
    label: str = Field(min_length=1, max_length=_LONGEST_QUERY)
    mark: Literal["right", "wrong"] | None


def create_app(libraries: Sequence[Library], marks: Marks, access: Access, tracks: Tracks | None = None) -> FastAPI:
    """The server over one index, or two beside each other."""
    made, started = Made(), format(time.time_ns(), "x")
    # A page asks for dozens of thumbnails at once, and a decoder takes a core and a picture's memory. Those that wait
    # hold no thread, or a few searches in a row would take all that the next one needs.
    slots = CapacityLimiter(max(1, usable_cores() - 1))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        made.close()

    # Without the pages about its interface, which load their scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, access=access)

    @app.exception_handler(UserError)
    def show_error(request: Request, error: UserError) -> Response:
        return JSONResponse({"error": str(error)}, 404 if isinstance(error, VideoError) else 400)

    @app.exception_handler(RequestValidationError)
    def show_bad_request(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    def moment_of(side: int, row: int) -> tuple[Library, int]:
        # By number only: no part of an address ever becomes a path.
        if not 0 <= side < len(libraries) or not 0 <= row < len(libraries[side].features.videos):
            raise VideoError("there is no such moment; reload the page")
        return libraries[side], row

    def as_hit(side: int, row: int, similarity: float | None) -> dict[str, Any]:
        features = libraries[side].features
        video, start, end = features.videos[row], float(features.start[row]), float(features.end[row])
        return {
            "side": side,
            "row": row,
            "video": video,
            "start": start,
            "end": end if np.isfinite(end) else None,
            "similarity": similarity,
            "text": features.texts[row],
            "marks": marks.of(Moment.of(video, start, end)),
        }

    def queries(q: str, side: int, row: int | None) -> list[np.ndarray | str]:
        """The query of each index, or why it has none."""
        if row is None:
            return [each.no_text if each.tower is None else each.tower.encode(q) for each in libraries]
        origin, row = moment_of(side, row)
        video, middle = origin.features.videos[row], float(origin.middle[row])
        # The same moment in the other index, whose windows may be others.
        rows = [row if each is origin else each.row_at(video, middle) for each in libraries]
        return [
            "this video is not in this index" if here is None else each.features.features[here]
            for each, here in zip(libraries, rows, strict=True)
        ]

    @app.get("/")
    def page() -> Response:
        return Response((_HERE / "page.html").read_bytes(), media_type="text/html")

    @app.get("/{name}.{kind}")
    def page_file(name: str, kind: str) -> Response:
        file = f"{name}.{kind}"
        if file not in _FILES:
            raise VideoError("no such page")
        return Response((_HERE / file).read_bytes(), media_type=_FILES[file])

    @app.get("/api/library")
    def library() -> dict[str, Any]:
        return {
            "sides": [
                {
                    "name": each.name,
                    "moments": len(each.features.videos),
                    "videos": len(each.names),
                    "no_text": each.no_text,
                    "missing": each.missing,
                }
                for each in libraries
            ],
            "names": list(dict.fromkeys(name for each in libraries for name in each.names)),
            "tracks": tracks is not None,
            "marks": marks.counts(),
            # Part of the addresses of pictures, which a browser stores: those of another index have the same numbers.
            "started": started,
        }

    @app.get("/api/search")
    def search(
        q: Annotated[str, Query(max_length=_LONGEST_QUERY)] = "",
        side: int = 0,
        row: int | None = None,
        top: Annotated[int, Query(ge=1, le=_MOST_HITS)] = 24,
        video: str = "",
        start: Annotated[float, Query(ge=0, alias="from")] = 0.0,
        end: Annotated[float, Query(alias="to")] = np.inf,
        overlapping: bool = False,
    ) -> dict[str, Any]:
        q, begin, sides = q.strip(), time.perf_counter(), list[dict[str, Any]]()
        if not q and row is None:
            # Nothing is wanted yet: what there is to see.
            return {"sides": [{"hits": [as_hit(i, each, None) for each in library.spread(top)]}
                              for i, library in enumerate(libraries)]}  # fmt: skip
        encoded = queries(q, side, row)
        ready = time.perf_counter()
        for i, (library, query) in enumerate(zip(libraries, encoded, strict=True)):
            if isinstance(query, str):
                sides.append({"hits": [], "error": query})
                continue
            rows, similarity = library.search(
                query, top, videos=video.strip(), start=start, end=end, overlapping=overlapping
            )
            sides.append({"hits": [as_hit(i, each, float(similarity[each])) for each in rows]})
        seconds = {"encode": ready - begin, "search": time.perf_counter() - ready}
        return {"sides": sides, "seconds": seconds}

    @app.get("/api/chart")
    def chart(video_side: int, video_row: int, q: str = "", side: int = 0, row: int | None = None) -> dict[str, Any]:
        origin, shown = moment_of(video_side, video_row)
        video, lines = origin.features.videos[shown], list[list[list[float]]]()
        for library, query in zip(libraries, queries(q.strip(), side, row), strict=True):
            lines.append([] if isinstance(query, str) else library.chart(library.features.features @ query, video))
        rows = origin.features.rows_of[video]
        end = float(np.max(np.where(np.isfinite(origin.features.end), origin.features.end, 0)[rows.start : rows.stop]))
        return {"video": video, "end": end, "lines": lines}

    @app.get("/api/at")
    def at(video_side: int, video_row: int, second: float) -> dict[str, Any]:
        origin, shown = moment_of(video_side, video_row)
        nearest = origin.row_at(origin.features.videos[shown], second)
        assert nearest is not None, "it is a video of this index"
        return as_hit(video_side, nearest, None)

    @app.get("/api/moment/{side}/{row}")
    def moment(side: int, row: int) -> dict[str, Any]:
        library, row = moment_of(side, row)
        hit = as_hit(side, row, None)
        try:
            why, (_, begin) = library.why_not_shown(row), library.file(row)
            start, end = library.stretch(row)
        except VideoError as error:  # no error of the page: the moment is there, its video is not
            return hit | {"error": str(error)}
        return hit | {
            "file": None if why else f"/video/{side}/{row}",
            "file_start": begin,
            "stretch": f"/stretch/{side}/{row}?{started}",
            "stretch_start": max(start, begin),
            "why": why,
            "end": library.end(row),
            "tracks": tracks.between(hit["video"], start, end) if tracks else [],
        }

    @app.get("/video/{side}/{row}")
    def video_file(side: int, row: int) -> Response:
        library, row = moment_of(side, row)
        if why := library.why_not_shown(row):
            raise VideoError(f"{library.features.videos[row]}: {why}")
        file, _ = library.file(row)
        kind = "video/webm" if Path(str(file)).suffix.lower() == ".webm" else "video/mp4"
        # Ranges of it are sent as a player asks for them: of an hour only what is watched.
        return FileResponse(str(file), media_type=kind, headers={"cache-control": "private, max-age=0"})

    @app.get("/stretch/{side}/{row}")
    async def stretch(side: int, row: int) -> Response:
        library, row = moment_of(side, row)
        write = partial(library.write_stretch, row)
        path = await to_thread.run_sync(made.get, f"{side}-{row}.mp4", write, limiter=slots)
        return FileResponse(path, media_type="video/mp4", headers={"cache-control": "private, max-age=3600"})

    @app.get("/thumbnail/{side}/{row}")
    async def thumbnail(side: int, row: int) -> Response:
        library, row = moment_of(side, row)
        write = partial(library.write_thumbnail, row)
        try:
            path = await to_thread.run_sync(made.get, f"{side}-{row}.jpg", write, limiter=slots)
        except VideoError as error:
            log.debug("no thumbnail: %s", error)
            return Response(_NO_PICTURE, media_type="image/svg+xml")
        return FileResponse(path, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    @app.post("/api/marks")
    def mark(new: NewMark) -> dict[str, Any]:
        library, row = moment_of(new.side, new.row)
        features, label = library.features, new.label.strip()
        if not label:
            raise UserError("a mark needs a label: what is right or wrong for this moment")
        if min(label) < " " or label.splitlines() != [label]:
            raise UserError("a label is one line of text")
        if label[0] in "=+-@":  # the exported csv may be opened in one
            raise UserError(f"a label cannot begin with '{label[0]}': spreadsheets take it for a formula")
        place = Moment.of(features.videos[row], float(features.start[row]), float(features.end[row]))
        marks.set(place, label, new.mark)
        return {"marks": marks.of(place), "counts": marks.counts()}

    @app.get("/export/{kind}")
    def export(kind: Literal["narrations", "labels"]) -> Response:
        def length_of(video: str) -> float:
            library = next((each for each in libraries if video in each.features.rows_of), None)
            if library is None:
                raise VideoError(f"{video}: not in the index")
            return library.end(library.features.rows_of[video].start)

        head = {"content-disposition": f'attachment; filename="{kind}.csv"'}
        return Response(marks.to_csv(kind, length_of), media_type="text/csv; charset=utf-8", headers=head)

    return app


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises :class:`UserError` if the port is taken or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host.strip("[]"), port))
        opened.listen(128)
    except OSError as error:
        opened.close()
        cure = "--port 0 takes a free one"
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; {cure}") from error
    return opened


def run(app: FastAPI, listening: socket.socket, access: Access, idle: float = 0.0) -> None:
    """Serve until a signal, or until no request came for ``idle`` seconds if that is above 0."""
    settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                              timeout_graceful_shutdown=2)  # fmt: skip
    server, access.last = uvicorn.Server(settings), time.monotonic()

    def watch() -> None:
        while not server.should_exit:
            time.sleep(min(1.0, idle / 4))
            if time.monotonic() - access.last > idle:
                log.info("no request for %g s: stopped", idle)
                server.should_exit = True

    if idle:
        threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listening])
