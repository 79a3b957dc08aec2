"""Where the texts of an evaluation come from: files, a run's held-out part, the training text, and the model's own pen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kobza.config import SampleConfig
from kobza.data import Documents, Tokens, encode_blocks
from kobza.evals.score import opening
from kobza.generate import generate
from kobza.model import GPT
from kobza.run import Run
from kobza.tokenizer import Tokenizer

INDEXED_TOKENS = 20_000_000  # of the training text that are searched for copies
TOGETHER = 32  # texts continued at once


@dataclass(frozen=True)
class Document:
    """A text with its source and its tokens, special ones left out."""

    source: str
    ids: np.ndarray
    text: str


def run_folder(path: Path) -> Path | None:
    """The run that a path means or lies in; None for a checkpoint on its own."""
    candidates = (path, path.parent.parent)
    return next((p for p in candidates if (p / "config.toml").exists() and (p / "tokens").is_dir()), None)


def read_documents(
    paths: Sequence[str], text_field: str, tokenizer: Tokenizer, most: int
) -> tuple[list[Document], bool]:
    """Documents of files as `kobza train` reads them, up to `most` tokens in all (0: no limit) -> and whether that cut any."""
    found: list[Document] = []
    left = most or 1 << 62
    for source, blocks in Documents(paths, text_field):
        if left == 0:
            return found, True
        parts = list(encode_blocks(source, blocks, tokenizer))
        ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        if len(ids) == 0:
            continue
        cut = len(ids) > left
        found.append(Document(source, ids[:left], tokenizer.decode(ids[:left].tolist())))
        left -= len(found[-1].ids)
        if cut:
            return found, True
    return found, False


def held_out(run: Run, most: int) -> tuple[list[Document], bool]:
    """The documents of a run's held-out part, up to `most` tokens in all (0: no limit) -> and whether that cut any."""
    ids = run.corpus.val.array(most or None)
    ends = np.flatnonzero(np.isin(ids, run.tokenizer.ends))
    parts = np.split(ids, ends) if len(ends) else [ids]
    specials = list(run.tokenizer.specials.values())
    bodies = [part[~np.isin(part, specials)] for part in parts]
    bodies = [body for body in bodies if len(body)]
    names = ["held-out part"] if len(bodies) == 1 else [f"held-out document {i + 1}" for i in range(len(bodies))]
    found = [Document(n, b, run.tokenizer.decode(b.tolist())) for n, b in zip(names, bodies, strict=True)]
    return found, len(ids) < len(run.corpus.val)


def plain_text(tokens: Tokens, tokenizer: Tokenizer, most: int = INDEXED_TOKENS) -> str:
    """The text of a stretch of tokens, documents parted by a line end."""
    ids = tokens.array(most)
    parts = np.split(ids, np.flatnonzero(np.isin(ids, tokenizer.ends))) if tokenizer.ends else [ids]
    return "\n".join(tokenizer.decode(part.tolist()) for part in parts)


def stretches(tokens: Tokens, n_tokens: int, length: int, specials: Sequence[int]) -> list[np.ndarray]:
    """About n_tokens of a long stretch as pieces of `length`, evenly spread, special tokens left out."""
    length = min(length, len(tokens))
    n = max(1, min(n_tokens, len(tokens)) // length)
    starts = np.linspace(0, len(tokens) - length, n).astype(np.int64)
    pieces = [row[~np.isin(row, specials)] for row in tokens.windows(starts, length)]
    return [piece for piece in pieces if len(piece)]


def write(model: GPT, tokenizer: Tokenizer, samples: int, tokens: int, seed: int) -> list[str]:
    """Texts that the model writes from nothing, from its own distribution: temperature 1 and no other knob, so that what is
    measured is the model and not the sampler. Text i depends on seed + i alone."""
    config = SampleConfig(tokens=tokens, temperature=1.0, top_k=0, seed=seed)
    return continue_all(model, tokenizer, [opening(tokenizer)] * samples, [tokens] * samples, config)


def continue_all(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], tokens: Sequence[int], config: SampleConfig
) -> list[str]:
    """The continuation of each prompt by up to tokens[i] tokens, text i drawn with config.seed + i."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (tokens[i], len(prompts[i])))
    for begin in range(0, len(order), TOGETHER):
        group = order[begin : begin + TOGETHER]
        rows: list[list[int]] = [[] for _ in group]
        longest = replace(config, tokens=max(tokens[i] for i in group))
        seeds = [config.seed + i for i in group]
        for choice in generate(model, [prompts[i] for i in group], longest, tokenizer.ends, seeds):
            for row, token in zip(rows, choice.ids, strict=True):
                if token is not None and token not in tokenizer.ends:
                    row.append(token)
        for i, row in zip(group, rows, strict=True):
            texts[i] = tokenizer.decode(row[: tokens[i]])
    return texts


def pieces_like(text: str, lengths: Sequence[int]) -> list[str]:
    """Pieces of a real text, as long as the model's, evenly spread and begun at a line where there are lines, as the model's are:
    what they show is the norm."""
    longest = max(lengths, default=0)
    if longest == 0 or len(text) < 2 * longest:
        return []
    n = min(len(lengths), len(text) // longest)
    found = []
    for start, length in zip(np.linspace(0, len(text) - longest, n).astype(int), lengths, strict=False):
        line = text.rfind("\n", max(0, start - longest), start) + 1
        found.append(text[line or start :][:length])
    return found
