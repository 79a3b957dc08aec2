"""Two decisions of released models that only rounding shows: how Gemma's embedding is scaled (G2), where its norms cast (G3).

More precise is not right here: the weights were trained with these roundings. Both are read off what modules take and give.
Shapes: T tokens, C width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kobza.doctor.finding import Finding, Skip
from kobza.doctor.models.properties.precision import short
from kobza.doctor.models.properties.probe import SEED, rel_l2
from kobza.doctor.models.subject import KobzaSubject, ModuleSubject, first_tensor

# ---- G2: the embedding's scale ---------------------------------------------------------------------------------------------


def declared_scale(subject: ModuleSubject) -> float | None:
    """By what the config has its embeddings multiplied, where it is Gemma's; None: not Gemma."""
    if isinstance(subject, KobzaSubject):
        gemma = subject.config.norm_offset and subject.config.embed_scale != 1
        return subject.config.n_embd**0.5 if gemma else None
    kind = str(getattr(subject.config, "model_type", ""))
    return float(subject.config.hidden_size) ** 0.5 if kind.startswith("gemma") else None


def embedding_scale(subject: ModuleSubject) -> Iterator[Finding]:
    """What enters the first block, over the rows of the table: sqrt(width), rounded to the activations' format as Gemma's is."""
    subject.need("hidden", "cast")
    root = declared_scale(subject)
    if root is None:
        raise Skip("its embeddings are not scaled by sqrt(width): not Gemma")
    ids = short(subject)
    rows, entered = _entered(subject.at("fp32"), ids)
    scale = float((rows * entered).sum() / (rows * rows).sum())
    if rel_l2(scale * rows, entered) > 1e-3:
        raise Skip("what enters the first block is no multiple of the embedding's rows")
    if abs(scale / root - 1) > 0.01:
        yield _scale_finding(
            f"multiplied by {scale:.5g}", root, "error", f"ids of seed {SEED}: least squares over {rows.numel()} values"
        )
        return
    rows, entered = _entered(subject.at("bf16"), ids)
    rounded = float(torch.tensor(root).bfloat16())
    as_released, as_float = (
        int((rows * factor != entered).sum()) for factor in (torch.tensor(rounded).bfloat16(), scale)
    )
    if as_released > as_float:
        got = f"multiplied by {scale:.6g} in bf16 too: {as_released} of {rows.numel()} values differ from the release"
        place = int((rows * torch.tensor(rounded).bfloat16() != entered).flatten().long().argmax())
        pair = f"value {place}: {float(rows.flatten()[place]):.6g} became {float(entered.flatten()[place]):.6g}"
        yield _scale_finding(got, rounded, "warn", f"ids of seed {SEED} in bf16, {pair}")


def _entered(subject: ModuleSubject, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of the embedding, what enters the first block), (1, T, C) each."""
    tables = [part for part in subject.module.modules() if isinstance(part, nn.Embedding)]
    table = next((part for part in tables if part.num_embeddings >= subject.vocab_size), None)
    if table is None:
        raise Skip("no nn.Embedding of the vocabulary")
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(first_tensor(args or kwargs))

    handle = subject.layers()[0][1].register_forward_pre_hook(see, with_kwargs=True)
    try:
        subject.hidden(ids)
    finally:
        handle.remove()
    return table.weight.detach()[ids], found[0]


def _scale_finding(got: str, right: float, severity: Any, counterexample: str) -> Finding:
    return Finding(
        code="G2",
        severity=severity,
        confidence="proven",
        where="embedding scale",
        expected=f"multiplied by {right:.6g}",
        got=got,
        why="every later layer reads a stream of another size than in training",
        fix="cast sqrt(width) to the dtype of the activations before multiplying: more precise is not right here",
        counterexample=counterexample,
        source="https://github.com/huggingface/transformers/pull/29402",
    )


# ---- G3: norms with an offset ------------------------------------------------------------------------------------------------


def norms(subject: ModuleSubject) -> Iterator[Finding]:
    """Each RMSNorm: is it xhat w or xhat (1 + w), and is the product made before or after the cast?"""
    subject.need("cast", "hidden")
    ids = short(subject)
    forms = {name: _form(*seen) for name, seen in _norms_seen(subject.at("fp32"), ids).items()}
    if not any(forms.values()):
        raise Skip("no RMSNorm with a learned weight")
    plain = [name for name, form in forms.items() if form == "plain"]
    weights = [subject.module.get_submodule(name).weight.detach().flatten().float() for name in plain]
    pooled = torch.cat(weights) if weights else torch.ones(1)
    negative = float((pooled < 0).float().mean())
    if negative > 0.2 and abs(float(pooled.mean())) < 0.3:
        yield _norm_finding(
            plain[0],
            "weights around 0 are offsets: the factor is 1 + w",
            f"the factor is w, and {negative:.0%} of the {len(pooled)} weights are negative (mean {float(pooled.mean()):.2g})",
            "x / rms(x) * (1 + w)",
            f"{plain[0]}: output / (x / rms(x)) is w, whose first value is {float(weights[0][0]):.4g}",
        )
        return
    for name, seen in _norms_seen(subject.at("bf16"), ids).items():
        if forms.get(name) != "offset":
            continue
        (late, early), output = _products(*seen), seen[2]
        n_late, n_early = int((output != late).sum()), int((output != early).sum())
        largest = float((output.float() - late.float()).abs().max())
        if n_late > 0.01 * output.numel():  # a sum in another order moves a value in a thousand across a rounding edge
            yield _norm_finding(
                name,
                "a norm with offset multiplies in float32 and casts then, as Gemma's does",
                f"{n_late} of {output.numel()} values differ from that, and {n_early} from a cast before the product",
                "(xhat * (1 + w)).to(dtype)",
                f"{name} in bf16, ids of seed {SEED}: values differ by up to {largest:.3g}",
            )
            return


def _norms_seen(subject: ModuleSubject, ids: Tensor) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """(module, input, output) of all that look like norms: one vector of weights over the last axis, shape kept."""
    found: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            fits = args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].shape == output.shape
            if fits and output.shape[-1] == module.weight.numel():
                found[name] = (module, args[0].detach(), output.detach())

        return hook

    handles = [
        module.register_forward_hook(see(name))
        for name, module in subject.module.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 1
        and not isinstance(module, nn.LayerNorm)
    ]
    try:
        with torch.no_grad():
            subject.logits(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _normed(module: nn.Module, x: Tensor) -> Tensor:
    """x / rms(x) in float32 with the module's own epsilon."""
    eps = next(
        (float(v) for n in ("eps", "variance_epsilon", "epsilon") if isinstance(v := getattr(module, n, None), float)),
        1e-6,
    )
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _form(module: nn.Module, x: Tensor, output: Tensor) -> str:
    """ "plain": xhat w; "offset": xhat (1 + w); "": neither."""
    normed, weight = _normed(module, x), module.weight.detach().float()
    if bool((weight == 0).all()):
        return "offset" if rel_l2(output, normed) < 1e-3 else ""
    fits = {"plain": rel_l2(output, normed * weight), "offset": rel_l2(output, normed * (1 + weight))}
    best = min(fits, key=lambda form: fits[form])
    return best if fits[best] < 1e-3 else ""


def _products(module: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """What the late and the early cast give."""
    normed, weight = _normed(module, x), module.weight.detach()
    late = (normed * (1 + weight.float())).to(output.dtype)
    return late, normed.to(output.dtype) * (1 + weight.to(output.dtype))


def _norm_finding(where: str, expected: str, got: str, fix: str, counterexample: str) -> Finding:
    source = "https://github.com/huggingface/transformers/pull/29402"
    why = "each norm is off by a little, and all of them add up"
    return Finding("G3", "warn", "proven", where, expected, got, why, fix, counterexample, source)
