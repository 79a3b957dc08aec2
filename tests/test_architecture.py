"""The walls of docs/architecture.md. Each check is a function of source or text, and is seen to fail on a seeded violation."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kobza

PACKAGE = Path(kobza.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
OUTSIDE = ("cli.py", "cli_doctor.py", "cli_serve.py", "cli_ship.py", "cli_tune.py", "__main__.py", "__init__.py")
CORE = sorted(path for path in PACKAGE.glob("*.py") if path.name not in OUTSIDE)
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

needs_page = pytest.mark.skipif(not PAGE.exists(), reason="docs/architecture.md is not part of an installed package")


# ---- what the core must not contain ----

CALLS = {"exec", "eval", "hasattr", "__import__"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
ATTRIBUTES = {
    ("os", "environ"),
    ("os", "getenv"),
    ("os", "putenv"),
    ("torch", "load"),
    ("torch", "save"),
}  # torch pickles


def forbidden(source):
    """What a module may not use, as 'line n: what'."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Name) and node.id in CALLS:
            names = [node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"] * ((node.value.id, node.attr) in ATTRIBUTES)
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module] * (module.split(".")[0] in MODULES)
            names += [f"{module}.{a.name}" for a in node.names if a.name == "*" or (module, a.name) in ATTRIBUTES]
        found += [f"line {node.lineno}: {name}" for name in names]
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_has_no_hidden_doors(path):
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source, what",
    [
        ("import os\nx = os.environ['A']", "os.environ"),
        ("import os\nx = os.getenv('A')", "os.getenv"),
        ("from os import environ", "os.environ"),
        ("exec('x = 1')", "exec"),
        ("y = eval('1')", "eval"),
        ("f = eval", "eval"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("x = torch.load('a.pt')", "torch.load"),
        ("from torch import *", "torch.*"),
        ("def f(x):\n    if hasattr(x, 'bits'):\n        return 1", "hasattr"),
    ],
)
def test_seeded_hidden_doors_are_found(source, what):
    (found,) = forbidden(source)
    assert found.endswith(f": {what}")


def test_what_only_looks_like_a_hidden_door_is_let_pass():
    assert forbidden('model.eval()\n"""os.environ, exec"""\nfile.load()\nx.exec()') == []


def effects(source):
    """Statements of a module that do something when it is imported."""
    found = []
    for node in ast.parse(source).body:
        harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring and not isinstance(node, harmless):
            found.append(f"line {node.lineno}: {ast.unparse(node)[:60]}")
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_importing_the_core_only_defines(path):
    assert effects(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", ["torch.manual_seed(0)", "logging.basicConfig()", "if True:\n    x = 1", "os.x |= 1"])
def test_seeded_effects_are_found(line):
    assert len(effects(f'"""Doc."""\nimport os\nX = 1\n{line}\n')) == 1


# ---- budgets ----


def budgets(page):
    """{row: number} of the page's table of budgets."""
    return {
        name: int(n.replace(",", "")) for name, n in re.findall(r"^\| ([\w. ]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    }


def over_budget(lines, limits):
    """Complaints, out of lines a file and the table."""
    sizes = {**lines, "whole core": sum(lines.values())}
    complaints = [
        f"{name} has {n} lines; its budget is {limits[name]}" for name, n in sizes.items() if n > limits.get(name, 1e9)
    ]
    complaints += [f"{name} has no budget" for name in sizes if name not in limits]
    return complaints + [f"{name} is gone" for name in limits if name.endswith(".py") and name not in sizes]


def forward_lines(source):
    """{Class.function: lines of its statements} of every forward, and of `hidden`, which does GPT.forward's work."""
    found = {}
    for node in [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]:
        for function in [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name in ("forward", "hidden")]:
            body = function.body[1:] if ast.get_docstring(function) else function.body
            found[f"{node.name}.{function.name}"] = body[-1].end_lineno - body[0].lineno + 1 if body else 0
    return found


@needs_page
def test_every_file_keeps_its_budget():
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in CORE}
    assert over_budget(lines, budgets(PAGE.read_text(encoding="utf-8"))) == []


@needs_page
def test_every_forward_fits_half_a_screen():
    found = {}
    for name in ("layers.py", "model.py"):
        found |= forward_lines((PACKAGE / name).read_text(encoding="utf-8"))
    limit = budgets(PAGE.read_text(encoding="utf-8"))["longest forward of the model"]
    assert len(found) >= 12 and {name: n for name, n in found.items() if n > limit} == {}


def test_seeded_excess_is_found():
    limits = budgets("| file | budget |\n|---|---|\n| a.py | 10 |\n| b.py | 1,000 |\n| whole core | 500 |\n")
    assert limits == {"a.py": 10, "b.py": 1000, "whole core": 500}
    assert over_budget({"a.py": 10, "b.py": 20}, limits) == []
    assert over_budget({"a.py": 11, "b.py": 20}, limits) == ["a.py has 11 lines; its budget is 10"]
    assert over_budget({"a.py": 1, "b.py": 900}, limits) == ["whole core has 901 lines; its budget is 500"]
    assert over_budget({"a.py": 1, "b.py": 2, "c.py": 3}, limits) == ["c.py has no budget"]
    assert over_budget({"a.py": 1}, limits) == ["b.py is gone"]


def test_a_seeded_long_forward_is_found():
    source = 'class A:\n    def forward(\n        self, x\n    ):\n        """Doc."""\n' + "        x = x + 1\n" * 26
    assert forward_lines(source) == {"A.forward": 26}


def unnamed(page, names):
    """Names that do not stand at the beginning of a line of the page's tree."""
    return [name for name in names if not re.search(rf"^\s+{re.escape(name)}\s", page, re.MULTILINE)]


@needs_page
def test_the_tree_names_every_file_of_the_core_and_every_room():
    page = PAGE.read_text(encoding="utf-8")
    assert unnamed(page, [path.name for path in CORE] + [f"{room}/" for room in ROOMS]) == []
    assert unnamed(page, ["attic/"]) == ["attic/"]


# ---- what is loaded ----


def run_python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options)


def loaded(*arguments):
    """Names of all modules that a call of python imports."""
    process = run_python("-X", "importtime", *arguments)
    assert process.returncode == 0, process.stderr[-2000:]
    return set(re.findall(r"^import time:.*\| +([\w.]+)$", process.stderr, re.MULTILINE))


HEAVY = {"torch", "numpy", "tokenizers", "matplotlib", "safetensors"}


def test_help_loads_no_torch():
    modules = loaded("-m", "kobza", "--help")
    assert "kobza.cli" in modules and not modules & HEAVY and not any(m.startswith("kobza.recipes.") for m in modules)


def test_a_seeded_import_is_seen():
    assert "colorsys" in loaded("-c", "import colorsys") - loaded("-c", "pass")


# A finder that refuses the rooms, then a whole life of a model in the core alone.
LIFE = """
import importlib.abc, sys
from pathlib import Path

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(tuple("kobza." + room for room in ROOMS)):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import kobza.report
except ImportError:
    pass
else:
    raise SystemExit("the block does not block")
EXTRA
import torch
from kobza.checkpoint import load_checkpoint
from kobza.config import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from kobza.data import Batches
from kobza.device import make_runtime
from kobza.generate import generate
from kobza.log import MetricsLog
from kobza.model import build
from kobza.optim import make_optimizers
from kobza.run import Standing, Training, new_run, save_training
from kobza.surgery import watch
from kobza.train import next_token_loss, train

torch.set_num_threads(1)
folder = Path(sys.argv[1])
(folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\\n" * 20)
config = RunConfig(ModelConfig(n_layer=1, n_head=2, n_embd=16, max_seq_len=8), train=TrainConfig(steps=3, micro_batch=2))
(folder / "run").mkdir()
run = new_run(folder / "run", config, [str(folder / "text.txt")])
device = make_runtime("cpu", "fp32").device
model = build(run.config.model, 0, device)
batches = Batches(run.corpus.train, 2, 8, 0, device)
training = Training(model, make_optimizers(model, config.train), batches, None, Standing(), device)
log = MetricsLog(run.out / "metrics.jsonl")
for step in train(model, training.optimizers, batches, config.train, next_token_loss()):
    training.standing.step = step.step
    log.write({"step": step.step, "train_loss": step.loss})
save_training(run, training)
loaded = load_checkpoint(run.out)
ids = [c.ids[0] for c in generate(loaded.model, [loaded.tokenizer.encode("the").tolist()], SampleConfig(tokens=5))]
assert len(loaded.tokenizer.decode(ids)) == 5
rooms = [name for name in sys.modules if name.startswith(tuple("kobza." + room for room in ROOMS))]
assert not rooms, rooms
"""


def live(folder, extra=""):
    return run_python("-c", f"ROOMS = {ROOMS!r}\n" + LIFE.replace("EXTRA", extra), str(folder))


def test_the_core_lives_without_its_rooms(tmp_path):
    process = live(tmp_path)
    assert process.returncode == 0, process.stderr[-2000:]


def test_a_seeded_need_of_a_room_is_found(tmp_path):
    process = live(tmp_path, "import kobza.describe.parts")
    assert process.returncode == 1 and "kobza.describe is blocked" in process.stderr
