"""The verbs that others meet a model by: serve, studio and contest. cli.py mounts them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from kobza.config import SampleConfig
from kobza.recipes import recipe
from kobza.serve.config import ServeConfig

Flag = Annotated[bool, Parameter(negative="")]
Words = Annotated[list[str] | None, Parameter(negative="", allow_leading_hyphen=True)]
Json = Annotated[bool, Parameter(negative="", help="print JSON instead of lines")]
Hyphened = Annotated[str, Parameter(allow_leading_hyphen=True)]
Prompt = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
Sample = Annotated[SampleConfig, Parameter(name="*")]
Serve = Annotated[ServeConfig, Parameter(name="*")]


def serve(
    run: Path,
    /,
    *,
    adapter: Words = None,
    name: str = "",
    draft: Path | None = None,
    key: Words = None,
    key_file: Path | None = None,
    allow_origin: Words = None,
    allow_host: Words = None,
    selftest: Flag = False,
    no_selftest: Flag = False,
    json: Json = False,
    config: Serve = ServeConfig(),
) -> int:
    """Serve a model to clients of OpenAI's and of Ollama's interface.

    Before it takes traffic the engine proves on the model itself that a text comes out the same alone and in a batch, after a
    cached prefix and cold, guessed ahead and not; --selftest prints that table and ends.

    Parameters
    ----------
    run
        a run's folder, a checkpoint's, a tuning's (its adapter is merged), a quantised model's, or a pulled model's name
    adapter
        NAME=DIR: serve a tuning of this model beside it, under a name of its own; may be given several times
    name
        what clients call the model; default: the folder's name
    draft
        a smaller model with the same tokenizer, which guesses --guess tokens a step
    key
        what clients must send as `Authorization: Bearer KEY`; may be given several times
    key_file
        a file with a key a line: a key on the command line is seen by every user of the machine
    allow_origin
        another site whose pages may call, as https://example.org
    allow_host
        a name besides this machine's own under which clients may ask
    selftest
        print what the engine proves on itself, and end
    no_selftest
        take traffic without it
    """
    args = (run, name, adapter or [], draft, key or [], key_file, allow_origin or [], allow_host or [])
    return recipe("serve", spin=30_000).main(*args, selftest, no_selftest, json, config)


def studio(
    *,
    runs: Path = Path("runs"),
    host: str = "127.0.0.1",
    port: int = 7860,
    key: Words = None,
    contest: str = "",
    guests: str = "",
    no_browser: Flag = False,
    json: Json = False,
) -> int:
    """Open the studio, a web page of this machine: playground, explorer, runs, reports, and a contest.

    Parameters
    ----------
    runs
        the folder whose runs are shown
    host
        address to listen at; any but this machine's own demands a key
    port
        0: a free one
    key
        what a browser must give as password, where others can reach the page
    contest
        a contest to hold: its host's page is a room of the studio
    guests
        ADDRESS:PORT at which others on the network join the contest, as 0.0.0.0:7861; nothing else can be reached there
    no_browser
        do not open a browser
    """
    return recipe("studio").main(runs, host, port, key or [], contest, guests, not no_browser, json)


contest = App(
    name="contest", help="Who trains the best small model here? Submissions proven by seed, blind votes, a bracket."
)


@contest.command
def new(name: str, /, *, rules: Path | None = None, text: Words = None) -> int:
    """Make a contest in contests/NAME.

    Parameters
    ----------
    rules
        a rules.toml; default: an example that explains itself, to be edited there
    text
        a file that models may be trained on; may be given several times; default: any
    """
    return recipe("contest").new(name, rules, text or [])


@contest.command
def submit(
    name: str,
    run: Path,
    /,
    *,
    prompt: Prompt = None,
    who: Prompt = None,
    json: Json = False,
    sample: Sample = SampleConfig(),
) -> int:
    """Enter a run: its model writes a text, which is verified at once.

    Parameters
    ----------
    name
        of the contest
    run
        a run's folder or a checkpoint's, or the file that `kobza contest pack` wrote on another laptop
    prompt
        what the text goes on from; default: the contest's
    who
        whose entry it is
    """
    return recipe("contest").submit(name, run, prompt, who, sample, json)


@contest.command
def pack(run: Path, /, *, who: Hyphened, out: Path, prompt: Prompt = None, sample: Sample = SampleConfig()) -> int:
    """Write a submission as one file, to be carried to the laptop that holds the contest, or sent in on its page.

    Parameters
    ----------
    run
        a run's folder or a checkpoint's
    who
        whose entry it is
    out
        the file, as mine.kobza
    prompt
        what the text goes on from; the contest may ask for one of its own
    """
    return recipe("contest").pack(run, prompt, who, sample, out)


@contest.command
def verify(name: str, /, *, entry: int | None = None, json: Json = False) -> int:
    """Write every entry's text again from its checkpoint and seed, and refuse what differs or breaks the rules.

    Parameters
    ----------
    name
        of the contest
    entry
        the number of one; default: all that wait for it, or all again
    """
    return recipe("contest").verify(name, entry, json)


@contest.command
def state(name: str, to: str | None = None, /) -> int:
    """Say what the contest does now, or move it on: collecting, voting, closed."""
    return recipe("contest").state(name, to)


@contest.command
def vote(name: str, /, *, who: str) -> int:
    """Compare texts blind, pair after pair, in this terminal.

    Parameters
    ----------
    name
        of the contest
    who
        the voter; one's own entries are not shown
    """
    return recipe("contest").vote(name, who)


@contest.command
def standings(name: str, /, *, json: Json = False) -> int:
    """Print who leads, with intervals (Bradley and Terry 1952)."""
    return recipe("contest").standings(name, json)


@contest.command
def bracket(name: str, /, *, json: Json = False) -> int:
    """Print the knock-out, round after round."""
    return recipe("contest").bracket(name, json)


@contest.command(name="export")
def export_contest(name: str, /, *, out: Path | None = None) -> int:
    """Write entries, votes and standings as CSV, and all of it as one HTML page.

    Parameters
    ----------
    name
        of the contest
    out
        the folder; default: contests/NAME/export
    """
    return recipe("contest").export(name, out)
