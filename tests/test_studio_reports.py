"""The room of reports: what is listed, how a certificate is told, that a page in its frame can do nothing, examinations."""

import json
import re
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("psutil")

from fastapi import FastAPI
from starlette.testclient import TestClient
from test_studio_runs import XSS, browser, fits, open_page, serving, write_run  # noqa: F401

from kobza.config import InputError
from kobza.pages.shell import render
from kobza.studio import jobs, reports
from kobza.studio.app import make_app
from kobza.studio.reports import examine, find_report, find_reports, room
from kobza.studio.reports_certificate import read_certificate, verdict

EVIL = """<!doctype html><title>x</title><style>p { color: red }</style><p id=told>A report</p>
<script>document.querySelector("#told").textContent = "owned"; parent.document.title = "owned"</script>
<img src="https://evil.example/pixel.png" onerror="top.location = 'https://evil.example/'">
<form action="https://evil.example/" method="post"><button>go</button></form>
<meta http-equiv="refresh" content="0; url=https://evil.example/">"""


def check(ok=True, **more):
    said = {"name": "ids", "what": "the ids of texts", "ok": ok, "measured": 0.25, "limit": 1, "unit": "differ"}
    return said | {"worst": "", "note": ""} | more


def certificate(*checks, **more):
    whole = {
        "kobza_certificate": 1,
        "certified": all(c["ok"] for c in checks),
        "name": "m",
        "form": "hf",
        "engine": "transformers",
    }
    whole |= {
        "independent": True,
        "checks": list(checks),
        "why_not": "",
        "machine": "a box",
        "date": "2026-11-22T10:00:00+00:00",
    }
    return json.dumps(whole | {"held_out": "given"} | more)


@pytest.fixture
def work(tmp_path):
    """A working folder with a run, an export, an examination and a trace."""
    page = render('{% extends "shell" %}{% block body %}<p>A report</p>{% endblock %}', title="Run")
    write_run(tmp_path / "runs" / "good", report_html=page)
    (tmp_path / "exports" / "m-hf").mkdir(parents=True)
    (tmp_path / "exports" / "m-hf" / "certificate.json").write_text(certificate(check(), check(name="engine")))
    (tmp_path / "exports" / "m-hf" / "certificate.html").write_text(page)
    (tmp_path / "exports" / "bare").mkdir()
    (tmp_path / "exports" / "bare" / "m.certificate.json").write_text(
        certificate(check(), check(ok=False, worst="' a' has 3"))
    )
    (tmp_path / "trace.html").write_text(page)
    return tmp_path


def test_reports_are_those_of_known_names_in_known_places(work):
    (work / "secret.html").write_text("no report")
    (work / "runs" / "good" / "notes.html").write_text("no report")
    found = {(report.kind, report.title) for report in find_reports(work)}
    assert found == {("Certificates", "m-hf"), ("Certificates", "bare"), ("Runs", "good"), ("Traces", "trace.html")}
    assert reports.link(work / "runs" / "good") in {report.href for report in find_reports(work)}
    assert reports.link(work / "runs") is None


def test_a_link_that_leads_out_is_no_report(work, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "private.html"
    outside.write_text("private")
    (work / "exports" / "away").mkdir()
    (work / "exports" / "away" / "certificate.html").symlink_to(outside)
    (work / "exports" / "whole").symlink_to(outside.parent)
    (outside.parent / "certificate.html").write_text("private")
    assert {report.title for report in find_reports(work) if report.kind == "Certificates"} == {"m-hf", "bare"}


def test_an_address_names_an_entry_of_the_list_never_a_path(work):
    (work / "secret.html").write_text("private")
    client = TestClient(make_app([room(work)]))
    for key in ("secret.html", "..%2Fsecret.html", "%2e%2e", "0" * 16, "%2Fetc%2Fpasswd", "x" * 5000):
        for path in ("at", "page"):
            answer = client.get(f"/reports/{path}/{key}")
            assert 400 <= answer.status_code < 500 and "private" not in answer.text
    report = next(report for report in find_reports(work) if report.kind == "Runs")
    assert "A report" in client.get(f"/reports/page/{report.key}").text
    report.path.unlink()
    assert client.get(f"/reports/page/{report.key}").status_code == 400
    with pytest.raises(InputError, match="not there any more"):
        find_report(work, report.key)


def test_a_page_comes_under_a_policy_that_lets_it_do_nothing(work, monkeypatch):
    client = TestClient(make_app([room(work)]))
    report = next(report for report in find_reports(work) if report.kind == "Runs")
    answer = client.get(f"/reports/page/{report.key}")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox;") and "allow" not in policy and "default-src 'none'" in policy
    assert answer.headers["x-frame-options"] == "SAMEORIGIN" and answer.headers["x-content-type-options"] == "nosniff"
    assert re.search(r'<iframe class="report-frame" sandbox (?!=)', client.get(report.href).text)
    monkeypatch.setattr(reports, "MOST_PAGE", 10)
    assert client.get(f"/reports/page/{report.key}").status_code == 400


def test_a_certificate_is_told_with_its_checks_and_limits(work):
    client = TestClient(make_app([room(work)]))
    listed = client.get("/reports").text
    assert "certified</span>" in listed and "not certified</span>" in listed
    good, bare = [next(r for r in find_reports(work) if r.title == title) for title in ("m-hf", "bare")]
    text = client.get(good.href).text
    assert (
        "certified: 2 checks held" in text
        and "0.25" in text
        and "another program than kobza" in text
        and "<iframe" in text
    )
    text = client.get(bare.href).text
    assert "not certified" in text and "fails" in text and "&#39; a&#39; has 3" in text and "<iframe" not in text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"checks": 3, "certified": true}',
        certificate({"name": "ids", "ok": True}),
        certificate().replace('"checks": []', '"checks": [1]'),
        "\x00",
    ],
)
def test_a_certificate_that_is_none_is_told_as_such(work, content):
    path = work / "exports" / "m-hf" / "certificate.json"
    path.write_text(content)
    found = read_certificate(path)
    assert found.problem and not found.certified and verdict(path.parent) == ("bad", "not certified")
    report = next(report for report in find_reports(work) if report.title == "m-hf")
    assert "cannot be read as a certificate" in TestClient(make_app([room(work)])).get(report.href).text


@pytest.mark.parametrize(
    "content",
    [
        certificate(check(ok=False), certified=True),
        certificate(check(ok="yes"), certified=True),
        certificate(certified=True),
        certificate(check(), certified=True, why_not="nobody looked"),
        certificate(check(), certified="yes"),
    ],
)
def test_a_certificate_is_believed_only_as_far_as_its_checks(work, content):
    path = work / "exports" / "m-hf" / "certificate.json"
    path.write_text(content)
    assert not read_certificate(path).certified


def test_what_a_certificate_says_stays_text(work):
    path = work / "exports" / "m-hf" / "certificate.json"
    path.write_text(
        certificate(
            check(ok=False, worst=XSS, measured=XSS, name=XSS), name=XSS, engine=[XSS], why_not=XSS, machine={"a": XSS}
        )
    )
    report = next(report for report in find_reports(work) if report.title == "m-hf")
    text = TestClient(make_app([room(work)])).get(report.href).text
    assert "<img src=x" not in text and "<script>window" not in text and "&lt;script&gt;" in text


def test_an_examination_that_is_not_offered_is_refused(work):
    client = TestClient(make_app([room(work)]))
    for which, name in (
        ("rm", "good"),
        ("doctor-run", "../good"),
        ("doctor-run", "m-hf"),
        ("certificate", "good"),
        ("", ""),
    ):
        answer = client.post("/reports/examine", data={"which": which, "name": name})
        assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"]
    assert TestClient(make_app([room(work, may_start=False)])).post("/reports/examine").status_code in (404, 405)
    assert not (work / "reports").exists()


def test_an_examination_runs_and_its_page_is_listed(work):
    """The real command, as a process: what `kobza certificate` says of an export whose file has gone."""
    (work / "exports" / "m-hf" / "certificate.json").write_text(
        certificate(check(), artifact={"model.bin": "0" * 64}, source={"sha256": ""}, versions={}, seed=0, seconds=1.0)
    )
    folder = examine(work, work / "runs", "certificate", "m-hf")
    with pytest.raises(InputError, match="under way"):
        examine(work, work / "runs", "certificate", "m-hf")
    client = TestClient(make_app([room(work)]))
    assert "running" in client.get("/reports/examinations").text
    end = time.monotonic() + 60
    while jobs.read_job(folder).exit_code is None and time.monotonic() < end:
        time.sleep(0.1)
    text = client.get("/reports/examinations").text
    assert jobs.read_job(folder).exit_code == 1 and "done: something is wrong" in text
    assert "model.bin is not there" in text and "kobza certificate" in text
    (folder / "page.html").write_text("<p>found</p>")
    assert f"/reports/at/{reports.Report('', folder / 'page.html', '').key}" in client.get("/reports/examinations").text
    assert ("Examinations", "certificate-m-hf") in {(report.kind, report.title) for report in find_reports(work)}


@pytest.mark.browser
def test_a_hostile_page_is_shown_and_does_nothing(browser, work):  # noqa: F811
    hits = []
    elsewhere = FastAPI()
    elsewhere.middleware("http")(lambda request, call: hits.append(request.url.path) or call(request))
    with serving(make_app([room(work)])) as base, serving(elsewhere) as evil:
        (work / "runs" / "good" / "report.html").write_text(EVIL.replace("https://evil.example", evil))
        for width in (1280, 390):
            page = open_page(browser, width, base)
            page.goto(f"{base}/reports")
            assert fits(page)
            page.locator("a.report", has_text="good").click()
            frame = page.frame_locator("iframe")
            frame.locator("p", has_text="A report").wait_for()
            assert frame.locator("p").evaluate("node => getComputedStyle(node).color") == "rgb(255, 0, 0)", (
                "its own style works"
            )
            page.wait_for_timeout(300)
            assert page.title().startswith("good") and page.url.startswith(base) and fits(page)
            assert frame.locator("#told").inner_text() == "A report"
            blocked = {
                problem for problem in page.problems if problem.startswith(evil)
            }  # tried, and held back by the policy
            assert set(page.problems) == blocked == {f"{evil}/pixel.png"} and hits == []
            page.goto(f"{base}/reports/at/{next(r.key for r in find_reports(work) if r.title == 'bare')}")
            page.locator(".badge", has_text="fails").wait_for()
            assert fits(page)
            page.close()
