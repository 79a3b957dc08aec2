"""Does a faster form compute what its plain twin does, here, on this device? Both against float64, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Form = Callable[..., Tensor | tuple[Tensor, ...]]


def errors(plain: Form, fast: Form, inputs: list[Tensor]) -> list[tuple[float, float]]:
    """(error of fast, error of plain) of each output and of the gradient of each input that learns: the largest distance from
    plain in float64, in parts of its largest value. Both get the same inputs and the same gradient from above."""
    truth = results(plain, [x.detach().double() if x.is_floating_point() else x for x in inputs], inputs)
    found = [results(form, [x.detach().clone() for x in inputs], inputs) for form in (fast, plain)]
    return [
        tuple(float((value.double() - right).abs().max() / right.abs().max().clamp(min=1e-30)) for value in values)
        for right, *values in zip(truth, *found, strict=True)
    ]


def results(form: Form, inputs: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients of the inputs that learn in `like`; from above comes what is drawn for outputs of their shape."""
    leaves = [x.requires_grad_(y.requires_grad) for x, y in zip(inputs, like, strict=True)]
    outputs = form(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    above = [torch.randn(y.shape, generator=generator).to(like[0].dtype).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], above)
    return [y.detach() for y in (*outputs, *gradients)]
