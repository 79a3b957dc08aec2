"""Training and validation data: what of one stands in the other, what stands twice, what is no clean text, what is learnt of a
row.

`open_` takes text files and folders, .jsonl of texts, chats or labelled ids, and token shards. Each kind has its checks and the
others say that they were skipped. Texts are streamed: 100 MB take about a minute, and memory stays below half a gigabyte. No
torch.

Thresholds come from clean texts. Of tinyshakespeare's last tenth no run of 13 words and 0.8% of its runs of five stand in the
rest, 3% in the worst window of 64 words; random sentences have none. Song collections, licences and library code do repeat
themselves, and that is what is reported of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np

from kobza.config import InputError, require
from kobza.doctor.files.turns import CONTROL
from kobza.doctor.finding import Check, Finding, Skip
from kobza.doctor.training.overlap import (
    counts_characters,
    covered,
    found_in,
    line_hashes,
    longest,
    runs,
    streamed,
    words_of,
)
from kobza.doctor.training.sources import MASKED, Source, chat_of, open_source
from kobza.doctor.training.supervised import Audit, audit, marked
from kobza.doctor.training.unicode import APOSTROPHES, Census, count

RUN, PIECE, WINDOW = (
    13,
    5,
    64,
)  # words: of a copy (GPT-3, appendix C), of a piece of a near copy, of the window it is looked for in
CHARACTERS = 4  # times as many where characters are counted
SEEN_ERROR, SEEN_WARN = 0.05, 0.005  # share of the validation words that stand in training text
NEAR, NEAR_SHARE = 0.3, 0.02  # pieces of a window that are known; windows like that
LEAST_LINE = 40  # bytes: shorter lines repeat in any play
REPEATED = 0.1  # share of bytes in lines that stood before: 0 in tinyshakespeare, 5% in a library of Python code
TWICE = 0.01  # share of documents that stood before
DRIFT = 0.25  # bits; see drift()
MOST_VAL = 48 << 20  # characters of the validation text
SAMPLE = 2 << 20  # tokens or characters looked at closely


@dataclass
class Tokenizer:
    """The little that is asked of one."""

    size: int
    decode: Callable[[Sequence[int]], str]
    name_of: Callable[[int], str]
    ends: frozenset[int]


@dataclass
class DataSubject:
    """Training data, validation data or None, a tokenizer or None."""

    train: Source
    val: Source | None = None
    tokenizer: Tokenizer | None = None

    @property
    def sources(self) -> list[Source]:
        """The sources there are."""
        return [source for source in (self.train, self.val) if source is not None]

    @cached_property
    def census(self) -> list[tuple[Source, Census]]:
        """The characters of each text."""
        return [(source, count(source.blocks())) for source in self.sources if source.kind in ("text", "chat")]

    @cached_property
    def audits(self) -> list[tuple[Source, Audit]]:
        """What is supervised in each source of labelled rows."""
        return [(source, audit(source.rows())) for source in self.sources if source.kind == "labels"]


def open_(train: Path, val: Path | None = None, tokenizer: Path | None = None) -> DataSubject:
    """The subject of a training and a validation file or folder; `tokenizer` is a tokenizer.json, or a folder that holds
    one."""
    made = DataSubject(open_source(Path(train)), None if val is None else open_source(Path(val)))
    if tokenizer is not None:
        made.tokenizer = _tokenizer(Path(tokenizer))
    return made


def _tokenizer(path: Path) -> Tokenizer:
    import json

    from tokenizers import Tokenizer as Library

    file = path / "tokenizer.json" if path.is_dir() else path
    require(file.is_file(), f"{file}: no such file; give a tokenizer.json or a folder that holds one")
    try:
        library = Library.from_file(str(file))
        added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or []
    except Exception as error:
        raise InputError(f"{file}: not a tokenizer.json: {' '.join(str(error).split())[:120]}") from None
    names = {
        token["content"]: token["id"] for token in added if isinstance(token, dict) and {"content", "id"} <= set(token)
    }
    ends = {i for name, i in names.items() if any(word in name for word in ("end", "eos", "</s>", "eot"))}
    biggest = max([*library.get_vocab(with_added_tokens=True).values(), -1]) + 1
    return Tokenizer(
        biggest,
        lambda ids: library.decode([int(i) for i in ids], skip_special_tokens=False),
        lambda i: repr(library.id_to_token(int(i)) or f"id {i}"),
        frozenset(ends),
    )


# ---- R19 -------------------------------------------------------------------------------------------------------------


def check_contamination(subject: DataSubject) -> Iterator[Finding]:
    """The validation text does not stand in the training text, word for word or nearly."""
    if subject.val is None:
        raise Skip("no validation data")
    kinds = {source.kind for source in subject.sources}
    if kinds == {"ids"}:
        yield from _seen_ids(subject)
        return
    if not kinds <= {"text", "chat"}:
        raise Skip(
            f"training data of kind {subject.train.kind} and validation data of kind {subject.val.kind} are not compared"
        )
    text = _beginning(subject.val, MOST_VAL)
    characters = counts_characters(text)
    text = text[: MOST_VAL // 8] if characters else text
    words, factor = words_of(text, characters), CHARACTERS if characters else 1
    sizes = (RUN * factor, PIECE * factor)
    if len(words.hashes) < sizes[0]:
        raise Skip(f"the validation text has {len(words.hashes)} words; a run of {sizes[0]} is looked for")
    whole, pieces = (runs(words.hashes, n) for n in sizes)
    wanted = np.concatenate([whole, pieces])
    met = found_in(wanted, chain.from_iterable(streamed(subject.train.blocks(), characters, sizes)))
    seen = covered(met[: len(whole)], sizes[0])
    where = f"{subject.val.name} in {subject.train.name}"
    share = float(seen.mean())
    first, last = longest(seen)
    if share >= SEEN_WARN:
        passage = words.text(first, min(last, first + 60))
        unit = "characters" if characters else "words"
        got = f"{share:.1%} of its {unit} stand in the training text in runs of {sizes[0]} or more; "
        got += f"the longest has {last - first + 1:,}"
        severity = "error" if share >= SEEN_ERROR else "warn"
        why = "the validation loss rewards memory: it looks better than the model is"
        fix = "split by document, not by line or chunk, and take what stands twice out of the training text"
        expected = "validation text that was not trained on"
        yield Finding(
            "R19", severity, "proven", where, expected, got, why, fix, f"{passage!r}", "GPT-3, appendix C; marin #6742"
        )
    yield from _near(where, words, met[len(whole) :], seen, WINDOW * factor)


def _near(where: str, words, met: np.ndarray, seen: np.ndarray, window: int) -> Iterator[Finding]:  # noqa: ANN001
    """Windows of which many pieces are known though they were not copied whole."""
    n = len(met) // window
    if n == 0:
        return
    known = met[: n * window].reshape(n, window).mean(1)
    copied = seen[: n * window].reshape(n, window).mean(1)
    near = (known > NEAR) & (copied < 0.05)
    if near.mean() < NEAR_SHARE or near.sum() < 2:
        return
    i = int(np.argmax(np.where(near, known, 0)))
    got = f"{int(near.sum()):,} of {n:,} windows of {window} words are near copies: "
    got += f"more than {NEAR:.0%} of their runs of {PIECE} are known"
    why = "a text changed in a word here and there is still the text that was trained on"
    fix = "take near copies out as well: compare documents by their runs of five words"
    text = words.text(i * window, (i + 1) * window - 1)
    example = f"{text!r}: {known[i]:.0%} of its runs of {PIECE} words stand in the training text"
    yield Finding("R19", "warn", "proven", where, "validation text that was not trained on", got, why, fix, example)


def _beginning(source: Source, most: int) -> str:
    held, size = [], 0
    for block in source.blocks():
        held.append(block[: most - size])
        size += len(held[-1])
        if size >= most:
            source.notes.append(f"only the first {most:,} characters of {source.name} were compared")
            break
    return "".join(held)


def _seen_ids(subject: DataSubject) -> Iterator[Finding]:
    """The same of token shards: windows of 64 ids."""
    assert subject.val is not None and subject.val.ids is not None and subject.train.ids is not None
    ours, n = subject.val.ids[: 4 * SAMPLE].astype(np.uint64), WINDOW
    if len(ours) < n:
        raise Skip(f"the validation shard has {len(ours)} tokens")
    train, step = subject.train.ids, 8 * SAMPLE
    blocks = (runs(train[i : i + step + n - 1].astype(np.uint64), n) for i in range(0, len(train), step))
    seen = covered(found_in(runs(ours, n), blocks), n)
    share, (first, last) = float(seen.mean()), longest(seen)
    if share < SEEN_WARN:
        return
    got = f"{share:.1%} of its tokens stand in the training shard in runs of {n} or more; the longest has {last - first + 1:,}"
    ids = ours[first : first + 24].tolist()
    example = f"validation tokens {first:,} to {last:,}: {ids}" + (
        f" {subject.tokenizer.decode(ids)!r}" if subject.tokenizer else ""
    )
    severity = "error" if share >= SEEN_ERROR else "warn"
    why, fix = "the validation loss rewards memory", "split by document before tokens are made"
    where = f"{subject.val.name} in {subject.train.name}"
    yield Finding(
        "R19", severity, "proven", where, "validation tokens that were not trained on", got, why, fix, example
    )


def check_repeats(subject: DataSubject) -> Iterator[Finding]:
    """The training text does not repeat itself: lines, and documents of a .jsonl."""
    if subject.train.kind not in ("text", "chat"):
        raise Skip(f"training data of kind {subject.train.kind}")
    yield from _repeated_lines(subject.train)
    if _rows(subject.train):
        yield from _repeated_documents(subject.train)


def _rows(source: Source) -> bool:
    return source.files[0].name.removesuffix(".gz").endswith(".jsonl")


def _repeated_lines(source: Source) -> Iterator[Finding]:
    pairs = [line_hashes(block, LEAST_LINE) for block in source.blocks()]
    hashes = np.concatenate([pair[0] for pair in pairs] or [np.zeros(0, np.uint64)])
    sizes = np.concatenate([pair[1] for pair in pairs] or [np.zeros(0, np.int64)])
    if len(hashes) < 50:
        return
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    share = 1 - sizes[first].sum() / sizes.sum()
    if share < REPEATED:
        return
    most = int(np.argmax(counts * sizes[first]))
    text = _line(source, hashes[first[most]])
    got = f"{share:.1%} of the bytes in lines of {LEAST_LINE} bytes and more are repetitions"
    example = f"{text!r} stands {int(counts[most]):,} times"
    why = "repeated text is learnt by heart, and costs what new text would have cost"
    expected, fix = "lines that stand once", "remove repeated lines or documents"
    yield Finding("R19", "warn", "proven", source.name, expected, got, why, fix, example, "arXiv 2107.06499")


def _line(source: Source, wanted: np.uint64) -> str:
    for block in source.blocks():
        hashes, _ = line_hashes(block, LEAST_LINE)
        if (hashes == wanted).any():
            i = int(np.flatnonzero(hashes == wanted)[0])
            lines = [line for line in block.encode("utf-8", "surrogatepass").split(b"\n") if len(line) >= LEAST_LINE]
            return lines[i].decode("utf-8", "replace").strip()[:120]
    return ""


def _repeated_documents(source: Source) -> Iterator[Finding]:
    seen: dict[int, str] = {}
    n, twice, example = 0, 0, ""
    for where, text in source.documents():
        key, n = hash(" ".join(text.split())), n + 1
        if key in seen:
            twice += 1
            example = example or f"{where} is {seen[key]}: {text[:80]!r}"
        else:
            seen[key] = where
    if twice and twice / n >= TWICE:
        got = f"{twice:,} of {n:,} documents stood before"
        why, fix = "they are trained on as often as they stand there", "keep each document once"
        yield Finding(
            "R19", "warn", "proven", source.name, "each document once", got, why, fix, example, "arXiv 2107.06499"
        )


def check_order(subject: DataSubject) -> Iterator[Finding]:
    """The training text is not sorted by source: its tenths have one vocabulary."""
    source = subject.train
    if source.kind == "ids":
        raise Skip("token shards; give the text")
    if source.kind == "labels":
        raise Skip("rows of ids; give the text")
    tenths = _tenths(source)
    if tenths is None:
        raise Skip("too little text to compare its parts")
    moved, names = drift(tenths)
    if moved < DRIFT:
        return
    got = f"{moved:.2f} bits between the vocabularies of its first and last third; words of the one and not of the other: {names}"
    why = "a split at the end validates on another source, and a loader that reads in order forgets the first"
    expected = f"parts that differ by less than {DRIFT} bits"
    yield Finding(
        "R19", "warn", "likely", source.name, expected, got, why, "shuffle documents before they are split", names
    )


def _tenths(source: Source) -> list[dict[str, int]] | None:
    """Counts of words of a sample of each tenth of the text."""
    sizes = [len(block) for block in source.blocks()]
    total = sum(sizes)
    if total < 20_000:
        return None
    made: list[dict[str, int]] = [{} for _ in range(10)]
    place = 0
    for block in source.blocks():
        for start in range(0, len(block), max(total // 100, 1)):
            part = made[min(10 * (place + start) // total, 9)]
            for word in block[start : start + min(total // 100, 20_000)].lower().split():
                word = word.strip(".,;:!?\"'()[]«»-—")
                if word:
                    part[word] = part.get(word, 0) + 1
        place += len(block)
    return made


def drift(tenths: list[dict[str, int]]) -> tuple[float, str]:
    """How far the first third's vocabulary is from the last third's, in bits (Jensen-Shannon, 1 is nothing in common), over the
    200 words most frequent in both together, less what the even and odd tenths differ by: the noise of counting."""
    first, last, even, odd = (
        _added(tenths[i] for i in part) for part in ((0, 1, 2), (7, 8, 9), (0, 2, 4, 6, 8), (1, 3, 5, 7, 9))
    )
    both = _added([first, last])
    words = sorted(both, key=lambda word: (-both[word], word))[:200]
    moved = _divergence(first, last, words) - _divergence(even, odd, words)
    n = max(sum(first.values()), 1), max(sum(last.values()), 1)
    one = sorted(words, key=lambda word: last.get(word, 0) / n[1] - first.get(word, 0) / n[0])
    return moved, f"{' '.join(one[:4])} | {' '.join(one[-4:])}"


def _added(parts) -> dict[str, int]:  # noqa: ANN001
    made: dict[str, int] = {}
    for part in parts:
        for word, n in part.items():
            made[word] = made.get(word, 0) + n
    return made


def _divergence(a: dict[str, int], b: dict[str, int], words: list[str]) -> float:
    p, q = (np.array([part.get(word, 0) for word in words], float) for part in (a, b))
    if not p.sum() or not q.sum():
        return 1.0
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(sum(np.nansum(np.where(x > 0, x * np.log2(x / m), 0)) for x in (p, q)) / 2)


# ---- L11 -------------------------------------------------------------------------------------------------------------


def check_shards(subject: DataSubject) -> Iterator[Finding]:
    """The numbers of a shard are wide enough for the vocabulary, and none is beyond it."""
    shards = [source for source in subject.sources if source.kind == "ids"]
    if not shards:
        raise Skip("no token shards")
    for source in shards:
        assert source.ids is not None
        size = subject.tokenizer.size if subject.tokenizer else source.index.get("vocab_size")
        yield from _sizes(source)
        if isinstance(size, int):
            yield from _width(source, subject.tokenizer, size)


def _sizes(source: Source) -> Iterator[Finding]:
    """The files are as long as the index says."""
    given, found = source.index.get("shards"), source.index.get("sizes")
    if given != found:
        i = next(i for i, (a, b) in enumerate(zip(given, found, strict=True)) if a != b)
        where = f"{source.name}/{i:05d}.bin"
        size = source.files[i].stat().st_size
        dtype = np.dtype(source.index["dtype"])
        got = f"{size:,} bytes, {size / max(given[i], 1):.3g} a token; {dtype.name} has {dtype.itemsize}"
        why, fix = "ids are read at the wrong width: noise instead of text", "prepare the text again"
        example = f"index.json: {given[i]:,} tokens of {source.index['dtype']}; the file: {size:,} bytes"
        yield Finding("L11", "error", "proven", where, f"{given[i]:,} tokens", got, why, fix, example)


def _width(source: Source, tokenizer: Tokenizer | None, size: int) -> Iterator[Finding]:
    assert source.ids is not None
    dtype, ids = source.ids.dtype, source.ids
    holds = 1 << 8 * dtype.itemsize
    name = tokenizer.name_of if tokenizer else lambda i: f"id {i}"
    if size > holds:
        i = holds + min(4, size - holds - 1)
        got = f"{dtype.name}, which holds ids below {holds:,}"
        why = f"every id from {holds:,} on is stored modulo {holds:,}: other tokens stand in its place, and nothing says so"
        example = f"token {i:,} {name(i)} is stored as {i % holds} {name(i % holds)}"
        fix = "write uint32"
        yield Finding(
            "L11",
            "error",
            "proven",
            source.name,
            f"a width for {size:,} tokens",
            got,
            why,
            fix,
            example,
            "transformers #2825",
        )
        return
    step = 8 * SAMPLE
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        if int(part.max(initial=0)) >= size:
            place = start + int(np.argmax(part >= size))
            why = "an id without a row: a crash on some devices, a foreign number on others"
            fix = "make the shard with the tokenizer it is trained with, or read it at its true width"
            around = ids[max(place - 3, 0) : place + 4].tolist()
            example = f"token {place:,} of the shard is {int(ids[place]):,}; with its neighbours: {around}"
            got = f"{int(ids[place]):,} at {place:,}"
            yield Finding("L11", "error", "proven", source.name, f"ids below {size:,}", got, why, fix, example)
            return


# ---- L12 -------------------------------------------------------------------------------------------------------------


def check_unicode(subject: DataSubject) -> Iterator[Finding]:
    """Letters are composed and of one script, nothing was decoded wrongly, an apostrophe is spelled in one way."""
    if not subject.census:
        raise Skip("no text; give the text behind the ids")
    for source, census in subject.census:
        if source.broken:
            file, offset, raw = source.broken
            why, fix = (
                "it is not UTF-8: what stands there is lost or read wrongly",
                "convert the file: iconv -f CP1251 -t UTF-8",
            )
            yield Finding(
                "L12",
                "error",
                "proven",
                f"{file}: byte {offset:,}",
                "UTF-8",
                f"{raw!r}",
                why,
                fix,
                f"{raw!r} at {offset:,}",
            )
        for kind, number in census.counts.items():
            yield _character_finding(source.name, kind, number, census.examples[kind])
        yield from _apostrophes(source.name, census)


def _character_finding(where: str, kind: str, number: int, examples: list[str]) -> Finding:
    expected, why, fix = {
        "decomposed": (
            "composed letters (NFC)",
            "one word has two spellings and other tokens in each",
            "unicodedata.normalize('NFC', text)",
        ),
        "look-alike": (
            "words of one script",
            "the word looks right and is another to the tokenizer",
            "write the letters of the word's own script",
        ),
        "mojibake": (
            "text that was decoded as it was encoded",
            "the model learns to write it",
            "decode the source by its own encoding",
        ),
        "U+FFFD": (
            "no replacement characters",
            "what stood there is lost, and the model learns to write the sign",
            "decode the source anew",
        ),
    }.get(kind, ("no invisible characters", "words that look alike are not", f"remove {kind.split(',')[0]}"))
    severity = "info" if kind.startswith(("U+00AD", "U+200E")) else "warn"
    return Finding(
        "L12", severity, "proven", where, expected, f"{kind}: {number:,}", why, fix, "; ".join(examples) or kind
    )


def _apostrophes(where: str, census: Census) -> Iterator[Finding]:
    """Two spellings of the apostrophe in one text, each in use."""
    total = sum(census.apostrophes.values())
    used = {mark: n for mark, n in census.apostrophes.items() if n >= 3 and n >= 0.02 * total}
    if len(used) < 2:
        return
    got = ", ".join(f"{APOSTROPHES[mark]} {n:,} times" for mark, n in sorted(used.items()))
    example = "; ".join(f"{APOSTROPHES[mark]} in {census.examples[mark][0]!r}" for mark in sorted(used))
    why = "the same word is spelled in two ways and learnt twice"
    fix = "choose one: U+2019 in Ukrainian and English print, U+02BC in dictionaries"
    yield Finding("L12", "warn", "proven", where, "one apostrophe inside words", got, why, fix, example)


# ---- R2 to R5: labelled rows and chats -------------------------------------------------------------------------------


def check_supervised(subject: DataSubject) -> Iterator[Finding]:
    """Each row teaches something, its end too, no padding, and labels stand at their own tokens."""
    if not subject.audits:
        raise Skip("no rows of input_ids and labels")
    for source, found in subject.audits:
        require(found.n_rows > 0, f"{source.path}: no rows in it")
        yield from _nothing(source, found, subject.tokenizer)
        yield from _padding(source, found, subject.tokenizer)
        yield from _ends(source, found, subject.tokenizer)
        yield from _shift(source, found, subject.tokenizer)


def _show(tokenizer: Tokenizer | None) -> Callable[[Sequence[int]], str]:
    return tokenizer.decode if tokenizer else lambda ids: " ".join(map(str, ids)) + " "


def _nothing(source: Source, found: Audit, tokenizer: Tokenizer | None) -> Iterator[Finding]:
    if found.none:
        where, ids, labels, _ = found.first["none"]
        got = f"{found.none:,} of {found.n_rows:,} rows have no label but {MASKED}"
        why = "they teach nothing, and a batch of them has a loss of 0/0: a response marker was not found"
        fix = "mask by the ids of the marker as they are in the row, or by character offsets"
        example = f"{where}: {marked(ids, labels, _show(tokenizer))}"
        severity = "error" if found.none >= 0.01 * found.n_rows else "warn"
        yield Finding(
            "R5",
            severity,
            "proven",
            where,
            "some tokens supervised in each row",
            got,
            why,
            fix,
            example,
            "trl #1820 #1183",
        )
    if found.empty:
        got = f"{found.empty:,} of {found.n_rows:,} rows are empty"
        why, fix = "they are padding and no more", "leave them out"
        yield Finding("R5", "warn", "proven", source.name, "rows with tokens", got, why, fix, got)
    if tokenizer and found.whole == found.n_rows - found.empty and found.n_rows:
        where, ids, labels, _ = next(value for law, value in found.first.items() if law.startswith("last"))
        text = tokenizer.decode(ids)
        if CONTROL.search(text) and any(word in text for word in ("user", "INST", "human")):
            why = "the model is trained to write the user's part too; where prompts are long that is most of the loss"
            fix = f"label the prompt {MASKED}"
            example = f"{where}: {marked(ids, labels, tokenizer.decode)}"
            yield Finding(
                "R5",
                "warn",
                "proven",
                source.name,
                "the prompt masked",
                "every token of every row supervised",
                why,
                fix,
                example,
            )


def _padding(source: Source, found: Audit, tokenizer: Tokenizer | None) -> Iterator[Finding]:
    if not found.padded:
        return
    where, ids, labels, place = found.first["padded"]
    got = f"{found.padded:,} of {found.n_rows:,} rows have labels where attention_mask is 0, first at {place}: {labels[place]}"
    why = "the model learns to write padding, and the loss hangs on how rows are batched"
    example = f"{where}: {marked(ids, labels, _show(tokenizer))}"
    yield Finding("R4", "error", "proven", where, f"{MASKED} on padding", got, why, f"label padding {MASKED}", example)


def _ends(source: Source, found: Audit, tokenizer: Tokenizer | None) -> Iterator[Finding]:
    """The end-of-text after the last supervised token is supervised too."""
    taught = sum(found.last.values())
    if not taught or found.padded:
        return
    end, n = max(found.after.items(), key=lambda pair: pair[1], default=(-1, 0))
    known = tokenizer is not None and end in tokenizer.ends
    ends = tokenizer.ends if tokenizer and tokenizer.ends else frozenset(i for i, _ in found.last.most_common(1))
    learnt = sum(found.last[i] for i in ends)  # without a tokenizer: what most answers end in is taken for their end
    if learnt >= 0.9 * taught:
        return
    why = "the model never learns to stop: pad = eos and a collator that masks padding do this"
    fix = "mask padding by attention_mask, not by id; give padding a token of its own"
    if n >= 0.5 * taught and n > 1 and (known or end not in found.last):
        where, ids, labels, place = found.first[f"after {end}"]
        name = tokenizer.name_of(end) if tokenizer else f"token {end}"
        got = f"{name} after the answer is {MASKED} in {n:,} of {taught:,} rows"
        example = f"{where}, place {place}: {marked(ids, labels, _show(tokenizer))}"
        severity, confidence = ("error", "proven") if known else ("warn", "likely")
        yield Finding(
            "R3", severity, confidence, where, "the end of the answer supervised", got, why, fix, example, "trl #976"
        )  # type: ignore[arg-type]
        return
    if tokenizer and tokenizer.ends and learnt < 0.5 * taught:
        firsts = ((int(law[5:]), value) for law, value in found.first.items() if law.startswith("last"))
        where, ids, labels, place = next(value for i, value in firsts if i not in tokenizer.ends)
        got = f"{learnt:,} of {taught:,} rows"
        example = f"{where}: {marked(ids, labels, tokenizer.decode)}"
        why, fix = "the model never learns to stop", "put the end-of-text behind each answer before labels are made"
        expected = f"an answer that ends in {' or '.join(tokenizer.name_of(i) for i in sorted(tokenizer.ends)[:3])}"
        yield Finding("R3", "warn", "proven", where, expected, got, why, fix, example)


def _shift(source: Source, found: Audit, tokenizer: Tokenizer | None) -> Iterator[Finding]:
    taught = sum(found.last.values())
    if taught < 2 or found.kept >= 0.5 * taught or found.shifted < 0.9 * taught:
        return
    where, ids, labels, place = next(value for law, value in found.first.items() if law.startswith("last"))
    i = next(i for i, label in enumerate(labels) if label != MASKED)
    got = f"labels[i] == input_ids[i + 1] in {found.shifted:,} of {taught:,} rows"
    why = "a loss that shifts by itself, as Hugging Face's do, then predicts the token after the next"
    after = ids[i + 1] if i + 1 < len(ids) else "-"
    example = f"{where}: place {i} holds {ids[i]}, its label is {labels[i]}, the next token {after}"
    fix = "labels = input_ids with the prompt masked, not shifted"
    yield Finding(
        "R2", "warn", "likely", where, "labels[i] == input_ids[i]", got, why, fix, example, "transformers #37830"
    )


def check_chats(subject: DataSubject) -> Iterator[Finding]:
    """Each chat has an answer in it, and no empty one."""
    chats = [source for source in subject.sources if source.kind == "chat"]
    if not chats:
        raise Skip("no rows of messages")
    for source in chats:
        n, bare, empty, example, hollow = 0, 0, 0, "", ""
        for where, row in source.rows():
            messages, n = chat_of(row, where), n + 1
            answers = [text for role, text in messages if role == "assistant"]
            if not answers:
                bare, example = bare + 1, example or f"{where}: {[(role, text[:40]) for role, text in messages]}"
            elif not all(text.strip() for text in answers):
                empty, hollow = empty + 1, hollow or f"{where}: {[(role, text[:40]) for role, text in messages]}"
        fix = "leave the rows out"
        if bare:
            got, why = f"{bare:,} of {n:,} rows have no assistant's message", "nothing in them is supervised"
            severity = "error" if bare >= 0.01 * n else "warn"
            yield Finding("R5", severity, "proven", source.name, "an answer in each row", got, why, fix, example)
        if empty:
            got, why = f"{empty:,} of {n:,} rows have an empty answer", "the model learns to say nothing"
            yield Finding("R5", "warn", "proven", source.name, "answers with text", got, why, fix, hollow)


# ---- facts -----------------------------------------------------------------------------------------------------------


def facts(subject: DataSubject) -> dict[str, list[list[str]]]:
    """What the data are, for people: sizes, scripts, decoded windows of shards, a row as it is learnt."""
    made = {"Data": [["source", "kind", "files", "size", "notes"]]}
    for source in subject.sources:
        size = f"{len(source.ids):,} tokens of {source.ids.dtype.name}" if source.ids is not None else _bytes(source)
        made["Data"].append(
            [source.name, source.kind, f"{len(source.files):,}", size, "; ".join(dict.fromkeys(source.notes))]
        )
    for source, census in subject.census:
        rows = [["what", "count"], ["characters", f"{census.n_characters:,}"]]
        rows += [[f"apostrophe {APOSTROPHES[mark]}", f"{n:,}"] for mark, n in census.apostrophes.most_common()]
        made[f"Characters of {source.name}"] = rows + [[kind, f"{n:,}"] for kind, n in census.counts.most_common()]
    for source in subject.sources:
        if source.kind == "chat":
            made[f"Chats of {source.name}"] = _chat_facts(source)
    for source, found in subject.audits:
        made[f"Supervised tokens of {source.name}"] = _audit_facts(found, subject.tokenizer)
    for source in subject.sources:
        if source.ids is not None and len(source.ids):
            made[f"Windows of {source.name}"] = [["at", "decoded"], *_windows(source.ids, subject.tokenizer)]
    return made


def _bytes(source: Source) -> str:
    return f"{sum(file.stat().st_size for file in source.files) / 1e6:,.2f} MB"


def _windows(ids: np.ndarray, tokenizer: Tokenizer | None, length: int = 32) -> Iterator[list[str]]:
    for i in range(3):
        start = int(np.random.default_rng(i).integers(0, max(len(ids) - length, 0) + 1))
        window = ids[start : start + length].tolist()
        try:
            yield [f"{start:,}", repr(tokenizer.decode(window)) if tokenizer else " ".join(map(str, window))]
        except Exception as error:  # an id that the tokenizer's library does not take
            yield [f"{start:,}", f"cannot be decoded: {error}"]


def _chat_facts(source: Source) -> list[list[str]]:
    roles: Counter[str] = Counter()
    turns, sizes = [0], [0]
    for where, row in source.rows():
        messages = chat_of(row, where)
        roles.update(role for role, _ in messages)
        turns.append(len(messages))
        sizes.append(sum(len(text) for _, text in messages))
    return [
        ["what", "value"],
        ["rows", f"{len(turns) - 1:,}"],
        ["messages by role", ", ".join(f"{role} {n:,}" for role, n in roles.most_common(8))],
        ["most messages in a row", f"{max(turns):,}"],
        ["characters of a row, median and most", f"{sorted(sizes[1:] or [0])[len(sizes[1:]) // 2]:,}, {max(sizes):,}"],
    ]


def _audit_facts(found: Audit, tokenizer: Tokenizer | None) -> list[list[str]]:
    shares = sorted(found.shares) or [0.0]
    rows = [
        ["what", "value"],
        ["rows", f"{found.n_rows:,}"],
        ["tokens supervised", f"{found.n_supervised / max(found.n_tokens, 1):.1%}"],
        ["share of a row: least, median, most", f"{shares[0]:.1%}, {shares[len(shares) // 2]:.1%}, {shares[-1]:.1%}"],
        ["rows with none", f"{found.none:,}"],
        ["longest row", f"{max(found.lengths, default=0):,}"],
    ]
    ends = found.last.most_common(3)
    rows += [
        ["an answer's last token", ", ".join(f"{tokenizer.name_of(i) if tokenizer else i} {n:,}" for i, n in ends)]
    ]
    examples = [value for law, value in found.first.items() if law.startswith("last")]
    for where, ids, labels, _ in islice(examples, 2):
        rows.append([f"{where}, learnt in ⟦ ⟧", marked(ids, labels, _show(tokenizer))])
    return rows


CHECKS: tuple[Check, ...] = (
    Check("R19", "validation text was not trained on", check_contamination),
    Check("R19", "training text does not repeat itself", check_repeats),
    Check("R19", "training text is not sorted by source", check_order),
    Check("L11", "ids fit their width and the vocabulary", check_shards),
    Check("L12", "characters are clean", check_unicode),
    Check("R2 R3 R4 R5", "rows teach what they are meant to", check_supervised),
    Check("R5", "chats have answers", check_chats),
)
