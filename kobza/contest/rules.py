"""What a contest allows: rules.toml -> Rules, frozen and checked when made, and what of an entry they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from kobza.config import SampleConfig, check_types, from_dict, load_toml, require

SHA256 = 64  # hexadecimal digits
MOST_TOKENS = 4096  # of a text: people read it, and `verify` computes each token again
EXAMPLE = """\
# The rules of a contest. Leave out what shall stay as it is here; 0 means no limit unless it says otherwise.

title = "Who trains the best small model?"

# --- the model. What a run says of its own training is its owner's word: the seconds and the text can be forged by who
# --- knows how. Proven are the number of weights, that these weights write this text, and what require_replay_steps does.
most_parameters = 2000000
most_seconds = 0.0              # of training, by the run's own clock
data = ""                       # sha256 of the texts to train on, by commas; `kobza contest new --text` fills it in
require_replay_steps = 0        # so many first steps are trained again here and must give the same losses
most_megabytes = 100.0          # of a submission's file

# --- the text
prompt = ""                     # everyone's prompt; empty: each their own
most_prompt_characters = 500    # of one's own prompt
most_tokens = 256               # of the text
temperature_from = 0.0
temperature_to = 2.0
entries_per_person = 1
most_copied_characters = 60     # in a row, word for word out of the training text
most_copied_words = 12

# --- the vote
format = "ranking"              # all pairs are put to the vote; or "knockout": only the matches of the current round
votes_per_pair = 0              # a pair with so many is put to nobody else (ranking)
votes_per_match = 5             # so many decide a match of the bracket, unless they stand even
votes_per_minute = 20           # of one voter
lot = 0                         # the seed of whatever is drawn by lot: places in the bracket, and ties at the very end
"""


@dataclass(frozen=True)
class Rules:
    """The fields of rules.toml; EXAMPLE explains them."""

    title: str = "Who trains the best small model?"
    most_parameters: int = 2_000_000
    most_seconds: float = 0.0
    data: str = ""
    require_replay_steps: int = 0
    most_megabytes: float = 100.0
    prompt: str = ""
    most_prompt_characters: int = 500
    most_tokens: int = 256
    temperature_from: float = 0.0
    temperature_to: float = 2.0
    entries_per_person: int = 1
    most_copied_characters: int = 60
    most_copied_words: int = 12
    format: Literal["ranking", "knockout"] = "ranking"
    votes_per_pair: int = 0
    votes_per_match: int = 5
    votes_per_minute: int = 20
    lot: int = 0

    def __post_init__(self) -> None:
        check_types(self, "rules: ")
        for field in fields(self):
            value = getattr(self, field.name)
            require(isinstance(value, str) or value >= 0, f"rules: {field.name} is {value}; it must not be negative")
        for name in ("votes_per_match", "votes_per_minute", "most_megabytes"):
            require(getattr(self, name) > 0, f"rules: {name} is {getattr(self, name)}; it must be above 0")
        require(len(self.title) <= 200, f"rules: title has {len(self.title):,} characters; at most 200")
        low, high = self.temperature_from, self.temperature_to
        require(low <= high, f"rules: temperature_from {low} is above temperature_to {high}; nothing would be allowed")
        tokens = f"rules: most_tokens is {self.most_tokens}; it must be in [1, {MOST_TOKENS:,}]"
        require(1 <= self.most_tokens <= MOST_TOKENS, tokens)
        for digest in self.texts:
            good = len(digest) == SHA256 and set(digest) <= set("0123456789abcdef")
            require(good, f"rules: data holds {digest[:80]!r}, no sha256 of {SHA256} hexadecimal digits")
        own = not self.prompt or self.most_prompt_characters == Rules.most_prompt_characters
        require(own, "rules: most_prompt_characters has no effect with a prompt for everyone; leave one out")
        ranking = self.format == "ranking" or not self.votes_per_pair
        require(ranking, "rules: votes_per_pair has no effect with format=knockout; take votes_per_match")

    @property
    def texts(self) -> list[str]:
        """The sha256 of each text that may be trained on; empty: any text."""
        return [part.strip().lower() for part in self.data.split(",") if part.strip()]

    @property
    def most_bytes(self) -> int:
        """Of a submission's file."""
        return int(self.most_megabytes * 1e6)


def load_rules(path: Path) -> Rules:
    """The Rules of a rules.toml; an unknown key is refused with the nearest."""
    return from_dict(Rules, load_toml(path), str(path))


def over_in_text(rules: Rules, prompt: str, sampling: SampleConfig) -> Iterator[str]:
    """Why a prompt and its sampling are outside the rules, a line each."""
    if rules.prompt and prompt != rules.prompt:
        yield f"the prompt is {prompt[:80]!r}; this contest's is {rules.prompt[:80]!r}"
    most = rules.most_prompt_characters
    if not rules.prompt and most and len(prompt) > most:
        yield f"the prompt has {len(prompt):,} characters; at most {most:,}"
    if sampling.tokens > rules.most_tokens:
        yield f"the text may have {sampling.tokens:,} tokens (--tokens); at most {rules.most_tokens:,}"
    low, high = rules.temperature_from, rules.temperature_to
    if not low <= sampling.temperature <= high:
        yield f"the temperature is {sampling.temperature:g}; from {low:g} to {high:g}"
    if sampling.alphabet:
        yield f"--alphabet {sampling.alphabet[:80]!r}: a contest has no such limit; leave it out"


def over_in_training(rules: Rules, seconds: float | None) -> Iterator[str]:
    """Why a training is outside the rules. seconds: by its record, None where there is none."""
    if rules.most_seconds and seconds is None:
        yield f"no record says how long it was trained, and at most {rules.most_seconds:g} s are allowed; submit a run"
    if rules.most_seconds and seconds is not None and seconds > rules.most_seconds:
        yield f"it was trained for {seconds:.1f} s; at most {rules.most_seconds:g} s"
