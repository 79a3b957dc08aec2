"""The room of reports: pages that kobza wrote into the working folder, shown where they do no harm; examinations to start.

Which files are shown is a list made here, of known names in known places; an address names an entry of that list, never a path.
A page is shown in a frame without scripts, forms or network, under a policy of its own: whoever sent you an export may have put
anything into its certificate. What certificate.json says is told beside the frame, from the file itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Form
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from kobza.config import InputError, require
from kobza.studio import jobs
from kobza.studio.app import Room
from kobza.studio.reports_certificate import read_certificates, verdict
from kobza.studio.runs import with_forms
from kobza.studio.runs_files import open_regular, read_some, written
from kobza.studio.runs_folder import run_folders
from kobza.studio.runs_words import WORDS
from kobza.web.page import Pages

PLACES = (  # kind, pattern under the working folder
    ("Certificates", "exports/*/certificate.html"),
    ("Certificates", "exports/*/*certificate.json"),
    ("Examinations", "reports/*/page.html"),
    ("Examinations", "doctor*.html"),
    ("Runs", "runs/*/report.html"),
    ("Tunings", "runs/*/xray.html"),
    ("Lab", "runs/lab/*/report.html"),
    ("Quantised", "exports/*/damage.html"),
    ("Quantised", "*/damage.html"),
    ("Traces", "trace*.html"),
)
KINDS = tuple(dict.fromkeys(kind for kind, _ in PLACES))
MOST_OF_A_KIND = 100
MOST_PAGE = 32 << 20
MOST_AT_ONCE = 2
FRAME = {  # of a page in its frame, in place of the headers of our own pages
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'",
    "x-frame-options": "SAMEORIGIN",
}
LOG = "log.txt"


@dataclass(frozen=True)
class Report:
    """A page, or a certificate without one. `folder` is what its name is taken from."""

    kind: str
    path: Path
    title: str

    @property
    def key(self) -> str:
        """What stands for it in an address."""
        return hashlib.sha256(str(self.path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @property
    def href(self) -> str:
        """Its address."""
        return f"/reports/at/{self.key}"

    @property
    def is_page(self) -> bool:
        """Whether it can be shown in a frame."""
        return self.path.suffix == ".html"


def find_reports(work: Path) -> list[Report]:
    """The reports in a working folder, by kind, the newest first. Links that lead out of it are left out."""
    home, found = work.resolve(), {}
    for kind, pattern in PLACES:
        paths = sorted(work.glob(pattern), key=written, reverse=True)[:MOST_OF_A_KIND]
        for path in paths:
            shown = path.parent if path.parent != work and path.name != f"{path.parent.name}.html" else path
            beside = path.suffix == ".json" and (path.with_name("certificate.html").is_file())
            fits = (
                path.is_file()
                and path.resolve().is_relative_to(home)
                and all(c < "\ud800" or c > "\udfff" for c in path.name)
            )
            if fits and not beside:
                found.setdefault(path, Report(kind, path, shown.name))
    return sorted(found.values(), key=lambda report: (KINDS.index(report.kind), -written(report.path)))


def find_report(work: Path, key: str) -> Report:
    """The report of an address."""
    found = next((report for report in find_reports(work) if report.key == key), None)
    require(found is not None, "this report is not there any more; the list has those that are")
    return found  # type: ignore[return-value]


def link(folder: Path) -> str | None:
    """The address of a run's report, for the room of runs; None where it has none yet."""
    path = folder / "report.html"
    return Report("Runs", path, folder.name).href if path.is_file() else None


# ---- examinations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examination:
    """Something that kobza can examine. `words` makes its arguments from the thing's folder and the page to write."""

    title: str
    of: str  # "run" or "export"
    words: Callable[[Path, Path], list[str]]


EXAMINATIONS = {
    "doctor-run": Examination(
        "Doctor: the curves of a run", "run", lambda it, page: ["doctor", "run", str(it), "--html", str(page)]
    ),
    "doctor-model": Examination(
        "Doctor: the laws its model keeps", "run", lambda it, page: ["doctor", "model", str(it), "--html", str(page)]
    ),
    "certificate": Examination(
        "Certificate: are the files still those?", "export", lambda it, page: ["certificate", str(it)]
    ),
}


def things(work: Path, runs_root: Path, of: str) -> list[Path]:
    """What an examination can be of: runs with a checkpoint, or exported folders."""
    if of == "run":
        return [folder for folder in run_folders(runs_root) if (folder / "checkpoints").is_dir()]
    return sorted({path.parent for path in work.glob("exports/*/*certificate.json")}, key=lambda path: path.name)


def examine(work: Path, runs_root: Path, which: str, name: str) -> Path:
    """Start an examination -> the folder of its log."""
    require(which in EXAMINATIONS, f"unknown examination {which[:40]!r}; there are {', '.join(EXAMINATIONS)}")
    examination = EXAMINATIONS[which]
    found = next((thing for thing in things(work, runs_root, examination.of) if thing.name == name), None)
    require(found is not None, f"no {examination.of} {name[:80]!r} here; the list has those that are there")
    assert found is not None
    live = [folder for folder in examined(work) if (job := jobs.read_job(folder)) and jobs.is_alive(job)]
    require(
        len(live) < MOST_AT_ONCE, f"{len(live)} examinations are under way and {MOST_AT_ONCE} is the most; wait for one"
    )
    folder = work / "reports" / f"{which}-{found.name}"
    require(folder not in live, f"{folder.name} is under way; wait for it to end")
    (folder / LOG).unlink(missing_ok=True)
    jobs.start(examination.words(found.absolute(), (folder / "page.html").absolute()), folder, LOG)
    return folder


def examined(work: Path) -> list[Path]:
    """The folders of examinations that were started here, the newest first."""
    found = [
        path.parent
        for path in work.glob(f"reports/*/{jobs.FILE}")
        if any(path.parent.name.startswith(e) for e in EXAMINATIONS)
    ]
    return sorted(found, key=lambda folder: written(folder / jobs.FILE), reverse=True)[:20]


def outcome(folder: Path) -> dict[str, Any]:
    """How an examination stands, for a page."""
    job = jobs.read_job(folder)
    live = bool(job and jobs.is_alive(job))
    code = job.exit_code if job else None
    words = {0: "done: nothing proven wrong", 1: "done: something is wrong", 2: "it could not be examined"}
    state = "running" if live else words.get(code if code is not None else -1, "ended")
    log = read_some(folder / LOG, 1 << 16).decode("utf-8", "replace")
    page = Report("Examinations", folder / "page.html", folder.name)
    href = page.href if not live and page.path.is_file() else ""
    return {
        "name": folder.name,
        "live": live,
        "state": state,
        "code": code,
        "log": log,
        "href": href,
        "said": job.said if job else "",
    }


# ---- the room --------------------------------------------------------------------------------------------------------


def room(work: Path, runs_root: Path | None = None, may_start: bool = True) -> Room:
    """Reports under a working folder. may_start: whether examinations may be started from the page."""
    router, pages = APIRouter(prefix="/reports"), Pages("kobza.studio")
    runs_root = runs_root or work / "runs"

    @router.get("")
    def everything(request: Request) -> Response:
        reports = find_reports(work)
        by_kind = [(kind, [report for report in reports if report.kind == kind]) for kind in KINDS]
        offers = [
            (key, exam, [thing.name for thing in things(work, runs_root, exam.of)])
            for key, exam in EXAMINATIONS.items()
        ]
        values = {
            "by_kind": [pair for pair in by_kind if pair[1]],
            "offers": offers if may_start else [],
            "work": str(work),
        }
        values["verdicts"] = {
            report.key: verdict(report.path.parent) for report in reports if report.kind == "Certificates"
        }
        done = [outcome(folder) for folder in examined(work)]
        return with_forms(pages.render(request, "reports.html", **values, done=done, written=written, **WORDS))

    @router.get("/examinations")
    def examinations(request: Request) -> Response:
        return pages.render(request, "reports_done.html", done=[outcome(folder) for folder in examined(work)])

    @router.get("/at/{key}")
    def one(request: Request, key: str) -> Response:
        report = find_report(work, key)
        certificates = read_certificates(report.path.parent) if report.kind == "Certificates" else []
        at = str(report.path.relative_to(work))
        return pages.render(request, "reports_one.html", report=report, certificates=certificates, at=at, **WORDS)

    @router.get("/page/{key}")
    def page(key: str) -> Response:
        report = find_report(work, key)
        require(report.is_page, f"{report.title} has no page")
        try:
            with open_regular(report.path) as file:
                content = file.read(MOST_PAGE + 1)
        except OSError as error:
            raise InputError(f"{report.path}: cannot be read: {error.strerror}") from None
        require(
            len(content) <= MOST_PAGE, f"{report.path}: more than {MOST_PAGE >> 20} MB; open it in a browser of its own"
        )
        return Response(content, media_type="text/html; charset=utf-8", headers=FRAME)

    if may_start:

        @router.post("/examine")
        def start(which: Annotated[str, Form()] = "", name: Annotated[str, Form()] = "") -> Response:
            folder = examine(work, runs_root, which, name)
            return RedirectResponse(f"/reports#{quote(folder.name)}", 303)

    said = "Certificates, what the doctor found, the pages of runs and labs."
    return Room("Reports", "/reports", router, "report", said)
