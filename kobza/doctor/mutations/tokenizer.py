"""Bugs of tokenizers, each put into a clean specimen by one edit of its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kobza.doctor.files import tokenizer
from kobza.doctor.files.folder import bos_patch
from kobza.doctor.mutations.proof import Control, Mutation
from kobza.doctor.mutations.specimens import FAMILIES, LLAMA_SPLIT, QWEN_SPLIT, edit, folder

Edit = Callable[[dict[str, Any]], Any]
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def mutation(code: str, name: str, family: str, change: Edit, file: str = "tokenizer.json") -> Mutation:
    """A clean specimen of the family with one of its files edited."""

    def make(path: Path, seed: int, dtype: str) -> tokenizer.Tokens:
        return tokenizer.open_(edit(folder(path, family, seed, dtype), file, change))

    return Mutation(code, f"{family}: {name}", make)


def against(code: str, name: str, family: str, change: Edit) -> Mutation:
    """The same, held against the clean specimen."""

    def make(path: Path, seed: int, dtype: str) -> tokenizer.Tokens:
        wrong = edit(folder(path / "wrong", family, seed, dtype), "tokenizer.json", change)
        return tokenizer.open_(wrong, against=folder(path / "right", family, seed, dtype))

    return Mutation(code, f"{family}: {name}, against the right one", make)


def _control(family: str) -> Control:
    def make(path: Path, seed: int, dtype: str) -> tokenizer.Tokens:
        return tokenizer.open_(folder(path / "a", family, seed, dtype), against=folder(path / "b", family, seed, dtype))

    return Control(family, make)


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, LEVEL]}


def _put(key: str, value: Any) -> Edit:
    return lambda content: content.update({key: value})


def _twice(content: dict[str, Any]) -> None:
    """The first token put in front by two of the post-processors."""
    steps = content["post_processor"]["processors"]
    single = steps[-1]["single"]
    steps[-1]["single"] = [single[0], *single]


def _start(content: dict[str, Any], token: str) -> None:
    """Puts a token in front of every text."""
    content["post_processor"] = bos_patch(content, token)["value"]


def _forget(*symbols: str) -> Edit:
    """Gives tokens, and the merges that need them, to others: their ids stay in use."""

    def change(content: dict[str, Any]) -> None:
        model = content["model"]
        kept = [pair for pair in model["merges"] if not any(symbol in pair for symbol in symbols)]
        gone = {pair.replace(" ", "") for pair in model["merges"]} - {pair.replace(" ", "") for pair in kept}
        model["merges"] = kept
        names = {token: f"unused {i}" for i, token in enumerate([*symbols, *gone])}
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}

    return change


def _without_decoder(kind: str) -> Edit:
    def change(content: dict[str, Any]) -> None:
        steps = content["decoder"]["decoders"]
        content["decoder"]["decoders"] = [step for step in steps if step["type"] != kind]

    return change


def _cleans_up(content: dict[str, Any]) -> None:
    """Joins "do n't" in the decoder, as clean_up_tokenization_spaces does."""
    clean = {"type": "Replace", "pattern": {"String": " n't"}, "content": "n't"}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], {"type": "Fuse"}, clean]}


def _normalized(content: dict[str, Any]) -> None:
    """The ends of turns sought after the normalizer, which puts U+2581 before the text and thereby into what is sought."""
    for token in content["added_tokens"]:
        token["normalized"] = True


def _other_id(content: dict[str, Any]) -> None:
    for token in content["added_tokens"]:
        if token["content"] == "<end_of_turn>":
            token["id"] += 1


def _shifted_table(content: dict[str, Any]) -> None:
    table = content["added_tokens_decoder"]
    content["added_tokens_decoder"] = {str(int(i) + 1): token for i, token in table.items()}


def _same_id(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["the"] = vocab["a"]


CONTROLS = tuple(_control(family) for family in FAMILIES)
MUTATIONS = (
    mutation("L2", "two first tokens", "llama", _twice),
    against("L2", "a first token where there is none", "qwen", lambda content: _start(content, "<|im_start|>")),
    mutation("L3", "ByteLevel alone, as Llama 3 first came", "llama", _put("post_processor", LEVEL)),
    mutation("L3", "add_bos_token without effect", "gemma", _put("post_processor", None)),
    against("L3", "no first token", "gemma1", _put("post_processor", None)),
    mutation("L7", "Qwen's split", "llama", _put("pre_tokenizer", _split(QWEN_SPLIT))),
    mutation("L7", "GPT-2's split", "llama", _put("pre_tokenizer", LEVEL | {"use_regex": True})),
    mutation("L7", "Llama's split", "qwen", _put("pre_tokenizer", _split(LLAMA_SPLIT))),
    against(
        "L7", "a split at capitals", "gpt2", _put("pre_tokenizer", _split(r"\p{Lu}?[\p{Ll}\p{M}]+| ?[^\p{Ll}]|\s+"))
    ),
    mutation("L8", "bytes without a token", "qwen", _forget("Ò", "Ñ")),
    mutation("L8", "a hole in the byte fallback", "gemma", _forget("<0xD2>")),
    mutation("L8", "decoder leaves U+2581", "gemma", _without_decoder("Replace")),
    mutation("L8", "decoder leaves bytes", "phi", _without_decoder("ByteFallback")),
    mutation("L8", "no decoder", "gpt2", _put("decoder", None)),
    mutation("L8", "marks of turns read as text", "phi", _normalized),
    mutation(
        "L8",
        "a normalizer that strips",
        "llama",
        _put("normalizer", {"type": "Strip", "strip_left": False, "strip_right": True}),
    ),
    mutation("L9", "an added token with the id of another", "gemma", _other_id),
    mutation("L9", "two tokens with one id", "gpt2", _same_id),
    mutation("L9", "a table of another release", "phi", _shifted_table, "tokenizer_config.json"),
    mutation("L9", "a first token that is none", "llama", _put("bos_token", "<s>"), "tokenizer_config.json"),
    mutation("I9", "decoder that cleans up", "qwen", _cleans_up),
)
