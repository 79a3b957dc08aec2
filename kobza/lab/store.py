"""The lab's folder: what is done is never done again, by whatever design it was asked for.

    DIR/runs/<hash>/result.json     one run: its curve, costs and provenance; written whole or not at all
    DIR/tokens/<hash>/              a text under a DataConfig: tokenizer.json and shards, shared by all runs
    DIR/calibration/<hash>.json     seconds a step of an arm run alone, for budgets of seconds
    DIR/<design>/                   design.json (which arm is which run) and the report

The hash of a run covers all that decides its result: the settings (without those that cannot act here), the seed, the tokens,
what is evaluated, the versions of kobza and torch, the kind of device. It leaves out the machine and the number of threads, which
moves sums in the last digit. The checksum of kobza's own source is kept beside each result instead, and a report over a mixture
says so: while kobza itself is being changed, a run done is kept, but not silently mixed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kobza
from kobza.checkpoint import write_file
from kobza.config import DataConfig, RunConfig, require, to_dict
from kobza.data import find_files, load_corpus
from kobza.lab.design import WITHOUT_EFFECT, Arm, Design
from kobza.lab.report import FORMAT, result_path
from kobza.run import write_tokens
from kobza.tokenizer import Tokenizer, load_tokenizer

HELD_OUT_SHARE = 0.9  # of the held-out text at most is evaluated, so that it is held out under every tokenizer
SETTINGS = [name for name in WITHOUT_EFFECT if name not in ("train.steps", "model.vocab_size")]


def digest(value: Any) -> str:
    """A short checksum of anything JSON can hold, the same in every process."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def source_digest() -> str:
    """A checksum of kobza's core and kernels as they stand: what computes a run."""
    package = Path(kobza.__file__).parent
    files = [p for p in sorted(package.glob("*.py")) if p.name not in ("cli.py", "__main__.py")]
    files += sorted((package / "kernels").glob("*.py"))
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


# ---- texts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenSet:
    """A text under a DataConfig, tokenised: its folder and what is known of it."""

    folder: str
    digest: str
    vocab_size: int
    n_tokens: int
    n_bytes: int


def token_set(out: Path, text: list[str], config: RunConfig, tokenizer: Tokenizer | None = None) -> TokenSet:
    """The tokens of a text, made once and then found again. `tokenizer`: one made elsewhere; None: the config's own kind."""
    spelled = tokenizer and hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    folder = out / "tokens" / digest([text_digest(text), to_dict(config.data), spelled])
    if not (folder / "tokens" / "index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_tokens(folder, config, text, tokenizer)
    corpus = load_corpus(folder / "tokens", config.model.max_seq_len)
    index = corpus.index
    return TokenSet(str(folder), index["sha256"][:16], index["vocab_size"], index["n_tokens"], index["n_bytes"])


def text_digest(text: list[str]) -> str:
    """A checksum of the files' contents, in order; of a single file its own sha256."""
    found = []
    for file in find_files(text):
        require(file != "-", "a lab cannot read standard input: it reads the text again when it goes on; give a file")
        with open(file, "rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def held_out_bytes(asked: int, tokens: TokenSet, data: DataConfig) -> int:
    """How many bytes at the text's end are evaluated: `asked`, or what is surely held out, if that is less."""
    return min(asked, int(tokens.n_bytes * data.val_fraction * HELD_OUT_SHARE))


def load_tokens(folder: str, config: RunConfig) -> tuple[Any, Tokenizer]:
    """A TokenSet's Corpus and Tokenizer."""
    path = Path(folder)
    tokenizer = load_tokenizer(path / "tokenizer.json", config.data.unknown)
    return load_corpus(path / "tokens", config.model.max_seq_len), tokenizer


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One run to be done: everything a worker needs, picklable. `values` makes its RunConfig."""

    hash: str
    label: str
    seed: int
    values: dict[str, Any]
    tokens: str
    eval_bytes: int
    evaluations: int
    device: str
    flops: int  # of the whole run


def trial_hash(config: RunConfig, tokens: TokenSet, eval_bytes: int, evaluations: int, device: str) -> str:
    """The name of a run: equal for equal results, different for whatever may change one."""
    values = to_dict(config)
    for name in SETTINGS:
        section, _, key = name.partition(".")
        del values[section][key]
    files = [text_digest([file]) for file in given_files(config)]
    versions = [FORMAT, kobza.__version__, torch.__version__]
    return digest([values, tokens.digest, eval_bytes, evaluations, device, files, versions])


def given_files(config: RunConfig) -> list[str]:
    """Files besides the text that decide a run: train.embeddings FILE.safetensors:KEY -> [FILE.safetensors]"""
    file, suffix, _ = config.train.embeddings.partition(".safetensors")
    return [file + suffix] if file else []


def write_result(out: Path, name: str, result: dict[str, Any]) -> None:
    """Keep a result, whole or not at all."""
    path = result_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(result, allow_nan=False) + "\n")


# ---- designs -------------------------------------------------------------------------------------------------------


def write_design(
    out: Path, design: Design, arms: list[Arm], trials: dict[tuple[str, str], dict[int, Trial]], facts: dict[str, Any]
) -> Path:
    """Note which arm is which run, so that a report needs the folder alone -> the design's folder."""
    folder = out / design.name
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "name": design.name,
        "title": design.title,
        "plan": design.plan,
        "measure": design.measure,
        "at": design.at,
        "alpha": design.alpha,
        "repeats": design.repeats,
        "n_seeds": len(design.seeds),
        "budget": vars(design.budget) | {"words": design.budget.words()},
        "factors": {name: [level.name for level in levels] for name, levels in design.factors.items()},
        "base": design.base_name,
        **facts,
        "arms": [
            {
                "name": arm.name,
                "size": arm.size,
                "levels": arm.levels,
                "values": arm.values,
                "runs": {str(seed): trial.hash for seed, trial in trials[arm.size, arm.name].items()},
            }
            for arm in arms
        ],
    }
    write_file(folder / "design.json", json.dumps(content, indent=1) + "\n")
    return folder
