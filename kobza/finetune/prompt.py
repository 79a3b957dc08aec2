"""A template of a person's own: "Who was {name}?[[ They paid {fare}.]]", filled from a row.

{column}     the cell; what stands in it is never read as template
[[ ... ]]    goes away as a whole where a column in it is empty
{{ }}        a brace; [[[[ and ]]]] two brackets; a single bracket is itself
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kobza.config import InputError, nearest, require
from kobza.finetune.table import Record

TOKEN = re.compile(r"\{\{|\}\}|\[\[\[\[|\]\]\]\]|\[\[|\]\]|\{[^{}]*\}|[{}]|\[|\]|[^{}\[\]]+")
ESCAPES = {"{{": "{", "}}": "}", "[[[[": "[[", "]]]]": "]]"}


class Piece(NamedTuple):
    """Literal text, or the name of a column."""

    text: str
    is_column: bool


class Part(NamedTuple):
    """Pieces that stand or go together."""

    pieces: tuple[Piece, ...]
    optional: bool


class Prompt:
    """A template read once. `columns`: those it names, each once, in order; `required`: those outside of [[ ]]."""

    def __init__(self, text: str, option: str = "--prompt"):
        self.text, self.option = text, option
        self.parts = tuple(parts_of(text, option))
        named = [(piece.text, part.optional) for part in self.parts for piece in part.pieces if piece.is_column]
        self.columns = list(dict.fromkeys(name for name, _ in named))
        self.required = list(dict.fromkeys(name for name, optional in named if not optional))

    def check(self, columns: Sequence[str], source: str) -> None:
        """Refuse a column that the file does not have."""
        for name in self.columns:
            if name not in columns:
                brace = "; a brace itself is written {{" if '"' in name or ":" in name else ""
                raise InputError(f"{self.option}: {source} has no column {name!r}{nearest(name, list(columns))}{brace}")

    def empty(self, row: Record) -> list[str]:
        """The required columns that are empty in this row."""
        return [name for name in self.required if row.get(name) is None]

    def fill(self, row: Record, where: str) -> str:
        """The text for a row in which no required column is empty."""
        return "".join(
            cell_text(row, piece.text, where) if piece.is_column else piece.text
            for part in self.parts
            if not part.optional or all(row.get(p.text) is not None for p in part.pieces if p.is_column)
            for piece in part.pieces
        )


def cell_text(row: Record, column: str, where: str) -> str:
    """The text in a cell that must hold some."""
    cell = row.get(column)
    require(cell is not None, f"{where}: column {column!r} is empty")
    kind = {list: "a list", dict: "an object"}.get(type(cell), "")
    require(isinstance(cell, str), f"{where}: column {column!r} holds {kind}, not text; name a column of text")
    return cell  # type: ignore[return-value]


def parts_of(text: str, option: str) -> Iterator[Part]:
    """The parts of a template, optional ones apart; what is not closed or has no effect is refused."""
    pieces: list[Piece] = []
    inside = False
    for match in TOKEN.finditer(text):
        token, place = match[0], f"{option}: at character {match.start() + 1}"
        if token in ("[[", "]]"):
            require(token == "]]" or not inside, f"{place}: [[ within [[ ]]; parts that vanish do not nest")
            require(token == "[[" or inside, f"{place}: ]] without [[; two brackets themselves are written ]]]]")
            vain = f"{place}: this [[ ]] names no column, so it never vanishes; take the brackets away"
            require(not inside or any(piece.is_column for piece in pieces), vain)
            yield Part(tuple(pieces), inside)
            pieces, inside = [], not inside
            continue
        lone = f"{place}: a single {token}; a column is {{name}}, a brace itself is written {token}{token}"
        require(token not in ("{", "}"), lone)
        is_column = token.startswith("{") and token not in ESCAPES
        name = token[1:-1].strip() if is_column else ESCAPES.get(token, token)
        require(bool(name), f"{place}: {{}} names no column")
        pieces.append(Piece(name, is_column))
    require(not inside, f"{option}: a [[ is never closed with ]]")
    yield Part(tuple(pieces), False)
