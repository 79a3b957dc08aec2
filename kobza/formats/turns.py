"""A chat template as data: what stands before and behind each turn. One definition, and every form of it derived from it.

Most chat templates are no more than this. `Turns` renders a conversation itself, writes the Jinja source that transformers,
llama.cpp and kobza serve with, and the Go source for Ollama; tests show all of them equal token by token. A definition is made
by hand, from a text with two turns of example (`turns_from_example`), or found in a Jinja template by probing (`explained`):
render conversations of words that no template has, see what stands between them, then try conversations by the dozen. A
template that does more (drops thoughts, moves the system's words, tells the date) is told from these by what it writes, never
by its source; `Unlike` carries the conversation.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kobza.config import InputError, require
from kobza.formats.template import ChatTemplate

ROLES = ("system", "user", "assistant")
Pair = tuple[str, str]  # what stands before and behind
Messages = list[dict[str, str]]
PLACEHOLDER = re.compile(r"\{(SYSTEM|USER|ASSISTANT|INPUT|OUTPUT)\}")
ALIASES = {"INPUT": "USER", "OUTPUT": "ASSISTANT"}


@dataclass(frozen=True)
class Turns:
    """What a template writes around each turn's words. The assistant's turn ends in `end`, a token, and what may follow it."""

    user: Pair
    assistant: Pair
    end: str
    """the token that ends an answer; it stands in assistant[1]"""
    system: Pair | None = None
    """None: it knows no system and refuses one"""
    inside: bool = False
    """the system's words stand in the first user turn, behind what begins it (Llama 2), not in a turn of their own"""
    default: str | None = None
    """the system's words where none are given; None: then there is no such turn"""
    asking: str | None = None
    """what asks for an answer, where it is not assistant[0]: Llama 2 leaves the space before an answer to the model"""
    bos: str = ""
    closing: str = ""
    """what stands at the end of a conversation that asks nothing (Phi-3's end of text)"""
    trims: tuple[str, ...] = ()
    """roles whose words are trimmed"""
    name: str = "the template"

    def __post_init__(self) -> None:
        held = bool(self.end) and self.end in self.assistant[1]
        require(held, f"{self.name}: no end token in {self.assistant[1]!r}, which stands behind an answer")
        known = self.system is not None or self.default is None
        require(known, f"{self.name}: a default for a system it does not know")

    @property
    def asks(self) -> str:
        """What stands at the end of a conversation that asks for an answer."""
        return self.assistant[0] if self.asking is None else self.asking

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends."""
        return [self.end]

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **extra: Any) -> str:
        """The text of a conversation, as a ChatTemplate's."""
        said = [(message["role"], self._words(message)) for message in messages]
        given = [words for role, words in said[:1] if role == "system"]
        require(not given or self.system is not None, f"{self.name}: knows no system; say it in the first question")
        lead = self._lead(given[0] if given else self.default)
        text = [self.bos, "" if self.inside else lead]
        for i, (role, words) in enumerate(said[len(given) :]):
            require(role in ("user", "assistant"), f"{self.name}: no place for a turn of {role!r} here")
            before, behind = self.user if role == "user" else self.assistant
            text += [before, lead if self.inside and i == 0 and role == "user" else "", words, behind]
        return "".join(text) + (self.asks if add_generation_prompt else self.closing)

    def _words(self, message: Mapping[str, Any]) -> str:
        words = message["content"]
        require(isinstance(words, str), f"{self.name}: a turn's content is a {type(words).__name__}, not a text")
        return words.strip() if message["role"] in self.trims else words

    def _lead(self, words: str | None) -> str:
        """The system's words with what stands around them; "" where there are none."""
        return "" if words is None or self.system is None else self.system[0] + words + self.system[1]

    # ---- for others ----------------------------------------------------------------------------------------------

    def template(self) -> ChatTemplate:
        """The Jinja form, ready to render."""
        return ChatTemplate(self.jinja(), self.bos, self.end, name=self.name)

    def jinja(self) -> str:
        """The source of a Jinja chat template, as tokenizer_config.json and GGUF carry it: every blank between tags is eaten, so
        it means the same with trim_blocks and without. What it has no place for it refuses."""

        def turn(role: str, pair: Pair, message: str = "m", lead: str = "") -> str:
            words = f"({message}.content|trim)" if role in self.trims else f"{message}.content"
            return _sum(_quoted(pair[0]), lead, words, _quoted(pair[1]))

        refused = 'raise_exception("no place here for a turn of " ~ {}.role)'
        given = refused.format("messages[0]")
        if self.system is not None:
            given = turn("system", self.system, "messages[0]")
        return _JINJA.format(
            given=given,
            default=_quoted(self._lead(self.default)),
            start=_sum(_quoted(self.bos), "" if self.inside else "lead"),
            user=turn("user", self.user, lead='(lead if loop.first else "")' if self.inside else ""),
            assistant=turn("assistant", self.assistant),
            refused=refused.format("m"),
            ask=_quoted(self.asks),
            closing=_quoted(self.closing),
        )

    def go(self, added: str | None = None) -> str:
        """The source of Ollama's TEMPLATE. Ollama never asks for less than an answer (no `closing`), and cannot trim or refuse:
        words of `trims` must come trimmed, and a system that is not known is left out.

        added: the token that whoever runs it puts before a text himself; None: `bos`. It is written once.
        """
        start, user, again = self._less(self.bos if added is None else added)
        first, default = 'eq (index $.Messages 0).Role "system"', _write(self._lead(self.default))
        lead = ""
        if self.system is not None:
            given = _write(self.system[0]) + "{{ (index $.Messages 0).Content }}" + _write(self.system[1])
            found, absent = (f"and (eq $i 1) ({first})", "else if eq $i 0") if self.inside else (first, "else")
            otherwise = f"{{{{ {absent} }}}}{default}" if default else ""
            lead = f"{{{{ if {found} }}}}{given}{otherwise}{{{{ end }}}}"
        return _GO.format(
            lead=_write(start) + ("" if self.inside else lead),
            user=again + _write(user) + (lead if self.inside else "") + "{{ .Content }}" + _write(self.user[1]),
            assistant=_write(self.assistant[0]) + "{{ .Content }}" + _write(self.assistant[1]),
            ask=_write(self.asks),
        ).lstrip("\n")

    def _less(self, added: str) -> tuple[str, str, str]:
        """What begins a text, what begins a user's turn, and what is to be written before it in all turns but the first, when
        `added` stands before the text already. Llama 2 begins every turn by <s>."""
        if self.bos.startswith(added):
            return self.bos[len(added) :], self.user[0], ""
        plain = not self.bos and (self.inside or self.system is None) and self.user[0].startswith(added)
        twice = f"{self.name}: begins a text with {(self.bos or self.user[0])[:40]!r}, and what runs it puts {added!r} before"
        require(plain, f"{twice}; no Go form has one without the other")
        return "", self.user[0][len(added) :], f"{{{{ if gt $i 1 }}}}{_write(added)}{{{{ end }}}}"


_JINJA = """\
{{%- if messages and messages[0].role == "system" -%}}
  {{%- set lead = {given} -%}}
  {{%- set rest = messages[1:] -%}}
{{%- else -%}}
  {{%- set lead = {default} -%}}
  {{%- set rest = messages -%}}
{{%- endif -%}}
{{{{- {start} -}}}}
{{%- for m in rest -%}}
  {{%- if m.role == "user" -%}}
    {{{{- {user} -}}}}
  {{%- elif m.role == "assistant" -%}}
    {{{{- {assistant} -}}}}
  {{%- else -%}}
    {{{{- {refused} -}}}}
  {{%- endif -%}}
{{%- endfor -%}}
{{{{- {ask} if add_generation_prompt else {closing} -}}}}"""

_GO = """\
{lead}
{{{{- range $i, $m := .Messages }}}}
{{{{- if eq .Role "user" }}}}{user}
{{{{- else if eq .Role "assistant" }}}}{assistant}
{{{{- end }}}}
{{{{- if and (eq (len (slice $.Messages $i)) 1) (ne .Role "assistant") }}}}{ask}{{{{ end }}}}
{{{{- end }}}}"""


def _quoted(text: str) -> str:
    """A text as Jinja and Go both read it; a backslash by its number, so that none stands before another."""
    return json.dumps(text, ensure_ascii=False).replace("\\\\", "\\u005c")


def _sum(*parts: str) -> str:
    """Expressions of Jinja that make one text, those left out that are empty."""
    return " + ".join(part for part in parts if part not in ("", '""')) or '""'


def _write(text: str) -> str:
    """A Go action that writes a text; the trim marks around reach no further than its quotes. What is not printable goes by its
    number, since a Modelfile loses it: the joiner in an emoji, a space that does not break."""
    shown = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in _quoted(text))
    return f"{{{{ {shown} }}}}" if text else ""


# ---- from an example -------------------------------------------------------------------------------------------------


def turns_from_example(text: str, specials: Collection[str], bos: str = "", name: str = "the example") -> Turns:
    """A definition out of a conversation written down with {SYSTEM} (or without), {USER} and {ASSISTANT} (or {INPUT}, {OUTPUT})
    in place of words. Two turns at least: what stands between turns is seen only there.

    `specials` are the tokenizer's special tokens, of which one must end each answer; `bos` the one that begins a text.
    """
    between, n_system = _placeholders(text.replace("\r\n", "\n"), name)
    start, head, ask, gap, tail = between[0], between[n_system], *between[n_system + 1 : n_system + 3], between[-1]
    end = _first_special(tail, specials)
    require(bool(end), f"{name}: {tail!r} behind the last answer is no end token; end each answer with a special token")
    ways = [n for n in range(len(gap), 0, -1) if gap[:n].rstrip() == tail.rstrip()]
    require(bool(ways), f"{name}: {tail!r} stands behind the last answer and {gap!r} behind one before; end them alike")
    n = next((n for n in ways if head.endswith(gap[n:])), ways[0])  # a line end belongs to the turn before it
    assistant, user = gap[:n], gap[n:]
    behind = assistant if ask.startswith(assistant) else ""
    before = ask[len(behind) :]
    asking = before.rstrip(
        " "
    )  # most tokens begin with a space: it is the answer's, or no token that is known would follow
    made: dict[str, Any] = {"user": (user, behind), "assistant": (before, assistant), "end": end, "name": name}
    made["asking"] = None if asking == before else asking
    if not n_system:
        alike = start in (user, bos + user)
        require(alike, f"{name}: the first question begins {start!r} and others {user!r}; begin them alike")
        return Turns(**made, bos=start.removesuffix(user))
    inside = not head.endswith(user)
    bos = bos if start.startswith(bos + user if inside else bos) else ""
    opening = bos + (user if inside else "")
    placed = f"{name}: {{SYSTEM}} stands neither before the first question, which would begin {user!r}, nor within it"
    require(start.startswith(opening), placed)
    system = (start[len(opening) :], head if inside else head.removesuffix(user))
    return Turns(**made, system=system, inside=inside, bos=bos)


def _placeholders(text: str, name: str) -> tuple[list[str], int]:
    """What stands around the placeholders of an example, whose turns are alike, and whether the first is the system's."""
    parts = PLACEHOLDER.split(text)
    between, roles = parts[0::2], [ALIASES.get(role, role) for role in parts[1::2]]
    n_system, n_turns = int(roles[:1] == ["SYSTEM"]), roles.count("ASSISTANT")
    got = " ".join(f"{{{role}}}" for role in roles[:8]) or "none"
    ordered = roles[n_system:] == ["USER", "ASSISTANT"] * n_turns and n_turns > 0
    order = "{SYSTEM} or nothing, then {USER} and {ASSISTANT} in turn"
    require(ordered, f"{name}: placeholders {got}; write {order}")
    require(n_turns > 1, f"{name}: shows one turn; show two or more, as one cannot show what stands between turns")
    rest = between[n_system + 1 : -1]
    for what, texts in (("a question and its answer", rest[0::2]), ("an answer and the next question", rest[1::2])):
        other = next((text for text in texts if text != texts[0]), None)
        stands = f"{name}: turns differ: between {what} stands {texts[0]!r}, then {other!r}; make them alike"
        require(other is None, stands)
    return between, n_system


def _first_special(text: str, specials: Collection[str]) -> str:
    """The special token that stands first in a text, "" where none does."""
    found = [(text.find(name), -len(name), name) for name in specials if name and name in text]
    return min(found)[2] if found else ""


# ---- out of a template -----------------------------------------------------------------------------------------------

S, U, A = "zqsx", ("zqu0x", "zqu1x"), ("zqa0x", "zqa1x")  # words no template has
PIECES = (
    *("x", "y z", "їжак", "\n", " ", "\n\n", "42", '"', "\\n", "{{ x }}", "{% if %}", "<b>", "👩‍👩‍👧", "日本", "é"),
    *("<|im_end|>", "</s>", "[INST]", "<think>a</think>b", "</think>", "<|end|>", "### User:", "\t"),
)
N_CONVERSATIONS = 40
DAYS = ("2001-02-03T04:05:06", "2034-11-12T13:14:15")


class Unlike(InputError):
    """A template does more than turns: the messages that show it, with nothing in them that could be left out."""

    def __init__(self, said: str, messages: Messages):
        super().__init__(said)
        self.messages = messages


def explained(template: ChatTemplate) -> Turns:
    """The definition, found and tried; Unlike where there is none, another InputError where the template fails."""
    turns = probed(template)
    check_alike(template, turns.render, "by turns it were", conversations(turns.system is not None), False, True)
    return turns


def _messages(*words: str) -> Messages:
    """Words as a conversation: the system's first if they are S, then user and assistant in turn."""
    n_system = int(words[0] == S)
    roles = [*ROLES[:1] * n_system, *ROLES[1:] * len(words)]
    return [{"role": role, "content": said} for role, said in zip(roles, words, strict=False)]


def _alike(ok: bool, said: str, *words: str) -> None:
    """Raise Unlike unless `ok`."""
    if not ok:
        raise Unlike(said, _messages(*words))


def _between(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and behind words; [] where they do not stand in the text once each and in order."""
    parts = re.split("|".join(map(re.escape, words)), text)
    return parts if re.findall("|".join(map(re.escape, words)), text) == list(words) else []


def probed(template: ChatTemplate) -> Turns:
    """The definition that the simplest conversations show, not tried on others."""
    fixed = bool(template.now) or len({replace(template, now=day).render(_messages(U[0])) for day in DAYS}) == 1
    _alike(fixed, "it tells the date", U[0])
    words = [U[0], A[0], U[1], A[1]]
    plain = template.render(_messages(*words))
    shown = _between(plain, words)
    _alike(bool(shown) and shown[1] == shown[3], f"two turns are written {plain[:200]!r}", *words)
    head, ask, gap, _, tail = shown
    common = len(_common(gap, tail))
    behind = tail if common == len(tail) else re.sub(r"(<[^<>]*|\[[^\[\]]*)$", "", tail[:common])  # no half token
    end = _first_special(behind, (template.eos, *re.findall(r"<[^<>]+>|\[[^\[\]]+\[?", behind)))
    _alike(bool(end), f"{behind[:80]!r} stands behind an answer, which is no token", *words)
    user, closing = gap[len(behind) :], tail[len(behind) :]
    single = template.render(_messages(U[0])).removeprefix(head + U[0]).removesuffix(closing)
    known = f"behind a question stands {single[:80]!r}, and {ask[:80]!r} with an answer to it"
    _alike(ask.startswith(single), known, U[0], A[0])
    asked, question = template.render(_messages(U[0]), True), head + U[0] + single
    _alike(asked.startswith(question), f"a question that asks for an answer ends {asked[-80:]!r}", U[0])
    before, asking = ask[len(single) :], asked.removeprefix(question)
    knows = knows_system(template)
    first = f"the first question begins {head[:80]!r}, and others {user[:80]!r}"
    _alike(knows or head.endswith(user), first, U[0], A[0], U[1])
    return Turns(
        (user, single),
        (before, behind),
        end,
        asking=None if asking == before else asking,
        closing=closing,
        trims=tuple(role for role in ROLES if trims(template, role)),
        name=template.name,
        **(_probed_system(template, head, user) if knows else {"bos": head.removesuffix(user)}),
    )


def _probed_system(template: ChatTemplate, head: str, user: str) -> dict[str, Any]:
    """The part of a definition that is about the system: its place, what stands around it, its default, and bos. `head` stands
    before the first question where no system is given, `user` before others."""
    start, behind, *_ = _between(template.render(_messages(S, U[0])), [S, U[0]]) or ("", "")
    inside = not behind.endswith(user)
    bos, default = head.removesuffix(user), None
    if not head.endswith(user) or not start.startswith(bos + (user if inside else "")):
        around = head.startswith(start) and head.endswith(behind) and len(head) >= len(start) + len(behind)
        _alike(around, f"the first question begins {head[:80]!r} without a system, {start[:80]!r} with one", S, U[0])
        default = head[len(start) : len(head) - len(behind)]
        alone = not user.startswith(template.bos)  # SmolLM2's begins every turn
        bos = template.bos if alone and start.startswith(template.bos + (user if inside else "")) else ""
    opening = bos + (user if inside else "")
    _alike(start.startswith(opening), f"a system's words stand behind {start[:80]!r}", S, U[0])
    system = (start.removeprefix(opening), behind if inside else behind.removesuffix(user))
    return {"system": system, "inside": inside, "default": default, "bos": bos}


def knows_system(template: ChatTemplate) -> bool:
    """Whether a system's words are written; a template may refuse them."""
    try:
        return S in template.render(_messages(S, U[0]))
    except InputError:
        return False


def trims(template: ChatTemplate, role: str) -> bool:
    """Whether a role's words lose the white space around them."""
    words = {"system": S, "user": U[0], "assistant": A[0]}
    messages = _messages(*[S] * (role == "system"), U[0], A[0], U[1])
    padded = [m | {"content": f"  {m['content']}\n"} if m["role"] == role else m for m in messages]
    try:
        return f"  {words[role]}\n" not in template.render(padded)
    except InputError:
        return False


def conversations(system: bool, trimmed: Collection[str] = ()) -> Iterator[Messages]:
    """Conversations as odd as users make them, the same ones each time; those of `trimmed` roles without white space around."""
    rng = random.Random(0)
    for i in range(N_CONVERSATIONS):
        said = ["".join(rng.choices(PIECES, k=rng.randint(1, 4))) + "." for _ in range(rng.randint(1, 6))]
        messages = _messages(*said)
        if system and i % 2:
            messages = [{"role": "system", "content": rng.choice(PIECES) + "s"}, *messages]
        yield [m | {"content": m["content"].strip()} if m["role"] in trimmed else m for m in messages]


Render = Callable[[Messages, bool], str]


def check_alike(template: ChatTemplate, other: Render, says: str, talks: Iterable[Messages], *ways: bool) -> None:
    """Raise Unlike with the shortest conversation that another way to render writes otherwise, where one is found.

    says: what leads in the other's text; ways: whether an answer is asked for, one after the other.
    """

    def unlike(messages: Messages) -> tuple[str, str] | None:
        for asks in ways:
            if messages[-1]["role"] == "user" or not asks:
                theirs, ours = template.render(messages, asks), other(messages, asks)
                if theirs != ours:
                    return theirs, ours
        return None

    for messages in talks:
        if unlike(messages) is None:
            continue
        messages = shortest(messages, unlike)
        theirs, ours = unlike(messages) or ("", "")
        place = max(len(_common(theirs, ours)) - 20, 0)
        where = f"{len(messages)} messages, the last {messages[-1]['content'][:40]!r}"
        parts = f"it writes {theirs[place : place + 80]!r}, {says} {ours[place : place + 80]!r}"
        raise Unlike(f"{where}: {parts}", messages)


def shortest(messages: Messages, unlike: Callable[[Messages], Any]) -> Messages:
    """A conversation with messages left out and words cut while it stays unlike; what cannot be rendered is no difference."""

    def stays(messages: Messages) -> bool:
        try:
            return bool(unlike(messages))
        except InputError:
            return False

    while (less := next(filter(stays, _shorter(messages)), None)) is not None:
        messages = less
    return messages


def _shorter(messages: Messages) -> Iterator[Messages]:
    """A conversation less some of its messages, or with fewer words in one; the shortest first."""
    lead = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(lead) :]
    for start in range(len(rest) - 1, 0, -1):
        if rest[start]["role"] == "user":
            yield lead + rest[start:]
    for stop in range(1, len(rest)):
        yield lead + rest[:stop]
    if lead:
        yield rest
    for i, message in enumerate(messages):
        words = message["content"]
        for less in ("x", words[: len(words) // 2], words[len(words) // 2 :], words[1:], words[:-1]):
            if 0 < len(less) < len(words):
                yield [*messages[:i], message | {"content": less}, *messages[i + 1 :]]


def _common(a: str, b: str) -> str:
    """What two texts begin with alike."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]
