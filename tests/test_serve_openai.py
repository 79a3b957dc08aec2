"""OpenAI's interface, by OpenAI's own client: what it gets is what the engine writes."""

import asyncio
import json
import math

import httpx
import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")

from serve_http_cases import ends, live, talk, tokenizer, twin  # noqa: E402

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was the кобзар?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {  # closed: a model of noise would write keys until its tokens end
            "type": "object",
            "properties": {"city": {"enum": ["Kyiv", "Lviv"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def url():
    with live() as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def prompt(text):
    return tokenizer().encode_prompt(text)


# ---- completions -----------------------------------------------------------------------------------------------------


def test_models(client, url):
    assert [m.id for m in client.models.list()] == ["tiny", "tiny:pirate", "bare/<b>model"]
    assert client.models.retrieve("tiny:pirate").created == 1_700_000_000
    assert httpx.get(url + "/v1/models/bare/<b>model").json()["id"] == "bare/<b>model"
    with pytest.raises(openai.NotFoundError, match="did you mean tiny") as error:
        client.models.retrieve("tinny")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("model, adapter", [("tiny", None), ("tiny:pirate", "pirate")])
def test_a_completion_is_the_engines_own(client, model, adapter):
    for knobs in ({}, {"temperature": 0}, {"top_p": 0.7}, {"extra_body": {"min_p": 0.1, "top_k": 5}}):
        got = client.completions.create(model=model, prompt="Once upon", max_tokens=24, seed=7, **knobs)
        plain = knobs.get("extra_body", knobs)
        want = twin(prompt("Once upon"), adapter, tokens=24, seed=7, **plain)
        assert got.choices[0].text == want.text and got.choices[0].finish_reason == want.finish
        assert got.usage.prompt_tokens == len(prompt("Once upon")) and got.usage.completion_tokens == len(want.ids)
    assert got.system_fingerprint.startswith("kobza-aaaa")


def test_temperature_zero_is_zero(client):
    """Not the server's 0.8, which `temperature or default` would take."""
    texts = {
        client.completions.create(model="tiny", prompt="a", max_tokens=24, temperature=0, seed=s).choices[0].text
        for s in range(5)
    }
    assert texts == {twin(prompt("a"), temperature=0, tokens=24).text}
    warm = {
        client.completions.create(model="tiny", prompt="a", max_tokens=24, seed=s).choices[0].text for s in range(5)
    }
    assert len(warm) > 1  # and left out it is the server's
    assert (
        len({client.completions.create(model="tiny", prompt="a", max_tokens=24).choices[0].text for _ in range(5)}) > 1
    )


def test_a_stream_joined_is_the_whole(client):
    asked = dict(model="tiny", prompt="Once", max_tokens=40, seed=3, logprobs=2)
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == whole.choices[0].finish_reason
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens and not parts[-1].choices
    told = [p.choices[0].logprobs for p in parts if p.choices and p.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [x for t in told for x in getattr(t, name)] == getattr(whole.choices[0].logprobs, name)


def test_prompts_in_four_forms_and_n(client):
    ids = [prompt("Once"), prompt("a time")]
    asked = dict(model="tiny", max_tokens=8, temperature=0)
    one = client.completions.create(prompt="Once", **asked).choices[0].text
    two = client.completions.create(prompt="a time", **asked).choices[0].text
    for form in (["Once", "a time"], ids):
        got = client.completions.create(prompt=form, **asked)
        assert [c.text for c in got.choices] == [one, two] and [c.index for c in got.choices] == [0, 1]
        assert got.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(prompt=ids[0], **asked).choices[0].text == one
    got = client.completions.create(model="tiny", prompt=["Once", "a time"], n=3, seed=5, max_tokens=8)
    want = [twin(row, tokens=8, seed=5 + i).text for row in ids for i in range(3)]
    assert [c.text for c in got.choices] == want and got.usage.prompt_tokens == sum(map(len, ids))
    streamed = [""] * 6
    for part in client.completions.create(
        model="tiny", prompt=["Once", "a time"], n=3, seed=5, max_tokens=8, stream=True
    ):
        streamed[part.choices[0].index] += part.choices[0].text
    assert streamed == want


def test_echo_tells_the_prompts_own_log_probabilities(client):
    text = "Once upon a кобзар"
    ids = prompt(text)
    for tokens in (0, 3):
        asked = dict(model="tiny", prompt=text, max_tokens=tokens, echo=True, logprobs=2, seed=1)
        got = client.completions.create(**asked)
        told = got.choices[0].logprobs
        assert got.choices[0].text.startswith(text) and (tokens or got.choices[0].text == text)
        assert got.usage.completion_tokens <= tokens and len(told.tokens) >= len(ids)
        assert told.token_logprobs[0] is None and all(p < 0 for p in told.token_logprobs[1:])
        assert told.text_offset[: len(ids)] == sorted(told.text_offset[: len(ids)]) and told.text_offset[0] == 0
        assert all(len(t) <= 2 for t in told.top_logprobs[1:])
        parts = list(client.completions.create(**asked, stream=True))
        assert "".join(p.choices[0].text for p in parts) == got.choices[0].text
        assert [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.tokens] == told.tokens
    want = twin(ids, tokens=3, seed=1)
    assert told.token_logprobs[len(ids) :] == pytest.approx(
        [t.logprob for t in want.logprobs][: len(told.tokens) - len(ids)]
    )
    parts = list(client.completions.create(model="tiny", prompt=text, max_tokens=2, echo=True, stream=True))
    assert parts[0].choices[0].text == text
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=1, echo=True).choices[0].text.startswith(text)


def test_stops_biases_and_our_own_knobs(client):
    free = client.completions.create(model="tiny", prompt="Once", max_tokens=40, temperature=0).choices[0].text
    stop = free[5:8]
    cut = client.completions.create(model="tiny", prompt="Once", max_tokens=40, temperature=0, stop=[stop, "\0never"])
    assert cut.choices[0].text == free[: free.index(stop)] and cut.choices[0].finish_reason == "stop"
    parts = client.completions.create(model="tiny", prompt="Once", max_tokens=40, temperature=0, stop=stop, stream=True)
    assert "".join(p.choices[0].text for p in parts) == cut.choices[0].text
    a = tokenizer().encode("a").tolist()[0]
    biased = client.completions.create(
        model="tiny", prompt="Once", max_tokens=9, temperature=0, logit_bias={str(a): 100}
    )
    assert biased.choices[0].text == "a" * 9 and biased.choices[0].finish_reason == "length"
    on = {"ignore_eos": True, "min_tokens": 60, "no_repeat_ngram": 3, "repetition_penalty": 1.2}
    long = client.completions.create(model="tiny", prompt="Once", max_tokens=60, seed=1, extra_body=on)
    assert long.usage.completion_tokens == 60
    for body in ({"regex": "[0-9]{4}-[0-9]{2}"}, {"grammar": 'start: /[0-9]{4}/ "-" /[0-9]{2}/'}):
        date = client.completions.create(model="tiny", prompt="Once", max_tokens=60, extra_body=body).choices[0].text
        assert len(date) == 7 and date[4] == "-" and date.replace("-", "").isdigit()


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_the_templates_ids_and_the_engines_text(client):
    ids = talk().ids(MESSAGES)
    for knobs in ({"temperature": 0}, {"seed": 4}):
        got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=30, **knobs)
        want = twin(ids, tokens=30, **knobs)
        assert got.choices[0].message.content == want.text and got.choices[0].finish_reason == want.finish
        assert got.usage.prompt_tokens == len(ids) and got.usage.total_tokens == len(ids) + len(want.ids)
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=30, stream=True, stream_options={"include_usage": True}, **knobs
        )
        parts = list(stream)
        assert parts[0].choices[0].delta.role == "assistant" and parts[-2].choices[0].finish_reason == want.finish
        assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == want.text
        assert parts[-1].usage.prompt_tokens_details.cached_tokens > 0  # read the first time
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="bare/<b>model", messages=MESSAGES)
    unbounded = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1
    )  # up to its end, or the context's
    assert unbounded.choices[0].finish_reason in ("stop", "length")


def test_log_probabilities_of_a_chat(client):
    ids = talk().ids(MESSAGES)
    got = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, seed=2, logprobs=True, top_logprobs=3
    )
    want = twin(ids, tokens=12, seed=2)
    told, kept = got.choices[0].logprobs.content, [t for t in want.logprobs if t.id not in ends()]
    assert [t.logprob for t in told] == pytest.approx([t.logprob for t in kept])
    assert b"".join(bytes(t.bytes) for t in told).decode("utf-8", "replace") == want.text
    assert all(
        len(t.top_logprobs) == 3 and math.isclose(t.top_logprobs[0].logprob, max(x.logprob for x in t.top_logprobs))
        for t in told
    )
    parts = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, seed=2, logprobs=True, top_logprobs=3, stream=True
    )
    assert [t for p in parts if p.choices[0].logprobs for t in p.choices[0].logprobs.content] == told


def test_what_json_cannot_hold_is_told_as_openai_does():
    """A token that the model never writes has a log-probability of -inf, which is no JSON."""
    with live() as (url, made):
        made.runner.table[:, 10:] = float("-inf")
        for path, more in (
            ("completions", {"prompt": "1", "logprobs": 20}),
            ("chat/completions", {"messages": MESSAGES}),
        ):
            body = {"model": "tiny", "max_tokens": 4} | more
            body |= {"logprobs": True, "top_logprobs": 20} if "messages" in more else {}
            got = httpx.post(f"{url}/v1/{path}", json=body)
            assert got.status_code == 200 and got.json()["choices"][0]["logprobs"]


def test_json_by_schema_and_any(client):
    pydantic = pytest.importorskip("pydantic")

    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=8)
        old: bool

    got = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=City, max_tokens=300, seed=1)
    assert isinstance(got.choices[0].message.parsed, City)
    free = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=300, seed=1
    )
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content), dict)
    with pytest.raises(openai.BadRequestError):
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=bad)


def test_tools_are_called(client):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        asked = dict(model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=350, seed=1)
        got = client.chat.completions.create(**asked).choices[0]
        call = got.message.tool_calls[0]
        assert got.finish_reason == "tool_calls" and call.function.name == "weather" and got.message.content is None
        assert json.loads(call.function.arguments)["city"] in ("Kyiv", "Lviv")
        parts = list(client.chat.completions.create(**asked, stream=True))
        calls = [c for p in parts for c in p.choices[0].delta.tool_calls or []]
        assert calls[0].function.name == "weather" and parts[-1].choices[0].finish_reason == "tool_calls"
        again = [
            *MESSAGES,
            got.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ]
        assert client.chat.completions.create(model="tiny", messages=again, tools=[TOOL], max_tokens=5).choices
    words = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[TOOL], max_tokens=20, seed=1)
    assert words.choices[0].message.content is not None  # a model of noise calls nothing by itself
    none = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice="none", max_tokens=9, seed=1
    )
    plain = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, seed=1)
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens < words.usage.prompt_tokens  # not even told of them


def test_many_at_once_get_their_own(url):
    async def go():
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
            one = client.completions.create
            return await asyncio.gather(
                *(one(model="tiny", prompt=f"Once {i}", max_tokens=16, seed=i) for i in range(24))
            )

    for i, got in enumerate(asyncio.run(go())):
        assert got.choices[0].text == twin(prompt(f"Once {i}"), tokens=16, seed=i).text


# ---- the server ------------------------------------------------------------------------------------------------------


def test_health_metrics_and_the_page(client, url):
    from prometheus_client.parser import text_string_to_metric_families

    client.completions.create(model="tiny", prompt="Once upon a", max_tokens=4)
    assert httpx.get(url + "/health").json() == {"status": "ready", "models": ["tiny", "tiny:pirate", "bare/<b>model"]}
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(url + "/metrics").text)}
    numbers = {s.name: s.value for f in families.values() for s in f.samples if set(s.labels) <= {"model"}}
    assert (
        numbers["kobza_tokens_out_total"] > 0 and numbers["kobza_tokens_in_total"] > 0 and numbers["kobza_queued"] == 0
    )
    assert {"kobza_prefix_hits_total", "kobza_accepted_total", "kobza_forwards_total"} <= set(numbers)
    first = families["kobza_time_to_first_token_seconds"].samples
    assert next(s.value for s in first if s.name.endswith("_count")) > 0
    paths = {s.labels["path"]: s.value for s in families["kobza_requests"].samples if s.name.endswith("_total")}
    assert paths["/v1/completions"] > 0
    blocks = {s.labels["state"]: s.value for s in families["kobza_cache_blocks"].samples}
    assert set(blocks) == {"used", "free", "cached"} and min(blocks.values()) >= 0 and sum(blocks.values()) == 512
    page = httpx.get(url + "/", headers={"accept": "text/html"}).text
    assert "bare/&lt;b&gt;model" in page and "<b>model" not in page and "/v1/chat/completions" in page
    assert httpx.get(url + "/docs").status_code == 404


def test_a_client_that_hangs_up_frees_its_slot():
    with live(seconds=0.02) as (url, made):
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 500, "ignore_eos": True}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(url + "/v1/completions", json=body | {"n": 4}, timeout=0.4)
        wait_idle(made)
        with httpx.stream("POST", url + "/v1/completions", json=body | {"n": 4, "stream": True}) as answer:
            next(answer.iter_lines())
        wait_idle(made)
        assert made.stats().finished["cancelled"] == 8
        assert httpx.post(url + "/v1/completions", json=body | {"max_tokens": 2}).status_code == 200


def wait_idle(made, seconds=5.0):
    import time

    end = time.monotonic() + seconds
    while (made.stats().running or made.stats().queued) and time.monotonic() < end:
        time.sleep(0.01)
    assert not made.stats().running and not made.stats().queued
