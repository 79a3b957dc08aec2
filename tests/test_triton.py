"""The kernels are right in Triton's interpreter (kernel_cases.py), and Triton's compiler makes machine code of each, as a trial
launches it, for GPUs that need not be here. Triton asks once, when it is first imported, how to run: so each has a process."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason='no triton: pip install "kobza[kernels]"')
VERSION = [int(part) for part in version("triton").split(".")[:2]]
HERE = Path(__file__).parent


def python(*arguments, **environment):
    """Run Python; its words if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *arguments], env=env | environment, capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


CASES = ("-m", "pytest", str(HERE / "kernel_cases.py"), "-q", "-p", "no:cacheprovider")


@pytest.mark.skipif(VERSION < [3, 7], reason="Triton 3.6's interpreter falls over numpy 2.5; 3.7's does not")
def test_the_kernels_in_the_interpreter():
    assert " passed" in python(*CASES, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_on_the_gpu():
    assert " passed" in python(*CASES)


# In the launch's place: each kernel is compiled, to machine code, for what the launch would have handed it.
COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kobza.kernels.triton import cross_entropy, glu, rms_norm, rope
from kobza.kernels.triton.trials import TRIALS

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
compiled = set()

def compile_only(kernel, grid, *args, tile, **constants):
    names = kernel.arg_names
    given = dict(zip(names, args)) | constants
    signature = {name: POINTERS[x.dtype] if isinstance(x, torch.Tensor) else "constexpr" for name, x in given.items()}
    signature |= {name: "i32" for name, x in zip(names, args) if type(x) is int and x != 1}
    fixed = {(names.index(name),): given[name] for name in names if signature[name] == "constexpr"}
    source = ASTSource(kernel, {name: signature[name] for name in names}, fixed)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    compiled.add((kernel.fn.__module__, kernel.fn.__name__))

for module in (cross_entropy, glu, rms_norm, rope):
    module.launch = compile_only
capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
for trial in TRIALS.values():
    plain, fast, inputs = trial(dtype)
    outputs = fast(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(y.float().sum() for y in outputs).backward()
print(len(compiled))
"""


@pytest.mark.parametrize(
    ("capability", "dtype"), [("90", "bfloat16"), pytest.param("75", "float16", marks=pytest.mark.slow)]
)
def test_every_kernel_compiles_for_gpus(capability, dtype, tmp_path):
    made = python("-c", COMPILE, capability, dtype, TRITON_CACHE_DIR=str(tmp_path))
    assert made.strip() == "7", "kernels in all"
