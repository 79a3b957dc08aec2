"""The tokenizer that belongs to a pulled model, and what else a chat with it needs: template, ends, defaults of sampling.

A tokenizer has exactly as many ids as the model has rows: rows without a token (many models round their tables up) get a name,
a tokenizer with more tokens than rows is another model's. Nothing is executed: a pickled vocabulary is not read.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from kobza.config import InputError, SampleConfig, require
from kobza.formats.gguf import read_gguf
from kobza.formats.headers import inside, read_json
from kobza.formats.template import ChatTemplate, find_template
from kobza.hub.encodings import find_tokenizer
from kobza.hub.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, edges, tokenizer_text
from kobza.hub.spm import from_model
from kobza.tokenizer import CharTokenizer, LibraryTokenizer, Tokenizer, load_tokenizer

GPT2_ROWS = (50257, 50304)  # nanoGPT's, the second rounded up
TEXT_BYTES = 1 << 30  # of a text whose characters are the vocabulary
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SPELLED = {"char", "byte", "bpe"}


def tokenizer_of(path: Path, kind: str, rows: int, asked: str | None) -> Tokenizer:
    """The tokenizer of a model: the one asked for, or the one that lies with it. `kind` is that of formats.load.load_model."""
    if asked is not None:
        found = named(asked)
    elif kind == "gguf":
        found = of_gguf(path)
    elif kind == "hf":
        found = of_folder(path)
    else:
        found = of_trainer(path, kind, rows)
    return fitted(found, rows, asked or path.name)


def named(word: str) -> Tokenizer:
    """The tokenizer behind --tokenizer: what `kobza train` takes, llama2.c's tokenizer.bin, or a text for its characters."""
    path = Path(word)
    require(
        word not in SPELLED,
        f"--tokenizer {word} is learned from a text, and a pulled model brings its own; name a file",
    )
    if path.suffix == ".bin" and path.is_file():
        return LibraryTokenizer(of_llama2c(path))
    if path.suffix == ".txt" and path.is_file():
        require(path.stat().st_size <= TEXT_BYTES, f"--tokenizer {path}: more than {TEXT_BYTES:,} bytes")
        try:
            return CharTokenizer.train([path.read_text(encoding="utf-8")])
        except UnicodeDecodeError as error:
            raise InputError(f"--tokenizer {path}: byte {error.start} is not UTF-8; convert it first") from None
    refused = path.suffix in (".pkl", ".pickle", ".pt")
    require(not refused, f"--tokenizer {path}: a pickle can run code, so it is not read; {CHARACTERS}")
    found = find_tokenizer(word)
    assert found is not None  # None is what is learned
    return found


CHARACTERS = "for a model of characters name the .txt it was trained on"


def of_gguf(path: Path) -> LibraryTokenizer:
    """The tokenizer in a .gguf."""
    try:
        return LibraryTokenizer(tokenizer_text(read_gguf(path).metadata))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:  # what the library thinks of a damaged vocabulary
        raise InputError(f"{path}: its vocabulary is damaged: {error}; give a --tokenizer") from None


def of_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder in the Hugging Face layout."""
    if (folder / "tokenizer.json").exists():
        found = load_tokenizer(inside(folder, "tokenizer.json"))
        config = (
            read_json(inside(folder, "tokenizer_config.json")) if (folder / "tokenizer_config.json").exists() else {}
        )
        return beginning(found, config)
    if (folder / "tokenizer.model").exists():
        return from_model(inside(folder, "tokenizer.model"))
    raise InputError(f"{folder}: neither tokenizer.json nor tokenizer.model in it; give one with --tokenizer")


def beginning(tokenizer: Tokenizer, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer with or without a token at the beginning of every text, where tokenizer_config.json says it outright."""
    asked, bos = config.get("add_bos_token"), config.get("bos_token")
    name = bos.get("content") if isinstance(bos, dict) else bos
    if not isinstance(tokenizer, LibraryTokenizer) or not isinstance(asked, bool) or name not in tokenizer.specials:
        return tokenizer
    first = tokenizer.inner.encode("a", add_special_tokens=True).ids[:1] == [tokenizer.specials[name]]
    if first == asked:
        return tokenizer
    content = json.loads(tokenizer.to_json())
    after = content["post_processor"]
    if asked:
        ending = tokenizer.inner.encode("a", add_special_tokens=True).special_tokens_mask[-1:] == [1]
        require(
            not ending, "add_bos_token is true and tokenizer.json ends texts by itself; give a --tokenizer with both"
        )
        content["post_processor"] = edges(bos=(name, tokenizer.specials[name]))
    else:
        known = isinstance(after, dict) and after.get("type") == "TemplateProcessing"
        require(known, "add_bos_token is false and tokenizer.json puts a token first; mend one of the two files")
        for key in ("single", "pair"):
            after[key] = [part for part in after[key] if part.get("SpecialToken", {}).get("id") != name]
    return LibraryTokenizer(json.dumps(content, ensure_ascii=False))


def of_trainer(path: Path, kind: str, rows: int) -> Tokenizer:
    """The tokenizer of a small trainer's checkpoint, which has none in it: GPT-2's, where the rows say so."""
    if kind == "nanogpt" and rows in GPT2_ROWS:
        found = find_tokenizer("gpt2")
        assert found is not None
        return found
    hint = "llama2.c's tokenizer.bin or tokenizer.model" if kind == "llama2c" else CHARACTERS
    raise InputError(f"{path}: the file has no tokenizer for its {rows:,} rows; give --tokenizer: {hint}")


def of_llama2c(path: Path) -> str:
    """The text of a tokenizer.json out of llama2.c's tokenizer.bin: a number, then (score, length, bytes) a token."""
    size = path.stat().st_size
    require(4 <= size <= 1 << 26, f"{path}: {size:,} bytes; not llama2.c's tokenizer.bin")
    data, at, tokens, scores = path.read_bytes(), 4, [], []
    while at < size:
        good = at + 8 <= size
        score, length = struct.unpack_from("<fi", data, at) if good else (0.0, -1)
        good = good and 0 <= length <= size - at - 8
        require(good, f"{path}: token {len(tokens):,} is cut off; not llama2.c's tokenizer.bin, or a damaged one")
        tokens.append(data[at + 8 : at + 8 + length].decode("utf-8", errors="replace"))
        scores.append(score)
        at += 8 + length
    names = [token.replace(" ", "▁") for token in tokens]
    spelled = names[3:259] == [f"<0x{b:02X}>" for b in range(256)]
    require(
        spelled, f"{path}: {len(names)} tokens, not 3 special ones and 256 bytes first; not llama2.c's tokenizer.bin"
    )
    # the file writes them as "\n<s>\n" and "\n</s>\n", for printing
    names[:3] = ["<unk>", "<s>", "</s>"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(names) - 259)]
    listed = {"model": "llama", "tokens": names, "scores": scores, "token_type": kinds}
    listed |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return tokenizer_text({f"tokenizer.ggml.{key}": value for key, value in listed.items()})


def fitted(tokenizer: Tokenizer, rows: int, name: str) -> Tokenizer:
    """The tokenizer with as many ids as the model has rows."""
    n = tokenizer.vocab_size
    require(
        n <= rows, f"{name}: {n:,} tokens for a model of {rows:,} rows: another model's tokenizer; give the right one"
    )
    return tokenizer if n == rows else tokenizer.with_specials([f"<|unused_{i}|>" for i in range(n, rows)])


# ---- a chat --------------------------------------------------------------------------------------------------------


def chat_facts(path: Path, kind: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a chat needs besides weights and tokens: {"chat_template", "ends", "generation"}, each only where it is known."""
    if kind not in ("gguf", "hf"):
        return {"ends": tokenizer.ends}
    template = find_template(path)
    template = template if isinstance(template, ChatTemplate) else None
    ends = gguf_ends(path) if kind == "gguf" else folder_ends(path)
    ends = [i for i in ends if 0 <= i < tokenizer.vocab_size] or tokenizer.ends
    facts: dict[str, Any] = {"ends": ends}
    if template is not None:
        turn = turn_end(template, tokenizer)
        facts["ends"] = ends + [i for i in turn if i not in ends]
        facts["chat_template"] = {"source": template.source, "bos": template.bos, "eos": template.eos}
        facts["chat_template"]["specials"] = dict(template.specials)
    generation = sampling(path) if kind == "hf" else {}
    return facts | ({"generation": generation} if generation else {})


def gguf_ends(path: Path) -> list[int]:
    """The ids that end a text, by a .gguf's metadata."""
    metadata = read_gguf(path).metadata
    found = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return list(dict.fromkeys(i for i in found if isinstance(i, int)))


def folder_ends(folder: Path) -> list[int]:
    """The ids that end a text: those of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            found = read_json(inside(folder, name)).get("eos_token_id")
            found = found if isinstance(found, list) else [found]
            ids = [i for i in found if isinstance(i, int) and not isinstance(i, bool)]
            if ids:
                return list(dict.fromkeys(ids))
    return []


def sampling(folder: Path) -> dict[str, Any]:
    """The defaults of sampling in generation_config.json, where it samples at all."""
    if not (folder / "generation_config.json").exists():
        return {}
    config = read_json(inside(folder, "generation_config.json"))
    if config.get("do_sample") is not True:
        return {}
    chosen: dict[str, Any] = {"temperature": 1.0, "top_k": 50}  # transformers' own defaults
    for name in SAMPLING:
        try:
            SampleConfig(**{name: config[name]})
        except (KeyError, InputError):
            continue  # absent, null, or out of its range
        chosen[name] = config[name]
    return chosen


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The special token that the template puts after an answer, which must end a generation though few files list it."""
    question, answer = "kobzaquestion", "kobzaanswer"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        rendered = template.render(turns)
    except InputError:
        return []  # a template that will not render is reported when someone chats
    names = sorted((name for name in tokenizer.specials if name), key=len, reverse=True)
    after = rendered.rpartition(answer)[2] if answer in rendered else ""
    found = re.search("|".join(map(re.escape, names)), after) if names else None
    return [] if found is None or after[: found.start()].strip() else [tokenizer.specials[found[0]]]
