"""Blocks of the cache: who holds which, and which hold a prefix that another prompt may begin with.

A block is held by sequences (counted), or cached (held by none, but known by its prefix and taken back on a hit), or free. A
block's key is a chain of hashes over the weights, the adapter and all ids up to its end, so equal keys mean equal content, and
whoever finds a key finds those before it. Only full blocks have keys, and a block with a key is never written again. Knows
neither model nor text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kobza.config import require

FREE = b"\1"


def root(digest: str, adapter: str | None) -> bytes:
    """What a chain begins with: the weights and their number format, and the adapter's."""
    return hashlib.sha256(f"{digest}\0{adapter or ''}".encode()).digest()


def link(before: bytes, ids: Sequence[int]) -> bytes:
    """The key of a full block: the key before it and the block's ids."""
    return hashlib.sha256(before + array("q", ids).tobytes()).digest()


class Pool:
    """n_blocks blocks. `take` and `find` give references, `give` returns them, `publish` makes a full block known."""

    def __init__(self, n_blocks: int, block_size: int):
        require(n_blocks > 0, f"the cache has {n_blocks} blocks; give it more memory")
        self.n_blocks, self.block_size = n_blocks, block_size
        self._free = bytearray(FREE * n_blocks)  # one byte a block: a run of free ones is found by bytearray.find
        self._held = [0] * n_blocks  # references
        self._keys: list[bytes | None] = [None] * n_blocks
        self._known: dict[bytes, int] = {}  # key -> block, held or cached
        self._cached: OrderedDict[int, None] = OrderedDict()  # blocks with a key that none holds, the oldest first
        self._cursor = 0

    @property
    def n_cached(self) -> int:
        """Blocks that hold a prefix and no reference."""
        return len(self._cached)

    @property
    def n_free(self) -> int:
        """Blocks that hold nothing."""
        return self._free.count(FREE)

    @property
    def n_available(self) -> int:
        """Blocks that `take` could give."""
        return self.n_free + self.n_cached

    def find(self, key: bytes) -> int | None:
        """The block with this key, with a reference more."""
        block = self._known.get(key)
        if block is not None:
            self._cached.pop(block, None)
            self._held[block] += 1
        return block

    def take(self, n: int, after: int | None = None, room: int = 0) -> list[int] | None:
        """n blocks, a reference each, or None if so many cannot be had. Side by side where possible, right behind the block
        `after`, else where `room` more are free to grow into: neighbours are read without a copy."""
        if n > self.n_available:
            return None
        while self.n_free < n:
            block, _ = self._cached.popitem(last=False)
            del self._known[self._keys[block]]  # type: ignore[arg-type]
            self._keys[block], self._free[block] = None, 1
        blocks = self._place(n, after, room)
        for block in blocks:
            self._free[block], self._held[block] = 0, 1
        return blocks

    def _place(self, n: int, after: int | None, room: int) -> list[int]:
        """Which n of the free blocks."""
        start = -1
        if after is not None and self._free[after + 1 : after + 1 + n] == FREE * n:
            start = after + 1
        for run in (FREE * (n + room), FREE * n):  # from the cursor on: what lies behind it is where others grow
            start = start if start >= 0 else self._free.find(run, self._cursor)
            start = start if start >= 0 else self._free.find(run)
        if start < 0:
            return [i for i, free in enumerate(self._free) if free][:n]
        self._cursor = (start + n + room) % self.n_blocks if after is None else self._cursor
        return list(range(start, start + n))

    def give(self, blocks: Sequence[int]) -> None:
        """Drop a reference each. The last block of a sequence is forgotten first: those before it serve more prompts."""
        for block in reversed(blocks):
            assert self._held[block] > 0, f"block {block} was given back twice"
            self._held[block] -= 1
            if self._held[block]:
                continue
            if self._keys[block] is None:
                self._free[block] = 1
            else:
                self._cached[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """A held block is full and holds what `key` says. Of two blocks with the same content the first keeps the key."""
        assert self._held[block] > 0 and self._keys[block] in (None, key)
        if key not in self._known:
            self._known[key], self._keys[block] = block, key

    def leaked(self) -> list[int]:
        """Blocks still held; when nothing runs there must be none. Checks the books on the way."""
        for block in range(self.n_blocks):
            states = bool(self._held[block]) + bool(self._free[block]) + (block in self._cached)
            assert states == 1, f"block {block} is in {states} states"
        assert all(self._keys[block] == key for key, block in self._known.items())
        return [block for block, held in enumerate(self._held) if held]


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence in order, and how many of its tokens they hold.

    Three facts keep shared blocks unharmed: `find` takes whole blocks at the end of whole blocks, so `stored` never points into
    a shared one; `publish` names only blocks below `stored`; and `stored` is never set back below what was published.
    """

    pool: Pool
    root: bytes  # what its chain of keys begins with
    blocks: list[int] = field(default_factory=list)
    stored: int = 0
    published: int = 0  # blocks, from the first on, that need no publishing any more
    keys: list[bytes] = field(default_factory=list)

    def reserve(self, n_tokens: int, room: int = 0) -> bool:
        """Have blocks for n_tokens in all, `room` more being likely to follow. False: the pool has not so many."""
        n = -(-n_tokens // self.pool.block_size) - len(self.blocks)
        taken = self.pool.take(n, self.blocks[-1] if self.blocks else None, room) if n > 0 else []
        self.blocks += taken or []
        return taken is not None

    def find(self, ids: Sequence[int]) -> int:
        """Take over blocks that hold the next of `ids` already, but for the last id: its logits are wanted. -> tokens found."""
        size, before = self.pool.block_size, self.stored
        while self.stored == len(self.blocks) * size and self.stored + size < len(ids):
            block = self.pool.find(self._key(ids, len(self.blocks)))
            if block is None:
                break
            self.blocks.append(block)
            self.stored += size
            self.published = len(self.blocks)
        return self.stored - before

    def publish(self, ids: Sequence[int]) -> None:
        """What is stored of `ids` is final: full blocks can be found from now on."""
        for i in range(self.published, self.stored // self.pool.block_size):
            self.pool.publish(self.blocks[i], self._key(ids, i))
            self.published = i + 1

    def _key(self, ids: Sequence[int], i: int) -> bytes:
        """Of the i-th block."""
        size = self.pool.block_size
        while len(self.keys) <= i:
            n = len(self.keys)
            self.keys.append(link(self.keys[-1] if n else self.root, ids[n * size : (n + 1) * size]))
        return self.keys[i]

    def clear(self) -> None:
        """Give all blocks back; what was published may be found again."""
        self.pool.give(self.blocks)
        self.blocks, self.stored, self.published = [], 0, 0
