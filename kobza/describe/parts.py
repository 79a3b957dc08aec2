"""ModelConfig -> a row a part, and the memory that training and inference take. Nothing here needs torch.

Counts are by equation, and a test holds them against the built model.
"""

from __future__ import annotations

from dataclasses import dataclass

from kobza.config import ModelConfig

WEIGHT_BYTES = 4  # float32
# float32 weight, gradient, AdamW's two moments; Muon keeps one of them, so this is an upper bound
TRAINING_BYTES_PER_WEIGHT = 16


@dataclass(frozen=True)
class Part:
    """One part of the network: how often it stands there, its tensors, and the totals over all its copies."""

    name: str
    copies: int
    shapes: str
    weights: int  # of one copy, matrices and tables
    vectors: int  # of one copy, biases and norm weights
    flops_per_token: int  # forward, over all copies, at full context

    @property
    def parameters(self) -> int:
        """Of all copies."""
        return self.copies * (self.weights + self.vectors)


def parts(c: ModelConfig) -> list[Part]:
    """The parts in the order in which a token meets them.

    A product of a token with a matrix of n weights is 2n FLOPs; attention adds 2 H D S each for scores and mixing, S being
    max_seq_len. A tied head has FLOPs but no weights of its own.
    """
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    bias = int(c.bias)
    attention = 2 * c.n_embd * (q + kv)
    ups = 2 if c.mlp == "swiglu" else 1
    mlp = (ups + 1) * c.n_embd * c.n_ff
    norm_vectors = c.n_embd * (int(c.norm_weight) + (bias if c.norm == "layernorm" else 0))
    head = c.vocab_size * c.n_embd
    up_names = "gate, up" if ups == 2 else "up"
    rows = [Part("embedding", 1, f"{c.vocab_size} x {c.n_embd}", head, 0, 0)]
    if c.position == "learned":
        rows.append(Part("positions", 1, f"{c.max_seq_len} x {c.n_embd}", c.max_seq_len * c.n_embd, 0, 0))
    else:
        rows.append(Part("positions", 1, f"rope, theta {c.rope_theta:g}", 0, 0, 0))
    rows += [
        Part(
            "attention",
            c.n_layer,
            f"q {c.n_embd} x {q}, k v {c.n_embd} x {kv}, o {q} x {c.n_embd}; {c.n_head} heads of {c.head_dim}",
            attention,
            bias * (q + 2 * kv + c.n_embd),
            c.n_layer * (2 * attention + 4 * q * c.max_seq_len),
        ),
        Part(
            "MLP",
            c.n_layer,
            f"{up_names} {c.n_embd} x {c.n_ff}, down {c.n_ff} x {c.n_embd}; {c.mlp}",
            mlp,
            bias * (ups * c.n_ff + c.n_embd),
            c.n_layer * 2 * mlp,
        ),
        Part("norm", 2 * c.n_layer + 1, f"{c.norm} {c.n_embd}", 0, norm_vectors, 0),
        Part("head", 1, f"{c.n_embd} x {c.vocab_size}{', tied' if c.tied else ''}", 0 if c.tied else head, 0, 2 * head),
    ]
    return rows


def total_parameters(config: ModelConfig) -> int:
    """Weights of the whole model."""
    return sum(part.parameters for part in parts(config))


def activation_bytes(c: ModelConfig, micro_batch: int, element_bytes: int = 4) -> int:
    """Activations kept for the backward pass, a rough upper bound: per token and layer some 14 vectors of n_embd, 3 of n_ff,
    and (without a fused kernel) the attention weights; and float32 logits three times over."""
    tokens = micro_batch * c.max_seq_len
    per_layer = 14 * c.n_embd + 3 * c.n_ff + 2 * c.n_head * c.max_seq_len
    return tokens * (c.n_layer * per_layer * element_bytes + 3 * 4 * c.vocab_size)


def training_bytes(config: ModelConfig, micro_batch: int) -> int:
    """Weights, gradients, optimizer and activations of a training step, an upper bound."""
    return TRAINING_BYTES_PER_WEIGHT * total_parameters(config) + activation_bytes(config, micro_batch)


def inference_bytes(c: ModelConfig, rows: int = 1) -> int:
    """Weights and a full KV cache for `rows` texts, float32."""
    cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * c.max_seq_len * rows
    return WEIGHT_BYTES * (total_parameters(c) + cache)
