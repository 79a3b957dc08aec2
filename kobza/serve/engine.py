"""The engine: many requests, one forward a step. Scheduling only; what a forward computes is runner.py's business, what an id is
chosen by sampling.py's, where blocks lie pool.py's, and a request's own state row.py's.

A step takes every row that writes (one token each, more where some were guessed), then as much of waiting prompts as `chunk`
allows, first come first served. Rows share blocks where their ids begin alike. When blocks run out the youngest row gives its
own back and is computed again later; its text does not change, for every draw belongs to a place in the text.

`submit`, `cancel`, `drain`, `stats` are for any thread; `step` runs in one at a time: the engine's own after `start`, or the
caller's. Sinks are called between steps: they must be quick (a queue's put) and one that raises ends its own request alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch

from kobza.config import SampleConfig, require
from kobza.generate import Processor
from kobza.serve.pool import BlockTable, Pool, root
from kobza.serve.request import Collector, Event, Limits, QueueFull, Request, Result, Stats, check_request
from kobza.serve.row import Row, Ticket
from kobza.serve.runner import Piece, Runner
from kobza.serve.speculative import Draft, Guess, Lookup, Turn, advance
from kobza.tokenizer import Tokenizer

ROOM = 8  # blocks that a row is expected to grow by, where that decides where it is put
NAP = 0.5  # seconds that the idle thread sleeps when nothing wakes it
log = logging.getLogger("kobza.serve")


def in_thread(work: Callable[[], None]) -> None:
    """Run it in a thread that ends with the program."""
    threading.Thread(target=work, name="kobza-engine", daemon=True).start()


class Engine:
    """Engine(runner, tokenizer).run([request]) -> [Result]; or start(), submit(request, sink), ..., close().

    draft and lookup are two ways to guess `speculate` tokens a step, one at most. alphabet(sampling, n_prompt) gives the
    processors of SampleConfig.alphabet, which belong to another room.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        limits: Limits | None = None,
        draft: Runner | None = None,
        speculate: int = 0,
        lookup: bool = False,
        alphabet: Callable[[SampleConfig, int], list[Processor]] | None = None,
    ):
        guessing = draft is not None or lookup
        require(speculate >= 0, f"--speculate is {speculate}; it must be 0 (off) or above")
        require(not (draft and lookup), "a draft model and look-up both guess the next tokens; take one")
        require(not speculate or guessing, f"--speculate {speculate} has no effect: give a draft model or look-up")
        require(
            bool(speculate) or not guessing, "a draft model or look-up has no effect with --speculate 0; 4 is usual"
        )
        self.runner, self.tokenizer, self.limits = runner, tokenizer, limits or Limits()
        self.speculate, self.lookup, self.alphabet = speculate, lookup, alphabet
        self.draft = Draft(draft, runner.vocab_size, self.limits.chunk) if draft else None
        self.pool = Pool(min(self.limits.blocks or runner.n_blocks, runner.n_blocks), runner.block_size)
        self.running: list[Row] = []  # in order of arrival
        self.queue: deque[Row] = deque()  # likewise, all later than those
        self._wake = threading.Condition()  # guards the queue and what follows
        self._turn = threading.Lock()  # one step at a time
        self._stopped: threading.Event | None = None  # set when the thread that steps has ended
        self._stepper = 0  # that thread
        self._draining = self._closed = False
        self._n_submitted = 0
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._seconds = 0.0

    # ---- what others call --------------------------------------------------------------------------------------------

    def submit(self, request: Request, sink: Callable[[Event], None]) -> Ticket:
        """Queue a request; sink(event) follows from the engine's thread. QueueFull: later; InputError: never."""
        check_request(request, self.runner, self.pool.n_blocks * self.pool.block_size)
        scripts = request.sampling.alphabet
        require(not scripts or self.alphabet is not None, f"--alphabet {scripts!r} is not supported by this server")
        extra = self.alphabet(request.sampling, len(request.ids)) if scripts and self.alphabet else []
        row = Row(request, sink, Ticket(), self.tokenizer, extra)
        row.lookup = Lookup(self.speculate) if self.lookup else None
        with self._wake:
            if self._draining or self._closed:
                raise QueueFull("the server is shutting down and takes no new requests; try again later")
            n, most = len(self.queue), self.limits.max_queue
            if n >= most:
                raise QueueFull(f"the queue is full: {n:,} requests wait, {most:,} may; try again later")
            self._n_submitted += 1
            row.ticket.number = self._n_submitted
            self.queue.append(row)
            self._wake.notify_all()
        return row.ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request at the next step with finish "cancelled"; a finished one stays as it is."""
        ticket.cancelled = True
        with self._wake:
            self._wake.notify_all()

    @property
    def started(self) -> bool:
        """Whether the engine steps by itself."""
        return self._stopped is not None

    def start(self, spawn: Callable[[Callable[[], None]], object] = in_thread) -> None:
        """Step in a thread, which sleeps when there is nothing to do. spawn(work) runs it there: in one of its own, or best in
        the one that made the runner. As soon as two threads have used OpenMP its workers no longer wait for each other
        awake, and a step of one row takes 1.5 times as long (docs/LOG.md)."""
        assert self._stopped is None, "the engine has been started"
        self._stopped = threading.Event()
        spawn(self._serve)

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and finish those there are -> whether all did in time."""
        with self._wake:
            self._draining = True
        end = time.monotonic() + seconds
        while self._busy() and time.monotonic() < end:
            if self._stopped is None:
                self.step()
            else:
                time.sleep(0.01)
        return not self._busy()

    def close(self) -> None:
        """Stop at once; what still runs or waits ends as cancelled."""
        with self._wake:
            self._draining = self._closed = True
            self._wake.notify_all()
        if self._stopped is not None and threading.get_ident() != self._stepper:
            self._stopped.wait()
        with self._turn:
            for row in [*self.running, *self.queue]:
                row.end("cancelled")
            self._sweep()

    def stats(self) -> Stats:
        """The engine in numbers."""
        with self._wake:
            counts = {name: self._counts[name] for name in COUNTED}
            return Stats(
                running=len(self.running),
                queued=len(self.queue),
                blocks=self.pool.n_blocks,
                free=self.pool.n_free,
                cached=self.pool.n_cached,
                seconds=self._seconds,
                finished=dict(self._finished),
                **counts,
            )

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Serve requests to their end, in the caller's thread unless the engine has been started."""
        sinks: list[Collector] = [Collector() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            while len(self.queue) >= self.limits.max_queue:
                self._pass()
            self.submit(request, sink)
        while any(sink.result is None for sink in sinks):
            self._pass()
        return [sink.result for sink in sinks if sink.result is not None]

    def _pass(self) -> None:
        """Let time pass for `run`."""
        if self._stopped is not None:
            time.sleep(0.001)
        elif not self.step():
            raise AssertionError("requests wait and no step can be made")

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One forward. False: there was nothing to do."""
        with self._turn, torch.inference_mode():
            self._sweep()
            try:
                self._admit()
                turns = self._plan()
                if turns:
                    self._forward(turns)
            except Exception as error:
                log.exception("a step failed; the %d running requests end", len(self.running))
                self._fail(error)
                return True
            self._sweep()
            return bool(turns)

    def _sweep(self) -> None:
        """Take out rows that have finished, were cancelled or are too late."""
        now = time.monotonic()
        with self._wake:
            rows = [*self.running, *self.queue]
        for row in rows:
            if row.ticket.cancelled:
                row.end("cancelled")
            elif row.deadline < now:
                row.end("timeout")
        over = [row for row in rows if row.finished]
        for row in over:
            self._release(row)
        with self._wake:
            self._finished.update(row.finished for row in over if row.finished)
            gone = set(map(id, over))
            self.running = [row for row in self.running if id(row) not in gone]
            if any(row.finished for row in self.queue):
                self.queue = deque(row for row in self.queue if not row.finished)

    def _release(self, row: Row) -> None:
        """Give a row's blocks back."""
        for table in (row.table, row.draft):
            if table is not None:
                table.clear()

    def _admit(self) -> None:
        """Take rows in, in order, while there are blocks for their ids and one more for each row that runs."""
        while self.queue and len(self.running) < self.limits.max_running:
            row = self.queue[0]
            if row.table is None:
                adapter = row.request.adapter
                key = root(self.runner.digest, adapter and self.runner.adapters[adapter])
                row.table = BlockTable(self.pool, key)
                row.draft = BlockTable(self.draft.pool, root(self.draft.runner.digest, None)) if self.draft else None
                self._counts["tokens_in"] += row.n_prompt
            found = self._find(row)
            need = -(-(len(row.ids) + 1) // self.pool.block_size) - len(row.table.blocks)
            if self.running and self.pool.n_available < need + len(self.running):
                row.table.clear()  # what it found may be needed by those that run
                row.n_cached -= found
                self._counts["prefix_hits"] -= found
                return
            with self._wake:
                self.running.append(self.queue.popleft())

    def _find(self, row: Row) -> int:
        """Take over what has been computed of a row's ids already -> tokens of its prompt found, the first time it is read."""
        assert row.table is not None
        if row.request.prompt_logprobs and not row.n_new:  # that needs the logits of every place
            return 0
        found = row.table.find(row.ids)
        if row.restarted:
            return 0
        row.n_cached += found
        self._counts["prefix_hits"] += found
        return found

    def _plan(self) -> dict[Row, Turn]:
        """What each row adds to this step. Rows that write go before prompts, older ones before younger ones."""
        for row in self.running:
            if not row.writing:
                self._find(row)
        guesses, turns, chunk = self._guess(), {}, self.limits.chunk
        for row in sorted(self.running, key=lambda row: not row.writing):
            if row not in self.running:  # it made way for an older one
                continue
            turn = self._write(row, guesses.get(row, [])) if row.writing else self._read(row, chunk)
            piece = turn.piece
            if piece.ids and self._secure(row, row.table, piece.start + len(piece.ids), turns):
                turns[row] = turn
                chunk -= 0 if row.writing else len(piece.ids)
        return turns

    def _write(self, row: Row, guesses: list[Guess]) -> Turn:
        """The last id of a row and what may follow."""
        assert row.table is not None
        ids = row.ids[-1:] + [guess.id for guess in guesses]
        return Turn(Piece(ids, row.table.stored, row.table.blocks, len(ids), row.request.adapter), guesses)

    def _read(self, row: Row, most: int) -> Turn:
        """The next ids of a row that has more than one to read. After a restart its last id is left for `_write`, so that its
        steps begin where they would have begun."""
        assert row.table is not None
        start = row.table.stored
        ids = row.ids[start : min(len(row.ids) - bool(row.n_new), start + most)]
        every = row.request.prompt_logprobs and not row.n_new
        wanted = len(ids) if every else int(start + len(ids) == len(row.ids))
        return Turn(Piece(ids, start, row.table.blocks, wanted, row.request.adapter), [])

    def _guess(self) -> dict[Row, list[Guess]]:
        """Guesses for the rows that write."""
        counts = {row: min(self.speculate, row.left - 1) for row in self.running if row.writing}
        if self.draft is None:
            return {row: row.lookup.guess(row.ids, n) for row, n in counts.items() if row.lookup and n > 0}
        counts = {row: min(n, self.draft.most(row)) for row, n in counts.items()}
        for row, n in counts.items():
            if n > 0 and row in self.running:
                self._secure(row, row.draft, len(row.ids) + n, {})
        return self.draft.guess({row: n for row, n in counts.items() if n > 0 and row in self.running})

    def _secure(self, row: Row, table: BlockTable | None, n_tokens: int, turns: dict[Row, Turn]) -> bool:
        """Have blocks for n_tokens of a row; the youngest rows make way. False: this row is the youngest."""
        assert table is not None
        room = min(ROOM, -(-row.left // self.pool.block_size))
        while not table.reserve(n_tokens, room):
            youngest = self.running[-1]
            turns.pop(youngest, None)
            self._release(youngest)
            youngest.restarted = True
            self._counts["preempted"] += 1
            with self._wake:
                self.queue.appendleft(self.running.pop())
            if youngest is row:
                return False
        return True

    def _forward(self, turns: dict[Row, Turn]) -> None:
        """Run the model once and let each row choose."""
        start, before = time.monotonic(), {row: len(row.ids) for row in turns}
        logits = self.runner.forward([turn.piece for turn in turns.values()])
        self._seconds += time.monotonic() - start
        self._counts["forwards"] += 1
        for row, turn in turns.items():
            row.table.stored += len(turn.piece.ids) - len(turn.guesses)
        advance(turns, logits)
        for row, turn in turns.items():
            self._settle(row, turn, len(row.ids) - before[row])

    def _settle(self, row: Row, turn: Turn, written: int) -> None:
        """After a step: keep what stays of its guesses, forget the rest, make full blocks known."""
        guessed, held = len(turn.guesses), max(0, written - 1)
        self._counts["tokens_out"] += written
        self._counts["drafted"] += guessed
        self._counts["accepted"] += held
        if row.lookup is not None:
            row.lookup.learn(guessed, held)
        row.table.stored += held
        row.table.publish(row.ids)
        if row.draft is not None:
            row.draft.stored = min(row.draft.stored, row.table.stored)
            row.draft.publish(row.ids)

    def _fail(self, error: Exception) -> None:
        """End all that run; what the failed step may have left in their blocks is not published."""
        words = " ".join(str(error).split()) or type(error).__name__
        for row in self.running or list(self.queue)[:1]:
            row.end("error", f"the model failed: {words}")
        self._sweep()

    def _busy(self) -> bool:
        with self._wake:
            return bool(self.running or self.queue)

    def _serve(self) -> None:
        """The engine's thread."""
        self._stepper = threading.get_ident()
        try:
            while not self._closed:
                if not self.step():
                    with self._wake:
                        if not self.queue and not self._closed:
                            self._wake.wait(NAP)
        finally:
            assert self._stopped is not None
            self._stopped.set()


COUNTED = ("tokens_in", "tokens_out", "prefix_hits", "drafted", "accepted", "preempted", "forwards")
