"""The studio's shell: headers, errors in words, escaping, and in a real browser swap.js and both widths."""

import shutil
import socket
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
from fastapi import APIRouter, FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import HTMLResponse  # noqa: E402

from kobza.config import InputError  # noqa: E402
from kobza.studio.app import Room, make_app  # noqa: E402
from kobza.web.page import Link, Pages, mount_static, under  # noqa: E402

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
SIZES = [(1280, 800), (390, 844)]
ROOMS = ["Playground", "Explorer", "Runs", "Reports"]


@contextmanager
def serving(app):
    """An app on a free port of this machine -> its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture(scope="module")
def chromium():
    """A real browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    path = next((place for place in found if place), None)
    if path is None:
        pytest.skip("no Chromium here")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser, address, size=(1280, 800)):
    """A page that must stay on `address`, log no error and never scroll sideways."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    errors, strays = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith(address) else strays.append(asked.url))
    try:
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert not strays
        assert not [error for error in errors if "Failed to load resource" not in error]  # a 4xx, which is shown
    finally:
        page.close()


def room_of(title):
    router = APIRouter(prefix=f"/{title.lower()}")

    @router.get("")
    def refuse():
        raise InputError(f"{HOSTILE} is no name; choose another")

    return Room(title, f"/{title.lower()}", router, "play", f"what {HOSTILE} does")


@pytest.fixture
def app():
    return make_app([room_of(title) for title in ROOMS], title=f"studio {HOSTILE}")


def test_every_answer_has_the_policy_and_no_inline_script(app):
    client = TestClient(app)
    for path in ("/", "/nowhere", "/playground", "/static/web/kobza.css", "/static/web/swap.js"):
        answer = client.get(path, headers={"accept": "text/html"})
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "script-src 'self';" in policy
        assert "unsafe-inline" not in policy.replace("style-src-attr 'unsafe-inline'", "")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "<style" not in answer.text and "<script>" not in answer.text and "onclick" not in answer.text


def test_a_room_may_set_its_own_policy():
    app = FastAPI()
    app.get("/own")(lambda: HTMLResponse("x", headers={"content-security-policy": "default-src 'none'"}))
    mount_static(app)
    assert TestClient(app).get("/own").headers["content-security-policy"] == "default-src 'none'"


def test_errors_are_one_line_as_a_page_to_people_and_json_to_scripts(app):
    client = TestClient(app)
    page = client.get("/runs", headers={"accept": "text/html"})
    assert page.status_code == 400 and "&lt;img" in page.text and "<img src=x" not in page.text
    for headers in ({}, {"accept": "text/html", "x-swap": "1"}):
        answer = client.get("/runs", headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"{HOSTILE} is no name; choose another"
    assert "POST is not for /runs" in client.post("/runs").json()["error"]["message"]
    assert client.get("/nowhere").json()["error"]["message"] == "nothing is at /nowhere"


def test_static_files_end_at_their_folder(app):
    client = TestClient(app)
    for path in ("/static/web/%2e%2e/page.py", "/static/web/..%2fpage.py", "/static/studio/%2e%2e%2fapp.py"):
        assert client.get(path).status_code == 404, path


def test_names_are_escaped_and_half_a_surrogate_pair_is_no_error(app):
    text = TestClient(app).get("/").text
    assert text.count("&lt;img") >= 5 and "<img src=x" not in text
    app.state.brand = "half \ud83d"
    assert TestClient(app).get("/").status_code == 200


def test_a_template_knows_no_undefined_name():
    app, pages = FastAPI(), Pages("kobza.web", [Link("A", "/")])

    @app.get("/")
    def page(request: Request):
        return pages.render(request, "error.html", title="without its line")

    with pytest.raises(Exception, match="'line' is undefined"):
        TestClient(app).get("/")


def test_a_room_keeps_to_its_own_paths():
    router = APIRouter()
    router.get("/elsewhere")(lambda: None)
    with pytest.raises(AssertionError, match="/elsewhere"):
        make_app([Room("Runs", "/runs", router)])
    assert under("/runs/x", "/runs") and not under("/runsx", "/runs") and not under("/runs", "/")


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def swapping():
    """An app with a page of one form, whose fragment echoes what it got."""
    app, seen = FastAPI(), []

    @app.get("/")
    def page():
        return HTMLResponse(
            "<!DOCTYPE html><script defer src='/static/web/swap.js'></script><form data-post='/echo' data-into='#out' "
            "data-on='input, load'><input id=a name=a type=range min=0 max=100 value=5><output for=a></output></form>"
            "<p id=out></p><button data-get='/bad' data-into='#bad'>x</button><div id=bad></div>"
        )

    @app.post("/echo")
    async def echo(request: Request):
        seen.append((await request.body()).decode())
        time.sleep(0.05)
        return HTMLResponse(f"<b>{seen[-1]}</b>")

    @app.get("/bad")
    def bad():
        raise InputError(HOSTILE)

    mount_static(app)
    return app, seen


@pytest.mark.browser
def test_swap_sends_one_at_a_time_and_the_latest_wins(chromium, swapping):
    app, seen = swapping
    with serving(app) as address, opened(chromium, address) as page:
        page.goto(address)
        page.locator("#out b").wait_for()
        page.evaluate(
            "for (let i = 6; i <= 60; i++) { a.value = i; a.dispatchEvent(new Event('input', {bubbles: true})) }"
        )
        page.get_by_text("a=60").wait_for()
        assert seen[0] == "a=5" and seen[-1] == "a=60" and len(seen) <= 3  # not 55 requests
        assert page.locator("output").text_content() == "60"


@pytest.mark.browser
def test_swap_shows_an_error_as_text(chromium, swapping):
    with serving(swapping[0]) as address, opened(chromium, address) as page:
        page.goto(address)
        page.locator("button").click()
        page.locator("#bad .error").wait_for()
        assert page.locator("#bad .error").text_content() == HOSTILE and page.title() != "owned"


@pytest.mark.browser
@pytest.mark.parametrize("size", [*SIZES, (320, 600)], ids=str)
def test_home_leads_to_every_room_and_fits(chromium, app, size):
    with serving(app) as address, opened(chromium, address, size) as page:
        page.goto(address)
        assert page.locator("a.card.room").count() == len(ROOMS)
        bar = page.locator("nav.rooms").bounding_box()
        assert bar["x"] >= 0 and bar["x"] + bar["width"] <= size[0]
        page.locator("nav.rooms a").nth(1).click()
        assert page.url == f"{address}/playground" and page.title().startswith("Not possible")
        assert page.locator("nav.rooms [aria-current=page]").text_content().strip() == "Playground"
