"""The texts that a certificate is measured on: made to break tokenizers and templates, the same for the same seed.

`corpus_for(tokenizer, seed)` gives texts for ids, conversations for prompts, prose and random ids for probabilities. A tokenizer
of characters is only given what it can spell; what it cannot is kept apart in `unspellable`. No file and no network is read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kobza.tokenizer import CharTokenizer, Tokenizer

Message = dict[str, str]

SPACES = [" ", "  ", "   ", "       ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", " \n", "\n ", "\x0b", "\x0c"]
SPACES += "\u00a0 \u2002 \u2003 \u2009 \u202f \u2028 \u2029 \u3000 \u200b \u2060 \u1680 \u0085".split(" ")
WORDS = (
    "the Hello hello HELLO привіт Україна їжак ґанок п'ять об’єкт Ґрунт день ЩО don't I'LL we're it’s a A "
    "naïve Straße İstanbul façade ﬁne Ångström αβγ Ω ℌ ½ é i̇ ạ̈ ́ Z͑ͫ̓a̴l͢g 中文字符 日本語テスト 한국어 ไทย हिन्दी "
    "தமிழ் עברית العربية שָׁלוֹם ქართული Հայ ᚠᚢᚦ \ufeff \u202eabc\u202c 😀 👍🏽 👩\u200d👩\u200d👧\u200d👦 🇺🇦 "
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ❤️ 1️⃣ ²³ ٣٤ Ⅷ ५ \x00 \x01 \x7f \ue000 "
    "\U0010fffd � ▁ ▁a Ġ Ċ 0 1 12 123 1234 12345 1000000 3.14159 1,234.56 -7 1e-5 0x1F <0x41> <s> </s> "
    "<unk> [INST] </p> <b> &amp; http://example.com/a?b=c&d=%20#e user@example.org /usr/bin/env "
    "C:\\dir\\x.txt --flag=v a_b__c snake_case camelCaseXMLHttp ... … ?! !!! — – -- «так» “q” „ні“ () {} "
    "[[ $ €5 ₴ ^ ~ ` | \\ ' \" '' \"\" # @ % * ** _ = == != -> => :: ;; <> <= ... +1 /* */ // \\n ${x} "
    "{{x}} {%if%}"
).split(" ")

FIXED = (
    "",
    " ",
    "a",
    "\n",
    "Hello world",
    " Hello",
    "  Hello  ",
    "Hello\n",
    "привіт",
    " привіт, світе!\n",
    "Їжак з'їв ґедзя — ба, й м'яч.",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # комент\n\n\nclass A:\n\tpass\n",
    'int main(void) {\n\tprintf("%d\\n", 1<<3);\n\treturn 0;\n}\n',
    'fn main() { let v: Vec<&\'static str> = vec!["a"]; }\n',
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x''y';\n",
    '{"key": [1, 2.5, -3e10, null, true], "ключ": "\\u0456"}\n',
    "<div class='x'>text &lt; <br/></div>\n",
    "1 12 123 1234 12345 123456 1234567 12345678 123456789",
    "2024-02-29T23:59:59.999Z +380 (44) 123-45-67",
    "a  b   c    d     e\n  f\n\n   g\t\th\r\n\r\n i ",
    "can't won't I'm you're they've he'll she'd CAN'T WON'T I'M",
    "ааа\u0301 é e\u0301 ñ n\u0303 Å A\u030a ﬀ ﬃ Ｆｕｌｌ ｗｉｄｔｈ",
    "😀😃😄 👩‍👩‍👧‍👦👍🏽🇺🇦🏴‍☠️ 1️⃣2️⃣",
    "这是一个测试。日本語のテスト。한국어 테스트.",
    "שלום עולם مرحبا بالعالم \u202etxet\u202c",
    "x" * 300,
    " " * 70,
    "\n" * 40,
    "ab" * 100,
    "." * 90,
    "привіт" * 30,
)

TESTAMENT = """\
Як умру, то поховайте
Мене на могилі,
Серед степу широкого,
На Вкраїні милій,
Щоб лани широкополі,
І Дніпро, і кручі
Було видно, було чути,
Як реве ревучий.
Як понесе з України
У синєє море
Кров ворожу... отойді я
І лани, і гори —
Все покину і полину
До самого бога
Молитися... а до того
Я не знаю бога.
Поховайте та вставайте,
Кайдани порвіте
І вражою злою кров'ю
Волю окропіте.
І мене в сем'ї великій,
В сем'ї вольній, новій,
Не забудьте пом'янути
Незлим тихим словом.
"""  # T. Shevchenko, 1845

SONNET = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.
"""  # W. Shakespeare, sonnet 18, 1609

CODE = '''\
from pathlib import Path


def longest_lines(folder: Path, n: int = 3) -> list[tuple[int, str]]:
    """The n longest lines of the text files below a folder, longest first."""
    found = []
    for path in sorted(folder.rglob("*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            found.append((len(line), line))
    return sorted(found, reverse=True)[:n]


if __name__ == "__main__":
    for length, line in longest_lines(Path(".")):
        print(f"{length:6,d}  {line[:60]}")
'''

STORY = """\
The train left Kyiv at 6:45 in the evening and reached the border a little after two. She had 3 apples, 12
letters and a map of the coast; the rest was in the trunk. “How far is it?” she asked. “As far as yesterday,”
said the man with the lamp, and laughed.
"""

PROSE = (TESTAMENT, SONNET, CODE, STORY)

SAID = (
    "Привіт!",
    "Hello, who are you?",
    "  spaces at both ends  ",
    "\nline\n\nbreaks\n",
    "2 + 2 = ?",
    "тиша…",
    "👩‍👩‍👧 ok",
    "a",
)
SAID += (
    "{{ x }} {% y %} {# z #}",
    "<b>&amp;</b> \"q\" 'r'",
    "```py\nx = 1\n```",
    "A long answer. " * 12,
    "back\\slash \\n",
    "ні\t",
)


@dataclass(frozen=True)
class Corpus:
    """What an engine is asked."""

    seed: int
    texts: tuple[str, ...]
    """for ids"""
    unspellable: tuple[str, ...]
    """texts with characters that the tokenizer does not have; empty where it has all"""
    conversations: tuple[tuple[Message, ...], ...]
    prose: tuple[str, ...]
    """for probabilities"""
    random_ids: tuple[tuple[int, ...], ...]
    held_out: tuple[str, ...]
    """for perplexity"""
    held_out_is: str
    """where it comes from, in words"""
    note: str = ""
    """what was left out of the texts"""


def corpus_for(
    tokenizer: Tokenizer, seed: int = 0, n_texts: int = 200, held_out: Sequence[str] = (), specials: Sequence[str] = ()
) -> Corpus:
    """The corpus for a tokenizer. held_out: texts that the model has not learned from, ours else. specials: names that a user
    may type beside those of the tokenizer's own special tokens, such as a template's."""
    draw = random.Random(seed)
    names = [*tokenizer.specials, *specials]
    vocabulary = [piece for piece in map(_text, tokenizer.pieces) if piece]
    made = [
        *FIXED,
        *PROSE,
        *(f"{before}{name}{behind}" for name in names[:60] for before, behind in (("", ""), ("a ", " b"))),
    ]
    made += [_mixed(draw, names) for _ in range(n_texts // 2)]
    made += ["".join(draw.choices(vocabulary, k=draw.randint(1, 12))) for _ in range(n_texts // 4) if vocabulary]
    made += ["".join(_any_character(draw) for _ in range(draw.randint(1, 12))) for _ in range(n_texts // 4)]
    spelled = [_spelled(tokenizer, text) for text in made]
    readable = [_spelled(tokenizer, text) for text in PROSE]
    kept = [text for text, whole in zip(readable, PROSE, strict=True) if len(text) > len(whole) // 2]
    prose = tuple(kept or [_babble(draw, vocabulary) for _ in range(3)])
    given = tuple(text for text in (_spelled(tokenizer, text) for text in held_out) if text.strip())
    n_ids = [tuple(draw.randrange(tokenizer.vocab_size) for _ in range(48)) for _ in range(4)]
    return Corpus(
        seed=seed,
        texts=tuple(dict.fromkeys(spelled)),
        unspellable=tuple(text for text, rest in zip(made, spelled, strict=True) if text != rest)[:8],
        conversations=tuple(_conversation(draw, tokenizer, names) for _ in range(24)),
        prose=prose,
        random_ids=tuple(n_ids),
        held_out=given or tuple(text[len(text) // 2 :] for text in prose),
        held_out_is="given" if given else "kobza's own fixed prose",
    )


def without(corpus: Corpus, known: Mapping[str, Callable[[str], bool]]) -> Corpus:
    """The corpus less what an engine is known to read otherwise, {why: whether it concerns a text}; the note says how much."""
    concerned = [why for why, reads in known.items() if any(map(reads, corpus.texts))]

    def kept(text: str) -> bool:
        return not any(reads(text) for reads in known.values())

    texts = tuple(filter(kept, corpus.texts))
    chats = tuple(chat for chat in corpus.conversations if all(kept(m["content"]) for m in chat))
    lost = len(corpus.texts) - len(texts)
    note = f"{lost} texts were left out: {'; '.join(concerned)}" if lost else ""
    return replace(corpus, texts=texts, conversations=chats, note=note)


def _text(piece: bytes) -> str:
    """A token's text; "" where it is a part of a character."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _spelled(tokenizer: Tokenizer, text: str) -> str:
    """The text without the characters that a tokenizer of characters does not have."""
    if not isinstance(tokenizer, CharTokenizer) or tokenizer.unknown == "bytes":
        return text
    known = set(tokenizer.characters)
    return "".join(c for c in text if c in known)


def _mixed(draw: random.Random, names: Sequence[str]) -> str:
    """Words of all kinds and white space of all kinds; now and then a special token's name as a user types it."""
    parts: list[str] = []
    for _ in range(draw.randint(1, 14)):
        parts.append(draw.choice(names) if names and draw.random() < 0.08 else draw.choice(WORDS))
        parts.append(draw.choices((" ", "", draw.choice(SPACES)), (5, 2, 3))[0])
    return "".join(parts[draw.random() < 0.3 :])


def _any_character(draw: random.Random) -> str:
    """Any code point that is a character: no half of a surrogate pair."""
    top = draw.choice((0x80, 0x100, 0x600, 0x3000, 0x10000, 0x20000, 0x110000))
    point = draw.randrange(top)
    return chr(point) if not 0xD800 <= point < 0xE000 else "\ufffd"


def _babble(draw: random.Random, vocabulary: Sequence[str]) -> str:
    """Where a tokenizer cannot spell prose: its own tokens."""
    return "".join(draw.choices(vocabulary, k=200)) if vocabulary else ""


def _conversation(draw: random.Random, tokenizer: Tokenizer, names: Sequence[str]) -> tuple[Message, ...]:
    """A system now and then, turns in order, the last one a user's."""

    def said() -> str:
        text = draw.choice(SAID)
        if draw.random() < 0.3:
            text += " " + _mixed(draw, names)
        return _spelled(tokenizer, text)

    messages = [{"role": "system", "content": draw.choice(("", said(), said()))}] if draw.random() < 0.5 else []
    for _ in range(draw.randint(0, 3)):
        messages += [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]
    return (*messages, {"role": "user", "content": said()})
