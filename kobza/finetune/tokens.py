"""Rows of the token tables: those that were never trained found and mended, and rows for new special tokens.

A token that no text held leaves marks. An input row stays at zero, or shrinks towards it. A row that is the head's too, or the
head's own, only ever hears "not you": all such rows are pushed alike and end up in one point (Land & Bartolo 2024). In
SmolLM2-135M 15 of 49,152 rows stand there, <gh_stars> and <issue_closed> among them, within 0.0003 of the usual distance between
two rows; the next pair is 0.017 apart, words of one meaning 0.2. Rows that still are as they were drawn cannot be told.

A new or mended row is the mean of the trained ones, which takes little from the other tokens: its logit is their mean logit, so
by Jensen's inequality it gets less than an equal share, and n such rows lower no log-probability by more than log(1 + n / V)
(Hewitt 2021).

Shapes: V vocab_size, C n_embd.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kobza.checkpoint import Loaded
from kobza.config import InputError, require
from kobza.finetune.example import Row
from kobza.model import GPT
from kobza.tokenizer import Tokenizer

SHORT = 0.01  # of the median length
CLOSE = 0.005  # of the usual distance between two rows
PIECE = 8192  # rows taken to float32 at a time

# ---- never trained -------------------------------------------------------------------------------------------------


@torch.no_grad()
def untrained_rows(table: Tensor) -> list[int]:
    """Rows of a token table (V, C) that were never trained: next to nothing, or next to another row. None where that holds of
    most of them, as in a head that starts at zero: then no row shows what a trained one is like."""
    length = torch.linalg.vector_norm(table, dim=1, dtype=torch.float32)  # (V,)
    short = length < SHORT * length.median()
    found = short | twins(table, CLOSE * usual_distance(table))
    return found.nonzero().flatten().tolist() if 2 * int(found.sum()) < len(table) else []


def usual_distance(table: Tensor) -> float:
    """Median distance of rows half a table apart, of up to about 2,048 of them."""
    rows = table[:: len(table) // 2048 + 1].float()
    return float((rows - rows.roll(len(rows) // 2, 0)).norm(dim=1).median())


def twins(table: Tensor, radius: float) -> Tensor:
    """(V,) bool: rows with another within the radius.

    Rows fall into the cells of a random grid in 8 directions, and neighbours in the order of the cells are compared, so that
    256,000 rows take no 256,000^2 pairs. An edge parts a pair a radius apart in one draw of 6, hence three.
    """
    generator, found = torch.Generator().manual_seed(0), torch.zeros(len(table), dtype=torch.bool, device=table.device)
    for _ in range(3 if radius else 0):
        directions = torch.randn(table.shape[1], 8, generator=generator).to(table.device)
        places = torch.cat([piece.float() @ directions for piece in table.split(PIECE)])  # (V, 8)
        offset = torch.rand(8, generator=generator).to(table.device)
        _, cell = torch.unique((places / (32 * radius) + offset).floor(), dim=0, return_inverse=True)
        order = cell.argsort(stable=True)
        for apart in (1, 2):  # a stranger may stand between
            pair = torch.stack((order[:-apart], order[apart:]), dim=1)
            for a, b in (part.unbind(1) for part in pair[cell[pair[:, 0]] == cell[pair[:, 1]]].split(PIECE)):
                close = (table[a].float() - table[b].float()).norm(dim=1) <= radius
                found[a[close]] = found[b[close]] = True
    return found


def untrained_in(rows: Sequence[Row], path: Path, vocab_size: int) -> list[int]:
    """Ids that stand in rows and that a model.safetensors of kobza's, of which one table is read at a time, never learned."""
    used, found = np.unique(np.concatenate([row.ids for row in rows])).tolist(), set()
    try:
        with safe_open(path, "pt") as file:
            for name in {"embed.weight", "lm_head.weight"}.intersection(file.keys()):
                found.update(untrained_rows(file.get_tensor(name)[:vocab_size]))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from None
    return [i for i in used if i in found]


@torch.no_grad()
def mend_rows(model: GPT, ids: Sequence[int]) -> None:
    """Set the rows of these tokens, in the embedding and in a head of its own, to the mean of the trained ones."""
    for module in tables(model):
        module.weight[list(ids)] = mean_row(module.weight[: model.config.vocab_size], ids).to(module.weight.dtype)


def tables(model: GPT) -> list[nn.Embedding | nn.Linear]:
    """The modules with a row a token; a tied head is its embedding."""
    return [model.embed] if model.lm_head.weight is model.embed.weight else [model.embed, model.lm_head]


def mean_row(table: Tensor, but: Collection[int] = ()) -> Tensor:
    """The mean (C,) in float32 of the trained rows of a table (V, C), without those named."""
    counts = torch.ones(len(table), device=table.device)
    counts[untrained_rows(table) + list(but)] = 0
    require(bool(counts.any()), "no row of the token table is left to take the mean of; name fewer")
    parts = zip(counts.split(PIECE), table.split(PIECE), strict=True)
    return torch.stack([count @ rows.float() for count, rows in parts]).sum(0) / counts.sum()


# ---- new -----------------------------------------------------------------------------------------------------------


def add_tokens(loaded: Loaded, names: Sequence[str]) -> Loaded:
    """A model with further special tokens: its tokenizer, its config, and its tables, which are widened in place."""
    tokenizer = with_tokens(loaded.tokenizer, names)
    first = loaded.tokenizer.vocab_size
    add_rows(loaded.model, range(first, tokenizer.vocab_size))
    return replace(loaded, run=replace(loaded.run, model=loaded.model.config), tokenizer=tokenizer)


def with_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """A tokenizer with further special tokens, which take the ids from its vocab_size on; every text keeps its ids."""
    taken = set(known_names(tokenizer))
    for name in names:
        what = f"--add-tokens: {name!r}"
        plain = len(name) > 1 and name.isprintable() and name == name.strip()
        require(plain, f"{what} is no name for a token; it must have 2 or more printable characters, as <|tool|>")
        require(name not in taken, f"{what} is there already; leave it out")
        taken.add(name)
    grown = tokenizer.with_specials(names)
    kept = grown.bos_id == tokenizer.bos_id and tokenizer.eot_id in (None, grown.eot_id)
    require(kept, f"--add-tokens {','.join(names)}: would change what begins or ends a text; take other names")
    for name in names:
        for text in (name, f" {name}", f"a{name}b"):
            same = spelled(tokenizer, text) == spelled(grown, text)
            what = f"--add-tokens: {name!r} would be read out of plain text"
            require(same, f"{what}; take a name as <|{name.strip('<|>')}|>")
    return grown


def known_names(tokenizer: Tokenizer) -> Iterator[str]:
    """Every token of a tokenizer as its file names it."""
    content = json.loads(tokenizer.to_json())
    vocab = content["model"]["vocab"]  # Unigram's is a list of (name, score)
    yield from vocab if isinstance(vocab, dict) else (entry[0] for entry in vocab)
    yield from (token["content"] for token in content["added_tokens"])


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text, none where it has characters that the tokenizer does not know."""
    try:
        return tokenizer.encode(text).tolist()
    except ValueError:
        return []


@torch.no_grad()
def add_rows(model: GPT, ids: range) -> None:
    """Give new tokens rows, the mean of the trained ones, in place. Where the table has spare rows behind the tokenizer's ids,
    as many released models do, they are taken first."""
    before, first = model.config.vocab_size, ids.start
    require(first <= before, f"the tokenizer has {first:,} tokens and the model {before:,} rows; they do not fit")
    model.config = replace(model.config, vocab_size=max(before, ids.stop))
    for module in tables(model):
        old = module.weight
        mean = mean_row(old[:first]).to(old.dtype)
        new = torch.cat((old, mean.expand(max(0, model.config.n_rows - len(old)), -1)))
        new[list(ids)] = mean
        module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    if model.config.tied:
        model.lm_head.weight = model.embed.weight
    model.embed.num_embeddings = model.lm_head.out_features = model.config.n_rows
