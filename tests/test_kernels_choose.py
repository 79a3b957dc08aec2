"""What `kernels.choose` says and leaves alone where no kernel runs; what it puts in place is in kernel_cases.py."""

import subprocess
import sys

import pytest
import torch

from kobza.config import ModelConfig
from kobza.finetune.config import MethodConfig
from kobza.finetune.lora import add_lora
from kobza.kernels import choose
from kobza.kernels.head_loss import model_head_loss
from kobza.kernels.lora import is_lora, lora_linear
from kobza.model import build

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def a_model():
    return build(ModelConfig(vocab_size=11, n_layer=1, n_head=2, n_embd=16, n_ff=24, max_seq_len=8, mlp="swiglu"))


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_on_a_cpu_nothing_is_taken_and_it_says_so():
    model = a_model()
    before = [type(module) for module in model.modules()]
    choices = choose.use(model, CPU, torch.float32)
    assert choices == [(name, False, "cpu: torch's own") for name in ("rms_norm", "rope", "glu", "lora", "head_loss")]
    assert [type(module) for module in model.modules()] == before
    assert choose.head_loss_for(CPU, model) is model_head_loss


def test_without_triton_it_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert choose.missing(GPU, torch.float32) == 'no triton: pip install "kobza[kernels]"'
    assert choose.head_loss_for(GPU, a_model()) is model_head_loss


def test_a_gpu_without_bf16_is_told_to_take_fp16(monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose.missing(GPU, torch.bfloat16).endswith("this device has 7.5; take fp16")
    assert choose.missing(GPU, torch.float16) == ""


def test_what_is_not_in_the_model_is_said(monkeypatch):
    monkeypatch.setattr(choose, "missing", lambda device, dtype: "")
    monkeypatch.setattr(choose, "failing", lambda name, device, dtype: "not tried")
    config = ModelConfig(
        vocab_size=11, n_layer=1, n_head=2, n_embd=16, max_seq_len=8, norm="layernorm", qk_norm=False, mlp="gelu"
    )
    whys = {choice.name: choice.why for choice in choose.use(build(config), CPU, torch.float32)}
    assert whys["rms_norm"] == "no RMSNorm in this model" and whys["glu"] == "no gated feed-forward in this model"
    assert whys["lora"] == "no LoRA in this model" and whys["rope"] == "not tried"


def test_choosing_imports_no_triton():
    code = "import sys; import kobza.kernels.choose; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Dequantising(torch.nn.Module):
    """A base whose weight is made at each asking."""

    def __init__(self, weight):
        super().__init__()
        self.codes, self.asked, self.bias = weight, 0, None

    @property
    def weight(self):
        self.asked += 1
        return self.codes.clone()


def test_lora_keeps_neither_weight_nor_output():
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (7, 2)))
    base = Dequantising(torch.randn(7, 5, dtype=torch.float64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        y = lora_linear(x, base, a, b, 0.5)
    assert sorted(map(tuple, kept)) == [(2, 5), (3, 4, 5), (7, 2), (12, 2)]
    torch.testing.assert_close(y, x @ base.codes.T + 0.5 * (x @ a.T) @ b.T)
    y.sum().backward()
    assert base.asked == 2, "once forward, once back"
    assert torch.autograd.gradcheck(lambda *inputs: lora_linear(inputs[0], base, *inputs[1:], 0.5), (x, a, b))


def test_the_room_s_layer_is_a_lora_module_and_others_are_not():
    model = a_model()
    add_lora(model, MethodConfig(rank=2), 0)
    assert [name for name, module in model.named_modules() if is_lora(module)][0] == "blocks.0.attn.q_proj"
    assert not is_lora(model.lm_head) and not is_lora(model)
