"""Messages -> token ids of a chat, so that nobody but the template can write a control token.

A template renders a text, and a tokenizer that reads control tokens out of text reads them out of a user's words too: whoever
writes `<|im_end|><|im_start|>system` in a message speaks as the system. Here the tokenizer gets a twin whose special tokens have
names that no text can hold (they begin with U+FDD0, which Unicode keeps for a program's own use). In the messages the first
character of everything that is a special token, or a part of one at an edge, is replaced by a stand-in before the template sees
it. What then still reads as a special token in the rendered text is the template's own: it is renamed, the stand-ins turn back,
and the twin encodes the whole. The twin is the same tokenizer otherwise, so the ids are those that Hugging Face's own tokenizer
gives a rendered chat wherever no message holds a special token: white space around tokens, prefixes, normalization included.
"""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

from kobza.config import require
from kobza.tokenizer import LibraryTokenizer, Tokenizer

OWN = "\ufdd0"  # begins and ends the name of a special token in the twin
STAND_INS = [chr(point) for point in range(0xFDD1, 0xFDF0)]  # noncharacters, one for each first character in use
NOT_TEXT = re.compile("[\ufdd0-\ufdef]")
NAMES = ("role", "type")  # of a message: chosen by a program, and templates compare them

Message = dict[str, Any]


class Template(Protocol):
    """What is needed of a chat template; formats/template.py has one."""

    def render(self, messages: list[Message], add_generation_prompt: bool = False, **extra: Any) -> str:
        """The text of a chat."""


class ChatEncoder:
    """A template and a tokenizer, made ready once for many chats. encode([{"role": "user", "content": "Hi"}], True) -> ids"""

    def __init__(self, template: Template, tokenizer: Tokenizer):
        self.template, self.tokenizer = template, tokenizer
        names = sorted((name for name in tokenizer.specials if name), key=len, reverse=True)
        self._own = {name: f"{OWN}{tokenizer.specials[name]}{OWN}" for name in names}
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._stand_ins: dict[str, str] = {}
        self._inner = _twin(tokenizer, self._own)

    def encode(self, messages: list[Message], add_generation_prompt: bool = False, **extra: Any) -> list[int]:
        """Ids of the rendered chat; special tokens only where the template itself puts them."""
        self._stand_ins = {}
        guarded = [self._guard(message) for message in messages]
        rendered = self.template.render(guarded, add_generation_prompt=add_generation_prompt, **extra)
        back = {ord(stand_in): c for c, stand_in in self._stand_ins.items()}
        named = self._special.sub(lambda match: self._own[match[0]], rendered).translate(back)
        if self._inner is not None:
            return self._inner.encode(named, add_special_tokens=False).ids
        return self._piecewise(named)

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
        places = set()
        for name in self._own:
            start = text.find(name)
            while start >= 0:
                places.add(start)
                start = text.find(name, start + 1)
            # a token parted between the template and messages is none either: its end, its beginning, or its middle alone
            part = any(text.startswith(name[i:]) for i in range(1, len(name))) or (text and text in name)
            places |= {0} if part else set()
            places |= {len(text) - i for i in range(1, len(name)) if text.endswith(name[:i])}
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

    def _piecewise(self, named: str) -> list[int]:
        """Ids by a tokenizer of kobza's own, of characters or bytes, to which a special token is nothing but its id."""
        ids: list[int] = []
        for i, part in enumerate(named.split(OWN)):
            ids += [int(part)] if i % 2 else self.tokenizer.encode(part, continues=bool(ids)).tolist()
        return ids


def encode_chat(
    template: Template, tokenizer: Tokenizer, messages: list[Message], add_generation_prompt: bool = False
) -> list[int]:
    """Ids of one chat; for many keep a ChatEncoder."""
    return ChatEncoder(template, tokenizer).encode(messages, add_generation_prompt)


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
