"""Merges out of a ranked vocabulary: what tiktoken's and SentencePiece's BPE do, in the form the `tokenizers` library takes."""

from collections.abc import Iterable


def merges(ranked: Iterable[str], known: set[str]) -> list[str]:
    """Merges "a b", first to last, that join as a ranked vocabulary does.

    merges(["ab", "abc"], {"a", "b", "c", "ab"}) -> ["a b", "ab c"]
    Such a vocabulary joins whatever two neighbours spell its lowest token, the leftmost first. So each token gives all of its
    splits into two known parts. Two splits of one token meet in a text as x|y|z with xy = yz; there the token begins with y, and
    that split comes first, being the left one.
    """
    found = []
    for token in ranked:
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
        if len(splits) > 1:
            splits.sort(key=lambda parts: not token.startswith(parts[1]))  # noqa: B023 (used at once)
        found += [f"{left} {right}" for left, right in splits]
    return found
