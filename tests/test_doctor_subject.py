"""One set of calls for kobza models, transformers models, anybody's nn.Module and plain callables."""

import sys

import pytest
import torch
from torch import nn

from kobza.checkpoint import save_checkpoint
from kobza.config import InputError, ModelConfig, RunConfig
from kobza.doctor.finding import Skip, examine
from kobza.doctor.models import battery
from kobza.doctor.models.battery import CHECKS
from kobza.doctor.models.subject import Stop, find_blocks, open_, subject_of
from kobza.doctor.mutations.model import FAMILIES, model
from kobza.model import build
from kobza.tokenizer import CharTokenizer
from kobza.train import next_token_loss

IDS = torch.randint(67, (2, 20), generator=torch.Generator().manual_seed(0))


def close(a, b, tolerance=1e-5):
    return float((a - b).detach().abs().max()) < tolerance


# ---- ours ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_calls_agree_with_each_other(family):
    subject = subject_of(model(family), family)
    streams = subject.hidden(IDS)
    assert len(streams) == 2 and streams[0].shape == (2, 20, 48)
    outputs = subject.outputs(IDS)
    assert all(torch.equal(outputs[name], stream) for (name, _), stream in zip(subject.layers(), streams, strict=True))
    feed = subject.cache()
    parts = torch.cat([feed(IDS[:, :7])[-1], feed(IDS[:, 7:8])[-1], feed(IDS[:, 8:])[-1]], dim=1)
    assert close(parts, streams[-1])
    lone = subject.logits(IDS[:1, 8:])
    assert close(subject.packed(IDS[:1], [8, 12])[:, 8:], lone)
    assert not close(subject.logits(IDS[:1])[:, 8:], lone, 1e-3)  # packing is no accident


def test_the_loss_is_the_training_loss_and_shares_add_up():
    subject, labels = subject_of(model("llama")), IDS.clone()
    labels[0, :9] = -100
    total, n = next_token_loss()(subject.module, (IDS[:, :-1], labels[:, 1:].contiguous()))
    value, logits = subject.loss(IDS, labels)
    assert torch.equal(value, total / n) and logits.shape == (2, 19, 67)
    shares = sum(subject.share(IDS[i : i + 1], labels[i : i + 1], int(n)) for i in range(2))
    assert torch.allclose(shares, value)


def test_a_cast_keeps_tied_weights_and_computed_tables():
    subject = subject_of(model("gemma"))
    low = subject.at("bf16")
    assert low.module.lm_head.weight is low.module.embed.weight and low.dtype == torch.bfloat16
    assert low.module.rope.cos.dtype == torch.float32 == subject.module.embed.weight.dtype
    assert low.at("fp32").dtype == torch.float32 and subject.at("autocast").logits(IDS).dtype == torch.bfloat16


def test_a_slice_has_each_kind_of_attention_and_leaves_the_original():
    whole = subject_of(model("gemma", n_layer=6, window_pattern="LLLLLG"))
    part = whole.slice(2)
    assert whole.windows == (7, 7, 7, 7, 7, None) and part.windows == (7, None)
    assert len(whole.layers()) == 6 and len(part.layers()) == 2
    ours = dict(part.module.blocks[1].named_parameters())
    assert all(torch.equal(ours[name], weight) for name, weight in whole.module.blocks[5].named_parameters())
    feed = part.cache()
    assert close(torch.cat((feed(IDS[:, :9])[-1], feed(IDS[:, 9:])[-1]), dim=1), part.hidden(IDS)[-1], 1e-4)


def test_a_slice_renumbers_widths_and_heads():
    config = ModelConfig(vocab_size=67, n_layer=3, n_head=4, n_embd=32, ff_widths="8,16,24", omit_heads="0:1 2:0")
    part = subject_of(build(config)).slice(2)
    assert part.config.ff_widths == "8,16" and part.config.omitted() == {0: [1]}
    assert len(part.hidden(IDS)) == 2


def test_hidden_does_not_compute_the_head():
    subject = subject_of(model("llama"))
    subject.module.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head was computed"))
    subject.hidden(IDS)
    with pytest.raises(pytest.fail.Exception):
        subject.logits(IDS)


def test_the_hooks_are_gone_afterwards():
    subject = subject_of(model("llama"))
    subject.hidden(IDS), subject.outputs(IDS, gradients=True)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in subject.module.modules())
    assert all(weight.grad is None for weight in subject.module.parameters())


def test_gradients_of_outputs_are_there_when_asked_for():
    outputs = subject_of(model("llama")).outputs(IDS, gradients=True)
    assert outputs["blocks.0"].grad.abs().max() > 0
    assert list(outputs)[0] == "embed" and list(outputs).index("blocks.0.attn") < list(outputs).index("blocks.1")


# ---- anybody's -------------------------------------------------------------------------------------------------------------


class Nano(nn.Module):
    """In nanoGPT's manner: (logits, loss), of the last position alone without targets; -1 is no target."""

    def __init__(self):
        super().__init__()
        self.inner = model("llama", max_seq_len=32)

    def forward(self, idx, targets=None):
        logits = self.inner(idx)
        if targets is None:
            return logits[:, -1:], None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def findings(subject):
    outcomes = examine(CHECKS, subject)
    failed = [outcome.reason for outcome in outcomes if outcome.status == "failed"]
    assert not failed
    return [finding for outcome in outcomes for finding in outcome.findings]


def test_a_module_in_nanogpts_manner_is_asked_through_its_targets():
    subject = subject_of(Nano())
    assert subject.capabilities == {"hidden", "loss", "train", "cast"} and subject.vocab_size == 67
    found = findings(subject)  # true of nanoGPT cast to bf16; under autocast, as it trains, torch widens the loss
    assert [(finding.code, finding.severity, finding.where) for finding in found] == [("R24", "info", "loss, bf16")]
    labels = IDS[:, :16].clone()
    labels[0, :5] = -100
    want = subject_of(subject.module.inner).loss(IDS[:, :16], labels).value
    assert torch.allclose(subject.loss(IDS[:, :16], labels).value, want)


def test_a_plain_callable_is_asked_what_can_be_asked():
    good, bad = model("llama", max_seq_len=32), model("llama", max_seq_len=32)
    subject = subject_of(lambda ids: good(ids))
    assert subject.max_seq_len == 32 and subject.vocab_size == 67 and subject.kind == "callable"
    with pytest.raises(Skip, match="plain callable"):
        subject.need("hidden")
    outcomes = examine(CHECKS, subject)
    assert [outcome.name.split()[0] for outcome in outcomes if outcome.status == "ran"] == ["M1", "M3", "M9"]
    assert all(outcome.reason for outcome in outcomes if outcome.status == "skipped")
    assert not any(outcome.findings for outcome in outcomes)
    leaky = subject_of(lambda ids: bad(ids) + 0.01 * bad(ids).mean(1, keepdim=True))
    assert {finding.code for finding in findings(leaky)} == {"R1"}


def test_the_blocks_are_the_list_with_the_most_weights():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
            self.deep = nn.Module()
            self.deep.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3))

    assert [name for name, _ in find_blocks(Odd())] == ["deep.layers.0", "deep.layers.1", "deep.layers.2"]


@pytest.mark.parametrize("answer", [torch.zeros(2, 3), "text", (None,), torch.zeros(1, 1, 5)])
def test_an_answer_that_is_no_logits_is_refused_in_one_line(answer):
    def wrong(ids):
        return answer

    wrong.max_seq_len = 16
    with pytest.raises(InputError, match="it must give logits of shape") as refusal:
        subject_of(wrong, "mine")
    assert "\n" not in str(refusal.value)


# ---- opening ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_kobza_opens(tmp_path):
    config = ModelConfig(vocab_size=8, max_seq_len=64, n_layer=1, n_head=2, n_embd=16, init="gpt2")
    built = build(config)
    save_checkpoint(tmp_path / "c", built, RunConfig(config), CharTokenizer.train(["abcdefgh"]), {"step": 3})
    subject = open_(str(tmp_path / "c"))
    ids = torch.arange(8)[None]
    assert subject.kind == "kobza" and torch.equal(subject.logits(ids), built.eval()(ids))


def test_the_battery_asks_small_models_whole_and_a_slice_where_it_is_told(tmp_path):
    config = ModelConfig(vocab_size=8, max_seq_len=64, n_layer=3, n_head=2, n_embd=16, init="gpt2")
    save_checkpoint(tmp_path / "c", build(config), RunConfig(config), CharTokenizer.train(["abcdefgh"]), {"step": 3})
    assert len(battery.open_(str(tmp_path / "c")).layers()) == 3
    part = battery.open_(str(tmp_path / "c"), layers=1)
    assert len(part.layers()) == 1 and battery.facts(part)["Blocks"][1] == ["3", "1"]
    for layers in (-1, 4):
        with pytest.raises(InputError, match="--layers is"):
            battery.open_(str(tmp_path / "c"), layers=layers)


def test_the_battery_slices_a_large_model(monkeypatch, tmp_path):
    config = ModelConfig(vocab_size=8, max_seq_len=64, n_layer=3, n_head=2, n_embd=16, init="gpt2")
    save_checkpoint(tmp_path / "c", build(config), RunConfig(config), CharTokenizer.train(["abcdefgh"]), {"step": 3})
    monkeypatch.setattr(battery, "SMALL", 1000)
    assert len(battery.open_(str(tmp_path / "c")).layers()) == 2


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "users_own.py").write_text(
        "import torch\nfrom torch import nn\n"
        "from kobza.doctor.mutations.model import model\n"
        "def make(size=1): return model('llama')\n"
        "def logits(ids): return model('llama')(ids)\n"
        "class Box: make = staticmethod(make)\n"
        "number = 3\n"
        "def broken(): raise RuntimeError('no\\nweights')\n"
    )
    (tmp_path / "raises.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("users_own", None)


@pytest.mark.parametrize(
    "spec, kind", [("users_own:make", "kobza"), ("users_own:Box.make", "kobza"), ("users_own:logits", "callable")]
)
def test_the_users_own_callable_opens(spec, kind, mine):
    subject = open_(spec)
    assert subject.kind == kind and torch.equal(subject.logits(IDS), model("llama")(IDS))


@pytest.mark.parametrize(
    "spec, says",
    [
        ("nowhere/at/all", "no such file or folder"),
        ("nobody_has_this:make", "cannot import"),
        ("users_own:absent", "has no absent"),
        ("users_own:number", "is a int"),
        ("users_own:broken", "calling it failed: RuntimeError: no weights"),
        ("raises:make", "importing raises failed: ZeroDivisionError"),
        ("transformers:nowhere", "no such folder"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(spec, says, mine):
    with pytest.raises(InputError, match=says) as refusal:
        open_(spec)
    assert "\n" not in str(refusal.value)


# ---- theirs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_a_folder_of_transformers_opens_and_runs_no_code_of_its_own(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'kobza[parity]'")
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    theirs = transformers.LlamaForCausalLM._from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    subject = open_(f"transformers:{tmp_path}")
    assert subject.kind == "transformers" and subject.windows == (None,) * 3 and subject.dropout == 0
    with torch.no_grad():
        assert torch.equal(subject.logits(IDS), theirs(IDS).logits)
    part, feed = subject.slice(2), subject.slice(2).cache()
    assert close(torch.cat((feed(IDS[:, :9])[-1], feed(IDS[:, 9:])[-1]), dim=1), part.hidden(IDS)[-1])
    assert len(subject.layers()) == 3

    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('the folder was given control')\n")
    with pytest.raises(InputError, match="transformers cannot load it") as refusal:
        open_(f"transformers:{tmp_path}")
    assert "\n" not in str(refusal.value)


def test_stop_never_leaves_the_subject():
    subject = subject_of(model("llama"))
    try:
        subject.hidden(IDS)
    except Stop:
        pytest.fail("our own signal came out")
