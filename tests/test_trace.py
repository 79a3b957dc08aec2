"""The trace shows what the model does: its weights are the attention's, its last lens row the answer, and no hook stays."""

import json
from html.parser import HTMLParser

import pytest
import torch

from kobza.checkpoint import save_checkpoint
from kobza.cli import main
from kobza.config import ModelConfig, RunConfig
from kobza.model import Attention, build
from kobza.tokenizer import CharTokenizer
from kobza.trace.page import entropy, render, words
from kobza.trace.record import attention_weights, record

TEXT = "Садок вишневий коло хати, хрущі над вишнями гудуть."
SWITCHES = {
    "plain": {},
    "gqa": dict(n_head=4, n_kv_head=2),
    "window and caps": dict(window=4, window_pattern="LG", attn_softcap=3.0, softcap=5.0),
    "two attentions, learned places": dict(pattern="AFA", position="learned", norm="layernorm"),
}


def made(**switches):
    config = ModelConfig(**dict(vocab_size=40, n_layer=2, n_embd=32, max_seq_len=32, init="gpt2") | switches)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_weights_are_the_attentions_own(switches):
    model, ids = made(**SWITCHES[switches]), torch.randint(40, (1, 16), generator=torch.Generator().manual_seed(2))
    outputs, values = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            plain = module.attend

            def seen(q, k, v, *rest, name=name, plain=plain):
                values[name], outputs[name] = v, plain(q, k, v, *rest)
                return outputs[name]

            module.attend = seen
    with torch.no_grad(), attention_weights(model) as found:
        model(ids)
    assert found.keys() == outputs.keys() and len(found) == model.config.n_attention
    for name, w in found.items():
        v = values[name][0]
        assert w.shape == (model.config.n_head, 16, 16)
        assert torch.allclose(w.sum(-1), torch.ones(()), atol=1e-6) and (w.triu(1) == 0).all()
        ours = w @ v.repeat_interleave(w.shape[0] // v.shape[0], dim=0)
        assert torch.allclose(ours, outputs[name][0], atol=1e-6)


def test_the_last_row_of_the_lens_is_the_answer_and_the_model_is_as_before():
    model, ids = made(softcap=5.0), list(range(12))
    plain = {name: module.attend for name, module in model.named_modules() if isinstance(module, Attention)}
    with torch.no_grad():
        before = model(torch.tensor([ids]))
    trace = record(model, ids)
    assert list(trace.lens) == ["embedding", "blocks.0", "blocks.1"]
    assert torch.equal(trace.lens["blocks.1"], before[0]) and torch.equal(trace.logits, before[0, -1])
    assert not torch.allclose(trace.lens["blocks.0"], before[0])
    assert all(module.attend is plain[name] for name, module in model.named_modules() if name in plain)
    assert not any(module._forward_hooks for module in model.modules())


def test_words_say_where_a_head_looks():
    one_back = torch.eye(4)[[0, 0, 1, 2]].numpy()  # row i looks at i - 1
    assert words(one_back, ["'a'", "'b'", "'c'", "'d'"]) == "1.0 back; 'c' at 'b' 100%"
    assert words(torch.eye(1).numpy(), ["a"]) == "0.0 back"


def test_entropy_of_a_coin():
    assert entropy(torch.tensor([0.5, 0.5])) == pytest.approx(0.6931, abs=1e-4)
    assert entropy(torch.tensor([1.0, 0.0])) == 0


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_a_hostile_token_stays_text():
    trace = record(made(), [1, 2, 3])
    html = render(trace, ["<script>", "&", "\x00"], lambda i: "<img src=x onerror=alert(1)>", 0.8, "<b>", 48)
    parser = Tags()
    parser.feed(html)
    assert all(tag != "script" for tag, _ in parser.tags)
    images = [attributes for tag, attributes in parser.tags if tag == "img"]
    assert len(images) == 2 * 4 and all(a["src"].startswith("data:image/png;base64,") for a in images)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tokenizer, folder = CharTokenizer.train([TEXT]), tmp_path_factory.mktemp("run") / "one"
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_embd=32, max_seq_len=32)
    save_checkpoint(folder, build(config), RunConfig(model=config), tokenizer, {})
    return folder


def test_from_the_command_line(run, tmp_path, capsys):
    page = tmp_path / "seen.html"
    assert main(["trace", str(run), "--prompt", "Садок", "--out", str(page)]) == 0
    assert "5 tokens" in capsys.readouterr().out and "Logit lens" in page.read_text(encoding="utf-8")
    assert main(["trace", str(run), "--prompt", "Садок", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["tokens"] == [repr(letter) for letter in "Садок"] and set(seen["lens"]) == {
        "embedding",
        "blocks.0",
        "blocks.1",
    }
    assert sum(row["before"] for row in seen["next"]) <= 1.0001


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "а" * 33], "33 tokens"),
        (["--prompt", "Садок", "--temperature", "-1"], "negative"),
        (["--prompt", "Садок", "--json", "--out", "x.html"], "no effect"),
        (["--prompt", ""], "prompt"),
    ],
)
def test_what_a_user_can_get_wrong(run, words, message, capsys):
    assert main(["trace", str(run), *words]) == 2
    assert message in capsys.readouterr().err
