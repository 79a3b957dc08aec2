"""ModelConfig -> a row a part, and the memory that training and inference take. Nothing here needs torch.

Counts are by equation, and a test holds them against the built model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    A product of a token with a matrix of n weights is 2n FLOPs; attention adds 2 H D S each for scores and mixing, S being the
    most tokens it sees. A tied head has FLOPs but no weights of its own; an extra head (training alone) uses the head's too.
    """
    embedding = c.n_rows * c.n_embd
    return [
        Part("embedding", 1, f"{c.n_rows} x {c.n_embd}", embedding, 0, 0),
        position_part(c),
        *merged("attention", [attention_part(c, layer) for layer in range(c.n_attention)]),
        *merged("MLP", [mlp_part(c, place) for place in range(c.n_layer * c.pattern.count("F"))]),
        *norm_parts(c),
        *ahead_parts(c),
        Part(
            "head",
            1,
            f"{c.n_embd} x {c.n_rows}{', tied' if c.tied else ''}",
            0 if c.tied else embedding,
            0,
            2 * embedding,
        ),
    ]


def merged(name: str, rows: list[Part]) -> list[Part]:
    """Parts of equal shape as one row with their number, named "attention", or "attention a", "b", ... where they differ."""
    kinds: dict[str, list[Part]] = {}
    for row in rows:
        kinds.setdefault(row.shapes, []).append(row)
    names = [name] if len(kinds) == 1 else [f"{name} {chr(ord('a') + i) if i < 26 else i}" for i in range(len(kinds))]
    return [
        replace(same[0], name=each, copies=len(same), flops_per_token=sum(row.flops_per_token for row in same))
        for each, same in zip(names, kinds.values(), strict=True)
    ]


def position_part(c: ModelConfig) -> Part:
    """What tells a token its place."""
    if c.position == "learned":
        return Part("positions", 1, f"{c.max_seq_len} x {c.n_embd}", c.max_seq_len * c.n_embd, 0, 0)
    scaling = f", {c.rope_scaling} x {c.rope_factor:g}" if c.rope_scaling != "none" else ""
    rope = f"rope, theta {c.rope_theta:g}{scaling}"
    return Part("positions", 1, rope if c.position == "rope" else c.position, 0, 0, 0)


def attention_part(c: ModelConfig, layer: int) -> Part:
    """The layer-th attention."""
    n_head, n_kv_head = c.heads(layer)
    q, kv = n_head * c.head_dim, n_kv_head * c.head_dim
    weights = 2 * c.n_embd * (q + kv)
    biases = int(c.bias or c.qkv_bias) * (q + 2 * kv) + int(c.bias) * c.n_embd
    head_norms = 2 * c.head_dim * int(c.qk_norm_weight)
    seen = f", window {c.window}" if c.is_windowed(layer) else ""
    shapes = f"q {c.n_embd} x {q}, k v {c.n_embd} x {kv}, o {q} x {c.n_embd}; {n_head} heads of {c.head_dim}{seen}"
    return Part("attention", 1, shapes, weights, biases + head_norms, 2 * weights + 4 * q * c.span(layer))


def mlp_part(c: ModelConfig, place: int) -> Part:
    """The place-th feed-forward."""
    width, ups = c.ff_width(place), 2 if "glu" in c.mlp else 1
    weights = (ups + 1) * c.n_embd * width
    shapes = f"{'gate up' if ups == 2 else 'up'} {c.n_embd} x {width}, down {width} x {c.n_embd}; {c.mlp}"
    return Part("MLP", 1, shapes, weights, int(c.bias) * (ups * width + c.n_embd), 2 * weights)


def norm_parts(c: ModelConfig) -> list[Part]:
    """The norms over n_embd, one row; none where there is none."""
    if c.norm == "none":
        return []
    each = {"both": 2, "everywhere": 2}.get(c.norm_place, 1)
    besides = {"after": 0, "everywhere": 2}.get(c.norm_place, 1)  # before the head, and over the embedding
    copies = c.n_layer * len(c.pattern) * each + besides
    vectors = c.n_embd * (int(c.norm_weight) + int(c.bias and c.norm == "layernorm"))
    return [Part("norm", copies, f"{c.norm} {c.n_embd}, {c.norm_place}", 0, vectors, 0)]


def ahead_parts(c: ModelConfig) -> list[Part]:
    """The extra heads of training, one row; none where only the next token is told."""
    n, weights = c.n_ahead - 1, c.n_embd**2
    row = Part(
        "ahead", n, f"{c.n_embd} x {c.n_embd}, then the head", weights, 0, n * 2 * (weights + c.n_rows * c.n_embd)
    )
    return [row] * (n > 0)


def total_parameters(config: ModelConfig) -> int:
    """Weights of the whole model."""
    return sum(part.parameters for part in parts(config))


def activation_bytes(c: ModelConfig, micro_batch: int, element_bytes: int = 4) -> int:
    """Activations kept for the backward pass, a rough upper bound: per token and block some 14 vectors of n_embd, 3 of n_ff,
    and (without a fused kernel) the attention weights; and float32 logits three times over."""
    tokens = micro_batch * c.max_seq_len
    n_heads = sum(c.heads(layer)[0] for layer in range(c.n_attention))
    attentions = c.n_attention * 10 * c.n_embd + 2 * n_heads * c.max_seq_len
    widths = [c.ff_width(place) for place in range(c.n_layer * c.pattern.count("F"))]
    per_token = attentions + sum(4 * c.n_embd + 3 * width for width in widths)
    return tokens * (per_token * element_bytes + 3 * 4 * c.n_rows * c.n_ahead)


def training_bytes(config: ModelConfig, micro_batch: int) -> int:
    """Weights, gradients, optimizer and activations of a training step, an upper bound."""
    return TRAINING_BYTES_PER_WEIGHT * total_parameters(config) + activation_bytes(config, micro_batch)


def inference_bytes(c: ModelConfig, rows: int = 1) -> int:
    """Weights and a full KV cache for `rows` texts, float32."""
    n_kv_heads = sum(c.heads(layer)[1] for layer in range(c.n_attention))
    cache = 2 * n_kv_heads * c.head_dim * c.max_seq_len * rows
    return WEIGHT_BYTES * (total_parameters(c) + cache)
