"""The playground: write with a model, see why each token was chosen, choose another.

Three addresses. /playground is the page; it keeps the texts (ids, not strings, so that what was written keeps its tokens). /bars
shows what may come next at a place, knob by knob, as a fragment. /write writes on from a place, a line of JSON a token.
"""

from __future__ import annotations

from threading import BoundedSemaphore
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kobza.config import require
from kobza.studio.app import Models, Room
from kobza.studio.playground_ask import PLAIN, Ask, fields, read
from kobza.studio.playground_stages import LEVELS, Kept, drawn, line, rows, stages
from kobza.studio.playground_write import Lines, write
from kobza.web.page import Pages, percent

TAIL = 60  # characters of the text before the next token that are shown
Fields = Annotated[dict[str, str], Depends(fields)]


def room(models: Models, at_once: int = 4) -> Room:
    """The playground over some models; so many texts are written at once."""
    pages, router, kept, free = (
        Pages("kobza.studio"),
        APIRouter(prefix="/playground"),
        Kept(),
        BoundedSemaphore(at_once),
    )

    @router.get("")
    def page(request: Request, model: str = "") -> Response:
        values = {"names": models.names(), "plain": PLAIN, "legend": legend(), "chosen": model}
        return pages.render(request, "playground.html", **values)

    @router.post("/bars")
    def bars(request: Request, found: Fields) -> Response:
        ask = opened(models, found)
        return pages.render(request, "playground_bars.html", **seen(ask, kept))

    @router.post("/write")
    async def text(found: Fields) -> Response:
        ask = await to_thread.run_sync(opened, models, found)
        if not free.acquire(blocking=False):
            busy = f"{at_once} texts are being written already; stop one, or try again in a moment"
            raise HTTPException(429, busy, {"Retry-After": "2"})
        return Lines(write(ask, kept), free.release)

    summary = "Write with a model: see why each token was chosen, and choose another."
    return Room("Playground", "/playground", router, "play", summary)


def opened(models: Models, found: dict[str, str]) -> Ask:
    """The fields of a request, and the model they name, in memory. `at` is where the page looks, if not at the first model."""
    name = found.get("at") or found.get("model", "")
    require(bool(name), "no model is named; choose one")
    return read(found, name, models.open(name))


def seen(ask: Ask, kept: Kept) -> dict[str, object]:
    """What the bars show: the stages, the likeliest tokens at each, and where the seed's draw falls."""
    tokenizer = ask.playable.loaded.tokenizer
    shown = stages(kept.logits(ask.name, ask.playable, ask.ids), ask.ids, ask.config)
    last = shown[-1]
    greedy = ask.config.temperature == 0
    uniform, hit = (None, int(last.p.argmax())) if greedy else drawn(last.scores, ask.config, ask.draw)
    return {
        "ask": ask,
        "tail": tokenizer.decode(ask.ids[-TAIL:]).replace("\n", "⏎")[-TAIL:],
        "stages": shown,
        "rows": rows(shown, tokenizer, [ask.chosen, hit]),
        "uniform": uniform,
        "hit": hit,
        "hit_name": tokenizer.show(hit),
        "line": line(last.p, tokenizer, hit),
        "context": ask.playable.loaded.run.model.max_seq_len,
    }


def legend() -> list[str]:
    """The words to the six colours, from a surprise to nearly sure."""
    whole = [percent(bound).replace(".0", "") for bound in LEVELS]
    return [
        f"< {whole[0]}",
        *(f"{a.removesuffix(' %')}–{b}" for a, b in zip(whole, whole[1:], strict=False)),
        f"≥ {whole[-1]}",
    ]
