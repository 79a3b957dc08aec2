"""BLOCK 2: ModelConfig -> logits. One decoder from GPT-2 to Transformer++, built from the numbers and equations of the config.

`ids -> embed (+ position) -> n_layer x [x += attn(norm(x)); x += mlp(norm(x))] -> norm -> lm_head -> logits`

Switches are resolved in `__init__`; a `forward` has no architecture in it. The model knows nothing of training, text, devices
or files. Its neighbours: layers.py has what acts on a token alone, generate.py brings the KVCache that `forward` accepts,
train.py the loss, optim.py the groups.

Shapes: B batch, T tokens, S keys seen, C n_embd, H n_head, K n_kv_head, D head_dim, V vocab_size.
Precision: see layers.py; softmax computes in float32.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import ModelConfig, require
from kobza.layers import (
    GATES,
    MLP,
    Ahead,
    Embedding,
    GatedMLP,
    Linear,
    NoRope,
    Rope,
    Sinusoids,
    make_head_norm,
    make_norm,
    rotate,
    widen,
)


class Cache(Protocol):
    """What attention needs of a key/value cache (generate.py has one, the serving engine another)."""

    length: int

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of new tokens; returns all keys and values seen so far (B, K, S, D)."""

    def mask(self, n_new: int) -> Tensor | None:
        """Who may see whom, True = visible, broadcastable to (B, H, T, S); None: all keys are visible."""

    def advance(self, n_new: int) -> None:
        """Count tokens as stored, once all layers have seen them."""


class View(NamedTuple):
    """What a kind of attention, global or windowed, gets besides x: rotary cos and sin, and the mask (None: plain causality)."""

    rope: tuple[Tensor, Tensor] | None
    mask: Tensor | None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float | None = None
) -> Tensor:
    """softmax(q k^T scale) v with torch's kernels; scale None: 1/sqrt(D). q (B, H, T, D); k, v (B, K, S, D) -> (B, H, T, D)."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float, cap: float
) -> Tensor:
    """`attend` with scores cap * tanh(scores / cap) (Gemma 2), which torch's kernels do not have."""
    groups, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = cap * torch.tanh(widen(q @ k.mT) * scale / cap)  # (B, H, T, S)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril() if causal else mask
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout).to(v.dtype) @ v


class Attention(nn.Module):
    """Causal self-attention: every token takes a weighted mean of the values before it. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        n_head, n_kv_head = config.heads(layer)
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.view = int(config.is_windowed(layer))
        self.scale = config.attn_scale or config.head_dim**-0.5
        self.attend = attend if config.attn_softcap == 0 else partial(attend_capped, cap=config.attn_softcap)
        q_width, kv_width, bias = n_head * config.head_dim, n_kv_head * config.head_dim, config.bias
        self.q_proj = Linear(config.n_embd, q_width, bias=bias or config.qkv_bias)
        self.k_proj = Linear(config.n_embd, kv_width, bias=bias or config.qkv_bias)
        self.v_proj = Linear(config.n_embd, kv_width, bias=bias or config.qkv_bias)
        self.o_proj = Linear(q_width, config.n_embd, bias=bias)
        self.q_norm, self.k_norm = make_head_norm(config), make_head_norm(config)

    def forward(self, x: Tensor, views: list[View], cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        rope, mask = views[self.view]
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        causal = mask is None and T == k.shape[2] and T > 1
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q.to(k.dtype), k, v, mask, causal, dropout, self.scale)  # a cache may be wider than x
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))  # (B, T, C)


class Block(nn.Module):
    """The sub-layers of config.pattern, one after the other, each x <- sum_norm(x + out_norm(f(norm(x)))), where
    config.norm_place says which of the norms are there. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.names: list[str] = []
        for i, letter in enumerate(config.pattern):
            nth = config.pattern[:i].count(letter)  # attn, mlp, then attn2, mlp2, ...
            place = index * config.pattern.count(letter) + nth
            name = {"A": "attn", "F": "mlp"}[letter] + (str(nth + 1) if nth else "")
            self.names.append(name)
            self.add_module(f"{name}_norm", make_norm(config, "before", "both", "everywhere"))
            self.add_module(name, Attention(config, place) if letter == "A" else make_mlp(config, place))
            self.add_module(f"{name}_out_norm", make_norm(config, "output", "both", "everywhere"))
            self.add_module(f"{name}_sum_norm", make_norm(config, "after"))
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, views: list[View], cache: Cache | None) -> Tensor:
        part = self._modules
        for name in self.names:
            y = part[name](part[f"{name}_norm"](x), views, cache)
            x = part[f"{name}_sum_norm"](x + self.drop(part[f"{name}_out_norm"](y)))
        return x


def make_mlp(config: ModelConfig, place: int) -> nn.Module:
    """The place-th feed-forward of the network."""
    return (GatedMLP if config.mlp in GATES else MLP)(config, config.ff_width(place))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V) of the token that follows each."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        require(config.vocab_size > 0, "model.vocab_size is 0; give the tokenizer's, e.g. 65")
        self.config = config
        self.embed = Embedding(config.n_rows, config.n_embd, config.embed_scale)
        self.position = make_position(config)
        self.embed_norm = make_norm(config, "everywhere")
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm = make_norm(config, "before", "output", "both", "everywhere")  # after: the last sum is normed already
        self.lm_head = Linear(config.n_embd, config.n_rows, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight
        self.ahead = nn.ModuleList(Ahead(config) for _ in range(config.n_ahead - 1))
        rotary = config.position == "rope" and config.n_attention > 0
        self.rope = Rope(config, config.rope_theta, config.rope_scaling != "none") if rotary else NoRope()
        self.local_rope = Rope(config, config.rope_local_theta, False) if config.rope_local_theta else self.rope

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V) in `dtype` (None: the weights' own).

        positions (T,) or (B, T): place of each token, default 0, 1, ... after what the cache holds. mask: True = visible,
        broadcastable to (B, H, T, S), default causal. cache: keys and values of earlier tokens, extended by these.
        """
        x = self.hidden(ids, positions, mask, cache, dtype)  # (B, T, C)
        return self.logits(x)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """ids (B, T) -> what the head reads (B, T, C); arguments as in `forward`."""
        T = ids.shape[1]
        past = 0 if cache is None else cache.length
        if positions is None:
            check_length(past + T, self.config.max_seq_len)
            positions = torch.arange(past, past + T, device=ids.device)
        if cache is not None and mask is None:
            mask = cache.mask(T)
        x = self.embed(ids, dtype)  # (B, T, C)
        if self.position is not None:
            x = x + self.position(positions)
        x = self.drop(self.embed_norm(x if dtype is None else x.to(dtype)))
        views = self.views(positions, mask, past, T)
        for block in self.blocks:
            x = block(x, views, cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def views(self, positions: Tensor, mask: Tensor | None, past: int, T: int) -> list[View]:
        """What the global attentions see of `past` + T tokens, and where there is a window, what the windowed ones do."""
        views, window = [View(self.rope(positions), mask)], self.config.window
        if window:
            places = torch.arange(past + T, device=positions.device)
            distance = places[past:, None] - places  # (T, S)
            near = (distance >= 0) & (distance < window)
            views.append(View(self.local_rope(positions), near if mask is None else near & mask))
        return views

    def logits(self, x: Tensor) -> Tensor:
        """Scores of every token. x (B, T, C) -> (B, T, V)."""
        logits = self.lm_head(x)[..., : self.config.vocab_size]  # rows of padding are no tokens
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits


def make_position(config: ModelConfig) -> nn.Module | None:
    """What is added to the embedding to tell a token its place."""
    if config.position == "learned":
        return Embedding(config.max_seq_len, config.n_embd)
    return Sinusoids(config.max_seq_len, config.n_embd) if config.position == "sinusoidal" else None


def check_length(n_tokens: int, limit: int) -> None:
    """Refuse a sequence longer than the context."""
    require(
        n_tokens <= limit,
        f"sequence has {n_tokens:,} tokens but max_seq_len is {limit:,}; shorten it or train with "
        f"--model.max_seq_len {n_tokens}",
    )


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Draw every weight in place from one generator, by the rule config.init.

    | tensor           | zero                           | gpt2                         | xavier             | unit    |
    |------------------|--------------------------------|------------------------------|--------------------|---------|
    | embed (tied .02) | N(0, 0.5)                      | N(0, 0.02)                   | N(0, 0.02)         | N(0, 1) |
    | position         | N(0, 0.02)                     | N(0, 0.02)                   | N(0, 0.02)         | N(0, 1) |
    | q k v gate up    | U(-s, s), s = sqrt(3 / fan_in) | N(0, 0.02)                   | U(-s, s)           | N(0, 1) |
    | o_proj down_proj | 0: starts as the identity      | N(0, 0.02 / sqrt(sublayers)) | s = sqrt(6 /       | N(0, 1) |
    | lm_head, untied  | 0: a guess over all tokens     | N(0, 0.02)                   |   (fan_in          | N(0, 1) |
    | ahead            | 0: starts as the next token's  | N(0, 0.02)                   |   + fan_out))      | N(0, 1) |
    | biases 0, norm weights 1                                                                                         |

    `torch` is what nn.Embedding and nn.Linear draw themselves: tables N(0, 1), the rest U(-s, s), s = 1 / sqrt(fan_in).
    `unit` is the honest bad one: the first loss is far above ln V, and the residual stream grows with every layer.
    """
    generator, config = torch.Generator().manual_seed(seed), model.config
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2]
        if parameter.ndim < 2:
            is_gain = leaf.endswith("norm") and name.endswith("weight")
            parameter.fill_(float(is_gain and not config.norm_offset))
            continue
        rule, size = spread(leaf, parameter, config)
        values = torch.empty(parameter.shape)
        if rule == "uniform":
            values.uniform_(-size, size, generator=generator)
        elif size:
            values.normal_(0.0, size, generator=generator)
        else:
            values.zero_()  # takes no draw
        parameter.copy_(values)


def spread(leaf: str, weight: Tensor, config: ModelConfig) -> tuple[str, float]:
    """How the table of `init_weights` draws a matrix: ("uniform", its bound) or ("normal", its deviation)."""
    residual, is_table = leaf in ("o_proj", "down_proj"), leaf in ("embed", "position")
    if config.init == "unit":
        return "normal", 1.0
    if config.init == "gpt2":
        return "normal", 0.02 / (config.n_layer * len(config.pattern)) ** 0.5 if residual else 0.02
    if config.init == "torch":
        return ("normal", 1.0) if is_table else ("uniform", weight.shape[1] ** -0.5)
    if config.init == "xavier":
        return ("normal", 0.02) if is_table else ("uniform", (6 / sum(weight.shape)) ** 0.5)
    if is_table:  # a tied table is the head too: small, to start at ln V
        return "normal", 0.5 if leaf == "embed" and not config.tied else 0.02
    return ("normal", 0.0) if residual or leaf in ("lm_head", "proj") else ("uniform", (3 / weight.shape[1]) ** 0.5)


def build(config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu") -> GPT:
    """A model with freshly drawn weights, the same on every device. build(ModelConfig(vocab_size=65)) -> GPT."""
    model = GPT(config)
    init_weights(model, seed)
    return model.to(device)


def n_parameters(model: nn.Module) -> int:
    """Number of weights, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops_per_token(model: GPT) -> int:
    """6 FLOPs a matrix weight (2 forward, 4 backward), the head's once for each token told ahead, + 12 H D S an attention for
    scores and mixing at full context, S being the tokens it sees. Chowdhery et al. 2022 (PaLM), appendix B."""
    config = model.config
    matmul = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    matmul += (config.n_ahead - 1) * config.n_rows * config.n_embd
    seen = sum(config.heads(layer)[0] * config.span(layer) for layer in range(config.n_attention))
    return 6 * matmul + 12 * config.head_dim * seen
