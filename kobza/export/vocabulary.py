"""A tokenizer -> the `tokenizer.*` metadata of a GGUF by which llama.cpp makes the same ids of any text.

llama.cpp has tokenizers of its own and a GGUF only settings for them, so each of our kinds is put into the form that amounts to
the same there, or refused with the reason: characters and bytes into byte-level BPE (formats/gguf_tokens.py), byte-level BPE with
the pre-tokenizer that does the same (pretokenizer.py), SentencePiece's BPE by scores (sentencepiece.py). Special tokens are
CONTROL, which llama.cpp, like us, never reads out of a text; those that we read whole are USER_DEFINED; a row without a token is
[PAD7].

The ends need care: llama.cpp takes an end token whether a file names one or not, id 11 for byte-level BPE, and it stops at others
by their names. `notes` says what cannot be helped, `exceptions` which texts are concerned.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kobza.config import require
from kobza.export.pretokenizer import pre_tokenizer
from kobza.export.sentencepiece import scores
from kobza.formats.gguf_tokens import (
    BYTE,
    BYTE_NAMES,
    CONTROL,
    NORMAL,
    SYMBOLS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    characters_to_tokens,
    escaped,
)
from kobza.formats.template import ChatTemplate
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer, Tokenizer

Entries = dict[str, tuple[str, Any]]
ANY = "smollm"  # for characters and bytes any pattern will do; this one's detokenizer takes no spaces away
# What llama.cpp does by a token's name alone, whatever the file says: it ends an answer,
STOPS = {
    *"<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <eos>".split(),
    *"<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <turn|> <|tool_response> [e~[".split(),
    "<｜end▁of▁sentence｜>",
}
INFILL_STOPS = {  # or so, these being for the filling in of code,
    *"<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split(),
    "<|file_sep|>",
}
INFILL = {  # or it does not read it out of a text, as it does not those above,
    *"<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>".split(),
    *"<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>".split(),
    *"<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>".split(),
}
READ = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}  # or it does, though it be special


@dataclass(frozen=True)
class Form:
    """A vocabulary as one of llama.cpp's tokenizers takes it; `tokens` by id, None for an id without one."""

    model: str
    tokens: list[str | None]
    kinds: list[int]
    more: Entries = field(default_factory=dict)


def vocabulary(
    tokenizer: Tokenizer, n_rows: int, ends: Sequence[int] = (), template: ChatTemplate | None = None
) -> Entries:
    """{"tokenizer.ggml.model": ("string", "gpt2"), ...} of a model with n_rows rows; `ends` are the ids that end a text."""
    n = tokenizer.vocab_size
    require(n <= n_rows, f"{n:,} tokens for a model of {n_rows:,} rows: another model's tokenizer; give the right one")
    known = _known_ends(tokenizer, n_rows, ends, template)
    form = _form(tokenizer, bool(known))
    names, kinds = _rows(form, n_rows)
    entries: Entries = {"model": ("string", form.model)} | form.more
    entries |= {"tokens": ("array:string", names), "token_type": ("array:int32", kinds)}
    edges = _edges(tokenizer, names, known, template)
    entries |= {f"{edge}_token_id": ("uint32", i) for edge, i in edges.items()}
    entries["add_bos_token"] = ("bool", tokenizer.bos_id is not None)
    entries["add_eos_token"] = ("bool", False)
    found = {f"tokenizer.ggml.{key}": entry for key, entry in entries.items()}
    if template is not None:
        found["tokenizer.chat_template"] = ("string", _template_source(template, names, edges))
    return found


def exceptions(tokenizer: Tokenizer) -> dict[str, Callable[[str], bool]]:
    """{what llama.cpp cannot do with this vocabulary: whether a text gets other ids by it}."""
    found: dict[str, Callable[[str], bool]] = {}
    unlike = READ & {*tokenizer.specials}
    if isinstance(tokenizer, LibraryTokenizer):
        added = tokenizer.inner.get_added_tokens_decoder().values()
        unlike |= (STOPS | INFILL_STOPS | INFILL) & {token.content for token in added if not token.special}
        if _normalizers(json.loads(tokenizer.to_json())["normalizer"]) == [NFC]:
            why = "llama.cpp does not normalize: a text that is not in NFC gets other ids"
            found[why] = lambda text: not unicodedata.is_normalized("NFC", text)
        lacks = {*range(256)} - {piece[0] for piece in tokenizer.pieces if len(piece) == 1}
        if lacks:
            named = " ".join(f"{b:02x}" for b in sorted(lacks))
            why = f"llama.cpp does not join what is around a byte that the vocabulary lacks ({named}), and the library does"
            found[why] = lambda text: not lacks.isdisjoint(text.encode("utf-8", "replace"))
    if unlike:
        why = f"llama.cpp takes {', '.join(sorted(unlike))} by the name for what it is not here, where a text spells it"
        found[why] = lambda text: any(name in text for name in unlike)
    return found


def notes(tokenizer: Tokenizer, ends: Sequence[int] = ()) -> list[str]:
    """What llama.cpp does otherwise with this vocabulary, in words."""
    tokens = tokenizer.inner.get_vocab() if isinstance(tokenizer, LibraryTokenizer) else tokenizer.specials
    known = ends or tokenizer.ends
    also = sorted(token for token, i in tokens.items() if token in STOPS | INFILL_STOPS and i not in known)
    said = [f"llama.cpp ends an answer at {', '.join(also)} too, by the name"] if also else []
    return [*exceptions(tokenizer), *said]


# ---- forms ---------------------------------------------------------------------------------------------------------

NFC = {"type": "NFC"}


def _form(tokenizer: Tokenizer, ends: bool) -> Form:
    """The vocabulary in llama.cpp's terms. `ends`: there is a token at which a text may end."""
    if isinstance(tokenizer, CharTokenizer):
        return _characters(tokenizer) if ends else _ascii(tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        kinds = [NORMAL] * 256 + [CONTROL] * len(tokenizer.specials)
        return Form("gpt2", [*SYMBOLS, *tokenizer.specials], kinds, _bpe([]))
    assert isinstance(tokenizer, LibraryTokenizer)
    content = json.loads(tokenizer.to_json())
    kind, decoder = content["model"]["type"], json.dumps(content["decoder"])
    other = f"llama.cpp has no tokenizer that equals this {kind} one; export --to hf"
    require(kind == "BPE" and ("ByteLevel" in decoder or "ByteFallback" in decoder), other)
    return _byte_level(tokenizer, content) if "ByteLevel" in decoder else _sentencepiece(tokenizer, content)


def _bpe(merges: list[str], pre: str = ANY) -> Entries:
    return {"pre": ("string", pre), "merges": ("array:string", merges)}


def _characters(tokenizer: CharTokenizer) -> Form:
    tokens, kinds, merges = characters_to_tokens(tokenizer.characters, tokenizer.unknown == "bytes")
    return Form("gpt2", [*tokens, *tokenizer.specials], kinds + [CONTROL] * len(tokenizer.specials), _bpe(merges))


def _ascii(tokenizer: CharTokenizer) -> Form:
    """Characters without any token that could be the end: of llama.cpp's tokenizers only `rwkv` needs none. It looks for the
    longest token at a place and would look for ever where a character begins like one it knows: so for ASCII only."""
    plain = tokenizer.characters.isascii() and tokenizer.unknown == "error"
    none = "llama.cpp must have a token that ends a text, and this tokenizer of characters has none"
    require(plain, f"{none}; train with --data.bos or --data.unknown bytes, or export --to hf")
    tokens, kinds = [escaped(c) for c in tokenizer.characters], [NORMAL] * len(tokenizer.characters)
    spare = max(tokenizer.characters.find(" "), 0)  # for any byte that is none of them, which else would get the id -1
    return Form("rwkv", tokens, kinds, {"unknown_token_id": ("uint32", spare)})


def _normalizers(part: Any) -> list[Any]:
    """The steps of a normalizer of tokenizer.json."""
    if part is None or part["type"] != "Sequence":
        return [] if part is None else [part]
    return [step for one in part["normalizers"] for step in _normalizers(one)]


def _byte_level(tokenizer: LibraryTokenizer, content: dict[str, Any]) -> Form:
    model, normalizers = content["model"], _normalizers(content["normalizer"])
    shown = f"llama.cpp does not normalize, and this tokenizer does: {json.dumps(normalizers)[:80]}; export --to hf"
    require(normalizers in ([], [NFC]), shown)
    spaced = "this tokenizer puts a space before every text, and llama.cpp's byte-level BPE none; export --to hf"
    require(not tokenizer.prefix, spaced)
    odd = [key for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    require(not odd, f"this tokenizer.json's model has {''.join(odd[:1])}, which llama.cpp has not; export --to hf")
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
    ]  # or pairs: newer files
    pre = pre_tokenizer(tokenizer, composed=bool(normalizers))
    return Form("gpt2", *_named(tokenizer, content), _bpe(merges, pre))


def _sentencepiece(tokenizer: LibraryTokenizer, content: dict[str, Any]) -> Form:
    tokens, kinds = _named(tokenizer, content)
    vocab, unknown = content["model"]["vocab"], content["model"].get("unk_token")
    lacking = "llama.cpp spells what is no token by bytes, and this vocabulary has not all of them; export --to hf"
    require(all(name in vocab for name in BYTE_NAMES), lacking)
    of_name = dict.fromkeys(BYTE_NAMES, BYTE) | {unknown: UNKNOWN}
    kinds = [of_name.get(token, kind) for token, kind in zip(tokens, kinds, strict=True)]
    ranked = scores(tokenizer, content)
    more: Entries = {"scores": ("array:float32", [ranked.get(token or "", 0.0) for token in tokens])}
    more["add_space_prefix"] = ("bool", bool(tokenizer.prefix))
    return Form("llama", tokens, kinds, more | ({"unknown_token_id": ("uint32", vocab[unknown])} if unknown else {}))


def _named(tokenizer: LibraryTokenizer, content: dict[str, Any]) -> tuple[list[str | None], list[int]]:
    """The token of each id and its kind."""
    tokens: list[str | None] = [None] * tokenizer.vocab_size
    kinds = [UNUSED] * tokenizer.vocab_size
    for token, i in content["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for i, added in tokenizer.inner.get_added_tokens_decoder().items():
        odd = [flag for flag in ("single_word", "lstrip", "rstrip") if getattr(added, flag) and not added.special]
        why = f"the token {added.content!r} is {''.join(odd[:1])}, which llama.cpp does not know; export --to hf"
        require(not odd, why)
        tokens[i], kinds[i] = added.content, CONTROL if added.special else USER_DEFINED
    return tokens, kinds


def _rows(form: Form, n_rows: int) -> tuple[list[str], list[int]]:
    """Name and kind of each row; what has no token is [PAD7]."""
    tokens = [*form.tokens, *[None] * (n_rows - len(form.tokens))]
    names = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    twice = len(names) - len(set(names))
    many = f"{twice} of the {n_rows:,} tokens have another's name in a GGUF"
    require(not twice, f"{many}; rename special ones, or export --to hf")
    return names, form.kinds + [UNUSED] * (n_rows - len(form.kinds))


# ---- beginning and end ---------------------------------------------------------------------------------------------


def _known_ends(tokenizer: Tokenizer, n_rows: int, ends: Sequence[int], template: ChatTemplate | None) -> list[int]:
    """Where llama.cpp shall end a text, first what it calls eos. Without an end of our own it is what no text has, lest a text
    end at some letter: the byte 0xFF, or a row without a token; where there is neither, the token that begins a text."""
    bad = [i for i in ends if not 0 <= i < tokenizer.vocab_size]
    remedy = "give the tokenizer the model was trained with"
    require(not bad, f"the ends {bad} are no ids below {tokenizer.vocab_size:,}; {remedy}")
    first = None if template is None else tokenizer.specials.get(template.eos)
    found = list(dict.fromkeys([*([first] if first in ends else []), *(ends or tokenizer.ends)]))
    never = [i for i, piece in enumerate(tokenizer.pieces) if piece == b"\xff"] + [*range(tokenizer.vocab_size, n_rows)]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return found or never[:1] or begin


def _edges(tokenizer: Tokenizer, names: list[str], ends: list[int], template: ChatTemplate | None) -> dict[str, int]:
    """{"bos": id, "eos": id, ...}. Of further ends two have keys of their own; any others must be known by their names."""
    if not ends:
        return {}
    further = sorted(ends[1:], key=lambda i: names[i] in STOPS)
    silent = [names[i] for i in further[2:] if names[i] not in STOPS]
    many = f"a GGUF has room for three ends of a text, and {', '.join(silent)} would be too many"
    require(not silent, f"{many}; leave some out")
    found = {"bos": ends[0], "eos": ends[0]} | dict(zip(("eot", "eom"), further, strict=False))
    if template is not None:
        asked = {"bos": template.bos, "padding": template.specials.get("pad_token")}
        found |= {edge: tokenizer.specials[name] for edge, name in asked.items() if name in tokenizer.specials}
    return found | ({} if tokenizer.bos_id is None else {"bos": tokenizer.bos_id})


def _template_source(template: ChatTemplate, names: list[str], edges: dict[str, int]) -> str:
    """The template. llama.cpp has a bos_token and an eos_token for it even where it was written for none: then it says so."""
    given = {edge: names[edges[edge]] if edge in edges else "" for edge in ("bos", "eos")}
    wanted = {"bos": template.bos, "eos": template.eos}
    unlike = [edge for edge in given if given[edge] != wanted[edge] and f"{edge}_token" in template.source]
    return "".join(f"{{%- set {edge}_token = {json.dumps(wanted[edge])} -%}}" for edge in unlike) + template.source
