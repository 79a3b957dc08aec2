"""Training data as people have it: text files and folders, .jsonl of texts, chats or labelled ids, token shards. Streamed and
bounded.

A Source is opened by looking at it: a suffix, the keys of the first row, the first bytes of a shard. No torch, and nothing is
taken for granted: bytes that are not UTF-8 are noted and read on, a row that is no JSON is one line of InputError.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kobza.config import InputError, nearest, require

BLOCK = 4 << 20
MOST_BYTES = 1 << 30  # of a source that are read; more is left out and said
MOST_LINE = 64 << 20
MOST_FILES = 100_000
TEXT = (".txt", ".md", ".text")
MAGIC = 20240520  # modded-nanogpt's and llm.c's shards begin with 256 int32, this one first
MASKED = -100  # what Hugging Face's losses leave out


@dataclass
class Source:
    """Where training data come from. kind: "text", "chat" (rows of messages), "labels" (rows of input_ids and labels) or
    "ids"."""

    path: Path
    kind: str
    files: list[Path]
    ids: np.ndarray | None = None
    index: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    broken: tuple[str, int, bytes] | None = None
    """the first bytes that are not UTF-8: file, offset, what stands there"""

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    def blocks(self) -> Iterator[str]:
        """The text in blocks of a few million characters, cut at line ends; documents are parted by a line end."""
        if self.kind == "text" and self.files[0].suffix not in (".jsonl",) and not self._rows():
            for file in self.files:
                yield from _cut_at_lines(self._text(file))
            return
        held, size = [], 0
        for _, document in self.documents():
            held.append(document)
            size += len(document)
            if size > BLOCK:
                yield "\n".join(held) + "\n"
                held, size = [], 0
        yield "\n".join(held)

    def documents(self) -> Iterator[tuple[str, str]]:
        """(where, text) of each document: a row of a .jsonl, or a file in blocks."""
        for file in self.files:
            if _kind(file) != ".jsonl":
                yield from ((file.name, block) for block in _cut_at_lines(self._text(file)))
                continue
            for where, row in self._rows_of(file):
                if self.kind == "chat":
                    yield where, "\n".join(text for _, text in chat_of(row, where))
                else:
                    text = row.get(_text_key(row))
                    require(isinstance(text, str), f"{where}: no text{nearest('text', list(map(str, row)))}")
                    yield where, text

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, object) of each row of the .jsonl files."""
        for file in self.files:
            yield from self._rows_of(file)

    def _rows(self) -> bool:
        return any(_kind(file) == ".jsonl" for file in self.files)

    def _rows_of(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        rest, number = "", 0
        for block in self._text(file):
            *lines, rest = (rest + block).split("\n")
            require(
                len(rest) <= MOST_LINE,
                f"{file.name} line {number + 1}: longer than {MOST_LINE:,} characters; split its rows",
            )
            for line in lines:
                number += 1
                if line.strip():
                    yield f"{file.name}:{number}", _object(line, f"{file.name} line {number}")
        if rest.strip():
            yield f"{file.name}:{number + 1}", _object(rest, f"{file.name} line {number + 1}")

    def _text(self, file: Path) -> Iterator[str]:
        """Decoded blocks of a file; what is not UTF-8 is noted, and U+FFFD stands for it."""
        decoder, read, failed = codecs.getincrementaldecoder("utf-8")("strict"), 0, False
        with _open(file) as stream:
            while True:
                try:
                    raw = stream.read(BLOCK)
                except (EOFError, OSError, zlib.error) as error:
                    raise InputError(f"{file}: cannot be read: {error}") from None
                pending = 0 if failed else len(decoder.getstate()[0])
                try:
                    text = decoder.decode(raw, not raw)
                except UnicodeDecodeError as error:
                    offset = read - pending + error.start
                    self.broken = self.broken or (file.name, offset, error.object[error.start : error.start + 8])
                    failed, decoder = True, codecs.getincrementaldecoder("utf-8")("replace")
                    text = decoder.decode(error.object, not raw)
                if read == 0:
                    text = text.removeprefix("\ufeff")
                read += len(raw)
                if text:
                    yield text.replace("\r\n", "\n")
                if not raw or read >= MOST_BYTES:
                    if raw:
                        self.notes.append(f"{file.name}: only its first {MOST_BYTES >> 20:,} MB were read")
                    return


def open_source(path: Path) -> Source:
    """The Source behind a file or folder."""
    path = Path(path)
    require(path.exists(), f"{path}: no such file or folder")
    if path.is_dir() and (path / "data" / "index.json").is_file() and not (path / "index.json").is_file():
        path = path / "data"  # a run's folder
    if path.is_dir() and (path / "index.json").is_file():
        return _shards(path)
    files = _files(path)
    if files[0].suffix == ".bin":
        require(len(files) == 1, f"{path}: {len(files)} .bin files and no index.json; give one of them")
        return _headerless(files[0])
    source = Source(path, "text", files)
    if _kind(files[0]) == ".jsonl":
        first = next(source._rows_of(files[0]), None)
        require(first is not None, f"{files[0]}: no rows in it")
        source.kind = _row_kind(*first)  # type: ignore[misc]
    require(any(file.stat().st_size for file in files), f"{path}: empty; there is nothing to examine")
    return source


def _files(path: Path) -> list[Path]:
    if path.is_file():
        good = _kind(path) in (*TEXT, ".jsonl", ".bin")
        require(
            good,
            f"{path}: a {path.suffix or 'nameless'} file; give {' '.join(TEXT)} .jsonl (also .gz), .bin or a folder",
        )
        return [path]
    root, found = path.resolve(), []
    for file in path.rglob("*"):
        if not file.is_file() or _kind(file) not in (*TEXT, ".jsonl", ".bin"):
            continue
        require(file.resolve().is_relative_to(root), f"{file}: a link out of its folder; copy the file in its place")
        found.append(file)
        require(len(found) <= MOST_FILES, f"{path}: more than {MOST_FILES:,} files; join them")
    kinds = {_kind(file) for file in found}
    texts = sorted(file for file in found if _kind(file) != ".bin") or sorted(found)
    require(bool(texts), f"{path}: nothing in it that is {' '.join(TEXT)} .jsonl or .bin")
    require(
        not (".jsonl" in kinds and kinds & set(TEXT)), f"{path}: both .jsonl and text files; give one kind at a time"
    )
    return texts


def _kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _open(file: Path) -> BinaryIO:
    try:
        return gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def _cut_at_lines(blocks: Iterator[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        whole, end, rest_of = (rest + block).rpartition("\n")
        if not end and len(rest_of) > BLOCK:
            whole, rest_of = rest_of, ""
        rest = rest_of
        if whole:
            yield whole + end
    if rest:
        yield rest


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {' '.join(str(error).split())[:100]}") from None
    require(isinstance(row, dict), f"{where}: a {type(row).__name__}, not an object")
    return row


def _row_kind(where: str, row: dict[str, Any]) -> str:
    if "input_ids" in row:
        require("labels" in row, f"{where}: input_ids without labels; there is nothing to audit")
        return "labels"
    if {"messages", "conversations"} & set(row) or {"prompt", "completion"} <= set(row):
        return "chat"
    require(bool(_text_key(row)), f"{where}: no text, messages or input_ids; keys: {', '.join(map(str, row))[:80]}")
    return "text"


def _text_key(row: dict[str, Any]) -> str:
    return next((key for key in ("text", "content", "document", "body") if isinstance(row.get(key), str)), "")


def messages_of(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of a row as {"role", "content", ...}, contents as text; ShareGPT's "from" and "value" are understood."""
    given = row.get("messages", row.get("conversations"))
    if given is None and {"prompt", "completion"} <= set(row):
        given = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    known = isinstance(given, list)
    require(known, f"{where}: neither messages nor prompt and completion; keys: {', '.join(map(str, row))[:80]}")
    made = []
    for message in given:
        require(isinstance(message, dict), f"{where}: a message is a {type(message).__name__}, not an object")
        role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(text, list):  # parts: images stand beside texts
            parts = [part.get("text") for part in text if isinstance(part, dict)]
            text = "".join(part for part in parts if isinstance(part, str))
        good = isinstance(role, str) and isinstance(text, str | None)
        require(good, f"{where}: a message wants a role and a content that are texts")
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        made.append(rest | {"role": {"human": "user", "gpt": "assistant"}.get(role, role), "content": text or ""})
    return made


def chat_of(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(role, text) of each message of a row."""
    return [(message["role"], message["content"]) for message in messages_of(row, where)]


# ---- shards ----------------------------------------------------------------------------------------------------------


def _shards(folder: Path) -> Source:
    """kobza's own: index.json tells the width, 00000.bin, ... hold the ids."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8")[: 1 << 20])
        dtype, sizes = np.dtype(str(index["dtype"])), [int(size) for size in index["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder}/index.json: not the index of token shards ({type(error).__name__})") from None
    require(
        dtype.kind == "u" and len(sizes) <= MOST_FILES, f"{folder}/index.json: dtype {dtype}; ids are unsigned integers"
    )
    files = [folder / f"{i:05d}.bin" for i in range(len(sizes))]
    missing = next((file.name for file in files if not file.is_file()), None)
    require(missing is None and bool(files), f"{folder}: no {missing or 'shards'}; prepare the text again")
    parts = [_map(file, dtype, 0) for file in files]
    ids = parts[0] if len(parts) == 1 else np.concatenate([part[: MOST_BYTES // dtype.itemsize] for part in parts])
    return Source(folder, "ids", files, ids, index | {"sizes": [len(part) for part in parts]})


def _headerless(file: Path) -> Source:
    """One .bin: with llm.c's header, or nanoGPT's bare uint16; 32-bit numbers show by their upper halves, which are 0."""
    size = file.stat().st_size
    require(size >= 4, f"{file}: {size} bytes; there are no tokens in it")
    with file.open("rb") as stream:
        head = stream.read(1024)
    if len(head) == 1024 and int.from_bytes(head[:4], "little") == MAGIC:
        wide = int.from_bytes(head[4:8], "little") >= 7  # version 7 and later of modded-nanogpt's are uint32
        return Source(file, "ids", [file], _map(file, np.dtype("<u4" if wide else "<u2"), 1024))
    ids = _map(file, np.dtype("<u2"), 0)
    seen = ids[: 1 << 20]
    high, low = seen[1::2], seen[0::2]
    if size % 4 == 0 and len(high) > 8 and np.mean(high <= 3) > 0.999 and np.mean(low <= 3) < 0.5:
        return Source(
            file,
            "ids",
            [file],
            _map(file, np.dtype("<u4"), 0),
            notes=["read as 32-bit numbers: every second 16 bits are 0"],
        )
    return Source(file, "ids", [file], ids)


def _map(file: Path, dtype: np.dtype, offset: int) -> np.ndarray:
    n = (file.stat().st_size - offset) // dtype.itemsize
    return np.memmap(file, dtype, "r", offset, (n,)) if n else np.zeros(0, dtype)
