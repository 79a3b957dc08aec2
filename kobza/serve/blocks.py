"""The model's parts on rows: x (N, C), a token a row, whichever sequence it is of.

`Product` is one or more Linear layers of the same input as one matrix product, in the number format asked for; what lies
between products is float32. Every operation gives a row the same bits whatever other rows there are: oneDNN's product by its
nature, activations because rows fill whole vectors (torch's scalar exp differs from its vector one). `Flat` is a finished GPT
made of such parts; the plain twin of each is in model.py and layers.py.

Shapes: N tokens of a step, C n_embd, H, K heads, D head_dim, F width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.layers import Embedding, GatedMLP, RMSNorm
from kobza.model import GPT, Attention
from kobza.serve.attention import Group, Places, Store, attend
from kobza.serve.lora import Adapter, Part, Shift

FEW_ROWS = 4  # oneDNN adds a long sum of a single row in another order (seen at 1,536), and takes no less time for it than for 4
VECTOR = 64  # numbers; the two vectors that torch takes at a time in bf16, and a multiple of its int8 kernel's 32
STEPS = 127  # of an 8-bit code to either side of zero

Rows = Callable[[Tensor], Tensor]  # (N, in) -> (N, out)


@dataclass
class Step:
    """What a forward tells every layer about its tokens."""

    places: Places
    groups: Mapping[tuple[int, bool], list[Group]]  # by key/value heads and whether there is a window
    turns: list[Tensor | None]  # cos + i sin (N, 1, turned / 2) of global and of windowed attentions
    adapters: Mapping[str, Tensor]  # rows of each adapter in use
    ends: Mapping[str, Tensor]  # the same, of the rows that the head reads


# ---- products ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """A weight (out, in), float or 8-bit codes with a scale a row, and its bias."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def rows(self, order: Tensor) -> Matrix:
        """The rows in another order; -1: a row of zeros."""
        kept = order >= 0
        parts = (self.weight, self.scale, self.bias)
        return Matrix(
            *(None if p is None else p[order.clamp(min=0)] * kept.view(-1, *[1] * (p.ndim - 1)) for p in parts)
        )

    def widened(self, width: int) -> Matrix:
        """With columns of zeros up to a width."""
        return Matrix(F.pad(self.weight, (0, width - self.weight.shape[1])), self.scale, self.bias)


def matrix_of(layer: nn.Module, in_codes: bool) -> Matrix:
    """A Linear's weight; in codes those it has, or the nearest of its numbers."""
    bias = None if layer.bias is None else layer.bias.detach().float()
    if not in_codes:
        return Matrix(layer.weight.detach(), None, bias)
    packed = getattr(layer, "packed", None)
    codes, scale = packed if packed is not None else codes_of(layer.weight.detach())
    return Matrix(codes, scale.bfloat16(), bias)


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in) as int8 codes and a bf16 scale a row: its largest number takes code 127."""
    scale = (weight.float().abs().amax(1) / STEPS * (1 + 2**-8)).bfloat16()  # rounded up: no code is beyond 127
    steps = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / steps[:, None]).round_().clamp_(-STEPS, STEPS).to(torch.int8), scale


def stacked(matrices: list[Matrix]) -> Matrix:
    """Matrices of the same input below each other."""
    columns = zip(*((m.weight, m.scale, m.bias) for m in matrices), strict=True)
    return Matrix(*(None if parts[0] is None else torch.cat(parts) for parts in columns))


def packed_product(matrix: Matrix, dtype: torch.dtype) -> Rows:
    """oneDNN's product over a weight packed once."""
    weight = torch.ops.mkldnn._reorder_linear_weight(matrix.weight.to(dtype).contiguous())
    bias = None if matrix.bias is None else matrix.bias.to(dtype)
    product, narrow = torch.ops.mkldnn._linear_pointwise, dtype != torch.float32
    return lambda x: product(x.to(dtype) if narrow else x, weight, bias, "none", [], "")


def codes_product(matrix: Matrix) -> Rows:
    """torch's product of bf16 rows and 8-bit codes, which does the rows one by one."""
    codes, scale, bias = matrix.weight.contiguous(), matrix.scale, matrix.bias
    width = -(-codes.shape[1] // VECTOR) * VECTOR  # at others the kernel reads past the end and crashes (torch 2.13)
    more = width - codes.shape[1]
    codes = F.pad(codes, (0, more)) if more else codes

    def multiply(x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        y = torch._weight_int8pack_mm(F.pad(x, (0, more)) if more else x.contiguous(), codes, scale)
        return y if bias is None else y + bias

    return multiply


def plain_product(matrix: Matrix, dtype: torch.dtype) -> Rows:
    """torch's linear layer, for any device."""
    weight, bias = matrix.weight.to(dtype), None if matrix.bias is None else matrix.bias.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


class Make:
    """Makes products in one number format on one device, with what adapters add to them."""

    def __init__(self, precision: str, fast: bool, device: torch.device, adapters: Mapping[str, Adapter]):
        self.precision, self.fast, self.device, self.adapters = precision, fast, device, adapters
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.in_codes = precision == "int8"

    def rows(self, matrix: Matrix) -> Rows:
        """The product with a matrix."""
        if self.in_codes:
            return codes_product(matrix)
        return packed_product(matrix, self.dtype) if self.fast else plain_product(matrix, self.dtype)

    def matrix(self, layer: nn.Module) -> Matrix:
        """The weight of a layer."""
        return matrix_of(layer, self.in_codes)

    def single(self, name: str, matrix: Matrix) -> Product:
        """One layer as a product."""
        part = Part(name, torch.arange(len(matrix.weight)))
        return Product(self.rows(matrix), Shift(self.adapters, [part], matrix.weight.shape[1], self.device))

    def together(self, layers: dict[str, nn.Module], orders: list[Tensor]) -> Product:
        """Layers by name, of the same input, as one product; their rows in the orders given."""
        matrices = [
            matrix.rows(order.to(self.device))
            for matrix, order in zip(map(self.matrix, layers.values()), orders, strict=True)
        ]
        parts = [Part(name, order) for name, order in zip(layers, orders, strict=True)]
        width = matrices[0].weight.shape[1]
        return Product(self.rows(stacked(matrices)), Shift(self.adapters, parts, width, self.device))


class Product:
    """(N, in) -> (N, sum of outs). No Module: a Module's call costs as much as a tenth of the product."""

    def __init__(self, multiply: Rows, shift: Shift):
        self.multiply, self.shift = multiply, shift

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        y = self.multiply(x)
        if step.adapters:
            self.shift.add(x, y, step.adapters)
        return y


# ---- norms ---------------------------------------------------------------------------------------------------------


def norm_of(module: nn.Module | None) -> Rows | None:
    """A norm on float32 rows; None where there is none."""
    if isinstance(module, RMSNorm):
        return rms_of(module)
    return None if module is None or isinstance(module, nn.Identity) else module


def rms_of(module: RMSNorm) -> Rows:
    """RMSNorm in four operations, where torch's takes seven on a CPU."""
    weight = None if module.weight is None else module.weight.detach().float() + module.offset
    device = torch.device("cpu") if weight is None else weight.device
    eps = torch.tensor(module.eps, device=device)

    def norm(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        y = x * torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return y if weight is None else y.mul_(weight)

    return norm


# ---- sub-layers ----------------------------------------------------------------------------------------------------


def pairwise(head_dim: int, turned: int) -> Tensor:
    """Channels of a head such that those which rope turns as a pair stand side by side. (4, 4) -> [0, 2, 1, 3]"""
    half = turned // 2
    return torch.cat((torch.arange(turned).view(2, half).T.flatten(), torch.arange(turned, head_dim)))


class FlatAttention:
    """Attention of the step's tokens over the cache. (N, C) -> (N, C)."""

    def __init__(self, plain: Attention, name: str, make: Make, store: Store, turned: int):
        D, self.store, self.scale = plain.head_dim, store, plain.scale
        self.K, self.H = plain.k_proj.out_features // D, plain.q_proj.out_features // D
        self.D, self.view, self.turned, self.dtype = D, plain.view, turned, make.dtype
        self.cap = getattr(plain.attend, "keywords", {}).get("cap", 0.0)
        channels = pairwise(D, turned) if turned else torch.arange(D)
        order = {n: (torch.arange(n)[:, None] * D + channels).flatten() for n in (self.H, self.K)}
        layers = {f"{name}.{leaf}": getattr(plain, leaf) for leaf in ("q_proj", "k_proj", "v_proj")}
        self.qkv_proj = make.together(layers, [order[self.H], order[self.K], torch.arange(self.K * D)])
        self.o_proj = make.single(f"{name}.o_proj", make.matrix(plain.o_proj))
        self.q_norm, self.k_norm = (norm_of(reordered(norm, channels)) for norm in (plain.q_norm, plain.k_norm))

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        heads = self.qkv_proj(x, step).float().view(len(x), -1, self.D)  # (N, H + 2K, D): q, k, v
        q, k, v = heads.split_with_sizes((self.H, self.K, self.K), dim=1)
        if self.q_norm is not None:
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        turn = step.turns[self.view]
        if turn is not None:
            pairs = heads[:, : self.H + self.K, : self.turned].unflatten(-1, (-1, 2))
            rotate_pairs(pairs, turn)
        n = len(step.places.block)  # the rest are rows of padding
        self.store.write(k[:n], v[:n], step.places)
        y = x.new_zeros(len(x), self.H * self.D, dtype=self.dtype)
        for group in step.groups[self.K, bool(self.view)]:
            attend(heads, self.store, group, self.scale, self.cap, y)
        return self.o_proj(y, step)


def rotate_pairs(pairs: Tensor, turn: Tensor) -> None:
    """Turn pairs (N, heads, turned / 2, 2) by their angles in place: one complex product where rotate in layers.py has seven."""
    if pairs.stride(1) % 2 == 0:
        torch.view_as_complex(pairs).mul_(turn)
    else:  # heads of an odd width are no complex numbers as they lie
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn))


def reordered(norm: nn.Module, channels: Tensor) -> nn.Module:
    """A head norm for channels in another order."""
    if getattr(norm, "weight", None) is None:
        return norm
    other = RMSNorm(len(channels), norm.eps, True, norm.offset)
    other.weight = nn.Parameter(norm.weight.detach()[channels.to(norm.weight.device)], requires_grad=False)
    return other


class FlatMLP:
    """A feed-forward, gated or not, its width filled up to whole vectors. (N, C) -> (N, C)."""

    def __init__(self, plain: nn.Module, name: str, make: Make):
        self.act, self.gated = plain.act, isinstance(plain, GatedMLP)
        leaves = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        width = plain.up_proj.out_features
        full = -(-width // VECTOR) * VECTOR
        order = torch.cat((torch.arange(width), torch.full((full - width,), -1)))
        layers = {f"{name}.{leaf}": getattr(plain, leaf) for leaf in leaves}
        self.up_proj = make.together(layers, [order] * len(leaves))
        self.down_proj = make.single(f"{name}.down_proj", make.matrix(plain.down_proj).widened(full))

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        y = self.up_proj(x, step)
        if self.gated:
            gate, up = y.chunk(2, dim=-1)
            return self.down_proj(self.act(gate) * up, step)
        return self.down_proj(self.act(y), step)


class FlatBlock:
    """One sub-layer with its norms: x <- sum_norm(x + out_norm(f(norm(x))))."""

    def __init__(self, layer: FlatAttention | FlatMLP, norm: Rows | None, out_norm: Rows | None, sum_norm: Rows | None):
        self.layer, self.norm, self.out_norm, self.sum_norm = layer, norm, out_norm, sum_norm

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        y = self.layer(x if self.norm is None else self.norm(x), step)
        if self.out_norm is not None:
            y = self.out_norm(y.float())
        x = x.add_(y)
        return x if self.sum_norm is None else self.sum_norm(x)


# ---- the network ---------------------------------------------------------------------------------------------------


class Flat:
    """A finished GPT on rows: ids (N,), their places (N,) -> logits (wanted, V) float32. It keeps nothing of the model that it
    does not use, so the model itself may be let go."""

    def __init__(self, model: GPT, make: Make, stores: list[Store]):
        config, self.cap = model.config, model.config.softcap
        self.vocab_size, self.ropes = config.vocab_size, ropes_of(model)
        head = make.matrix(model.lm_head)
        self.head, self.table = make.single("lm_head", head), table_of(model, make, head)
        self.position = model.position
        self.embed_norm, self.norm = norm_of(model.embed_norm), norm_of(model.norm)
        turned = 0 if self.ropes[0] is None else 2 * self.ropes[0].shape[-1]
        self.least = FEW_ROWS if make.fast and not make.in_codes else 1
        self.blocks = []
        for i, block in enumerate(model.blocks):
            for name in block.names:
                plain, path = getattr(block, name), f"blocks.{i}.{name}"
                attention = isinstance(plain, Attention)
                layer = (
                    FlatAttention(plain, path, make, stores[plain.layer], turned)
                    if attention
                    else FlatMLP(plain, path, make)
                )
                norms = (norm_of(getattr(block, f"{name}_{place}")) for place in ("norm", "out_norm", "sum_norm"))
                self.blocks.append(FlatBlock(layer, *norms))

    def __call__(self, ids: Tensor, positions: Tensor, step: Step, wanted: Tensor) -> Tensor:
        ids, positions = filled(ids, self.least), filled(positions, self.least)
        x = self.table(ids).float()  # (N, C)
        if self.position is not None:
            x = x + self.position(positions).float()
        x = x if self.embed_norm is None else self.embed_norm(x)
        step.turns = [None if rope is None else rope[positions][:, None] for rope in self.ropes]
        for block in self.blocks:
            x = block(x, step)
        x = x.index_select(0, filled(wanted, self.least))
        x = x if self.norm is None else self.norm(x)
        logits = self.head(x, replace(step, adapters=step.ends))[: len(wanted), : self.vocab_size].float()
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def filled(rows: Tensor, least: int) -> Tensor:
    """Numbers (n,) with zeros behind them up to `least`."""
    return rows if len(rows) >= least else F.pad(rows, (0, least - len(rows)))


def ropes_of(model: GPT) -> list[Tensor | None]:
    """Of global and of windowed attentions: cos + i sin of every place, (max_seq_len, turned / 2)."""
    ropes = (model.rope, model.local_rope)
    return [torch.complex(rope.cos, rope.sin) if hasattr(rope, "cos") else None for rope in ropes]


def table_of(model: GPT, make: Make, head: Matrix) -> Rows:
    """The token table, in the number format of the products; tied, and in codes, it is the head's codes."""
    table = model.embed
    if head.scale is not None and model.config.tied:
        codes, scale, factor = head.weight, head.scale.float()[:, None], model.config.embed_scale
        return lambda ids: F.embedding(ids, codes).float() * F.embedding(ids, scale) * factor
    if not isinstance(table, Embedding):
        return lambda ids: table(ids, torch.float32)
    weight, factor = table.weight.detach().to(make.dtype), table.scale
    return lambda ids: F.embedding(ids, weight).float() * factor
