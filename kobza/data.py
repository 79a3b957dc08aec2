"""Text -> token shards on disk -> batches.

`Documents` reads files of several kinds, `prepare` turns them into memory-mapped shards whose integer width follows the
vocabulary, `Batches` draws windows of them in an order that depends on the seed alone: any point of it is two numbers, which
`state_dict` gives, so a run resumes on the very next window. No tokenizer and no model is known here beyond `encode`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kobza.config import DataConfig, InputError, nearest, require
from kobza.tokenizer import BOS, EOT, Tokenizer, train_tokenizer

SUFFIXES = (".txt", ".md", ".jsonl", ".csv")  # what a folder is searched for, each also with .gz
BLOCK_BYTES = 16 << 20  # text is read, decoded and encoded in blocks of this size
KEEP_BYTES = 256 << 20  # text below this is kept from the first pass to the second instead of read twice
SHARD_TOKENS = 1 << 27
ON_DEVICE_BYTES = 1 << 30  # tokens below this move to an accelerator once, as int32
OVERLAP_TOKENS = 64  # a validation window of this length that stands in the training text counts as seen


# ---- text ----------------------------------------------------------------------------------------------------------


def find_files(paths: Sequence[str]) -> list[str]:
    """The files behind the paths a user gave, folders searched in sorted order; "-" is standard input."""
    files: list[str] = []
    for path in paths:
        if path == "-" or Path(path).is_file():
            files.append(path)
            continue
        require(Path(path).exists(), f"{path}: no such file or folder")
        require(Path(path).is_dir(), f"{path}: neither a file nor a folder; pipe its text in and give -")
        found = [str(p) for p in sorted(Path(path).rglob("*")) if p.is_file() and _kind(p.name) in SUFFIXES]
        require(bool(found), f"{path}: no text in this folder; kobza looks for {' '.join(SUFFIXES)}, also with .gz")
        files += found
    return files


def _kind(name: str) -> str:
    """The suffix that says how to read a file: _kind("a/b.csv.gz") -> ".csv"."""
    return Path(name.removesuffix(".gz")).suffix.lower()


class Documents:
    """Re-iterable documents of files: each a source name and an iterator over its text in blocks."""

    def __init__(self, paths: Sequence[str], text_field: str = "text"):
        self.files = find_files(paths)
        self.text_field = text_field
        sizes = [0 if file == "-" else Path(file).stat().st_size for file in self.files]
        self._keep = "-" in self.files or sum(sizes) <= KEEP_BYTES
        self._kept: list[tuple[str, list[str]]] | None = None

    def __iter__(self) -> Iterator[tuple[str, list[str] | Iterator[str]]]:
        if not self._keep:
            yield from self._read()
            return
        if self._kept is None:
            self._kept = [(source, list(blocks)) for source, blocks in self._read()]
        yield from self._kept

    def _read(self) -> Iterator[tuple[str, Iterator[str]]]:
        for file in self.files:
            with _open(file) as stream:
                kind = _kind(file)
                if kind == ".jsonl":
                    yield from _jsonl_documents(file, stream, self.text_field)
                elif kind == ".csv":
                    yield from _csv_documents(file, stream, self.text_field)
                else:
                    yield file, text_blocks(file, stream)

    def blocks(self) -> Iterator[str]:
        """All text, block by block, without regard to documents."""
        for _, blocks in self:
            yield from blocks


def _open(file: str) -> BinaryIO:
    if file == "-":
        return sys.stdin.buffer
    try:
        return gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb")  # type: ignore[return-value]
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def text_blocks(source: str, stream: BinaryIO) -> Iterator[str]:
    """Decoded blocks of a UTF-8 stream, cut where it changes no ids, else at a line end; \\r\\n becomes \\n."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, rest = 0, ""
    while True:
        raw = _read_block(source, stream)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise InputError(_not_utf8(source, error.object, offset - pending, error.start)) from None
        if offset == 0:
            text = text.removeprefix("\ufeff")
        nul = f"{source}: a NUL byte near offset {offset + text.find(chr(0))}: a binary file, not text"
        require("\0" not in text, nul)
        offset += len(raw)
        text = rest + text
        cut = last_cut(text) if raw else len(text)
        rest = text[cut:]
        if cut:
            yield text[:cut].replace("\r\n", "\n")
        if not raw:
            return


def last_cut(text: str) -> int:
    """Where a block that goes on is best cut: at the last place like tokenizer.CUT, else after the last line end, else anywhere.

    last_cut("one\\n\\n  two.\\n  x") -> 3
    """
    place = text.rfind("\n")
    while place > 0:
        end = place - (text[place - 1] == "\r")
        if end and text[end - 1].isalnum():
            return end
        place = text.rfind("\n", 0, place)
    return text.rfind("\n") + 1 or len(text) - text.endswith("\r")


def _read_block(source: str, stream: BinaryIO) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except (EOFError, OSError, zlib.error) as error:  # BadGzipFile is an OSError
        raise InputError(f"{source}: cannot be read: {error}") from None


def _not_utf8(source: str, raw: bytes, offset: int, start: int) -> str:
    kind = "a binary file, not text" if b"\0" in raw[:4096] else "convert it with: iconv -f LATIN1 -t UTF-8"
    return f"{source}: byte 0x{raw[start]:02x} at offset {offset + start} is not UTF-8; {kind}"


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    """Lines with their line end, out of blocks that may cut a long one."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def read_object(line: str, where: str, holding: str) -> dict[str, Any]:
    """One line of a .jsonl file -> its object; `where` and what it is to be `holding` are for the refusal."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply; a line is one flat object") from None
    require(isinstance(record, dict), f"{where}: a {type(record).__name__}, not an object with {holding}")
    return record


def _jsonl_documents(file: str, stream: BinaryIO, field: str) -> Iterator[tuple[str, Iterator[str]]]:
    """One document a line of a .jsonl file."""
    for number, line in enumerate(_lines(text_blocks(file, stream)), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        record = read_object(line, where, f"a field {field!r}")
        lacks = f"{where}: no field {field!r}{nearest(field, list(record))}; name it with --text-field"
        require(field in record, lacks)
        require(isinstance(record[field], str), f"{where}: field {field!r} is not a string")
        half = next((c for c in record[field] if "\ud800" <= c <= "\udfff"), None)
        require(half is None, f"{where}: field {field!r} has half a surrogate pair, {half!r}, which no UTF-8 spells")
        yield where, iter([record[field]])


def _csv_documents(file: str, stream: BinaryIO, field: str) -> Iterator[tuple[str, Iterator[str]]]:
    """One document a row of a .csv file."""
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(_lines(text_blocks(file, stream)))
    columns = list(rows.fieldnames or [])
    require(field in columns, f"{file}: no column {field!r}{nearest(field, columns)}; name it with --text-field")
    try:
        for row in rows:
            if row[field]:
                yield f"{file} line {rows.line_num}", iter([row[field]])
    except csv.Error as error:
        raise InputError(f"{file} line {rows.line_num + 1}: not CSV: {error}") from None


# ---- tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A stretch [start, stop) of memory-mapped shards that follow each other."""

    shards: tuple[np.ndarray, ...]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Rows of `length` tokens from each start (counted from self.start) -> (len(starts), length)."""
        starts = starts + self.start
        if len(self.shards) == 1:
            return self.shards[0][starts[:, None] + np.arange(length)]
        return np.stack([self._read(int(start), length) for start in starts])

    def _read(self, start: int, length: int) -> np.ndarray:
        ends = np.cumsum([len(shard) for shard in self.shards])
        parts, i = [], int(np.searchsorted(ends, start, side="right"))
        while length > 0:
            shard = self.shards[i]
            part = shard[start - (ends[i] - len(shard)) :][:length]
            parts.append(part)
            start, length, i = start + len(part), length - len(part), i + 1
        return np.concatenate(parts)

    def array(self, most: int | None = None) -> np.ndarray:
        """The first `most` tokens (None: all) as one array; no copy where they lie in one shard."""
        n = len(self) if most is None else min(most, len(self))
        if len(self.shards) == 1:
            return self.shards[0][self.start : self.start + n]
        return self._read(self.start, n)


@dataclass(frozen=True)
class Corpus:
    """A prepared text: its training and validation tokens, and what is known of it (index.json)."""

    train: Tokens
    val: Tokens
    index: dict[str, Any]


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned integer that holds every id. token_dtype(65) -> uint8, token_dtype(50257) -> uint16"""
    return np.dtype("uint8" if vocab_size <= 256 else "uint16" if vocab_size <= 65536 else "uint32")


def specials_for(documents: Documents, config: DataConfig) -> list[str]:
    """Special tokens the text needs: end-of-text where there is more than one document, a beginning on request."""
    sources = iter(documents)
    several = next(sources, None) is not None and next(sources, None) is not None
    return [EOT] * several + [BOS] * config.bos


def leading(documents: Documents, share: float) -> Iterator[str]:
    """The first `share` of the characters, block by block."""
    left = int(share * sum(len(block) for block in documents.blocks()))
    for block in documents.blocks():
        if left > 0:
            yield block[:left]
            left -= len(block)


def prepare(documents: Documents, config: DataConfig, folder: Path, tokenizer: Tokenizer | None = None) -> Tokenizer:
    """Write the documents' tokens as shards and index.json into a new folder -> the tokenizer: learned here, or the one given
    with the special tokens that it lacks for this text."""
    specials = specials_for(documents, config)
    if tokenizer is None:
        whole = config.tokenizer == "char"  # every character needs an id; merges are not learned from what is held out
        texts = documents.blocks() if whole else leading(documents, 1 - config.val_fraction)
        tokenizer = train_tokenizer(texts, config, specials)
    has = {EOT: tokenizer.eot_id, BOS: tokenizer.bos_id}
    if lacks := [name for name in specials if has[name] is None]:
        tokenizer = tokenizer.with_specials(lacks)
    folder.mkdir(parents=True)
    dtype = token_dtype(tokenizer.vocab_size)
    digest, lengths, n_documents, n_bytes = hashlib.sha256(), [], 0, 0
    writer = None
    for ids in _token_blocks(documents, tokenizer):
        n_documents += ids is None
        if ids is None:
            continue
        block = ids.astype(dtype)
        digest.update(block.tobytes())
        n_bytes += int(tokenizer.piece_bytes[ids].sum())
        while len(block):
            if writer is None or lengths[-1] == SHARD_TOKENS:
                if writer:
                    writer.close()
                writer = open(folder / f"{len(lengths):05d}.bin", "wb")  # noqa: SIM115 (closed below)
                lengths.append(0)
            part, block = block[: SHARD_TOKENS - lengths[-1]], block[SHARD_TOKENS - lengths[-1] :]
            part.tofile(writer)
            lengths[-1] += len(part)
    if writer:
        writer.close()
    n_tokens = sum(lengths)
    n_train = n_tokens - int(n_tokens * config.val_fraction)
    index = {"dtype": dtype.name, "shards": lengths, "n_tokens": n_tokens, "n_train": n_train, "n_bytes": n_bytes}
    index |= {"n_documents": n_documents, "sha256": digest.hexdigest(), "vocab_size": tokenizer.vocab_size}
    index["files"] = [Path(file).name for file in documents.files][:100]
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return tokenizer


def _token_blocks(documents: Documents, tokenizer: Tokenizer) -> Iterator[np.ndarray | None]:
    """Token ids block by block, with None after each document; special tokens stand around documents."""
    begin = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=np.int32)
    end = np.array([] if tokenizer.eot_id is None else [tokenizer.eot_id], dtype=np.int32)
    for source, blocks in documents:
        yield begin
        yield from encode_blocks(source, blocks, tokenizer)
        yield end
        yield None


def encode_blocks(source: str, blocks: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Token ids of a document block by block; a complaint names the source and the line in it."""
    line, continues = 1, False
    for block in blocks:
        try:
            yield tokenizer.encode(block, line, continues)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        line, continues = line + block.count("\n"), True


def load_corpus(folder: Path, max_seq_len: int) -> Corpus:
    """The Corpus of a folder that `prepare` wrote; refuses one too short for the context."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        sizes = enumerate(index["shards"])
        shards = tuple(np.memmap(folder / f"{i:05d}.bin", index["dtype"], "r", shape=(size,)) for i, size in sizes)
        n, n_train, n_files = index["n_tokens"], index["n_train"], len(index["files"])
        shortest = min(n_train, n - n_train)
    except (ValueError, KeyError, TypeError) as error:
        why = f"index.json and the shards do not fit ({error!r})"
        raise InputError(f"{folder}: {why}; train in another --out") from None
    require(n > 0, f"the text is empty: 0 tokens in {n_files} file(s); give a text")
    lower = f" or a smaller --model.max_seq_len (below {shortest})" if shortest > 1 else ""
    require(
        shortest > max_seq_len,
        f"the text is too short: {n:,} tokens give {n_train:,} to train and {n - n_train:,} to validate, and each needs "
        f"more than max_seq_len {max_seq_len}; give more text{lower}",
    )
    return Corpus(Tokens(shards, 0, n_train), Tokens(shards, n_train, n), index)


def bytes_per_token(tokens: Tokens, tokenizer: Tokenizer, most: int = 20_000_000) -> float:
    """Mean UTF-8 bytes a token, over at most the first `most` tokens."""
    counts = np.bincount(tokens.array(most), minlength=tokenizer.vocab_size)
    return float((counts * tokenizer.piece_bytes).sum() / counts.sum())


def overlap(train: Tokens, val: Tokens, most: int = 20_000_000) -> float:
    """Share of the validation text, in windows of OVERLAP_TOKENS, that stands word for word in the training text."""
    if min(len(train), len(val)) < OVERLAP_TOKENS:
        return 0.0
    ours = np.sort(_window_hashes(val.array(most))[::OVERLAP_TOKENS])
    theirs = _window_hashes(train.array(most))
    places = np.minimum(np.searchsorted(ours, theirs), len(ours) - 1)
    return float(np.isin(ours, ours[places][ours[places] == theirs]).mean())


def _window_hashes(ids: np.ndarray) -> np.ndarray:
    """A 64-bit polynomial hash of the OVERLAP_TOKENS tokens from each place, by doubling: h_2n[i] = h_n[i] + p^n h_n[i+n]."""
    hashes, power, length = ids.astype(np.uint64) + np.uint64(1), 0x9E3779B97F4A7C15, 1
    while length < OVERLAP_TOKENS:
        hashes = hashes[:-length] + np.uint64(power) * hashes[length:]
        power, length = power * power % 2**64, 2 * length
    return hashes


# ---- batches -------------------------------------------------------------------------------------------------------


def make_reader(tokens: Tokens, device: torch.device) -> Callable[[np.ndarray, int], Tensor]:
    """A function (starts, length) -> windows (B, length) int64 on the device. Small texts move there once."""
    if device.type == "cpu" or 4 * len(tokens) > ON_DEVICE_BYTES:
        return lambda starts, length: torch.from_numpy(tokens.windows(starts, length).astype(np.int64)).to(device)
    moved = torch.from_numpy(tokens.array().astype(np.int32)).to(device)

    def read(starts: np.ndarray, length: int) -> Tensor:
        index = torch.from_numpy(starts).to(device, non_blocking=True)[:, None] + torch.arange(length, device=device)
        return moved[index].long()

    return read


class Batches:
    """Endless (inputs, targets), each (B, T) int64: every epoch covers the text once in windows laid from a random offset, in
    random order. The order is the same at any `world` for an equal micro_batch * world; rank r takes its share."""

    def __init__(
        self,
        tokens: Tokens,
        micro_batch: int,
        seq_len: int,
        seed: int,
        device: torch.device | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.tokens, self.micro_batch, self.seq_len, self.seed = tokens, micro_batch, seq_len, seed
        self.rank, self.world = rank, world
        self.read = make_reader(tokens, device or torch.device("cpu"))
        self.epoch, self.position = 0, 0
        self.order = self._order(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        starts = self._take(self.micro_batch * self.world)
        mine = starts[self.rank * self.micro_batch : (self.rank + 1) * self.micro_batch]
        windows = self.read(mine, self.seq_len + 1)
        return windows[:, :-1], windows[:, 1:]

    def _order(self, epoch: int) -> np.ndarray:
        """Starts of the windows of an epoch, shuffled."""
        generator = np.random.default_rng((self.seed, epoch))
        spare = len(self.tokens) - 1
        offset = int(generator.integers(min(self.seq_len, spare - self.seq_len + 1)))
        starts = np.arange(offset, spare - self.seq_len + 1, self.seq_len)
        return generator.permutation(starts)

    def _take(self, n: int) -> np.ndarray:
        """The next n starts, over the end of epochs."""
        parts = []
        while n > 0:
            part = self.order[self.position : self.position + n]
            parts.append(part)
            n, self.position = n - len(part), self.position + len(part)
            if self.position == len(self.order):
                self.epoch, self.position = self.epoch + 1, 0
                self.order = self._order(self.epoch)
        return np.concatenate(parts)

    def state_dict(self) -> dict[str, int]:
        """Where the order stands."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where state_dict was taken."""
        assert state["seed"] == self.seed, f"order of seed {state['seed']}, not {self.seed}"
        self.epoch, self.position = state["epoch"], state["position"]
        self.order = self._order(self.epoch)


def eval_batches(
    tokens: Tokens, batch: int, seq_len: int, most_tokens: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """The first windows of a stretch, side by side without overlap, as batches of (inputs, targets) on the device."""
    n = max(1, min(most_tokens, len(tokens) - 1) // seq_len)
    read = make_reader(tokens, device)
    starts = np.arange(n) * seq_len
    windows = [read(starts[i : i + batch], seq_len + 1) for i in range(0, n, batch)]
    return [(w[:, :-1], w[:, 1:]) for w in windows]
