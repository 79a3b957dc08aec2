"""The runner: one forward of a ragged batch gives each row the logits, and where it says so the bits, that it has alone."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig, SampleConfig
from kobza.generate import generate
from kobza.model import GPT, build
from kobza.quant.int8 import Linear8bit
from kobza.serve.runner import Adapter, LowRank, Piece, is_exact, make_runner
from kobza.surgery import replace_modules

BASE = {"vocab_size": 65, "n_layer": 2, "n_embd": 64, "n_head": 4, "max_seq_len": 128, "init": "xavier"}
KINDS = {
    "modern": {},
    "llama": {"n_kv_head": 2, "mlp": "swiglu", "norm_weight": True, "qk_norm": False, "tied": True},
    "three": {"n_head": 3, "n_kv_head": 1, "n_embd": 48, "mlp": "swiglu", "n_ff": 100, "qk_norm_weight": True},
    "windows": {"window": 8, "window_pattern": "LG", "rope_local_theta": 500.0},
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "bias": True,
        "mlp": "gelu_tanh",
        "n_ff": 100,
        "qk_norm": False,
    },
    "gemma": {
        "head_dim": 24,
        "mlp": "geglu_tanh",
        "softcap": 5.0,
        "attn_softcap": 3.0,
        "norm_place": "both",
        "embed_scale": 8.0,
        "norm_offset": True,
        "window": 40,
        "tied": True,
    },
    "afaf": {"pattern": "AFAF", "norm_place": "everywhere", "pad_vocab": 64, "mlp": "silu"},
    "after": {"norm_place": "after", "n_ahead": 2, "qkv_bias": True},
    "bare": {"norm": "none", "position": "sinusoidal", "qk_norm": False, "mlp": "relu"},
    "omitted": {"omit_heads": "0:1 1:0,2", "ff_widths": "70,90"},
    "partial": {"head_dim": 17, "rope_dim": 8, "n_kv_head": 1},
    "wide": {"n_ff": 2048, "n_embd": 128, "n_layer": 1},
    "feedforward": {"pattern": "F"},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_len": 32, "norm_cast": "after"},
}
SIZE = 16  # of the cache's blocks here
TOLERANCE = {"fp32": 1e-4, "bf16": 0.08, "int8": 0.12}  # of a logit, whose spread is about 1 here


def model_of(kind: str) -> GPT:
    """A small model whose norms and biases are not those of a fresh one."""
    model = build(ModelConfig(**BASE | KINDS[kind]), seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
    return model


def runner_of(model: GPT, precision: str = "fp32", **more):
    return make_runner(model, precision=precision, memory=1 << 23, block_size=SIZE, digest="d", **more)


def ids_of(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 65, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def plain(model: GPT, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of the model itself."""
    return model(torch.tensor([ids]))[0].float()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model(kind, precision):
    model, ids = model_of(kind), ids_of(90)
    runner = runner_of(model, precision)
    logits = runner.forward([Piece(ids, 0, [4, 1, 0, 7, 6, 2], 90)])
    assert logits.shape == (90, 65) and logits.dtype == torch.float32
    spread = float(plain(model, ids).std())
    assert (logits - plain(model, ids)).abs().max() < TOLERANCE[precision] * max(1.0, spread)


def steps(seed: int) -> list[list[tuple[int, int]]]:
    """Some sequences cut into pieces, and which runs when: [[(sequence, tokens), ...] a step]."""
    choose = random.Random(seed)
    left, plan = [choose.randint(1, 100) for _ in range(choose.randint(2, 5))], []
    while any(left):
        step = []
        for i in choose.sample(range(len(left)), len(left)):
            if left[i] and choose.random() < 0.6:
                step.append((i, min(left[i], choose.choice([1, 1, 1, 2, 3, 5, 8, 9, 17, 64, 70]))))
                left[i] -= step[-1][1]
        plan += [step] if step else []
    return plan


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
@given(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 9999))
@settings(max_examples=8, deadline=None)
def test_any_batch_any_chunks_any_blocks_give_the_same_bits(precision, threads, kind, seed):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runner, plan = RUNNERS(kind, precision), steps(seed)
        n = 1 + max(i for step in plan for i, _ in step)
        lengths = [sum(take for step in plan for i, take in step if i == j) for j in range(n)]
        texts = [ids_of(length, seed + j) for j, length in enumerate(lengths)]
        free = torch.randperm(runner.n_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        free = sorted(free) if seed % 2 else free
        blocks = [[free.pop(0) for _ in range(-(-length // SIZE))] for length in lengths]
        done, logits = [0] * n, [[] for _ in range(n)]
        for step in plan:
            pieces = [Piece(texts[i][done[i] : done[i] + take], done[i], blocks[i], take) for i, take in step]
            rows = runner.forward(pieces).split([take for _, take in step])
            for (i, take), part in zip(step, rows, strict=True):
                logits[i].append(part)
                done[i] += take
        for text, parts in zip(texts, logits, strict=True):
            alone = runner.forward([Piece(text, 0, list(range(-(-len(text) // SIZE))), len(text))])
            same = torch.equal(torch.cat(parts), alone)
            assert same if runner.exact else torch.allclose(torch.cat(parts), alone, atol=TOLERANCE[precision])
    finally:
        torch.set_num_threads(before)


class Kept(dict):
    """Runners by kind and precision, made once."""

    def __call__(self, kind: str, precision: str):
        if (kind, precision) not in self:
            self[kind, precision] = runner_of(model_of(kind), precision)
        return self[kind, precision]


RUNNERS = Kept()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_single_row_of_a_long_sum_has_the_bits_it_has_in_a_batch(precision):
    runner, ids = RUNNERS("wide", precision), ids_of(40)
    whole = runner.forward([Piece(ids, 0, [0, 1, 2], 40)])
    single = torch.cat([runner.forward([Piece([i], at, [3, 4, 5], 1)]) for at, i in enumerate(ids)])
    assert torch.equal(single, whole) or not runner.exact


def test_a_prefix_of_another_sequence_is_as_good_as_its_own():
    runner, prefix = RUNNERS("llama", "fp32"), ids_of(32)
    ends = [ids_of(n, 5 + n) for n in (3, 20, 1)]
    runner.forward([Piece(prefix, 0, [9, 3], 0)])
    warm = runner.forward([Piece(end, 32, [9, 3, 10 + 2 * i, 11 + 2 * i], len(end)) for i, end in enumerate(ends)])
    cold = [runner.forward([Piece(prefix + end, 0, [20, 21, 22, 23], len(end))]) for end in ends]
    assert torch.equal(warm, torch.cat(cold))


def test_a_shared_prefix_is_read_and_never_written():
    runner = RUNNERS("modern", "fp32")
    runner.forward([Piece(ids_of(32), 0, [0, 1], 0)])
    store = runner.flat.blocks[0].layer.store
    before = store.keys[:2].clone(), store.values[:2].clone()
    runner.forward([Piece(ids_of(5, 1), 32, [0, 1, 2], 1), Piece(ids_of(5, 2), 32, [0, 1, 3], 1)])
    assert torch.equal(before[0], store.keys[:2]) and torch.equal(before[1], store.values[:2])


def test_what_a_broken_text_left_in_a_block_touches_nobody():
    runner, ids = RUNNERS("modern", "fp32"), ids_of(20)
    clean = runner.forward([Piece(ids, 0, [0, 1], 20)])
    for block in runner.flat.blocks[::2]:
        block.layer.store.keys.fill_(float("nan"))
        block.layer.store.values.fill_(float("inf"))
    try:
        assert torch.equal(runner.forward([Piece(ids, 0, [0, 1], 20)]), clean)
    finally:
        for block in runner.flat.blocks[::2]:
            block.layer.store.keys.zero_()
            block.layer.store.values.zero_()


def test_greedy_ids_are_those_of_generate():
    model = model_of("llama")
    runner, config = runner_of(model), SampleConfig(tokens=30, temperature=0.0)
    prompts = [ids_of(n, n) for n in (3, 17, 40)]
    written, done = [list(prompt) for prompt in prompts], [0, 0, 0]
    for _ in range(30):
        pieces = [
            Piece(w[d:], d, list(range(6 * i, 6 * i + 6)), 1)
            for i, (w, d) in enumerate(zip(written, done, strict=True))
        ]
        done = [len(w) for w in written]
        for w, i in zip(written, runner.forward(pieces).argmax(-1).tolist(), strict=True):
            w.append(i)
    for prompt, ids in zip(prompts, written, strict=True):
        assert ids[len(prompt) :] == [choice.ids[0] for choice in generate(model, [prompt], config)]


def test_wanted_rows_come_in_the_order_of_the_pieces():
    runner = RUNNERS("modern", "fp32")
    long, short = ids_of(40), ids_of(4, 1)
    both = runner.forward([Piece(long, 0, [0, 1, 2], 2), Piece(short, 0, [3], 1), Piece(ids_of(3, 2), 0, [4], 0)])
    assert torch.equal(both[:2], runner.forward([Piece(long, 0, [0, 1, 2], 2)]))
    assert torch.equal(both[2:], runner.forward([Piece(short, 0, [3], 1)]))


# ---- weights in codes ----------------------------------------------------------------------------------------------


def test_weights_in_codes_are_used_as_they_are():
    model = model_of("modern")
    leaves = ("_proj", "lm_head")
    replace_modules(model, lambda name, m: name.endswith(leaves) and isinstance(m, torch.nn.Linear), Linear8bit.of)
    ids, runner = ids_of(60), runner_of(model, "auto")
    assert runner.precision == "int8"
    logits = runner.forward([Piece(ids, 0, [0, 1, 2, 3], 60)])
    off = (logits - plain(model, ids)).abs().max()
    assert off < 0.03  # bf16 rows alone: nothing is quantised a second time


def test_a_tied_table_shares_the_codes_of_the_head():
    runner = runner_of(model_of("llama"), "int8")
    codes, table = (cell_of(f, "codes") for f in (runner.flat.head.multiply, runner.flat.table))
    assert codes.dtype == torch.int8 and codes.data_ptr() == table.data_ptr()


def cell_of(function, name: str):
    """What a closure holds under a name."""
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))[name].cell_contents


# ---- adapters ------------------------------------------------------------------------------------------------------


def adapter_of(
    model: GPT, seed: int, leaves=("q_proj", "v_proj", "down_proj", "gate_proj", "up_proj", "o_proj", "k_proj")
):
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, module in model.named_modules():
        if name.endswith(leaves):
            a = torch.empty(3, module.in_features).normal_(0, 0.3, generator=generator)
            b = torch.empty(module.out_features, 3).normal_(0, 0.3, generator=generator)
            parts[name] = LowRank(a, b, 0.5)
    return Adapter(f"digest{seed}", parts)


@torch.no_grad()
def merged(model_kind: str, adapter: Adapter) -> GPT:
    model = model_of(model_kind)
    for name, low in adapter.parts.items():
        model.get_submodule(name).weight += low.scale * low.b @ low.a
    return model


@pytest.mark.parametrize("kind", ["three", "llama", "gpt2", "omitted"])
def test_rows_with_an_adapter_are_the_merged_model_and_rows_without_are_untouched(kind):
    model, ids = model_of(kind), ids_of(40)
    adapters = {"one": adapter_of(model, 1), "two": adapter_of(model, 2, ("q_proj", "down_proj"))}
    runner = runner_of(model, adapters=adapters)
    assert runner.adapters == {"one": "digest1", "two": "digest2"}
    names = [None, "one", "two", "one"]
    pieces = [Piece(ids, 0, [3 * i, 3 * i + 1, 3 * i + 2], 40, name) for i, name in enumerate(names)]
    rows = runner.forward(pieces).split(40)
    assert torch.equal(rows[0], runner_of(model).forward([Piece(ids, 0, [0, 1, 2], 40)]))
    assert (rows[1] - rows[0]).abs().max() > 0.1
    for name, row in zip(names[1:], rows[1:], strict=True):
        assert (row - plain(merged(kind, adapters[name]), ids)).abs().max() < 1e-3
    cut = [runner.forward([Piece(ids[a : a + 1], a, [9, 10, 11], 1, "one")]) for a in range(40)]
    assert torch.equal(torch.cat(cut), rows[1])


def test_an_adapter_of_the_head_reaches_the_rows_that_are_read():
    model = model_of("modern")
    adapters = {"h": adapter_of(model, 1, ("lm_head",))}
    runner, ids = runner_of(model, adapters=adapters), ids_of(20)
    rows = runner.forward([Piece(ids, 0, [0, 1], 1), Piece(ids, 0, [2, 3], 2, "h")])
    want = plain(merged("modern", adapters["h"]), ids)[-2:]
    assert (rows[1:] - want).abs().max() < 1e-3 and (rows[0] - rows[2]).abs().max() > 0.1


def test_an_adapter_that_does_not_fit_is_refused():
    model = model_of("modern")
    low = LowRank(torch.zeros(2, 64), torch.zeros(64, 2), 1.0)
    with pytest.raises(InputError, match="no layer 'blocks.0.attn.q_prj'.*did you mean blocks.0.attn.q_proj"):
        runner_of(model, adapters={"a": Adapter("d", {"blocks.0.attn.q_prj": low})})
    wide = replace(Adapter("d", {}), parts={"blocks.0.attn.q_proj": low._replace(a=torch.zeros(2, 60))})
    with pytest.raises(InputError, match="q_proj is 64 -> 64, and its factors are"):
        runner_of(model, adapters={"a": wide})


# ---- settings ------------------------------------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused():
    model = model_of("modern")
    with pytest.raises(InputError, match="--precision is 'fp8'; one of auto"):
        runner_of(model, "fp8")
    with pytest.raises(InputError, match="the cache has 100 bytes and a block of 32 tokens takes"):
        make_runner(model, precision="fp32", memory=100, digest="d")


def test_the_digest_tells_the_number_format():
    model = model_of("modern")
    assert runner_of(model, "fp32").digest != runner_of(model, "bf16").digest


def test_a_runner_that_rounds_by_the_batch_says_so():
    runner = runner_of(model_of("modern"))
    norm = runner.flat.norm
    runner.flat.norm = lambda x: norm(x) * (1 + 1e-6 * len(x))
    assert not is_exact(runner)
