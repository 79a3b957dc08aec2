"""Runners that the engine's tests stand on: plain, slow and right.

They keep in their blocks what was given for each place, and compute logits from what they find there. So a wrong block, a length
not set back, a prefix of another adapter or a lost position shows as another text. A logits row depends on the context alone,
to the bit.
"""

import torch

from kobza.serve.runner import Piece

NO_ADAPTERS: dict[str, str] = {}


class Paged:
    """What both have in common. `logits_of(context, adapter)`: context is a list of (id, place, adapter's number)."""

    exact, device_name = True, "a test"

    def __init__(self, vocab_size, n_blocks=64, block_size=4, max_seq_len=64, adapters=NO_ADAPTERS, digest="a"):
        self.vocab_size, self.n_blocks, self.block_size = vocab_size, n_blocks, block_size
        self.max_seq_len, self.adapters, self.digest = max_seq_len, dict(adapters), digest
        self.memory = [[None] * block_size for _ in range(n_blocks)]
        self.n_forwards, self.widest = 0, 0

    def number(self, adapter):
        return 0 if adapter is None else 1 + list(self.adapters).index(adapter)

    def slot(self, piece, place):
        return self.memory[piece.blocks[place // self.block_size]], place % self.block_size

    def place(self, piece, j):
        """Which place the runner takes the j-th new id to stand at; a sabotaged one is wrong here."""
        return piece.start + j

    def forward(self, pieces: list[Piece]):
        self.n_forwards += 1
        self.widest = max(self.widest, len(pieces))
        out = []
        for piece in pieces:
            n, number = len(piece.ids), self.number(piece.adapter)
            assert n >= 1 and 0 <= piece.wanted <= n and piece.start >= 0
            assert piece.start + n <= min(self.max_seq_len, len(piece.blocks) * self.block_size)
            for j, i in enumerate(piece.ids):
                block, slot = self.slot(piece, piece.start + j)
                block[slot] = (i, self.place(piece, j), number)
            context = [block[slot] for block, slot in (self.slot(piece, p) for p in range(piece.start + n))]
            out += [
                self.logits_of(context[:end], number)
                for end in range(len(context) - piece.wanted + 1, len(context) + 1)
            ]
        return torch.stack(out) if out else torch.empty(0, self.vocab_size)


class Markov(Paged):
    """The next id hangs on the last two, by a table, and a little on all of the context. Fast, of known distribution."""

    def __init__(self, vocab_size=11, seed=0, history=0.3, **sizes):
        super().__init__(vocab_size, **sizes)
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(vocab_size, vocab_size, vocab_size, generator=generator)
        self.noise = history * torch.randn(509, vocab_size, generator=generator)

    def logits_of(self, context, number):
        last, before = context[-1][0], context[-2][0] if len(context) > 1 else 0
        return self.table[before, last] + self.noise[hash((number, *context)) % 509]


class Recompute(Paged):
    """A GPT that reads its whole context for every token; `models` by the number of the adapter."""

    def __init__(self, *models, **sizes):
        config = models[0].config
        super().__init__(config.vocab_size, max_seq_len=config.max_seq_len, **sizes)
        self.models = models

    def logits_of(self, context, number):
        assert all(place == j and other == number for j, (_, place, other) in enumerate(context))
        ids = torch.tensor([[i for i, _, _ in context]])
        return self.models[number](ids)[0, -1].float()
