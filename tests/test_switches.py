"""Every switch of ModelConfig, alone and together with all others: the network written once more from the config's words, and
what must hold whatever is switched on. The parity with other people's models is in test_parity.py."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kobza.cli import main
from kobza.config import EFFECTS, InputError, ModelConfig, SampleConfig, idle, without_idle
from kobza.describe.parts import parts, total_parameters
from kobza.generate import KVCache, decode, generate, prefill
from kobza.kernels import fused, packed
from kobza.model import GPT, build, n_parameters, training_flops_per_token
from kobza.train import next_token_loss

V, SIZES = 17, dict(vocab_size=17, max_seq_len=12, n_layer=2, n_head=2, n_embd=8)


@st.composite
def configs(draw, **given_):
    """Any model at all, small. What another switch takes the effect from is left out, as the config demands."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    groups, n_kv_head, n_layer, pattern = (
        pick(1, 2),
        pick(1, 2),
        pick(1, 2),
        pick("AF", "AF", "AFAF", "AAF", "FA", "A", "F"),
    )
    n_attention, n_ff = n_layer * pattern.count("A"), n_layer * pattern.count("F")
    values = dict(
        vocab_size=V, max_seq_len=12, n_layer=n_layer, pattern=pattern, n_head=groups * n_kv_head, n_kv_head=n_kv_head
    )
    values |= dict(
        n_embd=pick(6, 8), head_dim=pick(2, 4, 6), n_ff=pick(5, 16), pad_vocab=pick(0, 8), tied=pick(True, False)
    )
    values |= dict(position=pick("rope", "rope", "learned", "sinusoidal", "none"), rope_theta=pick(100.0, 10_000.0))
    values |= dict(
        rope_scaling=pick("none", "linear", "ntk", "yarn", "llama3"),
        rope_factor=pick(1.5, 4.0),
        rope_original_len=pick(8, 4096),
    )
    values |= dict(norm=pick("rmsnorm", "layernorm", "none"), norm_weight=pick(True, False), norm_eps=pick(1e-5, 1e-2))
    values |= dict(norm_place=pick("before", "after", "output", "both", "everywhere"), norm_offset=pick(True, False))
    values |= dict(norm_cast=pick("before", "after"), qk_norm=pick(True, False), qk_norm_weight=pick(True, False))
    values |= dict(
        attn_scale=pick(0.0, 0.4),
        attn_softcap=pick(0.0, 1.5),
        window=pick(0, 1, 4),
        window_pattern=pick("L", "LG", "GL"),
    )
    values |= dict(
        rope_local_theta=pick(0.0, 50.0), rope_dim=pick(0, 0, 2), bias=pick(True, False), qkv_bias=pick(True, False)
    )
    values |= dict(mlp=pick("relu2", "relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh"))
    values |= dict(
        embed_scale=pick(1.0, 2.5),
        softcap=pick(0.0, 3.0),
        n_ahead=pick(1, 3),
        init=pick("zero", "gpt2", "xavier", "torch", "unit"),
    )
    values["ff_widths"] = pick("", ",".join(str(3 + place) for place in range(n_ff)))
    if n_attention and n_kv_head > 1:
        values["omit_heads"] = pick("", f"{n_attention - 1}:" + ",".join(str(head) for head in range(groups)))
    values |= given_
    for name in ("window", "rope_scaling"):  # what others hang on, first
        if pick(True, False, False):
            values.pop(name, None)
    start = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    while vain := {name for name, _ in idle("model", SimpleConfig(start | values))}:
        values = {name: value for name, value in values.items() if name not in vain}
    try:
        return ModelConfig(**values)
    except InputError:  # a window that no attention has, say
        assume(False)


class SimpleConfig:
    """Values as attributes, unchecked."""

    def __init__(self, values):
        self.__dict__ = values


def drawn(config, seed=0, dtype=torch.float64):
    """The model with every weight drawn, also biases and norms, so that each has an effect."""
    model, generator = build(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name and name.endswith("weight") and not config.norm_offset
            parameter.copy_(is_gain + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def some_ids(batch, length, seed=0):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def apart(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def with_weights(model, weights):
    """The model with these weights, by name."""
    model.load_state_dict(weights)
    return model


# ---- the network once more -----------------------------------------------------------------------------------------


class Equations:
    """The whole network from the config's words, in float64, sharing nothing with model.py but the names of the weights."""

    def __init__(self, config, model):
        self.c, self.w = config, {name: p.detach().double() for name, p in model.state_dict().items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", torch.zeros(()))

    def rms(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.c.norm_eps).sqrt()

    def gained(self, name, x):
        if f"{name}.weight" in self.w:
            x = x * (self.w[f"{name}.weight"] + (1 if self.c.norm_offset else 0))
        return x + self.w.get(f"{name}.bias", torch.zeros(()))

    def norm(self, name, x, *places):
        if self.c.norm == "none" or self.c.norm_place not in places:
            return x
        x = x - x.mean(-1, keepdim=True) if self.c.norm == "layernorm" else x
        return self.gained(name, self.rms(x))

    def angles(self, theta, scaled, T):
        """(T, D/2) and the factor on cos and sin."""
        c, D, gain = self.c, self.c.rope_dim or self.c.head_dim, 1.0
        frequencies = []
        for i in range(D // 2):
            f, s, L = theta ** (-2 * i / D), c.rope_factor, c.rope_original_len
            kind = c.rope_scaling if scaled else "none"
            if kind == "linear":
                f = f / s
            elif kind == "ntk" and D > 2:
                f = (theta * s ** (D / (D - 2))) ** (-2 * i / D)
            elif kind == "llama3":
                wavelength = 2 * math.pi / f
                ramp = (L / wavelength - 1) / (4 - 1)
                f = f if wavelength < L / 4 else f / s if wavelength > L else (1 - ramp) * f / s + ramp * f
            elif kind == "yarn":
                fast, slow = (D * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
                low, high = max(math.floor(fast), 0), min(math.ceil(slow), D - 1)
                ramp = min(max((i - low) / (high - low if high > low else 0.001), 0), 1)
                f, gain = f / s * ramp + f * (1 - ramp), 0.1 * math.log(s) + 1
            frequencies.append(f)
        return torch.arange(T).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64), gain

    def turned(self, x, layer):
        if self.c.position != "rope":
            return x
        local = self.c.rope_local_theta and self.c.is_windowed(layer)
        angles, gain = self.angles(self.c.rope_local_theta if local else self.c.rope_theta, not local, x.shape[-2])
        turned, rest = x[..., : 2 * angles.shape[-1]], x[..., 2 * angles.shape[-1] :]
        pairs = torch.complex(*turned.chunk(2, dim=-1)) * torch.polar(torch.full_like(angles, gain), angles)
        return torch.cat((pairs.real, pairs.imag, rest), dim=-1)

    def attention(self, name, x, layer):
        c, (B, T, _) = self.c, x.shape
        n_head, n_kv_head = c.heads(layer)
        q, k, v = (self.linear(f"{name}.{part}_proj", x).view(B, T, -1, c.head_dim).transpose(1, 2) for part in "qkv")
        assert (q.shape[1], k.shape[1], v.shape[1]) == (n_head, n_kv_head, n_kv_head)
        if c.qk_norm:
            q, k = self.gained(f"{name}.q_norm", self.rms(q)), self.gained(f"{name}.k_norm", self.rms(k))
        q, k = self.turned(q, layer), self.turned(k, layer)
        heads = []
        for head in range(n_head):
            mine = head * n_kv_head // n_head
            scores = q[:, head] @ k[:, mine].mT * (c.attn_scale or 1 / math.sqrt(c.head_dim))
            scores = c.attn_softcap * torch.tanh(scores / c.attn_softcap) if c.attn_softcap else scores
            for t in range(T):
                for s in range(T):
                    if s > t or (c.is_windowed(layer) and s <= t - c.window):
                        scores[:, t, s] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, mine])
        return self.linear(f"{name}.o_proj", torch.cat(heads, dim=-1))

    def feed_forward(self, name, x):
        acts = {
            "relu": lambda u: u.clamp(min=0),
            "relu2": lambda u: u.clamp(min=0) ** 2,
            "silu": lambda u: u / (1 + (-u).exp()),
            "gelu": lambda u: u * (1 + torch.erf(u / math.sqrt(2))) / 2,
            "gelu_tanh": lambda u: u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
        }
        gates = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
        up = self.linear(f"{name}.up_proj", x)
        gated = self.c.mlp in gates
        h = acts[gates[self.c.mlp]](self.linear(f"{name}.gate_proj", x)) * up if gated else acts[self.c.mlp](up)
        return self.linear(f"{name}.down_proj", h)

    def embedded(self, ids):
        c, T = self.c, ids.shape[1]
        x = self.w["embed.weight"][ids] * c.embed_scale
        if c.position == "learned":
            x = x + self.w["position.weight"][:T]
        if c.position == "sinusoidal":
            place, i = torch.arange(T).double()[:, None], torch.arange(c.n_embd)
            angle = place / 10_000 ** (2 * (i // 2) / c.n_embd)
            x = x + torch.where(i % 2 == 0, angle.sin(), angle.cos())
        return self.norm("embed_norm", x, "everywhere")

    def hidden(self, ids):
        x, counts = self.embedded(ids), {"A": 0, "F": 0}
        for block in range(self.c.n_layer):
            here = {"A": 0, "F": 0}
            for letter in self.c.pattern:
                here[letter] += 1
                name = f"blocks.{block}.{'attn' if letter == 'A' else 'mlp'}{here[letter] if here[letter] > 1 else ''}"
                y = self.norm(f"{name}_norm", x, "before", "both", "everywhere")
                y = self.attention(name, y, counts["A"]) if letter == "A" else self.feed_forward(name, y)
                x = self.norm(
                    f"{name}_sum_norm", x + self.norm(f"{name}_out_norm", y, "output", "both", "everywhere"), "after"
                )
                counts[letter] += 1
        return self.norm("norm", x, "before", "output", "both", "everywhere")

    def logits(self, x):
        y = self.linear("embed" if self.c.tied else "lm_head", x)[..., : self.c.vocab_size]
        return self.c.softcap * torch.tanh(y / self.c.softcap) if self.c.softcap else y

    def ahead(self, i, x):
        y = self.linear(f"ahead.{i}.proj", x)
        return x + y * torch.sigmoid(y)


@given(configs(), st.integers(1, 12))
@settings(max_examples=150)
@torch.no_grad()
def test_the_model_is_its_equations_whatever_is_switched_on(config, length):
    model, ids = drawn(config), some_ids(2, length)
    once_more = Equations(config, model)
    x, plain = model.hidden(ids), once_more.hidden(ids)
    assert apart(x, plain) < 1e-5  # the rotary angles are float32
    assert apart(model(ids), once_more.logits(plain)) < 1e-5
    for i, head in enumerate(model.ahead):
        assert apart(model.logits(head(x)), once_more.logits(once_more.ahead(i, plain))) < 1e-5


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn", "llama3"])
@pytest.mark.parametrize("head_dim, theta, length", [(2, 100.0, 14), (6, 100.0, 14), (16, 1e4, 300), (64, 5e5, 4096)])
def test_scaled_rotary_angles_are_their_formulas(scaling, head_dim, theta, length):
    wants = scaling in ("yarn", "llama3")
    scaled = (
        dict(rope_scaling=scaling, rope_factor=4.0, rope_original_len=length if wants else 0)
        if scaling != "none"
        else {}
    )
    model = build(ModelConfig(**SIZES | dict(n_layer=1), head_dim=head_dim, rope_theta=theta, **scaled))
    angles, gain = Equations(model.config, model).angles(theta, True, 12)
    cos, sin = model.rope(torch.arange(12))
    assert apart(cos, angles.cos().float() * gain) < 1e-5 and apart(sin, angles.sin().float() * gain) < 1e-5


# ---- what holds for all --------------------------------------------------------------------------------------------


@given(configs(), st.lists(st.integers(1, 3), min_size=1, max_size=4))
@torch.no_grad()
def test_cached_equals_uncached_in_any_chunks(config, chunks):
    chunks = [*chunks, 12 - sum(chunks)]
    assume(chunks[-1] > 0)
    model, ids = drawn(config), some_ids(2, 12)
    cache = KVCache(config, 2, torch.device("cpu"), torch.float64)
    seen = torch.cat([model(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)
    assert cache.length == 12 and apart(seen, model(ids)) < 1e-9


@given(configs())
@torch.no_grad()
def test_padded_rows_equal_rows_alone(config):
    model, rows = drawn(config, dtype=torch.float32), [some_ids(1, n, seed=n)[0].tolist() for n in (9, 1, 5)]
    cache, logits = prefill(model, rows)
    singles = [prefill(model, [row]) for row in rows]
    assert apart(logits, torch.cat([single for _, single in singles])) < 1e-4
    for new in some_ids(3, 3).T.tolist():
        logits = decode(model, cache, new)
        alone = torch.cat([decode(model, c, [i]) for (c, _), i in zip(singles, new, strict=True)])
        assert apart(logits, alone) < 1e-4


@given(configs(), st.integers(0, 11))
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(config, place):
    model, ids = drawn(config), some_ids(2, 12)
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % V
    before, after = model(ids), model(changed)
    assert place == 0 or apart(before[:, :place], after[:, :place]) < 1e-12
    assert not torch.equal(before[:, place], after[:, place])


@given(configs())
def test_every_start_has_finite_logits_and_gradients_of_every_weight(config):
    model, ids = build(config), some_ids(2, 12)
    x = model.hidden(ids)
    outputs = [model.logits(x), *(model.logits(head(x)) for head in model.ahead)]
    assert all(y.shape == (2, 12, V) and y.isfinite().all() for y in outputs)
    sum(F.cross_entropy(y.flatten(0, 1), ids.flatten()) for y in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@given(configs())
@settings(max_examples=100)
def test_counts_by_equation_are_those_of_the_built_model(config):
    model = GPT(config)
    assert total_parameters(config) == n_parameters(model)
    assert 3 * sum(part.flops_per_token for part in parts(config)) == training_flops_per_token(model)


USUAL = dict(
    pattern="AF", norm="layernorm", norm_place="before", norm_offset=False, bias=False, qkv_bias=False, qk_norm=False
)
USUAL |= dict(attn_scale=0.0, attn_softcap=0.0, window=0, n_kv_head=2, mlp="gelu")


def nearly_supported(free):
    """Models that the fused blocks compute but for the field `free` ("": none), which is drawn; so are all that do not matter."""
    return configs(**{name: value for name, value in (USUAL | dict(n_head=2, omit_heads="")).items() if name != free})


def fused_is_plain(config):
    plain, ids = drawn(config), some_ids(3, 11)
    quick = copy.deepcopy(plain)
    fused.use(quick)
    results = []
    for model in (plain, quick):
        x = model.hidden(ids)
        outputs = [model.logits(x), *(model.logits(head(x)) for head in model.ahead)]
        loss = sum(F.cross_entropy(y.flatten(0, 1), ids.roll(-1, 1).flatten()) for y in outputs)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    return all((a - b).abs().max() < 1e-8 * a.abs().max() + 1e-12 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("free", ["", *USUAL])
@given(st.data())
@settings(max_examples=60)
def test_fused_blocks_compute_every_model_that_they_say_they_support(free, data):
    config = data.draw(nearly_supported(free))
    if fused.supports(config):
        assert fused_is_plain(config)


@pytest.mark.parametrize("mlp", ["relu2", "gelu", "gelu_tanh"])
def test_fused_blocks_support_what_they_are_for(mlp):
    near = dict(
        SIZES, norm="layernorm", qk_norm=False, mlp=mlp, omit_heads="1:0", head_dim=6, ff_widths="7,9", embed_scale=2.0
    )
    config = ModelConfig(**near, pad_vocab=8, rope_scaling="yarn", rope_factor=4.0, rope_original_len=8)
    assert fused.supports(config) and fused_is_plain(config)


needs_bf16 = pytest.mark.skipif(
    not packed.supports(build(ModelConfig(**SIZES))),
    reason="needs a CPU that multiplies bf16 and torch's oneDNN linear",
)


@needs_bf16
@given(configs())
@torch.no_grad()
def test_packed_blocks_are_the_bf16_model_whatever_is_switched_on(config):
    plain, ids = drawn(config, dtype=torch.float32), some_ids(3, 12)
    quick, rough = copy.deepcopy(plain), copy.deepcopy(plain).bfloat16()
    packed.use(quick)
    exact, twin, ours = plain(ids), rough(ids).float(), quick(ids).float()
    assert (ours - exact).norm() <= 2 * (twin - exact).norm() + 0.01 * exact.norm()


# ---- one switch at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5])
@torch.no_grad()
def test_a_window_sees_its_tokens_and_no_further(window):
    model = drawn(ModelConfig(**SIZES | dict(n_layer=1), window=window, position="none"))
    ids, last = some_ids(1, 12), 11
    before = model(ids)[0, last]
    for back in range(12):
        changed = ids.clone()
        changed[0, last - back] = (changed[0, last - back] + 1) % V
        seen = apart(model(changed)[0, last], before)
        assert seen > 1e-6 if back < window else seen < 1e-12, back


@torch.no_grad()
def test_window_pattern_says_which_attention_has_it():
    """LG: the first attention alone; the second carries what is far back."""
    ids, changed = some_ids(1, 12), some_ids(1, 12)
    changed[0, 0] = (changed[0, 0] + 1) % V
    for pattern, felt in (("L", False), ("LG", True), ("GL", True)):
        model = drawn(ModelConfig(**SIZES, window=3, window_pattern=pattern))
        assert (apart(model(changed)[0, 11], model(ids)[0, 11]) > 1e-9) == felt
        assert [model.config.span(layer) for layer in range(2)] == [
            3 if (pattern * 2)[i] == "L" else 12 for i in range(2)
        ]


@torch.no_grad()
def test_omitted_heads_are_heads_whose_output_is_not_used():
    full, without = (
        drawn(ModelConfig(**SIZES | dict(n_head=4, n_kv_head=2, head_dim=4), omit_heads=o)) for o in ("", "1:0,1")
    )
    weights = full.state_dict()
    for name in "qkv":
        weights[f"blocks.1.attn.{name}_proj.weight"] = weights[f"blocks.1.attn.{name}_proj.weight"].chunk(2)[1]
    weights["blocks.1.attn.o_proj.weight"] = weights["blocks.1.attn.o_proj.weight"][:, 8:]
    without.load_state_dict(weights)
    full.blocks[1].attn.o_proj.weight[:, :8] = 0
    assert apart(without(some_ids(2, 12)), full(some_ids(2, 12))) < 1e-12
    assert without.blocks[1].attn.q_proj.weight.shape == (8, 8) and without.blocks[0].attn.q_proj.weight.shape == (
        16,
        8,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_padding_change_nothing(tied):
    padded, plain = (drawn(ModelConfig(**SIZES, pad_vocab=p, tied=tied), dtype=torch.float32) for p in (64, 0))
    assert (
        padded.config.n_rows == 64 and padded.embed.weight.shape == (64, 8) and padded.lm_head.weight.shape == (64, 8)
    )
    weights = {
        name: p[:V] if name.split(".")[0] in ("embed", "lm_head") else p for name, p in padded.state_dict().items()
    }
    with_weights(plain, weights)
    with torch.no_grad():
        padded.lm_head.weight[V:] = 100.0  # would win every draw
    ids = some_ids(2, 12)
    assert torch.equal(padded(ids), plain(ids)) and padded(ids).shape == (2, 12, V)
    losses = [next_token_loss()(model, (ids, ids.roll(-1, 1)))[0] for model in (padded, plain)]
    assert torch.equal(*losses)
    losses[0].backward()
    assert (padded.lm_head.weight.grad[V:] == 0).all() and padded.lm_head.weight.grad[:V].any()
    sample = SampleConfig(tokens=30, temperature=5.0, top_k=0)
    assert all(max(choice.ids) < V for choice in generate(padded, [[1, 2]], sample))


@torch.no_grad()
def test_without_norms_the_network_is_not_normed():
    model = drawn(ModelConfig(**SIZES, norm="none", qk_norm=False, mlp="relu"))
    assert not any("norm" in name for name, _ in model.named_parameters())
    x, views = torch.randn(1, 4, 8, dtype=torch.float64), model.views(torch.arange(4), None, 0, 4)
    block = model.blocks[0].mlp
    assert apart(block(3 * x), 3 * block(x)) < 1e-12  # a ReLU alone scales along; with a norm before it, it would not
    assert apart(model.blocks[0](x, views, None), x + model.blocks[0].attn(x, views, None)) > 0.01


@torch.no_grad()
def test_afaf_is_two_blocks_of_af():
    sizes = SIZES | dict(window=3, window_pattern="LG", ff_widths="5,7", omit_heads="1:0")
    one = drawn(ModelConfig(**sizes | dict(n_layer=1, pattern="AFAF")))
    two = drawn(ModelConfig(**sizes | dict(n_layer=2, pattern="AF")))
    renamed = {}
    for name, weight in two.state_dict().items():
        sub = name.removeprefix("blocks.1.")
        second = sub.replace("attn", "attn2", 1).replace("mlp", "mlp2", 1)
        renamed[name if sub == name else f"blocks.0.{second}"] = weight
    with_weights(one, renamed)
    assert torch.equal(one(some_ids(2, 12)), two(some_ids(2, 12)))


@torch.no_grad()
def test_without_attention_only_the_token_itself_counts():
    sizes = {name: size for name, size in SIZES.items() if name != "n_head"}
    model, ids = drawn(ModelConfig(**sizes, pattern="F")), some_ids(1, 12)
    changed = (ids + 1) % V
    changed[0, -1] = ids[0, -1]
    assert torch.equal(model(ids)[0, -1], model(changed)[0, -1])
    table = model(torch.arange(V)[:, None])[:, 0]  # one row a token: a table of bigrams
    assert apart(model(ids)[0], table[ids[0]]) < 1e-12


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@torch.no_grad()
def test_an_offset_norm_with_w_minus_one_is_the_plain_norm_with_w(norm):
    offset, plain = (
        drawn(ModelConfig(**SIZES, norm=norm, norm_place="everywhere", norm_offset=o, qk_norm_weight=True))
        for o in (True, False)
    )
    weights = {
        name: p - 1 if "norm" in name and name.endswith("weight") else p for name, p in plain.state_dict().items()
    }
    assert apart(with_weights(offset, weights)(some_ids(2, 12)), plain(some_ids(2, 12))) < 1e-12
    for model in (build(offset.config), build(plain.config)):  # either starts with a factor of 1
        gains = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
        assert gains and all((p == float(not model.config.norm_offset)).all() for p in gains)


@torch.no_grad()
def test_where_the_cast_happens_is_felt_in_bf16_alone():
    first, last = (drawn(ModelConfig(**SIZES, norm_cast=cast), dtype=torch.float32) for cast in ("before", "after"))
    assert torch.equal(first(some_ids(2, 12)), last(some_ids(2, 12)))
    x = torch.randn(50, 8).bfloat16()
    exact = F.rms_norm(x.float(), (8,), eps=1e-5)
    assert torch.equal(first.norm(x), exact.bfloat16() * first.norm.weight.bfloat16())
    assert torch.equal(last.norm(x), (exact * last.norm.weight).bfloat16())
    assert not torch.equal(first.norm(x), last.norm(x))


@torch.no_grad()
def test_sinusoids_are_the_formula_of_2017():
    model = build(ModelConfig(**SIZES | dict(n_embd=10), position="sinusoidal"))
    for place in range(12):
        for i in range(5):
            angle = place / 10_000 ** (2 * i / 10)
            row = model.position(torch.tensor(place))
            assert float(row[2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(row[2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


EQUAL = {  # two spellings of one function, the same weights
    "1/sqrt(d) given": ({}, {"attn_scale": 0.5}),
    "a cap that nothing reaches": ({}, {"attn_softcap": 1e6}),
    "a cap on logits that nothing reaches": ({}, {"softcap": 1e7}),
    "scaled rows": ({}, {"embed_scale": 1.0}),
    "widths one by one": ({"n_ff": 32}, {"ff_widths": "32,32"}),
    "all attentions global but one": ({"window": 4}, {"window": 4, "window_pattern": "LL"}),
    "biases of q, k, v": ({"qkv_bias": True}, {"bias": True}),
}


@pytest.mark.parametrize("pair", EQUAL.values(), ids=EQUAL)
@torch.no_grad()
def test_two_spellings_of_one_function(pair):
    one, other = (drawn(ModelConfig(**SIZES, **switches)) for switches in pair)
    weights = {name: torch.zeros_like(p) for name, p in other.state_dict().items()} | one.state_dict()
    assert apart(with_weights(other, weights)(some_ids(2, 12)), one(some_ids(2, 12))) < 1e-9


@torch.no_grad()
def test_embed_scale_is_a_table_times_a_number_and_a_tied_head_keeps_its_own():
    scaled, plain = (drawn(ModelConfig(**SIZES, embed_scale=s)) for s in (3.0, 1.0))
    plain.embed.weight.mul_(3)
    assert apart(scaled(some_ids(2, 12)), plain(some_ids(2, 12))) < 1e-12
    tied = drawn(ModelConfig(**SIZES, embed_scale=3.0, tied=True))
    x = tied.hidden(some_ids(1, 3))
    assert apart(tied.logits(x), x @ tied.embed.weight.T) < 1e-12


# From the model as it was before the switches came (commit f452756, zero_init=False): they change nothing where they are off.
GOLDEN = [
    ({}, [-3.784695, 6.9869, 2.710282, 0.327405]),
    (
        {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True, "qk_norm": False, "tied": True},
        [-3.535537, -2.287608, -3.605008, -5.515987],
    ),
    ({"mlp": "swiglu", "n_kv_head": 1, "softcap": 4.0, "norm_weight": False}, [0.440583, 0.623267, 0.115747, 0.990118]),
]


@pytest.mark.parametrize("switches, logits", GOLDEN)
@torch.no_grad()
def test_the_model_without_the_new_switches_is_the_old_one(switches, logits):
    model = build(ModelConfig(**SIZES, init="gpt2", **switches), seed=3)
    for parameter in model.parameters():
        parameter.mul_(10).add_(0.05)
    assert model.double()(torch.arange(12)[None])[0, 11, :4].tolist() == pytest.approx(logits, abs=2e-5)


# ---- the start -----------------------------------------------------------------------------------------------------


def first_loss(**switches):
    """The loss of a fresh model, nats a token, on random ids."""
    model = build(ModelConfig(**dict(vocab_size=65, max_seq_len=32, n_layer=2, n_head=4, n_embd=64) | switches))
    ids = torch.randint(65, (8, 33), generator=torch.Generator().manual_seed(0))
    loss, n = next_token_loss()(model, (ids[:, :-1], ids[:, 1:]))
    return float(loss.detach() / n)


def test_starts_by_rule():
    assert first_loss(init="zero") == pytest.approx(math.log(65), rel=1e-6)
    assert first_loss(init="gpt2") == pytest.approx(math.log(65), rel=0.05)
    assert first_loss(init="xavier") == pytest.approx(math.log(65), rel=0.25)
    assert first_loss(init="unit") > 3 * math.log(65)


def test_uniform_starts_draw_within_their_bounds():
    bounds = {"xavier": lambda w: (6 / sum(w.shape)) ** 0.5, "zero": lambda w: (3 / w.shape[1]) ** 0.5}
    bounds["torch"] = lambda w: w.shape[1] ** -0.5
    for init, bound in bounds.items():
        model = build(ModelConfig(vocab_size=300, n_embd=64, n_layer=2, n_ff=100, mlp="swiglu", init=init, n_ahead=2))
        for name, weight in model.named_parameters():
            leaf = name.split(".")[-2]
            if leaf in ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj") or (init != "zero" and leaf == "proj"):
                largest = float(weight.detach().abs().max())
                assert 0.98 * bound(weight) < largest <= bound(weight), name
                assert float(weight.detach().std()) == pytest.approx(bound(weight) / 3**0.5, rel=0.05), name
            zero = init == "zero" and leaf in ("o_proj", "down_proj", "lm_head", "proj")
            assert (float(weight.detach().abs().max()) == 0) == zero, name


@torch.no_grad()
def test_extra_heads_start_as_the_next_tokens():
    model = build(ModelConfig(**SIZES, n_ahead=4, tied=True))
    x = model.hidden(some_ids(2, 12))
    assert len(model.ahead) == 3 and model.logits(x).any()
    assert all(torch.equal(model.logits(head(x)), model.logits(x)) for head in model.ahead)
    alone = build(ModelConfig(**SIZES, tied=True))
    assert torch.equal(alone(some_ids(2, 12)), model(some_ids(2, 12))), "the trunk draws the same weights"


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [
    ({"pattern": "AXF"}, "model.pattern 'AXF' has the letter 'X'; A is an attention, F a feed-forward"),
    ({"pattern": ""}, "model.pattern is empty; AF is the usual block"),
    ({"window": 4, "window_pattern": "LX"}, "model.window_pattern 'LX' has the letter 'X'; L is local, G global"),
    ({"window": 4, "window_pattern": ""}, "model.window_pattern is empty"),
    ({"ff_widths": "256,512"}, "model.ff_widths '256,512' gives 2 widths; give 4, each at least 1: one a feed-forward"),
    ({"ff_widths": "1,2,3,0"}, "each at least 1"),
    ({"ff_widths": "1,2,x,4"}, "model.ff_widths '1,2,x,4' has 'x'; give whole numbers parted by commas"),
    ({"omit_heads": "9:0"}, "attention 9, head 0 is not there; the model has 4 attentions of 4 heads, counted from 0"),
    ({"omit_heads": "0:4"}, "attention 0, head 4 is not there"),
    ({"omit_heads": "0:0,1,2,3"}, "leaves none; drop the attention with model.pattern instead"),
    ({"omit_heads": "0:1", "n_kv_head": 2}, "2 query heads share a key/value head; leave out whole groups of 2"),
    ({"omit_heads": "0"}, "model.omit_heads has '0'; write attention:head,head"),
    ({"omit_heads": "0:"}, "model.omit_heads has '0:'; write attention:head,head"),
    ({"omit_heads": "0:1,1"}, "model.omit_heads has '0:1,1'"),
    ({"omit_heads": "0:1 0:2"}, "model.omit_heads has '0:2'"),
    ({"omit_heads": "a:1"}, "model.omit_heads has 'a:1'"),
    ({"head_dim": 31}, "model.head_dim is 31; rope turns pairs, so it must be even: take model.head_dim 32"),
    ({"n_embd": 132}, "model.head_dim is 33; rope turns pairs, so it must be even: take model.head_dim 34"),
    ({"n_embd": 130}, "model.n_embd is 130, not divisible by model.n_head 4; take n_embd 128 or give model.head_dim"),
    ({"rope_theta": 1.0}, "model.rope_theta is 1: all frequencies would be equal"),
    ({"rope_scaling": "linear"}, "model.rope_factor is 1.0; scaling needs more than 1"),
    ({"rope_scaling": "yarn", "rope_factor": 2.0}, "model.rope_scaling yarn needs model.rope_original_len"),
    ({"rope_scaling": "llama3", "rope_factor": 2.0}, "model.rope_scaling llama3 needs model.rope_original_len"),
    ({"norm_place": "everywhere", "qk_norm": False}, "set model.qk_norm or take norm_place both"),
    ({"pad_vocab": 1}, "model.pad_vocab 1 has no effect; 0 turns it off, 64 is usual"),
    ({"window": 64}, "model.window 64 has no effect: model.max_seq_len is 64; take less"),
    ({"window": 8, "window_pattern": "G"}, "model.window 8 has no effect: model.window_pattern G gives it to no attention of 4"),
    ({"window": 8, "window_pattern": "GGGGL"}, "gives it to no attention of 4; take window_pattern L"),
    ({"window": 8, "rope_local_theta": 100.0}, "model.rope_local_theta has no effect: all attentions have the window"),
    ({"window": 8, "window_pattern": "LG", "rope_local_theta": 1e4}, "model.rope_local_theta has no effect: it is rope_theta"),
    ({"rope_dim": 32}, "model.rope_dim 32 has no effect: model.head_dim is 32; take less or leave it out"),
    ({"rope_dim": 7}, "model.rope_dim is 7; rope turns pairs, so it must be even: take model.rope_dim 8"),
    ({"rope_dim": -2}, "model.rope_dim is -2; it must not be negative"),
    ({"n_ahead": 0}, "model.n_ahead is 0; it must be at least 1"),
    ({"embed_scale": 0.0}, "model.embed_scale is 0.0; it must be above 0"),
    ({"window": -1}, "model.window is -1; it must not be negative"),
]  # fmt: skip
WITHOUT_EFFECT = [
    ({"pattern": "F", "n_head": 2}, "n_head", "pattern 'F' has no A, no attention"),
    ({"pattern": "F", "omit_heads": "0:1"}, "omit_heads", "pattern 'F' has no A"),
    ({"pattern": "F", "rope_theta": 500.0}, "rope_theta", "pattern 'F' has no A"),
    ({"pattern": "F", "qk_norm": False}, "qk_norm", "pattern 'F' has no A"),
    ({"pattern": "F", "attn_scale": 0.1}, "attn_scale", "pattern 'F' has no A"),
    ({"pattern": "F", "attn_softcap": 5.0}, "attn_softcap", "pattern 'F' has no A"),
    ({"pattern": "F", "window": 4}, "window", "pattern 'F' has no A"),
    ({"pattern": "F", "qkv_bias": True}, "qkv_bias", "pattern 'F' has no A"),
    ({"pattern": "A", "mlp": "swiglu"}, "mlp", "pattern 'A' has no F, no feed-forward"),
    ({"pattern": "A", "n_ff": 7}, "n_ff", "pattern 'A' has no F"),
    ({"n_ff": 7, "ff_widths": "1,2,3,4"}, "n_ff", "ff_widths gives each width"),
    ({"position": "learned", "rope_theta": 5e5}, "rope_theta", "position=learned; leave it out or take position rope"),
    ({"position": "learned", "rope_dim": 2}, "rope_dim", "position=learned; leave it out or take position rope"),
    ({"position": "none", "rope_scaling": "linear", "rope_factor": 2.0}, "rope_scaling", "position=none"),
    ({"position": "sinusoidal", "window": 4, "window_pattern": "LG", "rope_local_theta": 9.0}, "rope_local_theta", "=sinus"),
    ({"rope_factor": 2.0}, "rope_factor", "rope_scaling=none; give model.rope_scaling"),
    ({"rope_original_len": 8}, "rope_original_len", "rope_scaling=none"),
    ({"rope_scaling": "ntk", "rope_factor": 2.0, "rope_original_len": 8}, "rope_original_len", "rope_scaling=ntk"),
    ({"window_pattern": "LG"}, "window_pattern", "window=0; give model.window"),
    ({"rope_local_theta": 9.0}, "rope_local_theta", "window=0; give model.window"),
    ({"norm": "none", "norm_place": "both"}, "norm_place", "norm=none; leave it out or take norm rmsnorm"),
    ({"norm": "none", "norm_weight": False}, "norm_weight", "norm=none"),
    ({"norm": "none", "qk_norm": False, "norm_eps": 1e-6}, "norm_eps", "no norm anywhere"),
    ({"qk_norm": False, "qk_norm_weight": True}, "qk_norm_weight", "qk_norm off; set model.qk_norm"),
    ({"norm_weight": False, "norm_offset": True}, "norm_offset", "no norm that has weights"),
    ({"norm": "layernorm", "norm_cast": "after"}, "norm_cast", "no RMSNorm that has weights"),
    ({"norm_weight": False, "norm_cast": "after"}, "norm_cast", "no RMSNorm that has weights"),
    ({"bias": True, "qkv_bias": True}, "qkv_bias", "model.bias, which is on everywhere"),
]  # fmt: skip


@pytest.mark.parametrize("switches, words", REFUSED, ids=lambda x: str(x)[:60])
def test_contradictions_are_refused_with_the_remedy(switches, words):
    with pytest.raises(InputError) as error:
        ModelConfig(**switches)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("switches, field, why", WITHOUT_EFFECT, ids=lambda x: str(x)[:60])
def test_a_setting_without_effect_is_refused(switches, field, why):
    with pytest.raises(InputError) as error:
        ModelConfig(**switches)
    assert str(error.value).startswith(f"model.{field} {switches[field]} has no effect") and why in str(error.value)
    rest = {
        name: value
        for name, value in switches.items()
        if name not in (field, "rope_factor" if field == "rope_scaling" else "")
    }
    ModelConfig(**rest)  # leaving it out mends it


def test_every_rule_without_effect_is_tried():
    tried = {(field, why.split()[0]) for _, field, why in WITHOUT_EFFECT}
    for effect in EFFECTS["model"]:
        assert any(field in effect.fields.split() for field, _ in tried), effect.fields


SECOND = {  # another value of each field, and what it needs to have an effect
    "vocab_size": (19, {}), "pad_vocab": (64, {}), "max_seq_len": (10, {}), "n_layer": (3, {}), "pattern": ("AAF", {}),
    "n_head": (4, {}), "n_kv_head": (1, {}), "n_embd": (16, {}), "head_dim": (6, {}), "omit_heads": ("0:1", {}), "n_ff": (9, {}),
    "ff_widths": ("3,4", {}), "position": ("none", {}), "rope_theta": (300.0, {}), "rope_dim": (2, {}),
    "rope_local_theta": (300.0, {"window": 4, "window_pattern": "LG"}), "rope_scaling": ("ntk", {"rope_factor": 2.0}),
    "rope_factor": (3.0, {"rope_scaling": "linear"}), "rope_original_len": (9, {"rope_scaling": "llama3", "rope_factor": 2.0}),
    "norm": ("layernorm", {}), "norm_place": ("output", {}), "norm_weight": (False, {}), "norm_eps": (0.1, {}),
    "norm_offset": (True, {}), "norm_cast": ("after", {}), "qk_norm": (False, {}), "qk_norm_weight": (True, {}),
    "attn_scale": (2.0, {}), "attn_softcap": (0.5, {}), "window": (4, {}), "window_pattern": ("LG", {"window": 4}),
    "mlp": ("silu", {}), "bias": (True, {}), "qkv_bias": (True, {}), "tied": (True, {}), "embed_scale": (2.0, {}),
    "init": ("unit", {}), "softcap": (1.0, {}), "n_ahead": (2, {}), "dropout": (0.5, {}),
}  # fmt: skip


def test_every_field_has_its_second_value():
    assert set(SECOND) == {f.name for f in dataclasses.fields(ModelConfig)}


NO_FUNCTION = {
    "max_seq_len": "a limit",
    "pad_vocab": "rows that are never read",
    "n_ahead": "heads of training",
    "norm_cast": "bf16",
}


@pytest.mark.parametrize("field", sorted(set(SECOND) - set(NO_FUNCTION)), ids=str)
def test_every_switch_is_felt(field):
    """Whatever is accepted does something: another number of weights, another start, or another function of the same weights."""
    value, needs = SECOND[field]
    base = (
        SIZES
        | needs
        | ({"rope_original_len": 5} if needs.get("rope_scaling") == "llama3" and field != "rope_original_len" else {})
    )
    before = {**base, "rope_original_len": 4} if field == "rope_original_len" else base
    before = {**before, "rope_factor": 2.0} if field == "rope_factor" else before
    before = {name: v for name, v in before.items() if not (field == "rope_scaling" and name == "rope_factor")}
    one, other = (ModelConfig(**values) for values in (before, base | {field: value}))
    models = [build(config) for config in (one, other)]
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    if shapes[0] != shapes[1]:
        return
    if field == "init":
        assert not torch.equal(*(model.blocks[0].attn.q_proj.weight for model in models))
        return
    models = [drawn(one).train(field == "dropout"), build(other).double().train(field == "dropout")]
    with_weights(models[1], models[0].state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        assert apart(*(model(some_ids(2, 10)) for model in models)) > 1e-4


# ---- a preset's values, and stronger ones --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, weak, strong, kept",
    [
        ("model", {"rope_theta": 1e3, "n_layer": 3}, {"position": "learned"}, {"n_layer": 3}),
        ("model", {"rope_theta": 1e3}, {"n_layer": 3}, {"rope_theta": 1e3}),
        (
            "model",
            {"norm_weight": False, "norm_offset": True},
            {"norm": "none"},
            {"norm_offset": True},
        ),  # was in vain before
        ("model", {"rope_scaling": "linear", "rope_factor": 2.0}, {"position": "none"}, {}),  # one after the other
        ("model", {"position": "learned", "rope_theta": 5.0}, {}, {"position": "learned", "rope_theta": 5.0}),
        ("model", {"n_ff": 9, "n_head": 2}, {"pattern": "A"}, {"n_head": 2}),
        ("model", {"n_ff": 9, "n_head": 2}, {"pattern": "F", "n_embd": 24}, {"n_ff": 9}),
        ("train", {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adamw"}, {"optimizer": "sgd"}),
        ("train", {"schedule": "wsd", "decay_fraction": 0.5}, {"schedule": "cosine"}, {"schedule": "wsd"}),
    ],
)
def test_stronger_settings_drop_what_they_leave_without_effect(section, weak, strong, kept):
    assert without_idle(section, weak, strong) == kept


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--preset demo --model.position learned", {"position": "learned", "rope_theta": 10_000.0, "n_layer": 4}),
        ("--preset demo --model.position=none", {"position": "none", "n_head": 5}),
        ("--preset demo --model.norm none", {"norm": "none", "norm_weight": True, "rope_theta": 1000.0}),
        ("--preset demo --model.pattern F", {"pattern": "F", "n_ff": 480, "qk_norm": True}),
        ("--preset demo --model.pattern AFAF", {"pattern": "AFAF", "n_head": 5, "qk_norm": False}),
        ("--preset demo --model.ff_widths 64,64,32,32", {"ff_widths": "64,64,32,32", "n_ff": 640}),
        ("--preset gpt2 --model.no-bias --model.qkv-bias", {"bias": False, "qkv_bias": True}),
        ("--preset demo --config {toml}", {"position": "sinusoidal", "rope_theta": 10_000.0}),
        ("--preset demo --config {toml} --model.position rope", {"position": "rope", "rope_theta": 1000.0}),
    ],
)
def test_a_switch_on_the_command_line_takes_its_presets_values_along(argv, expected, monkeypatch, tmp_path):
    (tmp_path / "my.toml").write_text('[model]\nposition = "sinusoidal"\n')
    found = []
    monkeypatch.setattr("kobza.recipes.train.main", lambda text, run, *rest: found.append(run.model) or 0)
    assert main(["train", *argv.format(toml=tmp_path / "my.toml").split()]) == 0
    assert expected == {name: getattr(found[0], name) for name in expected}


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            "--preset demo --model.position none --model.rope_theta 500",
            "model.rope_theta 500.0 has no effect with position=none",
        ),
        ("--preset demo --model.pattern AB", "model.pattern 'AB' has the letter 'B'"),
        ("--preset demo --model.n_embd 165", "model.head_dim is 33; rope turns pairs"),
        ("--preset demo --model.n_head x", "unable to convert"),
        ("--preset demo --config {toml}", "--model.n-embd"),
    ],
)
def test_what_contradicts_itself_on_the_command_line_is_one_line(argv, words, capsys, monkeypatch, tmp_path):
    (tmp_path / "my.toml").write_text('[model]\nn_embd = "wide"\n')
    monkeypatch.setattr("kobza.recipes.train.main", lambda *rest: 0)
    assert main(["train", *argv.format(toml=tmp_path / "my.toml").split()]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@given(configs())
def test_an_accepted_model_has_nothing_in_vain(config):
    assert list(idle("model", config)) == []
    assert ModelConfig(**dataclasses.asdict(config)) == config
