"""What all live pages share: templates, static files, headers and errors. Used by the studio's rooms and the contest alike.

A room makes `Pages("kobza.studio")` and answers with `pages.render(request, "x.html", ...)` for a whole page (the template
extends base.html) or a fragment that swap.js puts into one. An app is dressed once: `mount_static(app, "kobza.studio")`.
Which classes a template may use stands at the top of static/kobza.css, the blocks at the top of templates/base.html.

Templates escape everything and know no undefined name. The content policy allows scripts from our own files only, and nothing
from elsewhere, so that what a model or a guest wrote stays text even where a template should be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kobza.config import InputError
from kobza.web.guard import error_body

HERE = Path(__file__).parent
POLICY = (  # style attributes carry widths and colours of bars; they can reach nothing, for pictures come from here too
    "default-src 'self'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # not no-referrer: a form of our own would come without its origin
    "cache-control": "no-cache",  # asked again each time, so that a newer kobza does not meet an old script
}


class Link(NamedTuple):
    """A place in the top bar. `icon` is a symbol of static/icons.svg."""

    title: str
    href: str
    icon: str = "dot"


class Pages:
    """The templates of a package, on top of the common ones. Without `nav` the top bar is that of the app (app.state.nav)."""

    def __init__(self, package: str, nav: Sequence[Link] = ()):
        places = [str(files(package) / "templates"), str(HERE / "templates")]
        self.nav = tuple(nav)
        self.env = Environment(
            loader=FileSystemLoader(places),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.env.filters |= {"percent": percent, "count": count}

    def render(self, request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A template with its values, all escaped -> a page or a fragment."""
        state, path = request.app.state, request.url.path
        nav = self.nav or getattr(state, "nav", ())
        brand = getattr(state, "brand", "kobza")
        here = max((link.href for link in nav if under(path, link.href)), key=len, default="")
        text = self.env.get_template(name).render(nav=nav, here=here, brand=brand, **values)
        return HTMLResponse(text.encode("utf-8", errors="replace"), status)  # half a surrogate pair cannot be sent


def under(path: str, href: str) -> bool:
    """Whether a path is a link's own or below it; "/" is only itself."""
    return path == href or (href != "/" and path.startswith(href.rstrip("/") + "/"))


def percent(share: float) -> str:
    """A share for a person: 0.4231 -> "42.3 %", 0.00004 -> "<0.1 %"."""
    return "<0.1 %" if 0 < share < 0.001 else f"{share:.1%}".replace("%", " %")


def count(n: float) -> str:
    """A whole number for a person: 1234567 -> "1,234,567"."""
    return f"{n:,.0f}"


# ---- an app ----------------------------------------------------------------------------------------------------------


def mount_static(app: FastAPI, *packages: str) -> None:
    """Dress an app: our files at /static/web, a package's at /static/<its last name>, the headers, errors in words."""
    for package in packages:
        name = package.rsplit(".", 1)[-1]
        app.mount(f"/static/{name}", StaticFiles(directory=str(files(package) / "static")), name=f"static-{name}")
    app.mount("/static/web", StaticFiles(directory=HERE / "static"), name="static-web")
    app.add_middleware(PageHeaders)
    app.add_exception_handler(InputError, lambda request, error: refuse(request, 400, str(error)))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_valid)


class PageHeaders:
    """ASGI middleware: HEADERS on every answer that has not its own."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def refuse(request: Request, status: int, line: str, headers: Mapping[str, str] | None = None) -> Response:
    """One line that says what is wrong: a page to a person who opened an address, else the JSON body of all our errors."""
    asks_page = "text/html" in request.headers.get("accept", "") and "x-swap" not in request.headers
    if asks_page:
        page = Pages("kobza.web").render(request, "error.html", status, title="Not possible", line=line)
        page.headers.update(headers or {})
        return page
    return JSONResponse(error_body(status, line.encode("utf-8", errors="replace").decode()), status, headers)


def _http_error(request: Request, error: Any) -> Response:
    words = {404: f"nothing is at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    standard = error.detail in ("Not Found", "Method Not Allowed")
    return refuse(
        request, error.status_code, words[error.status_code] if standard else str(error.detail), error.headers
    )


def _not_valid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return refuse(request, 400, f"{where} is {first.get('input')!r:.60}; {first['msg'].lower()}")
