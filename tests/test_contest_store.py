"""The contest's state: nothing acknowledged is lost, nobody votes twice, nobody votes for another, many at once."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from kobza.config import InputError, ModelConfig, SampleConfig
from kobza.contest.contest import Contest
from kobza.contest.nouns import (
    AlreadyVoted,
    Duplicate,
    NameTaken,
    NotYours,
    TooFast,
    TooMany,
    WrongCode,
    WrongState,
)
from kobza.contest.rules import EXAMPLE, Rules, load_rules
from kobza.contest.store import migrate, transaction
from kobza.contest.submission import MODEL_FILES, Record, Submission, Verdict, check_name, checkpoint_digest, name_key

YES = Verdict(True, ("text: the same",))
FAST = EXAMPLE.replace("votes_per_minute = 20", "votes_per_minute = 100000")


def submission(folder, name, text="a text", seed=0):
    """A Submission of a made-up checkpoint, which lies in the folder: this file is about the store, not about proofs."""
    folder.mkdir(exist_ok=True)
    for file in MODEL_FILES:
        (folder / file).write_text(f"{file} of {seed}")
    digest = checkpoint_digest(folder)
    return Submission(name, "", SampleConfig(seed=seed), text, (1, 2), digest, ModelConfig(vocab_size=5), 10, Record())


@pytest.fixture
def contest(tmp_path):
    return Contest.new(tmp_path, "school", FAST)


def filled(contest, folder, n):
    """n accepted entries, and the vote open."""
    for i in range(n):
        entry = contest.add(submission(folder / f"c{i}", f"person {i}", f"text {i}", i), folder / f"c{i}")
        contest.record_verdict(entry, YES)
    contest.state = "voting"
    return contest


# ---- rules and making ----


def test_the_example_says_what_the_defaults_are(tmp_path):
    (tmp_path / "rules.toml").write_text(EXAMPLE)
    assert load_rules(tmp_path / "rules.toml") == Rules()


@pytest.mark.parametrize(
    "line, says",
    [
        ("most_parameter = 5", "did you mean most_parameters"),
        ("most_tokens = 0", "must be in"),
        ("most_tokens = 1.5", "must be of type int"),
        ("entries_per_person = -1", "must not be negative"),
        ('data = "abc"', "no sha256"),
        ("temperature_from = 3.0", "nothing would be allowed"),
        ('format = "league"', "one of ranking, knockout"),
        ('format = "knockout"\nvotes_per_pair = 3', "no effect"),
        ('prompt = "x"\nmost_prompt_characters = 3', "no effect"),
        ("most_seconds = nan", "finite"),
    ],
)
def test_bad_rules_are_refused_in_a_line_and_nothing_is_made(tmp_path, line, says):
    with pytest.raises(InputError, match=says) as error:
        Contest.new(tmp_path, "school", line)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 61, "a b", "ü", "nul\0"])
def test_a_contest_has_a_plain_name(tmp_path, name):
    with pytest.raises(InputError, match="take letters"):
        Contest.new(tmp_path, name)
    with pytest.raises(InputError, match="no contest"):
        Contest.open(tmp_path, name)


def test_making_twice_and_opening_what_is_not_there(tmp_path, contest):
    with pytest.raises(InputError, match="there is a contest already"):
        Contest.new(tmp_path, "school")
    with pytest.raises(InputError, match="did you mean school"):
        Contest.open(tmp_path, "schol")
    assert Contest.open(tmp_path, "school").rules == contest.rules


def test_other_programs_databases_damaged_ones_and_newer_ones_are_refused(contest):
    db = contest.folder / "contest.db"
    with transaction(db) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="of a newer kobza"):
        migrate(db)
    for path in contest.folder.glob("contest.db*"):
        path.unlink()
    sqlite3.connect(db).execute("CREATE TABLE x (y)").close()
    with pytest.raises(InputError, match="another program's database"):
        Contest(contest.folder)
    db.write_bytes(b"not a database at all" * 100)
    with pytest.raises(InputError, match="not a contest's database"):
        Contest(contest.folder)


# ---- names ----


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "O'Brien; DROP TABLE voters;--", "Оксана 👩‍🌾", "=cmd|' /C calc'"]
)
def test_any_name_that_can_be_seen_comes_back_as_it_is(contest, name):
    voter = contest.voter(name)
    assert voter.name == name and contest.known_voter(voter.id) == voter


@pytest.mark.parametrize(
    "name", ["", "   ", "\u200d", "x" * 61, "x" * 10**7, "a\u202eb", "a\x00b", "a\x1b[2Jb", "\ud800"]
)
def test_a_name_that_cannot_be_seen_or_is_too_long_is_refused(contest, name):
    with pytest.raises(InputError, match="name") as error:
        contest.voter(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_two_spellings_of_a_name_are_one(contest):
    contest.voter("Ada  Lovelace")
    for name in ("ada lovelace", "ＡDA LOVELACE", " Ada Lovelace "):
        with pytest.raises(NameTaken):
            contest.voter(name)
    assert contest.voter_named("ADA lovelace").name == "Ada Lovelace"
    assert name_key("Straße") == name_key("STRASSE") and check_name("e\u0301") == "é"


# ---- the join code ----


def test_the_join_code_holds_until_it_is_renewed_or_runs_out(contest, monkeypatch):
    with pytest.raises(WrongCode):
        contest.check_code("")
    first = contest.renew_code(10)
    contest.check_code(f" {first.lower()} ")
    for wrong in (first[:-1], first + "A", "", "\ud800", "x" * 10**6):
        with pytest.raises(WrongCode):
            contest.check_code(wrong)
    second = contest.renew_code(10)
    assert contest.join_code() == second != first
    with pytest.raises(WrongCode):
        contest.check_code(first)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    assert contest.join_code() is None
    with pytest.raises(WrongCode):
        contest.check_code(second)


# ---- entries ----


def test_an_entry_waits_for_its_verdict_and_only_accepted_ones_are_voted_on(contest, tmp_path):
    one = contest.add(submission(tmp_path / "c", "Ada"), tmp_path / "c")
    assert one.status == "pending" and one.verdict is None
    assert sorted(p.name for p in contest.checkpoint(one).iterdir()) == sorted(MODEL_FILES)
    with pytest.raises(InputError, match="a vote takes two"):
        contest.state = "voting"
    done = contest.record_verdict(one, Verdict(False, ("edited",)))
    assert done.status == "refused" and done.verdict == Verdict(False, ("edited",))
    assert contest.entries("accepted") == [] and contest.standings() == []
    assert [line.who for line in contest.log()] == ["host", "Ada", "host"]


def test_duplicates_and_more_than_ones_share_are_refused(contest, tmp_path):
    contest.add(submission(tmp_path / "c", "Ada", "one  text"), tmp_path / "c")
    with pytest.raises(Duplicate, match="same text as the entry of 'Ada'"):
        contest.add(submission(tmp_path / "d", "Bob", "one text", 1), tmp_path / "d")
    with pytest.raises(Duplicate, match="same weights as the entry of 'Ada'"):
        contest.add(submission(tmp_path / "e", "Bob", "another"), tmp_path / "e")
    with pytest.raises(TooMany, match="1 of 1 entries"):
        contest.add(submission(tmp_path / "f", "ADA", "third", 2), tmp_path / "f")
    folders = [path.name for path in (contest.folder / "entries").iterdir()]
    assert folders == [contest.entries()[0].submission.checkpoint]  # nothing is left of those refused


def test_a_refused_entry_does_not_keep_its_text_or_its_share(contest, tmp_path):
    bad = contest.add(submission(tmp_path / "c", "Mallory", "Ada's text"), tmp_path / "c")
    contest.record_verdict(bad, Verdict(False, ("not of this model",)))
    good = contest.add(submission(tmp_path / "d", "Ada", "Ada's text", 1), tmp_path / "d")
    with pytest.raises(Duplicate):
        contest.record_verdict(bad, YES)
    assert contest.record_verdict(good, YES).status == "accepted"
    assert contest.add(submission(tmp_path / "e", "Mallory", "own", 2), tmp_path / "e").title == "Mallory 2"


def test_files_that_are_not_those_hashed_do_not_get_in(contest, tmp_path):
    claimed = submission(tmp_path / "c", "Ada")
    (tmp_path / "c" / "model.safetensors").write_text("others")
    with pytest.raises(InputError, match="sha256"):
        contest.add(claimed, tmp_path / "c")
    with pytest.raises(InputError, match="sha256"):
        contest.add(replace(claimed, checkpoint="../../../etc"), tmp_path / "c")
    assert contest.entries() == [] and list((contest.folder / "entries").iterdir()) == []


# ---- votes ----


def test_voting_belongs_to_its_state(contest, tmp_path):
    voter = contest.voter("Vera")
    with pytest.raises(WrongState, match="collecting"):
        contest.pair_for(voter)
    filled(contest, tmp_path, 2)
    pair = contest.pair_for(voter)
    with pytest.raises(WrongState, match="voting"):
        contest.add(submission(tmp_path / "late", "Late", "late", 9), tmp_path / "late")
    contest.state = "closed"
    with pytest.raises(WrongState, match="closed"):
        contest.vote(voter, pair.id, "left")
    with pytest.raises(InputError, match="one of"):
        contest.state = "open"


def test_each_pair_once_and_the_same_until_it_is_voted_on(contest, tmp_path):
    filled(contest, tmp_path, 4)
    voter, seen = contest.voter("Vera"), []
    while pair := contest.pair_for(voter):
        assert contest.pair_for(voter) == pair
        contest.vote(voter, pair.id, random.choice(["left", "right", "tie"]))
        seen.append(frozenset((pair.left.id, pair.right.id)))
    assert len(seen) == len(set(seen)) == 6


def test_replays_and_forged_votes_are_refused(contest, tmp_path):
    filled(contest, tmp_path, 3)
    vera, eve = contest.voter("Vera"), contest.voter("Eve")
    pair = contest.pair_for(vera)
    for forged in (pair.id[:-1] + "x", "", "' OR 1=1 --", "1"):
        with pytest.raises(NotYours):
            contest.vote(vera, forged, "left")
    with pytest.raises(NotYours):
        contest.vote(eve, pair.id, "left")  # Vera's pair
    with pytest.raises(InputError, match="one of left, right, tie"):
        contest.vote(vera, pair.id, "both")
    contest.vote(vera, pair.id, "left")
    with pytest.raises(AlreadyVoted):
        contest.vote(vera, pair.id, "right")
    assert [vote.choice for vote in contest.votes()] == ["left"]
    with (
        pytest.raises(sqlite3.IntegrityError),
        transaction(contest.folder / "contest.db") as db,
    ):  # nor by the back door
        row = db.execute("SELECT * FROM pairs").fetchone()
        db.execute(
            "INSERT INTO pairs (id, voter, left, right, shown) VALUES ('z', ?, ?, ?, 0)",
            (vera.id, row["right"], row["left"]),
        )


def test_nobody_votes_on_their_own_entry(contest, tmp_path):
    vera = contest.voter("Vera")
    sent = contest.add(submission(tmp_path / "v", "pen name", "by Vera", 8), tmp_path / "v", vera)
    named = contest.add(submission(tmp_path / "w", "WANDA", "by Wanda", 9), tmp_path / "w")
    for entry in (sent, named):
        contest.record_verdict(entry, YES)
    filled(contest, tmp_path, 2)
    for voter, own in ((vera, sent), (contest.voter("wanda"), named)):
        shown = set()
        while pair := contest.pair_for(voter):
            shown |= {pair.left.id, pair.right.id}
            contest.vote(voter, pair.id, "tie")
        assert len(shown) == 3 and own.id not in shown


def test_the_rate_of_a_voter_is_limited_and_told(tmp_path):
    contest = filled(
        Contest.new(tmp_path, "slow", EXAMPLE.replace("votes_per_minute = 20", "votes_per_minute = 2")), tmp_path, 4
    )
    voter, now = contest.voter("Vera"), 1000.0
    for at in (now, now + 20):
        contest.vote(voter, contest.pair_for(voter).id, "left", at)
    pair = contest.pair_for(voter)
    with pytest.raises(TooFast) as error:
        contest.vote(voter, pair.id, "left", now + 30)
    assert error.value.seconds == 30
    contest.vote(voter, pair.id, "left", now + 30 + error.value.seconds)
    contest.vote(other := contest.voter("Olga"), contest.pair_for(other).id, "left", now + 60)


def test_what_was_compared_least_comes_first_and_sides_are_drawn(contest, tmp_path):
    filled(contest, tmp_path, 4)
    counts, sides = {}, []
    for i in range(24):
        voter = contest.voter(f"v{i}")
        pair = contest.pair_for(voter)
        contest.vote(voter, pair.id, "left")
        key = frozenset((pair.left.id, pair.right.id))
        counts[key] = counts.get(key, 0) + 1
        sides.append(pair.left.id < pair.right.id)
    assert set(counts.values()) == {4}  # 24 votes on 6 pairs
    assert 2 < sum(sides) < 22


def test_a_knockout_shows_open_matches_only_and_ends_with_a_champion(tmp_path):
    rules = FAST.replace('"ranking"', '"knockout"').replace("votes_per_match = 5", "votes_per_match = 3")
    contest = filled(Contest.new(tmp_path, "cup", rules), tmp_path, 5)
    for i in range(8):
        voter = contest.voter(f"v{i}")
        while pair := contest.pair_for(voter):
            assert frozenset((pair.left.id, pair.right.id)) in contest.bracket().open_pairs()
            contest.vote(voter, pair.id, "left" if pair.left.id < pair.right.id else "right")
    assert contest.bracket().champion == min(entry.id for entry in contest.entries())
    assert all(sum((m.left_votes, m.right_votes)) == 3 for r in contest.bracket().rounds for m in r if m.how == "votes")


def test_standings_count_and_rank(contest, tmp_path):
    filled(contest, tmp_path, 3)
    best = contest.entries()[2].id
    for i in range(6):
        voter = contest.voter(f"v{i}")
        while pair := contest.pair_for(voter):
            left = {best: "left", pair.right.id: "tie"}.get(pair.left.id, "right" if pair.right.id == best else "tie")
            contest.vote(voter, pair.id, left)
    rows = contest.standings()
    assert [row.place for row in rows] == [1, 2, 2] and rows[0].entry.id == best
    assert [(row.wins, row.losses, row.ties) for row in rows] == [(12, 0, 0), (0, 6, 6), (0, 6, 6)]
    assert rows[0].strength.low > rows[1].strength.high
    contest.record_verdict(rows[0].entry, Verdict(False, ("found out later",)))
    assert [(row.wins, row.losses, row.ties) for row in contest.standings()] == [(0, 0, 6), (0, 0, 6)]


# ---- many at once, and the plug pulled ----


def test_many_threads_vote_at_once_and_each_vote_counts_once(contest, tmp_path):
    filled(contest, tmp_path, 3)
    problems = []

    def work(i):
        try:
            mine = Contest(contest.folder)
            voter = mine.voter(f"v{i}")
            while pair := mine.pair_for(voter):
                mine.vote(voter, pair.id, "left")
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not problems and len(contest.votes()) == 18


def test_one_voter_on_two_devices_votes_once(contest, tmp_path):
    filled(contest, tmp_path, 2)
    voter = contest.voter("Vera")
    pair, outcomes = contest.pair_for(voter), []

    def work(choice):
        try:
            outcomes.append(Contest(contest.folder).vote(voter, pair.id, choice))
        except AlreadyVoted as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work, args=(choice,)) for choice in ("left", "right", "tie", "left")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert outcomes.count(None) == 1 and len(contest.votes()) == 1


CHILD = """
import sys
from pathlib import Path
from kobza.contest.contest import Contest
contest = Contest(Path(sys.argv[1]))
for n in range(10_000):
    voter = contest.voter(f"{sys.argv[2]}-{n}")
    while pair := contest.pair_for(voter):
        contest.vote(voter, pair.id, "left")
        sys.stdout.write(f"{voter.name} {pair.left.id} {pair.right.id}\\n")
        sys.stdout.flush()
"""


def test_every_vote_acknowledged_survives_kill_9(contest, tmp_path):
    filled(contest, tmp_path, 4)
    said, generator = [], random.Random(0)
    for round_ in range(10):
        command = [sys.executable, "-c", CHILD, str(contest.folder), f"r{round_}"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        first = child.stdout.readline()  # it is at work
        time.sleep(generator.uniform(0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        rest, _ = child.communicate()
        said += [line.rsplit(" ", 2) for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]
        there = {(vote.voter, str(vote.left), str(vote.right)) for vote in Contest(contest.folder).votes()}
        lost = [line for line in said if (line[0], line[1], line[2].strip()) not in there]
        assert not lost, f"round {round_}: {lost[:3]} of {len(said)}"
    db = sqlite3.connect(contest.folder / "contest.db")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    assert len(said) >= 10 and len(there) <= len(said) + 10  # at most one a kill was written and not yet said
