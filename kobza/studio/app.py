"""The studio: rooms -> one app. What a room shows it gets by argument from the recipe; here they only find their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from kobza.web.page import Link, Pages, mount_static

if TYPE_CHECKING:
    from kobza.checkpoint import Loaded


class Name(NamedTuple):
    """A model that can be opened. `note` says in a few words what it is."""

    name: str
    kind: Literal["run", "model"]
    note: str = ""


class Playable(Protocol):
    """A model in memory, ready to write. `chat`: messages -> ids with the answer due, None without a chat template."""

    loaded: Loaded
    ends: list[int]
    chat: Callable[[list[dict[str, Any]]], list[int]] | None


class Models(Protocol):
    """The models a room may use: the recipe finds and opens them, and keeps them open."""

    def names(self) -> list[Name]:
        """What there is, newest first."""

    def open(self, name: str) -> Playable:
        """One of names(); any other is an InputError."""


@dataclass(frozen=True)
class Room:
    """A part of the studio. Its router's paths all begin with `href`; `icon` is a symbol of web/static/icons.svg."""

    title: str
    href: str
    router: APIRouter
    icon: str = "dot"
    summary: str = ""  # a sentence for the first page


def make_app(rooms: Sequence[Room], title: str = "kobza studio", static: Sequence[str] = ()) -> FastAPI:
    """The rooms behind one top bar, and a first page that leads to them. static: packages whose files rooms need besides."""
    for room in rooms:
        strays = [route.path for route in room.router.routes if not f"{route.path}/".startswith(f"{room.href}/")]
        assert not strays, f"{room.title}: {strays} are not under {room.href}"
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.brand = title
    app.state.nav = (Link("Start", "/", "home"), *(Link(room.title, room.href, room.icon) for room in rooms))
    for room in rooms:
        app.include_router(room.router)
    pages = Pages("kobza.studio")

    @app.get("/")
    def home(request: Request) -> Response:
        return pages.render(request, "home.html", rooms=rooms)

    mount_static(app, "kobza.studio", *static)
    return app
