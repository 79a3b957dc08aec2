"""LoRA on a table of the Titanic: `kobza finetune` beside PEFT + TRL, in turn, on the same rows in the same batches.

    python benchmarks/finetune.py [--model smollm2] [--steps 60] [--dtype bf16] [--repeats 3] [--checkpointing] [--note WORDS]

Both sides are processes of their own: theirs an SFTTrainer with a LoraConfig, the loss of the completion alone, and the rows as
ids in the order in which kobza took them; the same rank, alpha, targets, rate, AdamW, clipping and seed, the base in the dtype,
LoRA's matrices in float32. TRL's default, to compute activations again, is off unless asked for (it would slow theirs down by a
third). Tokens a second are those of the rows without padding: at a median step, and of all steps over the process' whole life,
imports, loading and, on our side, two looks at the held-out rows included. The peak is what the system calls the process' largest
resident set. With --note the medians go to benchmarks/results.csv; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
N_ROWS = 1_000
HELD_OUT = 0.104  # leaves 896 rows, whole batches of 8
LR, RANK, ALPHA, MICRO_BATCH, MAX_LEN, SEED = 2e-4, 16, 32, 8, 512, 0
PROMPT = (
    "Did this passenger of the Titanic survive? Answer yes or no.\nName: {name}\nSex: {sex}[[\nAge: {age}]]\nClass: {pclass}\n"
    "Siblings and spouses aboard: {sibsp}\nParents and children aboard: {parch}[[\nFare: {fare}]][[\nPort: {embarked}]]"
)
WARM = 3  # steps that are not counted


def main(arguments: argparse.Namespace) -> None:
    """Prepare once, race `repeats` times, print, and append the medians where there is a note."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table(folder / "titanic.csv")
        races = [race(folder / str(i), folder / "titanic.csv", arguments) for i in range(arguments.repeats)]
    rows = {key: [one[key] for one in races] for key in races[0] if key != "losses"}
    if arguments.note:
        sys.path.insert(0, str(HERE))
        from speed import report

        report(
            f"finetune {arguments.model} {arguments.dtype}{' recomputed' * arguments.checkpointing}",
            rows,
            arguments.note,
        )
    else:
        for key, values in rows.items():
            print(f"{key:34} median {statistics.median(values):12.4g}   {min(values):.4g} .. {max(values):.4g}")
    print("\nstep   theirs     ours")
    theirs, mine = races[-1]["losses"]
    for i in sorted({*range(0, len(mine), max(1, len(mine) // 12)), len(mine) - 1}):
        print(f"{i + 1:4} {theirs[i]:8.4f} {mine[i]:8.4f}")


def table(path: Path) -> None:
    """N_ROWS passengers drawn by the seed."""
    from kobza.hub.titanic import titanic

    with open(titanic()[0], newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *random.Random(SEED).sample(rows, N_ROWS)])


def race(folder: Path, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours, then theirs on the rows that ours took -> figures and ratios."""
    folder.mkdir()
    mine = timed(ours(folder / "ours", data, arguments))
    order = [str(HERE / "finetune.py"), "--side", "prepare", "--work", str(folder), "--model", arguments.model]
    timed([*order, "--steps", str(arguments.steps), "--dtype", arguments.dtype])
    batches = json.loads((folder / "batches.json").read_text())
    side = [str(HERE / "finetune.py"), "--side", "theirs", "--work", str(folder), "--dtype", arguments.dtype]
    theirs = timed([*side, "--steps", str(arguments.steps), *(["--checkpointing"] * arguments.checkpointing)])
    tokens = [sum(len(row["input_ids"]) - 1 for row in batch) for batch in batches["rows"]]
    records = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    seconds = [places / record["tokens_per_second"] for places, record in zip(batches["places"], records, strict=True)]
    told = json.loads((folder / "theirs.json").read_text())
    found: dict[str, Any] = {"losses": (told["losses"], [record["train_loss"] for record in records])}
    for name, steps, (wall, peak) in (("theirs", told["seconds"], theirs), ("ours", seconds, mine)):
        rates = [n / s for n, s in zip(tokens[WARM:], steps[WARM:], strict=True)]
        found[f"{name}_tokens_per_second"] = statistics.median(rates)
        found[f"{name}_tokens_per_second_process"] = sum(tokens) / wall
        found[f"{name}_peak_bytes"] = peak
        found[f"{name}_mean_loss"] = statistics.mean(found["losses"][name == "ours"])
    for key in ("tokens_per_second", "tokens_per_second_process", "peak_bytes"):
        found[f"{key}_ratio"] = found[f"ours_{key}"] / found[f"theirs_{key}"]
    print(", ".join(f"{key} {found[f'{key}_ratio']:.3f}" for key in ("tokens_per_second", "peak_bytes")), flush=True)
    return found


def timed(command: list[str]) -> tuple[float, int]:
    """Run Python to its end -> wall seconds and peak resident bytes. This process stays small: a child's peak begins at ours."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen([sys.executable, *command], stdout=told, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.perf_counter() - began, os.waitstatus_to_exitcode(status)
        told.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{told.read().decode(errors='replace')[-4000:]}")
    return seconds, usage.ru_maxrss * 1024


def ours(out: Path, data: Path, arguments: argparse.Namespace) -> list[str]:
    """The command a user gives."""
    train = {"steps": arguments.steps, "micro-batch": MICRO_BATCH, "optimizer": "adamw", "lr": LR, "beta2": 0.999}
    train |= {"warmup-steps": 0, "schedule": "constant", "eval-interval": arguments.steps, "precision": arguments.dtype}
    words = [word for name, value in train.items() for word in (f"--train.{name}", str(value))]
    rest = {"rank": RANK, "alpha": ALPHA, "max-len": MAX_LEN, "val-fraction": HELD_OUT, "seed": SEED}
    words += [word for name, value in rest.items() for word in (f"--{name}", str(value))]
    words += ["--checkpointing", "on"] if arguments.checkpointing else []
    command = ["-m", "kobza", "finetune", arguments.model, str(data), "--prompt", PROMPT, "--answer", "{survived}"]
    return [*command, "--out", str(out), "--device", "cpu", *words]


# ---- in processes of their own -----------------------------------------------------------------------------------------


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """The model as a Hugging Face folder, and the rows of each step as kobza took them."""
    import torch
    from safetensors.torch import save_file

    from kobza.finetune.base import load_base
    from kobza.finetune.rows import PackedBatches, load_rows
    from kobza.formats.stock import config_to_hf
    from kobza.formats.weights import to_hf
    from kobza.hub.store import find_model

    loaded = load_base(find_model(Path(arguments.model)))
    end = next(name for name, i in loaded.tokenizer.specials.items() if i == loaded.tokenizer.ends[0])
    hf = config_to_hf(loaded.run.model) | {"dtype": "float32"}
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(hf))
    (folder / "hf" / "end.txt").write_text(end)
    shutil.copy(loaded.folder / "tokenizer.json", folder / "hf")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    tensors = to_hf(loaded.run.model, hf, {name: p.detach() for name, p in loaded.model.named_parameters()})
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "hf" / "model.safetensors", {"format": "pt"})
    rows = load_rows(folder / "ours" / "rows" / "train")
    batches = PackedBatches(rows, MICRO_BATCH, MAX_LEN, SEED, packing=False)
    steps, places = [], []
    for _ in range(arguments.steps):
        lines = batches.order[batches.position]
        places.append(next(batches).inputs.numel())
        assert len(lines) == MICRO_BATCH, "a short batch would shift theirs"
        steps.append([theirs_row(rows[line[0]]) for line in lines])
    (folder / "batches.json").write_text(json.dumps({"rows": steps, "places": places}))


def theirs_row(row: Any) -> dict[str, list[int]]:
    """A row as SFTTrainer takes one that is prepared."""
    ids = row.ids.tolist()
    return {"input_ids": ids, "labels": [i if learned else -100 for i, learned in zip(ids, row.learned, strict=True)]}


def theirs(folder: Path, arguments: argparse.Namespace) -> None:
    """PEFT + TRL on those rows, in that order."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype)
    end = (folder / "hf" / "end.txt").read_text()
    rows = [row for batch in json.loads((folder / "batches.json").read_text())["rows"] for row in batch]
    trainer = InOrder(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "theirs"), max_steps=arguments.steps, per_device_train_batch_size=MICRO_BATCH,
            learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0, seed=SEED,
            adam_beta2=0.999, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            bf16=arguments.dtype == "bf16", gradient_checkpointing=arguments.checkpointing, max_length=MAX_LEN,
            dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "hf" / "tokenizer.json"), eos_token=end, pad_token=end
        ),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [end - began for began, end in zip(times[::2], times[1::2], strict=True)]
    (folder / "theirs.json").write_text(json.dumps({"losses": losses, "seconds": seconds}))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="both compute activations again")
    parser.add_argument("--note", default="", help="append the medians to results.csv with these words")
    parser.add_argument("--side", choices=("prepare", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0 < arguments.steps <= int(N_ROWS * (1 - HELD_OUT)) // MICRO_BATCH:
        parser.error(f"--steps is {arguments.steps}; one pass over the rows is 112")
    return arguments


if __name__ == "__main__":
    arguments = parsed()
    if arguments.side:
        {"prepare": prepare, "theirs": theirs}[arguments.side](arguments.work, arguments)
    else:
        from importlib.util import find_spec

        missing = [name for name in ("trl", "peft", "datasets") if find_spec(name) is None]
        if missing:
            sys.exit(f"the other side needs {', '.join(missing)}: pip install trl peft datasets")
        main(arguments)
