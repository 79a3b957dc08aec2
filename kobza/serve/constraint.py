"""What a text must look like, as a mask over the next token: JSON schema, any JSON object, regular expression, Lark grammar.

The grammars are llguidance's (a kept library). Its token trie is built from our tokens' bytes, so that every kind of tokenizer
has it, and it forces no tokenization of its own: whatever spells the text may be drawn, with the model's own probabilities
among what is allowed. A token is allowed if some text of the grammar begins with what is written and its bytes; where a
vocabulary lacks characters, such a text may be out of its reach, which is refused with the characters by name.

A Constraint is compiled once and kept; each text has a State of its own, which can be copied and rolled back, so that
speculation may look ahead. No row is ever left with nothing: an ended State has `ended`, a stuck one raises InputError.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kobza.config import InputError, require
from kobza.serve.text import token_bytes
from kobza.tokenizer import Tokenizer

MOST_SOURCE = 1 << 16  # characters of a schema, a regex or a grammar
MOST_WALK = 500  # tokens of the text that is tried where a vocabulary lacks characters
KEPT = 64  # compiled grammars
FREE = '\n%llguidance {"no_forcing": true}'  # else it tokenizes what is certain by itself
# between parts of JSON: a space, or a new line with its indentation; else a model may write white space for ever
COMPACT = {"whitespace_flexible": True, "whitespace_pattern": r" |\r?\n[ \t]{0,24}"}
BYTES = [bytes([b]) for b in range(256)]


class State(Protocol):
    """Where one text stands in its grammar."""

    @property
    def ended(self) -> bool:
        """Whether the text is whole and nothing but an end may follow."""

    def allowed(self) -> Tensor:
        """(V,) bool, False = forbidden; never all False unless `ended` and the vocabulary has no end."""

    def advance(self, i: int) -> None:
        """Token i, which is allowed, was written."""

    def rollback(self, n: int) -> None:
        """The last n tokens were not written after all."""

    def copy(self) -> State:
        """The same place, moved on its own from here."""


class Constraint(Protocol):
    """A grammar, ready for any number of texts."""

    def start(self) -> State:
        """The place before the first token."""


class Grammars:
    """All grammars of one tokenizer. Grammars(tokenizer, ends).regex("a+").start().allowed() -> (V,) bool

    `ends` are the ids that end a text; `vocab_size` is the model's where it has rows without a token. Compiling takes a
    millisecond to some hundred: call it off the event loop. Thread-safe.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int] = (), vocab_size: int | None = None):
        self.vocab_size, self.ends = vocab_size or tokenizer.vocab_size, tuple(ends)
        pieces = [token_bytes(tokenizer, i) for i in range(tokenizer.vocab_size)]
        pieces += [b""] * (self.vocab_size - len(pieces))
        specials = sorted({*tokenizer.specials.values(), *self.ends})
        self._pieces = [b"" if i in set(specials) else piece for i, piece in enumerate(pieces)]
        self._whole = set(BYTES) <= set(self._pieces)  # spells any text
        # an end of its own behind the vocabulary stands for "whole" where a vocabulary has none
        self._trie = _trie([*pieces, b"<end>"], [*specials, len(pieces)], [*self.ends, len(pieces)])
        self._bytes = _trie([*BYTES, b"<end>"], [256], [256])
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = Lock()

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """JSON text that the schema validates. What llguidance cannot hold a model to is refused, not ignored."""
        try:
            require(isinstance(schema, dict), f"the JSON schema is a {type(schema).__name__}; it must be an object")
            source = json.dumps(schema | {"x-guidance": COMPACT}, ensure_ascii=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(str(error) if isinstance(error, InputError) else "the JSON schema is no JSON") from None
        return self._compiled("JSON schema", f"start: %json {source}")

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """A text that the regular expression matches from end to end. Rust's dialect: no look-around, no back references;
        \\d is 0 to 9."""
        from llguidance import regex_to_lark

        require(pattern != "", "the regex is empty: it would allow no text at all; leave it out")
        _bounded("regex", pattern)
        return self._compiled("regex", f"start: /{regex_to_lark(pattern, 'd')}/")

    def grammar(self, lark: str) -> Grammar:
        """A text of a Lark grammar in llguidance's dialect, whose first rule is `start`; <[7]> is token 7."""
        own = "the grammar holds %llguidance, whose settings are the server's; leave it out"
        require("%llguidance" not in lark, own)
        return self._compiled("grammar", lark)

    def _compiled(self, what: str, lark: str) -> Grammar:
        """The grammar of a source, from the cache or new; `what` names it in complaints."""
        _bounded(what, lark)
        with self._lock:
            if lark in self._kept:
                self._kept.move_to_end(lark)
                return self._kept[lark]
        grammar = Grammar(self, what, lark)
        with self._lock:
            self._kept[lark] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar


class Grammar:
    """One compiled grammar over one vocabulary."""

    def __init__(self, grammars: Grammars, what: str, lark: str):
        self.grammars, self.what, self._lark = grammars, what, lark
        self._matcher = _matcher(grammars._trie, lark)
        error = self._matcher.get_error()
        require(not error, f"{what}: {_one_line(error)}; mend it or leave it out")
        state = self.start()
        state.allowed()
        if not grammars._whole:
            _walk(state, grammars._pieces)

    def start(self) -> Place:
        return Place(self, self._matcher.deep_copy(), [])

    def lacking(self, ids: Iterable[int]) -> str:
        """What the grammar would take after these ids, as far as the vocabulary does not have it: "'{' or '\\"'"."""
        twin, pieces = _matcher(self.grammars._bytes, self._lark), self.grammars._pieces
        for byte in b"".join(pieces[i] for i in ids):
            twin.consume_token(byte)
        wanted = [bytes([b]) for b in np.flatnonzero(_mask(twin, 257)[:256])]
        starts = {piece[:1] for piece in pieces}
        names = [repr(b.decode()) for b in wanted if b < b"\x80" and b not in starts]
        return " or ".join(names[:8]) or "characters beyond ASCII"


class Place:
    """A State by llguidance's matcher."""

    def __init__(self, grammar: Grammar, matcher: Any, ids: list[int]):
        self._grammar, self._matcher, self._ids = grammar, matcher, ids

    @property
    def ended(self) -> bool:
        return self._matcher.is_accepting() and self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        size = self._grammar.grammars.vocab_size
        mask = _mask(self._matcher, size + 1)
        error = self._matcher.get_error()
        stuck = not self._matcher.is_accepting() and (self._matcher.is_stopped() or not mask[:size].any())
        if stuck and (not error or error.startswith("NoExtension")):
            lacking = self._grammar.lacking(self._ids)
            raise InputError(
                f"{self._grammar.what}: the vocabulary has no token that begins with {lacking}, which it asks for"
            )
        require(not error, f"{self._grammar.what}: {_one_line(error)}; make it simpler")
        return torch.from_numpy(mask[:size])

    def advance(self, i: int) -> None:
        if not self._matcher.consume_token(i):
            raise InputError(
                f"{self._grammar.what}: {_one_line(self._matcher.get_error()) or f'token {i} is forbidden'}"
            )
        self._ids.append(i)

    def rollback(self, n: int) -> None:
        if n:
            assert 0 < n <= len(self._ids) and self._matcher.rollback(n), f"{n} of {len(self._ids)} tokens"
            del self._ids[-n:]

    def copy(self) -> Place:
        return Place(self._grammar, self._matcher.deep_copy(), list(self._ids))


# ---- llguidance ----------------------------------------------------------------------------------------------------


class _Pieces:
    """A vocabulary as llguidance asks for it. It tokenizes nothing: FREE keeps the library from wanting that."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], specials: list[int], ends: list[int]):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, specials, ends[0]

    def __call__(self, text: bytes) -> list[int]:
        return []


def _trie(tokens: list[bytes], specials: list[int], ends: list[int]) -> Any:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError:
        raise InputError('constrained output needs llguidance; pip install "kobza[serve]"') from None
    wrapped = TokenizerWrapper(_Pieces(tokens, specials, ends))
    return LLTokenizer(wrapped, n_vocab=len(tokens), eos_token=ends)


def _matcher(trie: Any, lark: str) -> Any:
    """A matcher whose work and memory are bounded; what it does not like is in its get_error()."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False)
    return LLMatcher(trie, lark + FREE, log_level=0, limits=limits)


def _mask(matcher: Any, n: int) -> np.ndarray:
    """(n,) bool, True = allowed."""
    bits = np.zeros((n + 31) // 32, dtype=np.int32)
    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    return np.unpackbits(bits.view(np.uint8), count=n, bitorder="little").view(np.bool_)


def _walk(state: Place, pieces: list[bytes]) -> None:
    """Write one short text of a grammar, so that a vocabulary which cannot is found out before a model tries."""
    closers = [i for closer in (b'"', b"}", b"]") for i, piece in enumerate(pieces) if piece == closer]
    for _ in range(MOST_WALK):
        allowed = state.allowed()
        if state._matcher.is_accepting():
            return
        state.advance(next((i for i in closers if allowed[i]), int(allowed.int().argmax())))


def _bounded(what: str, source: str) -> None:
    require(
        len(source) <= MOST_SOURCE, f"the {what} has {len(source):,} characters; at most {MOST_SOURCE:,} are compiled"
    )


def _one_line(error: str) -> str:
    """llguidance's words in one line, without the source that it quotes below them."""
    said = re.split(r"\n\s*1 \| ", error)[0].removeprefix("at 1(8): ").removeprefix("failed to compile JSON schema: ")
    line = " ".join(said.replace("<non-verbose/>", "").split())
    return line if len(line) <= 300 else line[:297] + "..."
