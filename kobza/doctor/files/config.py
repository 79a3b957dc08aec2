"""`kobza doctor config DIR`: config.json, generation_config.json and the tensors' headers against each other.

Files only: nothing is loaded, nothing from the folder is run. The rotary part lies in rope.py, what needs tensors in tensors.py;
here are the single keys (norms, activation, softcap, query scale, window) and the ids on which the files must agree.
A default taken for an absent key is the current transformers' (folder.DEFAULTS). Only two things in the folder that contradict
each other are an error; a value unlike the family's releases is a warning at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kobza.doctor.files import rope, tensors
from kobza.doctor.files.folder import (
    DEFAULTS,
    Folder,
    as_ids,
    bos_patch,
    check_code,
    check_readable,
    open_,
    post_processors,
    token_text,
    wants_bos,
)
from kobza.doctor.finding import Check, Finding, Skip

__all__ = ["CHECKS", "facts", "open_"]

GEMMAS = ("gemma", "gemma2", "gemma3_text")


def _heuristic(code: str, severity: str, where: str, expected: str, got: str, **more: Any) -> Finding:
    return Finding(code, severity, more.pop("confidence", "heuristic"), where, expected, got, **more)  # type: ignore[arg-type]


def check_eps(folder: Folder) -> Iterator[Finding]:
    """G4: the norm's epsilon is said, and is the family's."""
    key = "layer_norm_epsilon" if folder.kind == "gpt2" else "rms_norm_eps"
    if folder.value(key) is None:
        raise Skip(f"no {key}, and no default is known for model_type {folder.kind or 'absent'}")
    eps, where = folder.real(key), folder.where(key)
    why = "quiet activations are scaled otherwise than in training"
    source = "https://github.com/ggml-org/llama.cpp/pull/2711"
    if key not in folder.text:
        got = f"absent: the reader takes its default {eps:g}"
        fix = "write the value of the original release"
        yield _heuristic("G4", "info", where, "the value said in the file", got, why=why, fix=fix, source=source)
    elif eps is None or not 0 < eps < 1e-2:
        got = repr(folder.text[key])[:60]
        proof = f"{key} = {got}"
        fix = "write the value of the original release, 1e-5 or 1e-6"
        yield Finding("G4", "error", "proven", where, "a number in (0, 0.01)", got, why, fix, proof, source)
    elif folder.kind in GEMMAS and eps != 1e-6:
        patch = folder.patch(key, 1e-6)
        more = {"why": why, "fix": "write 1e-06", "source": source, "patch": patch}
        yield _heuristic("G4", "warn", where, "1e-06, as every Gemma was trained with", f"{eps:g}", **more)
    elif eps not in (1e-5, 1e-6, 1e-8, 1e-12):
        fix = "write the value of the original release, 1e-5 or 1e-6"
        yield _heuristic("G4", "warn", where, "1e-05 or 1e-06", f"{eps:g}", why=why, fix=fix, source=source)


def check_activation(folder: Folder) -> Iterator[Finding]:
    """G7: a Gemma's GELU is the tanh form, whichever of the two keys a reader looks at."""
    if folder.kind not in GEMMAS:
        raise Skip("the activation is ambiguous for Gemma alone")
    act, activation = folder.text.get("hidden_act"), folder.text.get("hidden_activation")
    source = "https://github.com/huggingface/transformers/pull/29402"
    why = "the exact form differs from the tanh form by up to 4.7e-4 an activation; no error is raised"
    more = {"why": why, "source": source, "fix": "write hidden_activation gelu_pytorch_tanh", "confidence": "likely"}
    more["patch"] = folder.patch("hidden_activation", "gelu_pytorch_tanh")
    tanh = "gelu_pytorch_tanh"
    if activation is None and act not in (None, tanh):
        got = f"hidden_act {act!r}, hidden_activation absent: exact before transformers 4.39, tanh since"
        yield _heuristic("G7", "warn", folder.where("hidden_act"), f"{tanh} in hidden_activation", got, **more)
    elif activation not in (None, tanh):
        yield _heuristic("G7", "warn", folder.where("hidden_activation"), tanh, repr(activation)[:60], **more)


def check_softcap(folder: Folder) -> Iterator[Finding]:
    """G12: a Gemma 2 caps its scores and its logits."""
    if folder.kind != "gemma2":
        raise Skip("only Gemma 2 was trained with soft caps")
    for key, cap in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        given = folder.text[key] if key in folder.text else cap
        if given != cap:
            yield _heuristic(
                "G12",
                "warn",
                folder.where(key),
                f"{cap:g}, as every Gemma 2 was trained with",
                f"{given!r}"[:60] + (": off" if not given else ""),
                why="scores beyond the cap, and the loss, come out otherwise than in training",
                fix=f"write {cap:g}",
                confidence="likely",
                source="https://unsloth.ai/blog/gemma2",
                patch=folder.patch(key, cap),
            )


def check_query_scale(folder: Folder) -> Iterator[Finding]:
    """G13: the query scale is said and is one of the two that Gemmas have."""
    if folder.kind not in ("gemma2", "gemma3_text"):
        raise Skip("no query_pre_attn_scalar in this architecture")
    key, sizes = "query_pre_attn_scalar", folder.sizes()
    usual = [sizes["D"], sizes["C"] // sizes["H"]]
    scale, where = folder.real(key), folder.where(key)
    more = {
        "why": "the softmax is sharper or flatter than in training",
        "fix": f"write {usual[0]} (head_dim; 27B: {usual[1]}, width / heads)",
        "source": "https://github.com/ml-explore/mlx-swift-examples/issues/99",
    }
    if key not in folder.text:
        got = f"absent: the reader's default {scale:g}, 224 in transformers 4.42" if scale else "absent"
        yield _heuristic("G13", "warn", where, f"{usual[0]} or {usual[1]}", got, **more)
    elif scale not in usual:
        got = repr(folder.text[key])[:60]
        yield _heuristic("G13", "warn", where, f"head_dim {usual[0]} or width / heads {usual[1]}", got, **more)


def window(folder: Folder) -> int | None:
    """The sliding window in use, None if it is absent or switched off."""
    if folder.text.get("use_sliding_window", folder.value("use_sliding_window")) is False:
        return None
    given = folder.text["sliding_window"] if "sliding_window" in folder.text else folder.value("sliding_window")
    return given if type(given) is int else None


def check_window(folder: Folder) -> Iterator[Finding]:
    """P1: the window is a width that every backend reads alike."""
    given = folder.text.get("sliding_window")
    if given is None or folder.text.get("use_sliding_window") is False:
        raise Skip("no window, or it is switched off")
    where, W = folder.where("sliding_window"), window(folder)
    source = "https://github.com/huggingface/transformers/pull/39408"
    longest = folder.whole("max_position_embeddings")
    if W is None or W < 0:
        proof = f"sliding_window = {given!r}"[:80]
        why, fix = "the reader fails, or takes it for some other width", "write the window in tokens, or null"
        yield Finding("P1", "error", "proven", where, "a whole number, or null", proof, why, fix, proof)
    elif W == 0:
        why, fix = "some readers take 0 for no window, others let a token see nothing", "write null for none"
        more = {"why": why, "fix": fix, "patch": folder.patch("sliding_window", None)}
        yield _heuristic("P1", "warn", where, "null for none", "0", **more)
    elif W > 2 and (W + 1) & W == 0:
        why = f"an eager mask shows {W} tokens, a flash kernel {W + 1}: which of them was trained is not said"
        fix = f"measure it (kobza doctor model); if {W + 1} was trained, say so"
        yield _heuristic("P1", "info", where, f"{W + 1}?", f"{W}", why=why, fix=fix, source=source)
    elif longest and W > longest and folder.kind != "gemma3_text":
        why, fix = (
            "the window never cuts anything off: a leftover of another release?",
            "take the value of the original",
        )
        yield _heuristic("P1", "info", where, f"at most the context {longest}", f"{W}", why=why, fix=fix, source=source)


def check_layer_types(folder: Folder) -> Iterator[Finding]:
    """P2: the list of layer kinds has one entry a layer, and the window that its entries need is there."""
    kinds, count = folder.text.get("layer_types"), folder.whole("num_hidden_layers")
    on, upper = folder.text.get("use_sliding_window"), folder.text.get("max_window_layers")
    if kinds is None and on is not True:
        raise Skip("no layer_types, and no window switched on for some layers")
    where, why = (
        folder.where("layer_types"),
        "layers see more or fewer tokens than in training; short texts do not show it",
    )
    source = "https://github.com/huggingface/transformers/issues/35924"
    fix = "take the list of the original release"
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != count):
        got = f"{len(kinds)} entries" if isinstance(kinds, list) else repr(kinds)[:60]
        proof = f"layer_types has {got}, num_hidden_layers is {count}"
        yield Finding("P2", "error", "proven", where, f"{count} entries", got, why, fix, proof, source)
    elif kinds is not None and "sliding_attention" in kinds and window(folder) in (None, 0):
        i = kinds.index("sliding_attention")
        proof = f"layer_types[{i}] is sliding_attention, sliding_window is {folder.text.get('sliding_window')!r}" + (
            ", use_sliding_window is false" if on is False else ""
        )
        yield Finding("P2", "error", "proven", where, "a window", "none", why, fix, proof, source)
    elif kinds is not None and window(folder) and "sliding_attention" not in kinds and "sliding_window" in folder.text:
        got = f"sliding_window {window(folder)}, no layer of that kind"
        yield _heuristic("P2", "warn", where, "a sliding_attention layer", got, why=why, fix=fix, source=source)
    elif kinds is None and count and type(upper) is int and upper >= count and window(folder):
        got = f"use_sliding_window true, max_window_layers {upper} of {count} layers: no layer has the window"
        where = folder.where("max_window_layers")
        yield _heuristic("P2", "info", where, f"less than {count}", got, why=why, fix=fix, source=source)


def end_ids(folder: Folder) -> dict[str, list[int]]:
    """Where ids that end a text are said -> the ids. The tokenizer's eos_token as the id that tokenizer.json gives it."""
    said = {"config.json:eos_token_id": as_ids(folder.text.get("eos_token_id", folder.config.get("eos_token_id")))}
    said["generation_config.json:eos_token_id"] = as_ids(folder.generation.get("eos_token_id"))
    token = token_text(folder.tokenizer_config.get("eos_token"))
    said["tokenizer_config.json:eos_token"] = [folder.ids()[token]] if token in folder.ids() else []
    return {where: ids for where, ids in said.items() if ids}


def check_ends(folder: Folder) -> Iterator[Finding]:
    """P5: whatever one file says ends a text is known to the file that generation reads."""
    said = end_ids(folder)
    main = next((w for w in ("generation_config.json:eos_token_id", "config.json:eos_token_id") if w in said), "")
    if not main or len(said) < 2:
        raise Skip("fewer than two files say what ends a text")
    names = {i: token for token, i in folder.ids().items()}
    for where, ids in said.items():
        lost = [i for i in ids if i not in said[main]]
        if lost:
            token = names.get(lost[0], "")
            stopped = sorted({*said[main], *lost})
            file = main.split(":")[0]
            known = all(i in names for i in lost) or not names  # an id that is no token is not spread to a second file
            yield _heuristic(
                "P5",
                "warn",
                main,
                f"{lost[0]} {token!r} among them, as {where} says",
                f"{said[main]}",
                why="generation reads this list: it runs on past the end that the other file names",
                fix=f"write {stopped}",
                confidence="likely",
                counterexample=f"{where} = {ids}, {main} = {said[main]}",
                source="https://github.com/ggml-org/llama.cpp/issues/6745",
                patch={"file": file, "key": ["eos_token_id"], "value": stopped} if known else None,
            )
            return


def pad_and_ends(folder: Folder) -> tuple[str, int | None, list[int], int | None]:
    """(where the padding token is said, its id, the ids of the first end token, the id of the first token)."""
    ids = folder.ids()
    token = token_text(folder.tokenizer_config.get("pad_token"))
    if token in ids:
        where, pad = "tokenizer_config.json:pad_token", ids[token]
    else:
        found = as_ids(folder.text.get("pad_token_id", folder.config.get("pad_token_id")))
        where, pad = "config.json:pad_token_id", found[0] if found else None
    end = token_text(folder.tokenizer_config.get("eos_token"))
    ends = [ids[end]] if end in ids else as_ids(folder.text.get("eos_token_id", folder.config.get("eos_token_id")))[:1]
    bos = as_ids(folder.text.get("bos_token_id", folder.config.get("bos_token_id")))
    return where, pad, ends, bos[0] if bos else None


def check_pad(folder: Folder) -> Iterator[Finding]:
    """P4: padding is not done with the token that ends a text."""
    where, pad, ends, bos = pad_and_ends(folder)
    if pad is None or not ends:
        raise Skip("no padding token or no end token is named")
    if pad in ends:
        token = next((token for token, i in folder.ids().items() if i == pad), "")
        same = "padding, end and beginning" if bos == pad else "padding and end"
        yield _heuristic(
            "P4",
            "warn",
            where,
            "a token of its own",
            f"{same} are all {pad} {token!r}",
            why="a trainer that masks labels equal to the padding masks the end too: the model never learns to stop",
            fix="pad with an unused token, or mask by place and not by id; check the labels (kobza doctor data)",
            source="https://unsloth.ai/blog/phi4",
        )


def puts_in_front(tokenizer: dict[str, Any], token: str) -> bool:
    """Whether a tokenizer.json puts the token before a text."""
    for part in post_processors(tokenizer):
        single = part.get("single")
        first = single[0] if isinstance(single, list) and single else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        cls = part.get("cls")
        if (isinstance(special, dict) and special.get("id") == token) or (isinstance(cls, list) and token in cls[:1]):
            return True
    return False


def check_bos(folder: Folder) -> Iterator[Finding]:
    """G1: a family trained with a first token gets it from the tokenizer or the template."""
    tokens = {i: token for token, i in folder.ids().items()}
    ids = as_ids(folder.text.get("bos_token_id"))
    bos = token_text(folder.tokenizer_config.get("bos_token")) or (tokens.get(ids[0], "") if ids else "")
    if not folder.tokenizer or not bos or not wants_bos(folder, bos):
        raise Skip("no tokenizer.json with a token that its family begins every text with")
    if puts_in_front(folder.tokenizer, bos) or "bos_token" in folder.template or bos in folder.template:
        return
    said = folder.tokenizer_config.get("add_bos_token")
    yield _heuristic(
        "G1",
        "warn",
        "tokenizer.json:post_processor",
        f"{bos!r} before every text",
        "neither the post-processor nor the chat template writes it"
        + (f"; add_bos_token {said}" if said is not None else ""),
        why="Gemma, Llama and Mistral were trained with it on every text and drift without it",
        fix=f"add a TemplateProcessing with {bos!r} in front",
        confidence="likely",
        source="https://unsloth.ai/blog/gemma-bugs",
        patch=bos_patch(folder.tokenizer, bos),
    )


def facts(folder: Folder) -> dict[str, list[list[str]]]:
    """What the files say the model is, and what is there without effect."""
    rows = [["what", "value"], ["architecture", folder.kind or "not said"]]
    if folder.tensors:
        infos = [info for _, info in folder.tensors.values()]
        count = sum(math.prod(info.shape) for info in infos)
        kinds = sorted({info.dtype for info in infos})
        rows += [["tensors", f"{len(infos):,}"], ["numbers in them", f"{count:,}"], ["stored as", ", ".join(kinds)]]
    for name, key in (
        ("layers", "num_hidden_layers"),
        ("width", "hidden_size"),
        ("context", "max_position_embeddings"),
    ):
        rows.append([name, str(folder.value(key))])
    given = folder.text.get("sliding_window")
    if given is not None:
        off = folder.text.get("use_sliding_window") is False
        rows.append(["sliding window", f"{given}" + (", present but switched off" if off else "")])
    ids, name = folder.ids(), folder.embedding()
    if ids and name:
        spare = folder.tensors[name][1].shape[0] - max(ids.values()) - 1
        rows.append(["rows of the embedding beyond the vocabulary", str(max(0, spare))])
    found = {"What the files say": rows}
    absent = defaults_used(folder)
    if absent:
        found["Keys that are absent, and what the reader takes"] = [["key", "value"], *absent]
    return found


def defaults_used(folder: Folder) -> list[list[str]]:
    """(key, default) of the keys that the file leaves to its reader."""
    known = DEFAULTS.get(folder.kind, {})
    return [[key, str(value)] for key, value in known.items() if folder.key(key) not in folder.text and value != 0]


CHECKS = (
    Check("", "the folder's files can be read", check_readable),
    Check("X1", "no code of the folder's own is needed", check_code),
    *tensors.CHECKS,
    *rope.CHECKS,
    Check("G4", "the norm's epsilon is said, and the family's", check_eps),
    Check("G7", "the activation is not ambiguous", check_activation),
    Check("G12", "the soft caps are on", check_softcap),
    Check("G13", "the query scale is one of the family's", check_query_scale),
    Check("P1", "the window is a width that all read alike", check_window),
    Check("P2", "the layers' kinds and the window agree", check_layer_types),
    Check("P5", "the files agree on what ends a text", check_ends),
    Check("P4", "padding is not the end token", check_pad),
    Check("G1", "the first token is written by somebody", check_bos),
)
