"""The plan before a tuning: slices of the model tell what its whole takes, within a tenth of what is measured."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

from kobza.config import ModelConfig, TrainConfig
from kobza.finetune.config import MethodConfig
from kobza.finetune.example import Packed
from kobza.finetune.lora import add_lora
from kobza.finetune.plan import Live, estimate, measure
from kobza.finetune.sft import sft_loss
from kobza.model import Block, build
from kobza.optim import make_optimizers
from kobza.surgery import replace_modules
from kobza.train import IGNORE, train_step

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is only read anew on Linux")


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """What pytest has loaded need not be searched each time that a measure lets go of a model."""
    gc.freeze()
    yield
    gc.unfreeze()


class Recomputed(nn.Module):
    """A block that keeps its input alone."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, views, cache):
        return checkpoint(self.block, x, views, cache, use_reentrant=False)


def full(model):
    return make_optimizers(model, TrainConfig())


def lora(model):
    model.requires_grad_(False)
    add_lora(model, MethodConfig(rank=8), seed=0)
    return full(model)


def recomputed(model):
    replace_modules(model, lambda _, module: isinstance(module, Block), Recomputed)
    return full(model)


METHODS = {"full": full, "lora": lora, "recomputed": recomputed}


def make(
    n_layer, method="full", n_embd=64, lines=4, T=64, V=128, accumulate=1, n_documents=1, answers=False, dtype=None
):
    """A model of so many blocks and its step, as the recipe makes them."""
    switches = dict(n_head=4, n_kv_head=2, n_ff=3 * n_embd, mlp="swiglu", norm="rmsnorm", max_seq_len=T, init="gpt2")
    model = build(ModelConfig(vocab_size=V, n_embd=n_embd, n_layer=n_layer, **switches))
    optimizers = METHODS[method](model)
    ids = torch.randint(V, (lines, T + 1), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    if answers:
        targets[:, :-5] = IGNORE
    documents = (torch.arange(T) * n_documents // T).expand(lines, T)
    batch = Packed(ids[:, :-1], targets, (torch.arange(T) % (T // n_documents)).expand(lines, T), documents)
    return model, lambda: train_step(model, optimizers, [batch] * accumulate, sft_loss(dtype))


CASES = {
    "full": dict(),
    "full, a window of two": dict(accumulate=2),
    "full, few tokens": dict(n_embd=128, lines=1, T=8),
    "large vocabulary": dict(V=4096),
    "lora": dict(method="lora"),
    "lora, answers, bf16": dict(method="lora", answers=True, dtype=torch.bfloat16, n_embd=96),
    "packed": dict(method="lora", n_documents=4, T=128),
    "recomputed": dict(method="recomputed"),
}


@pytest.mark.parametrize("case", CASES)
def test_slices_tell_what_the_tensors_of_the_whole_take(case):
    expected = estimate(partial(make, **CASES[case]), 8, 1)
    found = measure(partial(make, 8, **CASES[case]))
    tensors = sum(n for name, n in expected.parts.items() if name not in ("process", "allocator"))
    assert tensors == pytest.approx(max(found.moments.values()), rel=0.02)
    assert expected.parts["weights"] == found.weights
    assert expected.parts["optimizer state"] == pytest.approx(found.state, rel=1e-3)
    assert sum(expected.parts.values()) == expected.peak_bytes and min(expected.parts.values()) >= 0


def test_recomputing_and_adapters_take_less():
    """What the plan is asked for: which of the methods fits."""
    peaks = {method: max(measure(partial(make, 6, method)).moments.values()) for method in METHODS}
    assert peaks["recomputed"] < 0.7 * peaks["full"] and peaks["lora"] < 0.95 * peaks["full"]


def test_a_moment_that_is_lower_in_the_slices_may_be_the_highest_at_depth():
    """Weights grow with depth and are made at twice their size; a step's tensors stay as they are."""

    def make(n_layer):
        model = nn.Linear(1000, 100 * n_layer)
        spare = model.weight.detach().clone()
        del spare
        return model, lambda: torch.zeros(1_500_000).sum()

    expected = estimate(make, 20, 1)
    found = measure(partial(make, 20))
    assert "making" in expected.parts and max(found.moments, key=found.moments.get) == "making"
    assert expected.peak_bytes - expected.parts["process"] - expected.parts["allocator"] == pytest.approx(
        found.moments["making"], rel=0.02
    )


def test_weights_that_no_operation_made_count_too():
    """A file's, read into memory by a library."""
    weight = nn.Parameter(torch.zeros(500, 100))

    def make():
        model = nn.Linear(1, 1)
        model.weight = weight
        return model, lambda: None

    assert measure(make).moments["making"] >= 200_000


def test_live_counts_tensors_while_they_live():
    with Live() as live:
        a = torch.zeros(1000)
        assert live.since() == 4000
        b = a[10:].view(-1, 10)  # the same memory
        a = torch.add(a, 1)
        assert live.now == 8000
        del b
        assert (live.now, live.since()) == (4000, 8000)
        w = torch.ones(1000, requires_grad=True)
        (w.exp() * a).sum().backward()
        assert w.grad is not None and live.since() >= 5 * 4000
        outside = torch.nn.Parameter(w.detach())
        live.see([outside, None, 3])
        before = live.now
        del a, w, outside
    assert live.now < before


# ---- in the measure of a person: the memory of the process, and seconds ----

PROGRAM = """
    import ctypes, json, os, sys, time
    from functools import partial
    import torch
    torch.set_num_threads(1)
    import test_finetune_plan as t
    from kobza.device import keep_freed_memory
    from kobza.finetune.plan import estimate, measure, process_peak

    def planned(method):
        expected = estimate(partial(t.make, **t.CASE, method=method), 8, 10)
        return expected.peak_bytes, expected.seconds_per_step, "torch._dynamo" in sys.modules

    def tuned(method):
        _, step = t.make(8, **t.CASE, method=method)
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        return process_peak(), min(seconds), "torch._dynamo" in sys.modules

    def without_holes(method):
        for name in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: what is larger goes back to the system at once
            ctypes.CDLL(None).mallopt(name, 1 << 16)
        measure(partial(t.make, 1, **t.CASE))  # what libraries take once
        found = measure(partial(t.make, 3, **t.CASE))
        return found.peak - found.base, max(found.moments.values())

    for task in sys.argv[1:]:
        what, method = task.split(":")
        if not os.fork():  # a process for each, with what is imported once
            if what != "without_holes":
                keep_freed_memory()
            print(json.dumps([task, globals()[what](method)]), flush=True)
            os._exit(0)
        os.wait()
"""
CASE = dict(n_embd=128, lines=8, T=128, V=1024)


@pytest.fixture(scope="module")
def told():
    """What each task of PROGRAM tells, by its name."""
    folder = os.path.dirname(__file__)
    path = os.pathsep.join([folder, os.path.dirname(folder)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    tasks = [
        *(f"{what}:{method}" for method in ("lora", "full") for what in ("planned", "tuned")),
        "without_holes:full",
    ]
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *tasks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(tasks), done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@linux
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_estimate_is_within_a_tenth_of_the_process(method, told):
    """Of what the system says that a process took which knows nothing of plans."""
    expected, found = told[f"planned:{method}"], told[f"tuned:{method}"]
    assert expected[0] == pytest.approx(found[0], rel=0.1)
    assert found[1] / 4 < expected[1] < found[1] * 4  # seconds, on a machine that does other things too
    assert expected[2] == found[2], "one of them imports torch's compiler"


@linux
def test_counted_tensors_are_what_the_process_takes_where_malloc_leaves_no_holes(told):
    taken, tensors = told["without_holes:full"]
    assert taken == pytest.approx(tensors, rel=0.05)


def test_seconds_are_a_line_too():
    def make(n_layer):
        return nn.Linear(1, 1), lambda: time.sleep(0.02 + 0.01 * n_layer)

    expected = estimate(make, 12, n_steps=50, share=0.5)
    assert expected.seconds_per_step == pytest.approx(0.07, rel=0.25)
    assert expected.seconds == pytest.approx(50 * expected.seconds_per_step)


def test_a_shallow_model_is_measured_whole():
    made = []

    def make(n_layer):
        made.append(n_layer)
        return nn.Linear(1, 1), lambda: None

    estimate(make, 3, 1)
    assert made == [1, 3]
    estimate(make, 30, 1)
    assert made[2:] == [1, 2, 4, 6]


def test_on_a_gpu_torch_is_asked(monkeypatch):
    """Its counters, played here: 7 are taken before, 300 to make a model of 100, and 50 more in a step."""
    now, most = [7], [7]

    def take(n):
        now[0] += n
        most[0] = max(most[0], now[0])

    def make():
        take(300)
        take(-200)
        return nn.Linear(1, 1), lambda: (take(50), take(-50))

    plays = dict(memory_allocated=lambda device: now[0], max_memory_allocated=lambda device: most[0])
    plays |= dict(reset_peak_memory_stats=lambda device: most.__setitem__(0, now[0]), synchronize=lambda device: None)
    for name, play in (plays | dict(empty_cache=lambda: None)).items():
        monkeypatch.setattr(torch.cuda, name, play)
    found = measure(make, torch.device("cuda"))
    assert (found.base, found.peak, found.moments["making"]) == (7, 307, 300)


def test_no_hook_and_no_mode_is_left_even_after_an_error():
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        measure(lambda: (nn.Linear(1, 1), fail))
    assert not _global_optimizer_pre_hooks and not _global_optimizer_post_hooks
    measure(partial(make, 1))
    assert not _global_optimizer_pre_hooks and not torch.utils._python_dispatch._get_current_dispatch_mode()
