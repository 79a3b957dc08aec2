"""Each engine of the certificate is the model it was given: transformers, llama.cpp and our own reader beside our model in
memory, on tiny random models; and what becomes of files that are damaged, processes that hang, and parents that die."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_distance import TIE, compare
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from kobza.config import InputError, ModelConfig
from kobza.export.proof import engine as engines
from kobza.export.proof import llama_cpp
from kobza.export.proof.engine import EngineError, Reference, available
from kobza.export.proof.hf import open_transformers
from kobza.export.proof.llama_cpp import open_llama_cpp
from kobza.export.proof.own import open_own
from kobza.export.proof.places import affordable, spread
from kobza.formats.gguf import write_gguf
from kobza.formats.stock import config_to_hf
from kobza.formats.template import ChatTemplate, Refused
from kobza.formats.weights import to_gguf, to_hf
from kobza.hub.gguf_tokenizer import tokenizer_text
from kobza.model import build
from kobza.tokenizer import LibraryTokenizer, byte_of_symbol, tokenizer_json

BOS, END, START = 259, 260, 261
MERGES = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"]]
VOCAB = byte_of_symbol() | {"Ġt": 256, "he": 257, "Ġthe": 258}
SPECIALS = {"<s>": BOS, "<|im_end|>": END, "<|im_start|>": START}
V, LENGTH = 270, 96
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": role, "content": text} for role, text in (("system", "Ти — кобзар."), ("user", "Заспівай the song!"))
]
TEXTS = [
    "",
    "the the theft",
    " Реве та стогне Дніпр  широкий\n\n",
    "x = {1: 'два'}\t# 12345",
    "👩‍👩‍👧 é\u0301 ½",
    "a<|im_end|>b",
]
IDS = [(7 * i + 3) % 256 for i in range(60)]

SIZES = dict(n_layer=2, n_head=4, n_embd=32, n_kv_head=2, n_ff=80, vocab_size=V, max_seq_len=LENGTH, norm_eps=2.0**-17)
PLAIN = SIZES | dict(qk_norm=False, mlp="swiglu")
GEMMA = PLAIN | dict(norm_offset=True, norm_cast="after", mlp="geglu_tanh", embed_scale=32**0.5, tied=True, head_dim=10)
WINDOWS = dict(norm_place="both", window=8, attn_scale=0.0, norm_offset=True)
FAMILIES = {
    "llama": PLAIN,
    "qwen2": PLAIN | dict(qkv_bias=True, tied=True),
    "qwen3": PLAIN | dict(qk_norm=True, qk_norm_weight=True, head_dim=12),
    "gemma": GEMMA,
    "gemma2": GEMMA | WINDOWS | dict(window_pattern="LG", softcap=30.0, attn_softcap=50.0),
    "gpt2": SIZES
    | dict(n_kv_head=4, position="learned", norm="layernorm", qk_norm=False, bias=True, mlp="gelu_tanh", tied=True),
}


def drawn(family, seed=1):
    """(model, its weights by our names): random, the gains of norms too."""
    model = build(ModelConfig(**FAMILIES[family]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = name.endswith("norm.weight") and not model.config.norm_offset
            weight.copy_(gain + 0.15 * torch.randn(weight.shape, generator=generator))
    return model, {name: weight.detach() for name, weight in model.named_parameters()}


def tokenizer(begins):
    """A byte-level BPE with three merges; a text begins with BOS or not."""
    first = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    named = {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}
    around = {"type": "TemplateProcessing", "single": first, "pair": first, "special_tokens": named}
    parts = dict(decoder=LEVEL, pre_tokenizer=LEVEL) | ({"post_processor": around} if begins else {})
    return LibraryTokenizer(tokenizer_json({"type": "BPE", "vocab": VOCAB, "merges": MERGES}, SPECIALS, **parts))


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def reference(family, begins=False, chat=CHAT):
    """The engine that all are held against."""
    bos = "<s>" if begins else ""
    template = ChatTemplate(chat, bos, "<|im_end|>") if chat else None
    return Reference(drawn(family)[0], tokenizer(begins), template, [END])


def write_folder(folder, family, begins=False, end=END, chat=CHAT, change=()):
    """The model as a Hugging Face folder; change: our names -> tensors that lie in the file instead."""
    folder.mkdir(exist_ok=True)
    model, tensors = drawn(family)
    hf = config_to_hf(model.config)
    save_file(to_hf(model.config, hf, tensors | dict(change)), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf | {"eos_token_id": 0}))
    usual = {"do_sample": True, "temperature": 0.5, "repetition_penalty": 1.5}  # not what the model itself says
    (folder / "generation_config.json").write_text(json.dumps(usual | {"eos_token_id": [end]}))
    (folder / "tokenizer.json").write_text(tokenizer(begins).to_json())
    names = {"eos_token": "<|im_end|>"} | ({"bos_token": "<s>"} if begins else {})
    names |= {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"chat_template": chat} if chat else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def metadata(config, arch, begins, end, chat):
    """What llama.cpp wants to know."""
    epsilon = "attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon"
    counts = {"context_length": config.max_seq_len, "embedding_length": config.n_embd, "block_count": config.n_layer}
    counts |= {"feed_forward_length": config.n_ff, "attention.head_count": config.n_head}
    counts |= {"attention.head_count_kv": config.n_kv_head}
    counts |= {f"attention.{part}_length": config.head_dim for part in ("key", "value")}
    counts |= {} if arch == "gpt2" else {"rope.dimension_count": config.head_dim}
    counts |= {"attention.sliding_window": config.window} if config.window else {}
    found = {f"{arch}.{key}": ("uint32", count) for key, count in counts.items()}
    found |= {f"{arch}.{epsilon}": ("float32", config.norm_eps)}
    found |= {} if arch == "gpt2" else {f"{arch}.rope.freq_base": ("float32", config.rope_theta)}
    names = [
        *sorted(VOCAB, key=VOCAB.__getitem__),
        *SPECIALS,
        *(f"[PAD{i}]" for i in range(V - len(VOCAB) - len(SPECIALS))),
    ]
    kinds = [1] * len(VOCAB) + [3] * len(SPECIALS) + [5] * (V - len(VOCAB) - len(SPECIALS))
    found |= {f"tokenizer.ggml.{key}": ("string", value) for key, value in (("model", "gpt2"), ("pre", "gpt-2"))}
    found |= {"tokenizer.ggml.tokens": ("array:string", names), "tokenizer.ggml.token_type": ("array:int32", kinds)}
    found |= {"tokenizer.ggml.merges": ("array:string", [" ".join(pair) for pair in MERGES])}
    found |= {"tokenizer.ggml.eos_token_id": ("uint32", end), "tokenizer.ggml.bos_token_id": ("uint32", BOS)}
    found |= {"tokenizer.ggml.add_bos_token": ("bool", begins)}
    found |= {"tokenizer.chat_template": ("string", chat)} if chat else {}
    return {"general.architecture": ("string", arch)} | found


def write_file(path, family, begins=False, end=END, chat=CHAT, change=(), drop=()):
    """The model as a .gguf in float32, less the tensors in `drop`."""
    model, tensors = drawn(family)
    written = to_gguf(model.config, family, tensors | dict(change))
    stored = {n: ("F32", tuple(t.shape), t.contiguous().numpy()) for n, t in written.items() if n not in drop}
    write_gguf(path, metadata(model.config, family, begins, end, chat), stored)
    return path


@pytest.fixture(
    params=["own, folder", "own, gguf", *(pytest.param(name, marks=pytest.mark.parity) for name in ("hf", "llama.cpp"))]
)
def opened(request, tmp_path):
    """(family, what write_folder and write_file take) -> an engine of that artifact."""
    kind, made = request.param, []
    if kind in ("hf", "llama.cpp"):
        pytest.importorskip({"hf": "transformers", "llama.cpp": "xllamacpp"}[kind], reason="needs kobza[parity]")

    def get(family, **how):
        if kind in ("own, folder", "hf"):
            path = write_folder(tmp_path / "folder", family, **how)
            made.append(open_own(path) if kind == "own, folder" else open_transformers(path))
        else:
            path = write_file(tmp_path / "model.gguf", family, **how)
            made.append(open_own(path, tokenizer_text) if kind == "own, gguf" else open_llama_cpp(path, LENGTH))
        return made[-1]

    yield get
    for one in made:
        one.__exit__()


# ---- every engine is the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_computes_what_the_model_does(opened, family):
    ours, theirs = reference(family), opened(family)
    found = compare(ours, theirs, [IDS, [5], IDS[10:40]], [[0, 7, 31, 59], [0], [29]])
    table = "llama.cpp" in theirs.name and "gelu" in FAMILIES[family]["mlp"].replace("geglu", "gelu")
    limit = 3e-3 if table else 1e-4  # llama.cpp looks GELU up in a table of float16
    assert found.max_logprob <= found.max_logprob_all < limit
    assert (found.n, found.n_next, found.missing, found.flips - found.ties) == (6, 3, 0, 0)
    assert found.nll_reference == pytest.approx(found.nll_other, abs=1e-3)
    assert theirs.vocab_size == V and theirs.n_ctx >= LENGTH - 1
    assert theirs.greedy(IDS, 12) == ours.greedy(IDS, 12)
    with pytest.raises(InputError, match=f"{LENGTH + 1} ids where"):
        theirs.logprobs([1] * (LENGTH + 1), [0])
    with pytest.raises(InputError, match="id 999 is none of 270"):
        theirs.greedy([1, 999], 2)


def test_positions_come_in_any_order_and_again(opened):
    theirs = opened("llama")
    once = theirs.logprobs(IDS, [3, 50, 20])
    torch.testing.assert_close(theirs.logprobs(IDS, [20, 3, 50, 20]), once[[2, 0, 1, 2]], atol=1e-5, rtol=0)
    torch.testing.assert_close(once.exp().sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("begins", [False, True])
def test_an_engine_reads_and_writes_text_as_the_model_does(opened, begins):
    # without a beginning token of its own a .gguf gives the template one by chance: id 11
    chat = CHAT if begins else CHAT.removeprefix("{{ bos_token }}")
    ours, theirs = reference("llama", begins, chat), opened("llama", begins=begins, chat=chat)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text), text
        assert theirs.begin(text) == ours.begin(text) == [BOS] * begins + ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.render(MESSAGES) == ours.render(MESSAGES)
    assert theirs.render(MESSAGES[1:], False) == ours.render(MESSAGES[1:], False)
    assert theirs.chat(MESSAGES) == ours.chat(MESSAGES)
    assert (theirs.chat(MESSAGES)[0] == BOS) == begins


def test_what_a_template_refuses_and_where_there_is_none(opened):
    with pytest.raises(Refused, match="no tools"):
        opened("llama").render([{"role": "tool", "content": "1"}])
    bare = opened("llama", chat=None)
    assert bare.render(MESSAGES) is None and bare.chat(MESSAGES) is None


def test_an_engine_stops_where_its_file_says(opened):
    theirs = opened("llama")
    assert [theirs.stops_at(i) for i in (END, START, 65, 0xD0)] == [True, False, False, False]
    assert reference("llama").stops_at(END) and not reference("llama").stops_at(START)
    other = opened("llama", end=START)
    assert other.stops_at(START)


def test_greedy_ends_with_the_token_that_ends_the_text(opened):
    """A head that finds END likeliest from the third token on would be luck; so the end is a token that it says."""
    said = opened("llama").greedy(IDS, 8)
    end = next(i for n, i in enumerate(said) if n and i not in said[:n])
    ours = Reference(drawn("llama")[0], tokenizer(False), None, [end])
    assert opened("llama", end=end).greedy(IDS, 8) == ours.greedy(IDS, 8) == said[: said.index(end) + 1]


def test_another_weight_is_seen(opened):
    weight = drawn("llama")[1]["blocks.1.mlp.up_proj.weight"].clone()
    weight[3, 5] += 0.5
    found = compare(reference("llama"), opened("llama", change={"blocks.1.mlp.up_proj.weight": weight}), [IDS])
    assert found.max_logprob > 5e-3 and found.max_kl > 1e-7


@pytest.mark.parity
def test_an_adapter_beside_the_file_is_the_merged_model(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs kobza[parity]")
    path, generator = write_file(tmp_path / "model.gguf", "qwen2"), torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((2, 32), (32, 2)))
    parts = {f"blk.1.attn_q.weight.lora_{x}": ("F32", tuple(t.shape), t.numpy()) for x, t in (("a", a), ("b", b))}
    texts = {"general.type": "adapter", "general.architecture": "qwen2", "adapter.type": "lora"}
    said = {key: ("string", text) for key, text in texts.items()} | {"adapter.lora.alpha": ("float32", 4.0)}
    write_gguf(tmp_path / "adapter.gguf", said, parts)
    ours = reference("qwen2")
    with open_llama_cpp(path, LENGTH, tmp_path / "adapter.gguf") as theirs:
        assert compare(ours, theirs, [IDS]).max_logprob > 0.01
        with torch.no_grad():
            ours.model.blocks[1].attn.q_proj.weight += 4.0 / 2 * b @ a
        assert compare(ours, theirs, [IDS]).max_logprob < 1e-4
    with pytest.raises(EngineError, match="adapter"):
        open_llama_cpp(path, LENGTH, path)


def test_a_weight_that_is_no_number_is_never_equal(opened):
    weight = drawn("llama")[1]["blocks.1.mlp.up_proj.weight"].clone()
    weight[3, 5] = torch.nan
    theirs = opened("llama", change={"blocks.1.mlp.up_proj.weight": weight})
    found = compare(reference("llama"), theirs, [IDS], [[3, 30]])
    assert found.missing == 2 * V and found.max_logprob > 50 and found.max_kl > 50


# ---- what will not open ------------------------------------------------------------------------------------------------


def cut(path, n_bytes):
    raw = path.read_bytes()
    path.write_bytes(raw[:n_bytes] if n_bytes else bytes(len(raw)))


@pytest.mark.parity
@pytest.mark.parametrize("n_bytes", [0, 10, 5000, 60_000])
def test_a_damaged_gguf_is_one_line_and_leaves_nothing_behind(n_bytes, tmp_path, capfd):
    pytest.importorskip("xllamacpp", reason="needs kobza[parity]")
    path = write_file(tmp_path / "model.gguf", "llama")
    cut(path, n_bytes)
    with pytest.raises(EngineError, match=r"model\.gguf: .*(magic|corrupted|failed|invalid)") as error:
        open_llama_cpp(path, LENGTH)
    assert "\n" not in str(error.value) and "exit code 1" in str(error.value)
    assert capfd.readouterr() == ("", "") and children() == []


@pytest.mark.parity
def test_a_gguf_without_one_of_its_tensors_names_it(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs kobza[parity]")
    path = write_file(tmp_path / "model.gguf", "llama", drop=["blk.1.attn_q.weight"])
    with pytest.raises(EngineError, match=r"blk\.1\.attn_q\.weight"):
        open_llama_cpp(path, LENGTH)
    with pytest.raises(EngineError, match="no such file"):
        open_llama_cpp(tmp_path / "none.gguf", LENGTH)
    with pytest.raises(EngineError, match="no such file"):
        open_llama_cpp(path, LENGTH, lora=tmp_path / "none.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("n_bytes", [0, 100])
@pytest.mark.parity
def test_a_damaged_folder_is_one_line(name, n_bytes, tmp_path, capfd):
    pytest.importorskip("transformers", reason="needs kobza[parity]")
    folder = write_folder(tmp_path / "folder", "llama")
    cut(folder / name, n_bytes)
    for opener in (open_transformers, open_own):
        with pytest.raises(EngineError) as error:
            opener(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parity
def test_transformers_may_not_draw_a_missing_weight_nor_run_code_nor_unpickle(tmp_path):
    pytest.importorskip("transformers", reason="needs kobza[parity]")
    folder = write_folder(tmp_path / "folder", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(EngineError, match="missing keys model.layers.2"):
        open_transformers(folder)
    ran = tmp_path / "ran"
    (folder / "modeling_mine.py").write_text(f"open({str(ran)!r}, 'w')")
    mine = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "modeling_mine.C", "AutoModelForCausalLM": "modeling_mine.M"},
    }
    (folder / "config.json").write_text(json.dumps(config | mine))
    with pytest.raises(EngineError):
        open_transformers(folder)
    assert not ran.exists()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(drawn("llama")[1], folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="safetensors"):
        open_transformers(folder)


@pytest.mark.parity
def test_transformers_reaches_for_no_network_and_says_nothing(tmp_path, monkeypatch, capfd):
    pytest.importorskip("transformers", reason="needs kobza[parity]")
    constants = pytest.importorskip("huggingface_hub").constants

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = constants.HF_HUB_OFFLINE
    open_transformers(write_folder(tmp_path / "folder", "llama")).greedy([1], 2)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(EngineError):
        open_transformers(tmp_path / "not-here")
    assert constants.HF_HUB_OFFLINE == before


# ---- llama.cpp's process -----------------------------------------------------------------------------------------------


def children():
    """Processes of ours that serve llama.cpp."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        found += [int(folder.name)] if parent == os.getpid() and b"llama_child" in words else []
    return found


def gone(pid, seconds=10):
    """Whether a process has ended, or is only waited for."""
    for _ in range(int(seconds * 50)):
        try:
            state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")


@pytest.fixture
def served(tmp_path):
    pytest.importorskip("xllamacpp", reason="needs kobza[parity]")
    return write_file(tmp_path / "model.gguf", "llama")


@linux
@pytest.mark.parity
def test_the_process_ends_with_the_engine_and_takes_no_longer_than_it_may(served):
    before = time.monotonic()
    with open_llama_cpp(served, LENGTH) as engine:
        assert time.monotonic() - before < 5
        (pid,) = children()
        assert not gone(pid, 0.05)
    assert gone(pid)
    with pytest.raises(EngineError, match="runs no more"):
        engine.encode("a")
    with pytest.raises(EngineError, match=r"had not loaded .* after 0\.001 s"):
        open_llama_cpp(served, LENGTH, seconds=0.001)
    assert children() == []


@linux
@pytest.mark.parity
def test_a_server_that_hangs_or_dies_is_an_error_and_not_a_wait(served, monkeypatch):
    monkeypatch.setattr(llama_cpp, "REQUEST_SECONDS", 0.5)
    with open_llama_cpp(served, LENGTH) as engine:
        (pid,) = children()
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"did not answer within 0\.5 s"):
            engine.logprobs(IDS, [5])
        assert gone(pid)
    with open_llama_cpp(served, LENGTH) as engine:
        os.kill(children()[0], signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(EngineError, match=r"killed by signal 9|runs no more"):
                engine.encode("a")


@linux
@pytest.mark.parity
def test_it_dies_with_its_parent_however_that_dies(served):
    script = (
        "import sys, time, pathlib; from kobza.export.proof.llama_cpp import open_llama_cpp\n"
        "engine = open_llama_cpp(pathlib.Path(sys.argv[1]), 64); print(engine._child._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(served)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert not gone(pid, 0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


@pytest.mark.parity
def test_only_the_one_who_started_it_is_served(served):
    with open_llama_cpp(served, LENGTH) as engine:
        engine._child._key = "another"
        with pytest.raises(EngineError, match="(?i)api key"):
            engine.encode("a")


# ---- an extra that is absent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", [open_transformers, lambda path: open_llama_cpp(path, 8)])
def test_an_absent_extra_is_named_with_its_install_line(opener, tmp_path, monkeypatch):
    assert available("numpy") == np.__version__ and available("kobza_never_written") is None
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'is not installed; pip install "kobza\[parity\]"'):
        opener(tmp_path)


# ---- measures ----------------------------------------------------------------------------------------------------------


class Table:
    """An engine that answers every question with the same probabilities (n, V)."""

    def __init__(self, rows, n_ctx=100):
        self.name, self.rows, self.n_ctx = "a table", torch.tensor(rows, dtype=torch.float64), n_ctx
        self.vocab_size, self.asked = self.rows.shape[1], []

    def logprobs(self, ids, positions):
        self.asked.append((list(ids), list(positions)))
        return self.rows[list(positions)].log()


def test_the_measures_are_those_worked_out_by_hand():
    ours, theirs = Table([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]), Table([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
    found = compare(ours, theirs, [[0, 1]], [[0, 1]])
    kl = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert found.max_logprob == pytest.approx(np.log(2)) and found.max_kl == pytest.approx(kl)
    assert found.mean_kl == pytest.approx(kl / 2) and found.worst == (0, 0)
    assert (found.n, found.n_next, found.flips, found.ties, found.texts) == (2, 1, 1, 0, 1)
    assert found.perplexities == pytest.approx((4, 2))  # id 1 follows: 0.25 and 0.5


def test_a_near_tie_is_told_apart_and_the_tail_counts_only_for_all():
    a, b = 0.5, 0.5 * np.exp(-TIE / 2)
    ours, theirs = Table([[a, b, 1 - a - b]]), Table([[b, a, 1 - a - b]])
    found = compare(ours, theirs, [[0]], [[0]])
    assert found.flips == found.ties == 1 and found.max_logprob == pytest.approx(TIE / 2)
    tail = compare(Table([[1 - 1e-6, 1e-6]]), Table([[1 - 1e-5, 1e-5]]), [[0]], [[0]])
    assert tail.max_logprob < 1e-4 and tail.max_logprob_all == pytest.approx(np.log(10))
    raised = compare(Table([[1 - 1e-6, 1e-6]]), Table([[0.5, 0.5]]), [[0]], [[0]])
    assert raised.max_logprob == pytest.approx(np.log(0.5e6))  # likely to one of the two is enough
    flat = compare(Table([[1 / 20_000] * 20_000]), Table([[1 / 20_000] * 20_000]), [[0]], [[0]])
    assert flat.max_logprob == flat.max_kl == 0  # no token of so many is likely


def test_what_the_other_does_not_answer_counts_as_impossible():
    ours = Table([[0.5, 0.5]])
    silent = compare(ours, Table([[np.nan, np.nan]]), [[0]], [[0]])
    assert silent.missing == 2 and silent.max_logprob > 90 and silent.max_kl > 90
    zero = compare(ours, Table([[1.0, 0.0]]), [[0]], [[0]])
    assert zero.missing == 0 and zero.max_logprob > 90
    small = compare(Table([[1 - 1e-60, 1e-60]]), Table([[1.0, np.nan]]), [[0]], [[0]])
    assert small.missing == 1 and small.max_kl < 1e-9 and small.max_logprob == 0
    with pytest.raises(InputError, match="computes NaN"):
        compare(Table([[np.nan, np.nan]]), ours, [[0]], [[0]])


def test_compare_cuts_texts_to_both_and_refuses_another_vocabulary():
    ours, theirs = Table([[0.5, 0.5]] * 100), Table([[0.5, 0.5]] * 100, n_ctx=5)
    seen = []
    found = compare(ours, theirs, [[0] * 50, [1, 0]], progress=lambda done, all: seen.append((done, all)))
    assert theirs.asked == ours.asked == [([0] * 5, [0, 1, 2, 3]), ([1, 0], [0])]
    assert (found.n, found.texts) == (5, 2) and seen == [(4, 5), (5, 5)]
    with pytest.raises(InputError, match="no position"):
        compare(ours, theirs, [[0]])
    with pytest.raises(InputError, match="1 tokens and .* 2"):
        compare(ours, Table([[1.0]] * 9), [[0, 1]])
    padded = compare(ours, Table([[0.25, 0.25, 0.5]] * 9), [[0, 1]])
    assert padded.max_logprob == pytest.approx(np.log(2))  # what padding takes is missing elsewhere


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 200))
def test_positions_are_spread_over_all_texts_and_keep_to_the_budget(lengths, budget):
    found = spread(lengths, budget)
    room = [max(length - 1, 0) for length in lengths]
    assert sum(map(len, found)) == min(budget, sum(room))
    for n, places in zip(room, found, strict=True):
        assert places == sorted(set(places)) and all(0 <= p < n for p in places)
        assert not places or places[-1] == n - 1
    shares = [len(places) for places, n in zip(found, room, strict=True) if len(places) < n]
    assert not shares or max(map(len, found), default=0) <= max(min(shares) + 1, *map(len, found))


def test_an_engine_is_asked_for_no_more_than_it_can_answer_in_a_minute():
    assert [affordable(v) for v in (270, 49_152, 151_936, 262_144)] == [256, 81, 26, 15]
