"""Tokens of a GGUF's vocabulary: their kinds, and the form in which one token is one character, both ways.

llama.cpp has no tokenizer of characters. Its byte-level BPE is one under these rules, exactly and for any text:
- ASCII is its byte's symbol, which no merge joins;
- a character of two bytes is their symbols, which the one merge joins that makes it;
- a longer one would need merges whose halves other characters share, and a half that is no token is lost: it is USER_DEFINED,
  which llama.cpp looks for before anything else;
- a byte (CharTokenizer's unknown=bytes) is its symbol. Where a character has that already, BYTE's name <0x41>, which no text
  spells, as nothing joins its letters.
What is no token is left out by llama.cpp, as unknown=skip does.
"""

from __future__ import annotations

from collections.abc import Sequence

from kobza.tokenizer import byte_of_symbol

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SYMBOLS = [symbol for symbol, _ in sorted(byte_of_symbol().items(), key=lambda item: item[1])]
BYTE_NAMES = [f"<0x{b:02X}>" for b in range(256)]


def characters_to_tokens(characters: str, spelled: bool) -> tuple[list[str], list[int], list[str]]:
    """(tokens, kinds, merges) of one token a character, and where `spelled` one a byte. "аa" -> ["Ð°", "a"], .., ["Ð °"]"""
    tokens, kinds, merges = [], [], []
    for character in characters:
        raw = character.encode("utf-8")
        symbols = [SYMBOLS[b] for b in raw]
        tokens.append("".join(symbols) if len(raw) < 3 else character)
        kinds.append(NORMAL if len(raw) < 3 else USER_DEFINED)
        merges += [" ".join(symbols)] if len(raw) == 2 else []
    taken = [spelled and chr(b) in characters and b < 128 for b in range(256)]
    if spelled:
        tokens += [BYTE_NAMES[b] if taken[b] else SYMBOLS[b] for b in range(256)]
        kinds += [BYTE if taken[b] else NORMAL for b in range(256)]
    return tokens, kinds, merges


def characters_of_tokens(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> tuple[str, bool] | None:
    """(characters, spelled) of which characters_to_tokens makes these; None for another vocabulary."""
    bytes_of = {ord(symbol): b for b, symbol in enumerate(SYMBOLS)}
    last = [
        symbol if kind == NORMAL else name
        for symbol, name, kind in zip(SYMBOLS, BYTE_NAMES, kinds[-256:], strict=False)
    ]
    spelled = len(tokens) >= 256 and list(tokens[-256:]) == last
    shown = list(zip(tokens, kinds, strict=True))[: len(tokens) - 256 * spelled]
    try:
        characters = [
            token if kind == USER_DEFINED else token.translate(bytes_of).encode("latin-1").decode()
            for token, kind in shown
            if len(token) <= 2
        ]
    except UnicodeError:
        return None
    whole = "".join(characters)
    same = len(characters) == len(shown) and characters_to_tokens(whole, spelled) == (
        list(tokens),
        list(kinds),
        list(merges),
    )
    return (whole, spelled) if same else None


def escaped(character: str) -> str:
    """An ASCII character as llama.cpp's vocabularies of bytes (`rwkv`) write it."""
    return character if character.isprintable() and character != "\\" else f"\\x{ord(character):02x}"


UNESCAPED = {escaped(chr(b)): chr(b) for b in range(128)}


def unescaped(token: str) -> str:
    """The way back; "" for what `escaped` does not write."""
    return UNESCAPED.get(token, "")
