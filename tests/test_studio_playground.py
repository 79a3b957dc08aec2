"""The playground: what it writes is what generate writes, its stages are generate's own, and in a browser all of it by hand."""

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from fastapi.testclient import TestClient  # noqa: E402
from test_studio_app import HOSTILE, SIZES, chromium, opened, serving  # noqa: E402, F401

from kobza.checkpoint import Loaded  # noqa: E402
from kobza.config import InputError, ModelConfig, RunConfig, SampleConfig  # noqa: E402
from kobza.formats.chat import ChatEncoder  # noqa: E402
from kobza.formats.template import ChatTemplate  # noqa: E402
from kobza.generate import generate, processors  # noqa: E402
from kobza.model import build  # noqa: E402
from kobza.recipes.generate import write_text  # noqa: E402
from kobza.studio import playground  # noqa: E402
from kobza.studio.app import Name, make_app  # noqa: E402
from kobza.studio.playground_ask import KNOBS  # noqa: E402
from kobza.studio.playground_stages import OFF, Kept, drawn, level, stages  # noqa: E402
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer  # noqa: E402

TEXT = "the quick brown fox jumps over the lazy dog\nїжак біжить 🦔 <img src=x onerror=alert(1)>\n" * 6
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def loaded_of(tokenizer, seed=1, sharp=0.3, context=64):
    """A small model with opinions, as a checkpoint holds it."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=context, n_layer=2, n_head=2, n_embd=32)
    model, generator = build(config, seed=seed).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(sharp * torch.randn(parameter.shape, generator=generator))
    return Loaded(model, RunConfig(model=config), tokenizer, {}, Path("runs/some/checkpoints/step-1"))


def playable(tokenizer, chat=False, **kind):
    loaded, encode = loaded_of(tokenizer, **kind), None
    if chat:
        encoder = ChatEncoder(ChatTemplate(TURNS), tokenizer)
        encode = lambda messages: encoder.encode(messages, add_generation_prompt=True)  # noqa: E731
    return SimpleNamespace(loaded=loaded, ends=[], chat=encode)


class Shelf:
    """Models by name, all open."""

    def __init__(self, **models):
        self.models = {name.replace("_", "/"): model for name, model in models.items()}
        self.models[HOSTILE] = next(iter(models.values()))

    def names(self):
        return [Name(name, "run", HOSTILE) for name in self.models]

    def open(self, name):
        if name not in self.models:
            raise InputError(f"no model {name!r} here")
        return self.models[name]


@pytest.fixture(scope="module")
def shelf():
    bpe = LibraryTokenizer.train([TEXT], 300)
    chars = CharTokenizer.train([TEXT])
    return Shelf(
        chars=playable(chars), bpe=playable(bpe, chat=True, context=256), bytes=playable(ByteTokenizer(), seed=2)
    )


@pytest.fixture(scope="module")
def app(shelf):
    return make_app([playground.room(shelf)])


@pytest.fixture(scope="module")
def client(app):
    return TestClient(app)


def written(client, **asked):
    """The events of /write."""
    answer = client.post("/playground/write", data=asked)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def tokens_of(events):
    return [event for event in events if "id" in event]


def text_of(events):
    return "".join(event["t"] for event in tokens_of(events)) + events[-1]["end"]["rest"]


# ---- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chars", "bpe", "bytes"])
@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0}, {"temperature": 1.3, "top_k": 7, "top_p": 0.8, "min_p": 0.05}]
)
def test_the_same_seed_writes_the_same_text_as_kobza_generate(client, shelf, name, knobs):
    config = SampleConfig(tokens=90, seed=5, **knobs)  # past the context of 64 of two of them
    loaded, parts = shelf.open(name).loaded, []
    expected = write_text(loaded, loaded.tokenizer.encode_prompt("the fox"), [], config, parts.append)
    events = written(client, model=name, prompt="the fox", **{knob: getattr(config, knob) for knob in KNOBS})
    assert text_of(events) == expected and len(tokens_of(events)) == 90
    assert events[-1]["end"]["why"] == "length"


def test_a_space_at_the_joint_stays_where_a_tokenizer_puts_one_before_a_text():
    content = json.loads(LibraryTokenizer.train([TEXT], 300).to_json())
    content["pre_tokenizer"]["add_prefix_space"] = True
    model = playable(LibraryTokenizer(json.dumps(content)))
    client, tokenizer = TestClient(make_app([playground.room(Shelf(prefixed=model))])), model.loaded.tokenizer
    assert tokenizer.prefix == b" "
    spaced = next(i for i, piece in enumerate(tokenizer.pieces) if piece.startswith(b" ") and len(piece) > 1)
    with torch.no_grad():
        model.loaded.model.lm_head.weight[spaced] *= 30
    seeds = [tokens_of(written(client, model="prefixed", prompt="fox", tokens=1, seed=seed))[0] for seed in range(30)]
    assert {event["t"] for event in seeds if event["id"] == spaced} == {tokenizer.pieces[spaced].decode()}


def test_a_token_has_the_models_own_probability_colour_and_rank(client, shelf):
    loaded = shelf.open("chars").loaded
    config = SampleConfig(tokens=12, temperature=1.8, seed=3)
    events = tokens_of(written(client, model="chars", prompt="dog", tokens=12, temperature=1.8, seed=3))
    for event, choice in zip(events, generate(loaded.model, [events_ids(client)], config), strict=True):
        p = choice.logits[0].softmax(-1)
        assert event["id"] == choice.ids[0]
        assert math.isclose(event["p"], float(p[event["id"]]), rel_tol=1e-6)
        assert event["c"] == level(event["p"]) and event["rank"] == int((p > p[event["id"]]).sum()) + 1
    assert [level(p) for p in (0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0)] == [0, 1, 2, 3, 4, 5, 5]


def events_ids(client):
    return written(client, model="chars", prompt="dog", tokens=1)[0]["start"]["ids"]


def test_going_on_from_a_rival_keeps_the_ids_before_it(client, shelf):
    tokenizer = shelf.open("bytes").loaded.tokenizer
    ids = [*tokenizer.encode("fox ").tolist(), 0xD1]  # half of the letter і
    events = written(client, model="bytes", ids=",".join(map(str, ids)), take=0x96, tokens=5, temperature=0)
    assert events[0]["start"]["ids"] == ids  # not what a string of them would encode to
    first = tokens_of(events)[0]
    assert (first["id"], first["t"]) == (0x96, "і")
    config = SampleConfig(tokens=5, temperature=0)
    greedy = [choice.ids[0] for choice in generate(shelf.open("bytes").loaded.model, [[*ids, 0x96]], config)]
    assert [event["id"] for event in tokens_of(events)] == [0x96, *greedy]


def test_a_text_ends_at_an_end_also_one_that_is_taken(client, shelf, monkeypatch):
    end = tokens_of(written(client, model="chars", prompt="dog", tokens=1, temperature=0))[0]["id"]
    monkeypatch.setattr(shelf.models["chars"], "ends", [end])
    events = written(client, model="chars", prompt="dog", temperature=0)
    assert [event["id"] for event in tokens_of(events)] == [end] and events[-1]["end"]["why"] == "end"
    taken = written(client, model="chars", prompt="fox", take=end, temperature=0)
    assert [event["id"] for event in tokens_of(taken)] == [end] and taken[-1]["end"]["why"] == "end"


def test_a_chat_is_encoded_by_the_models_template(client, shelf):
    said = [{"role": "user", "content": "fox?"}]
    start = written(client, model="bpe", messages=json.dumps(said), system="be brief", tokens=1)[0]["start"]
    ids = shelf.open("bpe").chat([{"role": "system", "content": "be brief"}, *said])
    assert start["ids"] == ids and start["command"] == ""
    assert shelf.open("bpe").loaded.tokenizer.decode(ids) == "[system]be brief\n[user]fox?\n[assistant]"


def test_the_line_for_a_terminal_quotes_and_names_what_differs(client):
    line = written(client, model="chars", prompt="the dog", tokens=3, temperature=0.5)[0]["start"]["command"]
    assert line == "kobza generate runs/some/checkpoints/step-1 --prompt 'the dog' --temperature 0.5 --tokens 3"


# ---- the stages --------------------------------------------------------------------------------------------------------


def test_knob_by_knob_is_the_chain_of_generate():
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        logits, ids = 3 * torch.randn(50, generator=generator), [1, 4, 4, 7]
        knobs = dict(
            temperature=0.3 + 0.1 * seed, top_k=seed * 3 % 40, top_p=0.5 + 0.02 * seed, min_p=0.01 * (seed % 4)
        )
        config = replace(OFF, repetition_penalty=1 + 0.1 * (seed % 3), **knobs)
        scores = logits[None]
        for process in processors(config, (), [4]):
            scores = process(scores, [ids])
        shown = stages(logits, ids, config)
        assert torch.equal(shown[-1].p, scores[0].softmax(-1))
        assert shown[-1].left == int(scores.isfinite().sum())
        for before, after in zip(shown, shown[1:], strict=False):
            gone = (after.p == 0) & (before.p > 0)
            assert math.isclose(after.removed, float(before.p[gone].sum()), abs_tol=1e-6)


def test_figures_of_a_distribution_one_can_check_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    own, temperature, top_k, top_p, _ = stages(logits, [0], replace(OFF, top_k=2, top_p=0.6))
    assert own.left == 4 and math.isclose(own.bits, 1.75, abs_tol=1e-6)
    assert torch.equal(temperature.p, own.p) and temperature.removed == 0
    assert top_k.left == 2 and math.isclose(top_k.removed, 0.25, abs_tol=1e-6)
    assert top_p.left == 1 and math.isclose(top_p.removed, 1 / 3, abs_tol=1e-6) and top_p.bits == 0
    greedy = stages(logits, [0], replace(OFF, temperature=0, top_k=2))
    assert [stage.name for stage in greedy] == ["the model's own", "greedy"]
    assert greedy[-1].left == 1 and math.isclose(greedy[-1].removed, 0.5, abs_tol=1e-6)


def test_the_marker_falls_on_the_token_that_generate_draws(client, shelf):
    for seed in range(12):
        config = SampleConfig(tokens=20, temperature=1.5, top_k=30, seed=seed)
        loaded, ids = shelf.open("chars").loaded, events_ids(client)
        for at, choice in zip(range(3), generate(loaded.model, [ids], config), strict=False):
            _, hit = drawn(stages(choice.logits[0], ids, config)[-1].scores, config, at)
            assert hit == choice.ids[0]
            ids = [*ids, hit]


def test_a_knob_that_moves_costs_no_forward_and_little_time(client, monkeypatch):
    calls, forward = [], playground.seen.__globals__["Kept"].logits.__globals__["prefill"]
    monkeypatch.setitem(Kept.logits.__globals__, "prefill", lambda *a: calls.append(1) or forward(*a))
    seconds = []
    for i in range(12):
        began = time.perf_counter()
        answer = client.post("/playground/bars", data={"model": "bpe", "prompt": "over the", "temperature": 0.1 * i})
        seconds.append(time.perf_counter() - began)
        assert answer.status_code == 200
    assert len(calls) == 1
    assert sorted(seconds)[len(seconds) // 2] < 0.25  # 5 ms where nobody else computes


def test_kept_places_are_few_and_of_the_model_that_is_open(shelf):
    kept, old, new = Kept(places=3), shelf.open("chars"), playable(shelf.open("chars").loaded.tokenizer, seed=9)
    first = kept.logits("a", old, [1, 2])
    assert kept.logits("a", old, [1, 2]) is first
    assert not torch.equal(kept.logits("a", new, [1, 2]), first)  # trained on meanwhile
    for i in range(9):
        kept.logits("a", old, [i])
    assert len(kept._kept) == 3


# ---- what a hostile or a broken one sends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"temperature": "nan"}, "temperature is nan"),
        ({"temperature": "inf"}, "temperature is inf; it must be at most 2"),
        ({"temperature": "-1"}, "temperature is -1"),
        ({"temperature": "warm"}, "temperature is 'warm'; it must be a number"),
        ({"top_k": "1.5"}, "top_k is '1.5'; it must be a whole number"),
        ({"top_k": "9" * 5000}, "top_k is '9999"),
        ({"top_p": "0"}, "top-p is 0.0; it must be in (0, 1]"),
        ({"top_p": "nan"}, "top_p is nan"),
        ({"min_p": "1e999"}, "min_p is inf"),
        ({"repetition_penalty": "inf"}, "repetition_penalty is inf"),
        ({"tokens": "1000000000"}, "tokens is 1e+09; it must be at most 4,096"),
        ({"tokens": "0"}, "tokens is 0"),
        ({"seed": str(2**63)}, "seed is 9223372036854775808"),
        ({"seed": "-1"}, "seed is -1"),
        ({"prompt": "dog " * 17}, "the text has 68 tokens and the context of chars is 64"),
        ({"prompt": "x" * 300_000}, "the prompt has 300,000 characters; at most 200,000"),
        ({"prompt": "Ж"}, "not in the vocabulary"),
        ({"ids": "1,2,99999"}, "ids has 99999"),
        ({"ids": "1,,2"}, "ids is '1,,2'"),
        ({"ids": "1;drop"}, "ids is '1;drop'"),
        ({"ids": "-1"}, "ids is '-1'"),
        ({"take": "-1"}, "take has -1"),
        ({"take": "x"}, "take is 'x'"),
        ({"draw": "9999"}, "draw is 9999"),
        ({"messages": "[]"}, "chars has no chat template; choose Complete"),
        ({"model": "../../etc/passwd"}, "no model '../../etc/passwd' here"),
        ({"model": ""}, "no model is named"),
        ({"top_q": "1"}, "there is no field 'top_q'; did you mean top_"),
        ({"model": "bpe", "messages": "[" * 100_000}, "messages is '[[["),
        ({"model": "bpe", "messages": "[]"}, "messages must be 1 to 200"),
        ({"model": "bpe", "messages": '[{"role": "root", "content": "x"}]'}, "messages must be 1 to 200"),
        ({"model": "bpe", "messages": '[{"role": "user", "content": 1}]'}, "messages must be 1 to 200"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("path", ["bars", "write"])
def test_bad_input_is_refused_in_one_line(client, path, asked, words):
    answer = client.post(f"/playground/{path}", data={"model": "chars", "prompt": "dog"} | asked)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and words in message and "\n" not in message and "--t" not in message


def test_a_body_that_is_too_large_or_no_form(client):
    assert client.post("/playground/bars", content=b"prompt=" + b"a" * (3 << 20)).status_code == 413
    for body in (b"\xff\xfe=1", b"prompt=%ff", b"&".join(b"a%d=1" % i for i in range(99)), b"\x00" * 50):
        assert client.post("/playground/bars", content=body).status_code == 400, body


def test_a_model_that_diverged_says_so(shelf):
    broken = playable(shelf.open("chars").loaded.tokenizer)
    with torch.no_grad():
        broken.loaded.model.embed.weight.fill_(float("nan"))
    client = TestClient(make_app([playground.room(Shelf(nan=broken))]))
    asked = {"model": "nan", "prompt": "dog"}
    assert "diverged" in client.post("/playground/bars", data=asked).json()["error"]["message"]
    assert "diverged" in written(client, **asked)[-1]["error"]


def test_script_stays_text_in_names_prompts_and_the_vocabulary(client):
    page = client.get("/playground", params={"model": HOSTILE}).text
    assert "<img src=x" not in page and page.count("&lt;img") >= 4 and "selected" in page
    bars = client.post("/playground/bars", data={"model": HOSTILE, "prompt": "<img src=x onerror=alert(1)>"}).text
    assert "<img" not in bars and "onerror" in bars
    piece = playable(LibraryTokenizer.train([HOSTILE * 50], 400))
    text = TestClient(make_app([playground.room(Shelf(piece=piece))])).post(
        "/playground/bars", data={"model": "piece", "prompt": "<", "top_k": 0}
    )
    assert text.status_code == 200 and "<img" not in text.text


def test_no_model_yet_is_said(app):
    empty = SimpleNamespace(names=lambda: [], open=None)
    text = TestClient(make_app([playground.room(empty)])).get("/playground").text
    assert "There is no model yet" in text and "<form" not in text


# ---- over a real connection ----------------------------------------------------------------------------------------------


def test_whoever_hangs_up_ends_the_text_and_frees_its_place(shelf, monkeypatch):
    """Without `finally` in Lines the third request would be refused for ever."""
    httpx = pytest.importorskip("httpx")
    steps = []

    def slow(*args, **kwargs):
        for choice in generate(*args, **kwargs):
            steps.append(1)
            time.sleep(0.01)
            yield choice

    monkeypatch.setattr("kobza.studio.playground_write.generate", slow)
    asked = {"model": "chars", "prompt": "dog", "tokens": 4000}
    with serving(make_app([playground.room(shelf, at_once=1)])) as address:
        for _ in range(3):
            with httpx.stream("POST", f"{address}/playground/write", data=asked) as answer:
                assert answer.status_code == 200
                lines = answer.iter_lines()  # kept: without it httpx hangs up
                next(lines)
                refused = httpx.post(f"{address}/playground/write", data=asked)
                assert refused.status_code == 429 and refused.headers["retry-after"]
            until = time.monotonic() + 5
            while time.monotonic() < until:  # the place is free again
                before = len(steps)
                time.sleep(0.15)
                if len(steps) == before:
                    break
            else:
                pytest.fail("it writes on for nobody")


# ---- in a browser --------------------------------------------------------------------------------------------------------

IDLE = "#stop:disabled"


def ready(page, address, **query):
    page.goto(f"{address}/playground" + "".join(f"?{name}={value}" for name, value in query.items()))
    page.locator("table.bars").wait_for()


def write(page, prompt, tokens=40, button="#go"):
    page.fill("#prompt", prompt)
    slide(page, "tokens", tokens)
    page.click(button)
    page.locator(".pane .status", has_text="second").last.wait_for()
    page.locator(IDLE).wait_for()


def slide(page, knob, value):
    page.locator(f"#{knob}").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})) }",
        str(value),
    )


def figures(page):
    return page.locator("table.bars tbody .last .figure").all_text_contents()


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_drag_a_slider_and_the_bars_follow(chromium, app, size):  # noqa: F811
    with serving(app) as address, opened(chromium, address, size) as page:
        ready(page, address)
        before = figures(page)
        knob = page.locator("#temperature")
        knob.evaluate("one => one.scrollIntoView({block: 'center'})")
        box = knob.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] / 2)
        page.mouse.down()
        for share in (0.5, 0.7, 0.9):
            page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)
        page.mouse.up()
        value = page.locator("output[for=temperature]").text_content()
        assert float(value) > 1.5
        page.locator("table.bars em", has_text=re.compile(f"^{float(value):g}$")).first.wait_for(state="attached")
        assert figures(page) != before
        slide(page, "top_k", 3)
        page.locator("table.bars tbody .gone").first.wait_for(state="attached")
        assert page.locator("table.bars tfoot tr").first.locator(".last").text_content() == "3"


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_write_press_a_token_and_go_on_from_a_rival(chromium, app, shelf, size):  # noqa: F811
    with serving(app) as address, opened(chromium, address, size) as page:
        ready(page, address)
        write(page, "the fox")
        loaded = shelf.open("chars").loaded
        config = SampleConfig(tokens=40)
        expected = write_text(loaded, loaded.tokenizer.encode_prompt("the fox"), [], config, lambda _: None)
        assert page.locator(".answer").text_content() == expected
        chips = page.locator(".answer .chip")
        assert chips.count() == 40 and "kobza generate" in page.locator(".line pre").text_content()
        chips.nth(9).click()
        page.locator("tr.chosen").wait_for()
        assert page.locator(".chip.chosen").text_content() == expected[9]
        page.get_by_text(f"{len('the fox') + 9} of 64 tokens").wait_for()  # the bars look at what stands before it
        rival = page.locator("tr:not(.chosen) .take").first
        taken = rival.get_attribute("data-take")
        rival.click()
        page.locator(".branches button").nth(1).wait_for()
        page.locator(IDLE).wait_for()
        chips.nth(49).wait_for()
        text = page.locator(".answer").text_content()
        assert text[:9] == expected[:9] and text[9] == loaded.tokenizer.decode([int(taken)]) != expected[9]
        page.locator(".branches button").first.click()  # and back
        assert page.locator(".answer").text_content() == expected


@pytest.mark.browser
def test_greedy_beside_drawn_and_two_models(chromium, app, shelf):  # noqa: F811
    with serving(app) as address, opened(chromium, address) as page:
        ready(page, address)
        page.get_by_text("+ greedy").click()
        write(page, "the fox", 25)
        loaded = shelf.open("chars").loaded
        ids = loaded.tokenizer.encode_prompt("the fox")
        texts = [write_text(loaded, ids, [], SampleConfig(tokens=25, temperature=t), lambda _: None) for t in (0.7, 0)]
        assert page.locator(".answer").all_text_contents() == texts
        page.get_by_text("Two models").click()
        assert page.input_value("#other") != page.input_value("#model")
        page.select_option("#other", "bytes")
        write(page, "the fox", 25)
        other = shelf.open("bytes").loaded
        ids = other.tokenizer.encode_prompt("the fox")
        beside = write_text(other, ids, [], SampleConfig(tokens=25), lambda _: None)
        assert page.locator(".answer").all_text_contents() == [texts[0], beside]
        boxes = [page.locator(".pane").nth(i).bounding_box() for i in (0, 1)]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
        page.locator(".pane").nth(1).locator(".chip").nth(3).click()
        page.locator("#bars [data-seen=bytes]").wait_for()


@pytest.mark.browser
def test_stop_ends_it_and_the_place_is_free(chromium, shelf, monkeypatch):  # noqa: F811
    def slow(*args, **kwargs):
        for choice in generate(*args, **kwargs):
            time.sleep(0.02)
            yield choice

    monkeypatch.setattr("kobza.studio.playground_write.generate", slow)
    with serving(make_app([playground.room(shelf, at_once=1)])) as address, opened(chromium, address) as page:
        ready(page, address)
        for _ in range(2):
            page.click("#go")
            page.locator(".chip").nth(3).wait_for()
            page.click("#stop")
            page.locator(".status", has_text="stopped after").wait_for()
            n = page.locator(".chip").count()
            page.wait_for_timeout(200)
            assert n == page.locator(".chip").count() < 200


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chat_by_turns_and_errors_in_the_page(chromium, app, size):  # noqa: F811
    with serving(app) as address, opened(chromium, address, size) as page:
        ready(page, address, model="bpe")
        page.locator("label", has_text="Chat").click()
        write(page, f"fox? {HOSTILE[:20]}", 6)
        assert page.locator(".bubble.user").text_content() == f"fox? {HOSTILE[:20]}"
        write(page, "a dog", 6)
        assert page.locator(".bubble").count() == 3 and page.locator(".bubble.assistant").count() == 1
        write_bad = "dog " * 400
        page.fill("#prompt", write_bad)
        page.click("#go")
        page.locator(".status.bad", has_text="shorten it").wait_for()
        assert page.input_value("#prompt") == write_bad  # given back, to be shortened
        page.click("#anew")
        write(page, "fox", 6)
        assert page.locator(".bubble").count() == 1


@pytest.mark.browser
def test_script_in_all_that_is_shown_stays_text(chromium, shelf):  # noqa: F811
    with serving(make_app([playground.room(shelf)])) as address, opened(chromium, address) as page:
        ready(page, address)
        page.select_option("#model", HOSTILE)
        write(page, "<img src=x onerror=alert(1)>", 20)
        page.locator(".chip").nth(2).click()
        page.locator("tr.chosen").wait_for()
        assert page.locator(".pane .who").text_content() == HOSTILE
        assert page.locator("main img").count() == 0 and page.title() == "Playground · kobza studio"


def test_the_page_asks_nothing_of_the_network():
    """Every address in our static files is our own or a namespace."""
    from kobza.web import page

    for folder in (Path(page.__file__).parent, Path(playground.__file__).parent):
        for path in [*folder.glob("static/*"), *folder.glob("templates/*.html")]:
            found = re.findall(r"https?://[^\s\"')]+", path.read_text(encoding="utf-8"))
            assert set(found) <= {"http://www.w3.org/2000/svg"}, path
