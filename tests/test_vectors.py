"""Vectors in place of ids: the same as the ids' own rows, in a forward pass, in training and in generation."""

import pytest
import torch
import torch.nn.functional as F

from kobza.config import InputError, ModelConfig, SampleConfig, TrainConfig
from kobza.generate import generate
from kobza.model import build
from kobza.optim import make_optimizers
from kobza.train import IGNORE, train_step
from kobza.vectors import ignore, never, vectors_at

PLACE, V = 11, 12
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 1]])
# rows with three placeholders and with one, not side by side
PLACED = torch.tensor([[PLACE, PLACE, 3, PLACE, 5, 6], [7, 8, PLACE, 10, 0, 1]])
CONFIGS = {
    "rope": {},
    "learned": {"position": "learned", "norm": "layernorm", "bias": True},
    "tied": {"tied": True},
    "scaled, normalised, padded": {"embed_scale": 4.0, "norm_place": "everywhere", "pad_vocab": 8},
    "sines and a window": {"position": "sinusoidal", "window": 3},
    "fusable": {"norm": "layernorm", "qk_norm": False},
}


def small(dtype=torch.float64, **config):
    """A model without a weight at zero, so that every path counts."""
    config = {"vocab_size": V, "max_seq_len": 8, "n_layer": 2, "n_head": 2, "n_embd": 16} | config
    model = build(ModelConfig(**config)).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model


def rows(model, ids=IDS, placed=PLACED):
    """What the model makes of the ids that the placeholders hide, (N, C)."""
    return model.embed(ids[placed == PLACE])


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


# ---- the same as ids ----


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rows_of_the_table_as_vectors_give_the_logits_of_their_ids(config):
    model = small(**config)
    with vectors_at(model, PLACE, rows(model)):
        placed = model(PLACED)
    assert torch.equal(placed, model(IDS))
    assert not torch.allclose(model(PLACED), placed), "the placeholder's own row must not do the same"


def test_vectors_may_stand_in_rows():
    """(B, P, C) is (B * P, C) read row by row."""
    model = small()
    placed = IDS.clone()
    placed[:, 1:4] = PLACE
    with vectors_at(model, PLACE, model.embed(IDS[:, 1:4])):
        assert torch.equal(model(placed), model(IDS))


def test_gradients_reach_the_vectors_as_they_reach_the_rows():
    model = small()
    vectors = rows(model).detach().requires_grad_()
    with vectors_at(model, PLACE, vectors):
        model(PLACED).square().sum().backward()
    seen: list = []
    handle = model.embed.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), seen.append(out)) and None)
    table_of_placed = model.embed.weight.grad.clone()
    model.zero_grad()
    model(IDS).square().sum().backward()
    handle.remove()
    assert torch.equal(vectors.grad, seen[0].grad[PLACED == PLACE])
    assert not table_of_placed[PLACE].any(), "the placeholder's own row learns nothing"
    assert vectors.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compute_in_another_dtype(dtype):
    """The vectors are rounded where the embeddings are, whatever they come in."""
    model = small(torch.float32)
    with vectors_at(model, PLACE, rows(model).double()):
        assert torch.equal(model(PLACED, dtype=dtype), model(IDS, dtype=dtype))


def test_fused_blocks():
    from kobza.kernels import fused

    model = small(torch.float32, **CONFIGS["fusable"])
    assert fused.supports(model.config) and fused.use(model)
    with vectors_at(model, PLACE, rows(model)):
        assert torch.equal(model(PLACED), model(IDS))


# ---- generation ----


def written(model, prompts, tokens=6):
    """The logits of each step, (tokens, B, V): equal where the ids drawn from them are."""
    config = SampleConfig(tokens=tokens, seed=3)
    return torch.stack([c.logits for c in generate(model, prompts, config, extra=[never(PLACE)])])


@pytest.mark.parametrize("tokens", [4, 40], ids=["fits", "overflows"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_generation_from_vectors_is_generation_from_their_ids(config, tokens):
    """Also past the context, where each row forgets the oldest of its placeholders first."""
    model = small(**config)
    prompts, placed = IDS.tolist(), PLACED.tolist()
    with vectors_at(model, PLACE, rows(model)):
        assert torch.equal(written(model, placed, tokens), written(model, prompts, tokens))
    assert not torch.allclose(written(model, placed, 1), written(model, prompts, 1))


def test_generation_that_forgets_only_some_placeholders():
    """Half of the context is kept: of six placeholders the last three, the row's newest."""
    model = small()
    prompt, placed = [1, 2, 3, 4, 5, 6, 7], [1, PLACE, PLACE, PLACE, PLACE, PLACE, PLACE]
    with vectors_at(model, PLACE, model.embed(torch.arange(2, 8))):
        assert torch.equal(written(model, [placed], 12), written(model, [prompt], 12))


def test_generation_from_rows_of_unequal_length():
    model = small()
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    placed = [[1, PLACE, PLACE, 4, PLACE], [PLACE], [7, 8]]
    with vectors_at(model, PLACE, model.embed(torch.tensor([2, 3, 5, 6]))):
        assert torch.equal(written(model, placed, 20), written(model, prompts, 20))


def test_generation_from_packed_weights():
    from kobza.kernels import packed

    model = small(torch.float32, n_embd=32)
    if not packed.supports(model):
        pytest.skip("this CPU has no bf16 products, which packed blocks need")
    vectors = rows(model).detach()
    packed.use(model)
    with vectors_at(model, PLACE, vectors):
        assert torch.equal(written(model, PLACED.tolist()), written(model, IDS.tolist()))


def test_the_placeholder_is_never_drawn():
    model = small()
    with torch.no_grad():
        model.lm_head.weight[PLACE] = 9 * model.lm_head.weight[:PLACE].abs().sum(0)
        model.lm_head.weight[PLACE] *= torch.sign(model.hidden(IDS[:1])[0, -1])
    config = SampleConfig(tokens=2, temperature=0)
    free = [c.ids for c in generate(model, IDS[:1].tolist(), config)]
    kept = [c.ids for c in generate(model, IDS[:1].tolist(), config, extra=[never(PLACE)])]
    assert free[0] == [PLACE] and [PLACE] not in kept


# ---- training ----


def test_placeholders_are_no_targets():
    targets = torch.tensor([[PLACE, 3, IGNORE], [4, PLACE, 5]])
    assert ignore(targets, PLACE).tolist() == [[IGNORE, 3, IGNORE], [4, IGNORE, 5]]
    assert targets[0, 0] == PLACE, "the caller's targets stay as they are"


def test_training_through_an_encoder_lowers_the_loss_of_what_only_the_vectors_tell():
    """The sign of a number decides the token: without the vector the loss stays at ln 2."""
    model = small(torch.float32)
    model.encoder = torch.nn.Linear(1, 16)
    numbers = torch.linspace(-1, 1, 32)[:, None, None]  # (B, P = 1, 1)
    ids = torch.stack((torch.full((32,), PLACE), (numbers.flatten() > 0).long()), 1)

    def loss_fn(model, batch):
        pictures, ids = batch
        with vectors_at(model, PLACE, model.encoder(pictures)):
            logits = model(ids[:, :-1])
        targets = ignore(ids[:, 1:], PLACE)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != IGNORE).sum()

    optimizers = make_optimizers(model, TrainConfig(lr=0.01))
    for _ in range(60):
        loss, _ = train_step(model, optimizers, [(numbers, ids)], loss_fn, 1.0)
    blind, _ = train_step(model, optimizers, [(0 * numbers, ids)], loss_fn, 1.0)
    assert loss < 0.2 and blind > 0.6


# ---- what is refused ----


@pytest.mark.parametrize("n", [0, 3, 5, 8])
def test_a_count_that_does_not_fit_is_refused_with_both_numbers(n):
    model = small()
    with (
        pytest.raises(InputError, match=f"4 placeholders .* {n} vectors"),
        vectors_at(model, PLACE, torch.zeros(n, 16)),
    ):
        model(PLACED)
    assert hooks(model) == 0


def test_fewer_placeholders_later_are_refused_while_learning():
    """Only generation forgets; in training a second batch wants its own vectors."""
    model = small()
    with pytest.raises(InputError, match="2 placeholders.* 4 vectors"), vectors_at(model, PLACE, rows(model)):
        model(PLACED)
        model(PLACED[:, 2:])


def test_more_placeholders_later_are_refused():
    """A row that draws the placeholder itself: there is no vector for it."""
    model = small()
    with pytest.raises(InputError, match="never"), torch.no_grad(), vectors_at(model, PLACE, rows(model)):
        model(PLACED)
        model(torch.tensor([[1], [PLACE]]))


@pytest.mark.parametrize("shape", [(4, 8), (4,), (1, 1, 4, 16)])
def test_vectors_of_another_width_are_refused(shape):
    with pytest.raises(InputError, match="n_embd 16"), vectors_at(small(), PLACE, torch.zeros(shape)):
        raise AssertionError("refused before the model runs")


@pytest.mark.parametrize("place", [-1, 0, V])
def test_ids_that_cannot_be_placeholders_are_refused(place):
    with (
        pytest.raises(InputError, match=f"placeholder is id {place}; take 1 to 11"),
        vectors_at(small(), place, torch.zeros(4, 16)),
    ):
        raise AssertionError("refused before the model runs")


def test_vectors_that_nothing_took_are_refused():
    model = small()
    with pytest.raises(InputError, match="no effect"), vectors_at(model, PLACE, torch.zeros(4, 16)):
        model(IDS)
    assert hooks(model) == 0


def test_the_hook_is_gone_afterwards_even_after_an_error():
    model = small()
    before = model(PLACED)
    with pytest.raises(ZeroDivisionError), vectors_at(model, PLACE, rows(model)):
        model(PLACED)
        raise ZeroDivisionError
    assert hooks(model) == 0 and torch.equal(model(PLACED), before)
