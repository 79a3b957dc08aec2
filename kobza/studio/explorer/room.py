"""The lessons -> a room of the studio: each a page at /explorer/NAME and its result alone at /explorer/NAME/part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kobza.config import InputError
from kobza.studio.app import Room
from kobza.studio.explorer import attention, lens, linear, numbers, parameters, path, softmax, tokens, vectors
from kobza.studio.explorer.lesson import Asked, Lesson
from kobza.studio.explorer.sources import Eye, Sources
from kobza.web.page import Pages

HOME = "/explorer"
LESSONS: tuple[Lesson, ...] = (
    tokens.LESSON,
    vectors.LESSON,
    linear.LESSON,
    linear.COST,
    path.LESSON,
    attention.LESSON,
    lens.LESSON,
    softmax.LESSON,
    numbers.LESSON,
    parameters.LESSON,
)


def room(sources: Sources, lessons: Sequence[Lesson] = LESSONS) -> Room:
    """The explorer with what it looks at."""
    router, pages, eye = APIRouter(), Pages("kobza.studio"), Eye(sources)

    @router.get(HOME)
    def home(request: Request) -> Response:
        return pages.render(request, "explorer/home.html", lessons=lessons)

    for at in range(len(lessons)):
        serve(router, pages, eye, lessons, at)
    summary = f"How a language model works, in {len(lessons)} lessons that you can touch: tokens, vectors, attention, numbers."
    return Room("Explorer", HOME, router, "explore", summary)


def serve(router: APIRouter, pages: Pages, eye: Eye, lessons: Sequence[Lesson], at: int) -> None:
    """The page of a lesson and its part; sync, so that a long look does not hold up the others."""
    lesson = lessons[at]
    around: dict[str, Any] = {
        "lesson": lesson,
        "lessons": lessons,
        "number": at + 1,
        "following": lessons[(at + 1) % len(lessons)],
    }

    @router.get(f"{HOME}/{lesson.name}")
    def page(request: Request) -> Response:
        form, values, line = answer(eye, lesson, Asked(request.query_params))
        values = values | around | {"form": form, "line": line}  # anew: the lesson may keep its own
        return pages.render(request, f"explorer/{lesson.name}.html", 400 if line else 200, **values)

    @router.get(f"{HOME}/{lesson.name}/part")
    def part(request: Request) -> Response:
        form = lesson.ask(eye, Asked(request.query_params))
        return pages.render(request, f"explorer/{lesson.name}_part.html", form=form, **lesson.show(eye, form))


def answer(eye: Eye, lesson: Lesson, asked: Asked) -> tuple[Any, dict[str, Any], str]:
    """The form, the values of its result, and what is wrong with it, if anything: then the form is kept, or begun anew."""
    form = None
    try:
        form = lesson.ask(eye, asked)
        return form, lesson.show(eye, form), ""
    except InputError as error:
        return form or lesson.ask(eye, Asked()), {}, str(error)
