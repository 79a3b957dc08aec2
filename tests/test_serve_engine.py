"""The engine over plain runners: a text is the same however it was scheduled, and one request's trouble is its own."""

import logging
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_cases import Markov, Recompute
from serve_soak import soak

from kobza.config import InputError, ModelConfig, SampleConfig
from kobza.generate import forbid
from kobza.model import build
from kobza.serve.engine import Engine
from kobza.serve.request import Collector, Limits, QueueFull, Request
from kobza.tokenizer import ByteTokenizer, CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijk")
ADAPTERS = {"left": "l", "right": "r"}


def request(ids, ends=(0,), **some):
    own = {name: some.pop(name) for name in list(some) if name in Request.__dataclass_fields__}
    return Request(list(ids), SampleConfig(**(dict(tokens=12, temperature=1.0, top_k=0) | some)), ends, **own)


def engine(n_blocks=64, runner=None, **some):
    sizes = {name: some.pop(name) for name in ("max_running", "max_queue", "chunk") if name in some}
    runner = runner or Markov(n_blocks=n_blocks, adapters=ADAPTERS)
    return Engine(runner, TOKENIZER, limits=Limits(**sizes), **some)


def alone(one, **some):
    """A request's text in an engine of its own."""
    return engine(**some).run([one])[0]


def stepped(running, until, most=200):
    """Steps until until() -> how many."""
    for n in range(most):
        if until():
            return n
        running.step()
    raise AssertionError(f"not after {most} steps")


class Only:
    """A constraint: these ids alone, `n` of them. `breaks`: fails at its second token."""

    def __init__(self, ids, n, breaks=False, size=11):
        self.ids, self.n, self.breaks, self.size = ids, n, breaks, size

    def start(self):
        return OnlyState(self, 0)


class OnlyState:
    def __init__(self, constraint, written):
        self.constraint, self.written = constraint, written

    @property
    def ended(self):
        return self.written == self.constraint.n

    def allowed(self):
        if self.constraint.breaks and self.written == 1:
            raise InputError("the grammar: no way on")
        return torch.zeros(self.constraint.size, dtype=torch.bool).index_fill_(
            0, torch.tensor(self.constraint.ids), True
        )

    def advance(self, i):
        assert i in self.constraint.ids and i != 0, "an end is not part of the text"
        self.written += 1

    def copy(self):
        return OnlyState(self.constraint, self.written)


# ---- the same text however it was scheduled ----

prompts = st.lists(st.integers(1, 3), min_size=1, max_size=14)  # of few ids: they share prefixes


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(0, 3), st.sampled_from([None, "left", "right"])), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(8, 24),
    st.integers(1, 5),
)
def test_batched_chunked_cached_and_preempted_is_single(rows, chunk, n_blocks, max_running):
    requests = [request(ids, seed=seed, adapter=adapter) for ids, seed, adapter in rows]
    busy = engine(n_blocks, chunk=chunk, max_running=max_running)
    for one, result in zip(requests, busy.run(requests), strict=True):
        single = alone(one)
        assert (result.ids, result.text, result.finish) == (single.ids, single.text, single.finish)
    assert busy.pool.leaked() == []


def test_a_gpt_in_many_pieces_is_a_gpt_in_one():
    models = [
        build(ModelConfig(vocab_size=11, max_seq_len=64, n_layer=2, n_head=2, n_embd=32, init="gpt2"), seed=s)
        for s in (1, 2)
    ]
    requests = [
        request([1, 2, 3, 4, 5, 6, 7 + i % 3], ends=(), tokens=20, seed=i, adapter=(None, "left")[i % 2])
        for i in range(6)
    ]
    small = Recompute(*models, n_blocks=12, adapters={"left": "l"})
    busy = engine(runner=small, chunk=3)
    texts = [result.ids for result in busy.run(requests)]
    assert busy.stats().preempted > 0
    assert texts == [alone(one, runner=Recompute(*models, adapters={"left": "l"})).ids for one in requests]


def test_a_cached_prefix_is_not_computed_again_and_a_whole_one_leaves_a_token():
    busy, prompt = engine(), [1, 2, 3, 4, 5, 6, 7, 8]
    cold = busy.run([request(prompt, logprobs=2)])[0]
    n = busy.runner.n_forwards
    again = busy.run([request(prompt, logprobs=2)])[0]
    assert again.n_cached == 4 and cold.n_cached == 0  # 8 tokens are two blocks of 4; the last one's logits are wanted
    assert (again.ids, again.logprobs) == (cold.ids, cold.logprobs)
    assert busy.runner.n_forwards - n == len(again.ids)
    assert busy.run([request([*prompt, 9])])[0].n_cached == 8
    assert busy.stats().prefix_hits == 12


def test_what_was_written_is_a_prefix_for_the_next_turn():
    busy = engine()
    first = busy.run([request([1, 2, 3], ends=(), tokens=10)])[0]
    assert busy.run([request([1, 2, 3, *first.ids, 5], ends=())])[0].n_cached == 12


def test_equal_prompts_at_once_share_blocks_as_they_come():
    busy = engine(chunk=8)
    results = busy.run([request(range(1, 10), seed=i) for i in range(6)] * 2)
    assert sum(result.n_cached for result in results) >= 8 * 8


def test_adapters_do_not_share_prefixes():
    busy, prompt = engine(), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    texts = {name: busy.run([request(prompt, adapter=name)])[0] for name in (None, "left", "right")}
    assert [result.n_cached for result in texts.values()] == [0, 0, 0]
    assert busy.run([request(prompt, adapter="left")])[0].n_cached == 8


def test_preemption_takes_the_youngest_and_the_first_come_ends_first():
    busy, order = engine(n_blocks=9, max_running=4), []
    for i in range(4):
        busy.submit(request([i + 1, 1, 1], ends=(), tokens=20), lambda event, i=i: event.finish and order.append(i))
    stepped(busy, lambda: len(order) == 4)
    assert order == [0, 1, 2, 3] and busy.stats().preempted > 0


def test_rows_that_write_are_not_held_up_by_a_long_prompt():
    busy, times = engine(chunk=4), []
    busy.submit(request([1], ends=(), tokens=20), lambda event: times.append(busy.runner.n_forwards))
    busy.step()
    late = Collector()
    busy.submit(request([2] * 40, ends=()), late)
    stepped(busy, lambda: late.events)
    assert times == list(range(1, len(times) + 1))  # a token a step
    assert 10 <= busy.runner.n_forwards <= 12  # 40 tokens, 4 a step


def test_prompts_are_read_in_order_of_arrival():
    busy, firsts = engine(chunk=4), {}
    for i in (1, 2):
        busy.submit(request([i] * 16, ends=()), lambda event, i=i: firsts.setdefault(i, busy.runner.n_forwards))
    stepped(busy, lambda: len(firsts) == 2)
    assert firsts == {1: 4, 2: 8}


# ---- an end ----


@pytest.mark.parametrize("n", [0, 1, 4])
def test_a_cancelled_request_is_out_at_the_next_step(n):
    busy, sink = engine(), Collector()
    ticket = busy.submit(request([1, 2, 3], ends=()), sink)
    other = Collector()
    busy.submit(request([1, 2, 4], ends=()), other)
    for _ in range(n):
        busy.step()
    busy.cancel(ticket)
    busy.step()
    assert sink.result.finish == "cancelled" and len(sink.result.ids) == n and busy.stats().running == 1
    stepped(busy, lambda: other.result)
    assert other.result.ids == alone(request([1, 2, 4], ends=())).ids and not busy.pool.leaked()


def test_a_late_request_ends_with_what_it_has():
    busy, sink = engine(max_running=1), Collector()
    waiting = Collector()
    busy.submit(request([1], ends=(), tokens=60, seconds=0.02), sink)
    busy.submit(request([1], seconds=0.02), waiting)
    busy.step()
    time.sleep(0.03)
    busy.step()
    assert sink.result.finish == "timeout" and len(sink.result.ids) == 1
    assert waiting.result.finish == "timeout" and waiting.result.ids == []


def test_ends_stops_and_counts():
    sink, busy = Collector(), engine()
    whole = alone(request([1, 2, 3], ends=(), tokens=30, seed=3))
    busy.submit(request([1, 2, 3], ends=(), tokens=30, seed=3, stops=(whole.text[5:8],)), sink)
    stepped(busy, lambda: sink.result)
    assert sink.result.finish == "stop" and sink.result.text == whole.text[: whole.text.find(whole.text[5:8])]
    last = sink.events[-1]
    assert (last.n_prompt, last.n_new) == (3, len(sink.result.ids)) and last.finish == "stop"
    end = whole.ids[4]
    ended = alone(request([1, 2, 3], ends=(end,), tokens=30, seed=3))
    assert ended.finish == "stop" and ended.ids == whole.ids[: whole.ids.index(end) + 1]
    assert alone(request([1, 2, 3], ends=(end,), tokens=30, seed=3, ignore_ends=True)).ids == whole.ids
    assert whole.finish == "length"


def test_what_a_stop_string_held_back_is_shown_at_the_end():
    whole = alone(request([1, 2, 3], ends=(), tokens=6, seed=3))
    held = alone(request([1, 2, 3], ends=(), tokens=6, seed=3, stops=(whole.text[-2:] + "?",)))
    assert held.text == whole.text


def test_half_a_character_is_not_shown():
    runner = Markov(256, n_blocks=64)
    spell = {1: "ї".encode()[0], 2: "ї".encode()[1]}
    runner.table[:] = -30.0
    for _ in spell:
        runner.table[:, spell[1], spell[2]] = runner.table[:, spell[2], spell[1]] = 30.0
    sink, busy = Collector(), Engine(runner, ByteTokenizer())
    busy.submit(request([spell[2]], ends=(), tokens=5), sink)
    stepped(busy, lambda: sink.result)
    assert [event.text for event in sink.events] == ["", "ї", "", "ї", "\ufffd"]


def test_a_constraint_rules_and_ends_the_text():
    for some in ({}, dict(lookup=True, speculate=3), dict(draft=Markov(seed=4), speculate=2)):
        busy = engine(**some)
        result = busy.run([request([1, 2, 1, 2], constraint=Only([1, 2, 3], 6))])[0]
        assert len(result.ids) == 6 and set(result.ids) <= {1, 2, 3} and result.finish == "stop"
        assert busy.pool.leaked() == []


def test_an_end_where_the_constraint_allows_it_ends_the_text():
    result = engine().run([request([1, 2], constraint=Only([0, 1], 30), temperature=5.0, tokens=40)])[0]
    assert result.finish == "stop" and result.ids[-1] == 0 and set(result.ids[:-1]) == {1}


def test_the_prompts_log_probabilities_are_told_first():
    sink, busy = Collector(), engine(chunk=3)
    busy.run([request([1, 2, 3, 4, 5, 6, 7])])  # what is cached has no logits
    busy.submit(request([1, 2, 3, 4, 5, 6, 7], prompt_logprobs=True, logprobs=2), sink)
    stepped(busy, lambda: sink.result)
    assert [logprob.id for logprob in sink.events[0].prompt] == [2, 3, 4, 5, 6, 7]
    marks = [(i, place, 0) for place, i in enumerate([1, 2, 3])]
    own = busy.runner.logits_of(marks, 0).log_softmax(-1)
    assert sink.events[0].prompt[2].logprob == pytest.approx(float(own[4]), abs=1e-5)
    assert not any(event.prompt for event in sink.events[1:])


def test_an_alphabet_is_applied_by_what_the_recipe_gives():
    one = request([1, 2], alphabet="Latin", tokens=20, temperature=3.0)
    with pytest.raises(InputError, match="alphabet 'Latin' is not supported"):
        engine().submit(one, Collector())
    forbidden = torch.arange(11) > 4
    limited = engine(alphabet=lambda config, n_prompt: [forbid(lambda ids: forbidden)])
    assert max(limited.run([one])[0].ids) <= 4 < max(alone(request([1, 2], tokens=20, temperature=3.0)).ids)


# ---- trouble ----


@pytest.mark.parametrize(
    "some, words",
    [
        (dict(ids=[]), "empty"),
        (dict(ids=[1] * 60), "60 tokens of prompt and 12 to write are 72, but the context holds 64; ask for at most 4"),
        (dict(ids=[1] * 64), "shorten the prompt to 63"),
        (dict(ids=[11]), "token id 11 is not in the vocabulary of 11"),
        (dict(ids=[-1]), "token id -1"),
        (dict(ids=[1], logit_bias={99: 1.0}), "token id 99"),
        (dict(ids=[1], logit_bias={1: float("nan")}), "logit_bias nan"),
        (dict(ids=[1], logit_bias={1: 1e9}), "logit_bias 1000000000.0"),
        (dict(ids=[1], logprobs=12), "between 0 and 11"),
        (dict(ids=[1], stops=("",)), "stop string is empty"),
        (dict(ids=[1], adapter="lefty"), "did you mean left"),
        (dict(ids=[1], seconds=0.0), "0.0 seconds"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(some, words):
    with pytest.raises(InputError, match=words):
        engine().submit(request(**some), Collector())


def test_more_than_the_cache_ever_holds_is_refused():
    with pytest.raises(InputError, match="the cache holds 20 in all"):
        engine(n_blocks=5).submit(request([1] * 10), Collector())


def test_the_queue_has_a_limit():
    busy = engine(max_queue=2)
    for _ in range(2):
        busy.submit(request([1]), Collector())
    with pytest.raises(QueueFull, match="2 requests wait"):
        busy.submit(request([1]), Collector())
    busy.step()
    busy.submit(request([1]), Collector())


def failing_sink(after):
    events = []

    def sink(event):
        events.append(event)
        if len(events) > after:
            raise OSError("the reader is gone")

    return sink, events


@pytest.mark.parametrize("after", [0, 3])
def test_a_sink_that_raises_ends_its_own_request_alone(after, caplog):
    busy, (sink, events), other = engine(), failing_sink(after), Collector()
    busy.submit(request([1, 2, 3], ends=()), sink)
    busy.submit(request([1, 2, 4], ends=()), other)
    stepped(busy, lambda: other.result)
    assert other.result.ids == alone(request([1, 2, 4], ends=())).ids
    assert events[-1].finish == "error" and len(events) == after + 2
    assert busy.stats().finished == {"error": 1, "length": 1} and not busy.pool.leaked()
    assert caplog.text.count("the reader is gone") == 1


def test_a_slow_sink_is_cut_off(monkeypatch):
    monkeypatch.setattr("kobza.serve.row.SLOW_SINK", 0.01)
    busy, events = engine(), []
    busy.submit(request([1], ends=()), lambda event: events.append(event) or time.sleep(0.02))
    stepped(busy, lambda: events and events[-1].finish)
    assert events[-1].finish == "error" and "queue" in events[-1].error and len(events) == 2


def test_a_constraint_that_fails_ends_its_own_request_alone(caplog):
    busy = engine()
    requests = [request([1, 2], constraint=Only([1], 9, breaks=True)), request([1, 2], seed=1)]
    broken, other = busy.run(requests)
    assert (broken.finish, broken.error, broken.ids) == ("error", "the grammar: no way on", [1])
    assert other.ids == alone(requests[1]).ids and not busy.pool.leaked()
    assert caplog.text.count("no way on") == 1


def test_a_failed_forward_ends_the_running_and_the_engine_goes_on(caplog):
    busy = engine(max_running=2)
    plain, fails = busy.runner.forward, [False, True]
    busy.runner.forward = lambda pieces: 1 / 0 if fails and fails.pop(0) else plain(pieces)
    with caplog.at_level(logging.ERROR):
        results = busy.run([request([i + 1, 2], ends=()) for i in range(4)])
    assert [result.finish for result in results] == ["error", "error", "length", "length"]
    assert "division by zero" in results[0].error and len(caplog.records) == 1
    assert results[2].ids == alone(request([3, 2], ends=())).ids and not busy.pool.leaked()


def test_a_failed_step_publishes_nothing():
    busy, prompt = engine(), list(range(1, 10))
    plain = busy.runner.forward
    busy.runner.forward = lambda pieces: 1 / 0
    busy.run([request(prompt)])
    busy.runner.forward = plain
    assert busy.run([request(prompt)])[0].n_cached == 0


# ---- its own thread ----


def test_many_threads_submit_and_every_text_is_its_own():
    busy, results = engine(n_blocks=40, max_running=6), {}
    busy.start()
    requests = [request([1 + i % 3, 2, 3], seed=i) for i in range(24)]

    def client(part):
        for i in part:
            sink = Collector()
            ticket = busy.submit(requests[i], sink)
            if i % 5 == 0:
                busy.cancel(ticket)
            while sink.result is None:
                time.sleep(0.001)
            results[i] = sink.result

    threads = [threading.Thread(target=client, args=(range(k, 24, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert busy.drain(5) and not busy.pool.leaked() and len(results) == 24
    with pytest.raises(QueueFull, match="shutting down"):
        busy.submit(requests[0], Collector())
    busy.close()
    for i, result in results.items():
        single = alone(requests[i])
        assert result.ids == single.ids[: len(result.ids)] if i % 5 == 0 else result.ids == single.ids


def test_an_idle_engine_wakes_at_once_and_closing_ends_what_runs():
    busy, first, second = engine(), Collector(), Collector()
    busy.start()
    time.sleep(0.05)
    start = time.monotonic()
    busy.submit(request([1], ends=(), tokens=2), first)
    while first.result is None and time.monotonic() < start + 5:
        time.sleep(0.001)
    assert time.monotonic() - start < 0.4  # less than a nap
    plain = busy.runner.forward
    busy.runner.forward = lambda pieces: time.sleep(0.01) or plain(pieces)
    busy.submit(request([1], ends=(), tokens=60), second)
    busy.close()
    assert second.result.finish == "cancelled" and not busy.pool.leaked()


def test_draining_gives_up_in_time():
    busy = engine()
    plain = busy.runner.forward
    busy.runner.forward = lambda pieces: time.sleep(0.01) or plain(pieces)
    busy.submit(request([1], ends=(), tokens=60), Collector())
    assert not busy.drain(0.03)
    busy.close()


# ---- all at once ----


@pytest.mark.parametrize("guesser", [{}, dict(lookup=True, speculate=3), dict(draft=4, speculate=2)], ids=str)
def test_soak(guesser):
    def make(n_blocks):
        own = {name: Markov(seed=v, n_blocks=n_blocks) if name == "draft" else v for name, v in guesser.items()}
        return engine(n_blocks, **own)

    constraints = [Only([1, 2, 3], 7), Only([4, 5], 30)]
    report = soak(make(90), make(300), 150, 32, 0, ends=(0,), adapters=list(ADAPTERS), constraints=constraints)
    assert report.leaked == 0 and report.different == [] and report.preempted > 0
    assert report.finished["cancelled"] > 5 and report.finished["stop"] > 20 and report.finished["length"] > 5
    assert report.prefix_hits > 0 and (report.accepted > 0) == bool(guesser)


def test_the_soak_sees_a_wrong_engine():
    class Stale(Markov):
        def place(self, piece, j):
            return piece.start + j + (piece.start >= 4 and len(piece.ids) > 1)

    report = soak(engine(runner=Stale(n_blocks=90)), engine(n_blocks=300), 60, 16, 0, ends=(0,))
    assert report.different
