"""What a GGUF header says of tokens and chats, held against itself and against the folder the file was made from.

Special ids, token types, the vocabulary's lists, pre-tokenizer, BOS, the end of a turn; beside a Hugging Face folder also tokens,
merges, ids and rendered chats. The tensors' side is gguf_weights.py; gguf.py puts both together. What llama.cpp does with a
header is meant wherever "readers" stands: src/llama-vocab.cpp as llama-cpp-python 0.3.36 ships it. A file whose structure lies is
refused by the reader, formats/gguf.py, before a check is made. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kobza.config import ModelConfig, require
from kobza.doctor.finding import Check, Finding, Skip
from kobza.formats.families import config_from_hf
from kobza.formats.gguf import Gguf, read_gguf
from kobza.formats.gguf_families import config_from_gguf
from kobza.formats.headers import TensorInfo, find_tensors, inside, read_json
from kobza.formats.layouts import GGUF_LAYOUTS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type, llama.h
VALUE_TYPES = {  # tokenizer.ggml.* -> the GGUF value types that readers take
    "model": ("string",),
    "pre": ("string",),
    "tokens": ("array:string",),
    "merges": ("array:string",),
    "token_type": ("array:int32", "array:uint32"),
    "scores": ("array:float32",),
    "add_bos_token": ("bool",),
    "add_eos_token": ("bool",),
}
ID_TYPES = ("uint32", "int32", "uint64", "int64", "uint16", "int16", "uint8", "int8")
# pre-tokenizers whose name makes llama.cpp put BOS in front unless the file says otherwise, and of the others those of note
BOS_BY_PRE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
BOS_BY_PRE += ("tekken", "chameleon")
PLAIN_PRE = (
    "default",
    "gpt-2",
    "phi-2",
    "qwen2",
    "qwen35",
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "olmo",
    "dbrx",
)
PLAIN_PRE += (
    "stablelm2",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "deepseek-r1-qwen",
    "falcon",
    "mpt",
    "bloom",
)
PLAIN_PRE += ("gpt-4o", "exaone", "exaone4", "smaug-bpe")
# what llama.cpp takes where a file names no bos or eos
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2}, "gpt2": {"bos": 11, "eos": 11}}
# llama.cpp stops at a token of one of these names and takes it for a control token, whatever the header says; others do not
ENDS_BY_NAME = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
)
ENDS_BY_NAME += (
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
)
CONTROL_LOOKING = re.compile(r"<\|[^|<>\s]{1,60}\|>|<(?:start|end)_of_\w{1,40}>|</?s>|<[be]os>")
MARK = "Lute7Marker"
CHATS = (
    [{"role": "user", "content": "Hi there"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}],
    [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": " two\n  lines "},
    ],
)
F2_SOURCES = "https://github.com/ggml-org/llama.cpp/issues/4040"


@dataclass(frozen=True)
class GgufSubject:
    """A GGUF file, and the Hugging Face folder that it was made from, if there is one."""

    gguf: Gguf
    folder: Path | None = None
    worst: dict[str, float] = field(default_factory=dict, compare=False)
    """type -> largest relative L2 of a tensor from the folder's, once a check has compared them"""

    @property
    def arch(self) -> str:
        return str(self.gguf.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of tokenizer.ggml.*, if it is of the type that readers want."""
        whole = self.gguf.types.get(f"tokenizer.ggml.{key}") in VALUE_TYPES[key]
        return self.gguf.metadata[f"tokenizer.ggml.{key}"] if whole else default

    @cached_property
    def tokens(self) -> list[str]:
        """The vocabulary; Skip where the file has none."""
        tokens = self.get("tokens")
        if tokens is None:
            raise Skip("the file has no vocabulary (tokenizer.ggml.tokens)")
        return tokens

    @cached_property
    def token_types(self) -> list[int] | None:
        """The type of each token, None where the file has no such list or one of another length (which is a finding)."""
        types = self.get("token_type")
        return types.tolist() if types is not None and len(types) == len(self.tokens) else None

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """bos, eos, eot, padding, ... -> id."""
        found = {}
        for key, value in self.gguf.metadata.items():
            match = re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", key)
            if match and self.gguf.types[key] in ID_TYPES:
                found[match[1]] = value
        return found

    def text(self, i: int) -> str:
        """A token as it is shown: its text in quotes, or that there is none."""
        return repr(self.tokens[i][:60]) if 0 <= i < len(self.tokens) else "no token"

    @cached_property
    def config(self) -> ModelConfig:
        """What the settings say the model is, less rope_freqs.weight; InputError where they do not go together."""
        if self.arch not in GGUF_LAYOUTS:
            raise Skip(f"architecture {self.arch!r}: its settings are not known here; known: {', '.join(GGUF_LAYOUTS)}")
        shapes = {name: tensor.shape for name, tensor in self.gguf.tensors.items()}
        return config_from_gguf(self.gguf.metadata, shapes)

    # -- the folder beside it

    def _json(self, name: str, needed: bool) -> dict[str, Any]:
        if self.folder is None:
            raise Skip("no Hugging Face folder to compare with; give --hf DIR")
        path = self.folder / name
        if not needed and not path.exists() and not path.is_symlink():
            return {}
        return read_json(inside(self.folder, name), 64 << 20)

    @cached_property
    def hf(self) -> dict[str, Any]:
        return self._json("config.json", True)

    @cached_property
    def hf_config(self) -> ModelConfig:
        return config_from_hf(self.hf)

    @cached_property
    def generation(self) -> dict[str, Any]:
        return self._json("generation_config.json", False)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        return self._json("tokenizer_config.json", False)

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json; Skip where the folder has none."""
        found = self._json("tokenizer.json", False)
        if not found:
            raise Skip("the folder has no tokenizer.json")
        return found

    @cached_property
    def hf_tokens(self) -> dict[int, str]:
        """id -> token of tokenizer.json, added ones too."""
        model = self.tokenizer.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list):  # Unigram: [[token, score], ...]
            vocab = {
                row[0]: i for i, row in enumerate(vocab) if isinstance(row, list) and row and isinstance(row[0], str)
            }
        if not isinstance(vocab, dict):
            raise Skip("tokenizer.json has no vocab of token -> id")
        return {i: t for t, i in vocab.items() if isinstance(i, int)} | {t["id"]: t["content"] for t in self.added}

    @cached_property
    def added(self) -> list[dict[str, Any]]:
        """The added tokens of tokenizer.json that are whole."""
        added = self.tokenizer.get("added_tokens") or []
        whole = isinstance(added, list) and all(isinstance(token, dict) for token in added)
        require(whole, f"{self.folder}/tokenizer.json: added_tokens is no list of objects")
        return [t for t in added if isinstance(t.get("id"), int) and isinstance(t.get("content"), str)]

    def hf_ids(self, name: str) -> set[int]:
        """Every id that the folder gives for bos, eos, pad or unk, in whichever file."""
        found: set[int] = set()
        for values in (self.hf, self.hf.get("text_config"), self.generation):
            value = values.get(f"{name}_token_id") if isinstance(values, dict) else None
            found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
        token = self.tokenizer_config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        try:
            return found | {i for i, known in self.hf_tokens.items() if known == text}
        except Skip:  # no tokenizer.json: config.json alone
            return found

    @cached_property
    def hf_tensors(self) -> dict[str, tuple[Path, TensorInfo]]:
        if self.folder is None:
            raise Skip("no Hugging Face folder to compare with; give --hf DIR")
        return find_tensors(self.folder)


def open_(path: Path, hf: Path | None = None) -> GgufSubject:
    """The subject of these checks: a .gguf file, and the folder it was made from."""
    require(hf is None or Path(hf).is_dir(), f"{hf} is not a folder; give the one with config.json")
    return GgufSubject(read_gguf(path), None if hf is None else Path(hf))


def f2(where: str, expected: str, got: str, why: str, fix: str, proof: str = "", **how: Any) -> Finding:
    """A finding about the header's flags: an error where there is a proof."""
    level: dict[str, Any] = (
        {"severity": "error", "confidence": "proven"} if proof else {"severity": "warn", "confidence": "likely"}
    )
    level |= how
    where = "tokenizer.chat_template" if where == "chat_template" else f"tokenizer.ggml.{where}"
    return Finding(
        "F2",
        **level,
        where=where,
        expected=expected,
        got=got,
        why=why,
        fix=fix,
        counterexample=proof,
        source=F2_SOURCES,
    )


# -- the header alone ----------------------------------------------------------------------------------------------


def values_have_types(s: GgufSubject) -> Iterator[Finding]:
    """Each key of the tokenizer is of the type that readers want."""
    for full, type in s.gguf.types.items():
        key = full.removeprefix("tokenizer.ggml.")
        wanted = VALUE_TYPES.get(key, (type,)) if key != full else (type,)
        wanted = ID_TYPES if key != full and key.endswith("_token_id") else wanted
        wanted = ("string",) if full in ("tokenizer.chat_template", "general.architecture") else wanted
        if type not in wanted:
            proof = f"{full} is of type {type}, and must be {wanted[0]}"
            why = "llama.cpp refuses a key of another type; other readers take it for absent"
            found = f2(key, wanted[0], type, why, "convert again", proof)
            yield replace(found, where=full)


def ids_name_tokens(s: GgufSubject) -> Iterator[Finding]:
    """Every special id is one of a token."""
    tokens = s.tokens
    for name, i in s.special_ids.items():
        if not 0 <= i < len(tokens):
            yield Finding(
                "L9",
                "error",
                "proven",
                where=f"tokenizer.ggml.{name}_token_id",
                expected=f"an id below {len(tokens):,}, the tokens of the vocabulary",
                got=f"{i:,}",
                why="the id names no row: readers drop it or read past the end of the embedding",
                fix="write the id of a token of the vocabulary, or leave the key out",
                counterexample=f"{name}_token_id = {i}; the last token is {len(tokens) - 1} {s.text(len(tokens) - 1)}",
                source="https://github.com/ggml-org/llama.cpp/issues/8682",
            )


def ends_are_named(s: GgufSubject) -> Iterator[Finding]:
    """A file names its EOS, and its BOS if readers put it in front; else llama.cpp takes an id of its own."""
    defaults = DEFAULT_IDS.get(str(s.get("model")))
    if defaults is None:
        raise Skip(f"tokenizer.ggml.model is {s.get('model')!r}; its default ids are not known here")
    for name in ("eos", "bos") if adds_bos(s) else ("eos",):
        i = defaults[name]
        if name in s.special_ids or s.text(i) in (("'</s>'",) if name == "eos" else ("'<s>'",)):
            continue
        why = "the answer stops at an ordinary word and nowhere else" if name == "eos" else "every text begins with it"
        proof = f"{name}_token_id is absent; llama.cpp takes id {i}, {s.text(i)}"
        yield f2(f"{name}_token_id", f"the id of {name}", "absent", why, "write the key", proof, severity="warn")


def lists_agree(s: GgufSubject) -> Iterator[Finding]:
    """Tokens, types, scores and embedding rows are as many."""
    n = len(s.tokens)
    for key in ("token_type", "scores"):
        values = s.get(key)
        if values is not None and len(values) != n:
            proof = f"token {min(n, len(values))} has {'no ' + key if len(values) < n else 'a ' + key + ' and no text'}"
            why = "readers index one list by the other and read past its end"
            yield f2(key, f"{n:,} values, one a token", f"{len(values):,}", why, "convert the model again", proof)
    rows = s.gguf.tensors.get("token_embd.weight")
    if rows is not None and len(rows.shape) == 2 and rows.shape[0] != n:
        proof = f"{n:,} tokens and token_embd.weight of shape {rows.shape}"
        why = "readers take one for the other: they refuse the file, or look up rows that are not there"
        fix = "write as many tokens as rows; the rest as [PAD0], [PAD1] ... of type UNUSED (5)"
        yield f2("tokens", f"{rows.shape[0]:,} tokens, one a row of the embedding", f"{n:,}", why, fix, proof)
    first: dict[str, int] = {}
    for i, token in enumerate(s.tokens):
        if token in first and "\ufffd" not in token:
            why = "llama.cpp stops while it loads the file; others keep one of the two ids for both"
            proof = f"tokens {first[token]} and {i} are both {token[:60]!r}"
            yield f2("tokens", "each token once", proof, why, "name the rows apart", proof)
            return
        first[token] = i


def control_tokens(s: GgufSubject) -> Iterator[Finding]:
    """What the chat template writes and the ids that end a turn are control tokens, not text."""
    tokens, types = s.tokens, s.token_types
    if types is None:
        raise Skip("the file has no token_type for each token")
    template = s.gguf.metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else ""
    roles = {
        i: name for name, i in s.special_ids.items() if name in ("bos", "eos", "eot", "eom") and 0 <= i < len(tokens)
    }
    for i, token in enumerate(tokens):
        looks = bool(CONTROL_LOOKING.fullmatch(token))
        used = looks and token in template
        if types[i] != NORMAL or not (used or (i in roles and looks)):
            continue
        role = "the chat template writes it" if used else f"it is the {roles[i]} token"
        by_name = token in ENDS_BY_NAME
        mended = "; llama.cpp mends this one by its name, others do not" if by_name else ""
        yield f2(
            f"token_type[{i}]",
            f"CONTROL (3) for {token!r}: {role}",
            "NORMAL (1)",
            "the prompt's marker is cut into letters: the model sees text it was never trained on" + mended,
            f"write 3 at {i}; gguf-py's gguf-new-metadata --special-token changes a copy",
            f"{token!r} in a prompt is not parsed as id {i}: readers look for CONTROL and USER_DEFINED tokens alone",
            severity="warn" if by_name else "error",
        )


def pre_tokenizer(s: GgufSubject) -> Iterator[Finding]:
    """A byte-level BPE names how it cuts text before merging, and has merges."""
    if s.get("model") != "gpt2":
        raise Skip(f"tokenizer.ggml.model is {s.get('model')!r}; only gpt2, byte-level BPE, has a pre-tokenizer")
    pre = s.get("pre")
    if pre in (None, "", "default"):
        yield f2(
            "pre",
            "the name of the model's pre-tokenizer: gpt-2, llama-bpe, qwen2 ...",
            repr(pre),
            "readers fall back to a regex that cuts digits and contractions in another way than in training",
            "convert again with a converter that knows the model, or set the key",
        )
    merges = s.get("merges")
    kinds = s.token_types or [NORMAL] * len(s.tokens)
    joined = any(len(token) > 1 for token, kind in zip(s.tokens, kinds, strict=False) if kind == NORMAL)
    if merges == [] and not joined:
        return  # a vocabulary of bytes
    if not merges:
        proof = f"tokenizer.ggml.merges is {'absent' if merges is None else 'empty'}, tokenizer.ggml.model is 'gpt2'"
        why = "without merges every text is single bytes, or the file is refused"
        yield f2("merges", "the merges of the BPE", "none", why, "convert again from tokenizer.json", proof)
        return
    known = set(s.tokens)
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        lost = [part for part in (left, right, left + right) if part not in known]
        if (lost or not right) and "\ufffd" not in merge:
            proof = f"merge {i} is {merge[:80]!r}, and {(lost or [merge])[0][:60]!r} is no token"
            why = "the merge leads to no id: the text falls apart into bytes"
            yield f2("merges", "merges of tokens into tokens", proof, why, "convert again", proof, severity="warn")
            return


def byte_tokens(s: GgufSubject) -> Iterator[Finding]:
    """A SentencePiece vocabulary can spell every byte, and has a score a token."""
    if s.get("model") != "llama":
        raise Skip(f"tokenizer.ggml.model is {s.get('model')!r}; only llama, SentencePiece, falls back to bytes")
    known = set(s.tokens)
    lost = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in known]
    if lost:
        proof = f"{lost[0]} is no token ({len(lost)} of 256 are missing)"
        why = "text with a character that has no token of its own cannot be written, readers stop at it"
        yield f2("tokens", "the 256 tokens <0x00> .. <0xFF>", proof, why, "convert again", proof, severity="warn")
    if s.get("scores") is None:
        why = "merges go by score: without them text is cut in another way than in training"
        yield f2("scores", "a score a token", "none", why, "convert again from tokenizer.model or tokenizer.json")


def adds_bos(s: GgufSubject) -> bool | None:
    """Whether readers put BOS in front of a text; None where the header does not settle it."""
    said = s.get("add_bos_token")
    if isinstance(said, bool):
        return said
    if s.get("model") == "llama":
        return True
    if s.get("model") == "gpt2" and s.get("pre") in BOS_BY_PRE + PLAIN_PRE:
        return s.get("pre") in BOS_BY_PRE
    return None


def hf_adds_bos(s: GgufSubject) -> bool:
    """Whether the folder's tokenizer puts BOS in front of a text."""
    post = s.tokenizer.get("post_processor")
    parts = (post.get("processors") or []) if isinstance(post, dict) and post.get("type") == "Sequence" else [post]
    for part in parts:
        single = part.get("single") if isinstance(part, dict) and part.get("type") == "TemplateProcessing" else None
        if isinstance(single, list) and single and isinstance(single[0], dict) and "SpecialToken" in single[0]:
            return True
    # these classes of transformers put BOS there by the flag, whatever tokenizer.json says
    by_flag = str(s.tokenizer_config.get("tokenizer_class")).startswith(("Llama", "Gemma", "CodeLlama"))
    return by_flag and s.tokenizer_config.get("add_bos_token") is True


def bos(s: GgufSubject) -> Iterator[Finding]:
    """A text gets BOS in front exactly if it got it in training."""
    now = adds_bos(s)
    if now is None:
        raise Skip(
            f"add_bos_token is absent and the pre-tokenizer is {s.get('pre')!r}: what readers do is not known here"
        )
    said = s.get("add_bos_token", "absent, so readers take " + str(now).lower())
    i = s.special_ids.get("bos", -1)
    why = "every text starts in another way than in training: the loss is worse from the first token on"
    if s.folder is not None:
        wanted = hf_adds_bos(s)
        if now != wanted:
            with_, without = f"begins with id {i} {s.text(i)}", "begins with the text"
            a, b = (with_, without) if wanted else (without, with_)
            proof = f"'Hello' {a} by the folder's tokenizer and {b} by this file"
            fix = f"set tokenizer.ggml.add_bos_token to {str(wanted).lower()}"
            yield f2("add_bos_token", str(wanted).lower(), str(said), why, fix, proof)
    elif s.arch.startswith("gemma") and not now:
        yield f2("add_bos_token", "true: Gemma was trained with <bos> in front", str(said), why, "set it to true")


# -- the chat template ---------------------------------------------------------------------------------------------


def _template(s: GgufSubject) -> Any:
    """The file's template as ChatTemplate; Skip where it has none."""
    from kobza.formats.template import ChatTemplate

    source = s.gguf.metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        raise Skip("the file has no chat template")
    texts = {}
    for name in ("bos", "eos"):
        i = s.special_ids.get(name, -1)
        texts[name] = s.tokens[i] if 0 <= i < len(s.tokens) else ""
    return ChatTemplate(source, texts["bos"], texts["eos"], name=f"{s.gguf.path.name}:tokenizer.chat_template")


def turn_end(s: GgufSubject) -> Iterator[Finding]:
    """The token that ends the assistant's turn is one at which readers stop."""
    template, tokens = _template(s), s.tokens
    text = _rendered(template, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}], False)
    if text.count(MARK) != 1:
        raise Skip("the template does not write the assistant's words once")
    rest = text.partition(MARK)[2].lstrip()
    types = s.token_types or [NORMAL] * len(tokens)
    special = [
        i
        for i, t in enumerate(tokens)
        if t and rest.startswith(t) and (types[i] != NORMAL or CONTROL_LOOKING.fullmatch(t))
    ]
    special = [i for i in special if types[i] != 6]  # BYTE
    if not special:
        raise Skip(f"no special token follows the assistant's words, but {rest[:40]!r}")
    end = max(special, key=lambda i: len(tokens[i]))
    stops = {name: i for name, i in s.special_ids.items() if name in ("eos", "eot", "eom")}
    if end in stops.values():
        return
    by_name = tokens[end] in ENDS_BY_NAME
    yield Finding(
        "P5",
        "warn" if by_name else "error",
        "proven",
        where="tokenizer.ggml.eos_token_id",
        expected=f"{end} {s.text(end)} among eos, eot and eom: the template ends a turn with it",
        got=", ".join(f"{name} {i} {s.text(i)}" for name, i in stops.items()) or "none of the three",
        why="the answer does not stop"
        + (
            ": llama.cpp knows this token by its name, other readers do not"
            if by_name
            else " and runs on into the next turn"
        ),
        fix=f"set tokenizer.ggml.eot_token_id to {end}",
        counterexample=repr(text[-160:]),
        source="https://github.com/ggml-org/llama.cpp/issues/6745",
    )


def same_chats(s: GgufSubject) -> Iterator[Finding]:
    """The file's template writes what the folder's writes."""
    from kobza.formats.template import find_template

    if s.folder is None:
        raise Skip("no Hugging Face folder to compare with; give --hf DIR")
    theirs = find_template(s.folder)
    if theirs is None:
        raise Skip("the folder has no chat template")
    if not isinstance(s.gguf.metadata.get("tokenizer.chat_template"), str):
        why = "readers fall back to a template of their own, which is another model's"
        proof = "tokenizer.chat_template is absent, the folder has one"
        yield f2(
            "chat_template", "the folder's template", "none", why, "write it into the file", proof, severity="warn"
        )
        return
    ours = _template(s)
    for chat in CHATS:
        for prompt in (False, True):
            a, b = _rendered(theirs, chat, prompt), _rendered(ours, chat, prompt)
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                roles = " ".join(message["role"] for message in chat)
                yield Finding(
                    "C5",
                    "error",
                    "proven",
                    where="tokenizer.chat_template",
                    expected=repr(a[max(0, at - 20) : at + 40]),
                    got=repr(b[max(0, at - 20) : at + 40]),
                    why="a chat reaches the model in another form than it was trained on",
                    fix="write the folder's chat template into the file",
                    counterexample=f"{roles}, add_generation_prompt={prompt}: they part at character {at}",
                    source="https://github.com/ollama/ollama/issues/6330",
                )
                return


def _rendered(template: Any, chat: list[dict[str, str]], prompt: bool) -> str:
    """What a template writes, or that it refuses; why it refuses is worded by each in its way."""
    from kobza.formats.template import Refused

    try:
        return template.render(chat, add_generation_prompt=prompt)
    except Refused:
        return "(refused)"


# -- beside the folder's tokenizer ---------------------------------------------------------------------------------


def same_tokens(s: GgufSubject) -> Iterator[Finding]:
    """Each id is the same token in both, special where it is special there, and the merges are the same."""
    theirs, tokens, types = s.hf_tokens, s.tokens, s.token_types
    for i in sorted(theirs):
        spaced = (
            types is not None and i < len(tokens) and types[i] == USER_DEFINED
        )  # converters write its blanks as blanks
        if (
            i >= len(tokens)
            or tokens[i] != theirs[i]
            and not (spaced and tokens[i] == theirs[i].replace("\u2581", " "))
        ):
            proof = f"id {i} is {theirs[i][:60]!r} in tokenizer.json and {s.text(i)} in the file"
            why = "text is turned into ids of other words"
            yield f2(f"tokens[{i}]", repr(theirs[i][:60]), s.text(i), why, "convert again from this folder", proof)
            break
    for token in s.added:
        i = token["id"]
        if token.get("special") is True and types and i < len(types) and types[i] == NORMAL:
            proof = f"{token['content'][:60]!r} (id {i}) is special in tokenizer.json; a NORMAL token's text is cut"
            why = "the marker is never parsed as one token"
            yield f2(f"token_type[{i}]", "CONTROL (3)", "NORMAL (1)", why, f"write 3 at {i}", proof)
            break
    model, merges = s.tokenizer.get("model") or {}, s.get("merges")
    wanted = model.get("merges") if isinstance(model, dict) else None
    if isinstance(wanted, list) and merges is not None and s.get("model") == "gpt2":
        wanted = [" ".join(m) if isinstance(m, list) else str(m) for m in wanted]
        if wanted != merges:
            i = next(
                (i for i, (a, b) in enumerate(zip(wanted, merges, strict=False)) if a != b),
                min(len(wanted), len(merges)),
            )
            pair = [repr(m[i][:60]) if i < len(m) else "none" for m in (wanted, merges)]
            many = f"{len(wanted):,} and {len(merges):,} merges"
            proof = f"merge {i} is {pair[0]} in tokenizer.json and {pair[1]} in the file ({many})"
            why = "text is cut in another way than in training"
            yield f2(f"merges[{i}]", pair[0], pair[1], why, "convert again from this folder", proof)


def same_ids(s: GgufSubject) -> Iterator[Finding]:
    """BOS, EOS, padding and unknown are those of the folder."""
    for name, theirs, severity in (
        ("bos", "bos", "error"),
        ("eos", "eos", "error"),
        ("padding", "pad", "warn"),
        ("unknown", "unk", "warn"),
    ):
        i, wanted = s.special_ids.get(name), s.hf_ids(theirs)
        if not wanted or i in wanted or (i is None and name != "eos"):
            continue
        shown = ", ".join(f"{w} {s.text(w)}" for w in sorted(wanted))
        got = "absent" if i is None else f"{i} {s.text(i)}"
        why = "the answer never stops" if name == "eos" else f"{theirs} is another token than in training"
        proof = f"the folder says {shown}; the file {got}"
        fix = f"set it to {min(wanted)}"
        yield f2(f"{name}_token_id", shown, got, why, fix, proof, severity=severity)


TOKEN_CHECKS = (
    Check("F2", "each key of the tokenizer is of its type", values_have_types),
    Check("L9", "every special id names a token", ids_name_tokens),
    Check("F2", "bos and eos are named", ends_are_named),
    Check("F2", "tokens, types, scores and embedding rows are as many", lists_agree),
    Check("F2", "the prompt's markers are control tokens", control_tokens),
    Check("F2", "a BPE names its pre-tokenizer and has its merges", pre_tokenizer),
    Check("F2", "a SentencePiece vocabulary has bytes and scores", byte_tokens),
    Check("F2", "BOS is put in front as in training", bos),
    Check("P5", "the token that ends a turn stops the answer", turn_end),
    Check("C5 F2", "chats are written as the folder's template writes them", same_chats),
    Check("F2", "tokens, types and merges are the folder's", same_tokens),
    Check("F2", "special ids are the folder's", same_ids),
)
