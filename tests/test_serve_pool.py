"""Blocks: a simple model of them beside the pool, in random order; neighbours; prefixes shared, never of other weights."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kobza.config import InputError
from kobza.serve.pool import BlockTable, Pool, link, root

N, SIZE = 7, 2


class Books(RuleBasedStateMachine):
    """Sequences over a small alphabet come, grow, are set back, end; the books are kept a second time in plain sets."""

    def __init__(self):
        super().__init__()
        self.pool = Pool(N, SIZE)
        self.tables, self.content = [], {}  # table -> its ids; block -> the ids it holds, from the root on
        self.texts = {}

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=9), digest=st.sampled_from("ab"))
    def begin(self, ids, digest):
        table = BlockTable(self.pool, root(digest, None))
        found = table.find(ids)
        assert found % SIZE == 0 and found < len(ids)  # the last id is left to compute
        for i, block in enumerate(table.blocks):  # what is found is what was written there
            assert self.content[block] == (digest, tuple(ids[: (i + 1) * SIZE]))
        self.tables.append(table)
        self.texts[id(table)] = (digest, ids)
        self.write(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, data, more):
        table = data.draw(st.sampled_from(self.tables))
        digest, ids = self.texts[id(table)]
        self.texts[id(table)] = (digest, ids + more)
        self.write(table)

    def write(self, table):
        """Store all but the last id; what cannot be had ends the sequence."""
        digest, ids = self.texts[id(table)]
        mine, before = set(table.blocks), self.pool.n_available
        missing = -(-len(ids) // SIZE) - len(table.blocks)
        assert table.reserve(len(ids)) == (missing <= before)
        if missing > before:
            assert set(table.blocks) == mine
            return self.remove(table)
        for i in range(table.stored // SIZE, len(table.blocks)):
            block = table.blocks[i]
            others = [other for other in self.tables if other is not table and block in other.blocks]
            assert not others, "a shared block is written"
            self.content[block] = (digest, tuple(ids[: (i + 1) * SIZE]))
        table.stored = max(table.stored, len(ids) - 1)
        table.publish(ids)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data):
        self.remove(data.draw(st.sampled_from(self.tables)))

    def remove(self, table):
        self.tables = [other for other in self.tables if other is not table]
        table.clear()

    @invariant()
    def books_agree(self):
        held = {block for table in self.tables for block in table.blocks}
        assert set(self.pool.leaked()) == held
        assert self.pool.n_available == N - len(held)

    def teardown(self):
        for table in self.tables:
            table.clear()
        assert not self.pool.leaked() and self.pool.n_available == N


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def filled(pool, ids, digest="w", adapter=None):
    table = BlockTable(pool, root(digest, adapter))
    table.find(ids)
    assert table.reserve(len(ids))
    table.stored = len(ids)
    table.publish(ids)
    return table


def test_a_prefix_is_found_and_the_last_id_left():
    pool = Pool(8, 4)
    filled(pool, list(range(12))).clear()
    for n, found in ((13, 12), (12, 8), (9, 8), (8, 4), (4, 0), (1, 0)):
        table = BlockTable(pool, root("w", None))
        assert table.find(list(range(n))) == found, n
        table.clear()
    assert pool.n_cached == 3 and pool.n_free == 5


@pytest.mark.parametrize("digest, adapter", [("v", None), ("w", "x")])
def test_other_weights_or_another_adapter_share_nothing(digest, adapter):
    pool = Pool(8, 4)
    filled(pool, list(range(8)))
    assert BlockTable(pool, root(digest, adapter)).find(list(range(9))) == 0
    assert (
        BlockTable(pool, root("w", None)).find([9, *range(1, 9)]) == 0
    )  # a later block is nothing without those before


def test_the_least_recently_used_goes_first_and_ends_before_beginnings():
    pool = Pool(4, 2)
    first, second = filled(pool, [1, 2, 3, 4]), filled(pool, [5, 6, 7, 8])
    first.clear()
    second.clear()
    assert pool.take(1) is not None  # forgets [3, 4] of the first
    table = BlockTable(pool, root("w", None))
    assert table.find([1, 2, 3, 4, 9]) == 2  # used again: now the second's end is the oldest
    table.clear()
    pool.take(2)
    assert BlockTable(pool, root("w", None)).find([1, 2, 0]) == 2


def test_a_sequence_grows_into_its_neighbours():
    pool = Pool(64, 2)
    tables = [BlockTable(pool, root("w", None)) for _ in range(4)]
    for n in range(1, 17):  # four sequences grow in turn
        for table in tables:
            assert table.reserve(2 * n, room=15)
    assert all(table.blocks == list(range(table.blocks[0], table.blocks[0] + 16)) for table in tables)


def test_nothing_is_taken_when_not_all_can_be_had():
    pool = Pool(3, 2)
    assert pool.take(2) and pool.take(2) is None and pool.n_free == 1


def test_a_block_given_back_twice_is_caught():
    pool = Pool(3, 2)
    blocks = pool.take(1)
    pool.give(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.give(blocks)


def test_keys_hang_on_all_before_them():
    assert link(root("w", None), [1, 2]) != link(root("w", "a"), [1, 2])
    assert link(link(root("w", None), [1]), [2]) != link(root("w", None), [1, 2])


def test_a_cache_without_blocks_is_refused():
    with pytest.raises(InputError, match="0 blocks"):
        Pool(0, 4)
