"""Sub-layers for tuning with LoRA on a CPU: one autograd node for x + attn(norm(x)), one for x + mlp(norm(x)).

Of a Llama-like block whose own weights stay and whose linear layers may carry LoRA matrices. What makes it faster than the plain
modules: no gradient of what stays; attention in whole products, over what the mask lets each document see, where torch's CPU
attention takes thrice as long in bf16 and computes what is hidden; the A matrices of one input in one product; sums within
products; few passes. What makes it smaller: the backward is derived by hand and keeps x, q, k, v, gate and up. A weight in few
bits is widened for its product and again for the backward, never kept wide. Names and parameters are the plain modules' own; a
block that has more than this file computes stays as it is, as does generating with a cache.

Shapes: M tokens of all lines, C n_embd, H n_head, K n_kv_head, G = H / K, D head_dim, F n_ff, t tokens of a document, s what it
sees, r rank.

Linear with LoRA, h = x A^T:  y = x W^T + c h B^T.   Backward of g, with u = c g B:
    dB = c g^T h      dA = u^T x      dx = g W + u A
Attention, z = norm(x):  q, k, v of z, q and k turned;  p = softmax(q k^T / sqrt(D));  y = p v;  out = x + o(y).   With dy of o:
    dv = p^T dy      ds = p (dy v^T - sum(p dy v^T)) / sqrt(D)      dq = ds k      dk = ds^T q, turned back
MLP, z = norm(x):  a = act(gate(z)) up(z);  out = x + down(a).   With da of down:
    dup = da act(gate)      dgate = da up act'(gate)
RMSNorm, n = x / rms(x), z = n w:   dn = dz w,  dx = (dn - n mean(dn n)) / rms(x);   and in both sub-layers dx += g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kobza.kernels.lora import is_lora
from kobza.layers import GatedMLP, RMSNorm, widen
from kobza.model import GPT, Attention, Block, Cache, View, attend
from kobza.surgery import replace_modules

aten = torch.ops.aten

ROUND = 16  # of the sizes of a stack
MOST_SCORES = 1 << 20  # t * s of a document: beyond, torch's attention, which never holds them all, is the better one


@runtime_checkable
class Projection(Protocol):
    """A linear layer, quantised or not; it has `weight` (out, in) and `bias` besides: to look for them here would make them."""

    in_features: int
    out_features: int


def use(model: GPT) -> list[str]:
    """Put a TunedBlock in place of each Block it computes -> the names replaced, [] if none."""
    names = {name for name, module in model.named_modules() if type(module) is Block and not in_the_way(module)}
    seen = Seen()
    return replace_modules(model, lambda name, _: name in names, lambda block: TunedBlock(block, seen)) if names else []


def in_the_way(block: Block) -> str:
    """What of a block this file does not compute, in words; "" where it computes all."""
    if block.names != ["attn", "mlp"] or type(block.attn) is not Attention or type(block.mlp) is not GatedMLP:
        return "its sub-layers are not attention and a gated MLP"
    attn, mlp, norms, layers = block.attn, block.mlp, [block.attn_norm, block.mlp_norm], linear_layers(block)
    others = [block.attn_out_norm, block.attn_sum_norm, block.mlp_out_norm, block.mlp_sum_norm, block.drop]
    if not all(type(norm) is RMSNorm and not norm.offset and not norm.cast_late for norm in norms):
        return "its norms are not those of Llama"
    if not all(isinstance(module, nn.Identity) for module in [*others, attn.q_norm, attn.k_norm]):
        return "it has norms after its sub-layers, in its heads, or dropout"
    if attn.attend is not attend or attn.dropout or attn.view:
        return "its attention is capped, windowed or drops"
    if type(mlp.act) not in ACTIVATIONS:
        return f"its activation is {type(mlp.act).__name__}"
    adapted, bases = [layer for layer in layers if is_lora(layer)], [base_of(layer) for layer in layers]
    if not all(isinstance(base, Projection) for base in bases):
        return "its linear layers are of another kind"
    if any(layer.magnitude is not None for layer in adapted):
        return "LoRA's directions and lengths are learned apart (DoRA)"
    if any(getattr(layer.dropout, "p", 0.0) for layer in adapted):
        return "LoRA's inputs are dropped"
    if any(parameter.requires_grad for module in [*norms, *bases] for parameter in module.parameters()):
        return "its own weights learn"
    return "its parts are watched or widened" if is_hooked(list(block.modules())[1:]) else ""


def linear_layers(block: Block) -> list[nn.Module]:
    """q, k, v, o, gate, up, down."""
    attn, mlp = block.attn, block.mlp
    return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def is_hooked(modules: list[nn.Module]) -> bool:
    """Whether something waits for the forward pass of one of the modules, which here has none of its own."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


class TunedBlock(Block):
    """A Block whose training and evaluation run in two autograd nodes. With a cache, a mask not made of documents, or parts
    replaced or watched since, it is the plain Block."""

    def __init__(self, block: Block, seen: Seen):
        nn.Module.__init__(self)
        self.names, self.seen = block.names, seen
        for name, child in block.named_children():
            self.add_module(name, child)
        self.layers, self.inside = linear_layers(self), list(self.modules())[1:]
        q, k, v, o, gate, up, down = self.layers
        self.groups = Group(q, k, v), Group(o), Group(gate, up), Group(down)
        self.act = ACTIVATIONS[type(self.mlp.act)](self.mlp.act)

    def forward(self, x: Tensor, views: list[View], cache: Cache | None) -> Tensor:
        rope, mask = views[0]
        changed = linear_layers(self) != self.layers or is_hooked(self.inside)
        stacks = None if changed or cache is not None else self.seen.stacks(mask, x.shape)
        if stacks is None or x.device.type != "cpu":
            return super().forward(x, views, cache)
        shape, attn, (qkv, o, gate_up, down) = x.shape, self.attn, self.groups
        x = x.reshape(-1, shape[-1])  # (M, C)
        turn = None if rope is None else self.seen.turn(rope, len(x))
        attending = Attending(self.attn_norm, qkv, o, stacks, turn, attn.head_dim, attn.scale)
        x = TunedAttention.apply(x, attending, *qkv.learned(), *o.learned())
        feeding = Feeding(self.mlp_norm, gate_up, down, self.act)
        return TunedMLP.apply(x, feeding, *gate_up.learned(), *down.learned()).view(shape)


# ---- linear layers of one input ----------------------------------------------------------------------------------------


def base_of(layer: nn.Module) -> Any:
    """The linear layer itself, without LoRA."""
    return layer.base if is_lora(layer) else layer


class Group:
    """Linear layers that read the same x, some with LoRA matrices. No Module: it owns nothing."""

    def __init__(self, *layers: nn.Module):
        self.bases = [base_of(layer) for layer in layers]
        self.with_lora = [(i, layer) for i, layer in enumerate(layers) if is_lora(layer)]

    @property
    def adapted(self) -> list[tuple[int, Any]]:
        """The layers whose LoRA matrices count now, and their places."""
        return [(i, layer) for i, layer in self.with_lora if layer.on]

    def learned(self) -> list[Tensor]:
        """A and B of each layer that has them."""
        return [matrix for _, layer in self.adapted for matrix in (layer.lora_a, layer.lora_b)]

    def a(self, dtype: torch.dtype) -> Tensor:
        """All A, one below the other (sum of r, in)."""
        return torch.cat([layer.lora_a.detach() for _, layer in self.adapted]).to(dtype)

    def ranks(self) -> list[int]:
        """r of each."""
        return [layer.lora_a.shape[0] for _, layer in self.adapted]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """x (M, in) -> y of each layer, (M, out), and h, None without LoRA."""
        outs = [F.linear(x, base.weight.to(x.dtype), cast(base.bias, x.dtype)) for base in self.bases]
        if not self.adapted:
            return outs, None
        h = x @ self.a(x.dtype).t()  # (M, sum of r)
        for (i, layer), part in zip(self.adapted, h.split(self.ranks(), 1), strict=True):
            outs[i].addmm_(part, layer.lora_b.detach().to(x.dtype).t(), alpha=layer.scale)
        return outs, h

    def backward(
        self, gs: list[Tensor], x: Tensor, h: Tensor | None, wants_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients g of each y -> that of x (None if not wanted), and of what `learned` lists."""
        dx = None
        if wants_dx:
            dx = gs[0] @ self.bases[0].weight.to(gs[0].dtype)
            for g, base in zip(gs[1:], self.bases[1:], strict=True):
                dx.addmm_(g, base.weight.to(g.dtype))
        if h is None:
            return dx, []
        dtype = h.dtype
        parts = h.split(self.ranks(), 1)
        us = [(gs[i] @ layer.lora_b.detach().to(dtype)).mul_(layer.scale) for i, layer in self.adapted]
        u = torch.cat(us, 1)  # (M, sum of r)
        das = (u.t() @ x).split(self.ranks())
        if dx is not None:
            dx.addmm_(u, self.a(dtype))
        learned: list[Tensor] = []
        for (i, layer), part, da in zip(self.adapted, parts, das, strict=True):
            db = (gs[i].t() @ part).mul_(layer.scale)
            learned += [da.to(layer.lora_a.dtype), db.to(layer.lora_b.dtype)]
        return dx, learned


def cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bias in the compute dtype; None stays None."""
    return None if bias is None else bias.to(dtype)


# ---- norm, rope, activation ---------------------------------------------------------------------------------------------


def norm_forward(x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """x (M, C) -> z and 1 / rms(x) (M, 1) in float32, rounded where the plain norm rounds."""
    wide = widen(x)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return normed(x, r, norm), r


def normed(x: Tensor, r: Tensor, norm: RMSNorm) -> Tensor:
    """z again out of x and 1 / rms(x)."""
    n = (x * r).to(x.dtype)
    return n if norm.weight is None else n.mul_(norm.weight.detach().to(x.dtype))


def norm_backward(dz: Tensor, x: Tensor, r: Tensor, norm: RMSNorm, residual: Tensor) -> Tensor:
    """Gradient of x through z, with the residual path's added."""
    dn = widen(dz if norm.weight is None else dz * norm.weight.detach().to(dz.dtype))
    n = x * r  # (M, C) float32
    mean = torch.linalg.vecdot(dn, n).div_(x.shape[1]).unsqueeze(1)
    return dn.sub_(n.mul_(mean)).mul_(r).add_(residual).to(x.dtype)


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x (M, heads, D) with the pairs (x[i], x[i + D/2]) turned by angles whose full cos and sin are (M, 1, D), in float32."""
    cos, sin = turn
    n = cos.shape[-1]
    y = (x[..., :n] * cos).addcmul_(widen(x[..., :n]).roll(n // 2, -1), sin).to(x.dtype)
    return y if n == x.shape[-1] else torch.cat((y, x[..., n:]), -1)


def turned_back(g: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of x out of that of `turned`: a rotation's transpose is the rotation the other way."""
    return turned(g, (turn[0], -turn[1]))


# A gate's activation: gate -> act(gate), and (gradient of it, gate) -> gradient of gate.
Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]


def gelu(module: nn.GELU) -> Activation:
    """GELU in the form the module names."""
    form = module.approximate
    return (
        lambda gate: F.gelu(gate, approximate=form),
        lambda d, gate: aten.gelu_backward(d, gate, approximate=form),
    )


ACTIVATIONS: dict[type, Callable[[Any], Activation]] = {
    nn.SiLU: lambda _: (F.silu, aten.silu_backward),
    nn.GELU: gelu,
}

# ---- the documents of a mask --------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """Tokens first..end of all lines end to end, which see the shared..shared_end and, causally, themselves."""

    first: int
    end: int
    shared: int
    shared_end: int


class Seen:
    """What the blocks of one forward pass share: made of the mask and the angles when the first of them comes with them."""

    def __init__(self) -> None:
        self.mask_key: Any = None
        self.found: list[Stack] | None = None
        self.rope_key: Any = None
        self.full: tuple[Tensor, Tensor] | None = None

    def stacks(self, mask: Tensor | None, shape: torch.Size) -> list[Stack] | None:
        """The documents a mask is made of; None where it is made otherwise, or of too long ones."""
        B, T, _ = shape
        if self.mask_key is None or self.mask_key[0] is not mask or self.mask_key[1:] != (B, T):
            found = [Document(b * T, b * T + T, 0, 0) for b in range(B)] if mask is None else documents_of(mask, B, T)
            small = found is not None and all(n_scores(document) <= MOST_SCORES for document in found)
            self.mask_key, self.found = (mask, B, T), stacks_of(found) if small else None
        return self.found

    def turn(self, rope: tuple[Tensor, Tensor], n_tokens: int) -> tuple[Tensor, Tensor]:
        """cos, sin (T, D/2) or (B, 1, T, D/2) -> (M, 1, D) each, such that x cos + roll(x, D/2) sin turns the pairs."""
        if self.rope_key is None or self.rope_key[0] is not rope or self.rope_key[1] != n_tokens:
            cos, sin = (part.reshape(-1, part.shape[-1]) for part in rope)
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
            cos, sin = (part.repeat(n_tokens // len(part), 1).unsqueeze(1) for part in (cos, sin))
            self.rope_key, self.full = (rope, n_tokens), (cos, sin)
        assert self.full is not None
        return self.full


def n_scores(document: Document) -> int:
    """t * s."""
    t = document.end - document.first
    return t * (t + document.shared_end - document.shared)


def documents_of(mask: Tensor, B: int, T: int) -> list[Document] | None:
    """A mask (B | 1, 1, T, T), or (T, T), as documents, each with what it sees besides itself; None if it is not made so.

    A token begins a document where it sees not just what the one before it sees, and itself. That first token's row says what
    the document sees besides; the mask these would make is held against the one given.
    """
    if mask.shape[-2:] != (T, T) or mask.numel() not in (T * T, B * T * T):
        return None
    found: list[Document] = []
    lines = mask.reshape(-1, T, T)
    for b in range(B):
        seen = lines[b % len(lines)]
        grown = seen[:-1] | torch.eye(T, dtype=torch.bool)[1:]
        firsts = [0, *((seen[1:] != grown).any(1).nonzero().flatten() + 1).tolist(), T]
        made = torch.zeros_like(seen)
        for first, end in zip(firsts, firsts[1:], strict=False):
            others = seen[first].nonzero().flatten().tolist()
            if not others or others.pop() != first or (others and others[-1] - others[0] + 1 != len(others)):
                return None
            shared, shared_end = (others[0], others[-1] + 1) if others else (0, 0)
            made[first:end, shared:shared_end] = True
            made[first:end, first:end] = True
            found.append(Document(b * T + first, b * T + end, b * T + shared, b * T + shared_end))
        if not torch.equal(made.tril(), seen) or 2 * len(firsts) > T + 4:
            return None
    return found


class Stack(NamedTuple):
    """n documents of like length side by side, t tokens long that see s. Both are rounded up: oneDNN keeps the code it makes for
    every size it meets, and sizes that never come again would fill the memory."""

    rows: Tensor
    """(n, t): the token, any where there is none"""
    there: Tensor
    """(n t, 1): whether there is one, in bf16 (1 or 0)"""
    keys: Tensor
    """(n, s): the token, any where there is none"""
    unseen: Tensor
    """(n, 1, 1, t, s): 0 where a token sees another, -inf where not"""
    tokens: Tensor
    """(N,): all tokens of the documents"""
    places: Tensor
    """(N,): where each is in rows.flatten()"""


def stacks_of(documents: list[Document]) -> list[Stack]:
    """Documents stacked with those of like length: none is less than 3/4 of the longest beside it."""
    stacks: list[list[Document]] = []
    for document in sorted(documents, key=lambda d: (d.first - d.end, d.first)):
        t, longest = document.end - document.first, stacks[-1][0] if stacks else None
        full = longest is None or (len(stacks[-1]) + 1) * n_scores(longest) > MOST_SCORES
        if full or 4 * t < 3 * (longest.end - longest.first):
            stacks.append([])
        stacks[-1].append(document)
    return [stacked(documents) for documents in stacks]


def stacked(documents: list[Document]) -> Stack:
    """Documents -> where their tokens are."""
    first, end, shared, shared_end = torch.tensor(documents).unsqueeze(-1).unbind(1)  # (n, 1) each
    step, before = (torch.arange(-(-int(n.max()) // ROUND) * ROUND) for n in (end - first, shared_end - shared))
    there, known = step < end - first, before < shared_end - shared  # (n, t), (n, s - t)
    rows = torch.where(there, first + step, 0)
    keys = torch.cat((torch.where(known, shared + before, 0), rows), 1)
    own = (step <= step[:, None]).expand(len(documents), -1, -1)  # of what is no token too, else its softmax were nan
    sees = torch.cat((known[:, None].expand(-1, len(step), -1), own), 2)  # (n, t, s)
    unseen = torch.zeros(sees.shape).masked_fill_(~sees, float("-inf"))[:, None, None]
    places = there.flatten().nonzero().flatten()
    return Stack(rows, there.view(-1, 1).bfloat16(), keys, unseen, rows.flatten()[places], places)


# ---- the two sub-layers -------------------------------------------------------------------------------------------------


class Attending(NamedTuple):
    """All that x + attn(norm(x)) needs besides x."""

    norm: RMSNorm
    qkv: Group
    o: Group
    stacks: list[Stack]
    turn: tuple[Tensor, Tensor] | None
    head_dim: int
    scale: float


class TunedAttention(torch.autograd.Function):
    """x + attn(norm(x)). x (M, C) in the compute dtype; the rest are the LoRA matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Attending, *_learned: Tensor) -> Tensor:
        z, r = norm_forward(x, how.norm)
        outs, h = how.qkv.forward(z)
        q, k, v = (out.view(len(x), -1, how.head_dim) for out in outs)  # (M, H | K, D)
        if how.turn is not None:
            q, k = turned(q, how.turn), turned(k, how.turn)
        y, _ = mix(q, k, v, how)
        (out,), h_o = how.o.forward(y)
        ctx.how = how
        ctx.save_for_backward(x, r, h, q, k, v, h_o)
        return out.add_(x)  # last: each sum rounds, and the residual is the widest number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        how = ctx.how
        x, r, h, q, k, v, h_o = ctx.saved_tensors
        g = g.contiguous()
        y, ps = mix(q, k, v, how)  # again: a twenty-fifth of the time, a quarter of what would be kept
        dy, learned_o = how.o.backward([g], y, h_o, True)
        dq, dk, dv = mix_backward(dy, q, k, v, ps, how)
        if how.turn is not None:
            dq, dk = (turned_back(d.view(len(x), -1, how.head_dim), how.turn).flatten(1) for d in (dq, dk))
        gs = [dq, dk, dv]
        dz, learned = how.qkv.backward(gs, normed(x, r, how.norm), h, ctx.needs_input_grad[0])
        dx = None if dz is None else norm_backward(dz, x, r, how.norm, g)
        return dx, None, *learned, *learned_o


def mix(q: Tensor, k: Tensor, v: Tensor, how: Attending) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k^T scale) v, (M, H D), and the weights p (n, K, G, t, s) of each stack."""
    y, ps = torch.empty_like(q).flatten(1), []
    for stack in how.stacks:
        qs, ks, vs = of_queries(q, stack, k.shape[1]), of_keys(k, stack), of_keys(v, stack)
        scores = torch.bmm(widen(qs), widen(ks).mT)  # in bf16 these would err by a twentieth more in all
        shape = len(stack.rows), k.shape[1], -1, *stack.unseen.shape[-2:]
        p = torch.add(stack.unseen, scores.view(shape), alpha=how.scale).softmax(-1).to(q.dtype)
        put_back(torch.bmm(p.view(len(vs), -1, vs.shape[1]), vs), stack, y)
        ps.append(p)
    return y, ps


def mix_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, ps: list[Tensor], how: Attending
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v out of that of `mix`, (M, heads * D); what several documents see gathers those of all."""
    dq = torch.empty_like(q).flatten(1)
    dk, dv = (torch.zeros(k.shape, dtype=widen(k[:0]).dtype).flatten(1) for _ in range(2))
    for stack, p in zip(how.stacks, ps, strict=True):
        ks, vs = of_keys(k, stack), of_keys(v, stack)
        p = p.view(len(vs), -1, vs.shape[1])
        qs, dys = of_queries(q, stack, k.shape[1]), of_queries(dy.view(q.shape), stack, k.shape[1])
        ds = aten._softmax_backward_data(torch.bmm(dys, vs.mT), p, -1, p.dtype).mul_(how.scale)
        put_back(torch.bmm(ds, ks), stack, dq)
        for d, out in ((torch.bmm(ds.mT, qs), dk), (torch.bmm(p.mT, dys), dv)):
            add_back(d, stack, out)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def of_queries(x: Tensor, stack: Stack, n_kv_head: int) -> Tensor:
    """(M, H, D) -> (n K, G t, D): queries of heads that share keys one below the other; 0 where there is no token."""
    n, t = stack.rows.shape
    rows = x.flatten(1).index_select(0, stack.rows.flatten()).mul_(stack.there)
    return rows.view(n, t, n_kv_head, -1, x.shape[-1]).permute(0, 2, 3, 1, 4).reshape(n * n_kv_head, -1, x.shape[-1])


def of_keys(x: Tensor, stack: Stack) -> Tensor:
    """Keys or values (M, K, D) -> (n K, s, D)."""
    n, s = stack.keys.shape
    rows = x.flatten(1).index_select(0, stack.keys.flatten()).view(n, s, *x.shape[1:])
    return rows.transpose(1, 2).reshape(-1, s, x.shape[-1])


def put_back(x: Tensor, stack: Stack, out: Tensor) -> None:
    """Undo `of_queries`: (n K, G t, D) -> its tokens' rows of `out` (M, H D)."""
    n, t = stack.rows.shape
    D = x.shape[-1]
    rows = x.view(n, -1, t, D).transpose(1, 2).reshape(n * t, -1)
    out.index_copy_(0, stack.tokens, rows.index_select(0, stack.places))


def add_back(d: Tensor, stack: Stack, out: Tensor) -> None:
    """Add gradients (n K, s, D) of what documents see to those of the tokens, (M, K D); those of padding are 0."""
    n, s = stack.keys.shape
    rows = d.view(n, -1, s, d.shape[-1]).transpose(1, 2).reshape(n * s, -1)
    out.index_add_(0, stack.keys.flatten(), rows.to(out.dtype))


class Feeding(NamedTuple):
    """All that x + mlp(norm(x)) needs besides x."""

    norm: RMSNorm
    gate_up: Group
    down: Group
    act: Activation


class TunedMLP(torch.autograd.Function):
    """x + down(act(gate(z)) up(z)), z = norm(x). x (M, C) in the compute dtype; the rest are the LoRA matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Feeding, *_learned: Tensor) -> Tensor:
        z, r = norm_forward(x, how.norm)
        (gate, up), h = how.gate_up.forward(z)  # (M, F)
        (out,), h_down = how.down.forward(how.act[0](gate).mul_(up))
        ctx.how = how
        ctx.save_for_backward(x, r, h, gate, up, h_down)
        return out.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        how = ctx.how
        x, r, h, gate, up, h_down = ctx.saved_tensors
        g = g.contiguous()
        act = how.act[0](gate)
        da, learned_down = how.down.backward([g], act * up, h_down, True)
        dup = act.mul_(da)
        dgate = how.act[1](da.mul_(up), gate)
        dz, learned = how.gate_up.backward([dgate, dup], normed(x, r, how.norm), h, ctx.needs_input_grad[0])
        dx = None if dz is None else norm_backward(dz, x, r, how.norm, g)
        return dx, None, *learned, *learned_down
