"""Our tokenizers in a GGUF: real llama.cpp makes the same ids of any text, and the vocabulary comes back as it was."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.export import vocabulary as module
from kobza.export.pretokenizer import LETTERS, NAMES, pre_tokenizer
from kobza.export.vocabulary import exceptions, notes, vocabulary
from kobza.formats.gguf import write_gguf
from kobza.formats.gguf_tokens import CONTROL, UNUSED, USER_DEFINED, characters_of_tokens, characters_to_tokens
from kobza.formats.merges import merges
from kobza.formats.splits import LLAMA3, QWEN2, SPLITS, split
from kobza.formats.template import ChatTemplate
from kobza.hub.encodings import O200K_SPLIT
from kobza.hub.gguf_tokenizer import tokenizer_text
from kobza.tokenizer import (
    BOS,
    BYTE_LEVEL,
    EOT,
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    Tokenizer,
    byte_of_symbol,
    load_tokenizer,
    tokenizer_json,
)

VERSE = (
    "Реве та стогне Дніпр широкий, сердитий вітер завива — «додолу» верби гне високі…\nҐанок, їжак, є! м'яч ’ʼ\n\n"
    "def f(x): return x*12345 + 0xFF  # don't\r\n\tWe'll SEE 日本語のテキスト 한국어 👩‍👩‍👧 🇺🇦 e\u0301 हिन्दी\n"
)
ASCII = "Hello, world! \\x41 <|endoftext|> {a: 1, b: 2}\n\t\x00~"
FIXED = (
    *("", " ", "\n", "a", VERSE, "  two  spaces   \n\n\n x ", "1234567 ½ ² Ⅷ ٣", "It's DON'T 'tis we'LL"),
    *(
        "<|endoftext|> a <|begin|>b<s> </s><unk> <0x41> [PAD7] <think>x</think>",
        "\u2581a \u2581",
        "\x00\x01\x7f\u200b\ufeff",
    ),
)


def drawn(letters: str, n: int = 40) -> list[str]:
    pick = random.Random(n)
    few = [pick.sample(sorted({*letters}), min(5, len({*letters}))) for _ in range(n)]
    return ["".join(pick.choices(some, k=pick.randint(1, 25))) for some in few]


def wild(n: int = 40) -> list[str]:
    """Texts of any code points, of each length in UTF-8."""
    pick, ranges = random.Random(7), ((1, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    return ["".join(chr(pick.randrange(*pick.choice(ranges))) for _ in range(20)) for _ in range(n)]


def bpe(
    steps: tuple[str, ...], specials: tuple[str, ...] = (EOT,), own: tuple[str, ...] = (), **changed
) -> LibraryTokenizer:
    """A byte-level BPE learned from VERSE behind a pattern."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    symbols = [symbol for symbol, _ in sorted(byte_of_symbol().items(), key=lambda item: item[1])]
    inner.train_from_iterator(
        [VERSE] * 3, trainers.BpeTrainer(vocab_size=700, initial_alphabet=symbols, show_progress=False)
    )
    model = json.loads(inner.to_str())["model"] | changed.pop("model", {})
    n = len(model["vocab"])
    marks = {name: n + i for i, name in enumerate(specials)}
    read = {name: n + len(marks) + i for i, name in enumerate(own)}
    pre = {"type": "Sequence", "pretokenizers": [*map(split, steps), BYTE_LEVEL]}
    return LibraryTokenizer(
        tokenizer_json(model, marks, read, **{"pre_tokenizer": pre, "decoder": BYTE_LEVEL, **changed})
    )


def sentencepiece(**asked) -> LibraryTokenizer:
    """BPE with byte fallback over a few words, as Llama 2's: a merge for each split of each token."""
    made = ["▁в", "ер", "ерб", "▁верб", "▁▁", "an", "the", "th", "▁the", "he", "aa", "aaa", "▁a", "▁верби", "и▁"]
    letters = list("▁верби thean.,!")
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *made]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    model = {"type": "BPE", "vocab": ids, "merges": merges(made, {*letters, *made}), "unk_token": "<unk>"}
    model |= {"fuse_unk": True, "byte_fallback": True}
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    back += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    around = {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": back},
    }
    first = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    table = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    edges = {"type": "TemplateProcessing", "single": first, "pair": first, "special_tokens": table}
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return LibraryTokenizer(tokenizer_json(model | asked, specials, post_processor=edges, **around))


def kinds() -> dict[str, tuple[Tokenizer, list[str]]]:
    any_text = [*FIXED, *drawn(LETTERS), *wild()]
    chars = CharTokenizer.train
    tricky = VERSE + "éÐÂÑ\u2581Ġ"  # some of these are symbols of bytes
    return {
        "bytes": (ByteTokenizer(), any_text),
        "bytes with specials": (ByteTokenizer([EOT, BOS]), any_text),
        "bpe": (LibraryTokenizer.train([VERSE] * 3, 600), any_text),
        "bpe with specials": (LibraryTokenizer.train([VERSE] * 3, 600, [EOT, BOS]), any_text),
        "bpe, single digits": (bpe(SPLITS["smollm"]), any_text),
        "bpe, llama 3": (bpe((LLAMA3,), model={"ignore_merges": True}), any_text),
        "bpe, own tokens": (bpe((QWEN2,), own=("<think>", "</think>", "  ")), any_text),
        "characters or bytes": (chars([VERSE], "bytes"), any_text),
        "characters or bytes with specials": (chars([tricky], "bytes", [EOT, BOS]), any_text),
        "characters, others skipped": (chars([tricky], "skip", [EOT]), any_text),
        "characters": (chars([VERSE], "error", [BOS]), drawn(VERSE)),
        "characters, ascii": (chars([ASCII]), drawn(ASCII)),
        "sentencepiece": (sentencepiece(), [*any_text, "aaaa aaa верби the  th"]),
    }


KINDS = kinds()
pytestmark = pytest.mark.filterwarnings("ignore")


def written(path: Path, tokenizer: Tokenizer, more: int = 0, **asked) -> Path:
    """A GGUF of a model of one layer with the tokenizer's vocabulary."""
    entries = vocabulary(tokenizer, tokenizer.vocab_size + more, asked.pop("ends", ()), asked.pop("template", None))
    n, width, draw = tokenizer.vocab_size + more, 32, np.random.default_rng(0)
    said = {"block_count": 1, "context_length": 512, "embedding_length": width, "feed_forward_length": width}
    said |= {"attention.head_count": 1}
    metadata = {
        "general.architecture": ("string", "llama"),
        "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-5),
    }
    metadata |= {f"llama.{key}": ("uint32", value) for key, value in said.items()}
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (n, width), "output": (n, width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width, width) for name in square} | {
        f"blk.0.{x}_norm": (width,) for x in ("attn", "ffn")
    }
    arrays = {name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    write_gguf(path, metadata | entries | asked, {f"{name}.weight": ("F32", a.shape, a) for name, a in arrays.items()})
    return path


def served(path: Path):
    pytest.importorskip("xllamacpp")
    from kobza.export.proof.llama_cpp import open_llama_cpp

    return open_llama_cpp(path, n_ctx=256)


def plain(entries) -> dict:
    return {key: value for key, (_, value) in entries.items()}


def read_back(entries, folder: Path, unknown: str = "error") -> Tokenizer:
    (folder / "tokenizer.json").write_text(tokenizer_text(plain(entries)), encoding="utf-8")
    return load_tokenizer(folder / "tokenizer.json", unknown)


# ---- the same ids --------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_same_ids(kind, tmp_path):
    tokenizer, texts = KINDS[kind]
    with served(written(tmp_path / "m.gguf", tokenizer)) as engine:
        for text in texts:
            assert engine.encode(text) == tokenizer.encode(text).tolist(), text
        for text in texts[1::6]:
            ids = tokenizer.encode(text).tolist()
            assert engine.begin(text) == ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + ids
            assert engine.decode(ids) == tokenizer.decode(ids, continues=True), text


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    names = ("bytes", "bpe with specials", "characters or bytes with specials", "characters, others skipped")
    folder = tmp_path_factory.mktemp("served")
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(served(written(folder / f"{i}.gguf", KINDS[name][0])))
            for i, name in enumerate(names)
        }


@pytest.mark.parity
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=40))
def test_of_any_text(engines, text):
    for name, engine in engines.items():
        assert engine.encode(text) == KINDS[name][0].encode(text).tolist(), name


def pairs(name: str) -> LibraryTokenizer:
    """A vocabulary that joins any two bytes of LETTERS in one piece: where a text is cut shows in the ids."""
    symbols = [symbol for symbol, _ in sorted(byte_of_symbol().items(), key=lambda item: item[1])]
    used = [symbols[b] for b in sorted({*LETTERS.encode()})]
    joined = [(a, b) for a in used for b in used]
    random.Random(1).shuffle(joined)
    vocab = {token: i for i, token in enumerate(symbols + [a + b for a, b in joined])}
    model = {"type": "BPE", "vocab": vocab, "merges": [f"{a} {b}" for a, b in joined]}
    pre = {"type": "Sequence", "pretokenizers": [*map(split, SPLITS[name]), BYTE_LEVEL]}
    return LibraryTokenizer(tokenizer_json(model, {}, pre_tokenizer=pre, decoder=BYTE_LEVEL))


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_llama_cpp_does(name, tmp_path):
    tokenizer = pairs(name)
    assert SPLITS[pre_tokenizer(tokenizer)] == SPLITS[name]
    path = written(tmp_path / "m.gguf", tokenizer, **{"tokenizer.ggml.pre": ("string", name)})
    with served(path) as engine:
        for text in [*drawn(LETTERS, 100), *drawn("09'sS\n "), *drawn("aSéЇ\u0301 ")]:
            assert engine.encode(text) == tokenizer.encode(text).tolist(), text


@pytest.mark.parity
def test_a_wrong_pattern_shows(tmp_path):
    """The texts tell even near patterns apart: with another name some get other ids."""
    tokenizer, texts = pairs("smollm"), drawn(LETTERS)
    with served(written(tmp_path / "m.gguf", tokenizer, **{"tokenizer.ggml.pre": ("string", "gpt-2")})) as engine:
        assert any(engine.encode(text) != tokenizer.encode(text).tolist() for text in texts)


# ---- beginning and end ---------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_nothing_ends_a_text_that_is_text(tmp_path):
    """Without an end in the file llama.cpp would stop at id 11."""
    for kind, silent in (("bytes", 255), ("characters, ascii", None), ("bpe", None), ("characters or bytes", None)):
        tokenizer = KINDS[kind][0]
        with served(written(tmp_path / "m.gguf", tokenizer)) as engine:
            assert not any(engine.stops_at(i) for i in (0, 2, 5, 11, 12)), kind
            assert silent is None or engine.stops_at(silent)


@pytest.mark.parity
def test_every_end_ends(tmp_path):
    marks = ("<|im_start|>", "<|stop|>", "<|halt|>", "<|end_of_text|>", "<|finish|>")
    tokenizer = LibraryTokenizer.train([VERSE] * 3, 500, marks)
    template = ChatTemplate(
        "{{ messages[0].content }}", bos="<|im_start|>", eos="<|halt|>", specials={"pad_token": "<|stop|>"}
    )
    with served(written(tmp_path / "m.gguf", tokenizer, ends=(1, 2, 3, 4), template=template)) as engine:
        assert [engine.stops_at(i) for i in range(6)] == [False, True, True, True, True, False]
    found = plain(vocabulary(tokenizer, tokenizer.vocab_size, (1, 2, 3, 4), template))
    ids = {edge: found[f"tokenizer.ggml.{edge}_token_id"] for edge in ("bos", "eos", "eot", "eom", "padding")}
    assert ids == {"bos": 0, "eos": 2, "eot": 1, "eom": 4, "padding": 1}  # <|end_of_text|> is known by its name
    assert found["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(InputError, match="room for three ends"):
        vocabulary(LibraryTokenizer.train([VERSE], 500, ("<a>", "<b>", "<c>", "<d>")), 500, (0, 1, 2, 3))


def test_ends_of_a_tokenizer_without_one():
    """A byte that no text has, a row without a token, or what begins a text: never a letter."""
    chars = CharTokenizer.train
    some = chars([VERSE])
    assert plain(vocabulary(ByteTokenizer(), 256))["tokenizer.ggml.eos_token_id"] == 255
    whole = chars([VERSE], "bytes")
    assert plain(vocabulary(whole, whole.vocab_size))["tokenizer.ggml.eos_token_id"] == whole.vocab_size - 1
    found = plain(vocabulary(some, some.vocab_size + 3))
    n = some.vocab_size
    assert found["tokenizer.ggml.eos_token_id"] == n
    assert found["tokenizer.ggml.tokens"][n:] == [f"[PAD{n}]", f"[PAD{n + 1}]", f"[PAD{n + 2}]"]
    assert found["tokenizer.ggml.token_type"][n:] == [UNUSED] * 3
    begun = chars([VERSE], "error", [BOS])
    assert plain(vocabulary(begun, begun.vocab_size))["tokenizer.ggml.eos_token_id"] == begun.bos_id
    with pytest.raises(InputError, match="--data.bos or --data.unknown bytes"):
        vocabulary(some, some.vocab_size)


@pytest.mark.parity
def test_a_template_sees_the_tokens_it_was_written_for(tmp_path):
    """llama.cpp has a bos_token for every template: to one that knows none it must be "" still."""
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
    tokenizer = LibraryTokenizer.train([VERSE] * 3, 500, ("<s>", "</s>"))
    said = [{"role": "user", "content": "ніч"}]
    for template in (
        ChatTemplate(source, eos="</s>"),
        ChatTemplate(source, bos="<s>", eos="</s>"),
        ChatTemplate(source),
    ):
        with served(written(tmp_path / "m.gguf", tokenizer, ends=(1,), template=template)) as engine:
            assert engine.render(said) == template.render(said)
    same = ChatTemplate(source, bos="<s>", eos="</s>")
    assert plain(vocabulary(tokenizer, 500, (1,), same))["tokenizer.chat_template"] == source


@pytest.mark.parity
def test_a_character_outside_an_ascii_vocabulary_does_no_harm(tmp_path):
    """A trie over bytes must not be left in the middle of a character, nor give the id -1."""
    tokenizer = KINDS["characters, ascii"][0]
    with served(written(tmp_path / "m.gguf", tokenizer)) as engine:
        for text in ("привіт", "aЖb", "@@", "\\n", "ÿ"):
            assert all(0 <= i < tokenizer.vocab_size for i in engine.encode(text)), text


# ---- and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [0, 5])
def test_the_vocabulary_comes_back(kind, more, tmp_path):
    tokenizer, texts = KINDS[kind]
    entries = vocabulary(tokenizer, tokenizer.vocab_size + more)
    found = read_back(entries, tmp_path, getattr(tokenizer, "unknown", "error"))
    assert type(found) is type(tokenizer)
    assert (found.specials, found.bos_id, found.ends) == (tokenizer.specials, tokenizer.bos_id, tokenizer.ends)
    assert found.pieces == tokenizer.pieces
    for text in texts:
        assert found.encode(text).tolist() == tokenizer.encode(text).tolist(), text
    assert vocabulary(found, tokenizer.vocab_size + more) == entries


def test_a_hole_stays_a_hole(tmp_path):
    content = json.loads(LibraryTokenizer.train([VERSE], 400, [EOT]).to_json())
    content["model"]["vocab"]["<|last|>"] = 405
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 405, "content": "<|last|>"})
    tokenizer = LibraryTokenizer(json.dumps(content))
    entries = vocabulary(tokenizer, 406)
    assert plain(entries)["tokenizer.ggml.tokens"][400:] == [*(f"[PAD{i}]" for i in range(400, 405)), "<|last|>"]
    assert read_back(entries, tmp_path).pieces == tokenizer.pieces


@settings(max_examples=60, deadline=None)
@given(characters=st.text(max_size=30).map(lambda text: "".join(dict.fromkeys(text))), spelled=st.booleans())
def test_characters_are_read_as_they_are_written(characters, spelled):
    made = characters_to_tokens(characters, spelled)
    assert len(set(made[0])) == len(made[0]) == len(characters) + 256 * spelled
    assert characters_of_tokens(*made) == (characters, spelled)


def test_a_learned_vocabulary_is_none_of_characters():
    entries = plain(vocabulary(KINDS["bpe"][0], KINDS["bpe"][0].vocab_size))
    parts = (entries[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    assert characters_of_tokens(*parts) is None


# ---- what llama.cpp cannot do --------------------------------------------------------------------------------------


def unigram() -> LibraryTokenizer:
    return LibraryTokenizer(
        tokenizer_json({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}, {})
    )


def with_flag(flag: str) -> LibraryTokenizer:
    content = json.loads(bpe((QWEN2,), own=("<think>",)).to_json())
    content["added_tokens"][-1][flag] = True
    return LibraryTokenizer(json.dumps(content))


SPACED = BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True}
REFUSED = {
    "Unigram": (unigram, "no tokenizer that equals this Unigram one"),
    "NFKC": (lambda: bpe((QWEN2,), normalizer={"type": "NFKC"}), "does not normalize"),
    "a space before": (lambda: bpe((QWEN2,), pre_tokenizer=SPACED), "a space before every text"),
    "lstrip": (lambda: with_flag("lstrip"), "'<think>' is lstrip"),
    "single_word": (lambda: with_flag("single_word"), "'<think>' is single_word"),
    "another pattern": (lambda: bpe((r"\p{L}+|\d{2}",)), r"cuts as this tokenizer.json's \(\\p\{L\}"),
    "marks in words": (lambda: bpe((O200K_SPLIT,)), "other ids to"),
    "no pattern": (lambda: bpe((QWEN2,), pre_tokenizer=BYTE_LEVEL), "other ids to"),
    "bytes missing": (
        lambda: sentencepiece(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, merges=[]),
        "has not all of them",
    ),
    "an order that scores have not": (lambda: sentencepiece(merges=["a a", "aa a"]), "SentencePiece gives other ids"),
    "one name for two": (lambda: ByteTokenizer(["a"]), "another's name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_equal_is_refused_in_a_line(case):
    make, says = REFUSED[case]
    tokenizer = make()
    with pytest.raises(InputError, match=says) as error:
        vocabulary(tokenizer, tokenizer.vocab_size)
    assert "\n" not in str(error.value) and "--to hf" in str(error.value)


def test_rows_and_ends_must_be_the_models():
    tokenizer = ByteTokenizer([EOT])
    with pytest.raises(InputError, match="257 tokens for a model of 256 rows"):
        vocabulary(tokenizer, 256)
    with pytest.raises(InputError, match=r"\[257\] are no ids below 257"):
        vocabulary(tokenizer, 257, (257,))


def test_equal_patterns_have_equal_names():
    """What counts is what a pre-tokenizer does: forms of the same are told as one, others apart."""
    level = BYTE_LEVEL | {"use_regex": True}
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]}
    assert pre_tokenizer(bpe(SPLITS["gpt-2"], pre_tokenizer=level)) == "gpt-2"
    assert pre_tokenizer(bpe((r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s",))) == "gpt-2"
    assert pre_tokenizer(bpe(SPLITS["smollm"], pre_tokenizer=digits)) == "smollm"
    assert pre_tokenizer(bpe((LLAMA3,), model={"ignore_merges": True})) == "llama-bpe"
    assert pre_tokenizer(bpe((LLAMA3,))) == "smaug-bpe"  # the same pattern, but merges are never passed over
    assert pre_tokenizer(bpe((QWEN2,), normalizer={"type": "NFC"}), composed=True) == "qwen2"
    assert pre_tokenizer(bpe((QWEN2,))) == "stablelm2"  # the same, but not known to be of texts in NFC


def test_kinds_of_tokens():
    tokenizer = bpe((QWEN2,), specials=(EOT, "<|im_start|>"), own=("<think>",))
    found = plain(vocabulary(tokenizer, tokenizer.vocab_size + 1))
    assert found["tokenizer.ggml.token_type"][-4:] == [CONTROL, CONTROL, USER_DEFINED, UNUSED]
    assert found["tokenizer.ggml.tokens"][-4:-1] == [EOT, "<|im_start|>", "<think>"]


@pytest.mark.parity
def test_what_cannot_be_helped_is_said_and_is_so(tmp_path):
    """Each exception names the texts it concerns; llama.cpp gives other ids to those, and to no others."""
    lacking = json.loads(bpe((QWEN2,)).to_json())
    named = {b: symbol for symbol, b in byte_of_symbol().items()}
    for b in (0xF1, 0xF2):
        lacking["model"]["vocab"][f"<{b}>"] = lacking["model"]["vocab"].pop(named[b])
    made = {
        "NFC": (bpe((QWEN2,), normalizer={"type": "NFC"}), "e\u0301", "é"),
        "<|fim_prefix|>": (bpe((QWEN2,), own=("<|fim_prefix|>", "<think>")), "a<|fim_prefix|>", "a<think>"),
        "<|start|>": (bpe((QWEN2,), specials=(EOT, "<|start|>")), "a <|start|>", "a <|endoftext|>"),
        "f1 f2": (LibraryTokenizer(json.dumps(lacking)), "\U00040000", "\U00010000"),
    }
    for says, (tokenizer, odd, even) in made.items():
        ((why, concerns),) = exceptions(tokenizer).items()
        assert says in why and concerns(odd) and not concerns(even)
        assert why in notes(tokenizer)
        with served(written(tmp_path / "m.gguf", tokenizer)) as engine:
            assert engine.encode(even) == tokenizer.encode(even).tolist()
            if says != "f1 f2":  # there only some neighbours have a merge
                assert engine.encode(odd) != tokenizer.encode(odd).tolist(), says
    assert exceptions(KINDS["bpe with specials"][0]) == {} == exceptions(KINDS["characters"][0])


def test_further_stops_are_said():
    tokenizer = LibraryTokenizer.train([VERSE], 500, ("<|stop|>", "<|im_end|>", "<reponame>"))
    assert notes(tokenizer, (0,)) == ["llama.cpp ends an answer at <reponame>, <|im_end|> too, by the name"]
    assert notes(tokenizer, (0, 1)) == ["llama.cpp ends an answer at <reponame> too, by the name"]
    assert module.STOPS & {EOT} and notes(KINDS["bytes with specials"][0]) == []
