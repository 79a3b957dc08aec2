"""An adapter without its base: PEFT's files for transformers and vLLM, a GGUF file for llama.cpp and Ollama.

A tuning's checkpoint holds PEFT's files already; `write_peft` gives them the base's name that others know, tokenizer and card.
`write_lora_gguf` puts the factors of W + s B A where llama.cpp looks for W: A as it is, the rows of B in the order of W's rows
(llama's q and k turn neighbours), and where a family joins matrices the A under each other and the B as blocks. llama.cpp scales
by one alpha over each pair's own rank; a pair that asks for another scale has it in its B. What else a tuning may learn (DoRA's
lengths, tables, tokens) has no place there: such a one is merged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kobza.config import ModelConfig, require
from kobza.formats.families import layout_of
from kobza.formats.gguf import write_gguf
from kobza.formats.gguf_families import config_to_gguf, gguf_target
from kobza.formats.headers import read_header
from kobza.formats.layouts import shapes, slots
from kobza.formats.template import read_text
from kobza.formats.weights import joined

TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


class Pair(NamedTuple):
    """The factors of one linear layer: A (r, in), B (out, r), and the scale s of B A."""

    a: Tensor
    b: Tensor
    scale: float


# ---- llama.cpp's -----------------------------------------------------------------------------------------------------


def write_lora_gguf(
    path: Path, config: ModelConfig, pairs: Mapping[str, Pair], name: str = "", beside: Collection[str] = ()
) -> None:
    """Write the adapter of a base to a GGUF file, float32.

    pairs: by our module, {"blocks.0.attn.q_proj": Pair(...)}; beside: what else was learned, in words
    """
    lost = f"a GGUF adapter has no place for {' and '.join(beside)}; put it into its base: kobza merge"
    require(not beside, f"{path}: {lost}")
    require(bool(pairs), f"{path}: there is no adapter to write; export the model")
    arch = config_to_gguf(config)[0]
    made = placed(config, arch, pairs)
    alpha = next(pair.scale * len(pair.a) for pair in made.values())
    metadata: dict[str, tuple[str, Any]] = {
        "general.architecture": ("string", arch),
        "general.type": ("string", "adapter"),
        "adapter.type": ("string", "lora"),
        "adapter.lora.alpha": ("float32", alpha),
        "general.file_type": ("uint32", 0),  # all float32
    }
    metadata |= {"general.name": ("string", name)} if name else {}
    tensors = {}
    for theirs, (a, b, scale) in made.items():
        own = scale * len(a) / alpha
        tensors[f"{theirs}.lora_a"] = a
        tensors[f"{theirs}.lora_b"] = b if abs(own - 1) < 1e-12 else b * own
    write_gguf(
        path, metadata, {key: ("F32", tuple(t.shape), t.float().numpy().tobytes()) for key, t in tensors.items()}
    )


def placed(config: ModelConfig, arch: str, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs under the names and in the order of the base's GGUF file; parts of one matrix as one pair."""
    target = gguf_target(config, arch)
    sizes, found, left = shapes(target), {}, set(pairs)
    for slot in slots(target, layout_of(arch, gguf=True)):
        names = [name.removesuffix(".weight") for name in slot.ours]
        parts = [pairs.get(name) for name in names]
        if any(parts):
            left -= set(names)
            a, b, scale = stacked(parts, [sizes[name][0] for name in slot.ours])
            found[slot.theirs] = Pair(a.contiguous(), joined(slot._replace(transposed=False, shift=0.0), [b]), scale)
    tied = f"{', '.join(sorted(left)[:3])} has no matrix of its own in a GGUF file of {arch}"
    require(not left, f"{tied}; put the adapter into its base: kobza merge")
    return found


def stacked(parts: list[Pair | None], sizes: list[int]) -> Pair:
    """Adapters of matrices that lie under each other, of so many rows each, as one of the whole; a part may have none."""
    there = [part for part in parts if part is not None]
    ranks = [0 if part is None else len(part.a) for part in parts]
    rows, column = [], 0
    for part, n, rank in zip(parts, sizes, ranks, strict=True):
        block = there[0].b.new_zeros(n, sum(ranks))
        if part is not None:
            block[:, column : column + rank] = part.b[:n] * (1.0 if len(there) == 1 else part.scale)
        rows.append(block)
        column += rank
    scale = there[0].scale if len(there) == 1 else 1.0
    return Pair(torch.cat([part.a for part in there]), torch.cat(rows), scale)


# ---- PEFT's ----------------------------------------------------------------------------------------------------------


def write_peft(folder: Path, tuning: Path, base: str, beside: Collection[str] = ()) -> None:
    """Put the adapter of a tuning's checkpoint into a folder as PEFT loads it onto `base`, a name on the hub or a folder; the
    tokenizer is hf.py's to write. beside: what of the base itself was changed, in words."""
    changed = f"{tuning}: learned on a base with {' and '.join(beside)}, which {base} has not; put it into its base"
    require(not beside, f"{changed}: kobza merge")
    said = json.loads(read_text(tuning / SETTINGS))
    names = read_header(tuning / TENSORS)
    own = f"{tuning}: its base is a model that no stock architecture computes, so PEFT knows no names for it"
    require(not any(".model.blocks." in name for name in names), f"{own}; train it again with --exportable")
    if said.get("base_model_name_or_path") != base:
        said |= {"base_model_name_or_path": base, "revision": None}
    shutil.copyfile(tuning / TENSORS, folder / TENSORS)
    card = CARD.format(base=base, rank=said.get("r"), alpha=said.get("lora_alpha"))
    for name, text in ((SETTINGS, json.dumps(said, indent=1)), ("README.md", card)):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


CARD = """---
base_model: {base}
library_name: peft
---
A LoRA adapter of {base}, rank {rank}, alpha {alpha}, trained with kobza.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "FOLDER OF THIS FILE")
```
"""
