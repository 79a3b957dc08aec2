"""The user's own step: each bug by its own code, nothing on clean loops in three manners, what does not fit is refused."""

import textwrap

import pytest
import torch

from kobza.config import InputError
from kobza.doctor.finding import examine, exit_code
from kobza.doctor.mutations import train as proof
from kobza.doctor.training import steps, train
from kobza.doctor.training.steps import Subject, open_, without_dropout
from kobza.doctor.training.update_equals import one_update
from kobza.doctor.training.update_groups import squeezed

MUTATIONS = {f"{m.code} {m.name}": m for m in proof.MUTATIONS}
SLOW = {
    "R10 clip on a share of the norm",
    "R10 each rank divides by its own count",
}  # two processes each; selftest makes them


def found(subject, codes=""):
    """Findings of the checks that may report one of the codes (all where none is given)."""
    checks = [c for c in train.CHECKS if not codes or set(codes.split()) & set(c.codes.split())]
    outcomes = examine(checks, subject)
    assert not [o.reason for o in outcomes if o.status == "failed"]
    return [finding for outcome in outcomes for finding in outcome.findings]


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name not in SLOW])
@pytest.mark.filterwarnings("ignore:Detected call of")  # that is the bug
def test_each_bug_is_caught_by_its_own_code(name, tmp_path):
    mutation = MUTATIONS[name]
    findings = found(mutation.make(tmp_path, 0, "fp32"), mutation.code)
    assert mutation.code in {f.code for f in findings}


CONTROLS = [c for c in proof.CONTROLS if c.name not in ("the Trainer's manner, llama", "the Trainer's manner, phi")]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: c.name)
def test_nothing_is_found_on_a_clean_step(control, tmp_path):
    assert found(control.make(tmp_path, 0, "fp32")) == []


@pytest.mark.parametrize("i", range(3))
def test_nothing_is_found_in_bf16(i, tmp_path):
    """The flavour and the seed change together; selftest crosses all."""
    assert found(proof.CONTROLS[(1, 5, 6)[i]].make(tmp_path, i, "bf16")) == []


def test_every_code_has_a_bug():
    declared = {code for check in train.CHECKS for code in check.codes.split()}
    assert declared == {mutation.code for mutation in proof.MUTATIONS}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (proof.MeanOfMeans, "a mean of micro-batch means"),
        (proof.TimesWindow, "times the 4 micro-batches"),
        (proof.DividedTwice, "divided by the 4 micro-batches twice"),
    ],
)
def test_the_wrong_normalisation_is_named(kind, told, tmp_path):
    (finding,) = found(proof.make(kind, proof.LLAMA)(tmp_path, 0, "fp32"), "R9")
    assert told in finding.got and finding.severity == "error"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("optimizer not loaded", "optimizer state"),
        ("schedule not loaded", "the schedule"),
        ("place in the data not loaded", "the place in the data"),
        ("generators not loaded", "the random generators"),
    ],
)
def test_what_a_resume_loses_is_named(name, part, tmp_path):
    (finding,) = found(MUTATIONS[f"R18 {name}"].make(tmp_path, 0, "fp32"), "R18")
    assert part in finding.got
    assert finding.severity == ("warn" if part == "the random generators" else "error")


def test_growing_residual_stream_is_told_apart(tmp_path):
    findings = found(MUTATIONS["R14 residual projections too wide"].make(tmp_path, 0, "fp32"), "R14")
    assert "blocks" in {f.where for f in findings}


def test_a_double_shift_names_ids_that_can_be_tried(tmp_path):
    """The counter-example holds the row, the place and both targets."""
    subject = MUTATIONS["R2 labels shifted twice"].make(tmp_path, 0, "fp32")
    (finding,) = found(subject, "R2")
    row = subject.fresh().rows([12, 12])
    assert str(row[0]) in finding.counterexample and f"pulled to {row[0][5]}, not {row[0][4]}" in finding.counterexample


def test_parts_that_are_missing_are_skipped_with_a_reason(tmp_path):
    outcomes = examine(train.CHECKS, proof.CONTROLS[5].make(tmp_path, 0, "fp32"))
    reasons = {o.codes: o.reason for o in outcomes if o.status == "skipped"}
    assert reasons["R17"] == "make_step gives no evaluate" and reasons["R25"] == "make_step gives no ema"
    assert reasons["R4"].startswith("batch(rows) takes rows of one length only") and exit_code(outcomes) == 0


DICT_STEP = """
    import torch, torch.nn as nn, torch.nn.functional as F

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
            nn.init.normal_(self.table.weight, std=0.02)
        def forward(self, ids):
            return self.head(self.table(ids).cumsum(1))

    def make_step(seed):
        torch.manual_seed(seed)
        net = Net()
        opt = torch.optim.SGD(net.parameters(), 0.1)
        def step(window):
            n = sum(b[:, 1:].numel() for b in window)
            total = 0.0
            for b in window:
                loss = F.cross_entropy(net(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten(), reduction="sum") / n
                loss.backward()
                total += loss.item()
            opt.step()
            {clear}
            return total
        return {{"model": net, "optimizer": opt, "batch": torch.tensor, "step": step, "vocab_size": 50}}
"""


@pytest.mark.parametrize(("clear", "codes"), [("opt.zero_grad()", set()), ("pass", {"R23"})])
def test_a_file_with_a_dict_is_a_step_too(clear, codes, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(DICT_STEP).format(clear=clear))
    assert {f.code for f in found(open_(f"{file}:make_step"))} == codes


@pytest.mark.parametrize(
    ("text", "spec", "told"),
    [
        ("", "mine.py", "write module:make_step"),
        ("", "mine.py:make_step", "no function 'make_step'"),
        ("def make_steps(): pass", "mine.py:make_step", "did you mean"),
        ("def make_step(seed): return {}", "mine.py:make_step", "has no 'model'"),
        ("def make_step(seed): return {'model': 1, 'batch': 1, 'step': 1}", "mine.py:make_step", "not an nn.Module"),
        (
            "def make_step(seed): return 1 / 0",
            "mine.py:make_step",
            "ZeroDivisionError: division by zero (line 1 of mine.py)",
        ),
        ("def make_step(a, b): pass", "mine.py:make_step", "called as make_step(seed=0)"),
        ("def make_step(:", "mine.py:make_step", "SyntaxError"),
        ("", "no_such_module_here:make_step", "no such module"),
        ("", "gone.py:make_step", "no such file"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(text, spec, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InputError) as error:
        open_(spec)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_contract_names_every_part():
    for part in (*steps.NEEDED, *steps.OPTIONAL):
        assert part in steps.CONTRACT or part == "scaler", part


def test_watching_leaves_nothing_behind(tmp_path):
    """Hooks and wrapped functions are gone after an update."""
    clip, scale = torch.nn.utils.clip_grad_norm_, torch.amp.GradScaler.scale
    step = proof.CONTROLS[0].make(tmp_path, 0, "fp32").fresh()
    step.update(step.window([[6], [4]]))
    assert torch.nn.utils.clip_grad_norm_ is clip and torch.amp.GradScaler.scale is scale
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in step.model.modules())


def test_unclipped_gradients_are_the_raw_ones(tmp_path):
    """Beside a limit of 1e-3 the doctor sees the whole gradient."""

    class Tight(proof.Trainer):
        clip = 1e-3

        def step(self, window):
            return super().step(window)["loss"]  # with the norm told, the doctor could undo the clip by it

    tight = proof.make(Tight, proof.LLAMA)(tmp_path, 0, "fp32")
    free = proof.make(proof.Trainer, proof.LLAMA)(tmp_path, 0, "fp32")
    a, b = (one_update(subject, [[8], [5]]).raw() for subject in (tight, free))
    assert torch.allclose(a, b) and b.norm() > 0.1


def test_dropout_is_off_everywhere(tmp_path):
    config = proof.with_dropout(proof.GPT2)
    step = without_dropout(Subject(lambda seed: proof.Trainer(config, seed, "fp32")).fresh())
    ids = torch.randint(4, 90, (2, 9))
    with torch.no_grad():
        assert torch.equal(step.model.train()(ids).logits, step.model(ids).logits)


def test_calls_are_counted():
    assert squeezed(["a", "a", "b", "a"]) == ["a x2", "b", "a"]


@pytest.mark.parity
@pytest.mark.parametrize(("counted", "codes"), [(True, set()), (False, {"R9"})])
def test_a_step_around_a_transformers_model(counted, codes):
    """transformers' own loss is right when it is told the window's number of targets, and a mean of means when it is not."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 90,
    }

    def make_step(seed):
        transformers.set_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=32))
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)

        def batch(rows):
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

        def step(window):
            n = sum((b["labels"][:, 1:] != -100).sum() for b in window)
            told = {"num_items_in_batch": n} if counted else {}
            losses = [model(**b, **told).loss / (1 if counted else len(window)) for b in window]
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": sum(losses).item()}

        def load(state):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

        def state_dict():
            return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

        return {
            "model": model,
            "optimizer": optimizer,
            "batch": batch,
            "step": step,
            "state_dict": state_dict,
            "load_state_dict": load,
        }

    assert {f.code for f in found(Subject(make_step))} == codes
