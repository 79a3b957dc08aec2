"""A Hugging Face style folder as the doctor reads it: its json files and the headers of its tensors, nothing loaded, nothing run.

`open_` reads config.json, which must be there, and whatever lies beside it; a side file that cannot be read is remembered in
`problems` and examined as such. `value` answers what the model will be built with: the file's value, else the default that the
current transformers fills in, which is what a missing key means to its reader. All values are a stranger's: any key may hold
anything, so `whole` and `real` give a number or None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kobza.config import InputError, require
from kobza.doctor.finding import Finding, Skip
from kobza.formats.headers import TensorInfo, find_tensors, inside, read_json, read_numpy

TOKENIZER_BYTES = 128_000_000  # the largest released tokenizer.json are near 40 MB
# of a larger model's config, they hold for its language model too
SHARED = ("tie_word_embeddings", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What transformers 5.23 takes for a key that is absent (its configuration classes). 0 for head_dim: hidden_size / heads.
_LLAMA = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "head_dim": 0,
}
_GEMMA = {key: value for key, value in _LLAMA.items() if key != "hidden_act"} | {"tie_word_embeddings": True}
_GEMMA |= {"head_dim": 256, "max_position_embeddings": 8192}
_TANH = "gelu_pytorch_tanh"
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "head_dim": 0}
    | {"max_position_embeddings": 1024},
    "llama": _LLAMA | {"max_position_embeddings": 2048},
    "mistral": _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": _LLAMA | {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "use_sliding_window": False},
    "qwen3": _LLAMA
    | {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "use_sliding_window": False, "head_dim": 128},
    "gemma": _GEMMA | {"num_key_value_heads": 16, "hidden_act": _TANH},
    "gemma2": _GEMMA
    | {"num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256, "hidden_activation": _TANH}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA
    | {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131_072,
    },
    "phi3": _LLAMA | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
}
OTHER_NAMES = {  # ours of the checks -> the name in GPT-2's config
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


@dataclass(frozen=True)
class Folder:
    """What the files of a model's folder say. `text` is the language model's part of `config`, all of it in most."""

    path: Path
    config: dict[str, Any]
    text: dict[str, Any]
    prefix: str = ""
    """"text_config." where the language model is a part of a larger one"""
    generation: dict[str, Any] = field(default_factory=dict)
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    template: str = ""
    """the source of the chat template, empty if none"""
    tensors: Mapping[str, tuple[Path, TensorInfo]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """what could not be read, a line each"""
    no_tensors: str = ""
    """why there are none"""

    @property
    def kind(self) -> str:
        """model_type, "" if there is none."""
        kind = self.text.get("model_type", self.config.get("model_type"))
        return kind if isinstance(kind, str) else ""

    def key(self, name: str) -> str:
        """The name under which this config has it: hidden_size, or GPT-2's n_embd."""
        other = OTHER_NAMES.get(name, name)
        return other if name not in self.text and (other in self.text or self.kind == "gpt2") else name

    def where(self, name: str) -> str:
        """config.json:text_config.hidden_size"""
        return f"config.json:{self.prefix}{self.key(name)}"

    def patch(self, name: str, value: Any) -> dict[str, Any]:
        """A patch of config.json that sets a key of the language model's part."""
        home = [self.prefix.rstrip(".")] if self.prefix else []
        return {"file": "config.json", "key": [*home, self.key(name)], "value": value}

    def value(self, name: str) -> Any:
        """What the model is built with: the file's value; if absent, the reader's default; None if neither is known."""
        given = self.text.get(self.key(name))
        return given if given is not None else DEFAULTS.get(self.kind, {}).get(name)

    def whole(self, name: str) -> int | None:
        """The value as a positive int, None if it is anything else."""
        value = self.value(name)
        return value if type(value) is int and 0 < value < 1 << 40 else None

    def real(self, name: str) -> float | None:
        """The value as a finite number."""
        return as_real(self.value(name))

    def sizes(self) -> dict[str, int]:
        """C width, H and K heads, D head dim, F feed-forward, L layers, V vocabulary; Skip if the config does not give them."""
        C, H, L = (self.whole(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        if not (C and H and L):
            raise Skip("the config gives no width, heads and layers as positive whole numbers")
        D = self.whole("head_dim") or C // H
        F = self.whole("intermediate_size") or (4 * C if self.kind == "gpt2" else 0)
        return {"C": C, "H": H, "K": self.whole("num_key_value_heads") or H, "D": D, "F": F, "L": L} | {
            "V": self.whole("vocab_size") or 0
        }

    def need_tensors(self) -> Mapping[str, tuple[Path, TensorInfo]]:
        """The tensors, or Skip saying why there are none to look at."""
        if not self.tensors:
            raise Skip(self.no_tensors or "no tensors")
        if "quantization_config" in self.config:
            raise Skip("quantization_config: the tensors are packed, their shapes are another's")
        return self.tensors

    def rows(self, name: str, first: int, last: int) -> Any:
        """Rows first..last of a tensor as a float array."""
        path, info = self.tensors[name]
        return read_numpy(path, info, (first, last))

    def embedding(self) -> str:
        """The name of the token embedding, "" if there is none. A vision tower has no tokens."""
        ends = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight")
        return next((name for name in self.tensors if name.endswith(ends)), "")

    def ids(self) -> dict[str, int]:
        """token -> id of tokenizer.json, added tokens included; {} where it is not of the form that has a table."""
        return self._ids

    @cached_property
    def _ids(self) -> dict[str, int]:  # a quarter of a million entries in some
        return vocabulary(self.tokenizer)


def as_real(value: Any) -> float | None:
    """A finite number as float, None for anything else. as_real(True) -> None"""
    if type(value) not in (int, float) or (type(value) is int and abs(value) > 1 << 60):
        return None
    return float(value) if math.isfinite(value) else None


def as_ids(value: Any) -> list[int]:
    """The ids in an eos_token_id or its like: as_ids([1, 107]) -> [1, 107]; as_ids(2) -> [2]; as_ids(None) -> []"""
    values = value if isinstance(value, list) else [value]
    return [i for i in values[:1000] if type(i) is int and abs(i) < 1 << 53]


def token_text(token: Any) -> str:
    """The text of a special token: "<s>", or {"content": "<s>", ...} as added-token tables have it; "" for neither."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """token -> id of a parsed tokenizer.json, added tokens included. Unigram's list of [piece, score] counts its places."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found: dict[str, int] = {}
    if isinstance(vocab, dict):
        found = {token: i for token, i in vocab.items() if type(i) is int}
    elif isinstance(vocab, list):
        found = {row[0]: i for i, row in enumerate(vocab) if isinstance(row, list) and row and isinstance(row[0], str)}
    return found | {token["content"]: token["id"] for token in added_tokens(tokenizer)}


def added_tokens(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The well-formed entries of added_tokens."""
    rows = tokenizer.get("added_tokens")
    rows = rows if isinstance(rows, list) else []
    return [r for r in rows if isinstance(r, dict) and isinstance(r.get("content"), str) and type(r.get("id")) is int]


def open_(path: Path) -> Folder:
    """The folder's files. InputError if there is no readable config.json."""
    path = Path(path)
    path = path.parent if path.name == "config.json" else path
    require(path.is_dir(), f"{path} is not a folder; give the one that holds config.json")
    require((path / "config.json").exists(), f"{path} holds no config.json; give the folder of a model")
    config = read_json(inside(path, "config.json"), 4_000_000)
    problems: list[str] = []
    tensors, no_tensors = _tensors(path, problems)
    tokenizer = side(path, "tokenizer.json", problems, TOKENIZER_BYTES)
    return _folder(path, config, tokenizer, problems, tensors=tensors, no_tensors=no_tensors)


def find_tokenizer(path: Path) -> Path:
    """A tokenizer.json, given as a file or by its folder."""
    path = Path(path)
    require(path.exists(), f"{path} does not exist; give a tokenizer.json or its folder")
    home, name = (path, "tokenizer.json") if path.is_dir() else (path.parent, path.name)
    there = (home / name).exists() or (home / name).is_symlink()
    require(there and name.endswith(".json"), f"{path} holds no tokenizer.json; give a tokenizer.json or its folder")
    return inside(home, name)


def open_tokenizer(file: Path) -> Folder:
    """What a tokenizer.json and the files beside it say; a file of another name stands alone."""
    content = read_json(file, TOKENIZER_BYTES)
    require("model" in content, f"{file} has no key model; it is no tokenizer.json")
    if file.name != "tokenizer.json":
        return Folder(file.parent, {}, {}, tokenizer=content)
    problems: list[str] = []
    return _folder(file.parent, side(file.parent, "config.json", problems, 4_000_000), content, problems)


def _folder(path: Path, config: dict[str, Any], tokenizer: dict[str, Any], problems: list[str], **more: Any) -> Folder:
    """The Folder of a config and a tokenizer, with the side files read."""
    part = next((p for p in ("text_config", "llm_config") if isinstance(config.get(p), dict)), "")
    shared = {key: config[key] for key in SHARED if part and key in config}
    tokenizer_config = side(path, "tokenizer_config.json", problems)
    return Folder(
        path,
        config,
        shared | config[part] if part else config,
        f"{part}." if part else "",
        side(path, "generation_config.json", problems),
        tokenizer_config,
        tokenizer,
        template_source(path, tokenizer_config, problems),
        problems=tuple(problems),
        **more,
    )


def wants_bos(folder: Folder, bos: str) -> bool:
    """Whether the model was trained with that token before every text, as far as the files tell: every Gemma, what has Llama 3's
    vocabulary, and what has Llama 2's and does not say otherwise. Yi is a llama by its config, and broke because it was added."""
    if bos == token_text(folder.tokenizer_config.get("eos_token")):
        return False  # one token for both parts texts and begins none
    said = folder.tokenizer_config.get("add_bos_token")
    if bos in ("<bos>", "<|begin_of_text|>"):
        return True
    return bos == "<s>" and folder.kind in ("llama", "mistral") and said is not False


def post_processors(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The post-processors of a tokenizer.json, those of a Sequence one by one."""
    part = tokenizer.get("post_processor")
    parts = part.get("processors") if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    return [p for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []


def bos_patch(tokenizer: Mapping[str, Any], bos: str) -> dict[str, Any]:
    """The patch of tokenizer.json that puts `bos` before every text, after the post-processors that are there."""
    i = vocabulary(tokenizer).get(bos, 0)
    special, first = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [special, first, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {bos: {"id": bos, "ids": [i], "tokens": [bos]}}
    step = {"type": "TemplateProcessing", "single": [special, first], "pair": pair, "special_tokens": known}
    others = [p for p in post_processors(tokenizer) if p.get("type") != "TemplateProcessing"]
    value = {"type": "Sequence", "processors": [*others, step]} if others else step
    return {"file": "tokenizer.json", "key": ["post_processor"], "value": value}


def side(path: Path, name: str, problems: list[str], limit: int = 16_000_000) -> dict[str, Any]:
    """The object in a json file beside the config; {} if it is absent, or unreadable, which `problems` is told."""
    file = path / name
    if not file.exists() and not file.is_symlink():
        return {}
    try:
        return read_json(inside(path, name), limit)
    except InputError as error:
        problems.append(str(error))
        return {}


def template_source(path: Path, tokenizer_config: Mapping[str, Any], problems: list[str]) -> str:
    """The chat template's source, chat_template.jinja before tokenizer_config.json; only looked at here, never rendered."""
    file = path / "chat_template.jinja"
    if file.exists() or file.is_symlink():
        try:
            file = inside(path, file.name)
            require(file.stat().st_size < 1_000_000, f"{file} is larger than 1 MB; no chat template")
            return file.read_bytes().decode(errors="replace")
        except InputError as error:
            problems.append(str(error))
            return ""
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):  # several by name
        named = [row for row in found if isinstance(row, dict)]
        found = next((row.get("template") for row in named if row.get("name") == "default"), "")
    return found if isinstance(found, str) else ""


def _tensors(path: Path, problems: list[str]) -> tuple[Mapping[str, tuple[Path, TensorInfo]], str]:
    """The tensors and, if there are none, why. A file that lies is a problem, one that is absent is not."""
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((path / name).exists() or (path / name).is_symlink() for name in names):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            safe = "convert it to safetensors where you trust it, then examine again"
            return {}, f"only {pickles[0]}, a pickle, which can run code when it is read: {safe}"
        return {}, "no model.safetensors in the folder"
    try:
        return find_tensors(path), ""
    except InputError as error:
        problems.append(str(error))
        return {}, "the tensors could not be read"


def check_readable(folder: Folder) -> Iterator[Finding]:
    """Whatever lies in the folder could be read."""
    for problem in folder.problems[:1]:
        raise InputError(problem)
    yield from ()


def check_code(folder: Folder) -> Iterator[Finding]:
    """X1: the folder asks for its own Python to be run."""
    wanted = folder.config.get("auto_map") or folder.tokenizer_config.get("auto_map")
    if wanted:
        file = "config.json" if folder.config.get("auto_map") else "tokenizer_config.json"
        yield Finding(
            "X1",
            "warn",
            "likely",
            f"{file}:auto_map",
            "a stock architecture",
            str(wanted)[:120],
            "with trust_remote_code the reader runs Python that came with the weights",
            "use the stock class if the architecture has one; read the code before you trust it",
            source="https://huggingface.co/docs/transformers/custom_models",
        )
