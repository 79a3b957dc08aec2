"""Distillation is torch's own KL divergence in float64, nothing where student and teacher agree, and one batch however it is cut;
the logits of either are at hand a stretch at a time."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kobza.config import InputError, ModelConfig, TrainConfig
from kobza.finetune.distill import distill_loss, divergence
from kobza.finetune.example import Row
from kobza.finetune.rows import PackedBatches, collate, eval_rows
from kobza.model import build
from kobza.optim import make_optimizers
from kobza.surgery import watch
from kobza.train import IGNORE, evaluate, train, train_step

V = 17


def small(seed=0, **switches):
    sizes = dict(vocab_size=V, max_seq_len=24, n_layer=2, n_head=2, n_embd=16, init="xavier")
    return build(ModelConfig(**(sizes | switches)), seed).double()


def rows(n=6, seed=0):
    draw = np.random.default_rng(seed)
    made = []
    for i in range(n):
        length, prompt = int(draw.integers(4, 11)), int(draw.integers(1, 4))
        made.append(Row(draw.integers(V, size=length).astype(np.int32), np.arange(length) >= prompt, f"row {i}"))
    return made


def packed(which=slice(None)):
    """Two rows a line."""
    made = rows()[which]
    return collate([made[i : i + 2] for i in range(0, len(made), 2)], 24)


def by_hand(teacher, student, made, temperature):
    """Row by row, F.kl_div of all logits."""
    total = 0
    for row in made:
        ids = torch.tensor(row.ids[None, :-1], dtype=torch.long)
        at = torch.from_numpy(row.learned[1:])
        found, wanted = ((m(ids)[0, at] / temperature).log_softmax(-1) for m in (student, teacher))
        total = total + temperature**2 * F.kl_div(found, wanted.detach(), reduction="sum", log_target=True)
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("switches", [{}, {"softcap": 2.0, "n_kv_head": 1, "tied": True}], ids=["plain", "capped"])
def test_it_is_the_divergence_of_all_logits_gradients_and_all(temperature, switches):
    """The teacher is of another width and depth."""
    teacher, student = small(1, n_embd=24, n_layer=1), small(**switches)
    batch = packed()
    loss, n = distill_loss(teacher, temperature, chunk=5)(student, batch)
    wanted = by_hand(teacher, student, rows(), temperature)
    assert int(n) == int((batch.targets != IGNORE).sum()) and n > 10
    assert_close(loss, wanted, rtol=1e-10, atol=0)
    for a, b in zip(gradients(student, loss), gradients(student, wanted), strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-11)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    student = small()
    loss, _ = distill_loss(copy.deepcopy(student), 2.0)(student, packed())
    assert abs(float(loss.detach())) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients(student, loss))
    loss, _ = distill_loss(small(1), 2.0)(student, packed())
    assert float(loss.detach()) > 0.1 and max(g.abs().max() for g in gradients(student, loss)) > 1e-3


def test_gradcheck():
    teacher, student = small(1), small()
    x, taught = (torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert torch.autograd.gradcheck(lambda x: divergence(student, teacher, x, taught, 1.7), x.requires_grad_())


def test_the_gradients_size_does_not_fall_with_the_temperature():
    """Hinton et al. 2015, section 2: at high temperature it is that of the logits' squared distance over V, whatever T."""
    sizes = []
    for temperature in (50.0, 100.0):
        student = small()
        loss, _ = distill_loss(small(1), temperature)(student, packed())
        sizes.append(torch.cat([g.flatten() for g in gradients(student, loss)]).norm())
    assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)


def test_a_window_of_any_cut_and_any_chunk_is_one_batch():
    updated = []
    for cut, chunk in ([slice(0, 6)], 256), ([slice(0, 2), slice(2, 6)], 3), ([slice(0, 4), slice(4, 6)], 1):
        student = small()
        window = [packed(part) for part in cut]
        assert len({int((batch.targets != IGNORE).sum()) for batch in window}) == len(window), (
            "unequal, or means would do"
        )
        train_step(
            student, [torch.optim.SGD(student.parameters(), lr=0.1)], window, distill_loss(small(1), 2.0, chunk=chunk)
        )
        updated.append(student)
    for other in updated[1:]:
        for p, q in zip(updated[0].parameters(), other.parameters(), strict=True):
            assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_no_more_than_a_chunk_of_logits_is_at_hand_and_none_is_kept_for_the_way_back():
    teacher, student, seen, kept = small(1), small(), [], []

    def head(name, _):
        return name == "lm_head"

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with watch(teacher, head, lambda _, y: seen.append(len(y))), watch(student, head, lambda _, y: seen.append(len(y))):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, n = distill_loss(teacher, chunk=4)(student, packed())
        loss.backward()
    assert max(seen) == 4 < int(n) and len(seen) == 4 * -(-int(n) // 4), "each head twice a chunk: there and back"
    assert kept and not any(len(shape) > 1 and shape[-1] == V and shape[0] <= 4 for shape in kept)


def test_dropout_is_the_students_alone_and_the_teacher_stays_as_it_is():
    teacher, student = small(1, dropout=0.5).train(), small()
    loss_fn = distill_loss(teacher)
    one, other = (loss_fn(student, packed())[0].detach() for _ in range(2))
    assert torch.equal(one, other) and not teacher.training


def test_another_vocabulary_is_refused_with_both_sizes():
    with pytest.raises(InputError, match="--teacher has 19 tokens but the model has 17"):
        distill_loss(small(vocab_size=19))(small(), packed())


def test_a_batch_without_targets_is_0():
    batch = packed()
    loss, n = distill_loss(small(1))(small(), batch._replace(targets=torch.full_like(batch.targets, IGNORE)))
    assert float(loss) == 0 and int(n) == 0


def test_the_student_comes_to_say_what_the_teacher_says():
    teacher, student = small(1).float(), small(init="zero").float()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(3)
    config = TrainConfig(steps=150, optimizer="adamw", lr=1e-2, warmup_steps=5, micro_batch=3)
    batches, held = PackedBatches(rows(24), 3, 24, 0), eval_rows(rows(24), 3, 24)
    loss_fn = distill_loss(teacher)
    before = evaluate(student, held, loss_fn)
    for _ in train(student, make_optimizers(student, config), batches, config, loss_fn):
        pass
    assert evaluate(student, held, loss_fn) < 0.1 * before
