"""The model's modules with kernels inside: each a subclass of the plain one that differs in the line the kernel replaces.

They are put in place by `kobza.kernels.choose`; a weight, its name and a hook are the plain module's own.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn

from kobza.kernels.head_loss import model_head_loss
from kobza.kernels.lora import is_plain_lora, lora_linear
from kobza.kernels.triton.glu import glu
from kobza.kernels.triton.head_loss import head_loss
from kobza.kernels.triton.rms_norm import rms_norm
from kobza.kernels.triton.rope import rope
from kobza.layers import GatedMLP, RMSNorm
from kobza.model import GPT, Attention, Cache, View


class KernelRMSNorm(RMSNorm):
    """RMSNorm in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset, self.cast_late)


class KernelGatedMLP(GatedMLP):
    """GatedMLP whose gate is one kernel."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), activation_name(self.act)))


class KernelAttention(Attention):
    """Attention that turns queries and keys in one kernel."""

    def forward(self, x: Tensor, views: list[View], cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        angles, mask = views[self.view]
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2))  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        if angles is not None:
            q, k = rope(q, k, *angles)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        causal = mask is None and T == k.shape[2] and T > 1
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q.to(k.dtype), k, v, mask, causal, dropout, self.scale)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))  # (B, T, C)


@cache
def lora_kind(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a room's LoRA layer whose arithmetic is one node; what asks for that layer finds it still."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if not is_plain_lora(self):
            return plain.forward(self, x)
        return lora_linear(x, self.base, self.lora_a, self.lora_b, self.scale)

    return type(f"Kernel{plain.__name__}", (plain,), {"forward": forward})


def kernel_kind(plain: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of a plain one."""
    own = {RMSNorm: KernelRMSNorm, GatedMLP: KernelGatedMLP, Attention: KernelAttention}
    return own.get(plain) or lora_kind(plain)


def activation_name(act: nn.Module) -> str:
    """A gate's activation as glu.py calls it."""
    return "silu" if isinstance(act, nn.SiLU) else {"none": "gelu", "tanh": "gelu_tanh"}[act.approximate]


def kernel_head_loss(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of hidden states x (N, C) on targets (N,); a head that is no plain linear layer goes the plain way."""
    head, config = model.lm_head, model.config
    if isinstance(head, nn.Linear) and not (head._forward_hooks or head._forward_pre_hooks):
        return head_loss(x, head.weight[: config.vocab_size], targets, config.softcap)
    return model_head_loss(model, x, targets)
