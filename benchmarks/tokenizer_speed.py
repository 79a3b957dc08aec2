"""Training and encoding speed of kobza's tokenizers beside the bare `tokenizers` library, in turn on the same text and cores.

    python benchmarks/tokenizer_speed.py [TEXT] [--runs 5] [--vocab-size 4096] [--encoding o200k_base] [--note WORDS]

Both sides hold the text in memory and use all cores they can. The library is used as people do: trained on the lines of the
text, and on the text as one; encoding the text as one, and its lines as a batch. The bar is a ratio below 1.1 to the quicker of
the two. Ours adds the numpy array of the ids, which the library's side gets too. The order changes from run to run; printed are
medians, and ratios run by run with their spread. Ids and vocabularies are checked to be equal first.
Appends to benchmarks/results.csv. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from speed import report
from tokenizers import decoders, models, pre_tokenizers, trainers

from kobza.hub.encodings import find_tokenizer
from kobza.hub.shakespeare import default_text
from kobza.tokenizer import LibraryTokenizer


def bare_training(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE as the library's documentation has it."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return inner


def bare_batch(inner: tokenizers.Tokenizer, lines: list[str]) -> np.ndarray:
    """Ids of the lines, by the library's quickest call."""
    encodings = inner.encode_batch_fast(lines, add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])


def in_turn(runs: int, contestants: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each contestant, run by run; who begins changes, and the first round does not count."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {f"{name}_seconds": [] for name in names}
    for i in range(runs + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            gc.collect()
            began = time.perf_counter()
            contestants[name]()
            if i:
                seconds[f"{name}_seconds"].append(time.perf_counter() - began)
    return seconds


def ratios(table: dict[str, list[float]]) -> dict[str, list[float]]:
    """The table with our time over the quickest of the others, run by run."""
    ours = table["kobza_seconds"]
    others = [seconds for name, seconds in table.items() if name != "kobza_seconds"]
    return table | {"ratio": [mine / min(theirs) for mine, *theirs in zip(ours, *others, strict=True)]}


def training(text: str, vocab_size: int, runs: int) -> dict[str, list[float]]:
    """Learning a vocabulary."""
    lines = text.splitlines(keepends=True)
    vocabularies = [bare_training([text], vocab_size).to_str(), LibraryTokenizer.train([text], vocab_size).to_json()]
    assert len({json.dumps(json.loads(v)["model"], sort_keys=True) for v in vocabularies}) == 1, "another vocabulary"
    contestants = {
        "whole": lambda: bare_training([text], vocab_size),
        "lines": lambda: bare_training(lines, vocab_size),
        "kobza": lambda: LibraryTokenizer.train([text], vocab_size),
    }
    return ratios(in_turn(runs, contestants))


def encoding(text: str, tokenizer: LibraryTokenizer, runs: int) -> dict[str, list[float]]:
    """Text to an array of ids."""
    lines = text.splitlines(keepends=True)
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.encode_special_tokens = True
    assert tokenizer.encode(text).tolist() == inner.encode(text, add_special_tokens=False).ids, "other ids"
    contestants = {
        "whole": lambda: np.array(inner.encode(text, add_special_tokens=False).ids, dtype=np.int32),
        "lines": lambda: bare_batch(inner, lines),
        "kobza": lambda: tokenizer.encode(text),
    }
    return ratios(in_turn(runs, contestants))


def main() -> None:
    """Measure training, then encoding with what was trained and with an encoding."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", nargs="?", help="a text file; default: kobza's own text")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--encoding", help="also measure this one, e.g. o200k_base (may be fetched)")
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    text = Path(args.text or default_text()[0]).read_text(encoding="utf-8")
    size = f"{len(text.encode()) / 1e6:.1f} MB"
    report(f"train bpe {args.vocab_size} on {size}", training(text, args.vocab_size, args.runs), args.note)
    learned = LibraryTokenizer.train([text], args.vocab_size)
    report(f"encode bpe {args.vocab_size} on {size}", encoding(text, learned, args.runs), args.note)
    if args.encoding:
        found = find_tokenizer(args.encoding)
        assert isinstance(found, LibraryTokenizer), args.encoding
        report(f"encode {args.encoding} on {size}", encoding(text, found, args.runs), args.note)


if __name__ == "__main__":
    main()
