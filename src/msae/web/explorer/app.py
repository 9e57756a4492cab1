"""The explorer as a web server on this machine: each page is a function of its address.

The server answers before torch is imported: a thread reads the runs and the store, and meanwhile a page says so.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from msae.base.errors import ConfigError, MsaeError
from msae.web.explorer.address import PAGES, Address
from msae.web.glossary import glossary
from msae.web.page import TEMPLATES, render

if TYPE_CHECKING:
    from msae.data.store import EmbeddingStore
    from msae.web.explorer.session import World

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
SIDES = {"96": 96, "320": 320}
"""Pixels of the two sizes in which pictures are served, as they stand in addresses."""
SLOW = ("relations", "result", "evaluated", "values", "learnt", "compared")
"""Parts that may take seconds: one of them at a time, so that the quick ones are never waited for."""
MAX_UPLOAD = 30_000_000
"""Bytes of a picture or an audit that is sent here; it is kept in memory and never written."""
VENDOR = TEMPLATES.parent / "vendor"
FILES = {
    **{name: TEMPLATES / name for name in ("style.css", "page.js", "map.js")},
    **{name: VENDOR / name for name in ("sigma.min.js", "graphology.umd.min.js")},
}
TYPES = {".css": "text/css", ".js": "text/javascript"}
LAST_WORDS = 5.0
"""Seconds in which a page that waits for the explorer can fetch why it did not start."""
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Say = Callable[[str], object]

_logger = logging.getLogger(__name__)


class Explorer:
    """Answers what a browser asks of a world; keeps nothing of who asked."""

    def __init__(self, world: World) -> None:
        from msae.web.explorer import audit, compare, concept, concepts, find, map, models, search

        self.world = world
        self.pages: Mapping[str, Any] = {
            "concepts": concepts, "concept": concept, "map": map, "search": search, "find": find, "compare": compare,
            "audit": audit, "models": models,
        }  # fmt: skip
        self._quick = threading.BoundedSemaphore(max(2, os.cpu_count() or 2))
        self._slow = threading.Lock()

    def show(self, query: str, part: str = "") -> str:
        """A page, or a part of one, as HTML.

        Args:
            query: The query string of the page's address.
            part: Empty for the whole page.
        """
        address = Address.parse(query)
        asked = address.one("run")
        run = self.world.runs.get(asked, self.world.first)
        view = self.pages[address.page].PARTS.get(part)
        body: str
        with self._slow if part in SLOW or (part and address.one("where")) else self._quick:
            try:
                if view is None:
                    raise ConfigError(f"this page has no part {part!r}; reload it")
                body = view(self.world, run, address)
            except MsaeError as err:
                body = _problem(str(err), whole=not part)
            except Exception as err:
                _logger.exception("the explorer could not show %s", address.but())
                what = f"unexpected {type(err).__name__}; the terminal shows more, please report it"
                body = _problem(what, whole=not part)
        if part:
            return body
        unknown = asked if asked and asked not in self.world.runs else ""
        return render("explorer/frame.html", world=self.world, run=run, address=address, body=body, pages=PAGES,
                      unknown=unknown)  # fmt: skip

    def embed(self, picture: bytes) -> str:
        """The embedding of a picture's file, as it stands in an address; raises what `World.embed_picture` raises."""
        with self._quick:
            vector: str = self.pages["search"].as_vector(self.world.embed_picture(picture))
            return vector

    def places(self, query: str) -> dict[str, Any]:
        """The points of the map of the run that an address names; raises `MsaeError` where there are none."""
        run = self.world.runs.get(Address.parse(query).one("run"), self.world.first)
        found: dict[str, Any] = self.pages["map"].places(run)
        return found

    def audit(self, text: str) -> str:
        """An audit's JSON as a part of the page Audit."""
        with self._quick:
            body: str = self.pages["audit"].loaded(text)
            return body


def _problem(message: str, *, whole: bool = False) -> str:
    """What went wrong, in place of a whole page or of a part of one."""
    return render("explorer/problem.html", message=message, whole=whole)


class Opening:
    """The explorer while a thread reads the runs and the store, and in the end the explorer itself, or why not."""

    def __init__(
        self,
        runs: Sequence[str | Path],
        on: EmbeddingStore | str | Path | None,
        say: Say,
        show: str | Sequence[str] = (),
        device: str = "auto",
    ) -> None:
        self.runs, self.on, self.say, self.show, self.device = runs, on, say, show, device
        self.doing = "Loading PyTorch"
        self.failure: BaseException | None = None
        self.stop: Callable[[], None] = lambda: None
        """Ends the server, after a failure."""
        self._explorer: Explorer | None = None
        self._done, self._delivered = threading.Event(), threading.Event()
        self._is_watched = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="open", daemon=True).start()

    def _run(self) -> None:
        try:
            explorer = self._open()
        except BaseException as err:  # noqa: BLE001 - raised again where the server ends
            self.failure = err
            self._done.set()
            if self._is_watched:
                self._delivered.wait(LAST_WORDS)
            self.stop()
            return
        self._explorer = explorer
        self._done.set()
        try:
            explorer.world.prepare_search()
        except Exception:
            _logger.exception("the search could not be prepared")  # said on its page, when it is asked for

    def _open(self) -> Explorer:
        from msae.web.explorer.session import open_world

        self.doing = f"Reading {' and '.join(map(str, self.runs))}"
        world = open_world(self.runs, self.on, self.show, self.device)
        if world.store is not None:
            self.doing = f"Reading {world.store.address} with {world.first.folder}"
            self.say(
                f"reading {world.store.address} with {world.first.folder}; "
                f"the first time takes a while, then it is kept"
            )
        world.prepare()
        return Explorer(world)

    @property
    def explorer(self) -> Explorer | None:
        """What answers; waits until it can, and is None if it could not be made."""
        self._done.wait()
        return self._explorer

    def page(self) -> str | None:
        """What to show instead of a page: that it is being read, or why it could not be; None once it is there."""
        if not self._done.is_set():
            self._is_watched = True
            return render("explorer/opening.html", doing=self.doing, problem=None)
        if self.failure is None:
            return None
        known = isinstance(self.failure, MsaeError | OSError)
        problem = str(self.failure) if known else f"unexpected {type(self.failure).__name__}; please report it"
        text = render("explorer/opening.html", doing=self.doing, problem=problem)
        self._delivered.set()
        return text

    def state(self) -> dict[str, Any]:
        """What the page that waits asks again and again."""
        return {"doing": self.doing, "done": self._done.is_set()}


def build(opening: Opening) -> App:
    """The web application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    gone = Response("msae explore did not start", status_code=503, media_type="text/plain")

    def page(request: Request) -> Response:
        instead = opening.page()
        if instead is not None:
            return HTMLResponse(instead, headers={"cache-control": "no-store"})
        explorer = opening.explorer
        return gone if explorer is None else HTMLResponse(explorer.show(request.url.query))

    def part(request: Request) -> Response:
        explorer = opening.explorer
        if explorer is None:
            return gone
        return HTMLResponse(explorer.show(request.url.query, request.path_params["name"]))

    def glossary_page(_: Request) -> Response:
        return HTMLResponse(render("explorer/glossary.html", glossary=glossary()))

    def state(_: Request) -> Response:
        return JSONResponse(opening.state(), headers={"cache-control": "no-store"})

    def places(request: Request) -> Response:
        explorer = opening.explorer
        if explorer is None:
            return gone
        try:
            return JSONResponse(explorer.places(request.url.query))
        except MsaeError as err:
            return JSONResponse({"problem": _problem(str(err))})

    async def embed(request: Request) -> Response:
        data = await _body(request)
        if data is None:
            return JSONResponse({"problem": _problem(f"the picture is larger than {MAX_UPLOAD // 1_000_000} MB")})

        def answer() -> dict[str, str]:
            explorer = opening.explorer
            try:
                return {} if explorer is None else {"vector": explorer.embed(data)}
            except MsaeError as err:
                return {"problem": _problem(str(err))}

        return JSONResponse(await run_in_threadpool(answer))

    async def audit(request: Request) -> Response:
        data = await _body(request)
        if data is None:
            return HTMLResponse(_problem(f"the file is larger than {MAX_UPLOAD // 1_000_000} MB"))
        explorer = await run_in_threadpool(lambda: opening.explorer)
        if explorer is None:
            return gone
        return HTMLResponse(await run_in_threadpool(explorer.audit, data.decode("utf-8", errors="replace")))

    def picture(request: Request) -> Response:
        row, side = request.path_params["row"], request.path_params["side"]
        explorer = opening.explorer
        is_row = row.isdecimal() and len(row) < 19  # more digits are no row, and too many cannot be read at all
        data = explorer.world.picture(int(row), SIDES[side]) if explorer and is_row and side in SIDES else None
        if data is None:
            return Response("no such picture", status_code=404, media_type="text/plain")
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in FILES:
            return Response("no such file", status_code=404, media_type="text/plain")
        headers = {"cache-control": "no-cache"}
        return Response(FILES[name].read_bytes(), media_type=TYPES[FILES[name].suffix], headers=headers)

    @asynccontextmanager
    async def started(_: Starlette) -> AsyncIterator[None]:
        opening.start()
        yield

    routes = [
        Route("/", page),
        Route("/part/{name}", part),
        Route("/state", state),
        Route("/places", places),
        Route("/glossary", glossary_page),
        Route("/embed", embed, methods=["POST"]),
        Route("/audit", audit, methods=["POST"]),
        Route("/picture/{row}/{side}", picture),
        Route("/static/{name}", file),
    ]
    return guarded(Starlette(routes=routes, lifespan=started))


async def _body(request: Any) -> bytes | None:
    """What was sent, or None where it is too large; read to the end then, so that the browser gets the answer."""
    found = bytearray()
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_UPLOAD:
            found += chunk
    return bytes(found) if size <= MAX_UPLOAD else None


def guarded(app: App) -> App:
    """The application for this machine's own pages alone, with headers that forbid the browser everything else.

    A request that names another host is from a page elsewhere whose name was made to point here; it is refused, as is
    a request that comes from another page.
    """

    async def inner(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        status = refusal({key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]})
        if status is None:
            await app(scope, receive, send_with_headers)
            return
        start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
        await send_with_headers(start)
        await send({"type": "http.response.body", "body": b"not here"})

    return inner


def refusal(headers: Mapping[str, str]) -> int | None:
    """The status with which a request is refused for the host or page that it names, or None."""
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        if urlsplit(f"//{host}").hostname not in NAMES:
            return 400
        return 403 if origin is not None and urlsplit(origin).netloc != host else None
    except ValueError:  # such as "[": no address at all
        return 400


def serve(
    runs: Sequence[str | Path],
    on: EmbeddingStore | str | Path | None,
    port: int,
    show: str | Sequence[str],
    device: str,
    say: Say,
    ready: Say,
) -> None:
    """Serve until Ctrl-C, or raise why the runs and the store cannot be shown; see `explore`."""
    import uvicorn

    opening = Opening(runs, on, say, show, device)
    with listening(port) as found:
        config = uvicorn.Config(
            build(opening), log_level="warning", access_log=False, ws="none", server_header=False,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)

        def stop() -> None:
            server.should_exit = True

        opening.stop = stop
        ready(f"http://{HOST}:{found.getsockname()[1]}/")  # the socket listens: who comes early waits
        with suppress(KeyboardInterrupt):
            server.run(sockets=[found])
    if opening.failure is not None:
        raise opening.failure


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket on this machine alone.

    Args:
        port: 0 takes any that is free.

    Raises:
        ConfigError: The port is taken or is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((HOST, port))
            found.listen(128)
        except (OSError, OverflowError) as err:
            reason = getattr(err, "strerror", None) or str(err)
            raise ConfigError(
                f"port {port} cannot be used ({reason}); give another with --port, for example --port 7861"
            ) from err
        yield found
