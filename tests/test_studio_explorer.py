"""The explorer shows what the model did; what is typed stays text; what is wrong is refused in words."""

from __future__ import annotations

import html
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
from starlette.testclient import TestClient  # noqa: E402

from kobza.config import InputError, ModelConfig  # noqa: E402
from kobza.describe.equations import equations  # noqa: E402
from kobza.describe.parts import parts  # noqa: E402
from kobza.layers import rotate  # noqa: E402
from kobza.model import build, n_parameters  # noqa: E402
from kobza.studio.app import Name, make_app  # noqa: E402
from kobza.studio.explorer import attention, draw, lens, linear, numbers, vectors  # noqa: E402
from kobza.studio.explorer.lesson import Asked, label  # noqa: E402
from kobza.studio.explorer.room import LESSONS, room  # noqa: E402
from kobza.studio.explorer.sources import Eye, Sources, twin  # noqa: E402
from kobza.studio.explorer.walk import walk  # noqa: E402
from kobza.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer  # noqa: E402
from kobza.tokens.compare import Split  # noqa: E402
from kobza.trace.record import record  # noqa: E402

SCRIPT = "<img src=x onerror=\"document.title='taken'\">"
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 32, "init": "xavier", "max_seq_len": 48}
KINDS = {
    "rope": {"n_kv_head": 2, "mlp": "swiglu", "norm_weight": True},
    "learned": {"position": "learned", "norm": "layernorm", "bias": True, "mlp": "gelu"},
    "waves": {"position": "sinusoidal", "norm_place": "after", "attn_softcap": 5.0},
    "windowed": {"position": "none", "window": 4, "window_pattern": "LG", "qk_norm": False},
    SCRIPT: {"pattern": "AFF"},
}


class Models:
    """A few tiny models over bytes; the last has a hostile name and a hostile token."""

    def __init__(self) -> None:
        self.open_ones: dict[str, SimpleNamespace] = {}

    def names(self) -> list[Name]:
        return [Name(name, "run") for name in KINDS]

    def open(self, name: str) -> SimpleNamespace:
        if name not in self.open_ones:
            tokenizer = ByteTokenizer([SCRIPT, SCRIPT + "2"])
            config = ModelConfig(vocab_size=tokenizer.vocab_size, **SMALL | KINDS[name])
            model = build(config, seed=1)
            if name == SCRIPT:  # whatever it reads, it likes one of its hostile tokens best
                model.lm_head.weight.data[-2:] = torch.tensor([[9.0], [-9.0]]) * torch.arange(1, 33)
            self.open_ones[name] = SimpleNamespace(loaded=SimpleNamespace(model=model.eval(), tokenizer=tokenizer))
        return self.open_ones[name]


class OneToken(Tokenizer):
    """A vocabulary of one hostile piece."""

    def __init__(self) -> None:
        super().__init__([SCRIPT.encode()], {})

    def encode(self, text: str, line: int = 1, continues: bool = False) -> np.ndarray:
        return np.zeros(text.count(SCRIPT), dtype=np.int32)


def sources(models: object) -> Sources:
    letters = CharTokenizer.train(["abc <img srcx onerdut.l='k>\""])
    return Sources(models, record, Split, parts, equations, {"letters": lambda: letters, "hostile": OneToken})


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def eye(models: Models) -> Eye:
    return Eye(sources(models))


@pytest.fixture(scope="module")
def app(models: Models):
    return make_app([room(sources(models))])


@pytest.fixture(scope="module")
def client(app) -> TestClient:
    return TestClient(app)


def ids_of(text: str) -> list[int]:
    return list(text.encode())


# ---- pages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS, ids=lambda name: name[:8])
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_every_lesson_shows_every_kind_of_model(client: TestClient, lesson, name: str):
    where = {"model": name} if lesson.name in ("vectors", "path", "attention", "lens", "parameters") else {}
    page = client.get(f"/explorer/{lesson.name}", params=where, headers={"accept": "text/html"})
    part = client.get(f"/explorer/{lesson.name}/part", params=where)
    assert (page.status_code, part.status_code) == (200, 200), part.text[:300]
    assert page.text.count("<h1>") == 1 and "Next: " in page.text and part.text.strip() in page.text
    assert "<img" not in re.sub('<img src="/static/web/icon.svg"', "", page.text)


def test_the_first_page_leads_to_all_lessons(client: TestClient):
    page = client.get("/explorer").text
    for lesson in LESSONS:
        assert f'href="/explorer/{lesson.name}"' in page and html.escape(lesson.title) in page


def test_script_in_prompt_name_and_token_stays_text(client: TestClient):
    for lesson in ("vectors", "path", "attention", "lens"):
        part = client.get(f"/explorer/{lesson}/part", params={"model": SCRIPT, "prompt": SCRIPT[:24]})
        assert part.status_code == 200 and "<img" not in part.text, lesson
    last = client.get("/explorer/path/part", params={"model": SCRIPT, "prompt": "abc"}).text
    tokens = client.get("/explorer/tokens", params={"text": SCRIPT, "with": ["hostile", SCRIPT]}).text
    assert "&lt;img src=x" in last  # the model did propose it
    assert "<img src=x" not in last + tokens and "1 token<" in tokens
    refused = client.get("/explorer/path", params={"model": "<img src=x>"}).text
    assert "&lt;img src=x&gt;" in refused and "<img src=x" not in refused
    assert "&lt;img␣src=x" in tokens  # as one piece, its space made visible


BAD = (
    ("path", {"model": "rop"}, "did you mean rope"),
    ("path", {"model": "../../etc/passwd"}, "model is '../../etc/passwd'"),
    ("path", {"prompt": ""}, "the prompt is empty"),
    ("path", {"prompt": "a" * 49}, "49 tokens and this page shows at most 48"),
    ("path", {"prompt": "a" * 2001}, "2,001 characters"),
    ("lens", {"prompt": "a" * 33}, "at most 32"),
    ("attention", {"map": "0.99"}, "2 layers of 4 heads"),
    ("attention", {"map": "1.-1"}, "give a layer and a head"),
    ("attention", {"layer": "1e99"}, "layer is 1e+99"),
    ("vectors", {"distance": "nan"}, "distance is nan"),
    ("vectors", {"at": "1.5"}, "give a whole number"),
    ("cost", {"in": "-1"}, "in is -1"),
    ("cost", {"dtype": "fp7"}, "dtype is 'fp7'"),
    ("cost", {"machine": "own", "gflops": "0"}, "gflops is 0"),
    ("linear", {"w00": "x"}, "which is no number"),
    ("softmax", {"temperature": "0"}, "from 0.05"),
    ("softmax", {"z0": "inf"}, "z0 is inf"),
    ("numbers", {"x": "ten"}, "'ten', which is no number"),
    ("numbers", {"x": "1e999999999"}, "between 1e-400 and 1e400"),
    ("numbers", {"x": "1/0"}, "divides by 0"),
    ("numbers", {"scale": "0"}, "scale is 0"),
    ("tokens", {"text": "a" * 2001}, "2,001 characters"),
    ("tokens", {"with": "bites"}, "did you mean bytes"),
    ("tokens", {"with": ["bytes", "characters", "letters", "rope", "waves"]}, "shows 4 at once"),
)


@pytest.mark.parametrize(("lesson", "fields", "line"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_fields_are_refused_in_one_line(client: TestClient, lesson: str, fields: dict, line: str):
    part = client.get(f"/explorer/{lesson}/part", params=fields)
    assert part.status_code == 400 and line in part.json()["error"]["message"], part.text
    page = client.get(f"/explorer/{lesson}", params=fields)
    assert page.status_code == 400 and '<p class="note error">' in page.text and "<form" in page.text
    assert "\n" not in part.json()["error"]["message"]


def test_a_model_that_diverged_is_said_to_have_and_the_path_shows_where():
    config, tokenizer = ModelConfig(vocab_size=256, **SMALL), ByteTokenizer()
    model = build(config)
    model.blocks[1].mlp.up_proj.weight.data.fill_(float("nan"))
    one = SimpleNamespace(loaded=SimpleNamespace(model=model, tokenizer=tokenizer))
    client = TestClient(
        make_app([room(sources(SimpleNamespace(names=lambda: [Name("lost", "run")], open=lambda _: one)))])
    )
    line = client.get("/explorer/lens/part").json()["error"]["message"]
    assert line.startswith("lost holds NaN or infinity: it diverged")
    page = client.get("/explorer/path/part").text
    assert "nan" not in page[: page.index("blocks.1.mlp.up_proj")] and "min nan" in page
    model.embed.weight.data.fill_(float("nan"))
    fresh = TestClient(
        make_app([room(sources(SimpleNamespace(names=lambda: [Name("lost", "run")], open=lambda _: one)))])
    )
    assert {fresh.get(f"/explorer/{name}/part").status_code for name in ("vectors", "attention", "lens")} == {400}


def test_without_a_model_it_says_how_to_come_to_one():
    none = SimpleNamespace(names=list, open=None)
    client = TestClient(make_app([room(sources(none))]))
    assert client.get("/explorer/numbers").status_code == client.get("/explorer/tokens").status_code == 200
    page = client.get("/explorer/path")
    assert page.status_code == 400 and "kobza train --preset demo" in page.text


# ---- the path ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS, ids=lambda name: name[:8])
def test_shapes_are_those_the_model_had_and_the_end_is_the_models(client: TestClient, models: Models, name: str):
    """Against plain forward hooks of torch on the model itself, and its own logits."""
    model, prompt, had = models.open(name).loaded.model, "first words", {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, key=key: had.update({key: tuple(out.shape)}))
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    with torch.no_grad():
        logits = model(torch.tensor([ids_of(prompt)]))[0, -1]
    [hook.remove() for hook in hooks]
    page = client.get("/explorer/path/part", params={"model": name, "prompt": prompt}).text
    shown = dict(re.findall(r'data-step="([^"]+)">.*?class="shape">([^<]+)<', page, re.DOTALL))
    for key, shape in had.items():
        assert shown[key] == " × ".join(map(str, shape)), key
    c, T = model.config, len(prompt)
    for layer in range(c.n_layer):
        at = f"blocks.{layer}.attn"
        assert shown[f"{at}.q"] == f"1 × {c.n_head} × {T} × {c.head_dim}"
        assert shown[f"{at}.k"] == f"1 × {c.n_kv_head} × {T} × {c.head_dim}"
        assert shown[f"{at}.scores"] == shown[f"{at}.softmax"] == f"1 × {c.n_head} × {T} × {T}"
    best = logits.softmax(-1).max()
    assert f"{best:.1%}".replace("%", " %") in page
    assert f"{n_parameters(model):,} parameters" in page


@pytest.mark.parametrize("name", KINDS, ids=lambda name: name[:8])
def test_walk_measures_what_the_model_computes_and_leaves_it_as_it_was(models: Models, name: str):
    model, ids = models.open(name).loaded.model, ids_of("it is so")
    before = {key: getattr(module, "attend", None) for key, module in model.named_modules()}
    steps, logits = walk(model, ids)
    with torch.no_grad():
        plain = model(torch.tensor([ids]))[0, -1]
    assert torch.equal(logits, plain)
    assert before == {key: getattr(module, "attend", None) for key, module in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())
    by_name = {step.name: step for step in steps}
    p = plain.softmax(-1)
    assert by_name["softmax"].high == pytest.approx(p.max().item()) and by_name["softmax"].shape == (len(p),)
    for key, weights in record(
        model, ids
    ).attention.items():  # the scores that the page shows lead to the trace's weights
        step = by_name[f"{key}.softmax"]
        assert step.rms == pytest.approx(weights.square().mean().sqrt().item(), rel=1e-5)
        assert step.first == pytest.approx(weights[-1, -1, :4].tolist(), abs=1e-6)
    assert [s.name for s in steps].index("blocks.0.attn.softmax") < [s.name for s in steps].index(
        "blocks.1.attn.softmax"
    )


def test_the_stream_is_what_went_from_block_to_block(models: Models):
    model, ids, seen = models.open("rope").loaded.model, ids_of("abcd"), []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in model.blocks]
    with torch.no_grad():
        model(torch.tensor([ids]))
    [hook.remove() for hook in hooks]
    sums = [step for step in walk(model, ids)[0] if step.name.endswith("mlp_sum_norm")]
    assert [s.rms for s in sums] == pytest.approx([x.square().mean().sqrt().item() for x in seen])


def test_a_twin_shares_the_weights_and_sees_no_one_elses_forward(models: Models, eye: Eye):
    model = models.open("rope").loaded.model
    other, _ = eye.open("rope")
    assert other is not model and eye.open("rope")[0] is other
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    alone = [step.shape for step in walk(twin(model), ids_of("abc"))[0]]
    plain, calls = other.blocks[1].forward, []

    def meanwhile(*args):  # as if the playground wrote a token in the midst of it
        calls.append(model(torch.tensor([ids_of("quite another prompt")])))
        return plain(*args)

    other.blocks[1].forward = meanwhile
    try:
        assert [step.shape for step in walk(other, ids_of("abc"))[0]] == alone and calls
    finally:
        del other.blocks[1].forward


# ---- attention and lens --------------------------------------------------------------------------------------------


def test_attention_cells_are_the_traces_weights(client: TestClient, models: Models):
    model, prompt = models.open("rope").loaded.model, "abca"
    weights = record(model, ids_of(prompt)).attention["blocks.1.attn"][2]
    page = html.unescape(client.get("/explorer/attention/part", params={"prompt": prompt, "map": "1.2"}).text)
    said = re.findall(r"\((\d)\) looks at “.” \((\d)\): ([\d.]+)%", page)
    assert len(said) == 10 and "Layer 1, head 2" in page
    for i, j, share in said:
        assert float(share) == pytest.approx(100 * weights[int(i), int(j)].item(), abs=0.051)
    assert page.count('name="map"') == 2 * 4


def test_a_map_left_over_from_a_larger_model_gives_way(client: TestClient):
    page = client.get("/explorer/attention/part", params={"layer": "7", "head": "11"})
    assert page.status_code == 200 and "Layer 1, head 3" in page.text


def test_where_heads_look_in_words():
    w = np.array([[1, 0, 0], [0.75, 0.25, 0], [0, 0.5, 0.5]])
    assert [(x["token"], x["at"], x["share"]) for x in attention.looks(w, list("abc"))][1] == ("b", "a", 0.75)
    assert attention.back(w) == pytest.approx((0.75 + 0.5) / 2)


def test_lens_ends_with_the_models_answer(client: TestClient, models: Models, eye: Eye):
    model, ids = models.open("learned").loaded.model, ids_of("some words")
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0].softmax(-1)
    rows = lens.taken(eye, "learned", model, ids)
    assert [row.name for row in rows] == ["embedding", "blocks.0", "blocks.1"]
    assert rows[-1].best == p.argmax(-1).tolist() and set(rows[-1].rank) == {0}
    assert rows[-1].share == pytest.approx(p.max(-1).values.tolist(), rel=1e-4)
    assert rows[0].final[3] <= rows[0].share[3] and (rows[0].rank[3] == 0) == (rows[0].best[3] == rows[-1].best[3])
    assert [lens.appears(best) for best in ([5, 7, 5, 8, 5, 5], [5, 5], [1, 2])] == [4, 0, 1]


# ---- tokens and vectors --------------------------------------------------------------------------------------------


def test_tokens_are_the_tokenizers_and_a_cut_letter_is_named(client: TestClient):
    page = client.get("/explorer/tokens/part", params={"text": "Її a", "with": ["bytes", "characters", "letters"]}).text
    shown = [int(i) for i in re.findall(r"<small>(\d+)</small></span>", page)]
    in_bytes, in_characters = list("Її a".encode()), CharTokenizer.train(["Її a"]).encode("Її a").tolist()
    assert shown == in_bytes + in_characters
    assert "Ї:1/2" in page and "6 tokens" in page and "4 tokens" in page
    assert "not in the vocabulary" in page  # of "letters": said in its own column, the others stand


def test_a_token_that_cannot_be_seen_is_shown_by_its_bytes():
    tokenizer = ByteTokenizer(["<end>"])
    assert [label(tokenizer, i) for i in (97, 32, 10, 7, 0xD1, 256)] == ["a", "␣", "↵", "07", "D1", "<end>"]
    assert label(CharTokenizer.train(["\u200d\ufffd"]), 0) == "E2 80 8D"


def test_neighbours_are_the_nearest_by_cosine(models: Models):
    table = models.open("rope").loaded.model.embed.weight.detach()
    found = vectors.neighbours(table, 65)
    plain = torch.nn.functional.cosine_similarity(table[65], table, dim=-1)
    order = [i for i in plain.argsort(descending=True).tolist() if i != 65][: len(found)]
    assert [i for i, _ in found] == order and found[0][1] == pytest.approx(plain[order[0]].item(), abs=1e-6)


@pytest.mark.parametrize("scaling", ["none", "yarn"])
def test_the_curve_of_distance_is_what_turning_does_to_a_dot_product(scaling: str):
    far = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 32} if scaling == "yarn" else {}
    model = build(ModelConfig(vocab_size=9, **SMALL | far))
    x = torch.ones(1, 1, 48, 8)
    turned = rotate(x, model.rope.cos, model.rope.sin)[0, 0]
    for distance in (0, 1, 7, 40):
        places = vectors.places(model, distance)
        both = turned[47] @ turned[47 - distance] / (turned[0] @ turned[0])
        assert places["dot"] == pytest.approx(both.item(), abs=1e-4)


def test_a_map_of_one_token_is_a_point_not_a_nan(client: TestClient):
    page = client.get("/explorer/vectors/part", params={"prompt": "a"})
    assert page.status_code == 200 and "nan" not in page.text


# ---- numbers, layers, parameters -----------------------------------------------------------------------------------


def test_pressing_a_bit_opens_the_number_with_that_bit_flipped(client: TestClient):
    page = client.get("/explorer/numbers/part", params={"x": "1.5"}).text
    bf16 = re.search(r'data-format="bf16".*?</section>', page, re.DOTALL)[0]
    links = re.findall(r'href="([^"]+)" title="flip: ([^"]+)"', html.unescape(bf16))
    assert len(links) == 16 and links[0][1] == "-1.5" and links[9][1] == "1" and links[-1][1] == repr(1.5 + 2**-7)
    there = client.get(links[-1][0].partition("#")[0]).text
    assert f"<b>{1.5 + 2**-7!r}</b>" in there
    assert "infinity" in client.get("/explorer/numbers/part", params={"x": "1e39"}).text


def test_a_number_that_no_float_holds_is_too_large_not_a_fault(client: TestClient):
    for x in ("1e400", "-1e400", "1e400/1e-400", "1e-400"):
        page = client.get("/explorer/numbers/part", params={"x": x, "scale": "1e-30"})
        assert page.status_code == 200 and "lost: too" in page.text


def test_numbers_are_read_exactly():
    assert numbers.read("1/3", "x") == Fraction(1, 3) and numbers.read("−0.1", "x") == Fraction(-1, 10)
    assert str(numbers.read("-0", "x")) == "-0.0" and numbers.read("65,504", "x") == 65504
    for x in (0.1, -0.0, 448.0, 1e300, 5e-324, float("inf")):
        assert str(float(numbers.read(numbers.exact(x), "x"))) == str(x)
    assert str(numbers.read("snan", "x")) == "nan"
    for bad in ("", "0x10", "1e", "nan/2x", "1/inf", "--1", "1/0"):
        with pytest.raises(InputError):
            numbers.read(bad, "x")


def test_a_small_layer_can_be_followed_and_a_large_one_is_counted():
    lines = linear.example([[1, 2, 0], [-1, 0, 3]], [1, 2, 3], [0.5, -1])
    assert lines[0] == {"terms": "1·1 + 2·2 + 0·3 + 0.5", "value": "5.5"} and lines[1]["value"] == "7"
    form = linear.ask_cost(None, Asked())
    form.bias, form.dtype, form.n_in, form.n_out, form.batch, form.tokens = "yes", "fp32", 100, 50, 2, 3
    cost, layer = linear.cost(form), torch.nn.Linear(100, 50)
    assert cost["parameters"] == sum(p.numel() for p in layer.parameters())
    assert cost["flops"] == f"{6 * (2 * 100 * 50 + 50):,}"
    assert cost["moved"] == "23.8 kB"  # 4 · (5,050 weights + 600 in + 300 out)
    form.tokens = form.batch = 1
    assert linear.cost(form)["bound"] == "memory"


def test_parameters_are_all_there(client: TestClient, models: Models):
    page = client.get("/explorer/parameters/part", params={"model": "learned"}).text
    assert f"{n_parameters(models.open('learned').loaded.model):,} parameters" in page
    assert "attn(x) = " in page and "softmax" in page


def test_paths_draw_every_cell_once():
    levels = np.random.default_rng(0).integers(0, 9, (7, 9))
    drawn = np.zeros_like(levels)
    for shade, d in draw.paths(levels, "u"):
        for x, y, n in re.findall(r"M(\d+) (\d+)h(\d+)", d):
            drawn[int(y), int(x) : int(x) + int(n)] += int(shade[1:])
    assert (drawn == levels).all()


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(app) -> Iterator[str]:
    """The studio on a free port of this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync = pytest.importorskip("playwright.sync_api")
    places = ["/usr/bin/chromium", "/usr/bin/chromium-browser", shutil.which("google-chrome") or ""]
    found = next((place for place in places if place and Path(place).exists()), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    with sync.sync_playwright() as playwright:
        args = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=found, args=args)
        yield chromium
        chromium.close()


CHANGES = {  # a lesson: what is done on it, and where the result must change
    "tokens": (lambda page: page.fill("#text", "Є " + SCRIPT), ".cut"),
    "vectors": (lambda page: page.click("button.piece >> nth=2"), "h2:has-text('Nearest')"),
    "linear": (lambda page: slide(page, "#x0", 4), ".sum >> nth=0"),
    "cost": (lambda page: slide(page, "#tokens", 1), "h2:has-text('waits for') >> nth=0"),
    "path": (lambda page: page.fill("#prompt", SCRIPT[:30]), ".cut"),
    "attention": (lambda page: page.click("button[name=map] >> nth=5"), "h2:has-text('Layer')"),
    "lens": (lambda page: page.fill("#prompt", SCRIPT[:30]), "thead"),
    "softmax": (lambda page: slide(page, "#temperature", 5), "tbody tr >> nth=0"),
    "numbers": (lambda page: page.click("[data-format=bf16] .bit >> nth=3"), "[data-format=bf16] dd >> nth=0"),
    "parameters": (lambda page: page.select_option("#model", "learned"), "h2 >> nth=0"),
}


def slide(page, which: str, value: float) -> None:
    page.eval_on_selector(
        which, "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", value
    )


@pytest.mark.browser
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=["desk", "phone"])
@pytest.mark.parametrize("name", [lesson.name for lesson in LESSONS])
def test_a_lesson_fits_changes_when_touched_and_runs_no_foreign_script(browser, address: str, size, name: str):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    faults, asked = [], []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/explorer/{name}")
    change, where = CHANGES[name]
    before = page.inner_text(where)
    change(page)
    for _ in range(100):
        if page.inner_text(where) != before:
            break
        page.wait_for_timeout(30)
    assert page.inner_text(where) != before
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate("document.querySelectorAll('#result img').length") == 0 and page.title() != "taken"
    again = page.inner_text(where)
    page.goto(page.url)  # the address keeps what was asked
    assert page.inner_text(where) == again
    assert not faults and all(url.startswith(address) for url in asked), faults
    page.close()


@pytest.mark.browser
def test_a_cell_says_its_weight_when_pointed_at(browser, address: str):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/explorer/attention?prompt=abc")
    page.hover(".square rect >> nth=1")
    assert page.inner_text(".say").startswith("“b” (1) looks at “a” (0): ")
    page.goto(f"{address}/explorer/path?prompt={'a' * 60}")
    assert "shows at most 48" in page.inner_text("#result")
    page.close()
