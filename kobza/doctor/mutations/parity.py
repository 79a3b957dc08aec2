"""The proof of `doctor parity`: pairs of models of which one has a bug, and clean pairs of two independent codes.

`Plain` computes what a ModelConfig says in other words than model.py: fused weights, angles as complex numbers, scores and
softmax written out, norms by hand. So a clean pair has the noise that two right codes have, and a bug can be in either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import ModelConfig
from kobza.doctor.models.parity import ParitySubject
from kobza.doctor.models.subject import subject_of
from kobza.doctor.models.toggles import Toggle, base_of, halve, laid_out, rebuilt, rough
from kobza.doctor.mutations.proof import Control, Mutation
from kobza.layers import widen
from kobza.model import GPT, build

SIZES = dict(vocab_size=61, max_seq_len=512, n_layer=2, n_head=4, n_embd=32, init="gpt2")
SCALED = dict(rope_theta=500_000.0, rope_scaling="llama3", rope_factor=8.0, rope_original_len=8192)
GLU = dict(n_kv_head=2, n_ff=48, mlp="swiglu", qk_norm=False)
GEMMA = GLU | dict(mlp="geglu_tanh", norm_place="both", norm_offset=True, norm_cast="after", head_dim=16, norm_eps=1e-6)
GEMMA |= dict(embed_scale=32**0.5, tied=True, attn_softcap=50.0, softcap=30.0, attn_scale=144**-0.5)
FAMILIES = {
    "gpt2": dict(position="learned", norm="layernorm", qk_norm=False, mlp="gelu_tanh", bias=True, tied=True),
    "llama": GLU | SCALED,
    "gemma": GEMMA | dict(window=9, window_pattern="LG"),
    "qwen": GLU | dict(qk_norm=True, qk_norm_weight=True, rope_theta=1e6, norm_eps=1e-6),
    "phi": GLU | dict(n_kv_head=4, window=11),
}


def clean(family: str, seed: int) -> GPT:
    """A tiny model with random weights, biases and norms among them: at their usual start they would hide a bug."""
    model = build(ModelConfig(**SIZES, **FAMILIES[family])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.split(".")[-2].endswith("norm") and name.endswith("weight") and not model.config.norm_offset
            parameter.copy_(gain + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


class Plain(nn.Module):
    """The same network in other words. `flaw` names a bug of the code that no config could have."""

    def __init__(self, model: GPT, flaw: str = ""):
        super().__init__()
        config = self.config = model.config
        self.embed_tokens, self.h = model.embed.weight, nn.ModuleList()
        self.wpe = model.position.weight if config.position == "learned" else None
        for index, block in enumerate(model.blocks):
            self.h.append(PlainBlock(config, block, index, flaw))
        self.ln_f = PlainNorm(config, model.norm, config.norm)
        self.lm_head = nn.Linear(config.n_embd, config.n_rows, bias=False)
        self.lm_head.weight = model.lm_head.weight
        rotary = config.position == "rope"
        angles = torch.atan2(model.rope.sin[1], model.rope.cos[1]) if rotary else torch.zeros(0)
        if flaw == "frequencies":
            angles = angles.bfloat16().float()
        self.register_buffer("inv_freq", angles, persistent=False)
        self.flaw, self.max_seq_len, self.vocab_size = flaw, config.max_seq_len, config.vocab_size

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = F.embedding(input_ids, self.embed_tokens)
        x = (
            x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
            if self.flaw != "float scale"
            else x * self.config.embed_scale
        )
        places = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids[0]
        x = x if self.wpe is None else x + F.embedding(places, self.wpe)
        places = places.bfloat16() if self.flaw == "positions" else places
        turn = torch.polar(torch.ones(()), torch.outer(places.float(), self.inv_freq)) if len(self.inv_freq) else None
        for block in self.h:
            x = block(x, turn)
        logits, cap = self.lm_head(self.ln_f(x)), self.config.softcap
        return (logits / cap).tanh() * cap if cap else logits


class PlainNorm(nn.Module):
    """A norm by hand."""

    def __init__(self, config: ModelConfig, norm: nn.Module, kind: str):
        super().__init__()
        self.weight = getattr(norm, "weight", None)
        self.bias = getattr(norm, "bias", None)
        self.is_there, self.kind, self.config = not isinstance(norm, nn.Identity), kind, config

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_there:
            return x
        wide = widen(x)
        wide = wide - wide.mean(-1, keepdim=True) if self.kind == "layernorm" else wide
        wide = wide / (wide.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        if self.weight is None:
            return wide.to(x.dtype)
        offset = float(self.config.norm_offset)
        if self.kind == "layernorm":
            return (wide * widen(self.weight) + (0 if self.bias is None else widen(self.bias))).to(x.dtype)
        if self.config.norm_cast == "after":
            return (wide * (widen(self.weight) + offset)).to(x.dtype)
        return wide.to(x.dtype) * (self.weight + offset)


class PlainAttention(nn.Module):
    """Scores, mask and softmax written out; q, k, v from one matrix."""

    def __init__(self, config: ModelConfig, ours: nn.Module, index: int, flaw: str):
        super().__init__()
        parts = (ours.q_proj, ours.k_proj, ours.v_proj)
        self.qkv = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        self.qkv_bias = (
            nn.Parameter(torch.cat([part.bias.detach() for part in parts])) if ours.q_proj.bias is not None else None
        )
        self.out, self.out_bias = ours.o_proj.weight, ours.o_proj.bias
        self.q_norm, self.k_norm = (PlainNorm(config, norm, "rmsnorm") for norm in (ours.q_norm, ours.k_norm))
        self.config, self.flaw = config, flaw
        self.window = config.window if config.is_windowed(index) else 0

    def forward(self, x: Tensor, turn: Tensor | None) -> Tensor:
        (_, T, _), c = x.shape, self.config
        q, k, v = F.linear(x, self.qkv, self.qkv_bias).split(
            [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)], -1
        )
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in (q, k, v))  # (B, T, H or K, D)
        q, k = turned(self.q_norm(q), turn), turned(self.k_norm(k), turn)
        k = k.detach() if self.flaw == "keys detached" else k
        k, v = (part.repeat_interleave(c.n_head // c.n_kv_head, 2) for part in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * (c.attn_scale or c.head_dim**-0.5)
        scores = (widen(scores) / c.attn_softcap).tanh() * c.attn_softcap if c.attn_softcap else widen(scores)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        hidden = (distance < 0) | (distance >= (self.window or T))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        out = self.out.detach() if self.flaw == "weight detached" else self.out
        return F.linear(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2), out, self.out_bias)


def turned(x: Tensor, turn: Tensor | None) -> Tensor:
    """Rotary angles as a product of complex numbers. x (B, T, H, D); turn (T, D/2)."""
    if turn is None:
        return x
    left, right = widen(x).chunk(2, -1)
    product = torch.complex(left, right) * turn[:, None]
    return torch.cat((product.real, product.imag), -1).to(x.dtype)


class PlainMLP(nn.Module):
    """Gate and up in one matrix."""

    def __init__(self, config: ModelConfig, ours: nn.Module):
        super().__init__()
        parts = [ours.gate_proj, ours.up_proj] if config.mlp in GATED else [ours.up_proj]
        self.up, self.down, self.config = (
            nn.Parameter(torch.cat([p.weight.detach() for p in parts])),
            ours.down_proj.weight,
            config,
        )
        self.up_bias, self.down_bias = ours.up_proj.bias, ours.down_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.up, self.up_bias)
        if self.config.mlp in GATED:
            gate, y = y.chunk(2, -1)
            return F.linear(GATED[self.config.mlp](gate) * y, self.down)
        return F.linear(F.gelu(y, approximate="tanh"), self.down, self.down_bias)


GATED = {"swiglu": F.silu, "geglu_tanh": partial(F.gelu, approximate="tanh"), "geglu": F.gelu}


class PlainBlock(nn.Module):
    """x + n(attention(n(x))), then the same with the feed-forward."""

    def __init__(self, config: ModelConfig, ours: nn.Module, index: int, flaw: str):
        super().__init__()
        self.ln_1, self.ln_2 = (PlainNorm(config, norm, config.norm) for norm in (ours.attn_norm, ours.mlp_norm))
        self.post_1, self.post_2 = (
            PlainNorm(config, norm, config.norm) for norm in (ours.attn_out_norm, ours.mlp_out_norm)
        )
        self.self_attn, self.mlp = PlainAttention(config, ours.attn, index, flaw), PlainMLP(config, ours.mlp)

    def forward(self, x: Tensor, turn: Tensor | None) -> Tensor:
        x = x + self.post_1(self.self_attn(self.ln_1(x), turn))
        return x + self.post_2(self.mlp(self.ln_2(x)))


# ---- bugs ----------------------------------------------------------------------------------------------------------

Edit = Callable[[GPT], nn.Module]


def twin(model: GPT, tensors: Any = None, tables: Any = None, **changes: Any) -> GPT:
    """The same weights under another config, or with rows or tables changed."""
    made = rebuilt(base_of(model, "fp32"), (Toggle("", "", "", frozenset(), tuple(changes.items()), tensors, tables),))
    assert made is not None, changes
    return made


def edited(model: GPT, **factors: float) -> GPT:
    """The weights of the modules of these names times a factor."""
    model = copy.deepcopy(model)  # a twin shares its weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.split(".")[-2]
            if leaf in factors and not (leaf == "lm_head" and model.config.tied):
                parameter.copy_(parameter * factors[leaf])
    return model


def one_weight(model: GPT) -> GPT:
    """One weight of all is another."""
    model = edited(model)
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.weight[0, 0] += 0.5
    return model


def counted_wrong(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of Wk put back into halves with the number of query heads."""
    sides = laid_out(config, tensors, {"k_proj": "pair"})
    return {n: halve(v, config.n_head) if "k_proj" in n else v for n, v in laid_out(config, sides, {}).items()} | {
        n: v for n, v in tensors.items() if "k_proj" not in n
    }


def off_by(**changes: Any) -> Edit:
    """A twin with another config."""
    return lambda model: twin(model, **changes)


def rows(**ways: str) -> Edit:
    """A twin with rows in another order."""
    return lambda model: twin(model, tensors=lambda c, t: laid_out(c, t, ways))


def both(*edits: Edit) -> Edit:
    """One bug after the other."""

    def make(model: GPT) -> nn.Module:
        for edit in edits:
            model = edit(model)
        return model

    return make


def tables(what: str) -> Edit:
    """A twin whose rotary tables went through bf16."""
    return lambda model: twin(model, tables=lambda m: rough(m, what))


def flawed(what: str) -> Edit:
    """The other code, with a bug of its own."""
    return lambda model: Plain(model, what).eval()


class Case(NamedTuple):
    """A bug to inject: the code that must name it, and the dtypes in which it shows."""

    code: str
    name: str
    family: str
    edit: Edit
    dtypes: tuple[str, ...] = ("fp32",)


IN_BF16 = ("fp32", "bf16")  # where norms cast makes no difference in float32
NO_SCALING = dict(rope_scaling="none", rope_factor=1.0, rope_original_len=0)
NO_WINDOW = dict(window=0, window_pattern="L")
SINGLES = (
    Case("G2", "embedding not scaled", "gemma", off_by(embed_scale=1.0)),
    Case("G2", "embedding scaled by the rounded root in float32", "gemma", off_by(embed_scale=5.65625)),
    Case("G2", "an odd embedding scale", "llama", off_by(embed_scale=1.37)),
    Case("G3", "norm offset forgotten", "gemma", off_by(norm_offset=False)),
    Case("G3", "norm cast before its weight", "gemma", off_by(norm_cast="before"), IN_BF16),
    Case("G3", "norm cast after its weight", "llama", off_by(norm_cast="after"), IN_BF16),
    Case("G4", "eps 1e-6 for 1e-5", "llama", off_by(norm_eps=1e-6)),
    Case("G4", "eps 1e-5 for 1e-6", "qwen", off_by(norm_eps=1e-5)),
    Case("G4", "eps of LayerNorm", "gpt2", off_by(norm_eps=1e-6)),
    Case("G5", "positions in bf16", "llama", tables("positions")),
    Case("G5", "positions in bf16, in foreign code", "qwen", flawed("positions")),
    Case("G6", "frequencies in bf16", "phi", tables("frequencies")),
    Case("G6", "frequencies in bf16, in foreign code", "llama", flawed("frequencies")),
    Case("G7", "exact gelu for tanh", "gemma", off_by(mlp="geglu")),
    Case("G7", "exact gelu for tanh, not gated", "gpt2", off_by(mlp="gelu")),
    Case("G7", "gelu for silu", "llama", off_by(mlp="geglu_tanh")),
    Case("G8", "untied head replaced by the embedding", "llama", off_by(tied=True)),
    Case("G11", "window on the other layers", "gemma", off_by(window_pattern="GL")),
    Case("G12", "attention softcap dropped", "gemma", off_by(attn_softcap=0.0)),
    Case("G12", "final softcap dropped", "gemma", off_by(softcap=0.0)),
    Case("G13", "query scale by head_dim", "gemma", off_by(attn_scale=0.0)),
    Case("G13", "query scale by head_dim for 1/sqrt", "llama", off_by(attn_scale=1 / 8)),
    Case("L4", "rope scaling dropped", "llama", off_by(**NO_SCALING)),
    Case("L5", "theta 10000", "llama", off_by(rope_theta=1e4)),
    Case("L5", "theta of no list", "qwen", off_by(rope_theta=7654.0)),
    Case("L6", "rows left as pairs", "llama", rows(q_proj="pair", k_proj="pair")),
    Case("L6", "Wk permuted with n_head", "llama", lambda model: twin(model, tensors=counted_wrong)),
    Case("P1", "window one less", "phi", off_by(window=10)),
    Case("P1", "window one more", "gemma", off_by(window=10)),
    Case("P2", "window dropped", "phi", off_by(**NO_WINDOW)),
    Case("P2", "window of one kind of layer everywhere", "gemma", off_by(window_pattern="L")),
    Case("D2", "queries and keys normed", "llama", off_by(qk_norm=True)),
    Case("D2", "norms after the sum", "llama", lambda model: placed(model)),
    Case("D1", "one weight changed", "gpt2", one_weight),
    Case(
        "D1",
        "two scales that cancel at the logits",
        "llama",
        lambda model: edited(model, embed=2.0, o_proj=2.0, down_proj=2.0),
    ),
    Case("D1", "a norm and the head that cancel", "qwen", lambda model: edited(model, norm=2.0, lm_head=0.5)),
    Case("D3", "keys detached", "llama", flawed("keys detached")),
)
PAIRS = (
    Case("L5", "theta and query scale", "llama", off_by(rope_theta=1e4, attn_scale=1 / 8)),
    Case("G12", "both softcaps", "gemma", off_by(attn_softcap=0.0, softcap=0.0)),
    Case("G2", "embedding scale and norm offset", "gemma", off_by(embed_scale=1.0, norm_offset=False)),
    Case("G4", "eps and activation", "llama", off_by(norm_eps=1e-6, mlp="geglu")),
    Case("P1", "window and theta", "phi", off_by(window=10, rope_theta=5e5)),
    Case("L6", "row order and eps", "qwen", both(rows(q_proj="pair", k_proj="pair"), off_by(norm_eps=1e-5))),
    Case("L4", "scaling dropped, and an embedding scale", "llama", off_by(**NO_SCALING, embed_scale=32**0.5)),
    Case("G13", "query scale and the cast of norms", "gemma", off_by(attn_scale=0.0, norm_cast="before"), IN_BF16),
    Case("G8", "tied head and activation", "phi", off_by(tied=True, mlp="geglu_tanh")),
)


def placed(model: GPT) -> GPT:
    """Norms after the sums, as in 2017; the last one goes."""
    from kobza.doctor.models.toggles import moved

    return twin(model, tensors=moved("output"), norm_place="output")


def subject(a: nn.Module, b: nn.Module, seed: int, dtypes: tuple[str, ...]) -> ParitySubject:
    """What the checks take. The reference's config is not read: the search finds the cause by itself."""
    return ParitySubject(subject_of(a, "A"), subject_of(b, "B"), dtypes, seed=seed, hints=False)


def make_mutation(case: Case, _folder: Path, seed: int, _dtype: str) -> ParitySubject:
    """The bug in A; B is the other code, or ours where the bug is in that."""
    model = clean(case.family, seed)
    a = case.edit(model)
    return subject(a, model if isinstance(a, Plain) else Plain(model).eval(), seed, case.dtypes)


def make_control(family: str, ours_first: bool, _folder: Path, seed: int, dtype: str) -> ParitySubject:
    """The two codes with equal weights."""
    ours = clean(family, seed)
    theirs = Plain(ours).eval()
    return subject(*((ours, theirs) if ours_first else (theirs, ours)), seed, (dtype,))


CONTROLS = tuple(Control(f"{family}, ours and other code", partial(make_control, family, True)) for family in FAMILIES)
CONTROLS += tuple(
    Control(f"{family}, other code and ours", partial(make_control, family, False)) for family in FAMILIES
)
MUTATIONS = tuple(
    Mutation(case.code, f"{case.family}: {case.name}", partial(make_mutation, case)) for case in SINGLES + PAIRS
)
