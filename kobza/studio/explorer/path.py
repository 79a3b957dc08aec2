"""Lesson: the path of a prompt through the model, with the real shapes and a few real numbers at every arrow."""

from __future__ import annotations

from typing import Any

from kobza.studio.explorer.lesson import Asked, Form, Lesson, ask_model, figure, label
from kobza.studio.explorer.sources import Eye
from kobza.studio.explorer.walk import Step, walk

TOKENS, LIKELIEST = 64, 6
WORDS = {  # of a step, by its last word: what it is called, what it does
    "embed": ("look up", "each id picks its row of the embedding table"),
    "position": ("position", "the vector of each place, to be added"),
    "embed_norm": ("norm", "the vectors are brought to one size"),
    "drop": ("the stream begins", "one vector a token: the residual stream, which every block adds to"),
    "attn_norm": ("norm", "a copy of the stream is brought to one size"),
    "mlp_norm": ("norm", "a copy of the stream is brought to one size"),
    "q_proj": ("queries", "what each token looks for: a linear layer"),
    "k_proj": ("keys", "what each token offers to be found by: a linear layer"),
    "v_proj": ("values", "what each token gives to those who look: a linear layer"),
    "q_norm": ("norm of q", "queries are brought to one size, head by head"),
    "k_norm": ("norm of k", "keys are brought to one size, head by head"),
    "q": ("q, by heads", "queries cut into heads"),
    "k": ("k, by heads", "keys cut into heads"),
    "v": ("v, by heads", "values cut into heads"),
    "scores": ("scores", "q · k for every pair of tokens, times a scale: tokens × tokens, a table a head"),
    "softmax": ("softmax", "scores become shares: each row sums to 1, and later tokens get 0"),
    "mix": ("mix", "each token takes the values of others by its shares"),
    "o_proj": ("o_proj", "the heads' results are joined by a linear layer"),
    "up_proj": ("up", "a linear layer to a wider vector"),
    "gate_proj": ("gate", "a linear layer that decides what passes"),
    "act": ("activation", "the one bend between the linear layers"),
    "down_proj": ("down", "a linear layer back to the stream's width"),
    "attn_out_norm": ("norm", "what attention found is brought to one size"),
    "mlp_out_norm": ("norm", "what the feed-forward found is brought to one size"),
    "attn_sum_norm": ("add", "what attention found is added to the stream"),
    "mlp_sum_norm": ("add", "what the feed-forward found is added to the stream"),
    "norm": ("norm", "the stream, brought to one size for the last time"),
    "lm_head": ("lm_head", "a linear layer: a score for every token of the vocabulary"),
    "logits": ("logits", "the scores: of these the last row tells what comes next"),
}
LAST = ("softmax", "the last row's scores become probabilities, which sum to 1")
TURNED = " and turned by their place's angles"


def ask(eye: Eye, asked: Asked) -> Form:
    """A model and a prompt."""
    return ask_model(eye, asked)


def show(eye: Eye, form: Form) -> dict[str, Any]:
    """The steps by block, the size of the stream, and what comes next."""
    ids = eye.ids(form.model, form.prompt, TOKENS)
    model, tokenizer = eye.open(form.model)
    steps, logits = eye.look("path", form.model, ids, walk)
    p = logits.softmax(-1)
    best = p.topk(min(LIKELIEST, len(p)))
    stream = [step for step in steps if step.stream]
    largest = max([step.rms for step in stream], default=1.0) or 1.0
    config, rope = model.config, model.config.position == "rope"
    return {
        "tokens": [{"text": label(tokenizer, i), "id": i} for i in ids],
        "stages": stages(steps, rope),
        "stream": [{"name": stream_name(step), "rms": figure(step.rms), "share": step.rms / largest} for step in stream],
        "likeliest": [
            {"token": label(tokenizer, i), "p": share}
            for i, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        "sizes": {"T": len(ids), "C": config.n_embd, "H": config.n_head, "K": config.n_kv_head, "D": config.head_dim,
                  "V": config.vocab_size},
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }  # fmt: skip


def stages(steps: list[Step], rope: bool) -> list[dict[str, Any]]:
    """Into the blocks, block by block, out of them."""
    found: list[dict[str, Any]] = []
    for step in steps:
        name = "In" if not found else "Out" if step.block is None and found[-1]["name"] != "In" else found[-1]["name"]
        name = name if step.block is None else f"Block {step.block}"
        if not found or found[-1]["name"] != name:
            found.append({"name": name, "steps": [], "parameters": 0})
        found[-1]["steps"].append(row(step, rope))
        found[-1]["parameters"] += step.parameters
    return found


def row(step: Step, rope: bool) -> dict[str, Any]:
    """A step in words and figures."""
    title, words = LAST if step.name == "softmax" else WORDS.get(step.leaf.rstrip("0123456789"), (step.leaf, ""))
    return {
        "name": step.name,
        "title": title,
        "words": words + (TURNED if rope and step.leaf in ("q", "k") else ""),
        "shape": " × ".join(map(str, step.shape)),
        "dtype": step.dtype,
        "low": figure(step.low),
        "mean": figure(step.mean),
        "high": figure(step.high),
        "rms": figure(step.rms),
        "first": ", ".join(map(figure, step.first)),
        "parameters": step.parameters,
        "stream": step.stream,
    }


def stream_name(step: Step) -> str:
    """ "embedding", "block 0 attention", "block 0 feed-forward"."""
    if step.block is None:
        return "embedding"
    return f"block {step.block}, after {'attention' if step.leaf.startswith('attn') else 'feed-forward'}"


LESSON = Lesson(
    "path",
    "The path",
    "from ids to probabilities, block by block, with the real shapes",
    ask,
    show,
)
