"""The contest in the browser: guests join, submit and vote; the host opens, closes, verifies and shows who is ahead.

    /contest   /contest/join  /contest/submit  /contest/vote  /contest/standings   guests, from any machine that reaches ours
    /contest/host                                                               the host: this machine alone

All pages are plain forms and work without scripts. A guest who knows the join code becomes a voter: a cookie with the voter's
secret id, sealed with the contest's own key. Each pair is shown with a token sealed over voter and pair (whose order the store
keeps under that random id), so that a vote that was not offered, or not to this voter, is refused before the contest is asked,
and a second one by the contest itself. A foreign page can neither read the cookie nor send it (SameSite, and the guard's check
of Origin). What is refused is one line on one page, with a status of its own: STATUS.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from threading import Lock
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Form
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from kobza.config import InputError, require
from kobza.contest.contest import Contest
from kobza.contest.nouns import (
    AlreadyVoted,
    Duplicate,
    Entry,
    NameTaken,
    NotYours,
    Refused,
    Standing,
    TooFast,
    TooMany,
    Voter,
    WrongCode,
    WrongState,
)
from kobza.contest.page import entry_rows, standing_rows, to_csv, to_html, vote_rows
from kobza.contest.seals import Sealed, Tries
from kobza.contest.store import reading
from kobza.web.guard import LOOPBACK, host_name, is_loopback
from kobza.web.page import Link, Pages, mount_static, refuse

COOKIE, HOURS = "kobza_voter", 24
MOST_FORM = 64 << 10  # bytes of a form without a file
AROUND_FILE = 16 << 10  # bytes of a form around its file
TRIES, JOINS = 10, 60  # join codes tried in a minute, by one address and by all
Verify = Callable[[Entry], object]


class NotJoined(Refused):
    """A guest without a voter's cookie."""


class NotHost(Refused):
    """The host's page, asked for from elsewhere."""


class TooLarge(Refused):
    """A body over its limit, or of unknown length."""


STATUS: dict[type[InputError], int] = {
    NotJoined: 401,
    WrongCode: 403,
    NotYours: 403,
    NotHost: 403,
    WrongState: 409,
    NameTaken: 409,
    AlreadyVoted: 409,
    Duplicate: 409,
    TooMany: 409,
    TooLarge: 413,
    TooFast: 429,
}


class Route(APIRoute):
    """A route whose refusals are answered in words, in whatever app it is; bodies are bounded before they are read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                if request.method == "POST" and not request.url.path.endswith("/submit"):
                    _bounded(request, MOST_FORM)
                return await answer(request)
            except Refused as refused:
                again = {"retry-after": f"{refused.seconds:.0f}"} if isinstance(refused, TooFast) else None
                return refuse(request, STATUS.get(type(refused), 400), str(refused), again)
            except InputError as error:
                return refuse(request, 400, str(error))

        return handler


def _bounded(request: Request, most: int) -> None:
    """Refuse a body that says it is larger than `most` bytes, or does not say how large it is."""
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) < 16 and int(length) <= most):
        said = f"the form has {length[:20]} bytes" if length else "the form does not say its length"
        raise TooLarge(f"{said}; at most {most:,} are taken")


def room(contest: Contest, pages: Pages, base_url: str, verify: Verify | None = None) -> APIRouter:
    """The routes under /contest. base_url: what guests open ("http://192.168.1.5:8000"). verify(entry) records its verdict."""
    return Doors(contest, pages, base_url.rstrip("/"), verify).router()


def make_app(contest: Contest, base_url: str, verify: Verify | None = None) -> FastAPI:
    """An app of the contest alone. Serve it behind Guard(host, open_paths=("/",), max_body=most_body(contest))."""
    app = FastAPI(title="kobza contest", docs_url=None, redoc_url=None, openapi_url=None)
    places = (("Contest", "", "home"), ("Submit", "/submit", "go"), ("Vote", "/vote", "contest"))
    links = [Link(title, f"/contest{path}", icon) for title, path, icon in places]
    app.state.nav = (*links, Link("Standings", "/contest/standings", "report"))
    app.state.brand = "kobza contest"
    app.include_router(room(contest, Pages("kobza.contest"), base_url, verify))
    app.add_api_route("/", lambda: RedirectResponse("/contest", 303), include_in_schema=False)
    mount_static(app, "kobza.contest")
    return app


def most_body(contest: Contest) -> int:
    """The largest body that the contest's pages take: a submission with its form."""
    return contest.rules.most_bytes + AROUND_FILE


class Doors:
    """The pages of one contest, a method each."""

    def __init__(self, contest: Contest, pages: Pages, base_url: str, verify: Verify | None):
        self.contest, self.pages, self.base_url, self.verify = contest, pages, base_url, verify
        self.sealed, self.shown = Sealed(contest.folder), contest.folder / "standings.shown"
        self.tries, self.joins, self._verifying = Tries(TRIES), Tries(JOINS), Lock()

    def router(self) -> APIRouter:
        """All of them."""
        router = APIRouter(prefix="/contest", route_class=Route, include_in_schema=False)
        for path, page in (("", self.start), ("/join", self.join_page), ("/submit", self.submit_page)):
            router.add_api_route(path, page, methods=["GET"], response_model=None)
        for path, page in (("/vote", self.vote_page), ("/standings", self.standings), ("/host", self.host)):
            router.add_api_route(path, page, methods=["GET"], response_model=None)
        router.add_api_route("/host/qr.svg", self.qr, methods=["GET"], response_model=None)
        router.add_api_route("/host/export/{name}", self.export, methods=["GET"], response_model=None)
        for path, action in (("/join", self.join), ("/submit", self.submit), ("/vote", self.vote), ("/host", self.act)):
            router.add_api_route(path, action, methods=["POST"], response_model=None)
        return router

    # ---- guests --------------------------------------------------------------------------------------------------

    def start(self, request: Request) -> Response:
        """What this is, and what can be done now."""
        voter = self.voter(request)
        return self.render(request, "contest.html", voter=voter, mine=self.entries_of(voter))

    def join_page(self, request: Request, code: str = "") -> Response:
        """The form that makes a guest a voter; the host's link has the code in it."""
        return self.render(request, "join.html", code=code[:20], voter=self.voter(request))

    def join(self, request: Request, code: Annotated[str, Form()], name: Annotated[str, Form()]) -> Response:
        """Code and name -> a voter's cookie."""
        self.joins.take("all")
        self.tries.take(address(request))
        self.contest.check_code(code)
        voter = self.contest.voter(name)
        response = RedirectResponse("/contest", 303)
        token = self.sealed.token("voter", voter.id)
        response.set_cookie(COOKIE, token, HOURS * 3600, path="/contest", httponly=True, samesite="strict")
        return response

    def submit_page(self, request: Request) -> Response:
        """The form that takes a packed submission."""
        voter = self.joined(request)
        return self.render(request, "submit.html", voter=voter, mine=self.entries_of(voter))

    async def submit(self, request: Request) -> Response:
        """A submission's file, on the disk as it comes -> an entry."""
        voter = await run_in_threadpool(self.joined, request)
        _bounded(request, most_body(self.contest))
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("file")
            none = "no file came with the form; choose the one that `kobza contest pack` wrote"
            require(isinstance(file, UploadFile) and bool(file.size), none)
            assert isinstance(file, UploadFile)
            await run_in_threadpool(self.receive, file, voter)
        task = BackgroundTask(self.verify_pending) if self.verify else None
        return RedirectResponse("/contest/submit", 303, background=task)

    def receive(self, upload: UploadFile, voter: Voter) -> None:
        """Take in an uploaded file; it stays nowhere but as an entry."""
        most = self.contest.rules.most_bytes
        large = f"the file has {upload.size or 0:,} bytes; the rules allow {most:,}"
        if (upload.size or 0) > most:
            raise TooLarge(large)
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=self.contest.folder) as folder:
            path = Path(folder) / "submission.kobza"
            with path.open("wb") as stream:
                while piece := upload.file.read(1 << 20):
                    stream.write(piece)
            self.contest.receive(path, voter)

    def vote_page(self, request: Request) -> Response:
        """The next pair, authors hidden, in the order drawn for this voter."""
        voter = self.joined(request)
        pair = self.contest.pair_for(voter) if self.contest.state == "voting" else None
        token = self.sealed.token("pair", pair.id, voter.id) if pair else ""
        cast = sum(vote.voter == voter.name for vote in self.contest.votes())
        return self.render(request, "vote.html", voter=voter, pair=pair, token=token, cast=cast)

    def vote(self, request: Request, token: Annotated[str, Form()], choice: Annotated[str, Form()]) -> Response:
        """One vote; it is on the disk when the answer goes out."""
        voter = self.joined(request)
        pair = self.sealed.read(token, "pair", voter.id)
        if pair is None:
            raise NotYours("this vote was not offered to you here; open the page again and vote on what it shows")
        self.contest.vote(voter, pair, choice)  # type: ignore[arg-type]  # the contest checks it
        return RedirectResponse("/contest/vote", 303)

    def standings(self, request: Request) -> Response:
        """Who is ahead; for guests once the contest is closed, or when the host shows it."""
        host, state = is_host(request), self.contest.state
        open_now = host or state == "closed" or self.shown.exists()
        rows = self.contest.standings() if open_now else []
        return self.render(
            request, "standings.html", rows=rows, spans=spans(rows), open_now=open_now, **self.drawn(open_now)
        )

    # ---- the host ------------------------------------------------------------------------------------------------

    def host(self, request: Request) -> Response:
        """The host's one page."""
        check_host(request)
        code, rows = self.contest.join_code(), self.contest.standings()
        values = {
            "code": code,
            "link": self.link(code),
            "minutes": self.minutes_left(),
            "entries": self.contest.entries(),
            "votes": self.contest.votes(),
        }
        values |= {
            "rows": rows,
            "spans": spans(rows),
            "shown": self.shown.exists(),
            "can_verify": self.verify is not None,
        }
        return self.render(request, "host.html", log=self.contest.log()[-12:][::-1], **values, **self.drawn(True))

    def act(
        self, request: Request, action: Annotated[str, Form()], minutes: Annotated[float, Form()] = 120
    ) -> Response:
        """What the host's buttons do."""
        check_host(request)
        known = ("renew", "collecting", "voting", "closed", "show", "hide", "verify")
        require(action in known, f"action {action[:40]!r}; one of {', '.join(known)}")
        if action == "renew":
            self.contest.renew_code(minutes)
        elif action == "show":
            self.shown.touch()
        elif action == "hide":
            self.shown.unlink(missing_ok=True)
        elif action == "verify":
            self.verify_pending()
        else:
            self.contest.state = action  # type: ignore[assignment]  # the contest checks it
        return RedirectResponse("/contest/host", 303)

    def qr(self, request: Request) -> Response:
        """The guests' link to be photographed from a wall."""
        import segno

        check_host(request)
        code = segno.make(self.link(self.contest.join_code()), error="m", micro=False)
        picture = code.svg_inline(scale=8, border=3, light="white", dark="black")
        return Response(
            picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1), media_type="image/svg+xml"
        )

    def export(self, request: Request, name: str) -> Response:
        """One of the export's files, as `kobza contest export` writes them."""
        check_host(request)
        contest = self.contest
        made: dict[str, Callable[[], str]] = {
            "contest.html": lambda: to_html(contest, contest.standings()),
            "entries.csv": lambda: to_csv(entry_rows(contest)),
            "votes.csv": lambda: to_csv(vote_rows(contest)),
            "standings.csv": lambda: to_csv(standing_rows(contest.standings())),
        }
        require(name in made, f"no export {name[:40]!r}; one of {', '.join(made)}")
        kind = "text/html" if name.endswith("html") else "text/csv"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(
            made[name]().encode("utf-8", errors="replace"), media_type=f"{kind}; charset=utf-8", headers=headers
        )

    def verify_pending(self) -> None:
        """Verify all that came in, one after the other; a second call waits for the first and finds nothing."""
        require(self.verify is not None, "this page cannot verify; run: kobza contest verify")
        assert self.verify is not None
        with self._verifying:
            for entry in self.contest.entries("pending"):
                self.verify(entry)

    # ---- what they share -----------------------------------------------------------------------------------------

    def render(self, request: Request, name: str, **values: Any) -> Response:
        """A page with what all of them know."""
        known = {"rules": self.contest.rules, "state": self.contest.state, "is_host": is_host(request)}
        return self.pages.render(request, name, **known, **values)

    def voter(self, request: Request) -> Voter | None:
        """Whose cookie this is."""
        id = self.sealed.read(request.cookies.get(COOKIE, ""), "voter")
        return self.contest.known_voter(id) if id else None

    def joined(self, request: Request) -> Voter:
        """Whose cookie this is, or a refusal."""
        voter = self.voter(request)
        if voter is None:
            raise NotJoined("you have not joined; open the link that the host shows, or /contest/join")
        return voter

    def entries_of(self, voter: Voter | None) -> list[Entry]:
        """What a voter has submitted here."""
        return [entry for entry in self.contest.entries() if voter and entry.voter == voter.id]

    def drawn(self, wanted: bool) -> dict[str, Any]:
        """The bracket with titles, where the rules have one."""
        knockout = wanted and self.contest.rules.format == "knockout"
        titles = {entry.id: entry.title for entry in self.contest.entries()} if knockout else {}
        return {"bracket": self.contest.bracket() if knockout else None, "titles": titles}

    def minutes_left(self) -> float:
        """How long the join code still holds."""
        with reading(self.contest.folder / "contest.db") as db:
            row = db.execute("SELECT value FROM facts WHERE key = 'code_until'").fetchone()
        return max(0.0, float(row[0]) - time.time()) / 60 if row else 0.0

    def link(self, code: str | None) -> str:
        """What guests open."""
        return f"{self.base_url}/contest/join" + (f"?code={quote(code)}" if code else "")


def spans(rows: list[Standing]) -> list[tuple[float, float, float]]:
    """Each row's interval and estimate on a common scale: (left, width, point) in percent."""
    low, high = min((r.strength.low for r in rows), default=0), max((r.strength.high for r in rows), default=1)
    scale = 100 / max(high - low, 1e-9)
    return [
        ((s.low - low) * scale, (s.high - s.low) * scale, (s.value - low) * scale)
        for s in (row.strength for row in rows)
    ]


def address(request: Request) -> str:
    """Who asks."""
    return request.client.host if request.client else "?"


def is_host(request: Request) -> bool:
    """Whether this machine asks, by a name of its own: another site's page that calls itself our address is not the host."""
    return is_loopback(address(request)) and host_name(request.headers.get("host", "")) in LOOPBACK


def check_host(request: Request) -> None:
    if not is_host(request):
        raise NotHost(
            "the host's page opens on the host's own machine alone: http://127.0.0.1, with the port of this one"
        )
