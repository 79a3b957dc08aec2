"""Answers are drawn as one by one and without a cache, their rewards say what a person would, and the loss's gradient is the
policy gradient; a stopped run goes on to the bit; and a small model gets better at sums, but not by the rewards of other sums."""

import contextlib
import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kobza.config import InputError, ModelConfig, TrainConfig
from kobza.finetune.config import MethodConfig
from kobza.finetune.encode import PromptRow
from kobza.finetune.example import Packed, Row
from kobza.finetune.lora import add_lora, freeze_base, without_adapter
from kobza.finetune.prefix import shared_hidden
from kobza.finetune.reward import REWARDS, boxes, final, make_reward, number
from kobza.finetune.rollouts import Rollouts, draw_answers, group_advantages, grpo_loss
from kobza.finetune.rows import PackedBatches
from kobza.finetune.sft import hidden_of, sft_loss, token_logprobs
from kobza.generate import draw
from kobza.model import build
from kobza.optim import make_optimizers
from kobza.surgery import watch
from kobza.train import IGNORE, train, train_step

V, END = 13, 12


SIZES = dict(vocab_size=V, max_seq_len=16, n_layer=2, n_head=2, n_embd=16, init="xavier")


def small(seed=0, **switches):
    return build(ModelConfig(**SIZES | switches), seed).double()


def letters(ids):
    return "".join("0123456789+="[i] for i in ids)


def questions(n=6, seed=0):
    generator = np.random.default_rng(seed)
    return [
        PromptRow(generator.integers(V - 1, size=2 + i % 4).tolist(), str(int(generator.integers(10))), f"row {i}")
        for i in range(n)
    ]


def rollouts(model, asked=None, **changes):
    settings = dict(ends=[END], group_size=4, answer_tokens=5, groups=3, seed=1) | changes
    return Rollouts(model, asked or questions(), letters, make_reward("contains:1,length:0.5"), **settings)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ---- rewards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [
        ("7", "7", 1),
        ("3 + 4 is 7.", "7", 1),
        ("7, or 8", "7", 0),  # the last number counts
        ("it costs 1,250.00", "1250", 1),
        ("12,50", "50", 1),  # no thousands: two numbers
        ("-3", "3", 0),
        ("5-3", "3", 1),  # a minus between numbers is no sign
        ("x = -3", "-3", 1),
        ("x = \u22123", "-3", 1),
        ("0.50", "1/2", 1),
        ("1/0", "1", 0),
        ("<think>7</think> 8", "7", 0),
        ("<think>8, no</think>7", "7", 1),
        (r"so \boxed{7} and not 9", "7", 1),
        (r"\boxed{\text{Paris}}", r"\text{Paris}", 1),
        ("the sum\n#### 7", "7", 1),
        ("paris ", "Paris", 1),
        ("Paris, France", "Paris", 0),
        ("", "7", 0),
        ("9" * 5000, "7", 0),
        ("9" * 5000, "9" * 5000, 1),  # as text
        ("\u0667", "7", 0),  # another script's digit: not what was asked for
        ("v1.2.3", "3", 1),
    ],
)
def test_answer(said, expected, score):
    assert REWARDS["answer"](said, expected) == score


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("<think>3 and 4</think>7", 1),
        ("<think>a</think>", 0),
        ("<think>a</think> \n ", 0),
        ("<think>a<think>b</think>7", 0),
        ("<think>a</think>7</think>", 0),
        ("well <think>a</think>7", 0),
        ("so it is\n#### 42", 1),
        ("#### 42\nand more", 0),
        ("#### ", 0),
        ("#### 1\n#### 2", 0),
        (r"it is \boxed{42}", 1),
        (r"\boxed{1} \boxed{2}", 0),
        (r"\boxed{ }", 0),
        (r"\boxed{42", 0),
        ("42", 0),
    ],
)
def test_format(said, score):
    assert REWARDS["format"](said, "") == score


def test_contains_wants_whole_words_and_length_pays_for_brevity():
    contains, length = REWARDS["contains"], REWARDS["length"]
    assert contains("It is New\n york.", "new York") == 1 and contains("Parisian", "Paris") == 0
    assert contains("c++ (7)", "(7)") == 1
    assert [length("ab", "ab"), length("abcd", "ab"), length(" ", "ab"), length("a", "ab")] == [1, 0.5, 0, 1]


@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_gets_a_finite_reward_between_0_and_1(said, expected):
    for verify in REWARDS.values():
        assert 0 <= verify(said, expected) <= 1


@given(st.fractions(-(10**20), 10**20, max_denominator=999), st.booleans())
def test_a_number_written_out_is_read_back(value, spoken):
    text = f"{value.numerator:,}" + (f"/{value.denominator}" if value.denominator > 1 else "")
    assert number(text) == value
    assert REWARDS["answer"](f"It is {text}." if spoken else text, str(value)) == 1


def test_long_hostile_answers_take_no_time():
    spaces = " " * 100_000
    for text in (f"#### a{spaces}#", f"<think>{spaces}</think>{spaces}", f"\\boxed{{{spaces}", "1,111" * 20_000 + "1"):
        assert [verify(text, "7") for verify in REWARDS.values()][:3] == [0, 0, 0]
    for text in ("<think>" * 20_000, "1," * 50_000, "\\boxed{" * 3_000, "####" * 20_000, "{" * 50_000, " " * 100_000):
        for verify in REWARDS.values():
            assert verify(text, "7") in (0.0, 1 / max(1, len(text.strip())), float(not text.strip()))
    assert boxes(r"\boxed{a{b}c} \boxed{d") == ["a{b}c"] and final("a #### b") == "b"


def test_rewards_are_summed_by_weight():
    reward = make_reward(" answer : 1, format:0.2")
    assert reward.weights == {"answer": 1.0, "format": 0.2}
    assert math.isclose(reward("<think>a</think>7", "7"), 1.2) and reward.parts("7", "7") == {"answer": 1, "format": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anwser", "no reward 'anwser'; did you mean answer"),
        ("", "no reward ''"),
        ("answer,answer", "names answer twice"),
        ("answer:much", "weight of answer is 'much'"),
        ("answer:0", "a number other than 0"),
        ("answer:nan", "a number other than 0"),
    ],
)
def test_a_reward_that_is_none_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        make_reward(text)


def test_bad_questions_are_refused_before_the_first_draw():
    model = small()
    with pytest.raises(InputError, match="row 3: no expected answer.*'contains'"):
        rollouts(model, [PromptRow([1], " ", "row 3")])
    Rollouts(model, [PromptRow([1], None, "x")], letters, make_reward("format"), **_settings())
    with pytest.raises(InputError, match="x: 12 tokens of question and --answer-tokens 5 are more than the model's 16"):
        rollouts(model, [PromptRow([1] * 12, "7", "x")])
    with pytest.raises(InputError, match="no tokens"):
        rollouts(model, [PromptRow([], "7", "x")])
    with pytest.raises(InputError, match="no end token"):
        rollouts(model, ends=[])


def _settings():
    return dict(ends=[END], group_size=2, answer_tokens=5, groups=1, seed=1)


# ---- draws ---------------------------------------------------------------------------------------------------------

WAYS = {
    "rope": {},
    "learned": dict(position="learned"),
    "windowed": dict(window=4),
    "gqa": dict(n_head=4, n_kv_head=2),
    "softcap": dict(softcap=3.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_drawn_one_by_one_without_a_cache(way):
    model = small(**WAYS[way])
    prompts = [question.ids for question in questions()]
    uniform = np.random.default_rng(0).random((6, 3, 7))
    found = draw_answers(model, prompts, uniform, frozenset([END, 3]), 4.0)
    lengths = set()
    for q, prompt in enumerate(prompts):
        for g in range(3):
            ids = []
            for i in range(7):
                logits = model(torch.tensor([prompt + ids]))[:, -1]
                ids.append(int(draw(logits / 4.0, torch.tensor(uniform[q, g, i : i + 1]))))
                if ids[-1] in (END, 3):
                    break
            assert found[q][g] == ids
            lengths.add(len(ids))
    assert len(lengths) > 2, "some end early, or the end would be untried"


def test_a_questions_answers_do_not_hang_on_who_stands_beside_it():
    model = small()
    whole, one = rollouts(model, groups=6), rollouts(model, groups=1)

    def answers(batches, n):
        found = {}
        for _ in range(n):
            batch = next(batches)
            for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
                first = next(i for i, target in enumerate(targets) if target != IGNORE)
                found.setdefault(tuple(inputs[: first + 1]), []).append([t for t in targets if t != IGNORE])
        return found

    assert answers(whole, 1) == answers(one, 6)
    assert whole.report["cut"] < 1 and whole.report["answer_tokens"] > 1


def test_rows_that_have_ended_are_computed_no_more():
    model, rows = small(), []
    uniform = np.random.default_rng(0).random((2, 32, 9))
    with watch(model, lambda name, _: name == "embed", lambda _, x: rows.append(len(x))):
        answers = draw_answers(model, [[1, 2], [3]], uniform, frozenset(range(4)), 3.0)
    lengths = [len(ids) for group in answers for ids in group]
    assert rows[:2] == [2, 64] and rows == [2, *sorted(rows[1:], reverse=True)] and 0 < rows[-1] <= 32
    for i, n in enumerate(rows[1:], 1):
        assert n / 2 < sum(length > i for length in lengths) <= n


def test_no_two_answers_share_their_draws():
    """One question, asked with the same model again and again: by answer, by epoch, by place in the file, by seed."""
    model = small(init="gpt2")  # nearly every token alike, so that equal answers are equal draws
    twice = [PromptRow([1, 2], "1", "a"), PromptRow([1, 2], "1", "b")]

    def drawn(seed):
        batches = rollouts(model, twice, groups=2, seed=seed)
        return [tuple(targets) for _ in range(2) for targets in next(batches).targets.tolist()]

    assert len(set(drawn(1) + drawn(2))) >= 28  # of 32; a short one may come twice
    assert drawn(1) == drawn(1)


def test_every_epoch_has_its_own_order():
    batches = rollouts(small(), groups=1, group_size=2)
    asked = [[next(batches).inputs[0, :2].tolist() for _ in range(6)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(asked[0]) for epoch in asked)
    assert len({str(epoch) for epoch in asked}) == 3


def test_the_report_is_what_one_counts_by_hand():
    model = small()
    batches = rollouts(model, groups=6, answer_tokens=3)
    batch = next(batches)
    rows = [[t for t in targets if t != IGNORE] for targets in batch.targets.tolist()]
    order = np.random.default_rng((1, 0)).permutation(6)
    expected = [questions()[i].expected for i in order for _ in range(4)]
    said = [letters([t for t in ids if t != END]) for ids in rows]
    short = [min(1, 1 / len(text)) if text else 0 for text in said]
    held = [float(w in re.split(r"\D+", text)) for text, w in zip(said, expected, strict=True)]  # a digit by itself
    rewards = np.array(held) + 0.5 * np.array(short)
    wanted = {
        "reward": rewards.mean(),
        "reward.contains": np.mean(held),
        "reward.length": np.mean(short),
        "equal_groups": np.mean([len(set(group)) == 1 for group in rewards.reshape(6, 4).tolist()]),
        "cut": np.mean([ids[-1] != END for ids in rows]),
        "answer_tokens": np.mean([len(ids) for ids in rows]),
    }
    assert batches.report == pytest.approx(wanted) and 0 < wanted["cut"] < 1
    assert batches.measure(questions()) == batches.measure(questions()), "the same draws at every call"


def test_draws_follow_the_models_distribution():
    model = small(init="zero")
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    uniform = np.random.default_rng(1).random((1, 20_000, 1))
    drawn = np.array(draw_answers(model, [[1, 2, 3]], uniform, frozenset(), 2.0)[0])[:, 0]
    wanted = (model(torch.tensor([[1, 2, 3]]))[0, -1] / 2).softmax(-1).detach().numpy()
    assert 0.02 < wanted.max() < 0.9
    assert np.abs(np.bincount(drawn, minlength=V) / 20_000 - wanted).max() < 0.015  # 4 deviations


def test_drawing_leaves_the_model_as_it_was_and_does_without_dropout():
    model = small(dropout=0.5).train()
    batch, again = next(rollouts(model)), next(rollouts(model))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(batch.targets, again.targets) and torch.equal(batch.old, again.old)


def test_an_answer_that_learns_ends_in_its_end_token_where_it_ended():
    batch = next(rollouts(small(), groups=6))
    for targets in batch.targets.tolist():
        ids = [target for target in targets if target != IGNORE]
        assert ids and END not in ids[:-1] and (len(ids) == 5 or ids[-1] == END)


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_advantages():
    rewards = np.array([[0, 0, 1, 1], [0.2 + 0.1, 0.3, 0.3, 0.3], [0.2] * 4, [0, 0, 0, 4]])
    rewards[1] = 0.1 + 0.2  # its mean may differ from it in the last place
    found = group_advantages(rewards)
    assert found[0].tolist() == [-1, -1, 1, 1] and not found[1].any() and not found[2].any()
    np.testing.assert_allclose(found[3], [-1 / 3**0.5] * 3 + [3**0.5])


def policy_gradient(model, batch):
    """sum over answer tokens of -A log p, a token at a time."""
    total = 0
    for inputs, targets, gain in zip(batch.inputs, batch.targets, batch.advantages, strict=True):
        for t, target in enumerate(targets.tolist()):
            if target != IGNORE:
                total = total - gain * model(inputs[None, : t + 1])[0, -1].log_softmax(-1)[target]
    return total


def test_on_policy_the_gradient_is_the_policy_gradient():
    model = small()
    batch = next(rollouts(model, groups=6))
    assert batch.advantages.any()
    loss, n = grpo_loss(0.0)(model, batch)
    assert int(n) == int((batch.targets != IGNORE).sum())
    advantages = batch.advantages.repeat_interleave((batch.targets != IGNORE).sum(1))
    assert_close(loss, -advantages.sum(), rtol=1e-9, atol=1e-9)  # every ratio is 1
    for a, b in zip(gradients(model, loss), gradients(model, policy_gradient(model, batch)), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_off_policy_it_is_the_formula_token_by_token(temperature):
    before = small()
    model, later = copy.deepcopy(before), small(seed=3)
    with torch.no_grad():
        for p, q in zip(model.parameters(), later.parameters(), strict=True):
            p.lerp_(q, 0.05)
    batch = next(rollouts(before, groups=6, temperature=temperature, as_it_was=contextlib.nullcontext))
    batch = batch._replace(
        reference=batch.reference + torch.linspace(-1, 1, batch.reference.numel()).view_as(batch.old)
    )
    total, clipped = 0, 0
    for b in range(len(batch.inputs)):
        for t, target in enumerate(batch.targets[b].tolist()):
            if target == IGNORE:
                continue
            now, old = (
                (m(batch.inputs[b : b + 1, : t + 1])[0, -1] / temperature).log_softmax(-1)[target]
                for m in (model, before)
            )
            gain, ratio = batch.advantages[b], (now - old.detach()).exp()
            gap = batch.reference[b, t] - now
            bounded = min(max(ratio.item(), 0.9), 1.1)
            binding = bounded * gain < ratio.item() * gain
            clipped += int(binding)
            total = total - (bounded * gain if binding else ratio * gain) + 0.3 * (gap.exp() - gap - 1)
    assert clipped > 3
    loss, _ = grpo_loss(0.3, 0.1, temperature=temperature)(model, batch)
    assert_close(loss, total, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(model, loss), gradients(model, total), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_shared_question_may_be_computed_once():
    """prefix.py's layout in place of the plain one: the same loss and gradients."""
    model = small(max_seq_len=64)
    asked = [PromptRow([*range(1, 11)] * 3 + [i], "1", f"row {i}") for i in range(2)]
    batch = next(rollouts(model, asked, groups=2, as_it_was=contextlib.nullcontext))
    calls, lines = [], []

    def hidden(model, packed, dtype):
        calls.append(type(packed))
        return shared_hidden(model, packed, dtype)

    with watch(model, lambda name, _: name == "embed", lambda _, x: lines.append(len(x))):
        plain, once = (grpo_loss(0.1, hidden=way)(model, batch)[0] for way in (hidden_of, hidden))
    assert calls == [Packed] and lines == [8, 1]
    drawn = next(rollouts(model, asked, groups=2, as_it_was=contextlib.nullcontext, hidden=hidden))
    assert calls == 3 * [Packed] and torch.equal(drawn.targets, batch.targets)
    assert_close((drawn.old, drawn.reference), (batch.old, batch.reference), rtol=1e-10, atol=1e-12)
    assert_close(plain, once, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(model, plain), gradients(model, once), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_of_many_targets_some_logits_are_at_hand_at_a_time(monkeypatch):
    model, seen = small(), []
    batch = next(rollouts(model, groups=6))
    whole = grpo_loss(0.0)(model, batch)[0]
    wanted = gradients(model, whole)
    monkeypatch.setattr("kobza.finetune.sft.CHUNK", 7)
    with watch(model, lambda name, _: name == "lm_head", lambda _, y: seen.append(len(y))):
        loss = grpo_loss(0.0)(model, batch)[0]
        found = gradients(model, loss)
    assert max(seen) == 7 and len(seen) == 2 * -(-int((batch.targets != IGNORE).sum()) // 7)
    assert_close(whole, loss, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_largest_batch_is_as_large_as_any():
    batches = rollouts(small(), groups=2)
    shape = batches.largest().inputs.shape
    assert shape == (8, max(len(question.ids) for question in questions()) + 5 - 1) and batches.n_batches_per_epoch == 3
    assert all(next(batches).inputs.shape <= shape for _ in range(3))


def test_with_an_adapter_the_model_as_it_was_is_the_one_without():
    model = small(init="gpt2").float()
    add_lora(model, MethodConfig(rank=2, alpha=64.0), 0)
    freeze_base(model, torch.float32)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    config = TrainConfig(steps=4, optimizer="adamw", lr=3e-2, warmup_steps=0)
    batches = rollouts(model, as_it_was=lambda: without_adapter(model))
    first = next(batches)
    assert torch.equal(first.old, first.reference)
    for _ in train(model, make_optimizers(model, config), batches, config, grpo_loss(0.1)):
        pass
    later = next(batches)
    assert not torch.allclose(later.old, later.reference, atol=1e-3)
    wanted = token_logprobs(build(ModelConfig(**SIZES | {"init": "gpt2"})), Packed(*later[:4]))
    assert_close(later.reference, wanted, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        assert name not in base or torch.equal(p, base[name])


def test_groups_of_equal_rewards_teach_nothing_and_are_counted():
    model = small()
    batches = Rollouts(model, questions(), letters, make_reward("format"), **_settings() | {"groups": 6})  # 0 for all
    loss, n = grpo_loss(0.0)(model, next(batches))
    assert batches.report["equal_groups"] == 1.0 and float(loss.detach()) == 0 and int(n) > 0
    assert all(not g.any() for g in gradients(model, loss))


def test_a_window_of_any_cut_is_one_batch():
    updated = []
    for groups, ahead in ((6, 1), (1, 6), (2, 3)):
        model = small()
        batches = rollouts(model, groups=groups, ahead=ahead, as_it_was=contextlib.nullcontext)
        window = [next(batches) for _ in range(ahead)]
        train_step(model, [torch.optim.SGD(model.parameters(), lr=0.1)], window, grpo_loss(0.1))
        updated.append(model)
    for other in updated[1:]:
        for p, q in zip(updated[0].parameters(), other.parameters(), strict=True):
            assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_the_price_of_moving_away_needs_somebody_to_ask_how_it_was():
    model = small()
    loss, _ = grpo_loss(0.1)(model, next(rollouts(model)))
    assert not math.isfinite(float(loss.detach())), "a reference that nobody gave is no reference"
    asked = []

    @contextlib.contextmanager
    def as_it_was():
        asked.append(1)
        yield

    batch = next(rollouts(model, as_it_was=as_it_was))
    assert asked and torch.equal(batch.old, batch.reference)


@pytest.mark.parametrize("ahead", [1, 4])
def test_a_stopped_run_goes_on_to_the_bit(ahead):
    """With ahead=4 it stops amid answers that are drawn but not yet learned from."""
    config = TrainConfig(steps=6, optimizer="adamw", lr=1e-2, warmup_steps=0, micro_batch=1)

    def start():
        model = small(init="gpt2").float()
        before = copy.deepcopy(model)
        batches = rollouts(model, groups=2, ahead=ahead, as_it_was=lambda: swapped(model, before))
        return model, make_optimizers(model, config), batches

    def go(model, optimizers, batches, first, last):
        steps = train(model, optimizers, batches, config, grpo_loss(0.1), first)
        return [next(steps).loss for _ in range(last - first)]

    whole = start()
    losses = go(*whole, 0, 6)
    model, optimizers, batches = start()
    go(model, optimizers, batches, 0, 3)
    weights, states = copy.deepcopy(model.state_dict()), [copy.deepcopy(o.state_dict()) for o in optimizers]
    order = json.loads(json.dumps(batches.state_dict()))
    assert len(order["held"]) == (1 if ahead == 4 else 0)
    model, optimizers, batches = start()
    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    batches.load_state_dict(order)
    assert batches.report == order["report"] != {}
    assert go(model, optimizers, batches, 3, 6) == losses[3:]
    for p, q in zip(model.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(p, q)
    if ahead == 1:
        assert len(set(losses)) > 3


@contextlib.contextmanager
def swapped(model, before):
    """The model with the weights it had."""
    now = [p.data for p in model.parameters()]
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        p.data = q.data
    yield
    for p, weight in zip(model.parameters(), now, strict=True):
        p.data = weight


# ---- does it learn? ------------------------------------------------------------------------------------------------

SUMS = [(a, b) for a in range(10) for b in range(10)]
LETTERS = "0123456789+=."


def spelled(text):
    return [LETTERS.index(letter) for letter in text]


def half_taught():
    """26,000 weights that know about half of the sums of two digits, from 100 supervised steps."""
    model = build(ModelConfig(vocab_size=13, max_seq_len=16, n_layer=2, n_head=2, n_embd=32))
    ids = [np.array(spelled(f"{a}+{b}={a + b}."), np.int32) for a, b in SUMS]
    rows = [Row(one, np.arange(len(one)) >= 4, "sum") for one in ids]
    config = TrainConfig(steps=100, micro_batch=50, optimizer="adamw", lr=1e-2, warmup_steps=5)
    batches = PackedBatches(rows, 50, 16, 0, packing=False)
    for _ in train(model, make_optimizers(model, config), batches, config, sft_loss()):
        pass
    return model


@pytest.mark.slow
def test_a_model_gets_better_at_sums_by_its_rewards_but_not_by_those_of_other_sums():
    taught, right = half_taught(), [PromptRow(spelled(f"{a}+{b}="), str(a + b), f"{a}+{b}") for a, b in SUMS]
    other = np.random.default_rng(0).permutation(100)
    wrong = [ask._replace(expected=right[i].expected) for ask, i in zip(right, other, strict=True)]
    config = TrainConfig(steps=60, optimizer="adamw", lr=1e-3, warmup_steps=0, schedule="constant")
    after = {}
    for name, asked in {"right": right, "wrong": wrong}.items():
        model = copy.deepcopy(taught)
        batches = Rollouts(
            model, asked, lambda ids: "".join(LETTERS[i] for i in ids), make_reward("answer"),
            ends=[12], group_size=8, answer_tokens=4, groups=25, seed=0,
        )  # fmt: skip
        before = batches.measure(right * 8)["reward"]  # 800 answers: a deviation of 0.018
        for _ in train(model, make_optimizers(model, config), batches, config, grpo_loss(0.0)):
            pass
        after[name] = batches.measure(right * 8)["reward"]
    assert 0.3 < before < 0.7
    assert after["right"] > before + 0.09 and after["wrong"] < before
