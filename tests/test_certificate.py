"""The certificate's parts: limits that follow from the formats, texts, checks that say what they found, the file and its page.

That a certificate fails where it must is test_certificate_bugs.py's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_certificate_bugs import certificate, clean, source

from kobza.config import InputError, ModelConfig
from kobza.export.proof import checks
from kobza.export.proof.certificate import Certificate, hashes, not_certified, prove, stored_checks, verify
from kobza.export.proof.checks import Check
from kobza.export.proof.corpus import PROSE, corpus_for, without
from kobza.export.proof.engine import EngineError, reference_of
from kobza.export.proof.own import open_own
from kobza.export.proof.page import certificate_page
from kobza.export.proof.stored import stored_in, stored_of
from kobza.export.proof.tolerance import (
    STEPS,
    _to_bits,
    _to_blocks,
    added,
    engine_rounding,
    rms,
    rounding,
    weight_error,
    with_noise,
)
from kobza.export.source import Source
from kobza.export.vocabulary import exceptions
from kobza.formats.ggml import BLOCKS, dequantize, quantize
from kobza.formats.stock import config_to_hf
from kobza.formats.template import Refused
from kobza.formats.weights import to_hf
from kobza.model import build
from kobza.tokenizer import CharTokenizer, LibraryTokenizer

TYPES = ("F32", "F16", "BF16", *STEPS)

# -- limits ------------------------------------------------------------------------------------------------------------

DRAWS = {
    "normal": lambda rng: rng.normal(0, 0.02, (24, 512)),
    "heavy tails": lambda rng: rng.standard_t(2, (24, 512)) * 0.02,
    "positive": lambda rng: rng.uniform(0.1, 1.0, (24, 512)),
    "negative": lambda rng: rng.uniform(-1.0, -0.5, (24, 512)),
    "scales apart": lambda rng: rng.normal(0, 1, (24, 512)) * 10.0 ** rng.uniform(-4, 0, (24, 512)),
    "rows apart": lambda rng: rng.normal(0, 1, (24, 512)) * 10.0 ** rng.uniform(-4, 0, (24, 1)),
    "one in a block": lambda rng: np.where(np.arange(512) % 32 == 3, 1.0, 1e-3) * rng.choice([-1, 1], (24, 512)),
    "all the same": lambda rng: np.full((24, 512), 0.0317),
    "zeros": lambda rng: np.zeros((24, 512)),
}


def stored(w: np.ndarray, type: str) -> np.ndarray:
    return dequantize(quantize(w, type), type, w.shape)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("type", TYPES)
def test_what_a_format_stores_is_in_its_band_and_not_far_inside(type, draw):
    w = np.float32(DRAWS[draw](np.random.default_rng(0)))
    found = weight_error("w", type, torch.from_numpy(w), torch.from_numpy(stored(w, type)))
    assert found.share <= 1, found
    if draw == "normal" and type != "F32":
        assert found.error > 0.3 * found.limit  # a band that lets everything through would prove nothing


@pytest.mark.parametrize("type", TYPES)
def test_what_is_not_the_weight_is_out_of_its_band(type):
    rng = np.random.default_rng(0)
    w = np.float32(rng.normal(0, 0.02, (24, 512)))
    good = stored(w, type)
    one_row = good.copy()
    one_row[3] = good[4]
    wrong = {"permuted rows": good[::-1].copy(), "one row": one_row, "scaled": good * 1.5, "zeros": good * 0}
    wrong |= {"transposed blocks": good.reshape(24, -1, 2, 16)[:, :, ::-1].reshape(w.shape).copy()}
    wrong |= {"not a number": np.where(np.arange(512) == 7, np.float32(np.nan), good)}
    for name, values in wrong.items():
        found = weight_error("w", type, torch.from_numpy(w), torch.from_numpy(np.float32(values)))
        assert found.share > 1, f"{name} in {type}: {found}"


@pytest.mark.parametrize("type", TYPES)
def test_one_wrong_row_of_a_large_table_is_seen(type):
    w = np.float32(np.random.default_rng(0).normal(0, 0.02, (4096, 256)))
    got = stored(w[:8], type)
    got = np.concatenate([got, w[8:]])
    assert weight_error("w", type, torch.from_numpy(w), torch.from_numpy(got)).share <= 1
    got[5] = got[6]
    found = weight_error("w", type, torch.from_numpy(w), torch.from_numpy(got))
    assert found.share > 1 and found.row == 5
    assert "row 5 is off most; 1 of 1 tensors" in checks.weights_check([found]).worst


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "Q4_0"])
def test_an_importance_matrix_stays_in_the_band(type):
    rng = np.random.default_rng(0)
    w, counts = np.float32(rng.standard_t(3, (24, 512))), np.float32(rng.chisquare(1, 512))
    got = dequantize(quantize(w, type, counts), type, w.shape)
    assert weight_error("w", type, torch.from_numpy(w), torch.from_numpy(got)).share <= 1


@pytest.mark.parity
@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16"])
def test_another_quantiser_is_in_the_band_too(type):
    gguf = pytest.importorskip("gguf")
    w = np.float32(np.random.default_rng(1).standard_t(3, (16, 256)))
    kind = getattr(gguf.GGMLQuantizationType, type)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)
    assert weight_error("w", type, torch.from_numpy(w), torch.from_numpy(np.float32(theirs))).share <= 1


def test_a_type_without_a_band_is_refused():
    with pytest.raises(InputError, match="no certificate for weights of type IQ2_XS; kobza writes"):
        rounding("IQ2_XS", np.zeros((2, 256), np.float32))


def test_random_rounding_is_as_large_as_the_formats():
    model = build(ModelConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=64, n_ff=256, max_seq_len=32, tied=True))
    types = {name: "Q4_0" if p.ndim > 1 else "F32" for name, p in model.named_parameters()}
    rough = dict(with_noise(model, types, 0).named_parameters())
    for name, p in model.named_parameters():
        w = p.detach().numpy()
        error, size = rms(rough[name].detach().numpy() - w), rms(rounding(types[name], w))
        # float32's own rounding takes the noise of F32 up
        assert error == pytest.approx(size, rel=0.1) if p.ndim > 1 and size else error <= 2.0**-23
    again = dict(with_noise(model, types, 0).named_parameters())
    assert all(torch.equal(rough[name], again[name]) for name in rough)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4), min_size=1, max_size=40))
def test_bits_are_those_of_the_number_formats(values):
    x = torch.tensor(values)
    assert torch.equal(_to_bits(11)(x), x.half().float()) and torch.equal(_to_bits(8)(x), x.bfloat16().float())


def test_blocks_are_rounded_as_ggml_rounds_them():
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    wanted = torch.from_numpy(stored(x.numpy(), "Q8_0"))
    step = x.abs().max() / 127
    assert (_to_blocks(x, 32) - wanted).abs().max() <= step * 2.0**-3  # its scale is a float16
    assert _to_blocks(torch.zeros(2, 32), 32).abs().max() == 0
    assert _to_blocks(torch.ones(2, 48), 256).shape == (2, 48)  # narrower than a block: one of its own


def test_engine_rounding_is_gone_afterwards():
    model, ids = reference_of(source("llama")).model, torch.arange(20)[None]
    types = dict.fromkeys((name for name, _ in model.named_parameters()), "Q8_0")
    with torch.inference_mode():
        before = model(ids)
        with engine_rounding(model, types, "llama.cpp"):
            rough = model(ids)
        with engine_rounding(model, types, "transformers"):
            near = model(ids)
        assert torch.equal(model(ids), before)
    far, close = (rough - before).abs().max(), (near - before).abs().max()
    assert 0 < close < far / 100


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 10), st.floats(0, 10))
def test_divergences_add_like_squared_distances(a, b):
    assert a + b - 1e-9 <= added(a, b) <= 2 * (a + b) + 1e-9
    assert added(a, 0) == pytest.approx(a)


# -- corpus ------------------------------------------------------------------------------------------------------------


def test_a_corpus_is_the_same_for_the_same_seed():
    tokenizer = source("llama").tokenizer
    assert corpus_for(tokenizer, 3) == corpus_for(tokenizer, 3) != corpus_for(tokenizer, 4)


def test_a_corpus_has_what_breaks_tokenizers():
    whole = corpus_for(source("llama").tokenizer)
    text = "".join(whole.texts)
    for part in (
        "їжак",
        "👩‍👩‍👧",
        "e\u0301",
        "\u00a0",
        "\t\t",
        "\r\n",
        "12345",
        "中文",
        "עברית",
        "http://",
        "<|im_end|>",
        "\x00",
    ):
        assert part in text, part
    assert len(whole.texts) > 150 and len(set(whole.texts)) == len(whole.texts)
    roles = {tuple(m["role"] for m in chat) for chat in whole.conversations}
    assert ("user",) in roles and any(r[0] == "system" for r in roles) and any(len(r) > 4 for r in roles)
    assert all(chat[-1]["role"] == "user" for chat in whole.conversations)
    for text in [*whole.texts, *(m["content"] for chat in whole.conversations for m in chat)]:
        text.encode("utf-8")  # no half of a surrogate pair


def test_a_tokenizer_of_characters_is_asked_what_it_can_spell():
    tokenizer = CharTokenizer.train(["абвгд abc\n"], specials=["<|endoftext|>"])
    whole = corpus_for(tokenizer, held_out=["абв xyz", "xyz"])
    for text in (*whole.texts, *whole.prose, *whole.held_out, *(m["content"] for c in whole.conversations for m in c)):
        tokenizer.encode(text)
    assert whole.unspellable and whole.held_out == ("абв ",) and whole.held_out_is == "given"
    assert all(set(text) - set(tokenizer.characters) for text in whole.unspellable)
    every = corpus_for(CharTokenizer.train(["ab"], unknown="bytes"))
    assert not every.unspellable and "привіт" in every.texts


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9])
@pytest.mark.parametrize("type", STEPS)
def test_a_row_of_next_to_nothing_is_no_fault(type, size):
    """A unit that training gave up: its blocks' scales are among the smallest numbers that float16 has."""
    draw = np.random.default_rng(0)
    w = draw.normal(0, 0.05, (32, 512)).astype(np.float32)
    w[7] *= size / 0.05
    got = dequantize(quantize(w, type), type, w.shape)
    found = weight_error("x", type, torch.from_numpy(w), torch.from_numpy(got))
    assert found.share <= 1, found


def test_an_engine_is_not_asked_what_it_is_known_to_read_otherwise():
    plain = source("llama").tokenizer
    assert without(corpus_for(plain), {}) == corpus_for(plain)
    text = json.loads(plain.to_json()) | {"normalizer": {"type": "NFC"}}
    nfc = LibraryTokenizer(json.dumps(text))
    found = without(corpus_for(nfc), exceptions(nfc))
    assert "NFC" in found.note and all(unicodedata.is_normalized("NFC", text) for text in found.texts)
    assert 100 < len(found.texts) < len(corpus_for(nfc).texts) and found.conversations


# -- checks ------------------------------------------------------------------------------------------------------------


class Wrong:
    """An engine that is another one but for what a test makes it say."""

    def __init__(self, engine, **other):
        self._engine, self._other = engine, other

    def __getattr__(self, name):
        return self._other.get(name) or getattr(self._engine, name)


@pytest.fixture(scope="module")
def engine():
    return reference_of(source("llama"))


@pytest.fixture(scope="module")
def texts():
    return corpus_for(source("llama").tokenizer, n_texts=20)


def failing(found):
    return {check.name: check for check in found if not check.ok}


def test_the_shortest_text_with_other_ids_is_shown(engine, texts):
    other = Wrong(
        engine, encode=lambda text: [7, *engine.encode(text)] if "їж" in text.lower() else engine.encode(text)
    )
    (check,) = failing(checks.text_checks(engine, other, texts)).values()
    assert check.name == "ids" and 0 < check.measured < len(texts.texts)
    assert check.unit == f"of {len(texts.texts)} differ"
    assert check.worst.startswith("text \"Їжак з'їв ґедзя") and "becomes [7," in check.worst
    assert "in the model that was trained [144" in check.worst
    assert not failing(checks.text_checks(engine, engine, texts))


def test_a_lost_beginning_and_other_text_are_seen(engine, texts):
    assert list(failing(checks.text_checks(engine, Wrong(engine, begin=engine.encode), texts))) == ["begin"]
    other = Wrong(engine, decode=lambda ids: engine.decode(ids).replace("і", "i"))
    assert list(failing(checks.text_checks(engine, other, texts))) == ["decode"]


def test_characters_that_a_vocabulary_lacks_are_noted_and_must_do_no_harm():
    def fall(text):
        raise EngineError("llama.cpp broke off")

    tokenizer = CharTokenizer.train(["абв "])
    whole = corpus_for(tokenizer)
    config = ModelConfig(vocab_size=4, n_layer=1, n_head=2, n_embd=8, n_ff=8, max_seq_len=16)
    weights = dict(build(config).named_parameters())
    more = {"shapes": {}, "dtypes": {}, "ends": (), "template": None}
    ours = dataclasses.replace(source("llama"), config=config, tokenizer=tokenizer, read=weights.__getitem__, **more)
    engine = reference_of(ours)

    def unknown(other):
        (check,) = [check for check in checks.text_checks(engine, other, whole) if check.name == "unknown"]
        return check

    n = len(whole.unspellable)
    assert unknown(engine).ok and unknown(engine).note == f"it refuses {n} of {n} and makes ids of the others"
    assert (
        unknown(Wrong(engine, encode=lambda text: [-1])).note == unknown(engine).note
    )  # llama.cpp's own way to refuse
    assert unknown(Wrong(engine, encode=lambda text: [0])).note.startswith(f"it refuses 0 of {n}")
    assert not unknown(Wrong(engine, encode=fall)).ok


def test_prompts_are_compared_in_text_and_ids_and_a_refusal_is_an_answer(engine, texts):
    def refuse(messages, *_):
        raise Refused("no")

    specials = list(source("llama").tokenizer.specials)
    assert not failing(checks.chat_checks(engine, engine, texts, specials))
    shouted = Wrong(engine, render=lambda messages: engine.render(messages).replace("user", "USER"))
    found = failing(checks.chat_checks(engine, shouted, texts, specials))
    assert list(found) == ["prompts"] and "'... " not in found["prompts"].worst and "USER" in found["prompts"].worst
    assert list(failing(checks.chat_checks(engine, Wrong(engine, render=refuse), texts, specials))) == ["prompts"]
    both = Wrong(engine, render=refuse)
    assert not failing(checks.chat_checks(both, both, texts, specials))
    none = Wrong(engine, chat=lambda messages: None)
    assert "becomes nothing" in failing(checks.chat_checks(engine, none, texts, specials))["prompt ids"].worst


def test_ends_are_asked_by_behaviour(engine):
    ends, specials = source("llama").ends, source("llama").tokenizer.specials
    assert checks.stop_check(engine, ends, specials, 0).ok
    deaf = checks.stop_check(Wrong(engine, stops_at=lambda i: i == ends[0]), ends, specials, 0)
    assert not deaf.ok and deaf.worst == f"<|im_end|> (id {ends[1]}) ends a text or an answer, and it goes on"
    eager = checks.stop_check(Wrong(engine, stops_at=lambda i: i in (*ends, 11)), ends, specials, 0)
    assert not eager.ok and eager.worst == "id 11 is an ordinary token, and it stops there"
    noted = checks.stop_check(
        Wrong(engine, stops_at=lambda i: i in (*ends, specials["<|im_start|>"])), ends, specials, 0
    )
    assert noted.ok and "also stops at <|im_start|>" in noted.note


def test_what_falls_over_is_a_finding(engine, texts):
    def fall(*_):
        raise EngineError("llama.cpp broke off: killed by signal 6")

    found = failing(checks.text_checks(engine, Wrong(engine, encode=fall), texts))
    assert "killed by signal 6" in found["ids"].worst


def some_logprobs() -> torch.Tensor:
    return torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)


def test_numbers_that_an_engine_does_not_give():
    a, came = some_logprobs(), torch.tensor([1, 2, 3])
    b = a.clone()
    assert checks.distance(a, b, came).max_logprob == 0
    b[1, a[1].argmin()] = torch.nan  # unlikely: nothing lost
    assert checks.distance(a, b, came).max_logprob < 1e-9
    b[1, a[1].argmax()] = torch.nan
    assert math.isinf(checks.distance(a, b, came).max_logprob)


def test_a_divergence_is_not_taken_in_by_a_sum_that_float32_rounded():
    a, came = some_logprobs(), torch.tensor([1, 2, 3])
    off = checks.distance(a, a + 1e-6, came)
    assert off.mean_kl < 1e-14 and off.max_logprob < 1e-9  # the plain sum would say 1e-6
    other = (a * 1.01).log_softmax(-1)
    assert checks.distance(a, other, came).mean_kl == pytest.approx(float((a.exp() * (a - other)).sum(-1).mean()))


def test_distance_names_the_place_and_the_token():
    a = torch.zeros(4, 10).double().log_softmax(-1)
    b = a.clone()
    b[2, 7] += 0.5
    found = checks.distance(a, b.log_softmax(-1), torch.zeros(4, dtype=torch.long))
    assert found.at == (2, 7) and 0.4 < found.max_logprob < 0.5 and found.nll < 0.02 and found.flips == 1


# -- the certificate ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good():
    return certificate("llama", "F16", clean("llama")["F16"], other=False)


def test_a_certificate_says_what_was_proven(good):
    assert good.ok and not good.failed and good.form == "gguf F16" and good.name == "llama"
    names = {check.name for check in good.checks}
    assert names >= {"settings", "weights", "ids", "begin", "decode", "prompts", "prompt ids", "stops"}
    assert names >= {"probabilities", "engine", "divergence", "perplexity"}
    assert all(check.measured <= check.limit for check in good.checks)
    assert good.artifact == hashes(clean("llama")["F16"]) and good.source == {"sha256": "0" * 64}
    assert good.versions.keys() == {"kobza", "torch", "python"} and "reading it back" in good.engine
    assert good.held_out == "kobza's own fixed prose" and good.date.endswith("+00:00") and good.seconds > 0


def test_a_certificate_comes_back_from_its_file(good):
    assert Certificate.from_json(good.to_json()) == good
    bad = dataclasses.replace(good.checks[0], ok=False, measured=math.inf)
    whole = dataclasses.replace(good, checks=(bad,))
    assert Certificate.from_json(whole.to_json()) == whole and not whole.ok
    json.loads(whole.to_json(), parse_constant=pytest.fail)  # no Infinity, which is no JSON


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda whole: whole | {"certified": False}, "says other than its checks do"),
        (lambda whole: whole | {"checks": [], "certified": True}, "says other than its checks do"),
        (lambda whole: whole | {"kobza_certificate": 2}, "another version"),
        (lambda whole: {k: v for k, v in whole.items() if k != "engine"}, "no 'engine'"),
        (lambda whole: whole | {"checks": [{"name": "ids"}]}, "not a certificate"),
        (lambda whole: [whole], "not a certificate"),
    ],
)
def test_a_forged_certificate_is_refused(good, change, said):
    with pytest.raises(InputError, match=said):
        Certificate.from_json(json.dumps(change(json.loads(good.to_json()))))


def test_a_file_that_changed_is_seen(good, tmp_path):
    path = tmp_path / "F16.gguf"
    path.write_bytes(clean("llama")["F16"].read_bytes())
    assert verify(good, tmp_path) == []
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert verify(good, tmp_path) == ["F16.gguf has changed since"]
    path.unlink()
    assert verify(good, tmp_path) == ["F16.gguf is not there"]
    outside = dataclasses.replace(good, artifact={"../x": "0" * 64})
    (tmp_path / "in").mkdir()
    (tmp_path / "x").write_text("x")
    with pytest.raises(InputError):
        verify(outside, tmp_path / "in")


def test_what_nobody_checked_says_so():
    found = not_certified(source("llama"), clean("llama")["F16"], "gguf F16", "--no-certificate")
    assert not found.ok and json.loads(found.to_json())["certified"] is False
    assert "Not certified: --no-certificate" in certificate_page(found)


def test_no_checks_are_no_certificate():
    assert not Certificate("x", "hf").ok


def test_an_artifact_that_cannot_be_read_is_not_certified(texts, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(clean("llama")["F16"].read_bytes()[:50_000])
    found = prove(source("llama"), path, "gguf F16", lambda: open_own(path, str), texts, False)
    assert found.failed == ["reads", "opens"] and "truncated" in found.checks[0].worst


def test_what_cannot_be_read_back_is_held_against_what_it_should_be(engine, texts, tmp_path):
    class Opened(Wrong):
        __enter__, __exit__ = (lambda self: self), (lambda self, *_: None)

    def wrong(ids, places):
        return engine.logprobs(ids, places).roll(1, -1)

    def proven(**other):
        more = {"n_places": 6, "stored": stored_of(source("llama"))}
        return prove(source("llama"), tmp_path, "onnx", lambda: Opened(engine, **other), texts, **more)

    good = proven()
    assert good.ok and not {"weights", "settings"} & {check.name for check in good.checks}
    assert {"probabilities", "engine", "divergence"} <= set(proven(logprobs=wrong).failed)


def test_biases_of_zero_that_a_family_brings_are_no_difference(tmp_path):
    tokenizer = LibraryTokenizer.train(PROSE, 300, [])
    config = ModelConfig(
        vocab_size=300, n_layer=1, n_head=2, n_embd=32, n_ff=32, mlp="swiglu", qk_norm=False, qkv_bias=True
    )
    weights = {name: p.detach() for name, p in build(config).named_parameters()}
    shapes, dtypes = {n: tuple(t.shape) for n, t in weights.items()}, {n: t.dtype for n, t in weights.items()}
    ours = Source("biased", config, tokenizer, shapes, dtypes, weights.__getitem__, "0" * 64)
    llama = config_to_hf(dataclasses.replace(config, bias=True, qkv_bias=False))
    (tmp_path / "config.json").write_text(json.dumps(llama))
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    written = to_hf(config, llama, weights)
    save_file(written, tmp_path / "model.safetensors")
    assert not failing(stored_checks(ours, stored_in(tmp_path), tmp_path))
    written["model.layers.0.self_attn.o_proj.bias"] += 1e-3
    save_file(written, tmp_path / "model.safetensors")
    found = failing(stored_checks(ours, stored_in(tmp_path), tmp_path))
    assert list(found) == ["weights"] and "o_proj.bias" in found["weights"].worst


def test_rows_of_another_model_are_not_compared(engine, texts, tmp_path):
    few = Wrong(engine, vocab_size=10, __enter__=None)
    from kobza.export.proof.certificate import certify

    found = failing(certify(source("llama"), engine, few, None, texts))
    assert "cannot be compared" in found["probabilities"].unit


def test_the_page_shows_verdict_limits_and_the_worst(good):
    bad = dataclasses.replace(
        good, form="gguf Q4_K_M", checks=(Check("ids", "the ids", False, 2, 0, "of 9", "<script>\x07"),)
    )
    page = certificate_page([good, bad])
    assert "Certified: all" in page and "Not certified: 1 of 1 checks fail." in page
    assert "&lt;script&gt;\ufffd" in page and "<script" not in page
    assert good.artifact["F16.gguf"] in page and "a weaker proof" in page
    assert "Certified: all" in certificate_page(good) and "href" not in certificate_page(good)


def test_prose_stays_readable():
    assert all(text.endswith("\n") for text in PROSE) and "Україн" in PROSE[0]
    assert max(BLOCKS[type][0] for type in TYPES) == 256


def test_a_perplexity_is_not_off_by_what_an_engine_s_sums_are():
    """llama.cpp's log-probabilities of 49,152 tokens add up to 1 but for 1e-4, which is no other model."""
    from kobza.export.proof.certificate import _perplexity

    table = torch.randn(9, 50, dtype=torch.float64).log_softmax(-1)
    check = _perplexity(table, table + 1e-4, torch.arange(9), 1e-5)
    assert check.ok and check.measured < 1e-12
    assert not _perplexity(table, table.roll(1, 1), torch.arange(9), 1e-5).ok
