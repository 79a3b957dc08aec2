"""Planted bugs: a clean artifact is rewritten with one thing wrong, and its certificate must fail; the clean one must pass.

Each row is a bug that exporters were seen to make. It is planted into a Hugging Face folder and into GGUF files (F16, Q4_K) and
shown to the other engine (transformers, llama.cpp) and to kobza's own reader. `python tests/test_certificate_bugs.py` prints the
table of which check caught what.
"""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kobza.config import ModelConfig
from kobza.export.gguf import write_ggufs
from kobza.export.hf import write_hf
from kobza.export.proof.certificate import Certificate, prove
from kobza.export.proof.corpus import PROSE, Corpus, corpus_for
from kobza.export.proof.engine import available
from kobza.export.proof.own import open_own
from kobza.export.source import Source
from kobza.export.types import types_of
from kobza.formats.ggml import quantize, tensor_bytes
from kobza.formats.gguf import read_gguf, typed, write_gguf
from kobza.formats.turns import Turns
from kobza.formats.weights import to_halves, to_pairs
from kobza.hub.gguf_tokenizer import tokenizer_text
from kobza.model import build
from kobza.tokenizer import BOS, EOT, LibraryTokenizer

N_PLACES, N_CTX = 18, 96
FORMS = ("hf", "F16", "Q4_K_M")
SIZES = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=256, n_ff=256, max_seq_len=128, qk_norm=False, tied=True)
MODELS = {
    "llama": SIZES | dict(mlp="swiglu"),
    "gemma2": SIZES
    | dict(mlp="geglu_tanh", norm_offset=True, norm_cast="after", embed_scale=16.0, norm_place="both", head_dim=64)
    | dict(window=8, window_pattern="LG", softcap=5.0, attn_softcap=20.0),
}
SYSTEM, USER, ASK, END = "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


# -- clean artifacts ---------------------------------------------------------------------------------------------------


@functools.cache
def source(kind: str) -> Source:
    """A tiny model with weights that matter: each part of it moves the probabilities."""
    tokenizer = LibraryTokenizer.train(PROSE, 384, [EOT, BOS, "<|im_start|>", "<|im_end|>"])
    turns = Turns((USER, END), (ASK, END), "<|im_end|>", system=(SYSTEM, END), bos=BOS)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, norm_eps=1e-3, **MODELS[kind])
    model, draw = build(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            size = (1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0) / p.shape[-1] ** 0.5
            noise = torch.randn(p.shape, generator=draw)
            p.copy_(noise * size if p.ndim > 1 else 0.2 * noise + (0.0 if config.norm_offset else 1.0))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    shapes, dtypes = {n: tuple(t.shape) for n, t in weights.items()}, {n: t.dtype for n, t in weights.items()}
    ends = (tokenizer.specials[EOT], tokenizer.specials["<|im_end|>"])
    sha = "0" * 64
    return Source(kind, config, tokenizer, shapes, dtypes, weights.__getitem__, sha, turns.template(), ends)


@functools.cache
def corpus() -> Corpus:
    whole = corpus_for(source("llama").tokenizer, seed=0, n_texts=40)
    return replace(whole, prose=whole.prose[:2], random_ids=whole.random_ids[:1], held_out=whole.held_out[2:4])


@functools.cache
def clean(kind: str) -> dict[str, Path]:
    """The artifact in each form."""
    home = Path(tempfile.mkdtemp(prefix="certificate-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "hf").mkdir()
    write_hf(source(kind), home / "hf", "auto", None)
    files = {home / f"{form}.gguf": types_of(form) for form in FORMS[1:]}
    write_ggufs(source(kind), files)
    return {"hf": home / "hf"} | {path.stem: path for path in files}


def certificate(kind: str, form: str, path: Path, other: bool) -> Certificate:
    """What the other engine, or kobza's own reader, proves of an artifact."""

    def opened():
        if not other:
            return open_own(path, tokenizer_text)
        if form == "hf":
            from kobza.export.proof.hf import open_transformers

            return open_transformers(path)
        from kobza.export.proof.llama_cpp import open_llama_cpp

        return open_llama_cpp(path, N_CTX)

    name = form if form == "hf" else f"gguf {form}"
    return prove(source(kind), path, name, opened, corpus(), other, N_PLACES)


# -- bugs in a folder --------------------------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]


def settings(file: str = "config.json", **changed: object) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        there = json.loads((folder / file).read_text(encoding="utf-8"))
        nested = {**there, **changed}
        (folder / file).write_text(json.dumps({k: v for k, v in nested.items() if v != "gone"}), encoding="utf-8")

    return plant


def weights(edit: Callable[[Weights], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return plant


def text(file: str, edit: Callable[[str], str]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        before = (folder / file).read_text(encoding="utf-8")
        after = edit(before)
        assert after != before, f"nothing planted in {file}"
        (folder / file).write_text(after, encoding="utf-8")

    return plant


def both(*plants: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda path: [plant(path) for plant in plants] and None


def each(tensors: dict, pattern: str, change: Callable) -> None:
    """Change every tensor whose name matches."""
    found = [name for name in tensors if re.search(pattern, name)]
    assert found, f"no tensor matches {pattern}"
    for name in found:
        tensors[name] = change(tensors[name])


def swapped(tensors: dict, one: str, other: str) -> None:
    """Exchange what tensors of two kinds hold."""
    for name in [name for name in tensors if one in name]:
        partner = name.replace(one, other)
        tensors[name], tensors[partner] = tensors[partner], tensors[name]


def heads(n: int, how: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: how(rows, n)


def rope_theta(folder: Path) -> None:
    there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    there |= {"rope_theta": 500_000.0}
    if isinstance(there.get("rope_parameters"), dict):
        there["rope_parameters"]["rope_theta"] = 500_000.0
    (folder / "config.json").write_text(json.dumps(there), encoding="utf-8")


def tokenizer(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def change(before: str) -> str:
        content = json.loads(before)
        edit(content)
        return json.dumps(content)

    return text("tokenizer.json", change)


def no_system(jinja: str) -> str:
    """The template without what it says for a system's words."""
    return re.sub(r"\{%- set lead = .*?messages\[0\].*?-%\}", '{%- set lead = "" -%}', jinja, count=1)


def untied(tensors: Weights) -> None:
    embed = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = tensors[embed].roll(1, 0)


def not_special(content: dict) -> None:
    for token in content["added_tokens"]:
        token["special"] = False


def signs_apart(content: dict) -> None:
    """Each digit and each sign by itself, as others split a text."""
    apart = [{"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*apart, content["pre_tokenizer"]]}


HF: dict[str, tuple[str, Callable[[Path], None]]] = {
    "q and k rows permuted": (
        "llama",
        weights(lambda t: [each(t, f"{x}_proj", heads(n, to_halves)) for x, n in (("q", 4), ("k", 2))]),
    ),
    "rope in pairs, not halves": (
        "llama",
        weights(lambda t: [each(t, f"{x}_proj", heads(n, to_pairs)) for x, n in (("q", 4), ("k", 2))]),
    ),
    "rope base": ("llama", rope_theta),
    "head untied": ("llama", both(settings(tie_word_embeddings=False), weights(untied))),
    "norm offset lost": ("gemma2", weights(lambda t: each(t, r"norm", lambda w: w + 1))),
    "wrong eos": ("llama", both(settings(eos_token_id=1), settings("generation_config.json", eos_token_id=1))),
    "wrong pre-tokenizer": ("llama", tokenizer(signs_apart)),
    "beginning token lost": ("llama", tokenizer(lambda c: c.update(post_processor=None))),
    "system turn dropped": ("llama", text("chat_template.jinja", no_system)),
    "template lost": ("llama", lambda folder: (folder / "chat_template.jinja").unlink()),
    "gate and up swapped": ("llama", weights(lambda t: swapped(t, "gate_proj", "up_proj"))),
    "a layer's norm lost": ("llama", weights(lambda t: each(t, r"layers\.1\.input_layernorm", torch.ones_like))),
    "epsilon": ("llama", settings(rms_norm_eps=1e-6)),
    "a tensor of zeros": ("llama", weights(lambda t: each(t, r"layers\.0\.mlp\.up_proj", torch.zeros_like))),
    "control tokens read out of text": ("llama", tokenizer(not_special)),
    "window lost": ("gemma2", settings(sliding_window=128)),
    "softcap lost": ("gemma2", settings(final_logit_softcapping=None)),
}


# -- bugs in a .gguf ---------------------------------------------------------------------------------------------------

Entries = dict[str, tuple[str, object]]
Blocks = dict[str, tuple[str, tuple[int, ...], np.ndarray]]


def rewritten(
    entries: Callable[[Entries], object] = lambda e: None, blocks: Callable[[Blocks], object] = lambda b: None
) -> Callable[[Path], None]:
    """A .gguf read, edited and written again. blocks: name -> (type, shape, bytes)."""

    def plant(path: Path) -> None:
        file = read_gguf(path)
        said = typed(file)
        made = {name: (t.type, t.shape, np.array(tensor_bytes(file, name))) for name, t in file.tensors.items()}
        entries(said)
        blocks(made)
        write_gguf(path, said, made)

    return plant


def rows(how: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[Blocks], None]:
    """Rows of q and k in another order; blocks lie within rows, so their bytes are moved whole."""

    def edit(made: Blocks) -> None:
        for name, (type, shape, data) in made.items():
            n = 4 if "attn_q.weight" in name else 2 if "attn_k.weight" in name else 0
            if n:
                moved = how(torch.from_numpy(data.reshape(shape[0], -1)), n)
                made[name] = type, shape, moved.contiguous().numpy().reshape(-1)

    return edit


def number(key: str, value: object) -> Callable[[Entries], None]:
    """Another value of a key."""

    def edit(said: Entries) -> None:
        (found,) = [name for name in said if name.endswith(key)]
        assert said[found][1] != value
        said[found] = said[found][0], value

    return edit


def floats(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Blocks], None]:
    """Other numbers in F32 tensors."""

    def edit(made: Blocks) -> None:
        found = [name for name in made if re.search(pattern, name)]
        assert found and all(made[name][0] == "F32" for name in found)
        for name in found:
            type, shape, data = made[name]
            made[name] = type, shape, change(data.view(np.float32)).astype(np.float32).view(np.uint8)

    return edit


def other_head(made: Blocks) -> None:
    type, shape, data = made["token_embd.weight"]
    made["output.weight"] = type, shape, np.roll(data.reshape(shape[0], -1), 1, axis=0).reshape(-1)


def nibbles(made: Blocks) -> None:
    """The two halves of each byte of 4-bit numbers exchanged. Q4_K: a block is 16 bytes of scales, then 128 of numbers."""
    for type, _, data in made.values():
        if type == "Q4_K":
            blocks = data.reshape(-1, 144)
            blocks[:, 16:] = blocks[:, 16:] << 4 | blocks[:, 16:] >> 4


def zeros(made: Blocks) -> None:
    type, shape, _ = made["blk.0.ffn_up.weight"]
    made["blk.0.ffn_up.weight"] = type, shape, quantize(np.zeros(shape, np.float32), type)


def template(edit: Callable[[str], str]) -> Callable[[Entries], None]:
    def change(said: Entries) -> None:
        kind, before = said["tokenizer.chat_template"]
        said["tokenizer.chat_template"] = kind, edit(before)
        assert said["tokenizer.chat_template"][1] != before

    return change


def normal_tokens(said: Entries) -> None:
    """Control tokens as ones that are read whole out of any text."""
    kind, types = said["tokenizer.ggml.token_type"]
    said["tokenizer.ggml.token_type"] = kind, np.where(np.asarray(types) == 3, 4, types).astype(np.int32)


def ends_lost(said: Entries) -> None:
    for key in ("eos", "eot", "eom"):
        said.pop(f"tokenizer.ggml.{key}_token_id", None)
    said["tokenizer.ggml.eos_token_id"] = ("uint32", 1)
    names = said["tokenizer.ggml.tokens"][1]
    names[names.index(EOT)], names[names.index("<|im_end|>")] = (
        "<|document|>",
        "<|turn|>",
    )  # llama.cpp knows the old ones


GGUF: dict[str, tuple[str, Callable[[Path], None]]] = {
    "q and k rows permuted": ("llama", rewritten(blocks=rows(to_pairs))),
    "rope in pairs, not halves": ("llama", rewritten(blocks=rows(to_halves))),
    "rope base": ("llama", rewritten(number("rope.freq_base", 500_000.0))),
    "head untied": ("llama", rewritten(blocks=other_head)),
    "norm offset lost": ("gemma2", rewritten(blocks=floats("norm", lambda w: w - 1))),
    "wrong eos": ("llama", rewritten(ends_lost)),
    "wrong pre-tokenizer": ("llama", rewritten(number("tokenizer.ggml.pre", "llama-bpe"))),
    "nibbles swapped": ("llama", rewritten(blocks=nibbles)),
    "beginning token lost": ("llama", rewritten(number("add_bos_token", False))),
    "system turn dropped": ("llama", rewritten(template(no_system))),
    "template lost": ("llama", rewritten(lambda said: said.pop("tokenizer.chat_template"))),
    "gate and up swapped": ("llama", rewritten(blocks=lambda made: swapped(made, "ffn_gate", "ffn_up"))),
    "a layer's norm lost": ("llama", rewritten(blocks=floats(r"blk\.1\.attn_norm", np.ones_like))),
    "epsilon": ("llama", rewritten(number("layer_norm_rms_epsilon", 1e-6))),
    "a tensor of zeros": ("llama", rewritten(blocks=zeros)),
    "control tokens read out of text": ("llama", rewritten(normal_tokens)),
    "window lost": ("gemma2", rewritten(number("attention.sliding_window", 128))),
    "softcap lost": ("gemma2", rewritten(number("final_logit_softcapping", 1e4))),
}
ONLY = {"nibbles swapped": ("Q4_K_M",)}  # the others have no nibbles
BUGS = {"hf": HF, "F16": GGUF, "Q4_K_M": GGUF}
CASES = [(bug, form) for form in FORMS for bug in BUGS[form] if form in ONLY.get(bug, FORMS)]
OTHER = {"hf": "transformers", "F16": "xllamacpp", "Q4_K_M": "xllamacpp"}


CAUGHT_BY = {  # at least, in every form and by either engine
    "q and k rows permuted": {"weights", "divergence"},
    "rope in pairs, not halves": {"weights", "divergence"},
    "rope base": {"settings", "probabilities", "engine", "divergence"},
    "head untied": {"settings", "weights", "probabilities", "engine", "divergence"},
    "norm offset lost": {"weights", "divergence"},
    "wrong eos": {"stops"},
    "wrong pre-tokenizer": {"ids"},
    "nibbles swapped": {"weights", "divergence"},
    "beginning token lost": {"settings"},
    "system turn dropped": {"prompts", "prompt ids"},
    "template lost": {"prompts", "prompt ids"},
    "gate and up swapped": {"weights", "divergence"},
    "a layer's norm lost": {"weights"},
    "epsilon": {"settings"},
    "a tensor of zeros": {"weights", "divergence"},
    "control tokens read out of text": {"ids"},
    "window lost": {"settings", "probabilities", "engine"},
    "softcap lost": {"settings", "probabilities", "engine"},
}


def planted(bug: str, form: str, home: Path) -> tuple[str, Path]:
    """(the model, a copy of its artifact with the bug in it)."""
    kind, plant = BUGS[form][bug]
    whole = clean(kind)[form]
    path = home / whole.name
    (shutil.copytree if whole.is_dir() else shutil.copy)(whole, path)
    plant(path)
    return kind, path


# -- tests -------------------------------------------------------------------------------------------------------------

ENGINES = [pytest.param(False, id="own reader"), pytest.param(True, id="other engine", marks=pytest.mark.parity)]


def need(form: str, other: bool) -> None:
    if other:
        pytest.importorskip(OTHER[form])


@pytest.mark.parametrize("other", ENGINES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_clean_artifact_is_certified(kind, form, other):
    need(form, other)
    found = certificate(kind, form, clean(kind)[form], other)
    assert found.ok, [check for check in found.checks if not check.ok]
    assert found.independent is other


@pytest.mark.parametrize("other", ENGINES)
@pytest.mark.parametrize("bug, form", CASES)
def test_a_planted_bug_fails_its_certificate(bug, form, other, tmp_path):
    need(form, other)
    kind, path = planted(bug, form, tmp_path)
    found = certificate(kind, form, path, other)
    assert not found.ok and set(found.failed) >= CAUGHT_BY[bug], found.failed
    assert bug != "beginning token lost" or not other or "begin" in found.failed


def table() -> str:
    """bug x form -> the checks that caught it, by the other engine and by kobza's own reader."""
    lines = ["| bug | form | other engine | own reader |", "|---|---|---|---|"]
    for kind in MODELS:
        for form in FORMS:
            cells = [", ".join(certificate(kind, form, clean(kind)[form], other).failed) for other in (True, False)]
            lines.append(f"| none: {kind} | {form} | {cells[0] or 'certified'} | {cells[1] or 'certified'} |")
    for bug, form in CASES:
        cells = []
        for other in (True, False):
            with tempfile.TemporaryDirectory() as home:
                kind, path = planted(bug, form, Path(home))
                absent = other and available(OTHER[form]) is None
                cells.append(
                    "not installed"
                    if absent
                    else ", ".join(certificate(kind, form, path, other).failed) or "NOT CAUGHT"
                )
        lines.append(f"| {bug} | {form} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
