"""Ollama's interface, by Ollama's own client: what it gets is what the engine writes."""

import json

import httpx
import pytest

pytest.importorskip("fastapi")
ollama = pytest.importorskip("ollama")
pytest.importorskip("llguidance")

from serve_http_cases import ends, live, talk, tokenizer, twin  # noqa: E402

MESSAGES = [{"role": "user", "content": "Who was the кобзар?"}]


@pytest.fixture(scope="module")
def url():
    with live() as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url):
    return ollama.Client(host=url)


def test_generate_raw_is_the_engines_own(client):
    ids = tokenizer().encode_prompt("Once upon")
    for options in (
        {"temperature": 0},
        {"seed": 3},
        {"seed": 3, "top_k": 5, "min_p": 0.05, "top_p": 0.9, "repeat_penalty": 1.1},
    ):
        knobs = {{"repeat_penalty": "repetition_penalty"}.get(name, name): value for name, value in options.items()}
        want = twin(ids, tokens=20, **knobs)
        got = client.generate("tiny", "Once upon", raw=True, options=options | {"num_predict": 20})
        assert got.response == want.text and got.done and got.done_reason == want.finish
        assert got.prompt_eval_count == len(ids) and got.eval_count == len(want.ids)
        assert got.total_duration > 0 and got.prompt_eval_duration + got.eval_duration <= got.total_duration
        parts = list(client.generate("tiny", "Once upon", raw=True, options=options | {"num_predict": 20}, stream=True))
        assert "".join(p.response for p in parts) == want.text and [p.done for p in parts][-2:] == [False, True]
    assert client.generate(
        "tiny:pirate:latest", "Once", raw=True, options={"temperature": 0, "num_predict": 9}
    ).response == (twin(tokenizer().encode_prompt("Once"), "pirate", temperature=0, tokens=9).text)
    assert client.generate("bare/<b>model", "Once", options={"temperature": 0, "num_predict": 9}).response == (
        twin(tokenizer().encode_prompt("Once"), temperature=0, tokens=9).text  # no template: as raw
    )


def test_generate_by_the_template_and_chat_are_the_same(client):
    options = {"num_predict": 20, "seed": 5}
    want = twin(talk().ids([{"role": "system", "content": "Be brief."}, *MESSAGES]), tokens=20, seed=5)
    got = client.generate("tiny", MESSAGES[0]["content"], system="Be brief.", options=options)
    chat = client.chat("tiny", [{"role": "system", "content": "Be brief."}, *MESSAGES], options=options)
    assert got.response == chat.message.content == want.text and chat.message.role == "assistant"
    parts = list(
        client.chat("tiny", [{"role": "system", "content": "Be brief."}, *MESSAGES], options=options, stream=True)
    )
    assert "".join(p.message.content for p in parts) == want.text and parts[-1].eval_count == len(want.ids)


def test_curl_as_in_ollamas_own_examples(url):
    """They send JSON and say nothing of it."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    body = {"model": "tiny", "prompt": "Once", "stream": False, "options": {"num_predict": 2}}
    for headers in (form, {}):
        assert httpx.post(url + "/api/generate", content=json.dumps(body), headers=headers).json()["eval_count"] <= 2


def test_num_predict_and_num_ctx(client):
    ids = tokenizer().encode_prompt("Once")
    stop = twin(ids, temperature=0, tokens=40).text[4:7]
    got = client.generate("tiny", "Once", raw=True, options={"temperature": 0, "stop": [stop]})
    assert stop not in got.response and got.done_reason == "stop"
    small = client.generate("tiny", "Once", raw=True, options={"num_ctx": len(ids) + 4, "num_predict": -1, "seed": 1})
    assert small.eval_count <= 4
    for options, words in (
        ({"num_ctx": 100_000}, "beyond the model's 640"),
        ({"num_predict": 1000}, "num_predict is 1,000"),
        ({"num_predict": 0}, "num_predict is 0"),
        ({"mirostat": 2}, "mirostat"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"repeat_last_n": 64}, "repeat_last_n"),
        ({"temperature": -1}, "temperature"),
    ):
        with pytest.raises(ollama.ResponseError, match=words) as error:
            client.generate("tiny", "Once", options=options)
        assert error.value.status_code == 400
    client.generate("tiny", "Once", options={"num_thread": 2, "num_gpu": 0, "num_predict": 1}, keep_alive="5m")


def test_format_json_and_schema(client):
    schema = {
        "type": "object",
        "properties": {"old": {"type": "boolean"}},
        "required": ["old"],
        "additionalProperties": False,
    }
    got = client.generate("tiny", "Once", format=schema, options={"seed": 1, "num_predict": 200})
    assert isinstance(json.loads(got.response)["old"], bool)
    got = client.chat("tiny", MESSAGES, format="json", options={"seed": 1, "num_predict": 400})
    assert got.done_reason == "length" or isinstance(json.loads(got.message.content), dict)


def test_tools(client, monkeypatch):
    """A model of noise calls nothing by itself, so the answer is put into its mouth: the reading is what is tested."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    said = client.chat("tiny", MESSAGES, tools=[tool], options={"num_predict": 12, "seed": 1})
    ids = talk().ids(MESSAGES, [tool])
    assert said.message.content == twin(ids, tokens=12, seed=1).text and not said.message.tool_calls
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Kyiv"}}\n</tool_call>'
    said_ids = [int(i) for i in tokenizer().encode(call)]
    of_text = "kobza.serve.http.service.Text.ids"
    monkeypatch.setattr(of_text, property(lambda _: said_ids, lambda *_: None), raising=False)
    for stream in (False, True):
        got = client.chat("tiny", MESSAGES, tools=[tool], options={"num_predict": 12, "seed": 1}, stream=stream)
        last = list(got)[-1] if stream else got
        assert last.message.tool_calls[0].function.name == "weather"
        assert last.message.tool_calls[0].function.arguments == {"city": "Kyiv"}
    monkeypatch.undo()
    again = [*MESSAGES, last.message, {"role": "tool", "tool_name": "weather", "content": "rain"}]
    assert client.chat("tiny", again, tools=[tool], options={"num_predict": 3}).done


def test_log_probabilities(client):
    want = twin(tokenizer().encode_prompt("Once"), tokens=8, seed=1)
    got = client.generate(
        "tiny", "Once", raw=True, logprobs=True, top_logprobs=2, options={"num_predict": 8, "seed": 1}
    )
    assert [t.logprob for t in got.logprobs] == pytest.approx([t.logprob for t in want.logprobs if t.id not in ends()])
    assert all(len(t.top_logprobs) == 2 for t in got.logprobs)


def test_what_is_here(client, url):
    rows = client.list().models
    assert [row.model for row in rows] == ["tiny", "tiny:pirate", "bare/<b>model"]
    assert rows[0].digest == "a" * 64 and rows[0].size == 123 and rows[0].details.parameter_size == "1.23M"
    about = client.show("tiny")
    assert about.capabilities == ["completion", "tools"] and about.modelinfo["kobza.context_length"] == 640
    assert "temperature 0.8" in about.parameters and client.show("bare/<b>model").capabilities == ["completion"]
    assert client.ps().models[0].context_length == 640
    assert httpx.get(url + "/api/version").json()["version"]
    assert client.generate("tiny", "").done_reason == "load" and client.chat("tiny", []).done_reason == "load"


def test_what_is_not_here_is_said(client):
    for ask, words, status in (
        (lambda: client.embed("tiny", "x"), "no embeddings", 400),
        (lambda: client.embeddings("tiny", "x"), "no embeddings", 400),
        (lambda: client.generate("nobody", "x"), "'nobody' is not served here", 404),
        (lambda: client.show("nobody"), "not served", 404),
        (lambda: client.generate("tiny", "x", suffix="y"), "suffix", 400),
        (lambda: client.generate("tiny", "x", template="{{ .Prompt }}"), "template", 400),
        (lambda: client.generate("tiny", "x", context=[1, 2]), "context", 400),
        (lambda: client.generate("tiny", "x", think=True), "think", 400),
        (lambda: client.generate("tiny", "x", images=["aGVsbG8="]), "images", 400),
        (lambda: client.chat("tiny", [{"role": "user", "content": "x", "images": ["aGVsbG8="]}]), "images", 400),
        (lambda: client.chat("bare/<b>model", MESSAGES), "no chat template", 400),
        (lambda: client.generate("bare/<b>model", "x", system="y"), "system", 400),
        (lambda: client.pull("tiny"), "nothing is at /api/pull", 404),
        (lambda: client.chat("tiny", [{"role": "judge", "content": "x"}]), "judge", 400),
    ):
        with pytest.raises((ollama.ResponseError, ValueError), match=words) as error:
            ask()
        assert getattr(error.value, "status_code", status) == status and "\n" not in str(error.value)
