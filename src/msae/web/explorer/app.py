"""The explorer as a web server on this machine: gradio around pages that are functions of an address."""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from markupsafe import Markup

from msae.base.errors import ConfigError, MissingDependencyError, MsaeError
from msae.web.explorer import audit, concept, concepts, models, search
from msae.web.explorer.address import PAGES, Address
from msae.web.explorer.html import LARGE, SMALL, fill, join, problem
from msae.web.explorer.session import LoadedRun, World

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
MODULES: Mapping[str, Any] = {
    "concepts": concepts, "concept": concept, "search": search, "audit": audit, "models": models
}  # fmt: skip
SLOW = ("relations", "result", "evaluated")
"""Parts that may take seconds: one of them at a time, so that the quick ones are never waited for."""
MAX_PICTURE = 30_000_000
"""Bytes of a picture that is dropped."""
OPEN_PATHS = ("/assets/", "/static/", "/picture/", "/gradio_api/heartbeat/")
OPEN_FILES = ("/", "/theme.css", "/favicon.ico", "/config", "/gradio_api/startup-events", "/gradio_api/theme.css")
RPC = "/gradio_api/component_server"
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


_logger = logging.getLogger(__name__)


class Explorer:
    """Answers what a browser asks of a world; keeps nothing of who asked."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._quick = threading.BoundedSemaphore(max(2, os.cpu_count() or 2))
        self._slow = threading.Lock()

    def show(self, asked: Any) -> dict[str, Any]:
        """A page, or the part of one.

        Args:
            asked: `address`, the query string of the URL, and `part`, empty for the whole page.
        """
        asked = asked if isinstance(asked, dict) else {}
        address, part = Address.parse(str(asked.get("address", ""))), str(asked.get("part", ""))
        run = self.world.runs.get(address.one("run"), self.world.first)
        render = MODULES[address.page].PARTS.get(part)
        if render is None:
            return {"html": problem(f"this page has no part {part!r}; reload it")}
        with self._slow if part in SLOW else self._quick:
            try:
                body = render(self.world, run, address)
            except MsaeError as err:
                body = problem(err)
            except Exception as err:
                _logger.exception("the explorer could not show %s", address.but())
                body = problem(f"unexpected {type(err).__name__}; the terminal shows more, please report it")
        if part:
            return {"html": body}
        return {
            "html": _frame(self.world, run, address, body),
            "title": f"{address.page.capitalize()} · {run.label} · msae",
        }

    def embed(self, asked: Any) -> dict[str, Any]:
        """The embedding of a picture that was dropped, as it stands in an address.

        Args:
            asked: `picture`, the bytes of its file in base64.
        """
        try:
            data = base64.b64decode(str(asked["picture"])[: 2 * MAX_PICTURE], validate=True)
            if len(data) > MAX_PICTURE:
                raise ConfigError(f"the picture is larger than {MAX_PICTURE // 1_000_000} MB; drop a smaller one")
            with self._quick:
                return {"vector": search.as_vector(self.world.embed_picture(data))}
        except MsaeError as err:
            return {"problem": problem(err)}
        except (binascii.Error, KeyError, TypeError):
            return {"problem": problem("the picture did not arrive whole; drop it again")}

    def audit(self, asked: Any) -> dict[str, Any]:
        """An audit's JSON as a part of the page Audit.

        Args:
            asked: `text`, the content of the file.
        """
        with self._quick:
            return {"html": audit.loaded(str(asked.get("text", "")) if isinstance(asked, dict) else "")}


def _frame(world: World, run: LoadedRun, address: Address, body: Markup) -> Markup:
    """The page with what all pages have: the way to the others, the run and the store."""
    links = join(
        fill('<a href="{}"{}>{}</a>', address.to(page),
             Markup(' aria-current="page"') if page == address.page else "", page.capitalize())
        for page in PAGES
    )  # fmt: skip
    options = join(
        fill("<option{}>{}</option>", Markup(" selected") if label == run.label else "", label) for label in world.runs
    )
    choice = fill('<label>run <select data-run aria-label="Run">{}</select></label>', options)
    store = fill("<span>on {}</span>", world.store.path.name) if world.store else fill("<span>no store</span>")
    known = world.runs.get(address.one("run")) or not address.one("run")
    other = "" if known else problem(f"There is no run {address.one('run')!r} here; this is {run.label}.")
    return fill(
        '<a class="skip" href="#content">Skip to the content</a><header><b>msae</b><nav aria-label="Pages">{}</nav>'
        '<div class="where">{}{}</div></header><main id="content" tabindex="-1">{}{}</main>',
        links, choice, store, other, body,
    )  # fmt: skip


def build(world: World) -> Any:
    """The web application.

    Raises:
        MissingDependencyError: gradio is not installed.
    """
    try:
        import fastapi
        import gradio
    except ImportError as err:
        raise MissingDependencyError.of(err.name or "gradio", extra="explorer") from err
    explorer = Explorer(world)
    files = resources.files("msae.web.explorer")
    with gradio.Blocks(title="msae explorer", analytics_enabled=False) as blocks:
        gradio.HTML(
            '<div class="msae" id="msae" aria-live="off"><p class="note">Opening …</p></div>',
            apply_default_css=False,
            server_functions=_as_functions(explorer),
            js_on_load=files.joinpath("page.js").read_text(encoding="utf-8"),
        )
    app = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.get("/picture/{row}/{side}")(_pictures(world))
    gradio.mount_gradio_app(
        app, blocks, path="/", server_name=HOST, footer_links=[], run_history=False, ssr_mode=False, pwa=False,
        mcp_server=False, enable_monitoring=False, show_error=False, max_file_size=1, allowed_paths=[],
        theme=gradio.themes.Base(font="system-ui", font_mono="monospace"),
        css=files.joinpath("page.css").read_text(encoding="utf-8"),
    )  # fmt: skip
    return guarded(app)


def _as_functions(explorer: Explorer) -> list[Callable[[Any], dict[str, Any]]]:
    """What the browser may call: gradio marks them, and a method cannot be marked."""

    def show(asked: Any) -> dict[str, Any]:
        return explorer.show(asked)

    def embed(asked: Any) -> dict[str, Any]:
        return explorer.embed(asked)

    def audit(asked: Any) -> dict[str, Any]:
        return explorer.audit(asked)

    return [show, embed, audit]


def _pictures(world: World) -> Callable[[int, int], Any]:
    """The route of thumbnails: it takes the number of a row of the store, so no file can be named."""
    from fastapi import Response

    def send(row: int, side: int) -> Any:
        data = world.picture(row, side) if side in (SMALL, LARGE) else None
        if data is None:
            return Response("no such picture", status_code=404, media_type="text/plain")
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    return send


def guarded(app: App) -> App:
    """Only what the explorer needs of gradio's many routes, only to this machine's own pages.

    Uploads, files by path, proxies and the queue are closed. A request that names another host is a page elsewhere that
    was made to point here, and is refused, as is one that comes from another page.
    """

    async def inner(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        status = refusal(
            scope["method"], scope["path"], {key.decode("latin-1"): v.decode("latin-1") for key, v in scope["headers"]}
        )
        if status:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not here"})
            return

        if scope["path"] == "/":
            scope = {
                **scope,
                "query_string": b"",
            }  # gradio would take our address for its own

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await app(scope, receive, send_with_headers)

    return inner


def refusal(method: str, path: str, headers: Mapping[str, str]) -> int | None:
    """The status with which a request is refused, or None."""
    host = headers.get("host", "")
    if urlsplit(f"//{host}").hostname not in NAMES:
        return 400
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return 403
    if path.rstrip("/") == RPC:
        return None if method == "POST" else 405
    if ".." in path or "\\" in path or "\0" in path:
        return 404
    if method not in ("GET", "HEAD"):
        return 404
    return None if path in OPEN_FILES or path.startswith(OPEN_PATHS) else 404


@contextlib.contextmanager
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
