"""kobza trace: a prompt through a model -> a page of attention maps, logit lens and what comes next."""

from __future__ import annotations

import json
from pathlib import Path

from kobza.config import require
from kobza.device import make_runtime
from kobza.pages.shell import write_whole
from kobza.recipes.tuned import open_checkpoint
from kobza.trace.page import distributions, render
from kobza.trace.record import record

LENS_TOKENS = 48  # columns a reader can follow
MOST = 512  # tokens of the maps, which grow with the square


def main(path: Path, prompt: str, temperature: float, out: Path | None, device: str, as_json: bool) -> int:
    """Trace a prompt -> exit code."""
    require(temperature >= 0, f"--temperature is {temperature}; it must not be negative")
    if as_json:
        require(out is None, f"--out {out} has no effect with --json; leave one out")
    loaded = open_checkpoint(path, make_runtime(device, "fp32").device)
    tokenizer, limit = loaded.tokenizer, min(MOST, loaded.run.model.max_seq_len)
    ids = tokenizer.encode_prompt(prompt)
    require(len(ids) <= limit, f"the prompt has {len(ids):,} tokens and a trace takes at most {limit:,}; shorten it")
    trace = record(loaded.model, ids)
    tokens = [tokenizer.show(i) for i in ids]
    if as_json:
        p, q = distributions(trace.logits, temperature)
        top = p.topk(min(20, len(p))).indices.tolist()
        rows = [{"id": i, "token": tokenizer.show(i), "before": float(p[i]), "after": float(q[i])} for i in top]
        lens = {
            name: [{"id": i, "token": tokenizer.show(i)} for i in logits.argmax(-1).tolist()]
            for name, logits in trace.lens.items()
        }
        maps = {name: weights.tolist() for name, weights in trace.attention.items()}
        print(json.dumps({"tokens": tokens, "ids": ids, "next": rows, "lens": lens, "attention": maps}))
        return 0
    page = out or Path("trace.html")
    require(not page.is_dir(), f"--out {page} is a folder; name a file, for example {page / 'trace.html'}")
    write_whole(page, render(trace, tokens, tokenizer.show, temperature, f"{path}: {prompt}", LENS_TOKENS))
    print(f"{page}: {len(ids)} tokens, {len(trace.attention)} attentions; open it in a browser")
    return 0
