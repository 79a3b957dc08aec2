"""Which of llama.cpp's pre-tokenizers does to a text what a tokenizer.json does: found by trying, not by name or checksum.

Patterns are written in many ways, and the same pattern matters or not depending on the merges behind it. So every candidate is
put in the place of the tokenizer's own, and both encode texts made of what patterns differ on, of the vocabulary's tokens next to
each other, and each token alone. Only a name that gives equal ids throughout is taken; those that also cut equally come first.
"""

from __future__ import annotations

import json
import random
import unicodedata
from typing import Any

from kobza.config import InputError
from kobza.formats.splits import COMPOSED, SPLITS, WHOLE
from kobza.tokenizer import LibraryTokenizer

NAMES = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "stablelm2", "qwen35", "deepseek-v3")
NAMES += ("falcon", "seed-coder", "bloom", "viking", "gpt-4o", "tekken", "default")
LETTERS = (
    "aZsStTdmlLvrebBq  \n\n\r\t\v09'’.,!-_(/[$+<=~^|`\"їЯєІ²½Ⅷ٣५éÉǅʰª日本アの한กк\u0301\u0e47\u0e32\u094d\u200d👩🏽€«—"
    "\u00a0\u2003\u2028\u0085\u3000\u200b\ufeff\u00ad\x00\x1c\ue000"
)
N_RANDOM, N_JOINED, N_CUT = 2000, 3000, 300  # texts; the last say which names to try first
N_LETTERS, LONGEST = 5, 14  # different letters of a text, and all of them


def pre_tokenizer(tokenizer: LibraryTokenizer, composed: bool = False) -> str:
    """The name for tokenizer.ggml.pre; InputError where llama.cpp has no equal, with the text that shows it. `composed`: texts in
    NFC only, as this tokenizer makes it of any and llama.cpp does not."""
    content = json.loads(tokenizer.to_json())
    drawn, *further = (_composed(texts) if composed else texts for texts in probes(tokenizer))
    whole, ours = bool(content["model"].get("ignore_merges")), tokenizer.inner.pre_tokenizer
    equal = {name: ours is not None and _cuts_equally(ours, steps(name), drawn[:N_CUT]) for name in NAMES}
    theirs, apart = copy_of(tokenizer), {}
    theirs.normalizer = None
    unlike = {name: (not equal[name], (name in WHOLE) != whole, (name in COMPOSED) != composed) for name in NAMES}
    for name in sorted(NAMES, key=unlike.__getitem__):
        theirs.pre_tokenizer, theirs.model.ignore_merges = steps(name), name in WHOLE
        trials = (differing(tokenizer.inner, theirs, texts) for texts in (drawn, *further))
        apart[name] = next(filter(None, trials), [])
        if not apart[name]:
            return name
    nearest = min(apart, key=lambda name: (not equal[name], len(apart[name])))
    raise InputError(
        f"llama.cpp has no pre-tokenizer that cuts as this tokenizer.json's ({_shown(content['pre_tokenizer'])}): the nearest, "
        f"{nearest}, gives other ids to {min(apart[nearest], key=len)!r}; export --to hf, or train with tokenizer=bpe"
    )


def probes(tokenizer: LibraryTokenizer) -> tuple[list[str], list[str], list[str]]:
    """Texts on which patterns differ; such of the vocabulary's tokens, special ones spelled out; each token alone."""
    pick = random.Random(0)
    few = [pick.sample(LETTERS, N_LETTERS) for _ in range(N_RANDOM)]  # so that runs of a kind are common
    drawn = ["".join(pick.choices(letters, k=pick.randint(1, LONGEST))) for letters in few]
    names = {i: name for name, i in tokenizer.specials.items()}
    spelled = [names.get(i) or piece.decode("utf-8", "ignore") for i, piece in enumerate(tokenizer.pieces)]
    words = [word for word in spelled if word] or ["a"]
    joined = ["".join(pick.choices(words, k=pick.randint(2, 4))) for _ in range(N_JOINED)]
    return drawn, joined + [f"a{name} {name}b" for name in names.values()], words


def copy_of(tokenizer: LibraryTokenizer, text: str = "") -> Any:
    """The library's tokenizer (of another tokenizer.json's `text`), to be changed; it reads no special token out of a text."""
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_str(text or tokenizer.to_json())
    inner.encode_special_tokens = True
    return inner


def differing(ours: Any, theirs: Any, texts: list[str]) -> list[str]:
    """The texts that get other ids."""
    pairs = zip(*(inner.encode_batch_fast(texts, add_special_tokens=False) for inner in (ours, theirs)), strict=True)
    return [text for text, (a, b) in zip(texts, pairs, strict=True) if a.ids != b.ids]


def steps(name: str) -> Any:
    """What llama.cpp does under a name, as a pre-tokenizer of the library."""
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _composed(texts: list[str]) -> list[str]:
    return [unicodedata.normalize("NFC", text) for text in texts]


def _cuts_equally(ours: Any, theirs: Any, texts: list[str]) -> bool:
    def pieces(cutter: Any, text: str) -> list[str]:
        return [piece for piece, _ in cutter.pre_tokenize_str(text)]

    return all(pieces(ours, text) == pieces(theirs, text) for text in texts)


def _shown(part: Any) -> str:
    """A pre_tokenizer of tokenizer.json in a line."""
    if part is None:
        return "none"
    parts = part["pretokenizers"] if part["type"] == "Sequence" else [part]
    return ", ".join(step.get("pattern", {}).get("Regex", "")[:60] or step["type"] for step in parts)
