"""int8, quantised checkpoints, the damage report and the choice of what to keep wider, up to `kobza quantize`."""

import copy
import gc
import json
import random
import re
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from kobza.checkpoint import Loaded, _digest, save_checkpoint
from kobza.config import InputError, ModelConfig, RunConfig
from kobza.layers import Embedding, Linear
from kobza.model import build
from kobza.quant import damage as damaging
from kobza.quant import forms, int8
from kobza.quant.damage import Reference, Rounded, choose, ladder, sensitivities
from kobza.quant.forms import dequantise, matrices, n_bytes, quantise, round_weight, set_weight, twin
from kobza.quant.int8 import Embedding8bit, Linear8bit, dequantize_int8, quantize_int8
from kobza.quant.nf4 import Linear4bit
from kobza.quant.page import damage_page
from kobza.quant.saved import FILE, open_quantised, save_quantised
from kobza.recipes import quantize as recipe
from kobza.recipes.tuned import open_checkpoint
from kobza.tokenizer import ByteTokenizer

SMALL = {"vocab_size": 256, "max_seq_len": 64, "n_layer": 2, "n_head": 2, "n_embd": 64, "init": "gpt2", "mlp": "swiglu"}
IDS = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
ONE = np.ones(256)


def small(**changes):
    return build(ModelConfig(**SMALL | changes)).eval()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- int8 ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(rows=st.integers(1, 30), columns=st.integers(1, 70), seed=st.integers(0, 1 << 20), size=st.floats(-30, 30))
def test_a_matrix_comes_back_within_half_a_step_of_its_row(rows, columns, seed, size):
    weight = normal(rows, columns, seed=seed) * 10**size
    packed = quantize_int8(weight)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert packed.codes.dtype == torch.int8 and packed.codes.abs().max() <= 127
    assert (packed.scale.float()[:, None] >= steps).all() and (packed.scale.float()[:, None] <= steps * 1.008).all()
    assert ((dequantize_int8(packed) - weight).abs() <= 0.504 * 1.001 * steps).all()


def test_zeros_and_numbers_below_the_smallest_normal_one_come_back():
    weight = torch.stack((torch.zeros(8), torch.full((8,), 1e-42), torch.arange(8.0)))
    back = dequantize_int8(quantize_int8(weight))
    assert back[:2].abs().max() <= 1e-38 and torch.allclose(back[2], weight[2], atol=0.03)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused(value):
    weight = normal(4, 4)
    weight[2, 1] = value
    with pytest.raises(InputError, match="int8: the weights hold inf or nan"):
        quantize_int8(weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("tokens, width", [(1, 96), (2, 96), (3, 96), (17, 96), (1, 93), (2, 80)])
def test_a_layer_in_8_bits_computes_as_the_plain_one_of_the_same_numbers(monkeypatch, bias, dtype, near, tokens, width):
    """By the kernel on codes and by stretches of them; the kernel would crash at widths that it does not divide."""
    monkeypatch.setattr(int8, "CHUNK", 500)
    torch.manual_seed(0)
    plain = nn.Linear(width, 41, bias=bias)
    layer = Linear8bit.of(copy.deepcopy(plain))
    plain.weight.data = layer.weight
    inputs = [normal(1, tokens, width).to(dtype).requires_grad_() for _ in range(2)]
    outputs = [layer(inputs[0]), plain.to(dtype)(inputs[1])]
    assert outputs[0].dtype == dtype and outputs[0].shape == (1, tokens, 41)
    for y in outputs:
        y.backward(torch.ones_like(y).cumsum(-1))
    for ours, theirs in (outputs, [x.grad for x in inputs]):
        assert (ours - theirs).norm() <= near * theirs.norm()
    if bias:
        assert torch.allclose(layer.bias.grad, plain.bias.grad.float(), rtol=0.02)


def test_the_kernel_on_codes_is_used_for_few_rows_in_bf16_alone(monkeypatch):
    calls, kernel = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(len(args[0])) or kernel(*args))
    layer = Linear8bit(quantize_int8(normal(16, 32)))
    for x in (normal(2, 32), normal(2, 32).bfloat16(), normal(1, 1, 32).bfloat16(), normal(9, 32).bfloat16()):
        layer(x)
    assert calls == [2, 1]


def test_a_layer_keeps_nothing_of_a_weights_size_for_its_backward():
    layer, sizes = Linear8bit(quantize_int8(normal(256, 256))), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        layer(normal(2, 256).requires_grad_())
    assert sum(sizes) == 0


def test_scales_stay_what_they_are_whatever_the_model_is_cast_to():
    layer = Linear8bit(quantize_int8(normal(8, 8) * 1e-9))
    weight = layer.weight
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        layer.to(dtype)
        assert layer.scale.dtype == torch.bfloat16 and torch.equal(layer.weight, weight)


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_a_table_gives_the_rows_of_the_plain_one(factor):
    plain = Embedding(20, 12, factor)
    plain.weight.data = normal(20, 12)
    table = Embedding8bit.of(plain)
    plain.weight.data = table.weight
    ids = torch.arange(24).view(2, 12) % 20
    assert torch.equal(table(ids), plain(ids)) and table(ids).dtype == torch.float32
    assert torch.equal(table(ids, torch.bfloat16), plain(ids, torch.bfloat16).bfloat16())
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16


# ---- surgery -------------------------------------------------------------------------------------------------------


def all_in(model, type):
    """{weight: type}, tables in int8 where the type is nf4."""
    return {name: "int8" if type == "nf4" and "blocks" not in name else type for name in matrices(model)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("type", ["nf4", "int8", "bf16", "float32"])
def test_a_quantised_model_computes_as_one_of_rounded_weights(type, tied):
    model = small(tied=tied)
    plain = copy.deepcopy(model)
    types = all_in(model, type)
    for name in types:
        set_weight(plain, name, round_weight(types[name])(plain.get_parameter(name).detach()))
    quantise(model, types)
    assert ("lm_head.weight" in types) != tied
    assert torch.allclose(model(IDS), plain(IDS), atol=2e-6)
    before = model(IDS)
    dequantise(model)
    assert torch.allclose(model(IDS), before, atol=2e-6)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert (model.lm_head.weight is model.embed.weight) == tied


def test_a_tied_head_reads_the_codes_of_its_table():
    model = quantise(small(tied=True), {"embed.weight": "int8"})
    assert model.lm_head.codes.data_ptr() == model.embed.codes.data_ptr()


def test_each_float_weight_goes_as_soon_as_it_is_packed(monkeypatch):
    model, alive = small(tied=True), []
    weights = [weakref.ref(parameter) for name, parameter in model.named_parameters() if parameter.ndim > 1]
    pack = forms.packed_of
    monkeypatch.setattr(forms, "packed_of", lambda *a: alive.append(sum(w() is not None for w in weights)) or pack(*a))
    quantise(model, all_in(model, "int8"))
    gc.collect()
    assert alive == list(range(len(weights), 0, -1)) and not any(w() is not None for w in weights)


def test_surgery_on_a_twin_leaves_the_model_and_takes_no_memory():
    model = small(tied=True)
    before, other = model(IDS), twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for type in ("bf16", "nf4"):
        quantise(other, all_in(model, type) if type == "nf4" else dict.fromkeys(matrices(model), "bf16"))
        assert not torch.equal(other(IDS), before) and torch.equal(model(IDS), before)


def test_a_model_without_a_weight_of_its_own_still_knows_its_device():
    model = small(norm="layernorm", norm_weight=False, bias=False)
    quantise(model, all_in(model, "int8"))
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    "types, message",
    [
        ({"blocks.0.attn.q_pro.weight": "int8"}, "the model has no matrix 'blocks.0.attn.q_pro.weight'.*q_proj"),
        ({"embed.weight": "int4"}, "no type 'int4'"),
        ({"embed.weight": "nf4"}, "nf4 is for layers"),
        ({"norm.weight": "int8"}, "the model has no matrix 'norm.weight'"),
    ],
)
def test_surgery_that_makes_no_sense_is_refused(types, message):
    with pytest.raises(InputError, match=message):
        quantise(small(), types)


def test_bytes_are_those_that_the_packed_parts_take():
    for shape in ((64, 64), (33, 96), (1, 32)):
        linear = Linear(shape[1], shape[0], bias=False)
        linear.weight.data = normal(*shape)
        for type, layer in (("nf4", Linear4bit), ("int8", Linear8bit)):
            assert n_bytes(type, shape) == sum(part.nbytes for part in layer.of(linear).packed)
    assert n_bytes("Q8_0", (2, 64)) == 2 * 68 and n_bytes("bf16", (3, 5)) == 30


# ---- on disk -------------------------------------------------------------------------------------------------------


def loaded_of(model, tmp_path, **provenance):
    return Loaded(model, RunConfig(model=model.config), ByteTokenizer(), {"step": 3, **provenance}, tmp_path)


def saved(tmp_path, type="int8", **changes):
    """A quantised checkpoint and the model that was written."""
    model = small(**changes)
    types = all_in(model, type)
    loaded = loaded_of(model, tmp_path)
    quantise(model, types)
    save_quantised(tmp_path / "out", model, loaded, types, {"damage.json": "{}"})
    return tmp_path / "out", model


@pytest.mark.parametrize("type", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("tied, bias", [(True, False), (False, True)])
def test_opened_again_it_computes_the_same_to_the_bit(tmp_path, type, tied, bias):
    folder, model = saved(tmp_path, type, tied=tied, bias=bias)
    again = open_quantised(folder)
    assert torch.equal(again.model(IDS), model(IDS)) and again.provenance["step"] == 3
    for opened in (again.model, open_checkpoint(folder).model):  # as every verb opens it: plain weights
        assert torch.allclose(opened(IDS), model(IDS), atol=2e-6)
    assert type == "bf16" or any(isinstance(m, (Linear4bit, Linear8bit)) for m in again.model.modules())
    assert not any(isinstance(m, (Linear4bit, Linear8bit)) for m in open_checkpoint(folder).model.modules())


def test_the_file_is_as_small_as_its_bits(tmp_path):
    model = small()
    weights = sum(model.get_parameter(name).numel() for name in matrices(model))
    for type, bits in (("int8", 8), ("nf4", 8)):  # nf4: tables and head in int8
        folder, _ = saved(tmp_path / type, type)
        assert (folder / FILE).stat().st_size < weights * bits / 8 * 1.1 + 8000
    assert (tmp_path / "nf4/out" / FILE).stat().st_size < 0.75 * (tmp_path / "int8/out" / FILE).stat().st_size
    assert not (folder / "model.safetensors").exists()


def test_what_bf16_would_change_is_kept_whole(tmp_path):
    model = small(norm_weight=True)
    model.norm.weight.data = normal(64)
    types = {"embed.weight": "int8"}
    loaded = loaded_of(model, tmp_path)
    quantise(model, types)
    save_quantised(tmp_path / "out", model, loaded, types, {})
    stored = load_file(tmp_path / "out" / FILE)
    assert stored["norm.weight"].dtype == torch.float32
    assert stored["blocks.0.attn_norm.weight"].dtype == torch.bfloat16  # ones
    assert torch.equal(open_quantised(tmp_path / "out").model(IDS), model(IDS))


def rewritten(folder, change):
    """Alter the tensors or the config of a checkpoint and its manifest with it, as a forger would."""
    tensors, config = load_file(folder / FILE), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {name: _digest(folder / name) for name in (FILE, "config.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))


Q = "blocks.0.attn.q_proj"
FORGED = {
    "is missing": lambda t, c: t.pop(f"{Q}.codes"),
    "where the config wants torch.int8": lambda t, c: t.update({f"{Q}.codes": t[f"{Q}.codes"][:-1].clone()}),
    "is torch.uint8": lambda t, c: t.update({f"{Q}.codes": t[f"{Q}.codes"].view(torch.uint8).clone()}),
    "scale is not finite": lambda t, c: t[f"{Q}.scale"].fill_(float("nan")),
    "unexpected stray": lambda t, c: t.update(stray=torch.zeros(1)),
    "missing norm.weight": lambda t, c: t.pop("norm.weight"),
    "no type 'int3'": lambda t, c: c["provenance"]["quantised"].update({f"{Q}.weight": "int3"}),
    "no type 7": lambda t, c: c["provenance"]["quantised"].update({f"{Q}.weight": 7}),
    "has no matrix 'other.weight'": lambda t, c: c["provenance"]["quantised"].update({"other.weight": "int8"}),
    "install a newer one": lambda t, c: c["provenance"].update(quantised_format=2),
    "does not say what is quantised": lambda t, c: c["provenance"].update(quantised=["int8"]),
}


@pytest.mark.parametrize("message", FORGED)
def test_a_forged_checkpoint_is_refused(tmp_path, message):
    folder, _ = saved(tmp_path, norm_weight=True)
    rewritten(folder, FORGED[message])
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_a_damaged_or_shortened_checkpoint_is_refused(tmp_path):
    folder, _ = saved(tmp_path)
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-1])
    with pytest.raises(InputError, match="truncated"):
        open_quantised(folder)
    (folder / FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="sha256"):
        open_quantised(folder)


# ---- damage --------------------------------------------------------------------------------------------------------


def test_a_model_beside_itself_has_no_damage():
    model = small()
    found = Reference(model, [IDS, IDS[:, :7]]).damage(
        Rounded(model).become(dict.fromkeys(matrices(model), "float32")), ONE
    )
    assert (found.kl, found.kl_99, found.flips, found.bits_per_byte_change) == (0, 0, 0, 0)
    assert found.n_tokens == 2 * 39 + 2 * 6
    alone = sensitivities(model, dict.fromkeys(matrices(model), "float32"), IDS)
    assert set(alone) == set(matrices(model)) and not any(alone.values())


@pytest.mark.parametrize("entries", [1 << 24, 5 * 256])
def test_damage_is_what_its_definition_says(monkeypatch, entries):
    monkeypatch.setattr(damaging, "LOGIT_ENTRIES", entries)
    model, other = small(softcap=8.0), small(softcap=8.0)
    for parameter in other.parameters():
        parameter.data += 0.02 * normal(*parameter.shape)
    sizes = np.arange(256) % 4 + 1
    p, q = (m(IDS)[:, :-1].detach().double().log_softmax(-1) for m in (model, other))
    kl, targets = (p.exp() * (p - q)).sum(-1).view(-1), IDS[:, 1:]
    bits = [-x.gather(2, targets[..., None]).sum() / np.log(2) / sizes[targets.numpy()].sum() for x in (p, q)]
    found = Reference(model, [IDS[:1], IDS[1:]]).damage(other, sizes)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4) and found.kl > 1e-4
    assert found.kl_99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert found.flips == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).double().mean()))
    assert found.bits_per_byte == pytest.approx(float(bits[0]), rel=1e-5)
    assert found.bits_per_byte_change == pytest.approx(float(bits[1] - bits[0]), rel=1e-3)


def test_divergence_of_what_hardly_differs_and_of_what_has_nothing_in_common():
    logits = normal(3, 1000)
    p = logits.log_softmax(-1)
    q = (logits + 1e-4 * normal(3, 1000, seed=1)).log_softmax(-1)
    exact = logits.double().log_softmax(-1)
    exact = (exact.exp() * (exact - (logits.double() + 1e-4 * normal(3, 1000, seed=1)).log_softmax(-1))).sum(-1)
    assert torch.allclose(damaging.divergence(p, q).double(), exact, rtol=0.1) and exact.max() < 1e-7
    apart = torch.tensor([[0.0, -200.0], [-200.0, 0.0]])
    assert torch.allclose(damaging.divergence(apart, apart.flip(0)), torch.tensor([200.0, 200.0]), rtol=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_each_weight_alone_costs_what_the_whole_model_with_it_rounded_costs(tied):
    model = small(tied=tied, position="learned", window=8)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    types = all_in(model, "nf4")
    alone = sensitivities(model, types, IDS)
    for name in types:
        whole = Reference(model, [IDS]).damage(Rounded(model).become({name: types[name]}), ONE).kl
        assert alone[name] == pytest.approx(whole, rel=0.02, abs=1e-11), name
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


def test_a_weight_whose_rounding_fails_is_put_back():
    model = small()
    bad = model.blocks[1].attn.q_proj.weight
    bad.data[0, 0] = float("nan")
    kept = bad.data.clone()
    with pytest.raises(InputError, match="inf or nan"):
        sensitivities(model, {"blocks.1.attn.q_proj.weight": "int8"}, IDS)
    assert torch.equal(bad.data.nan_to_num(7), kept.nan_to_num(7))


HEAD = "lm_head.weight"


def with_outliers(model, size=40.0):
    """The head's first column far above the others: it adds the same to every logit, so that it changes no probability, but the
    scale of each row is spoiled by it."""
    model.lm_head.weight.data[:, 0] = size * model.lm_head.weight.abs().max()
    return model


def test_a_layer_with_outliers_is_ranked_first():
    for type in ("int8", "nf4", "Q4_0"):
        alone = sensitivities(small(), all_in(small(), type), IDS)
        spoiled = sensitivities(with_outliers(small()), all_in(small(), type), IDS)
        assert max(spoiled, key=spoiled.get) == HEAD and spoiled[HEAD] > 5 * alone[HEAD]


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
def test_ggml_types_round_as_their_files_read(type):
    from kobza.formats.ggml import dequantize, quantize

    weight = normal(6, 64)
    expected = dequantize(quantize(weight.numpy(), type), type, (6, 64))
    assert torch.equal(round_weight(type)(weight), torch.from_numpy(expected))


def test_an_unknown_type_is_named_with_its_nearest():
    with pytest.raises(InputError, match=r"no type 'Q4_00'.*Q4_0"):
        round_weight("Q4_00")


# ---- the choice ----------------------------------------------------------------------------------------------------


def types_of(type, shape):
    return [rung.type for rung in ladder(type, shape)]


def test_ladders_leave_out_what_does_not_fit_the_rows():
    assert types_of("nf4", (8, 8)) == ["nf4", "int8", "bf16", "float32"]
    assert types_of("Q4_K", (8, 256)) == ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "F32"]
    assert types_of("Q5_0", (8, 96)) == ["Q5_0", "Q8_0", "F16", "F32"]
    assert types_of("Q4_0", (8, 100))[1:] == ["F16", "F32"]
    for shape in ((8, 256), (3, 96)):
        sizes = [rung.bytes for rung in ladder("Q4_0", shape)]
        assert sizes == sorted(set(sizes))


@settings(max_examples=60)
@given(st.data())
def test_what_is_chosen_never_exceeds_the_bound(data):
    """Whatever the damages say, and however the whole hangs on its parts: here it may even grow with a wider weight."""
    n = data.draw(st.integers(1, 12))
    names = [f"w{i}" for i in range(n)]
    number = st.floats(0, 1, allow_nan=False)
    ladders = {name: ladder(data.draw(st.sampled_from(["nf4", "int8", "bf16"])), (8, 8)) for name in names}
    damages = {name: data.draw(number) for name in names}
    seed, max_kl, seen = data.draw(st.integers(0, 999)), data.draw(number), []

    def measure(types):
        wide = sum([rung.type for rung in ladders[name]].index(types[name]) for name in names)
        seen.append(random.Random(f"{seed} {sorted(types.items())}").random() if wide < 2 * n else 0.3)
        return seen[-1]

    try:
        types = choose(ladders, damages, max_kl, measure)
    except InputError as error:
        assert min(seen) > max_kl and f"{seen[-1]:.3g} nats" in str(error)
    else:
        assert measure(types) <= max_kl


def test_the_choice_widens_what_costs_most_for_its_bytes_and_no_more():
    sizes = {"a": (8, 8), "b": (8, 8), "big": (800, 8), "c": (8, 8)}
    cost = {"a": 0.5, "b": 0.01, "big": 1.0, "c": 0.2}
    ladders = {name: ladder("int8", shape) for name, shape in sizes.items()}

    def measure(types):
        return sum(cost[name] for name, type in types.items() if type == "int8")

    assert choose(ladders, cost, 2.0, measure) == dict.fromkeys(sizes, "int8")
    assert choose(ladders, cost, 1.1, measure) == {"a": "bf16", "b": "int8", "big": "int8", "c": "bf16"}
    with pytest.raises(InputError, match=r"--max-kl 1e-09 is below .*: 0.25 nats a token with every one in float32"):
        choose(ladders, cost, 1e-9, lambda types: 0.25)


def test_one_bad_weight_goes_up_alone_as_far_as_it_must():
    ladders = {name: ladder("nf4", (64, 64)) for name in "abcd"}
    floor = {"nf4": 0.5, "int8": 0.4, "bf16": 0.0, "float32": 0.0}
    found = choose(ladders, {"a": 1e-6, "b": 0.5, "c": 1e-6, "d": 1e-6}, 0.1, lambda types: floor[types["b"]])
    assert found == {"a": "nf4", "b": "bf16", "c": "nf4", "d": "nf4"}


@pytest.mark.parametrize("type, max_kl", [("nf4", 1e-5), ("int8", 3e-7), ("Q4_0", 1e-6)])
def test_a_real_choice_is_within_its_bound_and_spares_what_it_can(type, max_kl):
    model = with_outliers(small(), 8.0)
    types, reference, rounded = all_in(model, type), Reference(model, [IDS]), Rounded(model)
    ladders = {name: ladder(t, tuple(model.get_parameter(name).shape)) for name, t in types.items()}
    alone = sensitivities(model, types, IDS)
    found = choose(ladders, alone, max_kl, lambda types: reference.damage(rounded.become(types), ONE).kl)
    again = Reference(model, [IDS]).damage(Rounded(model).become(found), ONE).kl
    assert again <= max_kl
    assert reference.damage(rounded.become(types), ONE).kl > max_kl  # else there was nothing to choose
    wide = sum(n_bytes(t, tuple(model.get_parameter(name).shape)) for name, t in found.items())
    assert wide < sum(4 * model.get_parameter(name).numel() for name in found)


# ---- the verb ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    model = with_outliers(small())
    provenance = {"step": 3, "base": {"name": "x"}}
    save_checkpoint(tmp_path / "run", model, RunConfig(model=model.config), ByteTokenizer(), provenance)
    return tmp_path / "run"


def quantized(capsys, run, *args, to="int8", out=None, max_kl=None, calibration=(), n_tokens=200):
    code = recipe.main(run, out, to, max_kl, list(calibration), n_tokens, "cpu", True)
    assert code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("to, max_kl", [("int8", None), ("nf4", 2e-4)])
def test_the_verb_writes_a_model_and_its_report(capsys, tmp_path, checkpoint, to, max_kl):
    out = tmp_path / "out"
    report = quantized(capsys, checkpoint, to=to, out=out, max_kl=max_kl)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "damage.html", "damage.json", "manifest.json", FILE, "tokenizer.json",
    ]  # fmt: skip
    assert max_kl is None or report["overall"]["kl"] <= max_kl
    assert max_kl is None or HEAD in report["kept_wider"]
    plain, opened = open_checkpoint(checkpoint).model, open_checkpoint(out).model
    batches = recipe.batches_of([], open_checkpoint(checkpoint), 200)
    again = Reference(plain, batches).damage(opened, ByteTokenizer().piece_bytes)
    assert again.kl == pytest.approx(report["overall"]["kl"], rel=0.01) and again.kl > 0
    about = open_checkpoint(out).provenance
    assert about["step"] == 3 and about["quantised_from"] == str(checkpoint) and "base" not in about
    worst = max(report["tensors"], key=lambda tensor: tensor["kl"])
    assert worst["name"] == HEAD
    assert report["bytes_after"] == (out / FILE).stat().st_size < report["bytes_before"]
    assert json.loads((out / "damage.json").read_text())["overall"] == report["overall"]
    with pytest.raises(InputError, match="few bits already"):
        recipe.main(out, None, to, None, [], 100, "cpu", True)


def test_without_a_place_it_only_reports(capsys, tmp_path, checkpoint):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 9)
    before = sorted(tmp_path.rglob("*"))
    assert recipe.main(checkpoint, None, "nf4", None, [str(tmp_path / "text.txt")], 100, "cpu", False) == 0
    said = capsys.readouterr().out
    assert "nats a token" in said and HEAD in said and "the text given" in said
    assert f"kobza quantize {checkpoint} --to nf4 --out FOLDER" in said.replace("\n", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_ggmls_types_are_reported_and_planned_by_our_names(capsys, tmp_path):
    model = with_outliers(small(norm="rmsnorm", norm_weight=True))
    run = tmp_path / "run"
    save_checkpoint(run, model, RunConfig(model=model.config), ByteTokenizer(), {"step": 3})
    report = quantized(capsys, run, to="q4_0")
    types = {tensor["name"]: tensor["type"] for tensor in report["tensors"]}
    assert set(types) == set(matrices(model)) and types["blocks.0.mlp.up_proj.weight"] == "Q4_0"
    loaded = open_checkpoint(run)
    texts, bound, seen = ["To be, or not to be, that is the question."], report["overall"]["kl"] / 3, []
    wider = recipe.plan_types(loaded, "q4_0", bound, texts, progress=lambda *step: seen.append(step))
    assert HEAD in wider and len(wider) < len(types) and seen[-1][1:] == (len(types), len(types))
    batches, now = recipe.batches_of(texts, loaded, 200), Rounded(loaded.model).become(types | wider)
    assert Reference(loaded.model, batches).damage(now, ByteTokenizer().piece_bytes).kl <= bound


def test_importance_weighs_what_ggml_rounds_and_that_of_a_tied_head_is_its_tables(tmp_path):
    model = small(norm="rmsnorm", tied=True)
    loaded = loaded_of(model, tmp_path)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    columns = {f"{name}.weight": torch.linspace(0.01, 9, layer.in_features) for name, layer in layers.items()}
    seen = {}

    def see(type, importance=None):
        seen.setdefault(type, []).append(importance)
        return round_weight(type, importance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damaging, "round_weight", see)
        recipe.plan_types(loaded, "Q4_0", 1.0, ["To be, or not to be."], columns)
    assert all(one is not None for some in seen.values() for one in some) and len(seen["Q4_0"]) > 10
    plain, weighed = (
        round_weight("Q4_0", one)(model.blocks[0].mlp.up_proj.weight.data) for one in (None, columns[HEAD])
    )
    assert not torch.equal(plain, weighed)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"to": "int9"}, r"--to is 'int9'.*int8"),
        ({"to": "q4_k_m", "out": "new", "max_kl": 0.01}, "kobza export .* --to gguf --types q4_k_m --max-kl 0.01"),
        ({"out": "run"}, "is there; name a new folder"),
        ({"max_kl": 0.0}, "--max-kl is 0.0; it must be above 0"),
        ({"n_tokens": 1}, "--tokens is 1"),
    ],
)
def test_what_the_verb_refuses(tmp_path, checkpoint, changed, message):
    given = {"to": "int8", "out": None, "max_kl": None, "n_tokens": 100} | changed
    out = None if given["out"] is None else tmp_path / given["out"]
    with pytest.raises(InputError, match=message):
        recipe.main(checkpoint, out, given["to"], given["max_kl"], [], given["n_tokens"], "cpu", True)


def test_sequences_begin_as_in_training_and_hold_every_token():
    loaded = Loaded(small(), RunConfig(model=small().config), ByteTokenizer(["<|begin|>"]), {}, None)
    batches = recipe.batches_of(["ab" * 70, "c" * 13], loaded, 1000)
    starts = [loaded.tokenizer.bos_id] if loaded.tokenizer.bos_id is not None else []
    rows = [row.tolist() for batch in batches for row in batch]
    assert all(row[: len(starts)] == starts and len(row) <= 64 for row in rows)
    assert sum((row[len(starts) :] for row in rows), []) == loaded.tokenizer.encode("ab" * 70 + "c" * 13).tolist()
    assert sum(b.numel() - len(b) * len(starts) for b in recipe.batches_of(["ab" * 70], loaded, 100)) == 100


def test_the_page_has_a_bar_for_each_weight_and_escapes_names():
    tensors = [{"name": f"blocks.{i}.attn.q_proj.weight", "type": "nf4", "kl": i / 10, "bytes": 99} for i in range(3)]
    tensors.append({"name": "embed.weight", "type": "int8", "kl": 0.0, "bytes": 7})
    overall = {"kl": 0.1, "kl_99": 0.4, "flips": 0.02, "bits_per_byte": 2.0, "bits_per_byte_change": -0.01}
    report = {"model": "<b>run", "to": "nf4", "text": "prose", "tokens": 7, "overall": overall, "tensors": tensors}
    report |= {"kept_wider": {"blocks.2.attn.q_proj.weight": "int8"}, "bytes_before": 4e6, "bytes_after": 1e6}
    page = damage_page(report)
    assert (
        page.count("<rect") == 4 and page.count('class="wider"') == 1 and "&lt;b&gt;run" in page and "<b>" not in page
    )
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"\s*(?:class="wider")?>', page)]
    assert heights == [0.5, 32.0, 64.0, 0.5]
