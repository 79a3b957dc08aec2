"""export/onnx.py: the graph computes what the model does, at any length, by onnxruntime."""

import pytest
import torch
from engine_distance import compare

from kobza.checkpoint import Loaded
from kobza.config import InputError, ModelConfig, RunConfig
from kobza.export import onnx as onnx_room
from kobza.export.onnx import open_onnx, write_onnx
from kobza.export.proof.engine import EngineError, reference_of
from kobza.export.source import source_of_loaded
from kobza.model import build
from kobza.tokenizer import LibraryTokenizer

EOT = "<|endoftext|>"
MODEL = dict(
    max_seq_len=24, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=48, embed_scale=32**0.5, tied=True, norm="rmsnorm",
    norm_place="both", window=5, window_pattern="LG", attn_scale=0.1, attn_softcap=50.0, softcap=30.0,
)  # fmt: skip


def source(tmp_path):
    tokenizer = LibraryTokenizer.train(["the cat sat on the mat"], 262, [EOT])
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **MODEL)
    model = build(config, seed=1).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    loaded = Loaded(model, RunConfig(model=config), tokenizer, {}, tmp_path / "cat")
    return source_of_loaded(loaded, ends=(tokenizer.eot_id,))


@pytest.mark.parity
def test_onnxruntime_computes_what_we_do_at_any_length(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    made = source(tmp_path)
    write_onnx(made, tmp_path)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(made.config.vocab_size, (n,), generator=draw).tolist() for n in (1, 2, 7, 24)]
    with reference_of(made) as ours, open_onnx(tmp_path) as theirs:
        assert (theirs.vocab_size, theirs.n_ctx) == (ours.vocab_size, 24)
        difference = compare(ours, theirs, texts)
        assert difference.max_logprob_all < 1e-4 and difference.texts == 3 and not difference.missing
        torch.testing.assert_close(theirs.logprobs(texts[0], [0]), ours.logprobs(texts[0], [0]), atol=1e-4, rtol=0)
        assert theirs.encode("the cat") == ours.encode("the cat") and theirs.begin("a") == ours.begin("a")
        assert theirs.greedy(texts[2], 9) == ours.greedy(texts[2], 9)
        assert (
            [theirs.stops_at(i) for i in (*made.ends, 5)]
            == [ours.stops_at(i) for i in (*made.ends, 5)]
            == [True, False]
        )
        with pytest.raises(InputError, match="25 ids where 1 to 24 fit"):
            theirs.logprobs([0] * 25, [0])
    batch = torch.tensor([texts[2], texts[2][::-1]])
    both = theirs.model.hidden(batch)
    torch.testing.assert_close(both, made.model()(batch).detach(), atol=1e-4, rtol=0)


@pytest.mark.parity
def test_a_broken_graph_is_one_line(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="onnxruntime does not open it") as caught:
        open_onnx(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_room, "find_spec", lambda package: None)
    for ask in (lambda: write_onnx(source(tmp_path), tmp_path), lambda: open_onnx(tmp_path)):
        with pytest.raises(InputError, match=r'is not installed; pip install "kobza\[onnx\]"'):
            ask()
