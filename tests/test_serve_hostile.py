"""Bad input over HTTP: every one is a 4xx with one line that helps, nothing is lost, and the engine is idle afterwards."""

import asyncio
import json
import logging
import re
import threading
import time
from dataclasses import replace

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from hypothesis import HealthCheck, settings
from serve_http_cases import engine, live, local, service  # noqa: E402

from kobza.config import InputError
from kobza.serve.http.app import make_app
from kobza.serve.http.strict import strict_json
from kobza.serve.request import Limits
from kobza.web.guard import Guard

ASK = {"model": "tiny", "prompt": "Once", "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def ask():
    made = engine()
    with local(made=made) as post:
        yield post
        assert post("/v1/completions", ASK).status_code == 200  # it still works
        stats = made.stats()
        assert not stats.running and not stats.queued and not made.pool.leaked()


def line(response, status=400):
    """The message of a refusal, which must be one line in the body that clients know."""
    assert response.status_code == status, (response.status_code, response.text[:300])
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert isinstance(error, str) or set(error) == {"message", "type", "param", "code"}
    assert message and "\n" not in message and len(message) < 400 and "Traceback" not in message
    return message


# ---- what is no JSON -------------------------------------------------------------------------------------------------

BAD_JSON = {
    b"": "send one",
    b"{": "no JSON",
    b"[1]": "it must be a valid dictionary|no JSON object",
    b"null": "no JSON object|dictionary",
    b'"text"': "no JSON object|dictionary",
    b'{"a": 1,}': "line 1, column",
    b"\xff\xfe{}": "not UTF-8: byte 0xff",
    b'{"model": "\xc3("}': "not UTF-8",
    '{"model": "tiny"}'.encode("utf-16"): "UTF-8",
    b"[" * 10_000: "nested|no JSON",
    b'{"a":' * 10_000: "nested|no JSON",
    b'{"stop": ' + b"[" * 100 + b"]" * 100 + b"}": "nested deeper than 64",
    b'{"temperature": NaN}': "NaN",
    b'{"temperature": Infinity}': "Infinity",
    b'{"temperature": -Infinity}': "Infinity",
    b'{"temperature": 1e999}': "out of range",
    b'{"seed": ' + b"9" * 5000 + b"}": "over 19 digits",
    b'{"temperature": 0.' + b"1" * 5000 + b"}": "out of range",
    b'{"model": "a", "model": "b"}': "'model' stands twice",
    b'{"messages": [{"role": "a", "role": "b"}]}': "'role' stands twice",
    b'{"prompt": "\\ud800"}': "surrogate",
    b'{"\\udfff": 1}': "surrogate",
}


@pytest.mark.parametrize("raw", BAD_JSON, ids=lambda raw: repr(raw[:24]))
def test_what_is_no_json(ask, raw):
    for path in ("/v1/completions", "/v1/chat/completions", "/api/generate", "/api/chat"):
        answer = ask(path, content=raw, headers={"content-type": "application/json"})
        assert re.search(BAD_JSON[raw], line(answer)), line(answer)


def test_strict_json_reads_what_is_right():
    value = {"a": [1, -2.5, "їжак 🦔 \\ \u0000", None, True, {"b": {}}], "": 9_223_372_036_854_775_807}
    assert strict_json(json.dumps(value).encode()) == value
    assert strict_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert strict_json(b"[" * 60 + b"]" * 60)
    with pytest.raises(InputError):
        strict_json(b"[" * 70 + b"]" * 70)


def test_another_content_type_is_no_json(ask):
    answer = ask("/v1/completions", content=json.dumps(ASK).encode(), headers={"content-type": "text/plain"})
    assert "Content-Type: application/json" in line(answer)


# ---- what is no request ----------------------------------------------------------------------------------------------

REFUSED = [  # fields, and what the line must say
    ({"model": None}, "model"),
    ({"model": "nobody"}, "'nobody' is not served here"),
    ({"model": "../../etc/passwd"}, "not served"),
    ({"model": "tiny/../tiny"}, "not served"),
    ({"model": "\u0000"}, "not served"),
    ({"model": "<script>alert(1)</script>"}, "not served"),
    ({"model": "x" * 300}, "at most 200"),
    ({"prompt": ""}, "empty"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [-1]}, "prompt is .-1.; it must be .* 0"),
    ({"prompt": [10**9]}, "token id 1000000000"),
    ({"prompt": "Once " * 1000}, "the context|tokens hold"),
    ({"prompt": [1] * 640}, "context"),
    ({"prompt": "a" * 3_000_000}, "tokens hold"),
    ({"prompt": ["a"] * 64, "n": 2}, "128 texts and 64"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": -1}, "max_tokens is -1"),
    ({"max_tokens": 10**12}, "max_tokens is"),
    ({"max_tokens": 10_000}, "context holds 640; ask for at most"),
    ({"max_tokens": "4"}, "max_tokens"),
    ({"max_tokens": 4.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": 2.1}, "temperature is 2.1"),
    ({"temperature": 1e-300}, "at least 0.001"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_k": -1}, "top_k is -1"),
    ({"min_p": 2}, "min_p"),
    ({"min_tokens": 9, "max_tokens": 4}, "min_tokens is 9"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"no_repeat_ngram": -3}, "no_repeat_ngram"),
    ({"seed": -1}, "seed is -1"),
    ({"n": 0}, "n is 0"),
    ({"n": 65}, "n is 65"),
    ({"stop": ""}, "empty string"),
    ({"stop": ["a", ""]}, "empty string"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1000}, "1,000 characters"),
    ({"stop": [1]}, "stop"),
    ({"logit_bias": {"x": 1}}, "the key 'x'"),
    ({"logit_bias": {"-1": 1}}, "the key '-1'"),
    ({"logit_bias": {"999999": 1}}, "the key '999999'"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"logprobs": 21}, "logprobs is 21"),
    ({"best_of": 3}, "best_of 3 cannot be honoured: .*ask for n"),
    ({"suffix": "the end"}, "suffix"),
    ({"presence_penalty": 0.5}, "presence_penalty 0.5 cannot be honoured.*repetition_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"store": True}, "store"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"temprature": 1}, "unknown field 'temprature'; did you mean temperature"),
    ({"max_token": 1}, "did you mean max_tokens"),
    ({"__class__": 1}, "unknown field"),
    ({"model_config": {}}, "unknown field"),
    ({"stream_options": {"include_usage": True}}, "no effect without stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "did you mean include_usage"),
    ({"regex": "("}, "regex"),
    ({"grammar": "start: nothing_here"}, "grammar"),
    ({"regex": "a", "grammar": 'start: "a"'}, "both"),
    ({"response_format": {"type": "xml"}}, "'xml'"),
    ({"response_format": {"type": "json_schema"}}, "schema is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, "schema"),
]


@pytest.mark.parametrize("fields, words", REFUSED, ids=lambda x: repr(x)[:40])
def test_what_cannot_be_done_is_said(ask, fields, words):
    for stream in (False, True):
        more = {"stream": True} if stream and "stream_options" not in fields else {}
        answer = ask("/v1/completions", {**ASK, **fields, **more})
        message = line(answer, 404 if "not served" in words else 400)
        assert re.search(words, message), message


REFUSED_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": [1]}, "messages"),
    ({"messages": [{}]}, "role"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "judge"),
    ({"messages": [{"role": "user", "content": 5}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, "tokens hold"),
    ({"messages": [{"role": "user", "content": "Once " * 600}]}, "context|tokens hold"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
    ({"top_logprobs": 3}, "top_logprobs has no effect"),
    ({"tool_choice": "required"}, "tool_choice has no effect without tools"),
    ({"tools": [{"type": "function"}]}, r"tools\[0\]"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "regex": "a"}, "demands"),
    ({"functions": [{"name": "f"}]}, "send tools"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prompt": "x"}, "unknown field 'prompt'"),
]


@pytest.mark.parametrize("fields, words", REFUSED_CHAT, ids=lambda x: repr(x)[:40])
def test_what_a_chat_cannot_be(ask, fields, words):
    message = line(ask("/v1/chat/completions", {**CHAT, **fields}))
    assert re.search(words, message), message


def test_what_asks_for_nothing_is_let_through(ask):
    harmless = {
        "presence_penalty": 0,
        "best_of": 1,
        "user": "x",
        "store": False,
        "suffix": None,
        "n": None,
        "metadata": {"a": "b"},
    }
    assert ask("/v1/completions", {**ASK, **harmless, "frequency_penalty": 0.0}).status_code == 200
    plain = {
        "modalities": ["text"],
        "audio": None,
        "reasoning_effort": "none",
        "parallel_tool_calls": True,
        "service_tier": "auto",
    }
    assert ask("/v1/chat/completions", {**CHAT, **plain}).status_code == 200


def test_paths(ask):
    for path in (
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/%00",
        "/static/web/..%2f..%2fguard.py",
        "/nothing",
        "/v1/embeddings",
    ):
        assert "root" not in line(ask(path, method="GET"), 404)
    for path, method in (("/v1/completions", "GET"), ("/health", "POST"), ("/api/tags", "DELETE")):
        assert "is not for" in line(ask(path, method=method), 405)
    page = ask("/v1/models/<script>", method="GET")
    assert page.headers["content-type"] == "application/json" and page.headers["x-content-type-options"] == "nosniff"


def test_each_refusal_is_one_log_line(ask, caplog):
    caplog.set_level(logging.INFO)
    ask("/v1/completions", {**ASK, "temperature": -1})
    assert [r.levelname for r in caplog.records if r.name.startswith("kobza")] == ["INFO"]


# ---- how much --------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_a_429():
    body = {**ASK, "max_tokens": 400, "ignore_eos": True, "stream": True}
    ollamas = {"model": "tiny", "prompt": "Once", "options": {"num_predict": 400}}
    enough, threads = threading.Event(), []
    with live(seconds=0.05, limits=Limits(max_running=1, max_queue=2)) as (url, made):

        def busy():
            return made.stats().running + made.stats().queued

        def one_more():
            threads.append(threading.Thread(target=hang, args=(url, body, enough)))
            threads[-1].start()
            until(lambda: busy() == len(threads))

        try:
            one_more()
            one_more()
            several = httpx.post(url + "/v1/completions", json={**body, "n": 3})  # place for one of them: refused whole
            assert "the queue is full" in line(several, 429)
            until(lambda: busy() == 2)
            one_more()
            full = httpx.post(url + "/v1/completions", json=body)
            assert "the queue is full" in line(full, 429) and full.headers["retry-after"] == "1"
            assert full.json()["error"]["type"] == "rate_limit_error"
            assert "the queue is full" in line(httpx.post(url + "/api/generate", json=ollamas), 429)
        finally:
            enough.set()
            for thread in threads:
                thread.join()


def until(condition, seconds=5.0):
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def hang(url, body, enough):
    """Ask, and leave when it is enough; a request that waits gets nothing until then."""
    try:
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=10) as answer:
            for _ in answer.iter_lines():
                if enough.is_set():
                    return
    except httpx.HTTPError:
        pass


def test_ten_megabytes_and_a_time_limit():
    with live() as (url, _):
        assert "4,194,304 is the most" in line(
            httpx.post(url + "/v1/completions", json={**ASK, "prompt": "a" * (10 << 20)}), 413
        )
    slow = engine(seconds=0.05)
    with local(made=slow, seconds=0.4) as post:
        began = time.monotonic()
        got = post("/v1/completions", {**ASK, "max_tokens": 500, "ignore_eos": True}).json()
        assert got["choices"][0]["finish_reason"] == "length" and got["usage"]["completion_tokens"] < 100
        assert time.monotonic() - began < 5


def test_a_key_and_other_sites_pages():
    key, friend = "a-key-of-some-length", {"origin": "https://friend.example"}
    with local(Guard(host="0.0.0.0", keys=(key,), origins=("https://friend.example",))) as post:
        bearer = {"authorization": f"Bearer {key}"}
        assert "Bearer KEY" in line(post("/v1/completions", ASK), 401)
        assert post("/v1/completions", ASK, headers=bearer).status_code == 200
        assert post("/metrics", method="GET").status_code == post("/", method="GET").status_code == 401
        assert post("/health", method="GET").status_code == 200
        asks = friend | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        may = post("/v1/completions", method="OPTIONS", headers=asks)
        assert may.status_code == 200 and may.headers["access-control-allow-origin"] == "https://friend.example"
        assert post("/v1/completions", ASK, headers=bearer | friend).headers["access-control-allow-origin"]
        assert line(post("/v1/completions", ASK, headers=bearer | {"origin": "https://evil.example"}), 403)
    with local() as post:  # none unless it is asked for
        assert (
            "access-control-allow-origin"
            not in post("/v1/completions", ASK, headers={"origin": "http://127.0.0.1"}).headers
        )


def test_while_draining_health_says_so():
    guard = Guard()
    with local(guard) as post:
        assert post("/health", method="GET").json()["status"] == "ready"
        guard.traffic.draining = True
        gone = post("/health", method="GET")
        assert gone.status_code == 503 and gone.json()["status"] == "draining"
        assert "shutting down" in line(post("/v1/completions", ASK), 503)


def test_long_work_does_not_stop_the_loop():
    """A prompt that takes long to encode is encoded aside: others are answered meanwhile."""

    class Sleepy:
        def __getattr__(self, name):
            return getattr(made.tokenizer, name)

        def encode_prompt(self, text):
            time.sleep(1.5)
            return made.tokenizer.encode_prompt(text)

    async def go():
        served = service(made)
        served.models["tiny"] = replace(served.models["tiny"], tokenizer=Sleepy())
        transport = httpx.ASGITransport(app=make_app(served, Guard()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            began = time.monotonic()
            slow = asyncio.ensure_future(client.post("/v1/completions", json=ASK))
            await asyncio.sleep(0.1)
            assert (await client.get("/health")).status_code == 200
            assert time.monotonic() - began < 1.2 and not slow.done()
            assert (await slow).status_code == 200

    made = engine()
    made.start()
    try:
        asyncio.run(go())
    finally:
        made.close()


# ---- the document ----------------------------------------------------------------------------------------------------

try:
    import schemathesis
except ImportError:
    schemathesis = None


def document():
    """Our OpenAPI document, with an app behind it whose engine writes a few tokens at most."""
    made = engine(max_seq_len=40)
    made.start()
    guard = Guard(hosts=("testserver",))
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(service(made, most_tokens=4), guard))


if schemathesis is not None:
    from schemathesis import checks

    @document().parametrize()
    @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def test_the_document_holds(case):
        case.call_and_validate(
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
            ]
        )
