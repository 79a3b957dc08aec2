"""A model as a Hugging Face folder: the stock architecture that computes the same, its weights streamed, its tokenizer as it is.

    config.json  generation_config.json  model.safetensors (or shards and their index)
    tokenizer.json  tokenizer_config.json  chat_template.jinja

`AutoModelForCausalLM` and `AutoTokenizer` load it with no code of ours. The tokenizer is the trouble: `transformers` 5 builds
some anew from the vocabulary, by the class that is usual for the model's type and with that class's own splitting. The class
named here, PreTrainedTokenizerFast, takes tokenizer.json as it is, in 4 and in 5; the one type that does not ask is avoided.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kobza.config import nearest, require
from kobza.export.source import Source
from kobza.formats.shards import NAMES, Progress, write_shards
from kobza.formats.stock import config_to_hf
from kobza.formats.template import ChatTemplate
from kobza.formats.weights import hf_pieces
from kobza.tokenizer import LibraryTokenizer, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLING = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
SAMPLING |= {"no_repeat_ngram": "no_repeat_ngram_size"}
REBUILT = ("qwen2",)  # model types whose tokenizer transformers 5 builds by its own class whatever the folder says
VERSION = "5.0.0"  # of transformers, whose names are used here; a newer one mends nothing in such a folder


def write_hf(source: Source, folder: Path, dtype: str = "auto", progress: Progress | None = None) -> None:
    """Fill an empty folder. dtype: float32, bfloat16, float16, or auto, that of most weights; progress(tensor, bytes, of all)."""
    kind = stored_dtype(source) if dtype == "auto" else dtype
    require(kind in DTYPES, f"dtype is {dtype!r}; auto, {', '.join(DTYPES)}{nearest(dtype, list(DTYPES))}")
    ids = write_tokenizer(source, folder)
    hf = config_for(source, tokenizer_json(source.tokenizer))
    hf |= ids | {"dtype": kind, "torch_dtype": kind, "transformers_version": VERSION}
    _write(folder / "config.json", hf)
    _write(folder / "generation_config.json", generation(source, ids))
    write_shards(folder, list(hf_pieces(source.config, hf, source.read, source.shapes)), DTYPES[kind], progress)


def stored_dtype(source: Source) -> str:
    """The dtype of most weights, by name; float32 where it is none that a folder has."""
    sizes: Counter[torch.dtype] = Counter()
    for name, shape in source.shapes.items():
        sizes[source.dtypes[name]] += torch.Size(shape).numel()
    most = sizes.most_common(1)[0][0]
    return next((name for name, dtype in DTYPES.items() if dtype == most and dtype in NAMES), "float32")


def config_for(source: Source, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the stock architecture, by preference of one whose tokenizer is not built anew and then another."""
    hf, config = config_to_hf(source.config), source.config
    if hf["model_type"] in REBUILT and not _is_qwen(tokens):
        return config_to_hf(replace(config, bias=True, qkv_bias=False))  # llama, the other biases 0
    return hf


def _is_qwen(tokens: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is what transformers makes of a Qwen vocabulary."""
    return (tokens.get("normalizer") or {}).get("type") == "NFC" and "(?i:'s|" in json.dumps(tokens["pre_tokenizer"])


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json; but for BPE, of which no text spells a special token, with the splits that keep a text from doing so."""
    content = json.loads(tokenizer.to_json())
    if isinstance(tokenizer, LibraryTokenizer) and content["model"]["type"] != "BPE":
        return json.loads(tokenizer.inner.to_str())
    return content


# ---- tokens --------------------------------------------------------------------------------------------------------


def special_tokens(source: Source, tokens: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """({"bos_token_id": 1, ...} of config.json, None where there is none; {"bos_token": "<s>", ...} of tokenizer_config.json).

    What the chat template writes as its tokens counts first, for `transformers` renders it with these. Padding is a token of its
    own or none: collators drop it from the targets, so a model padded with its end never learns to end."""
    table = ids_of(tokens)
    names = {i: name for name, i in table.items()}
    template = source.template or ChatTemplate("")
    words = {key: text for key, text in template.specials.items() if text in table}
    words |= {
        "bos_token": names.get(source.tokenizer.bos_id, ""),
        "eos_token": names[source.ends[0]] if source.ends else "",
    }
    words |= {f"{key}_token": text for key, text in (("bos", template.bos), ("eos", template.eos)) if text in table}
    spare = [text for text in source.tokenizer.specials if "pad" in text.lower()] + [words.get("unk_token", "")]
    words.setdefault("pad_token", spare[0])
    words = {key: text for key, text in words.items() if text}
    ids: dict[str, Any] = {
        f"{key}_id": table[words[key]] if key in words else None for key in ("bos_token", "pad_token")
    }
    eos = table.get(words.get("eos_token", ""))
    return ids | {"eos_token_id": eos if eos in source.ends else next(iter(source.ends), None)}, words


def ids_of(tokens: Mapping[str, Any]) -> dict[str, int]:
    """The ids of a tokenizer.json by name, the added tokens' too."""
    vocab = tokens["model"]["vocab"]
    found = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return found | {token["content"]: token["id"] for token in tokens["added_tokens"]}


def generation(source: Source, ids: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: every end, and the model's own sampling."""
    ends: Any = list(source.ends) if len(source.ends) > 1 else next(iter(source.ends), None)
    said = {SAMPLING[key]: value for key, value in source.sampling.items() if key in SAMPLING and value is not None}
    drawn = said.pop("temperature", 0)
    said |= {"do_sample": True, "temperature": drawn} if drawn else {"do_sample": False}
    if not drawn:
        said = {key: value for key, value in said.items() if key not in ("top_k", "top_p", "min_p")}
    return dict(ids) | {"eos_token_id": ends, "transformers_version": VERSION} | said


def write_tokenizer(source: Source, folder: Path) -> dict[str, Any]:
    """tokenizer.json, which begins a text as we do, its settings and the chat template -> what a config.json says of its ids."""
    tokens = tokenizer_json(source.tokenizer)
    ids, words = special_tokens(source, tokens)
    tokens |= {"truncation": None, "padding": None}
    if not begins_alike(source.tokenizer):
        tokens["post_processor"] = beginning(source.tokenizer, tokens)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": source.config.max_seq_len} | dict(words)
    _write(folder / "tokenizer.json", tokens)
    _write(folder / "tokenizer_config.json", config)
    if source.template is not None:
        (folder / "chat_template.jinja").write_text(template_text(source.template, words), encoding="utf-8")
    return ids


def begins_alike(tokenizer: Tokenizer) -> bool:
    """Whether the file itself puts before and after a text what encode_prompt does."""
    if not isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.bos_id is None
    own = tokenizer.inner.encode("a", add_special_tokens=True).ids
    return own == tokenizer.encode_prompt("a")


def beginning(tokenizer: Tokenizer, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """A post-processor that puts the beginning token, if there is one, before a text and nothing else around it."""
    names = {i: name for name, i in ids_of(tokens).items()}
    i = tokenizer.bos_id
    bos = [] if i is None else [{"SpecialToken": {"id": names[i], "type_id": 0}}]
    known = {} if i is None else {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]}}
    texts = [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"]
    return {"type": "TemplateProcessing", "single": [*bos, texts[0]], "pair": [*bos, *texts], "special_tokens": known}


def template_text(template: ChatTemplate, words: Mapping[str, str]) -> str:
    """The template; a token that it writes and that the tokenizer does not have under that name is set at its head."""
    own = {"bos_token": template.bos, "eos_token": template.eos} | dict(template.specials)
    other = {key: text for key, text in own.items() if text != words.get(key, "") and key in template.source}
    return "".join(f"{{% set {key} = {json.dumps(text)} %}}\n" for key, text in other.items()) + template.source


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
