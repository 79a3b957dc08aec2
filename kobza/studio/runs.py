"""The room of runs: which there are, their curves as they grow, what they write, what the coach says; start, stop, go on.

All it knows it reads from the runs' folders (runs_folder, runs_curves), so it may come and go at any time, and shows runs that a
terminal began. What belongs to other rooms comes by argument: the coach and the landmarks from report, the count of weights
from describe. Whatever changes something is a POST, and may be switched off: on a network a studio only shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Form, Query
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from kobza.checkpoint import list_checkpoints
from kobza.config import InputError, ModelConfig, require
from kobza.studio import jobs
from kobza.studio.app import Room
from kobza.studio.resources import Resources, size
from kobza.studio.runs_book import Book, Coach
from kobza.studio.runs_files import written
from kobza.studio.runs_folder import (
    find_run,
    nearest_preset,
    read_config,
    read_log,
    read_samples,
    run_folders,
    summarise,
)
from kobza.studio.runs_start import FIRST, claim, presets, read_start, read_text, settings
from kobza.studio.runs_words import WORDS
from kobza.web.page import Pages

Names = Annotated[Sequence[str], Query()]

MOST_CHARTED = 8  # runs at once: as many as there are colours
MOST_CHIPS = 12
MOST_LIVE = 8  # runs at once that the page will start
SAMPLE_LETTERS = 4000


def room(
    runs_root: Path,
    coach: Coach | None = None,
    count: Callable[[ModelConfig], int] | None = None,
    may_start: bool = True,
    most_text: int = 16 << 20,
    report: Callable[[Path], str | None] = lambda folder: None,
) -> Room:
    """Runs under a folder. count: weights of a model; may_start: whether the page may start and stop; report: the address of a
    run's report page, where there is one."""
    router = APIRouter(prefix="/runs")
    pages, book, resources = Pages("kobza.studio"), Book(runs_root, coach), Resources()
    add_list(router, pages, book, resources, count, may_start)
    add_run(router, pages, book, resources, count, may_start, report)
    if may_start:
        add_start(router, pages, book, count, most_text)
        add_actions(router, book)
    said = "Watch models learn: curves, samples, the coach's remarks. Start, stop and go on."
    return Room("Runs", "/runs", router, "runs", said)


def address(folder: Path) -> str:
    """Where a run's page is."""
    return "/runs/at/" + quote(folder.name, safe="")


# ---- all of them -----------------------------------------------------------------------------------------------------


def add_list(router: APIRouter, pages: Pages, book: Book, resources: Resources, count: Any, may_start: bool) -> None:
    """The list, and the data of the curves."""

    def rows() -> list[Any]:
        return [summarise(folder, count) for folder in run_folders(book.root)]

    @router.get("")
    def everything(request: Request, show: Names = ()) -> Response:
        found = rows()
        shown = [name for name in show[:MOST_CHARTED] if any(run.name == name for run in found)]
        shown = shown or [run.name for run in found if run.live][:MOST_CHARTED] or [run.name for run in found[:3]]
        values = {"runs": found, "shown": shown, "may_start": may_start, "root": str(book.root)}
        return pages.render(request, "runs.html", uses=resources.machine(book.root), **values, **WORDS)

    @router.get("/table")
    def table(request: Request) -> Response:
        uses = resources.machine(book.root)
        return pages.render(request, "runs_table.html", runs=rows(), uses=uses, root=str(book.root), **WORDS)

    @router.get("/data")
    def data(run: Names = ()) -> Response:
        """run=3.120.demo: what came since record 120 of generation 3 of the curves of demo."""
        require(len(run) <= MOST_CHARTED, f"{len(run)} runs were asked for and {MOST_CHARTED} are the most at once")
        said = []
        for word in run:
            generation, _, rest = word.partition(".")
            cursor, _, name = rest.partition(".")
            numbers = all(n.isascii() and n.isdecimal() and len(n) < 16 for n in (generation, cursor))
            require(numbers, f"run {word[:80]!r} is not GENERATION.CURSOR.NAME; begin with 0.0.NAME")
            try:
                folder = find_run(book.root, name)
            except InputError:
                continue  # it was taken away meanwhile
            now = summarise(folder, count)
            word = {"name": name, "state": now.state, "sampled": written(folder / "samples.jsonl"), "steps": now.steps}
            said.append(word | book.curves(folder).since(int(generation), int(cursor)))
        folders = run_folders(book.root)[:MOST_CHIPS]
        names = [{"name": folder.name, "state": summarise(folder, count).state} for folder in folders]
        return JSONResponse({"runs": said, "names": names})


# ---- one of them -----------------------------------------------------------------------------------------------------


def add_run(
    router: APIRouter,
    pages: Pages,
    book: Book,
    resources: Resources,
    count: Any,
    may_start: bool,
    report: Callable[[Path], str | None],
) -> None:
    """A run's page and its parts, which the page asks for again."""

    def values(folder: Path) -> dict[str, Any]:
        job, pid = jobs.read_job(folder), jobs.worker(folder)
        return {
            "run": summarise(folder, count),
            "at": address(folder),
            "uses": resources.process(pid) if pid else [],
            "pid": pid,
            "job": job,
            "asked": bool(job and job.asked and jobs.is_alive(job)),
            "may_start": may_start,
            "report": report(folder),
        }

    def samples(folder: Path) -> list[dict[str, Any]]:
        return [{"step": s["step"], "text": s["text"][:SAMPLE_LETTERS]} for s in read_samples(folder, 8)]

    @router.get("/at/{name}")
    def one(request: Request, name: str) -> Response:
        folder = find_run(book.root, name)
        said = {"samples": samples(folder), "log": read_log(folder), "remarks": None, "coached": book.coach is not None}
        return with_forms(pages.render(request, "runs_one.html", **values(folder), **facts_of(folder), **said, **WORDS))

    @router.get("/at/{name}/part/{which}")
    def fragment(request: Request, name: str, which: str) -> Response:
        folder = find_run(book.root, name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "now": lambda: values(folder),
            "actions": lambda: values(folder),
            "samples": lambda: {"samples": samples(folder)},
            "coach": lambda: {"remarks": book.remarks(folder), "coached": book.coach is not None},
            "facts": lambda: {"run": summarise(folder, count)} | facts_of(folder),
            "log": lambda: {"log": read_log(folder), "run": summarise(folder, count)},
        }
        require(which in parts, f"no part {which[:40]!r} of a run; there are {', '.join(parts)}")
        return pages.render(request, f"runs_{which}.html", **parts[which](), **WORDS)

    @router.get("/at/{name}/landmarks")
    def landmarks(name: str) -> Response:
        return JSONResponse(book.landmarks(find_run(book.root, name)))


def with_forms(page: Response) -> Response:
    """A page whose forms the guard lets in: without this header a browser says of them that they come from nowhere."""
    page.headers["referrer-policy"] = "same-origin"
    return page


def facts_of(folder: Path) -> dict[str, Any]:
    """What lies fixed in a run's folder: how its settings differ from a preset's, its checkpoints."""
    config = read_config(folder)
    chosen, differs = nearest_preset(config) if config else ("", {})
    return {"preset": chosen, "differs": differs, "checkpoints": checkpoints(folder), "folder": str(folder)}


def checkpoints(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, the newest first, with their size."""
    found = []
    for step in reversed(list_checkpoints(folder)):
        place = folder / "checkpoints" / f"{step:08d}"
        total = sum(path.stat().st_size for path in place.glob("*") if path.is_file())
        found.append({"step": step, "size": size(total), "changed": written(place)})
    return found


# ---- start, stop, go on ----------------------------------------------------------------------------------------------


def add_start(router: APIRouter, pages: Pages, book: Book, count: Any, most_text: int) -> None:
    """The form of a new run."""

    def form(request: Request, chosen: Mapping[str, str], line: str = "") -> Response:
        name = chosen.get("preset", "demo")
        known = [preset for preset, _ in presets()]
        name = name if name in known else known[0]
        values = {"presets": presets(), "preset": name, "chosen": chosen, "line": line, "most": size(most_text)}
        shown = shown_settings(name)
        return with_forms(pages.render(request, "runs_new.html", 422 if line else 200, **values, **shown, **WORDS))

    def shown_settings(name: str) -> dict[str, Any]:
        found, words = settings(name), [dict(presets())[name], facts(name, count)]
        return {"first": found[: len(FIRST)], "rest": found[len(FIRST) :], "about": " ".join(words)}

    @router.get("/new")
    def new(request: Request, preset: str = "demo") -> Response:
        return form(request, {"preset": preset})

    @router.get("/new/settings")
    def preset_fields(request: Request, preset: str = "demo") -> Response:
        require(preset in dict(presets()), f"unknown preset {preset[:40]!r}; the list has those that are there")
        return pages.render(request, "runs_settings.html", preset=preset, chosen={}, **shown_settings(preset), **WORDS)

    @router.post("/new")
    async def start(request: Request) -> Response:
        async with request.form(max_files=1, max_fields=400, max_part_size=most_text) as sent:
            chosen = {key: value for key, value in sent.items() if isinstance(value, str)}
            file = sent.get("upload")
            require(not isinstance(file, UploadFile) or (file.size or 0) <= most_text, too_long(file, most_text))
            upload = await file.read(most_text + 1) if isinstance(file, UploadFile) else None
        try:
            out = await run_in_threadpool(begin, book.root, chosen, upload, most_text)
        except InputError as error:
            return await run_in_threadpool(
                form, request, {k: v for k, v in chosen.items() if k != "paste"} | kept(chosen), str(error)
            )
        return RedirectResponse(address(out), 303)


def facts(name: str, count: Callable[[ModelConfig], int] | None) -> str:
    """A preset in numbers: "4 layers of 160, context 128; 600 steps of 1,536 tokens; 1,021,440 weights beside ..."."""
    config = read_start({"preset": name}).config
    model, train = config.model, config.train
    body = count(replace(model, vocab_size=1)) - count_rows(model) if count else 0
    weights = f"; {body:,} weights beside the vocabulary's" if body > 0 else ""
    layers = f"{model.n_layer} layer{'s' * (model.n_layer > 1)} of {model.n_embd}, context {model.max_seq_len:,}"
    return f"{layers}; {train.steps:,} steps of {config.batch_tokens:,} tokens{weights}."


def count_rows(model: ModelConfig) -> int:
    """Weights of one token in the tables."""
    return (1 if model.tied else 2) * model.n_embd


def kept(chosen: Mapping[str, str]) -> dict[str, str]:
    """What was pasted goes back into the form, unless it is a book."""
    return {"paste": chosen.get("paste", "")[: 1 << 20]}


def too_long(file: Any, most: int) -> str:
    """Why a file is not taken."""
    return f"the text has {getattr(file, 'size', 0) or 0:,} bytes and {most:,} is the most here; give its path instead"


def begin(root: Path, chosen: Mapping[str, str], upload: bytes | None, most_text: int) -> Path:
    """A form that was sent -> the folder of the run that has begun."""
    start = read_start(chosen)
    live = [run.name for run in map(summarise, run_folders(root)) if run.live]
    require(len(live) < MOST_LIVE, f"{len(live)} runs are under way and {MOST_LIVE} is the most; stop one first")
    out = claim(root, chosen.get("name", "").strip(), start.preset)
    try:
        text = read_text(chosen, upload, out, most_text)
    except InputError:
        (out / "train.log").unlink(missing_ok=True)
        if not any(out.iterdir()):
            out.rmdir()
        raise
    jobs.start(start.argv(text, out), out, "train.log")
    settle(out)
    return out


def settle(out: Path, seconds: float = 0.3) -> None:
    """A moment for a start that fails at once, so that the next page shows it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and (job := jobs.read_job(out)) and jobs.is_alive(job):
        time.sleep(0.05)


def add_actions(router: APIRouter, book: Book) -> None:
    """Stop, end at once, go on."""

    @router.post("/at/{name}/stop")
    def stop(name: str) -> Response:
        folder = find_run(book.root, name)
        jobs.stop(folder)
        return RedirectResponse(address(folder), 303)

    @router.post("/at/{name}/kill")
    def kill(name: str) -> Response:
        folder = find_run(book.root, name)
        jobs.kill(folder)
        settle(folder, 2.0)
        return RedirectResponse(address(folder), 303)

    @router.post("/at/{name}/resume")
    def resume(name: str, steps: Annotated[str, Form()] = "") -> Response:
        folder = find_run(book.root, name)
        stands = summarise(folder)
        more = steps.strip()
        require(
            not more or more.isdecimal() and len(more) < 16, f"train.steps is {more[:40]!r}; it must be a whole number"
        )
        goal = int(more or stands.steps or 0)
        reached = f"{folder.name} stands at step {stands.step}; give more steps than that to train longer"
        require(stands.step is None or goal > stands.step, reached)
        live = jobs.worker(folder) is not None
        require(not live, f"{folder.name}: it runs; stop it before you go on with it")
        require(read_config(folder) is not None, f"{folder.name}: no run of `kobza train` to go on with; start it anew")
        further = [f"--train.steps={more}"] if more and goal != stands.steps else []
        jobs.start(["train", "--resume", "--out", str(folder), *further], folder, "train.log")
        settle(folder)
        return RedirectResponse(address(folder), 303)
