"""Our checkpoints under lm-evaluation-harness (lm-eval 0.4.13): a model named `kobza`.

    python -m kobza.evals.harness --model kobza --model_args run=runs/demo --tasks mine --include_path tasks/

is `lm_eval` with that name known to it: the harness knows the models that have been imported, and imports only its own.
Log-likelihoods are those of `score`, so a task of the harness and one of `kobza eval --tasks` agree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kobza.checkpoint import load_checkpoint
from kobza.config import InputError, SampleConfig, nearest, require
from kobza.device import make_runtime
from kobza.evals.score import encode_pair, score
from kobza.evals.texts import continue_all

ABSENT = 'lm-evaluation-harness is not installed: pip install "kobza[lm-eval]"'
NEW_TOKENS = 256  # where a task sets no max_gen_toks; the harness's own default
SAMPLING = ["until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"]

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    if __name__ == "__main__":
        print("kobza:", ABSENT, file=sys.stderr)
        sys.exit(2)
    raise InputError(ABSENT) from None


@register_model("kobza")
class Kobza(LM):
    """A run or checkpoint as the harness wants it. --model_args run=DIR[,unknown=skip]; --device as in kobza."""

    def __init__(self, run: str, unknown: str | None = None, device: str = "auto", **sizes: Any):
        super().__init__()
        for name in sizes:  # the harness always gives a batch size; ours follows from the context
            require(
                name in ("batch_size", "max_batch_size"),
                f"unknown model_args {name}{nearest(name, ['run', 'unknown'])}",
            )
        self._device = make_runtime(device, "auto").device
        loaded = load_checkpoint(Path(run), self._device, unknown)
        self.model, self.encoder = loaded.model, loaded.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """What the harness files cached prompts under."""
        return f"kobza-{self.encoder.vocab_size}"

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(context, continuation) each -> log P(continuation | context) and whether greedy decoding would write it."""
        pairs = [encode_pair(self.encoder, *request.args) for request in requests]
        scored = score(self.model, self.encoder, [ids for ids, _ in pairs], [begin for _, begin in pairs])
        results = [(float(one.logprob.sum()), bool(one.greedy.all())) for one in scored]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """(text,) each -> log P(text), in windows side by side, the last one full, as the harness asks."""
        ids = [self.encoder.encode(request.args[0]) for request in requests]
        scored = score(self.model, self.encoder, ids, stride=self.model.config.max_seq_len)
        results = [float(one.logprob.sum()) for one in scored]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """(context, settings) each -> the text up to the first of settings["until"]; greedy unless do_sample."""
        results = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for group in kinds.values():
            settings = requests[group[0]].args[1]
            config, stops = sampling(settings)
            prompts = [self.encoder.encode_prompt(requests[i].args[0]) for i in group]
            texts = continue_all(self.model, self.encoder, prompts, [config.tokens] * len(group), config)
            for i, text in zip(group, texts, strict=True):
                results[i] = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
                self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
        return results


def sampling(settings: dict[str, Any]) -> tuple[SampleConfig, list[str]]:
    """The harness's generation settings -> ours, and the strings that end a text."""
    for name in settings:
        require(name in SAMPLING, f"generation_kwargs: unknown {name!r}{nearest(name, SAMPLING)}")
    until = settings.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    drawn = bool(settings.get("do_sample")) and settings.get("temperature", 1.0) > 0
    config = SampleConfig(
        tokens=int(settings.get("max_gen_toks", NEW_TOKENS)),
        temperature=float(settings.get("temperature", 1.0)) if drawn else 0.0,
        top_k=int(settings.get("top_k", 0)) if drawn else 0,
        top_p=float(settings.get("top_p", 1.0)) if drawn else 1.0,
    )
    return config, stops


def main() -> int:
    """`lm_eval` with our model -> exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        print("kobza:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
