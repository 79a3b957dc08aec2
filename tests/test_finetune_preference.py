"""DPO, ORPO and KTO are their papers' formulas, written out by hand in float64, and TRL's; a window of any cut is one batch."""

import copy
import math
import types

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kobza.config import InputError, ModelConfig, TrainConfig
from kobza.finetune.example import Row
from kobza.finetune.preference import (
    PairBatches,
    Pairing,
    answer_gains,
    answer_means,
    dpo_loss,
    eval_pairs,
    kto_loss,
    kto_metrics,
    mismatched,
    need_both_kinds,
    orpo_loss,
    preference_metrics,
    reference_logprobs,
    useful,
)
from kobza.finetune.prefix import shared_hidden
from kobza.finetune.sft import hidden_of
from kobza.model import build
from kobza.optim import make_optimizers
from kobza.surgery import watch
from kobza.train import train, train_step

V = 13
CPU = torch.device("cpu")
LOSSES = [dpo_loss, orpo_loss, kto_loss]


def small(seed=0, **switches):
    """A model in float64 with every weight drawn."""
    sizes = dict(vocab_size=V, max_seq_len=16, n_layer=2, n_head=2, n_embd=16, init="unit")
    return build(ModelConfig(**(sizes | switches)), seed).double()


def row(ids, n_prompt, where="a"):
    ids = np.array(ids, np.int32)
    return Row(ids, np.arange(len(ids)) >= n_prompt, where)


def pairs(n=5, seed=0):
    """Answers of unequal length, the two of a pair to one question."""
    draw = np.random.default_rng(seed)
    made = []
    for i in range(n):
        question = draw.integers(V, size=2 + i % 3).tolist()
        answers = [draw.integers(V, size=1 + int(draw.integers(6))).tolist() for _ in range(2)]
        made.append(tuple(row(question + answer, len(question), f"pair {i}") for answer in answers))
    return made


def pairing(model, made=None, desirable=None):
    made = made or pairs()
    return Pairing(made, reference_logprobs(model, made, 3, CPU), desirable)


def log_p(model, one):
    """Log-probability of each token of an answer, alone and the slow way."""
    ids = torch.tensor(one.ids[None], dtype=torch.long)
    scores = model(ids)[0].log_softmax(-1)
    return torch.stack([scores[t - 1, int(one.ids[t])] for t in range(len(one.ids)) if one.learned[t]])


def by_hand(objective, beta, model, before, made, desirable=None):
    """The papers' formulas, a pair at a time."""
    total = 0
    drift = [log_p(model, b).sum() - log_p(before, b).sum() for _, b in made]
    baseline = max(0.0, float(sum(drift).detach()) / len(drift))
    for i, (a, b) in enumerate(made):
        la, lb = log_p(model, a), log_p(model, b)
        gain = la.sum() - log_p(before, a).sum()
        if objective is dpo_loss:
            total += torch.log(1 + torch.exp(-beta * (gain - (lb.sum() - log_p(before, b).sum()))))
        elif objective is orpo_loss:
            pa, pb = la.mean().exp(), lb.mean().exp()
            ratio = (pa / (1 - pa)) / (pb / (1 - pb))
            total += -la.mean() + beta * torch.log(1 + 1 / ratio)
        else:
            z = gain - baseline if desirable[i] else baseline - gain
            total += 1 - 1 / (1 + torch.exp(-beta * z))
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def moved(model, by=0.1, seed=7):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return other


FLAGS = np.array([True, False, False, True, True])


@pytest.mark.parametrize("objective", LOSSES)
def test_each_loss_is_its_formula_gradients_and_all(objective):
    before = small()
    model = moved(before)
    held = pairing(before, desirable=FLAGS)
    (batch,) = eval_pairs(held, 99)
    loss, n = objective(0.3)(model, batch)
    wanted = by_hand(objective, 0.3, model, before, held.pairs, FLAGS)
    assert int(n) == 5
    assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    for found, slow in zip(gradients(model, loss), gradients(model, wanted), strict=True):
        assert_close(found, slow, rtol=1e-8, atol=1e-11)


def test_ktos_baseline_is_above_0_in_one_of_these_cases_and_held_at_0_in_the_other():
    """Else the clamp would be untried."""
    before, signs = small(), set()
    for seed in range(6):
        model = moved(before, seed=seed)
        (batch,) = eval_pairs(pairing(before, desirable=FLAGS), 99)
        drift = float(answer_gains(model, batch).chunk(2)[1].detach().mean())
        signs.add(drift > 0)
        wanted = by_hand(kto_loss, 0.3, model, before, pairs(), FLAGS)
        loss, _ = kto_loss(0.3)(model, batch)
        assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
        for found, slow in zip(gradients(model, loss), gradients(model, wanted), strict=True):
            assert_close(found, slow, rtol=1e-8, atol=1e-11)
    assert signs == {True, False}


@pytest.mark.parametrize("objective", LOSSES)
def test_gradcheck(objective):
    before = small(n_layer=1)
    model = moved(before)
    (batch,) = eval_pairs(pairing(before, pairs(2), FLAGS[:2]), 99)
    weights = [model.blocks[0].attn.v_proj.weight, model.norm.weight]
    if objective is kto_loss:  # its baseline is a constant by definition, so a difference quotient must not move it
        batch = batch._replace(reference=batch.reference + torch.tensor([0, 0, 100.0, 100.0]))

    def loss(*parts):
        named = dict(zip(["blocks.0.attn.v_proj.weight", "norm.weight"], parts, strict=True))
        functional = types.SimpleNamespace(
            hidden=lambda *a, **k: torch.func.functional_call(Halves(model), _under(named), ("hidden", a, k)),
            logits=model.logits,
        )
        return objective(0.3)(functional, batch)[0]

    parts = [w.detach().clone().requires_grad_() for w in weights]
    assert all(g.abs().max() > 1e-4 for g in torch.autograd.grad(loss(*parts), parts)), "or the check would say nothing"
    assert torch.autograd.gradcheck(loss, parts, fast_mode=True)


class Halves(torch.nn.Module):
    """So that functional_call reaches model.hidden."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, half, args, kwargs):
        return getattr(self.model, half)(*args, **kwargs)


def _under(named):
    return {f"model.{name}": value for name, value in named.items()}


def test_before_the_first_step_dpo_is_ln_2_and_kto_a_half_a_pair():
    model = small()
    (batch,) = eval_pairs(pairing(model, desirable=FLAGS), 99)
    assert_close(dpo_loss(0.3)(model, batch)[0].item(), 5 * math.log(2), rtol=1e-12, atol=0)
    assert_close(kto_loss(0.3)(model, batch)[0].item(), 2.5, rtol=1e-12, atol=0)


def test_better_and_worse_exchanged_turn_the_preference_round():
    before = small()
    model, straight = moved(before), pairing(before)
    crossed = Pairing([(b, a) for a, b in straight.pairs], straight.reference[:, ::-1].copy())
    for p in range(5):
        one, other = straight.batch([p], CPU), crossed.batch([p], CPU)
        a, b = (dpo_loss(0.3)(model, batch)[0].item() for batch in (one, other))
        assert_close(math.exp(-a) + math.exp(-b), 1.0, rtol=1e-12, atol=0)  # sigmoid(z) + sigmoid(-z)
        preferred = [(orpo_loss(0.3)(model, b)[0] - orpo_loss(1e-12)(model, b)[0]).item() / 0.3 for b in (one, other)]
        assert_close(sum(math.exp(-part) for part in preferred), 1.0, rtol=1e-9, atol=0)


@pytest.mark.parametrize("objective", [dpo_loss, orpo_loss])
def test_a_window_of_any_cut_is_one_batch(objective):
    before = small()
    held, updated = pairing(before), []
    for cut in ([[0, 1, 2, 3, 4]], [[0], [1, 2, 3], [4]]):
        model = moved(before)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mean, _ = train_step(model, [optimizer], [held.batch(places, CPU) for places in cut], objective(0.3))
        updated.append((mean, model))
    (a, first), (b, second) = updated
    assert_close(a, b, rtol=1e-6, atol=0)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_kto_over_a_cut_window_differs_by_its_baseline_alone():
    """Said in the docstring: with the baseline held at 0 by the reference, the cut makes no difference."""
    before = small()
    model, held = moved(before), pairing(before, desirable=FLAGS)
    whole = kto_loss(0.3)(model, held.batch([0, 1, 2, 3, 4], CPU))[0]
    parts = sum(kto_loss(0.3)(model, held.batch(places, CPU))[0] for places in ([0, 1], [2, 3, 4]))
    assert abs((whole - parts).item()) > 1e-6
    held.reference[:, 1] += 100
    whole = kto_loss(0.3)(model, held.batch([0, 1, 2, 3, 4], CPU))[0]
    parts = sum(kto_loss(0.3)(model, held.batch(places, CPU))[0] for places in ([0, 1], [2, 3, 4]))
    assert_close(whole, parts, rtol=1e-12, atol=0)


def test_an_answer_known_by_heart_has_a_finite_loss_and_gradient_under_orpo():
    model = small().float()
    sure = torch.full((2, V), -1e4)
    sure[:, 5] = 1e4
    logits = torch.nn.Parameter(sure)
    model.logits = lambda x: logits[: len(x)] + 0 * x.sum()
    loss, _ = orpo_loss(0.3)(model, Pairing([(row([1, 5], 1), row([1, 5], 1))]).batch([0], CPU))
    loss.backward()
    assert math.isfinite(loss.item()) and logits.grad.isfinite().all()


@pytest.mark.parametrize("objective", LOSSES)
def test_a_beta_under_which_nothing_is_learned_from_pairs_is_refused(objective):
    with pytest.raises(InputError, match="--beta is 0"):
        objective(0.0)


# ---- what rides along ----


def test_the_reference_is_the_model_as_it_was_whoever_stands_beside_whom():
    model, made = small(dropout=0.5).train(), pairs()
    found = reference_logprobs(model, made, 3, CPU)
    assert model.training, "the model is left as it was found"
    model.eval()
    wanted = [[log_p(model, one).sum().item() for one in pair] for pair in made]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_mismatched_gives_each_question_another_rows_answer():
    rows = [a for a, _ in pairs(7)]
    made = mismatched(rows, seed=3)
    assert [a for a, _ in made] == rows
    answers = {one.where: one.ids[one.learned].tolist() for one in rows}
    for own, other in made:
        n = int(own.learned.argmax())
        assert (
            other.ids[:n].tolist() == own.ids[:n].tolist() and not other.learned[:n].any() and other.learned[n:].all()
        )
        whose = other.where.removeprefix(f"{own.where} with the answer of ")
        assert whose != own.where
        assert other.ids[n:].tolist() == answers[whose][: len(other.ids) - n]
    assert len({other.where.split(" of ")[1] for _, other in made}) == 7, "each answer once"
    assert len({tuple(other.where for _, other in mismatched(rows, seed)) for seed in range(5)}) > 1
    with pytest.raises(InputError, match="one row is too few"):
        mismatched(rows[:1], 0)


def test_every_epoch_has_each_pair_once_and_a_resumed_order_goes_on():
    held = Pairing(pairs(7))
    batches = PairBatches(held, 3, seed=1)
    assert batches.n_batches_per_epoch == 3

    def epoch():
        return [tuple(next(batches).inputs[:, 0].tolist()) for _ in range(3)]

    first = epoch()
    assert sorted(map(len, first)) == [2, 6, 6]
    starts = sorted(int(one.ids[0]) for pair in held.pairs for one in pair)
    assert sorted(i for part in first for i in part) == starts
    next(batches)
    state = batches.state_dict()
    rest = [next(batches).inputs for _ in range(9)]
    resumed = PairBatches(held, 3, seed=1)
    resumed.load_state_dict(state)
    for wanted in rest:
        assert torch.equal(next(resumed).inputs, wanted)
    assert max(len(one.ids) for pair in held.pairs for one in pair) - 1 == batches.largest().inputs.shape[1]
    with pytest.raises(AssertionError, match="not"):
        PairBatches(held, 3, seed=2).load_state_dict(state)


def test_pairs_that_teach_nothing_are_left_out_and_said():
    good, cut = (row([1, 2, 3], 1), row([1, 2, 4], 1)), row([1, 2, 3], 3, "b")
    kept, left = useful([good, (cut, good[1]), (good[0], good[0])])
    assert kept == [good]
    assert left == [("b", "an answer was cut off wholly"), ("a", "both answers are the same")]
    with pytest.raises(InputError, match="none of the 1 pairs can teach anything: both answers are the same"):
        useful([(good[0], good[0])])


@pytest.mark.parametrize(("flags", "kind"), [([True] * 3, "desirable"), ([False] * 3, "undesirable")])
def test_kto_wants_both_kinds_to_learn_from_but_not_to_be_measured(flags, kind):
    need_both_kinds(np.array([True, False]))
    with pytest.raises(InputError, match=f"all 3 answers are {kind}"):
        need_both_kinds(np.array(flags))
    model = small()
    held = pairing(model, pairs(3), np.array(flags))
    assert kto_metrics(model, eval_pairs(held, 2), 0.1) == {}
    assert int(kto_loss(0.1)(model, held.batch([0, 1, 2], CPU))[1]) == 3


@pytest.mark.parametrize("objective", LOSSES)
def test_what_all_rows_begin_with_may_be_computed_once(objective):
    before = small(max_seq_len=64)
    model = moved(before)
    made = [tuple(row([*range(1, 11)] * 3 + [i, 5 + side], 31) for side in (0, 1)) for i in range(3)]
    batch = pairing(before, made, FLAGS[:3]).batch([0, 1, 2], CPU)
    lines = []
    with watch(model, lambda name, _: name == "embed", lambda _, x: lines.append(len(x))):
        plain, once = (objective(0.3, hidden=way)(model, batch)[0] for way in (hidden_of, shared_hidden))
    assert lines == ([3, 3, 1, 1] if objective is kto_loss else [6, 1])
    assert_close(plain, once, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(model, plain), gradients(model, once), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-11)


# ---- what it does ----


@pytest.mark.parametrize("objective", LOSSES)
def test_training_moves_the_better_answers_above_the_worse(objective):
    before = small(init="zero").float()
    model, flags = copy.deepcopy(before), np.arange(8) % 2 == 0
    made = [(row([i % 4, 5 + i % 2], 1), row([i % 4, 6 - i % 2], 1)) for i in range(8)]
    config = TrainConfig(steps=40, micro_batch=4, optimizer="adamw", lr=1e-2, warmup_steps=0)
    if objective is kto_loss:
        single = [row([i % 4, 5 if flags[i] else 6], 1, str(i)) for i in range(8)]
        made = mismatched(single, 0)
    held = Pairing(made, reference_logprobs(before, made, 8, CPU), flags if objective is kto_loss else None)

    def metrics():
        if objective is kto_loss:
            return kto_metrics(model, eval_pairs(held, 3), 0.5)
        measure = answer_means if objective is orpo_loss else answer_gains
        return preference_metrics(model, eval_pairs(held, 3), 0.5, measure)

    start = metrics()
    for _ in train(model, make_optimizers(model, config), PairBatches(held, 4, 0), config, objective(0.5)):
        pass
    end = metrics()
    assert abs(start["margin"]) < 1e-5 and end["margin"] > 0.1 and end["accuracy"] == 1.0
    assert end["reward_better"] > end["reward_worse"]


# ---- TRL's own trainers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama of Hugging Face's in float64, one that has moved away from it, and ours of both with equal weights."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'kobza[parity]'")
    sizes = dict(vocab_size=32, max_position_embeddings=16, num_hidden_layers=2, num_attention_heads=4, hidden_size=32)
    sizes |= dict(num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-6, tie_word_embeddings=False)
    tokens = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    before = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**sizes | tokens)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in before.named_parameters():
            p.copy_(("norm" in name) + 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    after = moved(before, by=0.02)
    return before, after, ours_of(before), ours_of(after)


def ours_of(theirs):
    from kobza.formats.layouts import LLAMA, slots
    from kobza.formats.weights import gathered

    config = ModelConfig(
        vocab_size=32, max_seq_len=16, n_layer=2, n_head=4, n_embd=32, n_kv_head=2, n_ff=48, mlp="swiglu", qk_norm=False,
        norm_weight=True, norm_eps=1e-6,
    )  # fmt: skip
    ours = build(config).double().eval()
    tensors = {name: p.detach() for name, p in theirs.named_parameters()}
    ours.load_state_dict(gathered(config, slots(config, LLAMA), tensors), strict=True)
    return ours


def their_loss(kind, folder, before, after, records):
    """What TRL's trainer makes of its first batch -> that batch, the loss."""
    trl = pytest.importorskip("trl", reason="compares with TRL: pip install trl")
    datasets = pytest.importorskip("datasets", reason="compares with TRL: pip install datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    extra = {"train_sampling_strategy": "sequential"} if kind == "KTO" else {}
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=4, beta=0.3, report_to=[], use_cpu=True, bf16=False, **extra
    )  # fmt: skip
    data = datasets.Dataset.from_list(records)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=after, ref_model=before, args=args, train_dataset=data, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return batch, trainer.compute_loss(trainer.model, batch)


def rows_of(batch, prefix=""):
    """Rows out of a batch of theirs."""
    ids, seen, learned = (batch[prefix + name] for name in ("input_ids", "attention_mask", "completion_mask"))
    return [
        Row(i[s.bool()].numpy(), m[s.bool()].bool().numpy(), "theirs")
        for i, s, m in zip(ids, seen, learned, strict=True)
    ]


def agree(ours, loss, theirs, their_mean, n):
    """The loss of n pairs and every gradient."""
    from kobza.formats.layouts import LLAMA, slots
    from kobza.formats.weights import gathered

    assert_close(loss.item() / n, their_mean.item(), rtol=1e-6, atol=0)
    ours.zero_grad(), theirs.zero_grad()
    loss.backward(), (n * their_mean).backward()
    tensors = {name: p.grad for name, p in theirs.named_parameters()}
    wanted = gathered(ours.config, slots(ours.config, LLAMA), tensors)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, p in ours.named_parameters():
        assert float((p.grad - wanted[name]).abs().max()) < 1e-5 * largest, name


@pytest.mark.parity
def test_dpo_is_trls(llama, tmp_path):
    before, after, our_before, ours = llama
    records = [
        {"prompt": f"w{i} w3 ", "chosen": f"w{i + 5} w{i}", "rejected": " ".join(f"w{j}" for j in range(i + 1))}
        for i in range(4)
    ]
    batch, mean = their_loss("DPO", tmp_path, before, after, records)
    rows = rows_of(batch)
    made = list(zip(rows[:4], rows[4:], strict=True))
    loss, _ = dpo_loss(0.3)(ours, eval_pairs(pairing(our_before, made), 4)[0])
    agree(ours, loss, after, mean, 4)


@pytest.mark.parity
def test_kto_is_trls(llama, tmp_path):
    before, after, our_before, ours = llama
    records = [
        {"prompt": f"w{i} w3 ", "completion": " ".join(f"w{j}" for j in range(i + 1)), "label": i % 3 > 0}
        for i in range(4)
    ]
    batch, mean = their_loss("KTO", tmp_path, before, after, records)
    made = list(zip(rows_of(batch), rows_of(batch, "KL_"), strict=True))
    held = pairing(our_before, made, batch["label"].numpy())
    loss, _ = kto_loss(0.3)(ours, eval_pairs(held, 4)[0])
    agree(ours, loss, after, mean, 4)


@pytest.mark.parity
def test_orpos_odds_ratio_is_trls(llama):
    pytest.importorskip("trl", reason="compares with TRL: pip install trl")
    from trl.experimental.orpo import ORPOTrainer

    model = llama[3]
    (batch,) = eval_pairs(Pairing([pair for pair in pairs() if all(len(one.ids) < 16 for one in pair)]), 9)
    better, worse = answer_means(model, batch).detach().chunk(2)
    theirs = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
    wanted = -better.sum() - ORPOTrainer.odds_ratio_loss(theirs, better, worse)[0].sum()
    assert_close(orpo_loss(0.3)(model, batch)[0].item(), wanted.item(), rtol=1e-5, atol=0)
