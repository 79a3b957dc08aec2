"""`kobza doctor tokenizer DIR`: a tokenizer.json examined by what it does to texts, and against the files beside it.

A stranger's tokenizer is run in a process of its own (encoder.py) on TEXTS, a corpus made of what tokenizers differ on; the
checks look at the ids. What is an error here is shown by a text and its ids: a text that does not come back, a token that is not
read as itself, ids that differ from those of another file. Whether the right tokenizer was taken at all only `--against` can
prove; a pre-tokenizer unlike the family's is a warning, and only where some text gets other ids by it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kobza.config import InputError, require
from kobza.doctor.files.coder import SECONDS, command
from kobza.doctor.files.folder import (
    Folder,
    added_tokens,
    as_ids,
    bos_patch,
    find_tokenizer,
    open_tokenizer,
    token_text,
    wants_bos,
)
from kobza.doctor.finding import Check, Finding, Skip
from kobza.formats.headers import inside
from kobza.formats.splits import GPT2, LLAMA3, QWEN2

SAMPLED = 2000  # lines of --corpus

NFC = "й ї é"
NFD = unicodedata.normalize("NFD", NFC)
TEXTS = (  # what tokenizers differ on; the first ones are short and are decoded step by step
    "Hello",
    "Їжак їв ґрунт, є і інші.",
    "дзиґа й ґедзь — п’ять об'єктів",
    "👩‍👩‍👧‍👦 🇺🇦 ✊🏽 ok",
    "你好,世界。日本語のテキスト 한국어",
    "I do n't , they 've . It 's done !",
    "eBay iPhone NaOH camelCase XMLHttpRequest snake_case",
    "2024 3.14159 1,000,000 007 0xDEADBEEF 12 345 6789",
    "I'm you're we've HE'LL it’s don't 'tis '90s",
    " leading and trailing ",
    "  two  spaces   three    four",
    "a\tb\t\tc",
    "line\nline\n\nparagraph\n\n\nthree",
    "dos\r\nlines\r\n\r\nend\r",
    "def f(x):\n    if x:\n        return {'a': [1, 2]}\n\n\n",
    "\tindented\n\t\ttwice\n",
    "x = y**2 + 3*z != 0 && !done || a->b :: c//d /* e */",
    "https://example.org/a?b=c&d=%20e#f user@example.org",
    "(the [the] {the} \"the\" 'the' _the_ *the*",
    "...!!!??? ---- ____ ==== ####",
    "Кобзар сидів під дубом і співав про річку.",
    "ЩАСТЯ Щастя щастя; м'яч, м’яч, мʼяч",
    NFC,
    NFD,
    "naïve café Ångström Zürich œuvre ﬁn",
    "ﷺ مرحبا بالعالم שלום עולם",
    "हिन्दी தமிழ் ไทย ខ្មែរ",
    "½ ² Ⅷ ① ㎏ ™ № €",
    "a\u00a0b\u2009c\u200bd\u3000e",
    "\u2028\u0085\u000b",
    "🎉🎉 text 🎉text",
    "word" * 20,
    "0" * 40,
    " " * 17 + "x",
    "\n" * 5 + "x",
    "",
)
STEPPED = 6
BEFORE, AFTER = "uns", "->"

SIGNS = {  # tokens that only this family's vocabulary has together -> (its name, its split)
    ("<|begin_of_text|>", "<|eot_id|>"): ("Llama 3", LLAMA3),
    ("<|object_ref_start|>", "<|im_start|>"): ("Qwen 2", QWEN2),
}


@dataclass(frozen=True)
class Coded:
    """What a tokenizer makes of texts: ids without and with its special tokens, the text that comes back, the decoded prefixes
    of the first texts, and of tokens alone their ids and the id the library gives them."""

    plain: list[list[int]]
    special: list[list[int]]
    back: list[str]
    prefixes: list[list[str]]
    added: dict[str, int]
    """the added tokens as they are loaded -> id"""
    alone: list[list[int]]
    between: list[list[int]]
    """the same tokens between BEFORE and AFTER"""
    before: list[int]
    """BEFORE by itself"""


@dataclass(frozen=True)
class Tokens:
    """A tokenizer.json, the files beside it, and what it does."""

    file: Path
    folder: Folder
    texts: tuple[str, ...]
    coded: Coded
    against: tuple[Path, Coded] | None = None

    @property
    def bos(self) -> tuple[str, int | None]:
        """The token that begins a text, and its id; ("", None) if none is named."""
        ids = self.folder.ids()
        named = token_text(self.folder.tokenizer_config.get("bos_token"))
        if not named:
            first = as_ids(self.folder.text.get("bos_token_id"))
            named = next((token for token, i in ids.items() if first and i == first[0]), "")
        return named, ids.get(named)


def open_(path: Path, against: Path | None = None, corpus: Path | None = None) -> Tokens:
    """A tokenizer to examine: a folder with a tokenizer.json, or the file. `against`: another, taken to be right. `corpus`: a
    text file whose first lines are encoded as well."""
    file, texts = find_tokenizer(path), TEXTS + (_lines(corpus) if corpus else ())
    right = find_tokenizer(against) if against is not None else None
    with ThreadPoolExecutor(2) as pool:  # the library loads a large vocabulary while this process reads the same file
        coded = pool.submit(encode, file, texts)
        other = pool.submit(encode, right, texts) if right else None
        folder = open_tokenizer(file)
        return Tokens(file, folder, texts, coded.result(), (right, other.result()) if right and other else None)


def _lines(corpus: Path) -> tuple[str, ...]:
    """The first lines of a text file, each of at most 2,000 characters."""
    require(corpus.is_file(), f"{corpus} is no file; give a text file")
    with corpus.open("rb") as file:
        lines = file.read(2_000_000).decode("utf-8", errors="replace").splitlines()
    return tuple(line[:2000] for line in lines if line.strip())[:SAMPLED]


def encode(file: Path, texts: Sequence[str], **more: Any) -> Coded:
    """What the tokenizer.json makes of the texts, found out in a process of its own; InputError if it cannot."""
    request = {"file": str(file), "texts": list(texts), "steps": STEPPED, "between": [BEFORE, AFTER]} | more
    answer = ask(request, "tokenizers")
    require("plain" in answer, f"{file}: the tokenizers library refuses it: {answer.get('error', 'no answer')}")
    return Coded(**answer)


def ask(request: dict[str, Any], library: str) -> dict[str, Any]:
    """The answer of encoder.py, killed after SECONDS."""
    name = request.get("pieces", request.get("file"))
    try:
        done = subprocess.run(
            command(library), input=json.dumps(request).encode() + b"\n", capture_output=True, timeout=SECONDS
        )
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{name}: {len(request['texts'])} short texts took over {SECONDS:g} s; a pattern runs away"
        ) from None
    except (ValueError, AssertionError):
        raise InputError(f"{name}: the tokenizer brought its process down; no released one does that") from None


def shortest(text: str, *tokenizers: dict[str, Any]) -> tuple[str, list[list[int]]]:
    """The shortest part of a text, of 24 characters at most, to which two tokenizers give other ids, and the ids; the whole text
    if there is none. tokenizers: the requests to encode by."""
    parts = sorted({text[i : i + n] for n in range(1, 25) for i in range(len(text) - n + 1)}, key=len)[:4000]
    coded = [encode(texts=[*parts, text], **request).plain for request in tokenizers]
    for part, *ids in zip([*parts, text], *coded, strict=True):
        if ids[0] != ids[1]:
            return part, ids
    return text, [ids[-1] for ids in coded]


def _shown(ids: Sequence[int], most: int = 16) -> str:
    return str(list(ids[:most]))[:-1] + (", ...]" if len(ids) > most else "]")


def _short(text: str, most: int = 60) -> str:
    shown = repr(text)
    return shown if len(shown) <= most else shown[:most] + "...'"


def check_start(subject: Tokens) -> Iterator[Finding]:
    """L2, L3: a text gets the first token once: none of a family that needs it goes without, nobody gets two."""
    token, i = subject.bos
    if i is None:
        raise Skip("no token that begins a text is named")
    ids = subject.coded.special[0]
    count = next((n for n, j in enumerate(ids) if j != i), len(ids))
    proof = f"encode({TEXTS[0]!r}) = {_shown(ids)}; {token!r} is {i}"
    if count > 1:
        yield Finding(
            "L2",
            "error",
            "proven",
            f"{subject.file.name}:post_processor",
            f"{token!r} once",
            f"{count} times",
            "no training text began so: quality drops without an error",
            "put the token in front in one place only",
            proof,
            "https://github.com/ggml-org/llama.cpp/pull/7107",
        )
    said = subject.folder.tokenizer_config.get("add_bos_token")
    if count == 0 and (said is True or wants_bos(subject.folder, token)):
        reason = "add_bos_token is true" if said is True else "the family was trained with it on every text"
        yield Finding(
            "L3",
            "warn",
            "likely",
            f"{subject.file.name}:post_processor",
            f"{token!r} in front: {reason}",
            f"encode({TEXTS[0]!r}) = {_shown(ids)}",
            "texts that go past the chat template begin otherwise than in training; readers that follow the flag differ",
            f"add a TemplateProcessing with {token!r} in front",
            proof,
            "https://github.com/ggml-org/llama.cpp/issues/8650",
            patch=bos_patch(subject.folder.tokenizer, token),
        )


def check_family(subject: Tokens) -> Iterator[Finding]:
    """L7: the pre-tokenizer cuts texts as the family's does."""
    ids = subject.folder.ids()
    family = next((known for signs, known in SIGNS.items() if all(sign in ids for sign in signs)), None)
    if family is None or not _byte_level(subject.folder.tokenizer):
        raise Skip("no family whose pre-tokenizer is known by heart: give --against")
    name, pattern = family
    if _pattern(subject.folder.tokenizer) == pattern:
        return
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, level]}
    right = encode(subject.file, subject.texts, pre_tokenizer=pre_tokenizer)
    differing = [t for t, a, b in zip(subject.texts, subject.coded.plain, right.plain, strict=True) if a != b]
    many = f"{len(differing)} of {len(subject.texts)} texts differ"
    if differing:
        here, there = {"file": subject.file}, {"file": subject.file, "pre_tokenizer": pre_tokenizer}
        text, (got, expected) = shortest(differing[0], here, there)
        yield Finding(
            "L7",
            "warn",
            "likely",
            f"{subject.file.name}:pre_tokenizer",
            f"{name}'s split: {_shown(expected)}",
            f"{_shown(got)} for {_short(text)}",
            "texts are cut otherwise than in training: words, numbers and code become sequences the model never saw",
            f"put {name}'s split in; prove it with --against",
            f"{_short(text)}: {_shown(got)} here, {_shown(expected)} by {name}'s split; {many}",
            "https://github.com/ggml-org/llama.cpp/pull/6920",
            patch={"file": "tokenizer.json", "key": ["pre_tokenizer"], "value": pre_tokenizer},
        )


def _byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether it is a BPE over GPT-2's symbols for the bytes."""
    model = tokenizer.get("model")
    return (
        isinstance(model, dict) and model.get("type") == "BPE" and "ByteLevel" in json.dumps(tokenizer.get("decoder"))
    )


def _pattern(tokenizer: dict[str, Any]) -> str:
    """The regex of the first Split, GPT-2's for a ByteLevel that cuts itself, "" for neither."""
    part = tokenizer.get("pre_tokenizer")
    parts = part.get("pretokenizers", [part]) if isinstance(part, dict) else []
    for step in parts if isinstance(parts, list) else []:
        if isinstance(step, dict) and step.get("type") == "Split" and isinstance(step.get("pattern"), dict):
            return str(step["pattern"].get("Regex", ""))
        if isinstance(step, dict) and step.get("type") == "ByteLevel" and step.get("use_regex", True):
            return GPT2
    return ""


def check_against(subject: Tokens) -> Iterator[Finding]:
    """L7, L2, L3: the same ids as the tokenizer it is held against."""
    if subject.against is None:
        raise Skip("no --against")
    other, right = subject.against
    why = "the model was trained on the ids of one of the two"
    differing = [t for t, a, b in zip(subject.texts, subject.coded.plain, right.plain, strict=True) if a != b]
    many = f"{len(differing)} of {len(subject.texts)} texts differ"
    if differing:
        text, (got, expected) = shortest(differing[0], {"file": subject.file}, {"file": other})
        proof = f"{_short(text)}: {_shown(got)} here, {_shown(expected)} in {other}; {many}"
        fix = f"take the tokenizer.json of {other} if it is the one trained with"
        got_ = f"{_shown(got)} for {_short(text)}"
        yield Finding("L7", "error", "proven", subject.file.name, _shown(expected), got_, why, fix, proof)
        return
    for text, got, expected in zip(subject.texts, subject.coded.special, right.special, strict=True):
        if got != expected:
            proof = f"{_short(text)}: {_shown(got)} here, {_shown(expected)} in {other}"
            code = "L2" if len(got) > len(expected) else "L3"
            fix = f"take the post_processor of {other}"
            place = f"{subject.file.name}:post_processor"
            yield Finding(code, "error", "proven", place, _shown(expected), _shown(got), why, fix, proof)
            return


def check_round_trip(subject: Tokens) -> Iterator[Finding]:
    """L8: a text comes back from its ids, but for what the normalizer declares and one space in front."""
    model, normalizer = subject.folder.tokenizer.get("model"), json.dumps(subject.folder.tokenizer.get("normalizer"))
    kind = model.get("type") if isinstance(model, dict) else None
    lossy = [
        n
        for n in ("Lowercase", "Precompiled", "BertNormalizer", "StripAccents", "Nmt", "Regex")
        if f'"{n}"' in normalizer
    ]
    if kind not in ("BPE", "Unigram") or lossy:
        raise Skip(f"{lossy[0] if lossy else kind}: declares that it does not keep a text as it is")
    forms = [form for form in ("NFKC", "NFKD", "NFC", "NFD") if f'"{form}"' in normalizer][:1]
    unknown = (
        subject.folder.ids().get(token_text(model.get("unk_token")) or "<unk>") if isinstance(model, dict) else None
    )
    bytes_ = isinstance(model, dict) and model.get("byte_fallback") is True
    for text, ids, back in zip(subject.texts, subject.coded.plain, subject.coded.back, strict=True):
        kept = unicodedata.normalize(forms[0], text) if forms else text  # type: ignore[arg-type]
        same = back in (kept, kept.removeprefix(" ")) or kept == back.removeprefix(" ")
        if same or unknown in ids and not bytes_ and not _byte_level(subject.folder.tokenizer):
            continue  # a vocabulary of characters knows some and not others
        hole = f", which holds the unknown token {unknown}" if unknown in ids else ""
        yield Finding(
            "L8",
            "error",
            "proven",
            f"{subject.file.name}:{'model.vocab' if hole or not ids else 'decoder'}",
            _short(kept),
            _short(back),
            "what the model reads or writes is not the text: letters, spaces or line ends are lost on the way",
            "restore the missing byte tokens"
            if hole or not ids
            else "restore the decoder that undoes the pre-tokenizer",
            f"decode(encode({_short(text)})) = {_short(back)}; ids {_shown(ids)}{hole}",
            "https://github.com/huggingface/transformers/issues/25073",
        )
        return


def check_specials(subject: Tokens) -> Iterator[Finding]:
    """L8: an added token is read as that token, alone and between words, and the word before it as if it stood alone."""
    coded = subject.coded
    single = {token["content"] for token in added_tokens(subject.folder.tokenizer) if token.get("single_word") is True}
    for (name, own), alone, between in zip(coded.added.items(), coded.alone, coded.between, strict=False):
        if not name.strip() or name in single:
            continue
        wrong = "" if alone == [own] else f"encode({name!r}) = {_shown(alone)}"
        if not wrong and between[: len(coded.before) + 1] != [*coded.before, own]:
            wrong = f"encode({BEFORE + name + AFTER!r}) = {_shown(between)}, and encode({BEFORE!r}) = {_shown(coded.before)}"
        if wrong:
            yield Finding(
                "L8",
                "error",
                "proven",
                f"{subject.file.name}:added_tokens",
                f"{name!r} read as [{own}]",
                _shown(alone if alone != [own] else between),
                "the mark of a turn or an end becomes plain text: the model neither sees it nor stops at it",
                "set normalized false for the token, so that it is sought in the text as written",
                f"{wrong}; its id is {own}",
                "https://github.com/huggingface/transformers/issues/23818",
            )
            return


def check_pieces(subject: Tokens) -> Iterator[Finding]:
    """L8: the sentencepiece model beside it gives the same ids."""
    path = subject.file.parent / "tokenizer.model"
    if subject.folder.path != subject.file.parent or not path.exists():
        raise Skip("no tokenizer.model beside it")
    path = inside(path.parent, path.name)
    require(path.stat().st_size < 64_000_000, f"{path} is larger than 64 MB; no sentencepiece model")
    if importlib.util.find_spec("sentencepiece") is None:
        raise Skip('sentencepiece is not installed; pip install "kobza[sentencepiece]"')
    answer = ask({"pieces": str(path), "texts": list(subject.texts)}, "sentencepiece")
    if "plain" not in answer:
        raise Skip(f"tokenizer.model is no sentencepiece model: {answer.get('error', '')}"[:200])
    for text, got, expected in zip(subject.texts, subject.coded.plain, answer["plain"], strict=True):
        if got != expected:
            yield Finding(
                "L8",
                "error",
                "proven",
                subject.file.name,
                f"{_shown(expected)}, as tokenizer.model says",
                f"{_shown(got)} for {_short(text)}",
                "one of the two files is not what the model was trained with; which is read depends on the reader",
                "convert tokenizer.json anew from tokenizer.model, or drop the one that is wrong",
                f"{_short(text)}: tokenizer.json {_shown(got)}, tokenizer.model {_shown(expected)}",
                "https://github.com/huggingface/transformers/issues/24569",
            )
            return


def check_ids(subject: Tokens) -> Iterator[Finding]:
    """L9: no id has two tokens, and an added token has the id that every file gives it."""
    seen: dict[int, str] = {}
    why, fix = "a token is read as another, or written as one", "write the ids the model was trained with"
    for token, i in subject.folder.ids().items():
        if i in seen:
            proof = f"{seen[i]!r} and {token!r} both have id {i}"
            yield Finding("L9", "error", "proven", subject.file.name, "an id for each token", proof, why, fix, proof)
            break
        seen[i] = token
    for token in added_tokens(subject.folder.tokenizer):
        own = subject.coded.added.get(token["content"], token["id"])
        if own != token["id"]:
            proof = f"added_tokens gives {token['content']!r} the id {token['id']}; loaded, it has {own}"
            place = f"{subject.file.name}:added_tokens"
            yield Finding("L9", "error", "proven", place, str(token["id"]), str(own), why, fix, proof)
            break
    table = subject.folder.tokenizer_config.get("added_tokens_decoder")
    for i, entry in (table if isinstance(table, dict) else {}).items():
        token = token_text(entry)
        own = subject.folder.ids().get(token)
        if token and i.isdigit() and len(i) < 12 and own is not None and own != int(i):
            proof = f"tokenizer_config.json gives {token!r} the id {i}, tokenizer.json {own}"
            place = f"tokenizer_config.json:added_tokens_decoder.{i}"
            yield Finding("L9", "error", "proven", place, str(own), i, why, fix, proof)
            break
    yield from _check_named(subject)


def _check_named(subject: Tokens) -> Iterator[Finding]:
    """The first and the padding token are the same by name in tokenizer_config.json and by id in config.json."""
    ids = subject.folder.ids()
    names = {i: token for token, i in ids.items()}
    for kind in ("bos", "pad"):
        token = token_text(subject.folder.tokenizer_config.get(f"{kind}_token"))
        said = as_ids(subject.folder.text.get(f"{kind}_token_id"))
        if token and token not in ids:
            proof = f"{kind}_token is {token!r}, which is no token of {subject.file.name}"
        elif token and said and ids[token] not in said and said[0] in names:
            proof = (
                f"{kind}_token {token!r} is {ids[token]}, config.json's {kind}_token_id {said[0]} is {names[said[0]]!r}"
            )
        else:
            continue
        why = "trainer, template and generation take different tokens for the same thing"
        place, fix = f"tokenizer_config.json:{kind}_token", "name the token the model was trained with in both files"
        yield Finding("L9", "warn", "likely", place, "one token in both files", proof, why, fix, proof)


def check_stream(subject: Tokens) -> Iterator[Finding]:
    """I9: decoded token by token, what was shown stays: only bytes of an unfinished character are held back."""
    for text, prefixes, whole in zip(subject.texts, subject.coded.prefixes, subject.coded.back, strict=False):
        for n, shown in enumerate(prefixes):
            stable = shown.rstrip("\ufffd")
            if not whole.startswith(stable):
                proof = f"{n + 1} tokens of {_short(text)} decode to {_short(shown)}, all of them to {_short(whole)}"
                yield Finding(
                    "I9",
                    "warn",
                    "likely",
                    f"{subject.file.name}:decoder",
                    "each decoded prefix begins the whole",
                    f"{_short(shown)} against {_short(whole)}",
                    "a streamed answer shows text that the finished one does not have",
                    "take the clean-up step out of the decoder",
                    proof,
                    "https://github.com/huggingface/transformers/issues/25073",
                )
                return


def facts(subject: Tokens) -> dict[str, list[list[str]]]:
    """How many bytes a token carries in scripts, what normal forms do, how often the first token stands on each path."""
    rows = [["text", "bytes", "tokens", "bytes a token"]]
    for text, ids in list(zip(subject.texts, subject.coded.plain, strict=True))[1:9] + [
        (TEXTS[20], subject.coded.plain[20])
    ]:
        n = len(text.encode())
        rows.append([_short(text, 40), str(n), str(len(ids)), f"{n / max(1, len(ids)):.2f}"])
    broken = sum("\ufffd" in prefix[-1:] for prefix in subject.coded.prefixes[1])
    stream = [["what", "value"], ["tokens of a Ukrainian sentence that end inside a letter", str(broken)]]
    token, i = subject.bos
    if i is not None:
        ids = subject.coded.special[0]
        stream.append(
            [f"{token!r} before an encoded text", str(next((n for n, j in enumerate(ids) if j != i), len(ids)))]
        )
        writes = "bos_token" in subject.folder.template or token in subject.folder.template
        stream.append([f"the chat template writes {token!r} too", "yes" if writes else "no"])
    if subject.coded.alone and subject.folder.tokenizer.get("added_tokens"):
        name, own = next(iter(subject.coded.added.items()))
        read = "yes, if its reader encodes the words as they are" if subject.coded.alone[0] == [own] else "no"
        stream.append([f"{name!r} in a user's words is read as the token", read])
    forms = subject.coded.plain[TEXTS.index(NFD)] == subject.coded.plain[TEXTS.index(NFC)]
    stream.append(["й, ї as one character and as two give the same ids", "yes" if forms else "no"])
    return {"Bytes a token carries": rows, "Streams and starts": stream}


CHECKS = (
    Check("L2 L3", "a text gets its first token, once", check_start),
    Check("L7", "the pre-tokenizer is the family's", check_family),
    Check("L7 L2 L3", "the ids are those of the other tokenizer", check_against),
    Check("L8", "a text comes back from its ids", check_round_trip),
    Check("L8", "an added token in a text is that token", check_specials),
    Check("L8", "tokenizer.model gives the same ids", check_pieces),
    Check("L9", "the files give each token one id", check_ids),
    Check("I9", "a streamed text stays as it was shown", check_stream),
)
