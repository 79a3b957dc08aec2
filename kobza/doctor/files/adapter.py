"""`kobza doctor adapter BASE ADAPTER [MERGED]`: a LoRA adapter, the model it belongs to, and what a merge made of it.

Files only, without torch: names and shapes out of headers, numbers tensor by tensor. With MERGED the delta MERGED - BASE is held
against scale * B @ A. An error names a tensor and two numbers that anybody can read again.

Here are names and shapes; lora.py opens and measures, merge.py has the checks of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kobza.config import InputError
from kobza.doctor.files.lora import FLOATS, FUSED, PREFIX, Adapter, open_, shape_of, whole
from kobza.doctor.files.merge import (
    a5,
    first_difference,
    is_tied,
    merged_scale,
    on_grid,
    static_rank,
    trained,
    untouched,
)
from kobza.doctor.finding import Check, Finding, Skip
from kobza.formats.headers import inside, read_json

__all__ = ["CHECKS", "facts", "open_"]


def matched(adapter: Adapter) -> Iterator[Finding]:
    """A5: every pair has its weight in the base, of its shape; nothing that was trained is missing."""
    fix = "name the base that the adapter was trained on (base_model_name_or_path), and the version of its files"
    why = "loaders with strict=False leave such tensors out without a word: the base answers alone"
    if not adapter.halves:
        names = ", ".join(list(adapter.tensors)[:3])
        yield a5(
            "adapter_model.safetensors",
            "pairs lora_A, lora_B",
            "none",
            why,
            "save the adapter with PEFT's save_pretrained",
            f"its {len(adapter.tensors)} tensors: {names}",
        )
        return
    for module, halves in adapter.halves.items():
        if len(halves) == 1:
            lacking = ({"A", "B"} - set(halves)).pop()
            yield a5(
                module,
                "lora_A and lora_B",
                f"no lora_{lacking}",
                "the delta cannot be computed",
                "save the adapter again",
                f"{next(iter(halves.values()))} is there, its lora_{lacking} is not",
            )
            return
    tied = {"lm_head"} if is_tied(adapter) else set()  # the table is its weight
    lost = [pair for pair in adapter.pairs if pair.weight is None and pair.module not in tied]
    lost = [pair for pair in lost if other_fusing(adapter, pair.module) is None]
    if lost:
        example = (
            f"{lost[0].module}: no {lost[0].module}.weight among the base's {len(adapter.base_tensors):,} tensors "
            f"({next(iter(adapter.base_tensors), '')}, ...)"
        )
        yield a5(
            lost[0].module,
            "a weight of that name in the base",
            f"{len(lost)} of {len(adapter.pairs)} pairs have none",
            why,
            fix,
            example,
        )
    yield from shapes_fit(adapter, fix)
    yield from not_saved(adapter)


def shapes_fit(adapter: Adapter, fix: str) -> Iterator[Finding]:
    """B @ A is of the weight's shape."""
    for pair in adapter.pairs:
        shape = adapter.base_tensors[pair.weight][1].shape if pair.weight else None
        if (
            shape
            and adapter.base_tensors[pair.weight][1].dtype in FLOATS
            and (not whole(pair) or shape != shape_of(pair))
        ):  # type: ignore[index]
            example = f"{pair.module}: B {pair.b.shape} @ A {pair.a.shape}, and the base's weight is {shape}"
            yield a5(
                pair.module,
                f"B @ A of shape {shape}",
                f"{pair.b.shape} @ {pair.a.shape}",
                "this is another base, or an adapter of another format",
                fix,
                example,
            )
            return


def not_saved(adapter: Adapter) -> Iterator[Finding]:
    """Modules that the config calls trained and the file has not."""
    listed = adapter.config.get("target_modules")
    if isinstance(listed, list):
        modules = [*adapter.halves, *(name.removeprefix(PREFIX).removesuffix(".weight") for name in adapter.tensors)]
        lacking = [t for t in listed if isinstance(t, str) and not any(m == t or m.endswith(f".{t}") for m in modules)]
        if lacking:
            example = (
                f"target_modules has {lacking[0]!r}; the file's modules end in "
                f"{', '.join(sorted({m.rpartition('.')[2] for m in adapter.halves}))}"
            )
            yield a5(
                "adapter_config.json:target_modules",
                "a pair for each module",
                f"none for {', '.join(lacking)}",
                "these modules were not trained, or their tensors are lost",
                "correct target_modules, or save again",
                example,
                "warn",
            )
    kept = adapter.config.get("modules_to_save")
    for module in [m for m in kept if isinstance(m, str)] if isinstance(kept, list) else []:
        if not any(
            f".{module}." in f".{name}" or name.endswith(f".{module}.weight")
            for name in adapter.tensors
            if ".lora_" not in name
        ):
            yield a5(
                "adapter_config.json:modules_to_save",
                f"the whole {module} in the file",
                "it is not there",
                "what was trained of it is lost",
                "save again, with the module's own weights",
                f"modules_to_save has {module!r}; no tensor of it among {len(adapter.tensors)}",
            )


def new_tokens(adapter: Adapter) -> Iterator[Finding]:
    """A5: tokens that came with the adapter have rows that were trained and saved."""
    path = adapter.folder / "tokenizer.json"
    if not path.is_file():
        raise Skip("no tokenizer.json beside the adapter")
    ours = token_ids(path, adapter.folder)
    table = next(
        (
            info
            for name, (_, info) in adapter.base_tensors.items()
            if name.endswith(("embed_tokens.weight", "wte.weight"))
        ),
        None,
    )
    if table is None:
        raise Skip("the base has no embed_tokens.weight")
    saved = any("embed_tokens" in name or "wte" in name for name in adapter.tensors)
    beyond = {token: i for token, i in ours.items() if i >= table.shape[0]}
    if beyond and not saved:
        token, i = min(beyond.items(), key=lambda item: item[1])
        example = (
            f"token {token!r} has id {i}, the base's table has {table.shape[0]:,} rows, and the adapter has no table"
        )
        yield a5(
            "tokenizer.json",
            f"ids below {table.shape[0]:,}",
            f"{len(beyond)} beyond",
            "reading such a token is an error, or reads past the table",
            "save the adapter with save_embedding_layers=True",
            example,
        )
    elif not saved and (adapter.base / "tokenizer.json").is_file():
        known = token_ids(adapter.base / "tokenizer.json", adapter.base)
        fresh = [token for token in ours if token not in known]
        if fresh:
            example = (
                f"token {fresh[0]!r}, id {ours[fresh[0]]}, is not in the base's tokenizer, and the adapter has no "
                "table of its own"
            )
            yield a5(
                "tokenizer.json",
                "rows trained for new tokens",
                f"{len(fresh)} tokens without",
                "their rows are what the base left there, often zeros",
                "train and save embed_tokens (modules_to_save or trainable_token_indices)",
                example,
                "warn",
            )


def token_ids(path: Path, folder: Path) -> dict[str, int]:
    """token -> id of a tokenizer.json, the added ones too."""
    content = read_json(inside(folder, path.name), 200_000_000)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else {}
    ids = {t: i for t, i in vocab.items() if isinstance(i, int)} if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):
        ids = {str(row[0]): i for i, row in enumerate(vocab) if isinstance(row, list) and row}
    extra = content.get("added_tokens")
    for added in extra if isinstance(extra, list) else []:
        if isinstance(added, dict) and isinstance(added.get("id"), int):
            ids[str(added.get("content"))] = added["id"]
    return ids


def other_fusing(adapter: Adapter, module: str) -> str | None:
    """The base's weight that holds this module's together with others, or a part of it. "...qkv_proj" -> "...q_proj.weight" """
    stem, _, leaf = module.rpartition(".")
    partners = FUSED.get(leaf, ()) or [name for name, parts in FUSED.items() if leaf in parts]
    return next((weight for name in partners if (weight := adapter.weight_of(f"{stem}.{name}"))), None)


def fusing(adapter: Adapter) -> Iterator[Finding]:
    """A6: adapter and base agree on what is fused."""
    for pair in adapter.pairs:
        partner = other_fusing(adapter, pair.module) if pair.weight is None else None
        if partner:
            shape = adapter.base_tensors[partner][1].shape
            yield Finding(
                "A6",
                "error",
                "proven",
                pair.module,
                "modules fused as in the base",
                f"the base has {partner}",
                "the pair changes nothing, or the wrong rows",
                "to split: the same A for each part, B by rows; to fuse: ranks add up, so alpha must grow with them",
                f"{pair.module}: B {pair.b.shape}; the base has {partner} {shape} and no {pair.module}.weight",
                "https://github.com/kohya-ss/sd-scripts/issues/2204",
            )
            return


def fused_targets(adapter: Adapter) -> Iterator[Finding]:
    """P3: one A for q, k and v together has fewer parameters than one each."""
    fused = [pair for pair in adapter.pairs if pair.module.rpartition(".")[2] in FUSED and whole(pair)]
    hit = [pair for pair in fused if not in_blocks(adapter.factors(pair)[1])]
    if not hit:
        return
    r, width, out = hit[0].a.shape[0], hit[0].a.shape[1], hit[0].b.shape[0]
    parts = len(FUSED[hit[0].module.rpartition(".")[2]])
    shared, apart = r * (width + out), r * (parts * width + out)
    yield Finding(
        "P3",
        "warn",
        "likely",
        hit[0].module,
        f"an adapter for each of {parts} projections",
        f"one for all, {shared:,} parameters instead of {apart:,}",
        "q, k and v share the rank's directions in the input; quality is reported lower",
        "unfuse the projection before training, or raise r",
        f"{len(hit)} fused modules; {hit[0].module}: A {hit[0].a.shape}, B {hit[0].b.shape}",
    )


def in_blocks(b: np.ndarray) -> bool:
    """Whether a B (out, r) is blocks on a diagonal: each projection has an A of its own. Half is zeros at least."""
    return np.count_nonzero(b) <= b.size / 2


def tied_head(adapter: Adapter) -> Iterator[Finding]:
    """A7: LoRA on a head that is the table as well."""
    if not is_tied(adapter):
        return
    for pair in adapter.pairs:
        leaf = pair.module.rpartition(".")[2]
        if leaf not in ("lm_head", "embed_tokens", "wte"):
            continue
        other = "the embedding" if leaf == "lm_head" else "the head"
        why, fix = (
            f"a merge changes {other} as well, which was not trained so",
            "leave it out of target_modules, or untie (a lm_head.weight of its own) before merging",
        )
        name = next((n for n in adapter.base_tensors if n.endswith(("embed_tokens.weight", "wte.weight"))), "")
        own = any(n.endswith("lm_head.weight") for n in adapter.merged_tensors)
        changed = "" if own or name not in adapter.merged_tensors else first_difference(adapter, name)
        if changed:
            yield Finding(
                "A7",
                "error",
                "proven",
                pair.module,
                f"{other} as it was",
                f"{name} differs in the merged model",
                why,
                fix,
                changed,
            )
        elif adapter.merged is None or not own:
            yield Finding(
                "A7",
                "warn",
                "likely",
                pair.module,
                "a target that is one matrix only",
                "the head is tied to the embedding",
                why,
                fix,
            )
        return


def facts(adapter: Adapter) -> dict[str, list[list[str]]]:
    """Pair by pair, what a merge made of it."""
    n = sum(math.prod(info.shape) for info in adapter.tensors.values())
    rows = [["adapter", str(adapter.folder)], ["pairs", str(len(adapter.pairs))], ["parameters", f"{n:,}"]]
    made = {"adapter": [["figure", "value"], *rows]}
    try:
        fits = adapter.fits
    except (Skip, InputError):
        return made
    table = [["weight", "|delta| / |W|", "scale found", "scale asked", "lost", "rounding alone"]]
    for f in fits:
        size = f.asked * math.sqrt(f.rr / f.ww) if f.ww else math.nan
        table.append(
            [
                str(f.pair.weight),
                f"{size:.2%}",
                f"{f.scale:.4g}",
                f"{f.asked:.4g}",
                f"{f.lost:.1%}",
                f"{f.rounding:.1%}",
            ]
        )
    return made | {"merge": table}


CHECKS: tuple[Check, ...] = (
    Check("A5", "every pair has its weight", matched),
    Check("A5", "new tokens have rows", new_tokens),
    Check("A6", "fused as in the base", fusing),
    Check("P3", "no adapter on fused projections", fused_targets),
    Check("A7", "no target that is tied", tied_head),
    Check("A3", "factors that were trained", trained),
    Check("A2", "the rank is the config's", static_rank),
    Check("A1", "merged off the grid", on_grid),
    Check("A2 A4 A5", "the delta at its scale, once", merged_scale),
    Check("A5", "all else as in the base", untouched),
)
