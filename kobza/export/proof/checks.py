"""The checks of a certificate: each asks two engines the same and says in words a person can act on where they part.

A check is measured in a number against a limit, so that a page and a program can read it. An engine that falls over on the way is
a check that fails, not an error of the whole: the certificate says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kobza.config import InputError
from kobza.export.proof.corpus import Corpus, Message
from kobza.export.proof.engine import Engine, EngineError
from kobza.export.proof.places import affordable, spread
from kobza.export.proof.tolerance import Limits, WeightError
from kobza.formats.template import Refused

LENGTH = 64  # ids of a text whose probabilities are asked
LIKELY = 100  # the most likely tokens at each place are compared one by one; the rest by the divergence alone


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    """stable, for programs: ids, weights, ..."""
    what: str
    """in words"""
    ok: bool
    measured: float
    limit: float
    unit: str
    worst: str = ""
    """the worst example, where there is one"""
    note: str = ""


def attempted(name: str, what: str, look: Callable[[], Check | list[Check]]) -> list[Check]:
    """What a look finds; an engine that falls over on the way is a finding too, and so is a file that cannot be read."""
    try:
        found = look()
    except InputError as error:
        return [Check(name, what, False, 1, 0, "could not be asked", str(error))]
    return found if isinstance(found, list) else [found]


# -- text --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What both engines are asked, of which they must say the same."""

    name: str
    what: str
    ask: Callable[[Engine, Any], Any]
    of: Sequence[Any]
    """texts, or conversations"""

    def check(self, reference: Engine, artifact: Engine) -> Check:
        """A refusal is an answer too. The shortest of those that differ is shown."""

        def answer(engine: Engine, one: Any) -> Any:
            try:
                return self.ask(engine, one)
            except Refused:
                return "refused"

        differ = [(x, a, b) for x in self.of if (a := answer(reference, x)) != (b := answer(artifact, x))]
        worst = ""
        if differ:
            one, a, b = min(differ, key=lambda found: len(str(found[0])))
            worst = f"{said(one)} becomes {parting(b, a)}, and in the model that was trained {parting(a, b)}"
        return Check(self.name, self.what, not differ, len(differ), 0, f"of {len(self.of)} differ", worst)


def asked_alike(questions: Iterable[Question], reference: Engine, artifact: Engine) -> list[Check]:
    """The checks of some questions."""
    return [check for q in questions for check in attempted(q.name, q.what, partial(q.check, reference, artifact))]


def said(one: str | Sequence[Message]) -> str:
    """A text or a conversation for a person."""
    return (
        f"text {shortened(one)}" if isinstance(one, str) else shortened([[m["role"], m["content"]] for m in one], 120)
    )


def text_checks(reference: Engine, artifact: Engine, corpus: Corpus) -> list[Check]:
    """Ids, beginnings, decoding, and what becomes of unknown characters."""
    few = corpus.texts[:: max(1, len(corpus.texts) // 40)]

    def decoded(engine: Engine, text: str) -> str:
        return engine.decode(reference.encode(text)).removeprefix(" ")

    questions = (
        Question("ids", "the ids of texts", lambda engine, text: engine.encode(text), corpus.texts),
        Question("begin", "the ids of a text at the beginning", lambda engine, text: engine.begin(text), few),
        Question("decode", "the text of ids", decoded, [text for text in few if text]),
    )
    found = [replace(check, note=corpus.note) for check in asked_alike(questions, reference, artifact)]
    return found + ([_survives(artifact, corpus.unspellable)] if corpus.unspellable else [])


def _survives(artifact: Engine, texts: Sequence[str]) -> Check:
    """The engine reads them somehow or refuses them; nobody but our tokenizer says which is right, so it is only noted."""
    refused, fell = 0, []
    for text in texts:
        try:
            refused += any(not 0 <= i < artifact.vocab_size for i in artifact.encode(text))
        except EngineError as error:
            fell.append(f"text {shortened(text)}: {error}")
        except InputError:
            refused += 1
    note = f"it refuses {refused} of {len(texts)} and makes ids of the others"
    what = "characters that the vocabulary lacks do it no harm"
    return Check("unknown", what, not fell, len(fell), 0, f"of {len(texts)} texts", "".join(fell[:1]), note)


def shortened(value: Any, most: int = 60) -> str:
    """A value for a person, on one line, not long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def parting(value: Any, other: Any) -> str:
    """A value from shortly before it parts from another."""
    if value is None or other is None:
        return "nothing" if value is None else shortened(value)
    at = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other)))
    start = max(0, at - 2)
    return ("... " if start else "") + shortened(value[start:])


# -- chats -------------------------------------------------------------------------------------------------------------


def chat_checks(reference: Engine, artifact: Engine, corpus: Corpus, specials: Sequence[str]) -> list[Check]:
    """The rendered text of conversations, and its ids where no message holds a special token: other engines read those out of
    the words of a message, ours does not."""
    plain = [chat for chat in corpus.conversations if not any(name in m["content"] for m in chat for name in specials)]
    questions = (
        Question(
            "prompts", "the text of conversations", lambda engine, chat: engine.render(chat), corpus.conversations
        ),
        Question("prompt ids", "the ids of conversations", lambda engine, chat: engine.chat(chat), plain),
    )
    return asked_alike(questions, reference, artifact)


# -- ends --------------------------------------------------------------------------------------------------------------


def stop_check(artifact: Engine, ends: Sequence[int], specials: dict[str, int], seed: int) -> Check:
    """Each end stops a generation, and ordinary tokens do not: among them 2 and 11, which llama.cpp takes where a file names no
    end. Special tokens that stop besides are noted: an engine may know their names."""
    names = {i: name for name, i in specials.items()}
    ordinary = [i for i in range(artifact.vocab_size) if i not in names and i not in ends]
    draw = random.Random(seed)
    asked = {i for i in (2, 11) if i in ordinary} | set(draw.sample(ordinary, min(10, len(ordinary))))
    deaf = [i for i in ends if not artifact.stops_at(i)]
    eager = [i for i in sorted(asked) if artifact.stops_at(i)]
    more = [names[i] for i in sorted(names)[:12] if i not in ends and artifact.stops_at(i)]
    words = [f"{names.get(i, i)} (id {i}) ends a text or an answer, and it goes on" for i in deaf]
    words += [f"id {i} is an ordinary token, and it stops there" for i in eager]
    note = f"it also stops at {', '.join(more)}, which the model itself does not" if more else ""
    what = f"it stops at {len(ends)} ends and not at {len(asked)} other tokens"
    wrong = len(deaf) + len(eager)
    return Check("stops", what, not wrong, wrong, 0, "tokens are taken wrongly", "; ".join(words[:3]), note)


# -- what is stored ----------------------------------------------------------------------------------------------------


def weights_check(errors: Iterable[WeightError]) -> Check:
    """The tensor that lies furthest from its source, as a share of what its format may cost."""
    found = list(errors)
    bad = [error for error in found if error.share > 1]
    worst = max(found, key=lambda error: error.share)
    words = f"{worst.name} in {worst.type}: {worst.error:.3g} of its size off, allowed {worst.limit:.3g}"
    words += f"; row {worst.row} is off most" if bad else ""
    words += f"; {len(bad)} of {len(found)} tensors are beyond what they may be" if bad else ""
    what = "each tensor and each row of it against its source"
    return Check("weights", what, not bad, worst.share, 1, "of what its type may cost", words)


def settings_check(differ: Sequence[str]) -> Check:
    """The settings that the artifact's own files give."""
    words = "; ".join(differ[:4])
    what = "the settings in the artifact, read by kobza"
    return Check("settings", what, not differ, len(differ), 0, "differ", words)


# -- probabilities -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """Ids, and the places after which the next token's probabilities are asked."""

    ids: tuple[int, ...]
    places: tuple[int, ...]


def passages(reference: Engine, artifact: Engine, corpus: Corpus, n_places: int = 0) -> dict[str, list[Passage]]:
    """What both are asked, by kind: fixed prose, random ids, held-out text. 0 places: as many as a vocabulary leaves time for."""
    n = (n_places or affordable(reference.vocab_size)) // 3
    most = min(LENGTH, reference.n_ctx, artifact.n_ctx)
    kinds: dict[str, list[Sequence[int]]] = {
        "fixed text": [reference.begin(text) for text in corpus.prose],
        "random ids": [*corpus.random_ids],
        "held-out text": [reference.begin(text) for text in corpus.held_out[:4]],
    }
    found: dict[str, list[Passage]] = {}
    for kind, texts in kinds.items():
        cut = [tuple(ids[:most]) for ids in texts]
        places = spread([len(ids) for ids in cut], n)
        found[kind] = [Passage(ids, tuple(some)) for ids, some in zip(cut, places, strict=True) if some]
    return found


def asked(engine: Engine, texts: Sequence[Passage]) -> Tensor:
    """Log-probabilities at all places, (n, V)."""
    return torch.cat([engine.logprobs(text.ids, text.places) for text in texts])


@dataclass(frozen=True)
class Distance:
    """How far b is from a, both (n, V) log-probabilities."""

    max_logprob: float
    """among the tokens that a finds likely"""
    mean_kl: float
    nll: float
    """mean difference in size of the log-probability of the token that came"""
    flips: int
    """places where another token is the most likely"""
    at: tuple[int, int]
    """place and token of max_logprob"""


def distance(a: Tensor, b: Tensor, came: Tensor) -> Distance:
    """came (n,): the tokens that followed. Tokens that b gives no number for are left out, but not if a finds them likely."""
    given = ~b.isnan()
    a, b = (normalised(table, given) for table in (a, b))
    likely = a.topk(min(LIKELY, a.shape[1]), dim=-1).indices  # (n, k)
    gap = (b - a).abs().masked_fill(~given, torch.inf)
    near = gap.gather(1, likely)  # (n, k)
    place, which = divmod(int(near.argmax()), near.shape[1])
    kl = (a.exp() * (a - b)).masked_fill(~given, 0.0).sum(-1)
    nll = gap.gather(1, came[:, None]).mean()
    flips = int((a.argmax(-1) != b.masked_fill(~given, -torch.inf).argmax(-1)).sum())
    at = (place, int(likely[place, which]))
    return Distance(float(near.max()), float(kl.mean().clamp_min(0)), float(nll), flips, at)


def normalised(table: Tensor, given: Tensor) -> Tensor:
    """Log-probabilities (n, V) whose sum over the given tokens is 1, as far as float64 goes: an engine's own sum is off by what
    float32 rounds, which a divergence would take for one."""
    return table - table.masked_fill(~given, -torch.inf).logsumexp(-1, keepdim=True)


def probability_checks(
    kind: str,
    source: Tensor,
    twin: Tensor,
    got: Tensor,
    came: Tensor,
    engine: Limits,
    cost: float,
    show: Callable[[int], str],
) -> Iterator[Check]:
    """The artifact's answers `got` against the twin's, which is the same weights in our model, and against the source's.

    engine: what its arithmetic may make of it; cost: the divergence that the format alone may cost, the engine's included.
    """
    d, whole = distance(twin, got, came), distance(source, got, came)
    place, token = d.at
    gave, wanted = float(got[place, token]), float(twin[place, token])
    words = f"place {place}: {show(token)} has {gave:.4f}, by the same weights in kobza {wanted:.4f}"
    what = f"log-probabilities on {kind}, against the same weights in kobza"
    unit = f"nats, the largest of {len(came)} places"
    yield Check(
        "probabilities", what, d.max_logprob <= engine.max_logprob, d.max_logprob, engine.max_logprob, unit, words
    )
    what = f"divergence on {kind}, against the same weights in kobza"
    yield Check("engine", what, d.mean_kl <= engine.mean_kl, d.mean_kl, engine.mean_kl, "nats a token")
    what = f"divergence on {kind}, against the model that was trained"
    words = f"{whole.flips} of {len(came)} places have another most likely token" if whole.flips else ""
    yield Check("divergence", what, whole.mean_kl <= cost, whole.mean_kl, cost, "nats a token", words)
