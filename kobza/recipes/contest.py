"""kobza contest: make one, enter, verify, vote, and see who won. A function a verb.

A submission is written and verified in float32 with the plain model, whatever the machine could do faster: then two machines
differ in the last digits alone. What the proof needs of other rooms is in contest_bench.py.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kobza
from kobza.checkpoint import Loaded, find_checkpoint, load_checkpoint
from kobza.config import InputError, SampleConfig, require
from kobza.contest.bracket import Bracket
from kobza.contest.contest import Contest
from kobza.contest.nouns import Duplicate, Entry, Pair, TooFast
from kobza.contest.page import export as export_files
from kobza.contest.rules import EXAMPLE, Rules
from kobza.contest.submission import (
    METRICS,
    SUBMISSION,
    Record,
    Submission,
    Verdict,
    check_name,
    checkpoint_digest,
    collect,
    file_digest,
)
from kobza.contest.submission import pack as pack_file
from kobza.contest.verify import read_lines, seconds_of
from kobza.contest.verify import verify as verify_entry
from kobza.evals.texts import run_folder
from kobza.generate import generate
from kobza.hub.store import find_model
from kobza.model import n_parameters
from kobza.recipes.contest_bench import make_bench, verdicts
from kobza.recipes.generate import ends_of
from kobza.recipes.tuned import ADAPTER, QUANTISED
from kobza.report.metrics import read_metrics

HOME = Path("contests")
DATA_LINE = re.compile(r'^data *= *"([^"\n]*)"', re.MULTILINE)


# ---- the verbs -----------------------------------------------------------------------------------------------------


def new(name: str, rules: Path | None, text: list[str], home: Path = HOME) -> int:
    """Make contests/NAME with rules (a documented example unless given) and the texts to train on -> exit code."""
    content = EXAMPLE if rules is None else read_rules(rules)
    digests = {path: file_digest(Path(path)) for path in text}
    contest = Contest.new(home, name, with_data(content, list(digests.values())))
    for path, digest in digests.items():
        shutil.copyfile(path, contest.folder / "text" / f"{digest}{''.join(Path(path).suffixes[-2:])}")
    print(f"made {contest.folder}; its rules: {contest.folder / 'rules.toml'}")
    print(f"enter a run with: kobza contest submit {name} RUN --who YOU")
    return 0


def submit(
    name: str, run: Path, prompt: str | None, who: str | None, sampling: SampleConfig, as_json: bool, home: Path = HOME
) -> int:
    """Enter a run, or the file that `pack` wrote on another laptop, and verify it -> exit code; 1 where it is refused."""
    contest = Contest.open(home, name)
    if run.is_file():
        own = prompt is None and who is None and sampling == SampleConfig()
        require(own, f"{run} has its prompt, name and settings; leave out --prompt, --who and those of sampling")
        entry = judge_one(contest, contest.receive(run))
    else:
        require(who is not None, "whose entry is it? give --who")
        prompt = contest.rules.prompt or None if prompt is None else prompt
        with submission_folder(run, prompt, str(who), sampling) as (submission, folder):
            entry = judge(contest, contest.add(submission, folder), run)
    if as_json:
        print(json.dumps(as_dict(entry), ensure_ascii=False))
    else:
        show_entry(entry)
    return 0 if entry.status == "accepted" else 1


def pack(run: Path, prompt: str | None, who: str, sampling: SampleConfig, out: Path) -> int:
    """Write a submission's file, to be carried to the host -> exit code."""
    require(not out.exists(), f"{out} is there already; take another --out")
    with submission_folder(run, prompt, who, sampling) as (submission, folder):
        pack_file(folder, out)
    print(f"{submission.prompt}{submission.text}")
    print(f"\nwrote {out}, {out.stat().st_size / 1e6:.1f} MB; the host enters it: kobza contest submit NAME {out}")
    return 0


def verify(name: str, entry: int | None, as_json: bool, home: Path = HOME) -> int:
    """Verify one entry, or all that wait for it, or all again if none waits -> exit code; 1 where any is refused."""
    contest = Contest.open(home, name)
    waiting = [contest.entry(entry)] if entry is not None else contest.entries("pending") or contest.entries()
    require(bool(waiting), f"no entries yet; enter a run with: kobza contest submit {name} RUN --who YOU")
    done = []
    for one in judge_received(contest, waiting):
        done.append(one)
        if not as_json:
            show_entry(one)
    if as_json:
        print(json.dumps([as_dict(one) for one in done], ensure_ascii=False))
    return 0 if all(one.status == "accepted" for one in done) else 1


def state(name: str, to: str | None, home: Path = HOME) -> int:
    """Say what the contest does now (collecting, voting, closed), or move it on -> exit code."""
    contest = Contest.open(home, name)
    if to is not None:
        contest.state = to  # type: ignore[assignment]  # checked there
    print(contest.state)
    return 0


def vote(name: str, who: str, home: Path = HOME, ask: Callable[[str], str] = input) -> int:
    """Show one voter pair after pair, blind, until none is left or they stop -> exit code."""
    contest = Contest.open(home, name)
    voter, n = contest.voter_named(who), 0
    while (pair := contest.pair_for(voter)) is not None:
        show_pair(pair)
        try:
            answer = ask("which is better? l left, r right, t even, q stop: ").strip().lower()
        except EOFError:  # Ctrl-D
            answer = "q"
        choice = {"l": "left", "r": "right", "t": "tie"}.get(answer[:1])
        if answer[:1] == "q":
            break
        if choice is None:
            print(f"{answer[:20]!r}: give l, r, t or q")
            continue
        try:
            contest.vote(voter, pair.id, choice)  # type: ignore[arg-type]
            n += 1
        except TooFast as error:
            print(error)
    print(f"{n} votes of {voter.name}; thank you")
    return 0


def standings(name: str, as_json: bool, home: Path = HOME) -> int:
    """Print the table -> exit code."""
    rows = Contest.open(home, name).standings()
    if as_json:
        found = [{"place": r.place, "title": r.entry.title, "id": r.entry.id, **r.strength._asdict()} for r in rows]
        counts = [{"wins": r.wins, "losses": r.losses, "ties": r.ties, "chance": r.chance} for r in rows]
        print(json.dumps([a | b for a, b in zip(found, counts, strict=True)], ensure_ascii=False))
        return 0
    print(f"{'place':>5}  {'entry':<30} {'strength':>8}  {'95% interval':<16} {'won':>4} {'lost':>4} {'even':>4}")
    for r in rows:
        interval = f"{r.strength.low:+.2f} to {r.strength.high:+.2f}"
        print(f"{r.place:>5}  {plain(r.entry.title, 30):<30} {r.strength.value:>+8.2f}  {interval:<16} "
              f"{r.wins:>4} {r.losses:>4} {r.ties:>4}")  # fmt: skip
    return 0


def bracket(name: str, as_json: bool, home: Path = HOME) -> int:
    """Print the rounds of the knock-out -> exit code."""
    contest = Contest.open(home, name)
    drawn, titles = contest.bracket(), {entry.id: entry.title for entry in contest.entries()}
    if as_json:
        print(json.dumps(asdict(drawn) | {"titles": titles}, ensure_ascii=False))
        return 0
    print("\n".join(bracket_lines(drawn, titles)) or "no accepted entries yet")
    return 0


def export(name: str, out: Path | None, home: Path = HOME) -> int:
    """Write the contest as CSV files and one HTML page -> exit code."""
    contest = Contest.open(home, name)
    try:
        for path in export_files(contest, out or contest.folder / "export"):
            print(path)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}; take another --out") from None
    return 0


# ---- a submission --------------------------------------------------------------------------------------------------


@contextmanager
def submission_folder(
    run: Path, prompt: str | None, who: str, sampling: SampleConfig
) -> Iterator[tuple[Submission, Path]]:
    """Generate a run's text -> its Submission, and a folder with all that goes into its file, which is gone afterwards."""
    checkpoint, who = find_checkpoint(find_model(run)), check_name(who)
    for part, remedy in ((ADAPTER, "merge it first: kobza merge"), (QUANTISED, "take the model it was made from")):
        require(not (checkpoint / part).exists(), f"{run}: a contest takes whole models; {remedy}")
    loaded, home = load_checkpoint(checkpoint), run_folder(checkpoint)
    with tempfile.TemporaryDirectory(prefix="kobza-") as parent:
        folder = Path(parent) / "submission"
        collect(checkpoint, home and home / METRICS, folder)
        submission = write_submission(loaded, folder, prompt, who, sampling)
        (folder / SUBMISSION).write_text(submission.to_json(), encoding="utf-8")
        yield submission, folder


def write_submission(loaded: Loaded, folder: Path, prompt: str | None, who: str, sampling: SampleConfig) -> Submission:
    """The text of a model, and everything that is claimed of it."""
    prompt = loaded.tokenizer.line_start() if prompt is None else prompt
    steps = generate(loaded.model, [loaded.tokenizer.encode_prompt(prompt)], sampling, ends_of(loaded))
    ids = tuple(i for choice in steps for i in choice.ids if i is not None)
    facts = loaded.provenance
    seconds = seconds_of(read_metrics(folder / METRICS)) if (folder / METRICS).is_file() else None
    return Submission(
        name=who,
        prompt=prompt,
        sampling=sampling,
        text=loaded.tokenizer.decode(ids, continues=True),
        ids=ids,
        checkpoint=checkpoint_digest(folder),
        model=loaded.run.model,
        n_parameters=n_parameters(loaded.model),
        record=Record(facts.get("step"), facts.get("tokens"), seconds, facts.get("text_sha256")),
        kobza=kobza.__version__,
        torch=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}",
    )


# ---- its verdict ---------------------------------------------------------------------------------------------------


def judge(contest: Contest, entry: Entry, run: Path) -> Entry:
    """Verify an entry that was made here and keep the verdict -> the entry. run: where its text lies, if the host has none."""
    verdict = verify_entry(contest.checkpoint(entry), entry.submission, contest.rules, make_bench(contest, run))
    return contest.record_verdict(entry, verdict)


def judge_one(contest: Contest, entry: Entry) -> Entry:
    """Verify one entry that was sent, in a process apart, and keep the verdict -> the entry. For the pages, too."""
    (judged,) = judge_received(contest, [entry])
    return judged


def judge_received(contest: Contest, entries: Sequence[Entry]) -> Iterator[Entry]:
    """Verify entries that others sent, in a process apart, and keep the verdicts -> the entries."""
    for entry, verdict in verdicts(contest, entries):
        try:
            yield contest.record_verdict(entry, verdict)
        except Duplicate as error:
            yield contest.record_verdict(entry, Verdict(False, (str(error),)))


# ---- words ---------------------------------------------------------------------------------------------------------


def read_rules(path: Path) -> str:
    """The text of a rules.toml."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; name a rules.toml") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8; write in UTF-8") from None


def with_data(rules: str, digests: list[str]) -> str:
    """The rules with the texts' sha256 in them; where they name texts already, these must be among them."""
    if not digests:
        return rules
    named = DATA_LINE.search(rules)
    if named and named[1].strip():
        known = Rules(data=named[1]).texts
        strange = [digest for digest in digests if digest not in known]
        require(
            not strange, f"--text has a file of sha256 {''.join(strange[:1])[:12]}, and data in the rules names others"
        )
        return rules
    line = f'data = "{",".join(digests)}"'
    return DATA_LINE.sub(line, rules, count=1) if named else f"{line}\n{rules}"


def plain(text: str, most: int = 10_000) -> str:
    """A text for a terminal: what would steer it is shown instead of sent."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def show_entry(entry: Entry) -> None:
    """Print an entry and its verdict."""
    print(f"{entry.id:>3}  {plain(entry.title)}")
    for line in read_lines(entry.verdict) if entry.verdict else ():
        print(f"     {plain(line)}")


def show_pair(pair: Pair) -> None:
    """Print two texts without their authors."""
    width = min(shutil.get_terminal_size().columns, 100)
    for side, entry in (("left", pair.left), ("right", pair.right)):
        print(f"\n---- {side} ".ljust(width, "-"))
        print(plain(entry.submission.prompt + entry.submission.text))
    print("-" * width, flush=True)
    sys.stdout.flush()


def bracket_lines(drawn: Bracket, titles: dict[int, str]) -> Iterator[str]:
    """The rounds for a terminal."""
    for n, matches in enumerate(drawn.rounds, 1):
        yield "final" if n == len(drawn.rounds) else f"round {n}"
        for m in matches:
            sides = [plain(titles.get(id, "?"), 24) if id is not None else "-" for id in (m.left, m.right)]
            winner = (
                f"{plain(titles[m.winner], 24)} ({m.how})" if m.winner is not None else "open" if m.open else "to come"
            )
            yield f"  {sides[0]:<24} {m.left_votes:>3} : {m.right_votes:<3} {sides[1]:<24} -> {winner}"
    if drawn.champion is not None:
        yield f"winner: {plain(titles[drawn.champion])}"


def as_dict(entry: Entry) -> dict[str, Any]:
    """An entry for a script."""
    lines = entry.verdict.lines if entry.verdict else ()
    facts = {"id": entry.id, "title": entry.title, "status": entry.status, "lines": list(lines)}
    return facts | {"checkpoint": entry.submission.checkpoint, "text": entry.submission.text}
