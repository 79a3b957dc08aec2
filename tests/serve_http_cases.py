"""What the tests of the HTTP faces stand on: the real engine over a runner whose next id hangs on its context by a table."""

import asyncio
import contextlib
import functools

import httpx
import torch
from serve_cases import Paged

from kobza.config import SampleConfig
from kobza.formats.template import ChatTemplate
from kobza.serve.chat import Talk
from kobza.serve.constraint import Grammars
from kobza.serve.engine import Engine
from kobza.serve.http.app import make_app
from kobza.serve.http.service import Served, Service
from kobza.serve.request import Limits, Request
from kobza.tokenizer import LibraryTokenizer
from kobza.web.guard import Guard
from kobza.web.run import serving

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HERMES = (  # the shape of Qwen's template
    "{%- if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif -%}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor -%}'
    "<|im_end|>\n{% endfor -%}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Noise(Paged):
    """Logits by a table on the last two tokens, another for each adapter; `bias` on the ids that end a text."""

    def __init__(self, vocab_size, ends=(), bias=1.0, **sizes):
        super().__init__(vocab_size, **sizes)
        self.table = 2 * torch.randn(1021, vocab_size, generator=torch.Generator().manual_seed(0))
        self.table[:, list(ends)] += bias

    def logits_of(self, context, number):
        pair = (context[-1][0], context[-2][0] if len(context) > 1 else 0, number)
        return self.table[hash(pair) % 1021]


@functools.cache
def tokenizer():
    """Bytes and a few merges, with the marks of a chat."""
    return LibraryTokenizer.train(["Once upon a time there was a кобзар. " * 20, '{"name": "x"} ' * 9], 280, MARKS)


@functools.cache
def talk():
    return Talk(ChatTemplate(HERMES, eos="<|im_end|>", name="a test's template"), tokenizer(), [])


@functools.cache
def grammars():
    return Grammars(tokenizer(), ends())


def ends():
    return tuple(tokenizer().specials[name] for name in ("<|endoftext|>", "<|im_end|>"))


class Slow:
    """A runner that takes its time, so that a client can leave meanwhile."""

    def __init__(self, runner, seconds):
        self.runner, self.seconds = runner, seconds

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def forward(self, pieces):
        import time

        time.sleep(self.seconds)
        return self.runner.forward(pieces)


def engine(seconds=0.0, limits=None, **sizes):
    settings = {"n_blocks": 512, "block_size": 4, "max_seq_len": 640, "adapters": {"pirate": "b"}} | sizes
    runner = Noise(tokenizer().vocab_size, ends(), **settings)
    return Engine(Slow(runner, seconds) if seconds else runner, tokenizer(), limits=limits or Limits(max_running=16))


def service(made, **more):
    """Two models on one engine: plain with a template, and an adapter; and one without a template."""
    base = dict(
        engine=made,
        tokenizer=tokenizer(),
        ends=ends(),
        max_seq_len=made.runner.max_seq_len,
        talk=talk(),
        grammars=grammars(),
        sampling=SampleConfig(temperature=0.8, top_k=20, tokens=32),
        facts={"digest": "a" * 64, "size": 123, "parameters": 1_234_567, "quantization": "fp32", "family": "kobza"},
        created=1_700_000_000,
    )
    models = {
        "tiny": Served("tiny", **base),
        "tiny:pirate": Served("tiny:pirate", **base | {"adapter": "pirate"}),
        "bare/<b>model": Served("bare/<b>model", **base | {"talk": None, "grammars": None}),
    }
    return Service(models, **more)


@contextlib.contextmanager
def live(guard=None, **settings):
    """A server in a thread -> its address and its engine."""
    made, guard = engine(**settings), guard or Guard()
    made.start()
    try:
        with serving(make_app(service(made), guard), guard) as url:
            yield url, made
    finally:
        made.close()
    assert not made.pool.leaked()


@contextlib.contextmanager
def local(guard=None, made=None, **settings):
    """The app without a socket -> post(path, body) -> response."""
    made, guard = made or engine(), guard or Guard()
    made.start()
    app = make_app(service(made, **settings), guard)

    async def go(method, path, **more):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=30) as client:
            return await client.request(method, path, **more)

    try:
        yield lambda path, body=None, method="POST", **more: asyncio.run(
            go(method, path, **({"json": body} if body is not None else {}), **more)
        )
    finally:
        made.close()


def twin(ids, adapter=None, stops=(), **knobs):
    """What a fresh engine writes by itself: the text and the ids a server must give too."""
    sampling = SampleConfig(**{"temperature": 0.8, "top_k": 20, "tokens": 32} | knobs)
    asked = Request(ids=list(ids), sampling=sampling, ends=ends(), stops=tuple(stops), adapter=adapter, logprobs=3)
    return engine().run([asked])[0]
