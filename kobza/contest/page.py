"""A contest for who was not there: three CSV files for a spreadsheet, and one HTML page with bracket, standings and texts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kobza.contest.bracket import Bracket
from kobza.contest.contest import Contest
from kobza.contest.nouns import Standing
from kobza.pages.shell import printable, render, write_whole

FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # a spreadsheet computes a cell that begins so
STEP = 1e-9

PAGE = """{% extends "shell" %}
{% block style %}
.bracket { display: flex; gap: 1.2rem; padding: 0.8rem; min-width: max-content; }
.round { display: flex; flex-direction: column; justify-content: space-around; gap: 0.8rem; min-width: 9rem; }
.match { border: 1px solid var(--line); border-radius: 0.4rem; background: var(--ground); }
.match div { display: flex; justify-content: space-between; gap: 0.8rem; padding: 0.15rem 0.6rem; max-width: 16rem; }
.match div + div { border-top: 1px solid var(--line); }
.match span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.won { font-weight: 600; color: var(--good); }
.match .quiet { font-size: 0.8rem; }
.left { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
.scale { position: relative; width: 9rem; height: 1rem; }
.scale i, .scale b { position: absolute; top: 0.45rem; height: 0.15rem; background: var(--quiet); }
.scale b { top: 0.2rem; width: 0.3rem; height: 0.65rem; background: var(--mark); }
{% endblock %}
{% block body %}
<h1>{{ title }}</h1>
<p class="quiet">{{ n_entries }} entries, {{ n_accepted }} accepted; {{ n_votes }} votes of {{ n_voters }} voters; {{ state }}.
Made {{ made }}.</p>
{% if rounds %}<h2>Bracket</h2>
<div class="wide" tabindex="0"><div class="bracket">
{% for round in rounds %}<div class="round">{% for match in round %}<div class="match">
{% for side in match.sides %}<div{% if side.won %} class="won"{% endif %}><span>{{ side.name }}</span>
<span>{{ side.votes }}</span></div>{% endfor %}
<div class="quiet"><span>{{ match.how }}</span></div></div>{% endfor %}</div>{% endfor %}
</div></div>{% if champion %}<p>Winner of the bracket: <strong>{{ champion }}</strong></p>{% endif %}{% endif %}
{% if standings %}<h2>Standings</h2>
<div class="wide" tabindex="0"><table><thead><tr><th>place</th><th class="left">entry</th><th>strength</th>
<th>95% interval</th><th></th><th>won</th><th>lost</th><th>even</th></tr></thead><tbody>
{% for row in standings %}<tr><td>{{ row.place }}</td><td class="left">{{ row.name }}</td><td>{{ row.value }}</td>
<td>{{ row.interval }}</td><td><div class="scale"><i style="left:{{ row.left }}%;width:{{ row.width }}%"></i>
<b style="left:{{ row.middle }}%"></b></div></td><td>{{ row.wins }}</td><td>{{ row.losses }}</td><td>{{ row.ties }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="quiet">Bradley-Terry strengths in nats of odds against the mean, with a weak prior: 1.1 nats more win three votes in
four. Votes count as independent; a tie is half a win for each.</p>{% endif %}
<h2>Texts</h2>
{% for entry in entries %}<div class="card"><strong>{{ entry.name }}</strong> <span class="quiet">{{ entry.facts }}</span>
<pre><b>{{ entry.prompt }}</b>{{ entry.text }}</pre>
<details><summary>{{ entry.status }}</summary><pre>{{ entry.lines }}</pre></details></div>{% endfor %}
{% endblock %}
"""


def export(contest: Contest, out: Path) -> list[Path]:
    """Write contest.html, entries.csv, votes.csv and standings.csv into a folder -> their paths."""
    out.mkdir(parents=True, exist_ok=True)
    standings = contest.standings()
    tables = {"entries": entry_rows(contest), "votes": vote_rows(contest), "standings": standing_rows(standings)}
    written = [write_whole(out / f"{name}.csv", to_csv(rows)) for name, rows in tables.items()]
    return [write_whole(out / "contest.html", to_html(contest, standings)), *written]


# ---- CSV -----------------------------------------------------------------------------------------------------------


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV. A text that a spreadsheet would compute gets an apostrophe before it."""
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([cell(value) for value in row] for row in rows)
    return stream.getvalue()


def cell(value: Any) -> Any:
    """cell("=cmd|' /C calc'!A0") -> "'=cmd|' /C calc'!A0"; a number stays one."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip(" \n").startswith(FORMULA) or text.startswith("\n") else text


def entry_rows(contest: Contest) -> list[list[Any]]:
    """A row an entry, refused ones too."""
    head = "id title name status parameters steps seconds checkpoint prompt temperature top_k seed text verdict"
    rows: list[list[Any]] = [head.split()]
    for e in contest.entries():
        s, lines = e.submission, " | ".join(e.verdict.lines) if e.verdict else ""
        rows.append([e.id, e.title, s.name, e.status, s.n_parameters, s.record.steps, s.record.seconds, s.checkpoint])
        rows[-1] += [s.prompt, s.sampling.temperature, s.sampling.top_k, s.sampling.seed, s.text, lines]
    return rows


def vote_rows(contest: Contest) -> list[list[Any]]:
    """A row a vote, in order of time."""
    titles = {entry.id: entry.title for entry in contest.entries()}
    head = [["at", "voter", "left", "right", "choice"]]
    return head + [[when(v.at), v.voter, titles[v.left], titles[v.right], v.choice] for v in contest.votes()]


def standing_rows(standings: list[Standing]) -> list[list[Any]]:
    """A row an accepted entry, by place."""
    head = "place title strength low high wins losses ties".split()
    rounded = ([round(x, 4) for x in row.strength] for row in standings)
    counts = ([row.wins, row.losses, row.ties] for row in standings)
    rows = zip(standings, rounded, counts, strict=True)
    return [head, *([row.place, row.entry.title, *strength, *count] for row, strength, count in rows)]


def when(at: float) -> str:
    """Seconds -> 2026-01-31T12:00:00Z."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- HTML ----------------------------------------------------------------------------------------------------------


def to_html(contest: Contest, standings: list[Standing]) -> str:
    """The page; all that people and models wrote is escaped by the template."""
    entries, votes, bracket = contest.entries(), contest.votes(), contest.bracket()
    titles: dict[int | None, str] = {entry.id: printable(entry.title) for entry in entries}
    return render(
        PAGE,
        title=printable(contest.rules.title or contest.folder.name),
        state=contest.state,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        n_entries=len(entries),
        n_accepted=len(standings),
        n_votes=len(votes),
        n_voters=len({vote.voter for vote in votes}),
        rounds=bracket_rows(bracket, titles),
        champion=titles.get(bracket.champion, ""),
        standings=scaled(standings),
        entries=[entry_card(entry) for entry in entries],
    )


def bracket_rows(bracket: Bracket, titles: dict[int | None, str]) -> list[list[dict[str, Any]]]:
    """The rounds for the template."""
    how = {None: "open", "votes": "by votes", "standings": "by standings", "lot": "by lot", "bye": "no match"}
    return [
        [
            {
                "how": how[m.how] if m.open or m.how else "to come",
                "sides": [
                    {"name": titles.get(id, "-"), "votes": n if m.how != "bye" else "", "won": id and id == m.winner}
                    for id, n in ((m.left, m.left_votes), (m.right, m.right_votes))
                ],
            }
            for m in round_
        ]
        for round_ in bracket.rounds
    ]


def scaled(standings: list[Standing]) -> list[dict[str, Any]]:
    """The standings for the template, their intervals in percent of the widest span."""
    low = min((row.strength.low for row in standings), default=0.0)
    span = max((row.strength.high for row in standings), default=1.0) - low + STEP

    def percent(x: float) -> str:
        return f"{100 * x / span:.1f}"

    return [
        {
            "place": row.place,
            "name": printable(row.entry.title),
            "value": f"{row.strength.value:+.2f}",
            "interval": f"{row.strength.low:+.2f} to {row.strength.high:+.2f}",
            "left": percent(row.strength.low - low),
            "middle": percent(row.strength.value - low),
            "width": percent(row.strength.high - row.strength.low),
            "wins": row.wins,
            "losses": row.losses,
            "ties": row.ties,
        }
        for row in standings
    ]


def entry_card(entry: Any) -> dict[str, str]:
    """One entry's text and verdict for the template."""
    s = entry.submission
    greedy = (
        "greedy" if s.sampling.temperature == 0 else f"temperature {s.sampling.temperature:g}, seed {s.sampling.seed}"
    )
    return {
        "name": printable(entry.title),
        "facts": f"{s.n_parameters:,} parameters; {greedy}",
        "prompt": printable(s.prompt),
        "text": printable(s.text),
        "status": entry.status,
        "lines": printable("\n".join(entry.verdict.lines)) if entry.verdict else "not verified yet",
    }
