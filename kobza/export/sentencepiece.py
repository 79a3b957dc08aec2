"""SentencePiece's BPE by scores, as llama.cpp's tokenizer `llama` does it, out of the merges of a tokenizer.json.

A merge list says which pairs are joined and in what order; scores say how soon a token is made, of whatever two parts. They
amount to the same where every token has all its splits and these stand together, as in files that were converted from
SentencePiece. That is not looked up but tried: the library's tokenizer with the scores' own merges must give the same ids.
"""

from __future__ import annotations

import json
from typing import Any

from kobza.config import InputError
from kobza.export.pretokenizer import copy_of, differing, probes
from kobza.formats.merges import merges
from kobza.tokenizer import LibraryTokenizer

SPACE = "\u2581"


def scores(tokenizer: LibraryTokenizer, content: dict[str, Any]) -> dict[str, float]:
    """{token: score}; a token made sooner has the higher one. llama.cpp joins whatever spells a token of any kind."""
    made: dict[str, int] = {}
    for merge in content["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right, len(made))
    vocab = content["model"]["vocab"] | {added["content"]: added["id"] for added in content["added_tokens"]}
    ranked = sorted(vocab, key=lambda token: made.get(token, len(made)))
    theirs = copy_of(tokenizer, _by_scores(tokenizer, content, ranked))
    for texts in probes(tokenizer):
        if found := differing(tokenizer.inner, theirs, texts):
            raise InputError(f"llama.cpp's SentencePiece gives other ids to {min(found, key=len)!r}; export --to hf")
    return {token: -float(rank) for rank, token in enumerate(ranked)}


def _by_scores(tokenizer: LibraryTokenizer, content: dict[str, Any], ranked: list[str]) -> str:
    """The tokenizer.json of what llama.cpp runs."""
    steps = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.prefix else []
    steps += [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    model = content["model"] | {"merges": merges(ranked, set(ranked)), "ignore_merges": False}
    model["vocab"] |= {added["content"]: added["id"] for added in content["added_tokens"]}
    around = {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    return json.dumps(content | around | {"model": model})
