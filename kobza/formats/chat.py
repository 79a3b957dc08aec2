"""Messages -> token ids of a chat, so that nobody but the template can write a control token.

A template renders a text, and a tokenizer that reads control tokens out of text reads them out of a user's words too: whoever
writes `<|im_end|><|im_start|>system` in a message speaks as the system. Here the tokenizer gets a twin whose special tokens have
names that no text can hold (they begin with U+FDD0, which Unicode keeps for a program's own use). In the messages the first
character of everything that is a special token, or a part of one at an edge, is replaced by a stand-in before the template sees
it. What then still reads as a special token in the rendered text is the template's own: it is renamed, the stand-ins turn back,
and the twin encodes the whole. The twin is the same tokenizer otherwise, so the ids are those that Hugging Face's own tokenizer
gives a rendered chat wherever no message holds a special token: white space around tokens, prefixes, normalization included.

Training sees what serving sees. A server encodes the messages up to an answer, asks for it, and then reads token by token up to
one that ends the turn. `encode_learned` marks exactly these tokens in the ids of the whole conversation, and only if what the
server sent is the beginning of the whole, in text and in ids. Where it is not (a template that drops earlier thoughts, a token
that spans prompt and answer) it raises Rewritten, and `encode_answer` gives the one form that is always right: the ids the
server sends for this answer, then those of the answer as they go on from there. What ends a turn is found by probing, not by a
list: the first token of the template's own behind an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cached_property
from typing import Any, Literal, Protocol

from kobza.config import InputError, require
from kobza.tokenizer import LibraryTokenizer, Tokenizer

OWN = "\ufdd0"  # begins and ends the name of a special token in the twin
STAND_INS = [chr(point) for point in range(0xFDD1, 0xFDF0)]  # noncharacters, one for each first character in use
NOT_TEXT = re.compile("[\ufdd0-\ufdef]")
NAMES = ("role", "type")  # of a message: chosen by a program, and templates compare them
THOUGHTS = (  # what opens and closes a reasoning: Qwen and DeepSeek, Mistral, Seed, Cohere, Granite
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thinking>", "</thinking>"),
)
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # where a message may have it apart from its content
PROBE = [
    {"role": role, "content": f"zq{i}x"} for i, role in enumerate(("user", "assistant", "user", "assistant"))
]  # a conversation whose words no template has

Message = dict[str, Any]


class Template(Protocol):
    """What is needed of a chat template; formats/template.py has one."""

    def render(self, messages: list[Message], add_generation_prompt: bool = False, **extra: Any) -> str:
        """The text of a chat."""


class Rewritten(InputError):
    """A conversation's past reads otherwise than when its answer was due, so no one row holds both; see encode_answer."""


class ChatEncoder:
    """A template and a tokenizer, made ready once for many chats. encode([{"role": "user", "content": "Hi"}], True) -> ids

    `stops`: the ids a model stops at, where they are known. Of several tokens behind an answer the one among them ends it."""

    def __init__(self, template: Template, tokenizer: Tokenizer, stops: Collection[int] = ()):
        self.template, self.tokenizer, self.stops = template, tokenizer, frozenset(stops)
        self._name = getattr(template, "name", "the template")
        names = sorted((name for name in tokenizer.specials if name), key=len, reverse=True)
        self._own = {name: f"{OWN}{tokenizer.specials[name]}{OWN}" for name in names}
        any_of_them = "|".join(map(re.escape, names)) or r"(?!)"
        self._special, self._overlapping = re.compile(any_of_them), re.compile(f"(?={any_of_them})")
        self._ends_of_names = {name[i:] for name in names for i in range(1, len(name))}
        self._starts_of_names = {name[:i] for name in names for i in range(1, len(name))}
        self._names = "\0".join(names)
        self._stand_ins: dict[str, str] = {}
        self._texts: dict[tuple[int, bool], str] = {}  # of the conversation in hand
        self._inner = _twin(tokenizer, self._own)

    def encode(self, messages: list[Message], add_generation_prompt: bool = False, **extra: Any) -> list[int]:
        """Ids of the rendered chat; special tokens only where the template itself puts them."""
        self._open(messages, extra)
        return self._ids(self._text(len(messages), add_generation_prompt))

    def encode_learned(
        self,
        messages: list[Message],
        learn: Literal["answers", "last", "all"] = "answers",
        reasoning: Literal["learned", "masked"] = "learned",
        **extra: Any,
    ) -> tuple[list[int], list[bool]]:
        """The ids of encode(messages), and which of them are learned: of every answer ("answers") or the last, what a model
        writes after the ids of encode(messages before it, True), the token that ends the turn included; or "all".

        "masked" leaves the reasoning within an answer out, its marks stay. A template that leaves a last answer open (GLM's:
        the next question's mark ends it) gets it closed as it closes the others. Raises Rewritten where the whole shows an
        answer, or what was before it, otherwise than when the answer was due.
        """
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        require(bool(answers), "the conversation has no answer to learn")
        self._open(messages, extra)
        whole = self._text(len(messages), False)
        asked = [self._answer(k) for k in (answers if learn == "answers" else answers[-1:])]
        last = "".join(asked[-1])
        whole = last if last.startswith(whole) else whole
        ids = self._ids(whole)
        if learn == "all":
            lost = self._lost(messages, whole)
            require(not lost, lost)
            return ids, [False] + [True] * (len(ids) - 1)
        learned = [False] * len(ids)
        for prompt, answer in asked:
            start = self._ids(prompt)
            self._check_past(prompt, answer, whole, start, ids)
            stops = [i for i in range(len(start), len(ids)) if ids[i] in self._end_ids]
            stop = stops[len(self._ending.findall(answer)) - 1] + 1  # gpt-oss ends its reasoning as it ends a turn
            learned[len(start) : stop] = [True] * (stop - len(start))
            if reasoning == "masked":
                self._mask_thought(prompt, answer, ids, learned)
        return ids, learned

    def encode_answer(
        self, messages: list[Message], reasoning: Literal["learned", "masked"] = "learned", **extra: Any
    ) -> tuple[list[int], list[bool]]:
        """The ids a server sends for the last message, an answer, then the answer's up to the token that ends it; only those
        are learned. Right with every template; the past's answers are context."""
        require(bool(messages) and messages[-1]["role"] == "assistant", "the conversation does not end in an answer")
        self._open(messages, extra)
        prompt, answer = self._answer(len(messages) - 1)
        start, ids = self._ids(prompt), self._ids(prompt + answer)
        if ids[: len(start)] != start:
            ids = start + self._piecewise(self._named(answer), continues=True)
        learned = [False] * len(start) + [True] * (len(ids) - len(start))
        if reasoning == "masked":
            self._mask_thought(prompt, answer, ids, learned)
        return ids, learned

    @cached_property
    def ends(self) -> dict[str, int]:
        """The special tokens that end an answer, by name: what the template itself writes first behind one, between turns and
        at the end of a conversation (gpt-oss has two)."""
        text = self.template.render(PROBE)
        places = [text.find(message["content"]) for message in PROBE]
        shown = min(places) >= 0 and places == sorted(places)
        require(shown, f"{self._name}: does not show all turns of a conversation; give another template")
        names = set()
        for behind in (text[places[1] : places[2]], text[places[3] :]):
            found = self._special.findall(behind)
            names |= set([name for name in found if self.tokenizer.specials[name] in self.stops][:1] or found[:1])
        behind = text[places[1] : places[2]].removeprefix(PROBE[1]["content"])
        require(
            bool(names),
            f"{self._name}: {behind[:40]!r} stands behind an answer and holds no token of this tokenizer, so no model would "
            "learn to stop; give the tokenizer that the template was made for, or another template",
        )
        return {name: self.tokenizer.specials[name] for name in sorted(names)}

    # ---- a conversation in text ----------------------------------------------------------------------------------

    def _open(self, messages: list[Message], extra: dict[str, Any]) -> None:
        """Make a conversation the one that `_text` renders; its stand-ins hold until the next is opened."""
        self._stand_ins = {}
        self._messages, self._extra, self._texts = messages, extra, {}
        self._guarded_messages = [self._guard(message) for message in messages]

    def _text(self, n: int, ask: bool) -> str:
        """The first n messages, rendered."""
        if (n, ask) not in self._texts:
            said = self._guarded_messages[:n]
            self._texts[n, ask] = self.template.render(said, add_generation_prompt=ask, **self._extra)
        return self._texts[n, ask]

    def _answer(self, k: int) -> tuple[str, str]:
        """What a server sends for message k, an answer, and what the model writes: the answer as it ends a conversation, with
        the token that ends it."""
        prompt, whole = self._text(k, True), self._text(k + 1, False)
        lost = self._lost(self._messages[:k], prompt) or self._lost(self._messages[k : k + 1], whole, k)
        require(not lost, lost)
        tail = whole[len(prompt) :] if whole.startswith(prompt) else self._reopened(k, prompt, whole)
        found = list(self._ending.finditer(tail))
        answer = tail[: found[-1].end()] if found else tail + next(iter(self.ends))
        thought = _thought(self._guarded_messages[k])
        if thought not in answer:
            what = f"the reasoning of an answer ({self._plain(thought)[:40]!r})"
            raise InputError(f"{self._name}: drops {what}; leave it out, or give another template")
        return prompt, answer

    def _lost(self, messages: list[Message], text: str, first: int = 0) -> str:
        """Which of the messages from `first` on a rendered text leaves out, as a complaint; "" where it has them all."""
        words = self._words(text)
        for message, safe in zip(messages, self._guarded_messages[first:], strict=False):
            if _shown(safe) not in words:
                what = f"what the {message['role']} says ({_shown(message)[:40]!r})"
                return f"{self._name}: drops {what}; leave it out, or give another template"
        return ""

    def _reopened(self, k: int, prompt: str, whole: str) -> str:
        """What follows a prompt that is not the beginning of the whole: the answer as the whole shows it; where the prompt opens
        a reasoning (DeepSeek-R1, GLM) that the whole leaves out or writes otherwise, that reasoning first, and its close."""
        plain, message = self._plain(prompt).rstrip(), self._guarded_messages[k]
        shown = whole[self._words(whole).rfind(_shown(message)) :]
        for mark, close in THOUGHTS:
            if not plain.endswith(mark):
                continue
            header = prompt[: len(plain) - len(mark)]
            shown = whole[len(header) :] if whole.startswith(header) else shown
            thought, closes, rest = shown.partition(close)
            if closes:
                return thought.removeprefix(mark).lstrip() + closes + rest
            return f"{_thought(message)}\n{close}\n\n{shown}"
        return shown

    def _check_past(self, prompt: str, answer: str, whole: str, start: list[int], ids: list[int]) -> None:
        """Raise Rewritten where what was sent for an answer, with the answer, is not the beginning of the whole."""
        once = prompt + answer
        if not whole.startswith(once):
            place = next((i for i, (a, b) in enumerate(zip(once, whole, strict=False)) if a != b), len(whole))
            was, now = (self._plain(text)[max(place - 20, 0) : place + 20] for text in (once, whole))
            raise Rewritten(f"{was!r} when an answer is due reads {now!r} once the conversation goes on")
        if ids[: len(start)] != start:
            edge = self._plain(whole)[max(len(prompt) - 10, 0) : len(prompt) + 10]
            raise Rewritten(f"a token spans the end of a prompt and the beginning of its answer: {edge!r}")

    def _mask_thought(self, prompt: str, answer: str, ids: list[int], learned: list[bool]) -> None:
        """Unlearn what stands between the marks of a reasoning in an answer; the ids begin with those of prompt + answer."""
        text = prompt + answer
        plain = self._plain(text)
        for mark, close in THOUGHTS:
            stop = plain.find(close, len(prompt))
            opened = plain.find(mark, max(len(prompt) - len(mark) - 2, 0), max(stop, 0))  # maybe the prompt's end
            if stop >= 0 and opened >= 0:
                first, last = (_n_common(self._ids(text[:i]), ids) for i in (opened + len(mark), stop))
                learned[first:last] = [False] * (last - first)
                return

    def _words(self, rendered: str) -> str:
        """A rendered text without the names of special tokens, of the same length."""
        return self._special.sub(lambda match: OWN * len(match[0]), rendered)

    def _plain(self, rendered: str) -> str:
        """A rendered text without stand-ins, of the same length."""
        return rendered.translate({ord(stand_in): c for c, stand_in in self._stand_ins.items()})

    def _named(self, rendered: str) -> str:
        """A rendered text as the twin reads it."""
        return self._plain(self._special.sub(lambda match: self._own[match[0]], rendered))

    def _ids(self, rendered: str) -> list[int]:
        named = self._named(rendered)
        if self._inner is not None:
            return self._inner.encode(named, add_special_tokens=False).ids
        return self._piecewise(named)

    @cached_property
    def _ending(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.ends)))

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        return frozenset(self.ends.values())

    # ---- words that are no tokens --------------------------------------------------------------------------------

    def _guard(self, value: Any, key: str = "") -> Any:
        """The same message with no text in it that is, begins or ends a special token."""
        if isinstance(value, dict):
            return {name: self._guard(part, name) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(part, key) for part in value]
        return value if not isinstance(value, str) or key in NAMES else self._guarded(value)

    def _guarded(self, text: str) -> str:
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # half a surrogate pair is no text
        found = NOT_TEXT.search(text)
        require(found is None, f"a message holds U+{ord((found or ' ')[0]):04X}, which is no character; leave it out")
        places = {match.start() for match in self._overlapping.finditer(text)}
        # a token parted between the template and messages is none either: its end, its beginning, or its middle alone
        longest = range(1, max(map(len, self._own), default=0))
        part = any(text[:n] in self._ends_of_names for n in longest) or (text and text in self._names)
        places |= {0} if part else set()
        places |= {len(text) - n for n in longest if n <= len(text) and text[-n:] in self._starts_of_names}
        characters = list(text)
        for place in places:
            characters[place] = self._stand_in(characters[place])
        return "".join(characters)

    def _stand_in(self, character: str) -> str:
        """The noncharacter that keeps a character's place while the template works."""
        if character not in self._stand_ins:
            free = len(self._stand_ins) < len(STAND_INS)
            require(free, "the messages hold pieces of special tokens of too many kinds; shorten them")
            self._stand_ins[character] = STAND_INS[len(self._stand_ins)]
        return self._stand_ins[character]

    def _piecewise(self, named: str, continues: bool = False) -> list[int]:
        """Ids by the tokenizer itself, to which a special token is nothing but its id: kobza's own kinds, of characters or bytes,
        and a text that goes on from another."""
        ids: list[int] = []
        for i, part in enumerate(named.split(OWN)):
            ids += [int(part)] if i % 2 else self.tokenizer.encode(part, continues=continues or bool(ids)).tolist()
        return ids


def encode_chat(
    template: Template, tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool = False
) -> list[int]:
    """Ids of one chat; for many keep a ChatEncoder."""
    return ChatEncoder(template, tokenizer).encode(messages, add_generation_prompt)


def _shown(message: Message) -> str:
    """What of a message must stand in the rendered text: its words, of an answer those behind its reasoning."""
    content = message.get("content")
    if not isinstance(content, str) or message["role"] == "tool":  # parts and results are shown in many ways
        return ""
    if message["role"] == "assistant":
        for _, close in THOUGHTS:
            content = content.rpartition(close)[2]
    return content.strip()


def _thought(message: Message) -> str:
    """The reasoning of an answer: a field of its own, or the part of the content before what closes one; else ""."""
    apart = next((message[key] for key in THOUGHT_KEYS if isinstance(message.get(key), str)), "")
    content = message.get("content")
    for mark, close in THOUGHTS:
        if not apart and isinstance(content, str) and close in content:
            apart = content.rpartition(close)[0].removeprefix(mark)
    return apart.strip()


def has_thought(message: Message) -> bool:
    """Whether a message is an answer with a reasoning, in a field of its own or between marks in its content."""
    return message["role"] == "assistant" and bool(_thought(message))


def _n_common(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _twin(tokenizer: Tokenizer, own: dict[str, str]) -> Any:
    """The `tokenizers` library's tokenizer with special tokens under other names, which it reads out of a text; None for kinds
    that are not the library's."""
    if not isinstance(tokenizer, LibraryTokenizer):
        return None
    content = json.loads(tokenizer.to_json())
    content["post_processor"] = content["truncation"] = content["padding"] = None
    for token in content["added_tokens"]:
        token["content"] = own.get(token["content"], token["content"]) if token["special"] else token["content"]
    model = content["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {own.get(name, name): i for name, i in vocab.items()}
    else:
        model["vocab"] = [[own.get(name, name), score] for name, score in vocab]
    if model.get("unk_token"):
        model["unk_token"] = own.get(model["unk_token"], model["unk_token"])
    inner = LibraryTokenizer(json.dumps(content, ensure_ascii=False)).inner
    inner.encode_special_tokens = False
    return inner
