"""A base made ready to be tuned: opened, its template found, its weights read, the method put in place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kobza.checkpoint import Loaded, find_checkpoint, read_config
from kobza.config import InputError, RunConfig, require
from kobza.describe.parts import total_parameters
from kobza.device import Runtime, free_memory
from kobza.doctor.files.template import CHECKS as TEMPLATE_CHECKS
from kobza.doctor.files.template import TemplateSubject, Tokens
from kobza.doctor.finding import examine
from kobza.finetune.base import load_base
from kobza.finetune.config import MethodConfig, TuneConfig
from kobza.finetune.example import Row
from kobza.finetune.lora import choose_weights, freeze_base
from kobza.finetune.peft import Base as AdapterBase
from kobza.finetune.peft import write_adapter
from kobza.finetune.rates import check_rates
from kobza.finetune.run import SaveAdapter
from kobza.finetune.tokens import untrained_in, with_tokens
from kobza.finetune.xray import Remark
from kobza.formats.chat import ChatEncoder
from kobza.formats.template import ChatTemplate
from kobza.formats.turns import turns_from_example
from kobza.hub.store import find_model
from kobza.kernels import checkpointing, tuned
from kobza.kernels.choose import use as use_kernels
from kobza.model import GPT
from kobza.optim import make_optimizers
from kobza.quant import nf4
from kobza.quant.adam8 import AdamW8bit
from kobza.recipes.tuned import ADAPTER, template_of, weights_digest, with_rows
from kobza.surgery import freeze
from kobza.tokenizer import Tokenizer, load_tokenizer

SHOWN = 6  # tokens that are named
USUAL_LENGTH = 1024  # tokens of a row where nobody asks for more: memory goes with it


@dataclass(frozen=True)
class Base:
    """What is known of a base before its weights are read. `encoder`: None where there is no chat template."""

    folder: Path
    run: RunConfig
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    """what the tuned model's config.json will say of it"""
    encoder: ChatEncoder | None
    ends: list[int]
    remarks: list[Remark] = field(default_factory=list)

    def piece(self, i: int) -> str | bytes:
        """An id for a person: a special token by name, any other as its bytes."""
        return self.names[i] if i in self.names else self.tokenizer.pieces[i]

    @cached_property
    def names(self) -> dict[int, str]:
        """Special tokens by id."""
        return {i: name for name, i in self.tokenizer.specials.items()}


def open_base(config: TuneConfig) -> Base:
    """The model that a tuning begins from: all but its weights."""
    source = config.source
    folder = find_checkpoint(find_model(Path(source.model)))
    merged = (
        f"{source.model} is a tuning with an adapter of its own; merge it first: kobza merge {source.model} --out NEW"
    )
    require(not (folder / ADAPTER).exists(), merged)
    run, provenance = read_config(folder / "config.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json", run.data.unknown)
    added = [name for name in source.add_tokens.split(",") if name]
    tokenizer = with_tokens(tokenizer, added) if added else tokenizer
    template = find_template(source.template, provenance, tokenizer, folder)
    stops = list(provenance.get("ends") or tokenizer.ends)
    encoder = None if template is None else ChatEncoder(template, tokenizer, stops)
    ends = list(dict.fromkeys([*stops, *(encoder.ends.values() if encoder else ())]))
    name = {"name": source.model, "folder": str(folder.resolve()), "sha256": weights_digest(folder)}
    about = provenance | {"base": name | {"source": provenance.get("source")}, "ends": ends}
    about |= {
        "added_tokens": added,
        "method": asdict(config.method),
        "objective": asdict(config.objective),
        "data": source.data,
    }
    if template is not None:
        parts = {
            "source": template.source,
            "bos": template.bos,
            "eos": template.eos,
            "specials": dict(template.specials),
        }
        about |= {"chat_template": parts}
    remarks = [] if template is None else template_remarks(template, tokenizer, ends)
    return Base(folder, run, tokenizer, about, encoder, ends, remarks)


def with_mended(base: Base, rows: list[Row]) -> Base:
    """The base with a word on the tokens of rows that it never learned: their rows will be the mean of the trained ones."""
    ids = untrained_in(rows, base.folder / "model.safetensors", base.run.model.vocab_size)
    if not ids:
        return base
    names = ", ".join(base.tokenizer.show(i) for i in ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
    text = f"{len(ids)} tokens of the rows were never trained ({names}): each is set to the mean of those that were"
    remark = Remark("warn", "L1", f"{text}; --embeddings lets them learn and keeps them in the adapter")
    return replace(base, provenance=base.provenance | {"mended": ids}, remarks=[*base.remarks, remark])


def with_length(config: TuneConfig, base: Base) -> TuneConfig:
    """The settings with the length of a row that the base allows."""
    asked, most = config.rows.max_len, base.run.model.max_seq_len
    fits = f"--max-len is {asked} but {config.source.model} reads {most} tokens at most; lower it"
    require(asked <= most, fits)
    return replace(config, rows=replace(config.rows, max_len=asked or min(most, USUAL_LENGTH)))


def find_template(file: str, provenance: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> ChatTemplate | None:
    """The chat template: of a file of two turns or of Jinja, else the model's own, else none."""
    if not file:
        return template_of(provenance, folder)
    path = Path(file)
    require(path.is_file(), f"--template {file}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--template {file}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    own = provenance.get("chat_template") or {}
    bos, eos = str(own.get("bos", "")), str(own.get("eos", ""))
    if path.suffix in (".jinja", ".jinja2", ".j2") or "{%" in text:
        return ChatTemplate(text, bos, eos, own.get("specials", {}), name=file)
    return turns_from_example(text, tokenizer.specials, bos_of(tokenizer), file).template()


def template_remarks(template: ChatTemplate, tokenizer: Tokenizer, ends: list[int]) -> list[Remark]:
    """What the doctor finds in a template. None of it forbids to start: what is learned is shown, and judged by itself."""
    stops = [name for name, i in tokenizer.specials.items() if i in ends]
    tokens = Tokens(frozenset(tokenizer.specials), bos_of(tokenizer), False)
    outcomes = examine(TEMPLATE_CHECKS, TemplateSubject(template.name, template, tokens, stops))
    found = [finding for outcome in outcomes for finding in outcome.findings if finding.severity != "info"]
    return [Remark("warn", f.code, f"{f.where}: expected {f.expected}, got {f.got}: {f.why}; {f.fix}") for f in found]


def bos_of(tokenizer: Tokenizer) -> str:
    """The name of the token that begins a text; "" where there is none."""
    return next((name for name, i in tokenizer.specials.items() if i == tokenizer.bos_id), "")


def check_memory(base: Base, config: TuneConfig, dtype: torch.dtype, runtime: Runtime) -> None:
    """Refuse, with the numbers, a tuning whose weights alone cannot fit, before any is read: of a weight that learns there are
    four, its gradient and AdamW's two beside it."""
    free, n = free_memory(runtime.device), total_parameters(base.run.model)
    full = config.method.method == "full"
    need = n * (16 if full else dtype.itemsize)
    remedy = "take --method lora" if full else "take a smaller model, or --train.precision bf16"
    lack = f"out of memory: {n:,} weights take {need / 1e9:.1f} GB and {(free or 0) / 1e9:.1f} GB are free; {remedy}"
    require(free is None or need <= free, lack)


def load_weights(base: Base, config: TuneConfig, runtime: Runtime, n_layer: int = 0) -> Loaded:
    """The base's weights in the number format in which the tuning keeps them; n_layer: of its first blocks only."""
    stays = config.method.method == "lora" and config.method.quantize == "none"
    dtype = runtime.compute_dtype if stays else torch.float32
    check_memory(base, config, dtype, runtime)
    at_hand = None if base.provenance["added_tokens"] else base.tokenizer
    loaded = load_base(base.folder, dtype, config.method.embeddings, n_layer, at_hand)
    loaded = with_rows(loaded, base.provenance)
    return replace(loaded, tokenizer=base.tokenizer, provenance=base.provenance)


# ---- the method ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A method in place: the optimizers of what learns, how an adapter is saved (None: all weights are), and words on it."""

    optimizers: list[torch.optim.Optimizer]
    save: SaveAdapter | None
    words: list[str]


def install(config: TuneConfig, loaded: Loaded, base: Base, runtime: Runtime) -> Method:
    """Let a model learn by the method: quantised, wrapped, frozen and with kernels in place, in that order."""
    model, method, words = loaded.model.to(runtime.device), config.method, []
    if method.quantize == "nf4":
        words.append(f"{len(nf4.use(model))} matrices in 4 bits")
    choose_weights(model, method, config.seed)
    if config.train.freeze:
        words.append(f"{len(freeze(model, config.train.freeze))} modules frozen")
    if method.method == "lora":
        freeze_base(model, runtime.compute_dtype)
    check_rates(model, method, config.train)
    if config.train.kernels == "auto":
        words += put_kernels(model, method, runtime)
    if method.checkpointing != "off":
        checkpointing.use(model, method.checkpointing == "offload")
        words.append(f"activations {'offloaded' if method.checkpointing == 'offload' else 'computed again'}")
    optimizers = make_optimizers(model, config.train, runtime.compute_dtype)
    if method.eight_bit:
        optimizers = [in_eight_bits(optimizer, config) for optimizer in optimizers]
        words.append("AdamW's state in 8 bits")
    if method.method != "lora":
        return Method(optimizers, None, words)
    about = base.provenance["base"]
    named, names = AdapterBase(about["name"], about["sha256"]), base.provenance.get("family")
    shape = loaded.run.model
    return Method(optimizers, lambda folder, tuned: write_adapter(folder, tuned, shape, method, named, names), words)


def put_kernels(model: GPT, method: MethodConfig, runtime: Runtime) -> list[str]:
    """Faster forms of the parts, where there are such -> words on what was taken, and why the rest was not."""
    if runtime.device.type != "cpu":
        choices = use_kernels(model, runtime.device, runtime.compute_dtype)
        taken = [f"kernels {', '.join(choice.name for choice in choices if choice.taken)}"]
        return taken + [f"no {choice.name} ({choice.why})" for choice in choices if not choice.taken]
    if method.method != "lora":
        return []
    names, why = tuned.use(model), next(filter(None, map(tuned.in_the_way, model.blocks)), "")
    return [f"{len(names)} fused blocks" if names else f"plain blocks ({why})"]


def in_eight_bits(optimizer: torch.optim.Optimizer, config: TuneConfig) -> torch.optim.Optimizer:
    """The same groups and rates under an AdamW whose state has 8 bits."""
    train = config.train
    made = AdamW8bit(optimizer.param_groups, train.lr, (train.beta1, train.beta2))
    for group in made.param_groups:
        group["peak_lr"] = group["lr"]
    return made
