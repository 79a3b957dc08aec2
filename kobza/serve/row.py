"""One request while it is served: its ids so far, where their keys and values lie, what may follow, and whom to tell.

What fails in here (a sink, a constraint) is this request's own: it ends with finish "error", and the others do not notice.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kobza.generate import Processor
from kobza.serve.pool import BlockTable
from kobza.serve.request import Event, Finish, Logprob, Request
from kobza.serve.sampling import Sampler, logprob_of
from kobza.serve.text import TextStream
from kobza.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kobza.serve.speculative import Lookup

SLOW_SINK = 0.5  # seconds in one call: a sink is called between two steps, and everyone waits for it
log = logging.getLogger("kobza.serve")


@dataclass(eq=False)
class Ticket:
    """The receipt of a request, for `Engine.cancel`."""

    number: int = 0  # in order of arrival
    cancelled: bool = False


class Row:
    """A request, its ids (prompt and new) and all that goes with them."""

    def __init__(
        self,
        request: Request,
        sink: Callable[[Event], None],
        ticket: Ticket,
        tokenizer: Tokenizer,
        extra: Sequence[Processor] = (),
    ):
        self.request, self.sink, self.ticket = request, sink, ticket
        self.ids, self.n_prompt = list(request.ids), len(request.ids)
        self.ends = () if request.ignore_ends else request.ends
        self.sampler = Sampler(request.sampling, self.n_prompt, self.ends, request.logit_bias, extra)
        self.text = TextStream(tokenizer, request.stops)
        self.state = None if request.constraint is None else request.constraint.start()
        self.deadline = math.inf if request.seconds is None else time.monotonic() + request.seconds
        self.table: BlockTable | None = None  # given, as `draft`, when the engine first looks at the row
        self.draft: BlockTable | None = None
        self.lookup: Lookup | None = None
        self.coins: Tensor | None = None  # the draws of speculation
        self.n_cached, self.restarted = 0, False
        self.prompt: list[Logprob] = []  # of the prompt's tokens from the second on, where asked for
        self.told = 0  # of these
        self.finished: Finish | None = None

    @property
    def n_new(self) -> int:
        """Tokens written."""
        return len(self.ids) - self.n_prompt

    @property
    def left(self) -> int:
        """Tokens it may still write."""
        return self.request.sampling.tokens - self.n_new

    @property
    def writing(self) -> bool:
        """Whether all but the last id is stored, and that one is not the prompt's: a step writes at least one more."""
        return self.n_new > 0 and self.table is not None and self.table.stored == len(self.ids) - 1

    def read_prompt(self, logits: Tensor, start: int) -> None:
        """Keep the log-probabilities of the tokens after places start, start + 1, ... of the prompt. logits (n, V)"""
        k = self.request.logprobs or 0
        for place, row in enumerate(logits, start + 1):
            if len(self.prompt) + 1 == place < self.n_prompt:  # not those of a second pass, after a preemption
                self.prompt.append(Logprob(self.ids[place], *logprob_of(row, self.ids[place], k)))

    def shape(self, logits: Tensor) -> Tensor:
        """Raw logits (V,) -> what to choose from (V,), after all knobs that depend on this row."""
        return self.sampler.shape(logits, self.ids, None if self.state is None else self.state.allowed())

    def accept(self, i: int, logits: Tensor) -> None:
        """The next id is i, chosen by these raw logits (V,): store and tell it, and see whether the text ends."""
        told = {}
        if self.request.logprobs is not None:
            told["logprob"], told["top"] = logprob_of(logits, i, self.request.logprobs)
        self.ids.append(i)
        text, over = self.text.feed(i), False
        if self.state is not None and i not in self.ends:
            self.state.advance(i)
            over = self.state.ended
        stop = i in self.ends or self.text.found or over
        if stop or not self.left:
            text += self.text.flush()
            self.tell(Event(i, text, **told), "stop" if stop else "length")
        else:
            self.tell(Event(i, text, **told))

    def tell(self, event: Event, finish: Finish | None = None) -> None:
        """Hand an event to the sink; a first one with what is known of the prompt, a last one with the counts."""
        if self.prompt and not self.told:
            event, self.told = event._replace(prompt=tuple(self.prompt)), 1
        if finish:
            self.finished = finish
            event = event._replace(finish=finish, n_prompt=self.n_prompt, n_cached=self.n_cached, n_new=self.n_new)
        start = time.monotonic()
        self.sink(event)
        seconds = time.monotonic() - start
        if seconds > SLOW_SINK and not finish:
            raise TimeoutError(f"the sink took {seconds:.1f} s for one token; put it into a queue")

    def end(self, finish: Finish, error: str = "") -> None:
        """Finish without a token. A sink that raises even now is left alone."""
        if self.finished:
            return
        self.finished = finish
        try:
            text = self.text.flush() if finish in ("timeout", "cancelled") else ""
            self.tell(Event(text=text, error=error), finish)
        except Exception:
            log.warning("request %d: its sink failed at the end", self.ticket.number)

    def fail(self, error: Exception) -> None:
        """Finish with an error of this request's own, logged once."""
        words = " ".join(str(error).split()) or type(error).__name__
        log.warning("request %d ended with an error: %s: %s", self.ticket.number, type(error).__name__, words)
        self.end("error", words)
