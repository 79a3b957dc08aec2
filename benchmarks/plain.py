"""The plain recipe: a small GPT-2 trained on a CPU the way the field's reference trainer does it, in one page.

float32, no compile, one optimizer, random windows, the whole context run again for each generated token. It shares no code
with kobza and is what `speed.py` measures against. python benchmarks/plain.py train TEXT | throughput TEXT | generate ROWS
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

BATCH, CONTEXT, STEPS, WARMUP, EVERY, EVAL_BATCHES = 12, 64, 2000, 100, 250, 20
LR, LAST_LR = 1e-3, 1e-4


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    def __init__(self, vocab: int, context: int = CONTEXT, layers: int = 4, heads: int = 4, width: int = 128):
        super().__init__()
        self.context = context
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            residual = name.endswith(("out.weight", "down.weight"))
            if p.ndim == 2:
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, ids, targets=None):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    @torch.no_grad()
    def generate(self, ids, n: int, temperature: float = 0.8, top_k: int = 40):
        for _ in range(n):
            logits = self(ids[:, -self.context :])[0][:, -1] / temperature
            logits[logits < logits.topk(top_k).values[:, [-1]]] = -float("inf")
            ids = torch.cat((ids, torch.multinomial(F.softmax(logits, -1), 1)), dim=1)
        return ids


def read(path: str) -> tuple[np.ndarray, np.ndarray, int]:
    text = Path(path).read_text(encoding="utf-8")
    table = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([table[c] for c in text], dtype=np.uint16)
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(table)


def batch(data: np.ndarray):
    starts = torch.randint(len(data) - CONTEXT, (BATCH,))
    x = torch.stack([torch.from_numpy(data[i : i + CONTEXT].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in starts])
    return x, y


def rate(step: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    return LAST_LR + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) * (LR - LAST_LR)


def make(vocab: int):
    model = PlainGPT(vocab)
    groups = [[p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]]
    settings = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(settings, lr=LR, betas=(0.9, 0.99))


def update(model, optimizer, x, y, step: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate(step)
    loss = model(x, y)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@torch.no_grad()
def look(model, data: np.ndarray) -> float:
    model.eval()
    loss = sum(model(*batch(data))[1].item() for _ in range(EVAL_BATCHES)) / EVAL_BATCHES
    model.train()
    return loss


@torch.no_grad()
def whole_split_loss(model, data: np.ndarray) -> float:
    """The mean over all of a split, in windows side by side: outside the timed part, to compare like with like."""
    n = (len(data) - 1) // CONTEXT
    x = torch.from_numpy(data[: n * CONTEXT].astype(np.int64)).view(n, CONTEXT)
    y = torch.from_numpy(data[1 : n * CONTEXT + 1].astype(np.int64)).view(n, CONTEXT)
    losses = [model(x[i : i + 64], y[i : i + 64])[1].item() * len(x[i : i + 64]) for i in range(0, n, 64)]
    return sum(losses) / n


def train(path: str, seed: int, final_check: bool) -> dict:
    torch.manual_seed(seed)
    began = time.perf_counter()
    data, held_out, vocab = read(path)
    model, optimizer = make(vocab)
    with tempfile.TemporaryDirectory() as folder:
        for step in range(STEPS + 1):
            if step % EVERY == 0:
                losses = look(model, data), look(model, held_out)
                if step:
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/ckpt.pt")
            if step < STEPS:
                update(model, optimizer, *batch(data), step)
    result = {"seconds": time.perf_counter() - began, "val_loss": losses[1], "steps": STEPS}
    return result | ({"whole_val_loss": whole_split_loss(model, held_out)} if final_check else {})


def throughput(path: str, seed: int, steps: int = 120) -> dict:
    torch.manual_seed(seed)
    data, _, vocab = read(path)
    model, optimizer = make(vocab)
    times = []
    for step in range(steps):
        began = time.perf_counter()
        update(model, optimizer, *batch(data), step)
        times.append(time.perf_counter() - began)
    return {"tokens_per_second": BATCH * CONTEXT / float(np.median(times[10:]))}


def generation(rows: int, seed: int, tokens: int = 256) -> dict:
    torch.manual_seed(seed)
    model = PlainGPT(65, context=256, layers=6, heads=6, width=384).eval()
    start = torch.zeros((rows, 1), dtype=torch.int64)
    model.generate(start, 8)
    began = time.perf_counter()
    model.generate(start, tokens)
    return {"tokens_per_second": rows * tokens / (time.perf_counter() - began)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "throughput", "generate"))
    parser.add_argument("argument")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--final-check", action="store_true")
    args = parser.parse_args()
    if args.what == "train":
        result = train(args.argument, args.seed, args.final_check)
    elif args.what == "throughput":
        result = throughput(args.argument, args.seed)
    else:
        result = generation(int(args.argument), args.seed)
    print(json.dumps(result))
