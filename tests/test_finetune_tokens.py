"""Rows that were never trained are found and no others; new tokens take rows that leave the old ones as they were."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.checkpoint import Loaded, load_checkpoint, save_checkpoint
from kobza.config import DataConfig, InputError, ModelConfig, RunConfig, TrainConfig
from kobza.finetune.config import MethodConfig
from kobza.finetune.example import Row
from kobza.finetune.lora import add_lora
from kobza.finetune.peft import Base, load_adapter, save_adapter
from kobza.finetune.rows import PackedBatches
from kobza.finetune.sft import sft_loss
from kobza.finetune.tokens import add_tokens, mend_rows, untrained_in, untrained_rows, with_tokens
from kobza.loss import make_loss
from kobza.model import build
from kobza.optim import make_optimizers
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer
from kobza.train import IGNORE, train

TEXT = "Sing, goddess, the anger of Peleus' son Achilles and its devastation. " * 4
EOT = "<|endoftext|>"
TOKENIZERS = {
    "char": lambda: CharTokenizer.train([TEXT], "bytes", [EOT]),
    "char, error": lambda: CharTokenizer.train([TEXT], "error", [EOT]),
    "byte": lambda: ByteTokenizer([EOT]),
    "bpe": lambda: LibraryTokenizer.train([TEXT], 300, [EOT]),
}


def drawn(n, width, scale=0.05, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale


def a_model(tokenizer, **switches):
    shape = dict(n_layer=2, n_head=2, n_embd=32, max_seq_len=32, init="gpt2")
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **(shape | switches))
    return Loaded(build(config, seed=3).eval(), RunConfig(config, DataConfig(tokenizer="byte")), tokenizer, {}, Path())


# ---- never trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_nothing_and_rows_in_one_point_are_found(dtype):
    table = drawn(5000, 48)
    table[[7, 4999]] = 0
    table[300] *= 1e-3
    table[100:140] = drawn(1, 48, 0.03, 1)  # the same bits
    table[[0, 41, 2000]] = drawn(1, 48, 0.05, 2) + drawn(3, 48, 1e-5, 3)  # nearly
    wanted = sorted([7, 4999, 300, *range(100, 140), 0, 41, 2000])
    assert untrained_rows(table.to(dtype)) == wanted


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([8, 32, 96]), st.sampled_from([1e-4, 0.02, 1.0, 60.0]), st.floats(0, 5))
def test_no_false_alarm_whatever_the_scale_the_offset_and_the_lengths(seed, width, scale, offset):
    """GPT-2's table has a large common part and rows three times as long as others; Gemma's is small and scaled up."""
    spread = 1 + 2 * torch.rand(700, 1, generator=torch.Generator().manual_seed(seed))
    table = (drawn(700, width, 1.0, seed) * spread + offset * drawn(1, width, 1.0, seed + 1)) * scale
    assert untrained_rows(table) == []
    table[[3, 600]] = table[3].clone()
    table[699] = 0
    assert untrained_rows(table) == [3, 600, 699]


def test_no_alarm_on_a_small_model_just_trained_nor_on_a_fresh_one():
    tokenizer = CharTokenizer.train([TEXT], "bytes", [EOT])
    ids = torch.from_numpy(tokenizer.encode(TEXT).astype(np.int64))[:264].view(8, 33)
    for tied in (True, False):
        config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32, max_seq_len=32, tied=tied)
        model, settings_ = build(config), TrainConfig(steps=30, lr=1e-2, micro_batch=8)
        assert untrained_rows(model.embed.weight) == [] and untrained_rows(model.lm_head.weight) == []
        batches = iter(partial(lambda: (ids[:, :-1], ids[:, 1:])), None)
        steps = list(train(model, make_optimizers(model, settings_), batches, settings_, make_loss(settings_)))
        assert steps[-1].loss < 0.8 * steps[0].loss
        assert untrained_rows(model.embed.weight) == [] and untrained_rows(model.lm_head.weight) == []


def test_a_table_without_a_trained_majority_raises_no_alarm():
    assert untrained_rows(torch.zeros(50, 8)) == [] == untrained_rows(torch.ones(50, 8))


def test_the_work_grows_with_the_rows_not_with_their_pairs(monkeypatch):
    """A third of 30,000 rows in one point: 50 million pairs, of which a handful a row are looked at."""
    from kobza.finetune import tokens

    table, seen = drawn(30_000, 16), []
    table[10_000:20_000] = 1.0
    monkeypatch.setattr(tokens, "PIECE", 1000)
    norm = torch.Tensor.norm
    monkeypatch.setattr(torch.Tensor, "norm", lambda x, *a, **k: seen.append(len(x)) or norm(x, *a, **k))
    assert len(untrained_rows(table)) == 10_000
    assert sum(seen) < 8 * 30_000


@pytest.mark.parametrize("tied", [True, False])
def test_mended_rows_are_the_mean_of_the_trained_ones_and_no_other_moves(tied):
    tokenizer = ByteTokenizer([EOT])
    model = a_model(tokenizer, tied=tied, pad_vocab=64).model
    with torch.no_grad():
        model.embed.weight[[0, 200, 256]] = 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mend_rows(model, [256, 200])
    for name, parameter in model.named_parameters():
        changed = [200, 256] if name in ("embed.weight", "lm_head.weight") else []
        same = [i for i in range(len(parameter)) if i not in changed]
        assert torch.equal(parameter[same], before[name][same])
        if changed:
            no = [0, 200, 256] if name == "embed.weight" else changed  # an untied head's row 0 is a trained one
            trained = [i for i in range(257) if i not in no]
            mean = before[name][trained].double().mean(0)
            assert (parameter[changed].double() - mean).abs().max() < 1e-6
    assert (model.lm_head.weight is model.embed.weight) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_in_use_that_were_never_trained_are_found_in_the_file(tmp_path, tied):
    tokenizer = ByteTokenizer([EOT])
    loaded = a_model(tokenizer, tied=tied, pad_vocab=1024)
    with torch.no_grad():
        loaded.model.embed.weight[[65, 66, 256]] = 0
        loaded.model.embed.weight[257:] = 0  # rows of padding, more than there are tokens
        loaded.model.lm_head.weight[[70, 71]] = 1.0
    save_checkpoint(tmp_path / "x", loaded.model, loaded.run, tokenizer, {})
    rows = [Row(np.array([1, i, 80], np.int32), np.ones(3, bool), "row") for i in (65, 70, 256)]
    assert untrained_in(rows, tmp_path / "x" / "model.safetensors", 257) == [65, 70, 256]
    (tmp_path / "bad").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="bad: cannot be read as safetensors"):
        untrained_in(rows, tmp_path / "bad", 257)


# ---- new -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_model_with_new_tokens_comes_back_from_disk_the_same(tmp_path, kind, tied):
    old = a_model(TOKENIZERS[kind](), tied=tied, pad_vocab=64)
    first = old.tokenizer.vocab_size
    new = add_tokens(old, ["<|tool|>", "<think>"])
    assert new.tokenizer.specials == old.tokenizer.specials | {"<|tool|>": first, "<think>": first + 1}
    assert new.run.model.vocab_size == new.tokenizer.vocab_size == first + 2
    save_checkpoint(tmp_path / "x", new.model, new.run, new.tokenizer, {})
    back = load_checkpoint(tmp_path / "x")
    ids = torch.tensor([[first, *new.tokenizer.encode("the son").tolist(), first + 1]])
    assert back.model(ids).shape[-1] == first + 2 and torch.equal(back.model(ids), new.model(ids))
    assert (back.model.lm_head.weight is back.model.embed.weight) == tied
    assert back.tokenizer.to_json() == new.tokenizer.to_json() and back.tokenizer.specials == new.tokenizer.specials


@pytest.mark.parametrize("pad", [0, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_take_less_than_an_equal_share(tied, pad):
    """Old log-probabilities fall, all by the same, by at most log(1 + n / V): by Jensen, new logits being means of old ones."""
    old = a_model(ByteTokenizer([EOT]), tied=tied, pad_vocab=pad)
    for parameter in old.model.parameters():
        parameter.data *= 3
    old.model.embed.weight.data[257:] += 40  # rows of padding are no tokens
    old.model.lm_head.weight.data[257:] += 40 * (not tied)
    ids, n = torch.arange(24)[None], 5
    before = F.log_softmax(old.model(ids).double(), -1)
    new = add_tokens(old, [f"<|new{i}|>" for i in range(n)])
    after = F.log_softmax(new.model(ids).double(), -1)
    fall = before - after[..., :257]
    assert after.shape[-1] == 257 + n and fall.std(-1).max() < 1e-5
    assert 0 < fall.min() and fall.max() <= math.log1p(n / 257) + 1e-6


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_text_keeps_its_ids(kind):
    tokenizer = TOKENIZERS[kind]()
    grown = with_tokens(tokenizer, ["<|tool|>", "<think>"])
    unknown = st.sampled_from(TEXT) if kind == "char, error" else st.characters(exclude_categories=["Cs"])
    whole = st.sampled_from(["Achilles", "son"] if kind == "char, error" else ["<|tool|>", " <think>", "<|", "think"])
    letters = st.lists(unknown | whole, max_size=30).map("".join)

    @settings(max_examples=40, deadline=None)
    @given(letters)
    def same(text):
        assert grown.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert grown.decode(grown.encode(text)) == tokenizer.decode(tokenizer.encode(text))

    same()


def llama3_like():
    """A byte-level BPE that takes a whole word straight out of its vocabulary, as Llama 3's does."""
    import json

    content = json.loads(LibraryTokenizer.train([TEXT], 300, [EOT]).to_json())
    content["model"]["ignore_merges"] = True
    return LibraryTokenizer(json.dumps(content))


@pytest.mark.parametrize(
    "make, names, said",
    [
        (TOKENIZERS["bpe"], ["the"], "'the' is there already"),
        (TOKENIZERS["bpe"], [EOT], "is there already"),
        (TOKENIZERS["byte"], ["<|a|>", "<|a|>"], "is there already"),
        (TOKENIZERS["char"], ["x"], "no name for a token"),
        (TOKENIZERS["char"], [""], "no name for a token"),
        (TOKENIZERS["byte"], ["<|\x1b[2J|>"], r"'<|\x1b[2J|>' is no name"),
        (TOKENIZERS["byte"], [" <|a|>"], "no name for a token"),
        (TOKENIZERS["byte"], ["<|begin|>"], "begins or ends a text"),
        (llama3_like, ["zebra"], "read out of plain text; take a name as <|zebra|>"),
    ],
)
def test_a_name_that_would_change_old_texts_is_refused_in_one_line(make, names, said):
    tokenizer = make()
    with pytest.raises(InputError) as error:
        with_tokens(tokenizer, names)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_frozen_tables_stay_frozen_and_keep_their_dtype():
    old = a_model(ByteTokenizer([EOT]))
    old.model.bfloat16().requires_grad_(False)
    new = add_tokens(old, ["<|a|>"])
    assert new.model.embed.weight.dtype == torch.bfloat16 and not new.model.lm_head.weight.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_that_learned_travel_with_the_adapter(tmp_path, tied):
    """Rows are added in the same way to a fresh base, then the adapter brings what they learned."""

    def widened():
        return add_tokens(a_model(ByteTokenizer([EOT]), tied=tied), ["<|tool|>", "<think>"])

    tuned, method = widened(), MethodConfig(rank=4, embeddings=True)
    add_lora(tuned.model, method, seed=0)
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    save_adapter(tmp_path / "a", tuned.model, tuned.run.model, method, Base("base", "0" * 64))
    fresh = widened()
    load_adapter(tmp_path / "a", fresh.model, fresh.run.model, "0" * 64)
    ids = torch.tensor([[257, 65, 258, 66]])
    assert torch.equal(fresh.model(ids), tuned.model(ids)) and not torch.equal(widened().model(ids), tuned.model(ids))
    assert not torch.equal(fresh.model.embed.weight[257], fresh.model.embed.weight[258])


# ---- padding is no token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_an_end_whose_id_fills_the_padding_too_is_learned(packing):
    """Code R3: where pad is EOS and padding is told by its id, the end of an answer is masked with it and never learned."""
    end = 0  # what batches are filled with
    lengths = [5, 9, 4]
    generator = np.random.default_rng(1)
    rows = []
    for n in lengths:
        ids = generator.integers(1, 30, n).astype(np.int32)
        ids[-1] = end
        rows.append(Row(ids, np.arange(n) >= n - 3, "row"))
    model = build(ModelConfig(vocab_size=30, n_layer=2, n_head=2, n_embd=32, max_seq_len=32, init="gpt2"), seed=1)
    batches = PackedBatches(rows, 3, 24, seed=0, packing=packing)
    batch = next(batches)
    padding = batch.documents == -1
    assert padding.any() and (batch.inputs[padding] == end).all() and (batch.targets[padding] == IGNORE).all()
    assert int((batch.targets == end).sum()) == len(rows)

    loss, n = sft_loss()(model, batch)
    without = batch._replace(targets=batch.targets.masked_fill(batch.targets == end, IGNORE))
    less, n_less = sft_loss()(model, without)
    alone = sum(
        F.cross_entropy(model(torch.from_numpy(row.ids[None, :-1]).long())[0, -1], torch.tensor(end)) for row in rows
    )
    assert (int(n), int(n_less)) == (9, 6)
    torch.testing.assert_close(loss - less, alone)
