"""kobza studio: the rooms of the web page, and what each of them is shown."""

from __future__ import annotations

import json
import logging
import socket
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from kobza.config import require
from kobza.contest.contest import Contest
from kobza.contest.web import make_app as contest_app
from kobza.contest.web import most_body
from kobza.contest.web import room as contest_room
from kobza.describe.equations import equations
from kobza.describe.parts import parts, total_parameters
from kobza.hub.encodings import ENCODINGS
from kobza.recipes.contest import HOME, judge_one
from kobza.recipes.shelf import Shelf
from kobza.recipes.tokens import tokenizer_for
from kobza.report.coach import Remark, remarks
from kobza.report.console import facts_of, landmarks_of
from kobza.run import open_run
from kobza.studio import playground, reports
from kobza.studio import runs as runs_room
from kobza.studio.app import Room, make_app
from kobza.studio.explorer import room as explorer
from kobza.studio.explorer.sources import Sources
from kobza.tokens.compare import Split
from kobza.trace.record import record
from kobza.web.guard import Guard, Guarded, is_loopback
from kobza.web.page import Pages
from kobza.web.run import run, serving

LOG = "%(asctime)s %(name)s %(message)s"
LANDMARKS = ("uniform", "unigram", "bigram")
UPLOAD = 64 << 20  # bytes of a body: a text to train on


class Coach:
    """What kobza report says of a run, for its page."""

    def landmarks(self, folder: Path) -> dict[str, float]:
        """Losses that mean something for the run's text, in nats a token."""
        found = landmarks_of(open_run(folder))
        return {name: getattr(found, name) for name in LANDMARKS}

    def remarks(self, folder: Path, records: list[dict[str, Any]]) -> Sequence[Remark]:
        """What there is to say as of the last record."""
        run = open_run(folder)
        return remarks(records, landmarks_of(run), facts_of(run, total_parameters(run.config.model)))


def main(
    runs: Path, host: str, port: int, keys: list[str], contest: str, guests: str, browser: bool, as_json: bool
) -> int:
    """Serve the page until a signal -> exit code."""
    require(bool(contest) or not guests, f"--guests {guests} has no effect without --contest NAME")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=LOG)
    guard, others, link = Guard(host, tuple(keys), max_body=UPLOAD), ExitStack(), f"http://{host}:{port}"
    with others:
        if guests:
            link = others.enter_context(open_to_guests(contest, guests))
        app = make_studio(runs, is_loopback(host), contest, link)
        app.add_middleware(Guarded, guard=guard)

        def ready(url: str) -> None:
            said = {"address": url} | ({"guests": link} if guests else {})
            lines = [f"{'studio' if name == 'address' else name:9} {place}" for name, place in said.items()]
            print(json.dumps(said) if as_json else "\n".join([*lines, "Ctrl-C ends"]), flush=True)
            if browser and is_loopback(host):
                webbrowser.open(url)

        return run(app, host, port, guard=guard, grace=1.0, on_ready=ready)


@contextmanager
def open_to_guests(name: str, place: str) -> Iterator[str]:
    """The contest's pages for others, at ADDRESS:PORT and beside the studio -> what they open."""
    host, _, port = place.rpartition(":")
    require(bool(host) and port.isdigit(), f"--guests {place!r}: give an address and a port, as in 0.0.0.0:7861")
    require(int(port) > 0, f"--guests {place}: the link that guests get needs a port of its own, as in {host}:7861")
    contest = Contest.open(HOME, name)
    link = f"http://{lan_address() if host in ('0.0.0.0', '::') else host}:{port}"
    guard = Guard(host, open_paths=("/",), max_body=most_body(contest))
    app = contest_app(contest, link, partial(judge_one, contest))
    app.add_middleware(Guarded, guard=guard)
    with serving(app, guard, host=host, port=int(port)):
        yield link


def lan_address() -> str:
    """This machine's address in its network, where it has one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for examples, RFC 5737: only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def make_studio(runs: Path, may_start: bool = True, contest: str = "", link: str = "") -> FastAPI:
    """The studio's app over the runs in a folder, the reports beside it, and a contest whose guests come by a link. may_start:
    whether the page may start processes."""
    work = runs.resolve().parent
    sources = Sources(
        models=Shelf(runs, "fp32"),  # the explorer looks into the plain model, whose parts are those of the book
        trace=record,
        split=Split,
        parts=parts,
        equations=equations,
        tokenizers={name: partial(tokenizer_for, name, "", 0) for name in ENCODINGS},
    )
    rooms = [
        playground.room(Shelf(runs)),
        explorer.room(sources),
        runs_room.room(runs, Coach(), total_parameters, may_start, report=reports.link),
        reports.room(work, runs, may_start),
    ]
    if contest:
        held = Contest.open(HOME, contest)
        doors = contest_room(held, Pages("kobza.contest"), link, partial(judge_one, held))
        rooms.append(
            Room(
                "Contest", "/contest", doors, "contest", "Who trains the best small model here? Blind votes, a bracket."
            )
        )
    return make_app(rooms, static=["kobza.contest"])
