"""kobza tokens: a text under several tokenizers, side by side. recipes/fit.py says which suits a text and a model."""

from __future__ import annotations

import json
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kobza.config import LEARNED, DataConfig, require
from kobza.data import SUFFIXES, Documents
from kobza.hub.encodings import find_tokenizer
from kobza.tokenizer import CharTokenizer, Tokenizer, train_tokenizer
from kobza.tokens.compare import Split, rows

MOST_CHARACTERS = 8_000_000  # of a text that are looked at: some ten seconds


def main(text: str, names: str | None, vocab_size: int, first: int, as_json: bool) -> int:
    """Print ids, pieces and counts of the text under each tokenizer -> exit code."""
    require(first > 0, f"--first is {first}; it must be at least 1")
    whole = read_text(text)
    wanted = named("char,byte,bpe" if names is None else names, vocab_size)
    splits = [Split(name, tokenizer_for(name, whole, vocab_size), whole) for name in wanted]
    alike, others = [s for s in splits if s.lossless], [s for s in splits if not s.lossless]
    table = rows(alike, first) if alike else []
    shown = {s.name: list(range(table[-1][1][i].stop)) if table else [] for i, s in enumerate(alike)}
    shown |= {s.name: list(range(min(first, len(s.ids)))) for s in others}
    if as_json:
        found = [s.totals() | {"shown": [s.token(k) for k in shown[s.name]]} for s in splits]
        size = {"characters": len(whole), "bytes": len(whole.encode("utf-8", errors="replace"))}
        print(json.dumps(size | {"tokenizers": found}, ensure_ascii=False))
        return 0
    console = Console(highlight=False)
    if alike:
        console.print(pieces_table(alike, table))
    for split in others:
        print(
            f"{split.name} does not give the text back; its tokens:  {split.show_span(range(len(shown[split.name])))}"
        )
    if any(shown[s.name][-1:] != [len(s.ids) - 1] for s in splits if len(s.ids)):
        print(f"... and so on; the counts are of the whole text ({len(whole):,} characters)\n")
    console.print(totals_table(splits))
    return 0


def named(names: str, vocab_size: int) -> list[str]:
    """The tokenizers that --with lists."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    require(bool(wanted), "--with is empty; name tokenizers: char,byte,bpe, an encoding (o200k_base), a file or a run")
    require(not vocab_size or "bpe" in wanted, f"--vocab-size {vocab_size} has no effect without bpe in --with {names}")
    return wanted


def read_text(text: str) -> str:
    """ "-": standard input; the name of a file or folder: what kobza would train on; anything else is itself the text."""
    path = Path(text)
    try:
        is_file = text == "-" or bool(text) and path.exists()
    except (OSError, ValueError):  # longer than a name can be
        is_file = False
    looks = " " not in text and path.suffix.lower() in (*SUFFIXES, ".gz")
    require(is_file or not looks, f"{text}: no such file; if it is itself the text: echo {text} | kobza tokens -")
    whole, length = [text] * (not is_file), 0
    for block in Documents([text]).blocks() if is_file else ():
        whole.append(block)
        length += len(block)
        if length >= MOST_CHARACTERS:
            break
    require(any(whole), "the text is empty; give at least one character")
    return "".join(whole)[:MOST_CHARACTERS]


def tokenizer_for(name: str, text: str, vocab_size: int) -> Tokenizer:
    """A tokenizer by name; char, byte and bpe are learned from the text. A run's characters skip what they do not know."""
    if name in LEARNED:
        config = DataConfig(tokenizer=name, vocab_size=vocab_size * (name == "bpe"))
        return train_tokenizer([text], config, [])
    found = find_tokenizer(name)
    assert found is not None
    if isinstance(found, CharTokenizer) and found.unknown == "error":
        found.unknown = "skip"
    return found


def pieces_table(splits: list[Split], table: list[tuple[str, list[range]]]) -> Table:
    """Rows of the text, and in each column the pieces and under them the ids of one tokenizer."""
    found = Table(box=SIMPLE, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    for split in splits:
        found.add_column(f"{escape(split.name)}\n[dim]{split.tokenizer.vocab_size:,} kinds[/dim]", overflow="fold")
    for _, spans in table:
        cells = []
        for split, span in zip(splits, spans, strict=True):
            pieces, ids = split.show_span(span), " ".join(str(split.ids[k]) for k in span)
            cells.append(f"{escape(pieces)}\n[dim]{ids}[/dim]")
        found.add_row(*cells)
    return found


def totals_table(splits: list[Split]) -> Table:
    """A column a tokenizer: counts over the whole text, and the tokens of each script."""
    totals = [split.totals() for split in splits]
    found = Table(box=SIMPLE, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    found.add_column("the whole text")
    for split in splits:
        found.add_column(escape(split.name), justify="right")
    for label, key in (("kinds of token", "vocab_size"), ("kinds used", "kinds"), ("tokens", "tokens")):
        found.add_row(label, *(f"{t[key]:,}" for t in totals))
    for label, key in (("bytes per token", "bytes_per_token"), ("characters per token", "characters_per_token")):
        found.add_row(label, *(f"{t[key]:.3f}" for t in totals))
    found.add_row("characters in several tokens", *(f"{t['split_characters']:,}" for t in totals))
    found.add_row("gives the text back", *("yes" if t["lossless"] else "no" for t in totals))
    found.add_section()
    for script in dict.fromkeys(script for split in splits for script in split.scripts):
        found.add_row(f"tokens: {script}", *(f"{split.scripts[script]:,}" for split in splits))
    return found
