"""BLOCK 2: ModelConfig -> logits. One decoder from GPT-2 to Transformer++, built from the numbers and equations of the config.

`ids -> embed (+ position) -> n_layer x [x += attn(norm(x)); x += mlp(norm(x))] -> norm -> lm_head -> logits`

Switches are resolved in `__init__`; a `forward` has no architecture in it. The model knows nothing of training, text, devices
or files. Its neighbours: generate.py brings the KVCache that `forward` accepts, train.py the loss, optim.py the groups.

Shapes: B batch, T tokens, S keys seen, C n_embd, H n_head, K n_kv_head, D head_dim, F n_ff, V vocab_size.
Precision: weights are float32; each Linear casts its weight to the dtype of what flows in. Norms, softmax, rope and the loss
compute in float32.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import ModelConfig, require


class Cache(Protocol):
    """What attention needs of a key/value cache (generate.py has one, the serving engine another)."""

    length: int

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of new tokens; returns all keys and values seen so far (B, K, S, D)."""

    def mask(self, n_new: int) -> Tensor | None:
        """Who may see whom, True = visible, broadcastable to (B, H, T, S); None: all keys are visible."""

    def advance(self, n_new: int) -> None:
        """Count tokens as stored, once all layers have seen them."""


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input. (..., in) -> (..., out)."""

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every tensor."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32, cast down before the weight is applied as Llama does. (..., C) -> (..., C)."""

    def __init__(self, size: int, eps: float, weight: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if weight else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.eps)
        return y if self.weight is None else y * self.weight.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias, in float32. (..., C) -> (..., C)."""

    def __init__(self, size: int, eps: float, weight: bool, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if weight else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.layer_norm(x, x.shape[-1:], weight, bias, self.eps)  # torch's kernel computes in float32 inside


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32. rms_norm([3., 4.], 0) -> [0.85, 1.13]. Zhang & Sennrich 2019."""
    return F.rms_norm(widen(x), (x.shape[-1],), eps=eps).to(x.dtype)


def widen(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64 (proofs run in it)."""
    return x if x.dtype == torch.float64 else x.float()


def rope_angles(max_seq_len: int, head_dim: int, theta: float) -> Tensor:
    """Rotary angles of every position, (max_seq_len, D/2), radians, float32. Su et al. 2021, halves layout as in Llama."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by their angles, in float32. x (B, H, T, D); cos, sin (T, D/2) or (B, 1, T, D/2)."""
    left, right = widen(x).chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with torch's kernels. q (B, H, T, D); k, v (B, K, S, D) -> (B, H, T, D)."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=gqa)


class Attention(nn.Module):
    """Causal self-attention: every token takes a weighted mean of the values before it. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, q_width, bias=config.bias)
        self.k_proj = Linear(config.n_embd, kv_width, bias=config.bias)
        self.v_proj = Linear(config.n_embd, kv_width, bias=config.bias)
        self.o_proj = Linear(q_width, config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm(config.head_dim, config.norm_eps, weight=False) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.qk_norm(self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, H, T, D)
        k = self.qk_norm(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        causal = mask is None and T == k.shape[2] and T > 1
        y = attend(
            q.to(k.dtype), k, v, mask, causal, self.dropout if self.training else 0.0
        )  # a cache may be wider than x
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))  # (B, T, C)


class ReLU2(nn.Module):
    """max(x, 0)^2. So et al. 2021 (Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS = {"relu2": ReLU2, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh")}


class MLP(nn.Module):
    """down(act(up(x))), each token on its own. (B, T, C) -> (B, T, C), F wide inside."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.n_embd, config.n_ff, bias=config.bias)
        self.act = ACTIVATIONS[config.mlp]()
        self.down_proj = Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU, Shazeer 2020. (B, T, C) -> (B, T, C), F wide inside."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_ff, bias=config.bias)
        self.up_proj = Linear(config.n_embd, config.n_ff, bias=config.bias)
        self.down_proj = Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that the config names, over n_embd."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps, config.norm_weight)
    return LayerNorm(config.n_embd, config.norm_eps, config.norm_weight, config.bias)


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)). (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = GatedMLP(config) if config.mlp == "swiglu" else MLP(config)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), rope, mask, cache))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, V) of the token that follows each."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        require(config.vocab_size > 0, "model.vocab_size is 0; give the tokenizer's, e.g. 65")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.position = nn.Embedding(config.max_seq_len, config.n_embd) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight
        if config.position == "rope":
            angles = rope_angles(config.max_seq_len, config.head_dim, config.rope_theta)
            self.register_buffer("rope_cos", angles.cos(), persistent=False)
            self.register_buffer("rope_sin", angles.sin(), persistent=False)

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
        x = self.embed(ids)  # (B, T, C)
        if self.position is not None:
            x = x + self.position(positions)
        x = self.drop(x if dtype is None else x.to(dtype))
        rope = self.rope(positions)
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the angles at positions (T,) -> (T, D/2), or (B, T) -> (B, 1, T, D/2); None without rope."""
        if self.position is not None:
            return None
        cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        return (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])

    def logits(self, x: Tensor) -> Tensor:
        """Scores of every token. x (B, T, C) -> (B, T, V)."""
        logits = self.lm_head(x)
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits


def check_length(n_tokens: int, limit: int) -> None:
    """Refuse a sequence longer than the context."""
    require(
        n_tokens <= limit,
        f"sequence has {n_tokens:,} tokens but max_seq_len is {limit:,}; shorten it or train with "
        f"--model.max_seq_len {n_tokens}",
    )


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Draw every weight in place from one generator.

    | tensor                | zero_init                     | GPT-2's rule (zero_init off)        |
    |-----------------------|-------------------------------|-------------------------------------|
    | embed (tied: 0.02)    | N(0, 0.5)                     | N(0, 0.02)                          |
    | position              | N(0, 0.02)                    | N(0, 0.02)                          |
    | q k v gate up         | U(-s, s), s = sqrt(3 / fan_in)| N(0, 0.02)                          |
    | o_proj, down_proj     | 0: a block starts as identity | N(0, 0.02 / sqrt(2 n_layer))        |
    | lm_head (untied)      | 0: a guess over all V tokens  | N(0, 0.02)                          |
    | biases 0, norm weights 1                                                                    |
    """
    generator = torch.Generator().manual_seed(seed)
    zero = model.config.zero_init
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2]
        if parameter.ndim < 2:
            parameter.fill_(1.0 if leaf.endswith("norm") and name.endswith("weight") else 0.0)
        elif zero and leaf in ("o_proj", "down_proj", "lm_head"):
            parameter.zero_()
        elif zero and leaf.endswith("_proj"):
            bound = (3 / parameter.shape[1]) ** 0.5
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        else:
            residual = leaf in ("o_proj", "down_proj")
            wide = (
                zero and leaf == "embed" and not model.config.tied
            )  # a tied table is the head too: small, to start at ln V
            std = 0.02 / (2 * model.config.n_layer) ** 0.5 if residual else 0.5 if wide else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def build(config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu") -> GPT:
    """A model with freshly drawn weights, the same on every device. build(ModelConfig(vocab_size=65)) -> GPT."""
    model = GPT(config)
    init_weights(model, seed)
    return model.to(device)


def n_parameters(model: nn.Module) -> int:
    """Number of weights, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def training_flops_per_token(model: GPT) -> int:
    """6 FLOPs a matrix weight (2 forward, 4 backward) + 12 L H D T for scores and mixing at full context.
    Chowdhery et al. 2022 (PaLM), appendix B."""
    config = model.config
    matmul = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 6 * matmul + 12 * config.n_layer * config.n_head * config.head_dim * config.max_seq_len
