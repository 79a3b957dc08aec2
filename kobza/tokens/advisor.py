"""Does a vocabulary suit a text and a model, and which would suit it better?

`measure_fit` counts: the share of the parameters in embeddings, tokens a row, rows ever seen, pairs of tokens. `warnings` says
in a line or two what is plainly wrong with that, and is silent otherwise.

`candidates` and `Candidate.bits_per_byte` recommend a tokenizer. The rule: cut the text with each candidate, count trigrams over
as many tokens as the budget reads, and take the tokenizer under which these counts spell the held-out tenth in the fewest bits a
byte. Why: losses in nats a token do not compare (a longer token is harder), bits a byte do; a small model on a short budget
learns little beyond which few tokens follow which, and that is what smoothed trigrams (interpolated Kneser-Ney) measure, in a
second and with no training. Both sides of the trade are in the counts: longer tokens bring more text into a context and into a
budget of so many tokens, and a row or a pair that occurs too seldom is predicted badly.

Bits a byte, trained (preset tiny, 300 steps, 614,400 tokens, one seed) and by trigrams:

                    byte   char    320    384    512    768  1,024  2,048  4,096  8,192
    Shakespeare     2.607  2.597  2.486  2.427  2.405  2.378  2.367  2.244  2.197  2.113
      trigrams      3.073  3.072  2.628  2.476  2.415  2.391  2.378  2.291  2.260  2.244
    Kobzar          1.866  1.705  1.692  1.644  1.619  1.614  1.595  1.560  1.531
      trigrams      2.142  1.844  1.701  1.600  1.501  1.435  1.413  1.374  1.362  1.348

Again with byte pairs learned from the training part alone, two seeds, judged on the text's last 40,000 bytes:

                    char  1,024  2,048  4,096  8,192
    Shakespeare     2.566  2.326  2.292  2.282  2.263
    Kobzar          1.683  1.551  1.520  1.501  1.460

The order is that of the trigrams in all, and the pick the best of each sweep; 17 tokens a row (8,192 rows on Kobzar) is as far as
they went. It holds for budgets of a few times the text: a model that reads it far oftener outgrows
trigrams, characters gain, and large vocabularies overfit. At equal time the budget shrinks by the FLOPs of a token, which tells
only where the text is not read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kobza.config import DataConfig, ModelConfig, require
from kobza.run import Run
from kobza.tokenizer import Tokenizer, train_tokenizer
from kobza.train import bits_per_byte

LOOK_AT_TOKENS = 2_000_000  # pairs are counted over the first so many
LOOK_AT_CHARACTERS = 2_000_000  # of a text, for a recommendation: some twenty seconds
BPE_SIZES = (320, 384, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768)  # candidates, beside bytes and characters
MIN_ROW_TOKENS = 17  # a row; the fewest that the sweeps above tried, so a larger vocabulary is not known to be good
FEW_ROW_TOKENS = 10  # below this, warn
FEW_ROWS_SEEN = 0.5
MANY_UNSEEN = 1000  # rows; BPE has 256 bytes of which a text in one script uses some
MUCH_EMBEDDING = 0.9  # at 0.8 (8,192 rows above) a larger vocabulary still gained
ROW_BYTES = 192  # of text for each row, as a rule of thumb: 64 tokens of 3 bytes


@dataclass(frozen=True)
class Fit:
    """How a vocabulary meets a text and a model."""

    vocab_size: int
    tokens: int  # to train on
    rows_seen: float  # share of the vocabulary that occurs in them
    bigrams: int  # distinct pairs in the first LOOK_AT_TOKENS
    bigram_count: float  # how often each occurs, on average
    embedding_share: float  # of the parameters, in embedding and untied head
    text_bytes: int

    @property
    def row_tokens(self) -> float:
        """Training tokens a row of the vocabulary."""
        return self.tokens / self.vocab_size


def measure_fit(ids: np.ndarray, n_tokens: int, tokenizer: Tokenizer, embedding_share: float) -> Fit:
    """Count over training ids (n,), the beginning of n_tokens in all."""
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    pairs = np.unique(pair_keys(ids[:LOOK_AT_TOKENS], tokenizer.vocab_size))
    mean_bytes = float((counts * tokenizer.piece_bytes).sum() / max(1, len(ids)))
    n_pairs = max(0, min(len(ids), LOOK_AT_TOKENS) - 1)
    return Fit(
        vocab_size=tokenizer.vocab_size,
        tokens=n_tokens,
        rows_seen=float((counts > 0).mean()),
        bigrams=len(pairs),
        bigram_count=n_pairs / max(1, len(pairs)),
        embedding_share=embedding_share,
        text_bytes=round(mean_bytes * n_tokens),
    )


def embedding_share(model: ModelConfig, n_params: int) -> float:
    """Share of a model's parameters in the rows of its vocabulary, embedding and head."""
    return model.n_rows * model.n_embd * (1 if model.tied else 2) / n_params


def warnings(fit: Fit) -> list[str]:
    """What is wrong with a vocabulary, a line each; mostly nothing."""
    found = []
    remedy = f"try --tokenizer bpe --vocab-size {thumb(fit.text_bytes)}, or see kobza tokens TEXT --fit"
    unseen = fit.vocab_size * (1 - fit.rows_seen)
    if fit.vocab_size > 256 and (
        fit.row_tokens < FEW_ROW_TOKENS or fit.rows_seen < FEW_ROWS_SEEN and unseen > MANY_UNSEEN
    ):
        found.append(
            f"a vocabulary of {fit.vocab_size:,} rows meets {fit.tokens:,} training tokens, {fit.row_tokens:.1f} a row, and "
            f"{fit.rows_seen:.0%} of the rows ever occur: the others stay as they began; {remedy}"
        )
    if fit.vocab_size > 256 and fit.embedding_share > MUCH_EMBEDDING:
        found.append(
            f"{fit.embedding_share:.0%} of the parameters are rows of the vocabulary and few are left for the blocks; "
            + (
                "a wider or deeper model, or a smaller vocabulary"
                if found
                else f"widen or deepen the model, or {remedy}"
            )
        )
    return found


def run_warnings(run: Run, n_params: int) -> list[str]:
    """The warnings for an opened run and its model."""
    ids, share = run.corpus.train.array(LOOK_AT_TOKENS), embedding_share(run.config.model, n_params)
    return warnings(measure_fit(ids, len(run.corpus.train), run.tokenizer, share))


def thumb(text_bytes: int) -> int:
    """A BPE vocabulary for so many bytes of text, without looking at it: a power of two with ROW_BYTES for each row."""
    return 2 ** min(16, max(9, int(math.log2(max(1, text_bytes) / ROW_BYTES))))


# ---- the recommendation --------------------------------------------------------------------------------------------


class Candidate:
    """A tokenizer and a text in its tokens: ids (n,) int64, the first n_train to count in, the rest to judge by.

    `option` is what to type after `kobza train`.
    """

    def __init__(self, option: str, tokenizer: Tokenizer, ids: np.ndarray, n_train: int):
        self.option, self.tokenizer, self.ids, self.n_train = option, tokenizer, ids, n_train
        self._known: dict[int, float] = {}

    def bits_per_byte(self, budget: float) -> float:
        """What trigrams counted over as many tokens as the budget reads make of the held-out ones."""
        n = max(4, int(min(self.n_train, budget)))
        if n not in self._known:
            val = self.ids[self.n_train :]
            mean_bytes = float(self.tokenizer.piece_bytes[val].mean())
            loss = trigram_loss(self.ids[:n], val, self.tokenizer.vocab_size)
            self._known[n] = bits_per_byte(loss, mean_bytes)
        return self._known[n]


def candidate(option: str, tokenizer: Tokenizer, text: str, val_fraction: float) -> Candidate:
    """A tokenizer over the beginning of a text."""
    ids = tokenizer.encode(text[:LOOK_AT_CHARACTERS]).astype(np.int64)
    n_train = len(ids) - max(3, int(len(ids) * val_fraction))
    require(
        n_train > 3, f"the text is too short to judge by: {len(ids)} tokens of {option}; give some thousand characters"
    )
    return Candidate(option, tokenizer, ids, n_train)


def candidates(text: str, val_fraction: float) -> list[Candidate]:
    """Bytes, characters, and BPE of growing size while a row has MIN_ROW_TOKENS training tokens."""
    part, found = text[:LOOK_AT_CHARACTERS], []
    for kind in ("byte", "char"):
        found.append(
            candidate(
                f"--tokenizer {kind}", train_tokenizer([part], DataConfig(tokenizer=kind), []), part, val_fraction
            )
        )
    for size in BPE_SIZES:
        tokenizer = train_tokenizer([part], DataConfig(tokenizer="bpe", vocab_size=size), [])
        one = candidate(f"--tokenizer bpe --vocab-size {size}", tokenizer, part, val_fraction)
        scarce = one.n_train * len(text) / len(part) < MIN_ROW_TOKENS * size
        if scarce or tokenizer.vocab_size < size:  # in the latter case no pair is left to join
            break
        found.append(one)
    return found


def trigram_loss(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Mean nats a token of val (m,) under interpolated Kneser-Ney trigrams counted in train (n,), both int64.

    p3(c | a b) = max(n(abc) - d, 0) / n(ab.) + d t(ab) / n(ab.) p2(c | b), t: the distinct continuations; p2 likewise, over
    in how many contexts c occurs. d = n1 / (n1 + 2 n2) from the counts of counts (Ney, Essen & Kneser 1994).
    """
    a, b, c = val[:-2], val[1:-1], val[2:]
    pairs, n_pairs = np.unique(pair_keys(train, vocab_size), return_counts=True)
    contexts = np.bincount(pairs % vocab_size, minlength=vocab_size).astype(float)  # in how many a token occurs
    p1 = (contexts + 0.5) / (contexts.sum() + 0.5 * vocab_size)  # half a count for what was never seen
    first, second = pairs // vocab_size, pairs % vocab_size
    p2 = _interpolated(first, second, n_pairs, vocab_size, b, c, p1[c], vocab_size)
    which = np.searchsorted(pairs, pair_keys(train[:-1], vocab_size))  # (n - 2,): the pair that begins each trigram
    triples, n_triples = np.unique(which * vocab_size + train[2:], return_counts=True)
    known = np.minimum(np.searchsorted(pairs, a * vocab_size + b), len(pairs) - 1)
    known = np.where(pairs[known] == a * vocab_size + b, known, len(pairs))  # len(pairs): never seen
    first, second = triples // vocab_size, triples % vocab_size
    p3 = _interpolated(first, second, n_triples, len(pairs) + 1, known, c, p2, vocab_size)
    return float(-np.log(p3).mean())


def _interpolated(
    first: np.ndarray, second: np.ndarray, counts: np.ndarray, n_first: int,
    context: np.ndarray, token: np.ndarray, lower: np.ndarray, vocab_size: int,
) -> np.ndarray:  # fmt: skip
    """p(token | context) (m,) from distinct (first, second) in order with their counts, and `lower` (m,) where they end."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    d = once / (once + 2 * twice) if once else 0.0
    total = np.bincount(first, weights=counts, minlength=n_first)
    distinct = np.bincount(first, minlength=n_first)
    keys, wanted = first * vocab_size + second, context * vocab_size + token
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    n = np.where(keys[place] == wanted, counts[place], 0)
    seen = np.maximum(total[context], 1)
    rest = np.where(total[context] > 0, d * distinct[context] / seen, 1.0)
    rest = np.maximum(rest, 1e-6)  # a text in which nothing occurs once leaves nothing for what is new
    return np.maximum(n - d, 0) / seen + rest * lower


def pair_keys(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """(n - 1,) a number for each pair of neighbours."""
    ids = ids.astype(np.int64)
    return ids[:-1] * vocab_size + ids[1:]
