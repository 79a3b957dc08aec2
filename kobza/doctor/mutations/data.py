"""Clean texts, rows and shards, and what people do to them: copies of the validation text, wrong encodings, labels masked by
mistake.

The texts are random sentences over an invented vocabulary, so that nothing repeats but what is made to.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kobza.doctor.mutations.proof import Control, Mutation
from kobza.doctor.mutations.specimens import folder
from kobza.doctor.training.data import DataSubject, open_
from kobza.doctor.training.sources import MASKED

SYLLABLES = {
    "en": "ba ce di fo gu ha je ki lo mu na pe ri so tu va we yo zi chi sta pre on er ing".split(),
    "uk": "ба ве ги до жу за їй ка лі мо на пе рі со ту фа хи це чо ші єв юн ять ий ї".split(),
}
Rows = list[dict[str, Any]]


@functools.cache
def _vocabulary(script: str) -> tuple[list[str], np.ndarray]:
    """1,500 words and their summed frequencies, which fall as in any text (Zipf)."""
    rng = np.random.default_rng(17)
    words = ["".join(rng.choice(SYLLABLES[script], rng.integers(1, 4))) for _ in range(1500)]
    weights = np.cumsum(1 / np.arange(2, len(words) + 2))
    return words, weights / weights[-1]


def prose(seed: int, n_sentences: int, script: str = "en", apostrophe: str = "'") -> str:
    """Random sentences, an apostrophe here and there."""
    rng = np.random.default_rng([seed, n_sentences])
    words, summed = _vocabulary(script)
    lengths = rng.integers(6, 20, n_sentences)
    drawn = [words[i] for i in np.searchsorted(summed, rng.random(int(lengths.sum()))).tolist()]
    marked, place, lines = rng.random(n_sentences) < 0.1, 0, []
    for length, mark in zip(lengths.tolist(), marked.tolist(), strict=True):
        line = drawn[place : place + length]
        if mark:
            line[2] = f"{line[2]}{apostrophe}{line[3]}"
        lines.append(" ".join(line).capitalize() + ".")
        place += length
    return "\n".join(lines) + "\n"


def _write(path: Path, name: str, text: str | bytes) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return path / name


def _jsonl(path: Path, name: str, rows: Rows) -> Path:
    return _write(path, name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _texts(
    change: Callable[[str, str], tuple[str | bytes, str | bytes]], script: str = "en"
) -> Callable[[Path, int, str], DataSubject]:
    """A training and a validation text, changed together."""

    def make(path: Path, seed: int, dtype: str) -> DataSubject:
        train, val = change(prose(seed, 3000, script), prose(seed + 1000, 400, script))
        return open_(_write(path, "train.txt", train), _write(path, "val.txt", val))

    return make


def _documents(change: Callable[[Rows], Rows]) -> Callable[[Path, int, str], DataSubject]:
    """A .jsonl of texts, and another to validate on."""

    def make(path: Path, seed: int, dtype: str) -> DataSubject:
        train = [{"text": prose(seed * 100 + i, 12)} for i in range(60)]
        val = [{"text": prose(seed * 100 + 5000 + i, 12)} for i in range(20)]
        return open_(_jsonl(path, "train.jsonl", change(train)), _jsonl(path, "val.jsonl", val))

    return make


def _chats(change: Callable[[Rows], Rows]) -> Callable[[Path, int, str], DataSubject]:
    def make(path: Path, seed: int, dtype: str) -> DataSubject:
        rows = []
        for i in range(40):
            question, answer = prose(seed * 100 + i, 1).strip(), prose(seed * 100 + i, 2).strip()
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        return open_(_jsonl(path, "train.jsonl", change(rows)))

    return make


def _labelled(
    change: Callable[[Rows, dict[str, int]], Rows], family: str = "qwen", known: bool = True
) -> Callable[[Path, int, str], DataSubject]:
    """Rows of a chat as a collator leaves them: prompt masked, answer and its end supervised, padded on the right to one
    length."""

    def make(path: Path, seed: int, dtype: str) -> DataSubject:
        model = folder(path / family, family, seed, dtype)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        names = {name: tokenizer.token_to_id(name) for name in ENDS[family]}
        end, pad, start = (names[name] for name in ENDS[family])
        rows = []
        for i in range(24):
            prompt = [
                start,
                *tokenizer.encode("user\nWhat is " + prose(seed + i, 1)[:20], add_special_tokens=False).ids,
                end,
                start,
            ]
            answer = [*tokenizer.encode(prose(seed + 50 + i, 1)[: 15 + i], add_special_tokens=False).ids, end]
            ids = prompt + answer
            padding = max(160 - len(ids), 0)
            row = {"input_ids": ids + [pad] * padding, "labels": [MASKED] * len(prompt) + answer + [MASKED] * padding}
            rows.append(row | {"attention_mask": [1] * len(ids) + [0] * padding})
        file = _jsonl(path, "train.jsonl", change(rows, {"end": end, "pad": pad, "start": start}))
        return open_(file, tokenizer=model if known else None)

    return make


# the token that ends a turn, one to pad with, and one that opens a turn
ENDS = {
    "qwen": ("<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    "llama": ("<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"),
    "gemma": ("<end_of_turn>", "<pad>", "<start_of_turn>"),
    "phi": ("<|end|>", "<|placeholder1|>", "<|user|>"),
    "gpt2": ("<|endoftext|>",) * 3,
}


def _shards(
    dtype: str, change: Callable[[np.ndarray, int], np.ndarray], header: bytes = b"", vocab: int = 0
) -> Callable[[Path, int, str], DataSubject]:
    """Two headerless shards of ids of the tiny Qwen; `vocab` enlarges its tokenizer to so many tokens."""

    def make(path: Path, seed: int, _: str) -> DataSubject:
        model = folder(path / "qwen", "qwen", seed)
        if vocab:
            _enlarge(model / "tokenizer.json", vocab)
        size = vocab or 313
        made = []
        for name, n in (("train", 6000), ("val", 900)):
            ids = np.random.default_rng([seed, n]).integers(0, size, n)
            made.append(_write(path, f"{name}.bin", header + change(ids, size).astype(dtype).tobytes()))
        return open_(made[0], made[1], model)

    return make


def _enlarge(file: Path, vocab: int) -> None:
    """More tokens in a tokenizer.json, of which no text makes use."""
    content = json.loads(file.read_text(encoding="utf-8"))
    known = content["model"]["vocab"]
    first = max([*known.values(), *(token["id"] for token in content["added_tokens"])]) + 1
    known |= {f"zq{i}": i for i in range(first, vocab)}
    file.write_text(json.dumps(content), encoding="utf-8")


def _own_shards(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path, int, str], DataSubject]:
    """kobza's own: index.json and 00000.bin."""

    def make(path: Path, seed: int, dtype: str) -> DataSubject:
        ids = np.random.default_rng(seed).integers(0, 300, 5000).astype("uint16")
        index = {"dtype": "uint16", "shards": [5000], "n_tokens": 5000, "n_train": 4500, "vocab_size": 300}
        edit(index)
        _write(path / "data", "00000.bin", ids.tobytes())
        _write(path / "data", "index.json", json.dumps(index))
        return open_(path / "data")

    return make


def _spelled(text: str, old: str, new: str, each: int) -> str:
    """Every `each`-th `old` of a text as `new`."""
    parts = text.split(old)
    return "".join(part + (new if i % each == 0 else old) for i, part in enumerate(parts[:-1])) + parts[-1]


def _near(val: str) -> str:
    """Every eleventh word another one."""
    words = val.split(" ")
    return " ".join("zqother" if i % 11 == 5 else word for i, word in enumerate(words))


def _mask_all(rows: Rows, ids: dict[str, int]) -> Rows:
    return [row | {"labels": [MASKED] * len(row["labels"])} if i % 3 == 0 else row for i, row in enumerate(rows)]


def _mask(rows: Rows, token: int) -> Rows:
    """The usual collator: labels of a token masked wherever it stands."""
    return [row | {"labels": [MASKED if i == token else i for i in row["labels"]]} for row in rows]


def _pad_with_end(rows: Rows, ids: dict[str, int]) -> Rows:
    """pad = eos, and padding masked by its id: the answer's end is masked with it."""
    padded = [row | {"input_ids": [ids["end"] if i == ids["pad"] else i for i in row["input_ids"]]} for row in rows]
    return _mask(padded, ids["end"])


def _without_mask(rows: Rows) -> Rows:
    return [{key: value for key, value in row.items() if key != "attention_mask"} for row in rows]


def _same(train: str, val: str) -> tuple[str, str]:
    return train, val


CONTROLS: tuple[Control, ...] = (
    Control("two texts", _texts(_same)),
    Control("two Ukrainian texts", _texts(_same, "uk")),
    Control(
        "texts with emoji, stress marks and accents",
        _texts(lambda t, v: (t + "Ма́ма 👩‍👩‍👧 naïve café Ångström 日本 3D-модель iPhone.\n", v), "uk"),
    ),
    Control("documents", _documents(lambda rows: rows)),
    Control("chats", _chats(lambda rows: rows)),
    *(
        Control(f"labelled rows, {family}", _labelled(lambda rows, ids: rows, family))
        for family in ENDS
        if family != "gpt2"
    ),
    Control("labelled rows, gpt2 with pad = eos, masked by place", _labelled(lambda rows, ids: rows, "gpt2")),
    Control("labelled rows, no tokenizer", _labelled(lambda rows, ids: _without_mask(rows), "llama", known=False)),
    Control("16-bit shards", _shards("<u2", lambda ids, size: ids)),
    Control("32-bit shards", _shards("<u4", lambda ids, size: ids, vocab=70_000)),
    Control(
        "shards with llm.c's header",
        _shards("<u2", lambda ids, size: ids, np.array([20240520, 1] + [0] * 254, "<i4").tobytes()),
    ),
    Control("kobza's shards", _own_shards(lambda index: None)),
)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation("R19", "5% of the validation text in the training text", _texts(lambda t, v: (t + v[: len(v) // 12], v))),
    Mutation(
        "R19", "all of it, in capitals and other lines", _texts(lambda t, v: (t + v.upper().replace("\n", " "), v))
    ),
    Mutation("R19", "a word in eleven changed", _texts(lambda t, v: (t + _near(v), v))),
    Mutation(
        "R19",
        "validation rows among the documents",
        _documents(lambda rows: [*rows, *({"text": prose(5000 + i, 12)} for i in range(5))]),
    ),
    Mutation(
        "R19",
        "shards that overlap",
        _shards("<u2", lambda ids, size: np.resize(np.random.default_rng(5).integers(0, size, 500), len(ids))),
    ),
    Mutation("R19", "lines twice", _texts(lambda t, v: (t + t[: len(t) // 3], v))),
    Mutation("R19", "documents twice", _documents(lambda rows: [*rows, *rows[:5]])),
    Mutation("R19", "sorted by language", _texts(lambda t, v: (t + prose(9, 3000, "uk"), v))),
    Mutation("L11", "70,000 tokens in 16 bits", _shards("<u2", lambda ids, size: ids, vocab=70_000)),
    Mutation(
        "L11",
        "an id beyond the vocabulary",
        _shards("<u2", lambda ids, size: np.where(np.arange(len(ids)) == 777, size + 9, ids)),
    ),
    Mutation("L11", "index.json tells another width", _own_shards(lambda index: index.update(dtype="uint32"))),
    Mutation(
        "L11",
        "index.json tells a vocabulary too large for it",
        _own_shards(lambda index: index.update(vocab_size=100_000)),
    ),
    Mutation(
        "L12",
        "a slice in NFD",
        _texts(lambda t, v: (t[:9000] + unicodedata.normalize("NFD", t[9000:15000]) + t[15000:], v), "uk"),
    ),
    Mutation("L12", "Latin letters in Cyrillic words", _texts(lambda t, v: (_spelled(t, "і", "i", 400), v), "uk")),
    Mutation("L12", "replacement characters", _texts(lambda t, v: (t[:500] + "\ufffd" + t[500:], v))),
    Mutation(
        "L12",
        "cp1251 read as Latin-1",
        _texts(lambda t, v: (t + t[:3000].encode("cp1251", "ignore").decode("latin-1"), v), "uk"),
    ),
    Mutation(
        "L12",
        "UTF-8 read as cp1252",
        _texts(lambda t, v: (t + "It was the Ã©lan of the cafÃ©, she said â€œnoâ€\u009d naÃ¯ve.\n" * 3, v)),
    ),
    Mutation(
        "L12",
        "UTF-8 read as cp1251",
        _texts(lambda t, v: (t + "привіт козаче".encode().decode("cp1251") + "\n", v), "uk"),
    ),
    Mutation("L12", "not UTF-8", _texts(lambda t, v: (t.encode() + "Їхав козак".encode("cp1251") + b"\n", v), "uk")),
    Mutation("L12", "two apostrophes", _texts(lambda t, v: (_spelled(t, "'", "\u2019", 3), v), "uk")),
    Mutation("L12", "a byte order mark inside", _texts(lambda t, v: (t + "\ufeff" + prose(5, 5), v))),
    Mutation("R5", "response marker not found", _labelled(_mask_all)),
    Mutation(
        "R5",
        "prompt in the loss",
        _labelled(lambda rows, ids: [row | {"labels": list(row["input_ids"])} for row in _unpadded(rows)]),
    ),
    Mutation(
        "R5",
        "chats without an answer",
        _chats(lambda rows: [{"messages": row["messages"][:1]} if i % 9 == 0 else row for i, row in enumerate(rows)]),
    ),
    Mutation("R5", "chats without a message", _chats(lambda rows: [{"messages": []}, *rows])),
    Mutation("R5", "empty answers", _chats(lambda rows: [*rows, _answered(rows[0], " ")])),
    Mutation("R3", "pad = eos, masked by id", _labelled(_pad_with_end)),
    Mutation(
        "R3",
        "pad = eos, masked by id, no tokenizer and no mask",
        _labelled(lambda rows, ids: _without_mask(_pad_with_end(rows, ids)), known=False),
    ),
    Mutation("R3", "no end-of-text", _labelled(lambda rows, ids: _cut_ends(rows, ids))),
    Mutation(
        "R4",
        "padding in the loss",
        _labelled(
            lambda rows, ids: [
                row
                | {
                    "labels": [
                        i if label == MASKED and not on else label
                        for i, label, on in zip(row["input_ids"], row["labels"], row["attention_mask"], strict=True)
                    ]
                }
                for row in rows
            ]
        ),
    ),
    Mutation(
        "R2",
        "labels shifted beforehand",
        _labelled(lambda rows, ids: [row | {"labels": [*row["labels"][1:], MASKED]} for row in rows]),
    ),
)


def _answered(row: dict[str, Any], answer: str) -> dict[str, Any]:
    return {"messages": [row["messages"][0], {"role": "assistant", "content": answer}]}


def _unpadded(rows: Rows) -> Rows:
    return [{"input_ids": row["input_ids"][: sum(row["attention_mask"])]} for row in rows]


def _cut_ends(rows: Rows, ids: dict[str, int]) -> Rows:
    """Answers without their end."""
    made = []
    for row in rows:
        n = sum(row["attention_mask"]) - 1
        made.append({"input_ids": row["input_ids"][:n], "labels": row["labels"][:n]})
    return made
