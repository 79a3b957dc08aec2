"""The store's rows as nouns, and what is checked in the very transaction that writes: all of it runs inside one of store.py."""

from __future__ import annotations

import functools
import json
import sqlite3
import time
from collections.abc import Container, Iterator

from kobza.contest.nouns import Duplicate, Entry, State, Status, TooMany, Vote, Voter, WrongState
from kobza.contest.rules import Rules
from kobza.contest.strength import Strength, strengths
from kobza.contest.submission import Submission, Verdict, name_key, read_submission

MOST_ENTRIES = 500


def note(db: sqlite3.Connection, who: str, what: str) -> None:
    """A line of the log."""
    db.execute("INSERT INTO log (at, who, what) VALUES (?, ?, ?)", (time.time(), who, what[:500]))


def state_of(db: sqlite3.Connection) -> State:
    """What is done now."""
    return db.execute("SELECT value FROM facts WHERE key = 'state'").fetchone()[0]


def in_state(db: sqlite3.Connection, wanted: State, what: str) -> None:
    """Refuse `what` in another state. in_state(db, "voting", "votes are")"""
    state = state_of(db)
    if state != wanted:
        raise WrongState(f"the contest is {state}; {what} taken while it is {wanted}")


def code_of(db: sqlite3.Connection, now: float) -> str | None:
    """The join code, unless it has run out."""
    facts = dict(db.execute("SELECT key, value FROM facts WHERE key IN ('code', 'code_until')").fetchall())
    return facts["code"] if facts and now < float(facts["code_until"]) else None


def enter(db: sqlite3.Connection, submission: Submission, voter: Voter | None, rules: Rules) -> int:
    """A row for a submission -> its id; refused where it repeats another's, or the person has their share."""
    in_state(db, "collecting", "entries are")
    rows = db.execute("SELECT * FROM entries").fetchall()
    if len(rows) >= MOST_ENTRIES:
        raise TooMany(f"{len(rows)} entries, which is the most")
    person, stands = name_key(submission.name), [row for row in rows if row["status"] != "refused"]
    own = [row for row in stands if row["person"] == person or voter and row["voter"] == voter.id]
    most = rules.entries_per_person
    if most and len(own) >= most:
        raise TooMany(f"{submission.name!r} has {len(own)} of {most} entries that a person may have")
    for row in stands:
        if row["text_key"] == submission.text_key:
            raise Duplicate(f"the same text as the entry of {row['title']!r}; submit another, of another --seed say")
        if row["checkpoint"] == submission.checkpoint and row not in own:
            raise Duplicate(
                f"the same weights as the entry of {row['title']!r}; train your own, with another --seed say"
            )
    taken = {row["title"] for row in rows}
    numbered = (submission.name if n == 1 else f"{submission.name} {n}" for n in range(1, len(rows) + 2))
    title = next(title for title in numbered if title not in taken)
    values = (title, person, voter and voter.id, submission.checkpoint, submission.text_key, submission.to_json())
    columns = "title, person, voter, checkpoint, text_key, submission, added"
    row = db.execute(f"INSERT INTO entries ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, time.time()))
    note(db, submission.name, f"entered {title}, checkpoint {submission.checkpoint[:12]}")
    return int(row.lastrowid or 0)


def entries_of(db: sqlite3.Connection, status: Status | None = None) -> list[Entry]:
    """All entries, or those of a status, in the order in which they came."""
    rows = db.execute("SELECT * FROM entries WHERE ? IS NULL OR status = ? ORDER BY id", (status, status))
    return [_entry(row) for row in rows]


@functools.lru_cache(maxsize=2 * MOST_ENTRIES)
def _submission(text: str) -> Submission:
    """Read once: every pair that is shown looks at all entries, and checking one's settings takes milliseconds."""
    return read_submission(text, "an entry of the store")


def _entry(row: sqlite3.Row) -> Entry:
    submission = _submission(row["submission"])
    found = json.loads(row["verdict"]) if row["verdict"] else None
    verdict = Verdict(found["ok"], tuple(found["lines"])) if found else None
    return Entry(row["id"], row["title"], submission, row["status"], verdict, row["voter"], row["added"])


def votes_of(db: sqlite3.Connection) -> list[Vote]:
    """All votes in the order in which they came."""
    query = (
        "SELECT name, left, right, choice, at FROM votes JOIN pairs ON pairs.id = pair JOIN voters ON voters.id = voter"
    )
    return [Vote(*row) for row in db.execute(f"{query} ORDER BY n")]


def open_pair(db: sqlite3.Connection, voter: Voter, entries: dict[int, Entry]) -> tuple[str, int, int] | None:
    """The pair that was shown to a voter and not voted on yet, if both still stand."""
    query = "SELECT id, left, right FROM pairs WHERE voter = ? AND id NOT IN (SELECT pair FROM votes)"
    rows = (tuple(row) for row in db.execute(query, (voter.id,)))
    return next((row for row in rows if row[1] in entries and row[2] in entries), None)


def among(ids: Container[int], votes: list[Vote]) -> Iterator[Vote]:
    """The votes between two of these entries."""
    return (vote for vote in votes if vote.left in ids and vote.right in ids)


def strengths_of(ids: list[int], votes: list[Vote]) -> dict[int, Strength]:
    """The strength of each of the entries by the votes among them."""
    places = {id: i for i, id in enumerate(ids)}
    shares = {"left": 1.0, "tie": 0.5, "right": 0.0}
    cast = [
        (places[v.left], places[v.right], shares[v.choice]) for v in votes if v.left in places and v.right in places
    ]
    return dict(zip(ids, strengths(len(ids), cast), strict=True))
