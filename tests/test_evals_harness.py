"""lm-evaluation-harness runs our checkpoints, and what it reports is what our own scoring says."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_run import verse

from kobza import __version__
from kobza.checkpoint import load_checkpoint, save_checkpoint
from kobza.config import InputError, ModelConfig, RunConfig, SampleConfig
from kobza.evals.score import score
from kobza.evals.tasks import choose, read_tasks
from kobza.generate import generate
from kobza.model import build
from kobza.tokenizer import CharTokenizer

WITHOUT = """
import runpy, sys
sys.modules["lm_eval"] = None
sys.argv = ["harness"]
runpy.run_module("kobza.evals.harness", run_name="__main__")
"""


def test_without_the_harness_one_line_says_how_to_get_it():
    process = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert 'pip install "kobza[lm-eval]"' in process.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a model with opinions."""
    tokenizer = CharTokenizer.train([verse()])
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=16, n_layer=1, n_head=2, n_embd=16)
    model = build(config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    made = tmp_path_factory.mktemp("harness") / "checkpoint"
    save_checkpoint(made, model, RunConfig(config), tokenizer, {"kobza": __version__, "step": 0})
    return made


@pytest.fixture(scope="module")
def adapter(folder):
    pytest.importorskip("lm_eval", reason="needs kobza[lm-eval]")
    from kobza.evals.harness import Kobza

    return Kobza(run=str(folder), device="cpu", batch_size=1)


def ask(*arguments):
    return SimpleNamespace(args=arguments)


def test_loglikelihoods_are_ours(adapter, folder):
    pairs = [("bade ", "goli"), ("bade", " goli"), ("", "Ba"), (verse(200), "ru\n"), ("a", verse(100, 3))]
    loaded = load_checkpoint(folder)
    found = adapter.loglikelihood([ask(*pair) for pair in pairs])
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        begin = len(context.rstrip(" "))
        (ours,) = score(loaded.model, loaded.tokenizer, [loaded.tokenizer.encode(context + continuation)], [begin])
        assert logprob == pytest.approx(float(ours.logprob.sum()), abs=1e-4) and greedy == bool(ours.greedy.all())


def test_greedy_is_what_generation_writes(adapter, folder):
    loaded = load_checkpoint(folder)
    prompt = loaded.tokenizer.encode("bade").tolist()
    config = SampleConfig(tokens=6, temperature=0.0)
    text = loaded.tokenizer.decode([c.ids[0] for c in generate(loaded.model, [prompt], config)])
    assert adapter.loglikelihood([ask("bade", text)])[0][1] and not adapter.loglikelihood([ask("bade", "Du.Du.")])[0][1]


def test_rolling_adds_up_windows_side_by_side(adapter, folder):
    loaded, text = load_checkpoint(folder), verse(150)
    (found,) = adapter.loglikelihood_rolling([ask(text)])
    ids = np.concatenate([loaded.tokenizer.encode("\n"), loaded.tokenizer.encode(text)])
    total, n = 0.0, len(ids)
    for first in range(1, n, 16):  # the harness's own rule: windows side by side, the last one full
        stop = min(first + 16, n)
        with torch.no_grad():
            start = max(0, stop - 17)
            logits = loaded.model(torch.from_numpy(ids[start : stop - 1].astype(np.int64))[None])[0].log_softmax(-1)
        total += sum(float(logits[i - 1 - start, ids[i]]) for i in range(first, stop))
    assert found == pytest.approx(total, abs=1e-3)


def test_generation_stops_where_it_is_told(adapter):
    settings = {"until": [" ", "\n"], "max_gen_toks": 40}
    whole, cut = (adapter.generate_until([ask("ba", s)])[0] for s in ({"until": [], "max_gen_toks": 40}, settings))
    places = [whole.find(stop) for stop in " \n" if stop in whole]
    assert len(whole) == 40 and cut == whole[: min(places, default=40)]
    drawn = {"until": [], "max_gen_toks": 40, "do_sample": True, "temperature": 1.0}
    assert adapter.generate_until([ask("ba", drawn)])[0] != whole
    with pytest.raises(InputError, match="unknown 'num_beams'"):
        adapter.generate_until([ask("ba", {"num_beams": 4})])


def test_an_unknown_model_argument_is_refused(folder):
    pytest.importorskip("lm_eval", reason="needs kobza[lm-eval]")
    from kobza.evals.harness import Kobza

    with pytest.raises(InputError, match="unknown model_args ruin; did you mean run"):
        Kobza(run=str(folder), ruin="x")


CHOICES = [
    {"prompt": "bade ", "choices": ["goli", "ba", "ru ro"], "answer": 1},
    {"prompt": "Ra ro", "choices": [" du", "\n\nBa", "."], "answer": 0},
    {"prompt": "Pede:", "choices": ["\n", " ", ","], "answer": 2},
]
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\ndoc_to_text: prompt\n"
CHOICE = COMMON + "task: mine_choice\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
CHOICE += 'target_delimiter: ""\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
WRITE = (
    COMMON + "task: mine_write\noutput_type: generate_until\ndoc_to_target: answer\ngeneration_kwargs:\n  until: []\n"
)
WRITE += "  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n"


@pytest.mark.slow
def test_the_harness_runs_custom_tasks_over_local_files(folder, tmp_path):
    pytest.importorskip("lm_eval", reason="needs kobza[lm-eval]")
    data, tasks, out = tmp_path / "data.jsonl", tmp_path / "tasks", tmp_path / "out"
    data.write_text("".join(json.dumps(line) + "\n" for line in CHOICES))
    tasks.mkdir()
    (tasks / "choice.yaml").write_text(CHOICE.format(data=data))
    (tasks / "write.yaml").write_text(WRITE.format(data=data))
    argv = (
        f"--model kobza --model_args run={folder} --tasks mine_choice,mine_write --include_path {tasks} --device cpu "
    )
    argv += f"--output_path {out} --log_samples"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "kobza.evals.harness", *argv.split()]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert process.returncode == 0, process.stderr[-2000:]
    (path,) = out.rglob("samples_mine_choice_*.jsonl")
    samples = {s["doc"]["prompt"]: s for s in map(json.loads, path.read_text().splitlines())}
    loaded = load_checkpoint(folder)
    judged = choose(loaded.model, loaded.tokenizer, read_tasks(data))
    for one in judged:
        theirs = [float(pair[0]) for pair in samples[one.item.prompt]["filtered_resps"]]
        assert theirs == pytest.approx(list(one.logprobs), abs=1e-3)
    (path,) = out.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]["mine_choice"]
    assert results["acc,none"] == pytest.approx(sum(one.right for one in judged) / 3)
    assert results["acc_norm,none"] == pytest.approx(sum(one.normalised_right for one in judged) / 3)
