"""The contest's pages: a host and its guests, what they may not do, and a whole vote in two real browsers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import torch  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from kobza.checkpoint import save_checkpoint  # noqa: E402
from kobza.config import InputError, ModelConfig, RunConfig, SampleConfig  # noqa: E402
from kobza.contest.contest import Contest  # noqa: E402
from kobza.contest.rules import EXAMPLE  # noqa: E402
from kobza.contest.submission import SUBMISSION, Submission, Verdict, checkpoint_digest, collect, pack  # noqa: E402
from kobza.contest.web import TRIES, make_app, most_body  # noqa: E402
from kobza.model import build, n_parameters  # noqa: E402
from kobza.tokenizer import ByteTokenizer  # noqa: E402
from kobza.web.guard import Guard, Guarded  # noqa: E402

EVIL = "<img src=x onerror=alert(1)>"
HOST, GUEST = ("127.0.0.1", 50000), ("192.168.1.7", 50000)
CONFIG = ModelConfig(vocab_size=256, n_layer=1, n_head=1, n_embd=8, n_ff=8, max_seq_len=16)


def packed(
    folder: Path, name: str, text: str = "a text", prompt: str = "Once", seed: int = 0
) -> tuple[Submission, Path]:
    """A submission and the folder of its checkpoint, of weights from a seed."""
    torch.manual_seed(seed)
    model = build(CONFIG)
    with torch.no_grad():
        model.embed.weight.normal_()
    checkpoint, out = folder / f"checkpoint{seed}", folder / f"packed{seed}"
    save_checkpoint(checkpoint, model, RunConfig(model=CONFIG), ByteTokenizer(), {})
    collect(checkpoint, None, out)
    how = SampleConfig(tokens=20, seed=seed)
    made = Submission(name, prompt, how, text, (65,), checkpoint_digest(out), CONFIG, n_parameters(model))
    (out / SUBMISSION).write_text(made.to_json(), encoding="utf-8")
    return made, out


@pytest.fixture
def contest(tmp_path: Path) -> Contest:
    rules = re.sub(r"^votes_per_minute *=.*$", "", EXAMPLE, flags=re.MULTILINE)
    return Contest.new(tmp_path / "contests", "school", rules)


@pytest.fixture
def voting(contest: Contest, tmp_path: Path) -> Contest:
    """Three accepted entries, one of them hostile, and the vote is on."""
    for seed, name in enumerate(("Ann", "Bob", EVIL)):
        entry = contest.add(*packed(tmp_path, name, f"text {seed} {EVIL}", f"prompt {EVIL}", seed))
        contest.record_verdict(entry, Verdict(True, (f"same {EVIL}",)))
    contest.state = "voting"
    return contest


def client(contest: Contest, who: tuple[str, int] = GUEST, verify: Any = None, host: str = "") -> TestClient:
    name = host or ("127.0.0.1:8000" if who == HOST else "192.168.1.5:8000")
    app = Guarded(
        make_app(contest, "http://192.168.1.5:8000", verify),
        Guard("0.0.0.0", open_paths=("/",), max_body=most_body(contest)),
    )
    headers = {"accept": "text/html"}
    return TestClient(app, base_url=f"http://{name}", client=who, headers=headers, follow_redirects=False)


def joined(contest: Contest, name: str = "Vera", code: str | None = None) -> TestClient:
    guest = client(contest)
    answer = guest.post(
        "/contest/join", data={"code": code or contest.join_code() or contest.renew_code(), "name": name}
    )
    assert answer.status_code == 303, answer.text
    return guest


def offered(guest: TestClient) -> str:
    """The token of the pair that is shown."""
    found = re.search(r'name="token" value="([^"]+)"', guest.get("/contest/vote").text)
    assert found is not None
    return found[1]


def line(answer: Any) -> str:
    """The one line of a refusal's page."""
    found = re.search(r'class="note error">([^<]*)<', answer.text)
    assert found is not None, answer.text
    return found[1]


# ---- what guests do ------------------------------------------------------------------------------------------------


def test_a_guest_joins_by_the_code_and_is_remembered(contest: Contest) -> None:
    code = contest.renew_code()
    guest = client(contest)
    assert f'value="{code}"' in guest.get(f"/contest/join?code={code}").text
    answer = guest.post("/contest/join", data={"code": code.lower() + " ", "name": "Vera"})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303 and "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    assert "You are <strong>Vera</strong>" in guest.get("/contest").text
    assert "You are <strong>" not in client(contest).get("/contest").text


def test_a_cookie_outlives_a_restart_and_no_other_contest_takes_it(contest: Contest, tmp_path: Path) -> None:
    guest = joined(contest)
    again = client(Contest(contest.folder))
    again.cookies = guest.cookies
    assert "<strong>Vera</strong>" in again.get("/contest").text
    other = Contest.new(tmp_path, "other")
    other.voter("Vera")
    elsewhere = client(other)
    elsewhere.cookies = guest.cookies
    assert "<strong>Vera</strong>" not in elsewhere.get("/contest").text


@pytest.mark.parametrize(
    "change",
    [lambda c: c[:-1] + ("0" if c[-1] != "0" else "1"), lambda c: c.partition(".")[0], lambda c: "x" + c, lambda c: ""],
)
def test_a_forged_cookie_is_nobody(voting: Contest, change: Any) -> None:
    guest = joined(voting)
    token = guest.cookies["kobza_voter"]
    forger = client(voting)
    forger.cookies.set("kobza_voter", change(token), path="/contest")
    answer = forger.get("/contest/vote")
    assert answer.status_code == 401 and "not joined" in line(answer)


def test_a_vote_is_blind_and_counted_once(voting: Contest) -> None:
    guest = joined(voting)
    page = guest.get("/contest/vote").text
    assert "Ann" not in page and "Bob" not in page and "text " in page and "prompt " in page
    token = offered(guest)
    assert offered(guest) == token, "the same pair until it is voted on"
    assert guest.post("/contest/vote", data={"token": token, "choice": "left"}).status_code == 303
    assert [vote.choice for vote in voting.votes()] == ["left"]
    answer = guest.post("/contest/vote", data={"token": token, "choice": "right"})
    assert answer.status_code == 409 and "one vote a voter a pair" in line(answer)
    assert len(voting.votes()) == 1
    for _ in range(2):
        assert guest.post("/contest/vote", data={"token": offered(guest), "choice": "tie"}).status_code == 303
    assert "voted on all" in guest.get("/contest/vote").text and len(voting.votes()) == 3


def test_nobody_votes_on_their_own(voting: Contest) -> None:
    guest = joined(voting, "ann")
    page = guest.get("/contest/vote").text
    assert "text 0" not in page and "text 1" in page and "text 2" in page
    assert guest.post("/contest/vote", data={"token": offered(guest), "choice": "tie"}).status_code == 303
    assert "voted on all" in guest.get("/contest/vote").text


def test_which_text_is_a_differs_between_voters(voting: Contest) -> None:
    firsts = set()
    for i in range(24):
        page = joined(voting, f"voter {i}").get("/contest/vote").text
        firsts.add(tuple(re.findall(r"</span>text (\d)", page)))
        if len({pair for pair in firsts if pair[::-1] in firsts}) >= 2:
            return
    raise AssertionError(firsts)


def test_a_submission_comes_in_by_its_file(contest: Contest, tmp_path: Path) -> None:
    made, folder = packed(tmp_path, "Vera", f"hello {EVIL}")
    file = pack(folder, tmp_path / "mine.kobza")
    verified: list[str] = []

    def verify(entry: Any) -> None:
        verified.append(entry.title)
        contest.record_verdict(entry, Verdict(True, ("the text is the same",)))

    contest.renew_code()
    guest = client(contest, verify=verify)
    guest.post("/contest/join", data={"code": contest.join_code(), "name": "Vera"})
    answer = guest.post("/contest/submit", files={"file": ("../../evil.kobza", file.read_bytes())})
    assert answer.status_code == 303, answer.text
    [entry] = contest.entries()
    assert entry.submission == made and entry.status == "accepted" and verified == ["Vera"]
    page = guest.get("/contest/submit").text
    assert "the text is the same" in page and EVIL not in page and "&lt;img" in page
    assert [p.name for p in contest.folder.iterdir() if p.name.startswith(".upload")] == []
    answer = guest.post("/contest/submit", files={"file": ("again.kobza", file.read_bytes())})
    assert answer.status_code == 409 and len(contest.entries()) == 1


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + b"\0" * 500])
def test_a_file_that_is_no_submission_is_refused(contest: Contest, content: bytes) -> None:
    answer = joined(contest).post("/contest/submit", files={"file": ("x.kobza", content)})
    assert answer.status_code == 400 and line(answer) and not contest.entries()
    assert not [p for p in contest.folder.iterdir() if p.name.startswith(".upload")]


def test_a_file_over_the_rules_is_refused_by_its_size(contest: Contest) -> None:
    object.__setattr__(contest.rules, "most_megabytes", 0.001)
    guest = joined(contest)
    for size in (1_001, 200_000):
        answer = guest.post("/contest/submit", files={"file": ("x.kobza", b"x" * size)})
        assert answer.status_code == 413
    assert not contest.entries()


def test_a_form_that_does_not_say_its_length_is_refused(contest: Contest) -> None:
    answer = joined(contest).post(
        "/contest/submit", content=iter([b"x" * 100]), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == 413 and "length" in line(answer)


# ---- what guests may not do ----------------------------------------------------------------------------------------


def test_a_forged_vote_is_refused(voting: Contest) -> None:
    guest, other = joined(voting, "Vera"), joined(voting, "Olena")
    token, theirs = offered(guest), offered(other)
    pair, _, mark = token.partition(".")
    for forged in (
        theirs,
        pair,
        f"{pair}.{'0' * 64}",
        f"{theirs.partition('.')[0]}.{mark}",
        "",
        "x" * 10_000,
        f"{EVIL}.{mark}",
    ):
        answer = guest.post("/contest/vote", data={"token": forged, "choice": "left"})
        assert answer.status_code in (400, 403) and not voting.votes(), forged
    answer = guest.post("/contest/vote", data={"token": token, "choice": EVIL})
    assert answer.status_code == 400 and EVIL not in answer.text and not voting.votes()
    assert client(voting).post("/contest/vote", data={"token": token, "choice": "left"}).status_code == 401


def test_a_page_of_another_site_cannot_send_a_vote(voting: Contest) -> None:
    guest = joined(voting)
    body = {"token": offered(guest), "choice": "left"}
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert guest.post("/contest/vote", data=body, headers=headers).status_code == 403
    assert not voting.votes()
    assert guest.post("/contest/vote", data=body, headers={"origin": "http://192.168.1.5:8000"}).status_code == 303


def test_join_codes_are_not_to_be_guessed(contest: Contest) -> None:
    code = contest.renew_code()
    guest = client(contest)
    for _ in range(TRIES):
        answer = guest.post("/contest/join", data={"code": "AAAAAA", "name": "Vera"})
        assert answer.status_code == 403 and "join code" in line(answer)
    answer = guest.post("/contest/join", data={"code": code, "name": "Vera"})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    assert contest.log()[-1].what.startswith("renewed"), "nobody joined"


def test_an_expired_code_and_none_let_nobody_in(contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = client(contest)
    assert guest.post("/contest/join", data={"code": "", "name": "Vera"}).status_code in (400, 403)
    assert guest.post("/contest/join", data={"code": "ABCDEF", "name": "Vera"}).status_code == 403
    code = contest.renew_code(minutes=1)
    import time

    later = time.time() + 61
    monkeypatch.setattr("kobza.contest.contest.time.time", lambda: later)
    assert guest.post("/contest/join", data={"code": code, "name": "Vera"}).status_code == 403
    assert "run out" in client(contest, HOST).get("/contest/host").text


@pytest.mark.parametrize("name", ["", "   ", "x" * 61, "x" * 60_000, "\u202eevil", "\x00"])
def test_names_that_are_none_are_refused(contest: Contest, name: str) -> None:
    answer = client(contest).post("/contest/join", data={"code": contest.renew_code(), "name": name})
    assert answer.status_code == 400 and len(answer.text) < 20_000


def test_a_huge_form_is_refused_unread(contest: Contest) -> None:
    answer = client(contest).post("/contest/join", data={"code": contest.renew_code(), "name": "x" * 1_000_000})
    assert answer.status_code == 413


def test_bodies_that_are_no_forms_are_4xx(contest: Contest) -> None:
    guest = joined(contest)
    kinds = (
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "application/json",
    )
    for body in (b"code=%ff%fe&name=%c3", b"\xff\xfe\x00", b"&" * 5000):
        for kind in kinds:
            for path in ("join", "vote", "submit", "host"):
                answer = guest.post(f"/contest/{path}", content=body, headers={"content-type": kind})
                assert 400 <= answer.status_code < 500, (kind, path, answer.text)


def test_a_name_is_taken_once(contest: Contest) -> None:
    joined(contest, "Vera")
    answer = client(contest).post("/contest/join", data={"code": contest.join_code(), "name": "VERA"})
    assert answer.status_code == 409


def test_a_voter_in_a_hurry_is_held(voting: Contest) -> None:
    object.__setattr__(voting.rules, "votes_per_minute", 1)
    guest = joined(voting)
    assert guest.post("/contest/vote", data={"token": offered(guest), "choice": "left"}).status_code == 303
    answer = guest.post("/contest/vote", data={"token": offered(guest), "choice": "left"})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0 and len(voting.votes()) == 1


def test_what_is_not_on_now_is_said(contest: Contest, voting: Contest) -> None:
    guest = joined(voting)
    assert "Entries are not being taken" in guest.get("/contest/submit").text
    token = offered(guest)
    voting.state = "closed"
    assert guest.post("/contest/vote", data={"token": token, "choice": "left"}).status_code == 409
    assert "no vote now" in guest.get("/contest/vote").text


def test_script_in_names_prompts_and_texts_is_text(voting: Contest) -> None:
    guest, host = joined(voting, EVIL + "2"), client(voting, HOST)
    guest.post("/contest/vote", data={"token": offered(guest), "choice": "left"})
    voting.state = "closed"
    for page in (
        guest.get("/contest"),
        guest.get("/contest/standings"),
        host.get("/contest/host"),
        host.get("/contest/host/export/contest.html"),
    ):
        assert page.status_code == 200 and "<img src=x" not in page.text and "&lt;img src=x" in page.text
    assert "script-src 'self'" in guest.get("/contest").headers["content-security-policy"]


# ---- the host ------------------------------------------------------------------------------------------------------


def test_the_host_s_pages_open_on_its_own_machine_alone(voting: Contest) -> None:
    for who, name in ((GUEST, ""), (GUEST, "127.0.0.1:8000"), (HOST, "evil.example"), (HOST, "192.168.1.5:8000")):
        outside = client(voting, who, host=name)
        for path in ("/contest/host", "/contest/host/qr.svg", "/contest/host/export/votes.csv"):
            assert outside.get(path).status_code == 403
        assert outside.post("/contest/host", data={"action": "closed"}).status_code == 403
    assert voting.state == "voting"
    assert "/contest/host" not in client(voting).get("/contest").text
    assert (
        client(voting, HOST)
        .post("/contest/host", data={"action": "closed"}, headers={"origin": "http://evil.example"})
        .status_code
        == 403
    )


def test_the_host_runs_it_all(contest: Contest, tmp_path: Path) -> None:
    host = client(
        contest,
        HOST,
        verify=lambda entry: contest.record_verdict(entry, Verdict(entry.title != "Cheat", ("looked at",))),
    )
    assert "no join code" in host.get("/contest/host").text
    assert host.post("/contest/host", data={"action": "renew", "minutes": "30"}).status_code == 303
    code = contest.join_code()
    page = host.get("/contest/host").text
    assert (
        code
        and code in page
        and "holds for 30 more minutes" in page
        and f"http://192.168.1.5:8000/contest/join?code={code}" in page
    )
    picture = host.get("/contest/host/qr.svg")
    assert picture.headers["content-type"] == "image/svg+xml" and picture.text.startswith("<svg xmlns=")
    assert host.post("/contest/host", data={"action": "voting"}).status_code == 400, "two accepted entries are wanted"
    for seed, name in enumerate(("Ann", "Bob", "Cheat")):
        contest.add(*packed(tmp_path, name, f"text {seed}", seed=seed))
    assert host.post("/contest/host", data={"action": "verify"}).status_code == 303
    assert [entry.status for entry in contest.entries()] == ["accepted", "accepted", "refused"]
    assert host.post("/contest/host", data={"action": "voting"}).status_code == 303 and contest.state == "voting"
    guest = joined(contest)
    assert "The host shows them" in guest.get("/contest/standings").text
    host.post("/contest/host", data={"action": "show"})
    assert "Ann" in guest.get("/contest/standings").text
    host.post("/contest/host", data={"action": "hide"})
    assert "Ann" not in guest.get("/contest/standings").text
    assert "Ann" in host.get("/contest/host/export/standings.csv").text
    assert host.get("/contest/host/export/..%2fcontest.db").status_code in (400, 404)
    assert host.get("/contest/host/export/pages.key").status_code == 400
    assert host.post("/contest/host", data={"action": "closed"}).status_code == 303
    assert "Ann" in guest.get("/contest/standings").text
    for data in (
        {"action": "explode"},
        {"action": "renew", "minutes": "nan"},
        {"action": "renew", "minutes": "-1"},
        {},
    ):
        assert host.post("/contest/host", data=data).status_code == 400


def test_a_knock_out_is_drawn(voting: Contest) -> None:
    object.__setattr__(voting.rules, "format", "knockout")
    object.__setattr__(voting.rules, "votes_per_match", 1)
    for _ in range(2):  # a match and the final; the third entry has a bye
        guest = joined(voting, f"voter {_}")
        assert guest.post("/contest/vote", data={"token": offered(guest), "choice": "left"}).status_code == 303
    voting.state = "closed"
    page = client(voting, HOST).get("/contest/host").text
    assert (
        page.count('class="match"') == 3
        and page.count('class="won"') == 3
        and "The winner:" in page
        and "by bye" in page
    )


def test_a_damaged_key_is_told(contest: Contest) -> None:
    client(contest)
    (contest.folder / "pages.key").write_bytes(b"short")
    with pytest.raises(InputError, match="pages.key"):
        client(contest)


# ---- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as run:
        browser = run.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("scripts", [True, False])
def test_two_voters_in_two_browsers(chromium: Any, voting: Contest, scripts: bool, tmp_path: Path) -> None:
    """From the host's page to the standings, at a phone's width and a desk's, with scripts and without."""
    from kobza.web.run import serving

    with serving(make_app(voting, "http://127.0.0.1")) as url:
        asked: list[str] = []

        def opened(width: int) -> Any:
            context = chromium.new_context(viewport={"width": width, "height": 800}, java_script_enabled=scripts)
            page = context.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("dialog", lambda dialog: pytest.fail("a script ran"))
            return page

        def press(page: Any, button: str, role: str = "button") -> None:
            with page.expect_navigation():
                page.locator("main").get_by_role(role, name=button, exact=True).click()

        def fits(page: Any) -> None:
            if scripts:
                wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert wide <= 0, f"{page.url} is {wide} pixels too wide"
            page.screenshot(
                path=tmp_path / f"{page.url.rsplit('/', 1)[-1].partition('?')[0]}{page.viewport_size['width']}.png",
                full_page=True,
            )

        host = opened(1280)
        host.goto(f"{url}/contest/host")
        press(host, "Make a code")
        code = host.locator(".code").inner_text()
        assert code == voting.join_code()
        fits(host)
        for width, name in ((360, "Vera <b>"), (1280, "Olena")):
            page = opened(width)
            page.goto(f"{url}/contest/join?code={code}")
            fits(page)
            page.get_by_label("Your name").fill(name)
            press(page, "Join")
            assert page.locator("main strong").inner_text() == name
            fits(page)
            press(page, "Vote", "link")
            for choice in ("A is better", "B is better", "Both are as good"):
                fits(page)
                press(page, choice)
            assert "voted on all" in page.locator("main").inner_text()
        assert len(voting.votes()) == 6
        host.reload()
        press(host, "Close")
        fits(host)
        page.goto(f"{url}/contest/standings")
        fits(page)
        assert page.locator("tbody tr").count() == 3 and EVIL in page.locator("tbody").inner_text()
        assert all(address.startswith((url, "data:")) for address in asked)
