"""A contest on disk: entries, voters, blind pairs, votes, standings and bracket. The command line and the pages use only this.

    contests/NAME/  rules.toml  contest.db  entries/SHA256/ (a checkpoint each, less its training state)  text/ (the host's texts)

Three states: "collecting" takes entries, "voting" shows accepted ones in pairs, "closed" does neither. Whoever votes sees a pair
without names in an order drawn for them; the pair's id, random and bound to the voter, is what a vote names, so a vote cannot be
forged for another, and the store takes one a voter a pair. What is refused is an InputError with its own class, so that pages can
answer each in its way; rates of join codes tried are the caller's to limit. Nothing here loads torch.
"""

from __future__ import annotations

import hmac
import math
import secrets
import shutil
import sqlite3
import time
from itertools import combinations
from pathlib import Path
from typing import get_args

from kobza.config import InputError, nearest, require
from kobza.contest.bracket import Bracket, draw
from kobza.contest.nouns import (
    AlreadyVoted,
    Choice,
    Duplicate,
    Entry,
    LogLine,
    NameTaken,
    NotYours,
    Pair,
    Standing,
    State,
    Status,
    TooFast,
    TooMany,
    Vote,
    Voter,
    WrongCode,
)
from kobza.contest.rows import (
    among,
    code_of,
    enter,
    entries_of,
    in_state,
    note,
    open_pair,
    state_of,
    strengths_of,
    votes_of,
)
from kobza.contest.rules import EXAMPLE, Rules, load_rules
from kobza.contest.store import create, migrate, reading, transaction
from kobza.contest.submission import Submission, Verdict, check_name, checkpoint_digest, name_key, unpack

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # of a join code: none that is read for another
CODE_LETTERS, CODE_MINUTES = 6, 120  # 2**30 codes: at the few tries a second that a caller lets through, a lifetime
MOST_VOTERS = 5000
MINUTE = 60.0


class Contest:
    """An opened contest. Safe to use from several threads and processes at once."""

    def __init__(self, folder: Path):
        self.folder, self._db = folder, folder / "contest.db"
        migrate(self._db)
        self.rules: Rules = load_rules(folder / "rules.toml")

    @classmethod
    def new(cls, home: Path, name: str, rules: str = EXAMPLE) -> Contest:
        """Make home/name with the text of a rules.toml, checked before anything stands there under its name."""
        good = 0 < len(name) <= 60 and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
        require(good, f"contest {name[:80]!r}: take letters, digits, - and _, at most 60")
        folder, aside = home / name, home / f".{name}.{secrets.token_hex(4)}.part"
        require(not folder.exists(), f"{folder}: there is a contest already; take another name")
        try:
            (aside / "entries").mkdir(parents=True)
            (aside / "text").mkdir()
            (aside / "rules.toml").write_text(rules, encoding="utf-8")
            lot = load_rules(aside / "rules.toml").lot
            create(aside / "contest.db")
            with transaction(aside / "contest.db") as db:
                db.execute("INSERT INTO facts VALUES ('state', 'collecting')")
                note(db, "host", f"made the contest {name}, lots from seed {lot}")
            aside.rename(folder)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made: {error.strerror}; take another folder") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return cls(folder)

    @classmethod
    def open(cls, home: Path, name: str) -> Contest:
        """The contest home/name; the nearest name is told where there is none."""
        known = sorted(path.parent.name for path in home.glob("*/contest.db"))
        if name not in known:
            close = nearest(name, known) if known else "; make one: kobza contest new NAME"
            raise InputError(f"{home}: no contest {name[:80]!r}{close}")
        return cls(home / name)

    # ---- state ----

    @property
    def state(self) -> State:
        """What is done now."""
        with reading(self._db) as db:
            return state_of(db)

    @state.setter
    def state(self, state: State) -> None:
        require(state in get_args(State), f"state {state!r}; one of {', '.join(get_args(State))}")
        with transaction(self._db) as db:
            if state == "voting":
                n = db.execute("SELECT count(*) FROM entries WHERE status = 'accepted'").fetchone()[0]
                require(n >= 2, f"{n} accepted entries; a vote takes two: verify what came in first")
            db.execute("UPDATE facts SET value = ? WHERE key = 'state'", (state,))
            note(db, "host", f"the contest is {state}")

    def join_code(self) -> str | None:
        """The code that lets guests in; None: there is none now."""
        with reading(self._db) as db:
            return code_of(db, time.time())

    def renew_code(self, minutes: float = CODE_MINUTES) -> str:
        """A new join code; the one before holds no longer."""
        require(0 < minutes <= 10_000, f"a join code of {minutes:g} minutes; between 0 and 10,000")
        code = "".join(secrets.choice(LETTERS) for _ in range(CODE_LETTERS))
        with transaction(self._db) as db:
            for key, value in (("code", code), ("code_until", repr(time.time() + 60 * minutes))):
                db.execute(
                    "INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value)
                )
            note(db, "host", f"renewed the join code for {minutes:g} minutes")
        return code

    def check_code(self, code: str) -> None:
        """Raise WrongCode unless it is the join code of now. Compared in constant time; the caller limits the tries."""
        with reading(self._db) as db:
            wanted = code_of(db, time.time())
        given = code.strip().upper()[:64].encode("utf-8", errors="replace")
        if wanted is None or not hmac.compare_digest(given, wanted.encode()):
            raise WrongCode("this join code does not hold, or no longer; ask the host for the new one")

    # ---- entries ----

    def entries(self, status: Status | None = None) -> list[Entry]:
        """All entries, or those of a status, in the order in which they came."""
        with reading(self._db) as db:
            return entries_of(db, status)

    def entry(self, id: int) -> Entry:
        """One entry."""
        with reading(self._db) as db:
            found = [entry for entry in entries_of(db) if entry.id == id]
        require(bool(found), f"no entry {id} in this contest; kobza contest standings lists them")
        return found[0]

    def checkpoint(self, entry: Entry) -> Path:
        """The folder of an entry's checkpoint."""
        return self.folder / "entries" / entry.submission.checkpoint

    def receive(self, file: Path, voter: Voter | None = None) -> Entry:
        """Take in a submission's file, as `kobza contest pack` writes it -> the entry, pending until its verdict."""
        aside = self.folder / "entries" / f".{secrets.token_hex(8)}.received"
        try:
            return self.add(unpack(file, aside, self.rules.most_bytes), aside, voter)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def add(self, submission: Submission, folder: Path, voter: Voter | None = None) -> Entry:
        """Enter a submission, whose checkpoint lies in `folder` -> the entry, pending until its verdict."""
        digest = checkpoint_digest(folder)
        same = f"the checkpoint's sha256 is {digest[:12]} and the submission says {submission.checkpoint[:12]!r}"
        require(digest == submission.checkpoint, f"{same}; submit it again")
        target, aside = self.folder / "entries" / digest, self.folder / "entries" / f".{secrets.token_hex(8)}.part"
        if not target.exists():
            shutil.copytree(folder, aside)
            aside.rename(target)
        try:
            with transaction(self._db) as db:
                id = enter(db, submission, voter, self.rules)
        except sqlite3.IntegrityError:
            raise Duplicate("this text is entered already; submit another") from None
        finally:
            with reading(self._db) as db:
                if not db.execute("SELECT 1 FROM entries WHERE checkpoint = ?", (digest,)).fetchone():
                    shutil.rmtree(target, ignore_errors=True)
        return self.entry(id)

    def record_verdict(self, entry: Entry, verdict: Verdict) -> Entry:
        """Keep what `verify` found -> the entry, accepted or refused."""
        status = "accepted" if verdict.ok else "refused"
        try:
            with transaction(self._db) as db:
                values = (status, verdict.to_json(), entry.id)
                db.execute("UPDATE entries SET status = ?, verdict = ? WHERE id = ?", values)
                note(db, "host", f"{status} {entry.title}: {verdict.lines[-1] if verdict.lines else 'no word'}")
        except sqlite3.IntegrityError:  # it had been refused, and another has its text by now
            raise Duplicate(f"{entry.title}: its text is entered by another by now") from None
        return self.entry(entry.id)

    # ---- voters and votes ----

    def voter(self, name: str) -> Voter:
        """A new voter by a name that nobody has yet."""
        name, id = check_name(name), secrets.token_hex(16)
        with transaction(self._db) as db:
            n = db.execute("SELECT count(*) FROM voters").fetchone()[0]
            if n >= MOST_VOTERS:
                raise TooMany(f"{n:,} voters have joined, which is the most; nobody else can")
            if db.execute("SELECT 1 FROM voters WHERE name_key = ?", (name_key(name),)).fetchone():
                raise NameTaken(f"somebody here goes by the name {name!r}; take another")
            db.execute("INSERT INTO voters VALUES (?, ?, ?, ?)", (id, name, name_key(name), time.time()))
            note(db, name, "joined")
        return Voter(id, name)

    def known_voter(self, id: str) -> Voter | None:
        """The voter of a secret id; None: nobody's."""
        with reading(self._db) as db:
            row = db.execute("SELECT id, name FROM voters WHERE id = ?", (id[:64],)).fetchone()
        return Voter(*row) if row else None

    def voter_named(self, name: str) -> Voter:
        """Who goes by a name here, joining if nobody does; for the host's own terminal, which needs no secret."""
        with reading(self._db) as db:
            row = db.execute("SELECT id, name FROM voters WHERE name_key = ?", (name_key(check_name(name)),)).fetchone()
        return Voter(*row) if row else self.voter(name)

    def pair_for(self, voter: Voter) -> Pair | None:
        """The pair this voter sees next, the same until they vote; None: nothing is left for them. Those compared least come
        first, of these the closest in strength; never one with an entry of theirs."""
        with transaction(self._db) as db:
            in_state(db, "voting", "votes are")
            entries = {entry.id: entry for entry in entries_of(db, "accepted")}
            found = open_pair(db, voter, entries) or self._choose(db, voter, entries)
            if found is None:
                return None
            if found[0] is None:
                left, right = found[1:] if secrets.randbits(1) else found[:0:-1]
                found = (secrets.token_hex(16), left, right)
                values = (found[0], voter.id, left, right, time.time())
                db.execute("INSERT INTO pairs (id, voter, left, right, shown) VALUES (?, ?, ?, ?, ?)", values)
        return Pair(found[0], entries[found[1]], entries[found[2]])

    def _choose(self, db: sqlite3.Connection, voter: Voter, entries: dict[int, Entry]) -> tuple[None, int, int] | None:
        """The two entries that a voter should compare next."""
        seen = {frozenset(row) for row in db.execute("SELECT left, right FROM pairs WHERE voter = ?", (voter.id,))}
        mine = {
            e.id for e in entries.values() if voter.id == e.voter or name_key(voter.name) == name_key(e.submission.name)
        }
        pairs = [frozenset(pair) for pair in combinations([id for id in entries if id not in mine], 2)]
        votes = votes_of(db)
        counts = {pair: 0 for pair in pairs}
        for vote in votes:
            pair = frozenset((vote.left, vote.right))
            counts[pair] = counts.get(pair, 0) + 1
        strength = strengths_of(list(entries), votes)
        wanted = None if self.rules.format == "ranking" else self._draw(list(entries), votes, False).open_pairs()
        most = self.rules.votes_per_pair or math.inf
        left = [p for p in pairs if p not in seen and counts[p] < most and (wanted is None or p in wanted)]
        if not left:
            return None

        def rank(pair: frozenset[int]) -> tuple[int, float, int]:
            a, b = pair
            return counts[pair], abs(strength[a].value - strength[b].value), secrets.randbits(32)

        a, b = min(left, key=rank)
        return None, a, b

    def vote(self, voter: Voter, pair_id: str, choice: Choice, now: float | None = None) -> None:
        """Take a vote on a pair that was shown to this voter; when this returns it is on the disk."""
        require(choice in get_args(Choice), f"choice {str(choice)[:40]!r}; one of {', '.join(get_args(Choice))}")
        now = time.time() if now is None else now
        with transaction(self._db) as db:
            in_state(db, "voting", "votes are")
            if not db.execute("SELECT 1 FROM pairs WHERE id = ? AND voter = ?", (pair_id, voter.id)).fetchone():
                raise NotYours("no such pair was shown to you; ask for the next one")
            if db.execute("SELECT 1 FROM votes WHERE pair = ?", (pair_id,)).fetchone():
                raise AlreadyVoted("you have voted on this pair; one vote a voter a pair")
            recent = "SELECT at FROM votes JOIN pairs ON pairs.id = pair WHERE voter = ? AND at > ? ORDER BY at DESC"
            times = [row["at"] for row in db.execute(recent, (voter.id, now - MINUTE))]
            if len(times) >= self.rules.votes_per_minute:
                seconds = max(1.0, times[self.rules.votes_per_minute - 1] + MINUTE - now)
                limit = f"{len(times)} votes in a minute; at most {self.rules.votes_per_minute}"
                raise TooFast(f"{limit}; read both texts, and go on in {seconds:.0f} s", seconds)
            db.execute("INSERT INTO votes (pair, choice, at) VALUES (?, ?, ?)", (pair_id, choice, now))
            note(db, voter.name, "voted")  # the log does not say how

    def votes(self) -> list[Vote]:
        """All votes in the order in which they came."""
        with reading(self._db) as db:
            return votes_of(db)

    # ---- what comes of it ----

    def standings(self) -> list[Standing]:
        """The accepted entries by strength; votes on entries refused since do not count."""
        with reading(self._db) as db:
            entries, votes = entries_of(db, "accepted"), votes_of(db)
        strength = strengths_of([entry.id for entry in entries], votes)
        tally = {entry.id: [0, 0, 0] for entry in entries}
        for vote in among(tally, votes):
            for id in (vote.left, vote.right):
                tally[id][2 if vote.winner is None else int(vote.winner != id)] += 1
        order = sorted(entries, key=lambda entry: (-strength[entry.id].value, entry.id))
        values = [strength[entry.id].value for entry in order]
        firsts = [next(j for j, other in enumerate(values) if abs(other - value) < 1e-9) for value in values]
        return [Standing(i + 1, e, strength[e.id], *tally[e.id]) for i, e in zip(firsts, order, strict=True)]

    def bracket(self) -> Bracket:
        """The knock-out of the accepted entries as it stands; once the contest is closed, all of it."""
        with reading(self._db) as db:
            entries, votes, state = entries_of(db, "accepted"), votes_of(db), state_of(db)
        return self._draw([entry.id for entry in entries], votes, state == "closed")

    def _draw(self, entries: list[int], votes: list[Vote], closed: bool) -> Bracket:
        cast: dict[frozenset[int], list[int | None]] = {}
        for vote in votes:
            cast.setdefault(frozenset((vote.left, vote.right)), []).append(vote.winner)
        strength = strengths_of(entries, votes)
        enough = self.rules.votes_per_match
        return draw(entries, self.rules.lot, cast, enough, closed, lambda id: round(strength[id].value, 9))

    def log(self) -> list[LogLine]:
        """Who did what, from the beginning."""
        with reading(self._db) as db:
            return [LogLine(*row) for row in db.execute("SELECT at, who, what FROM log ORDER BY n")]
