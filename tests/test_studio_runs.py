"""The room of runs: curves read as they grow, folders of any kind, runs started, watched and stopped through the real page."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("psutil")

from starlette.testclient import TestClient

from kobza.config import InputError, run_from_dict, to_dict
from kobza.describe.parts import total_parameters
from kobza.run import lock
from kobza.studio import jobs, runs_curves
from kobza.studio.app import make_app
from kobza.studio.resources import Resources, read_line
from kobza.studio.runs import begin, room
from kobza.studio.runs_curves import Curves, all_records, last_records, parse
from kobza.studio.runs_folder import find_run, nearest_preset, read_config, read_samples, run_folders, summarise
from kobza.studio.runs_start import claim, helps, read_start, settings
from kobza.web.guard import Guard, Guarded

XSS = "<img src=x onerror=window.hit=1><script>window.hit=1</script>"
SETTINGS = {
    "model.n_layer": "1",
    "model.n_embd": "32",
    "model.n_head": "2",
    "model.max_seq_len": "16",
    "train.micro_batch": "4",
}


def line(step, **more):
    return json.dumps({"step": step, "train_loss": 4 / step, "tokens": 10 * step, "seconds": step / 5} | more) + "\n"


def write_run(folder, steps=8, planned=8, saved=(8,), **files):
    """A run's folder as training leaves it."""
    import tomli_w

    folder.mkdir(parents=True)
    config = run_from_dict({"model": {"vocab_size": 30}, "train": {"steps": planned}}, "test")
    (folder / "config.toml").write_text(tomli_w.dumps(to_dict(config)))
    (folder / "metrics.jsonl").write_text("".join(line(i, val_loss=2.5) for i in range(1, steps + 1)))
    for step in saved:
        (folder / "checkpoints" / f"{step:08d}").mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


# ---- curves ----------------------------------------------------------------------------------------------------------


def replay(curves, held, generation, cursor):
    """What the page does with an answer: put the new columns behind those it holds, or begin anew."""
    said = curves.since(generation, cursor)
    if said["all"]:
        held.clear()
    for axis in ("step", "tokens", "seconds"):
        held.setdefault(axis, []).extend(said[axis])
    return said["generation"], said["cursor"]


@given(cuts=st.lists(st.integers(0, 9000), max_size=12), n=st.integers(0, 150), most=st.sampled_from([8, 64, 2048]))
def test_a_file_read_as_it_grows_gives_the_curves_of_the_whole(tmp_path_factory, cuts, n, most):
    """Cut anywhere, within a line too: no record is lost or counted twice, no extreme is merged away, the page is in step."""
    path = tmp_path_factory.mktemp("curves") / "metrics.jsonl"
    whole = "".join(line(i, val_loss=float(i % 7)) if i % 10 == 0 else line(i) for i in range(1, n + 1)).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_curves, "MOST_BUCKETS", most)
        patch.setattr(runs_curves, "CHUNK", 256)
        curves, held, at = Curves(path), {}, (0, 0)
        for cut in sorted({min(cut, len(whole)) for cut in cuts} | {len(whole)}):
            path.write_bytes(whole[:cut])
            curves.read()
            at = replay(curves, held, *at)
        said = curves.since(0, 0)
    assert {axis: said[axis] for axis in held} == held, "the page holds what the server has"
    assert len(said["step"]) <= most and said["cursor"] == n
    assert said["step"] == sorted(set(said["step"])) and said["step"][-1:] == ([n] if n else [])
    for name, wanted in (("train_loss", n), ("val_loss", n // 10)):
        curve = said.get(name, {"count": [], "low": [], "high": [], "mean": []})
        assert sum(curve["count"]) == wanted
    if n:
        assert max(said["train_loss"]["high"]) == 4 and min(said["train_loss"]["low"]) == pytest.approx(4 / n)
        total = sum(m * c for m, c in zip(said["train_loss"]["mean"], said["train_loss"]["count"], strict=True))
        assert total == pytest.approx(sum(4 / i for i in range(1, n + 1)), rel=1e-5)


def test_a_long_run_is_read_once_and_then_only_where_it_grew(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(i, train_loss=9.0 if i == 77_777 else 2.0) for i in range(1, 100_001)))
    curves = Curves(path)
    curves.read()
    first = curves.since(0, 0)
    assert len(first["step"]) <= runs_curves.MOST_BUCKETS and max(first["train_loss"]["high"]) == 9.0
    counts = [c for c in first["train_loss"]["count"]]
    assert max(counts) <= 2 * min(counts[1:-1]), "old and new steps are drawn as finely"
    parsed = []
    monkeypatch.setattr(runs_curves, "parse", lambda words: parsed.append(words) or parse(words))
    with open(path, "a") as file:
        file.write(line(100_001) + line(100_002)[:20])
    curves.read()
    assert len(parsed) == 1, "the line that came, and not the half one"
    more = curves.since(first["generation"], first["cursor"])
    assert not more["all"] and more["step"] == [100_001]


def test_a_resumed_run_begins_its_curves_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(line, range(1, 20))))
    curves = Curves(path)
    curves.read()
    before = curves.since(0, 0)
    aside = tmp_path / "aside"
    aside.write_text("".join(line(i, train_loss=1.0) for i in range(1, 30)))  # longer, and other from the first line on
    os.replace(aside, path)
    curves.read()
    said = curves.since(before["generation"], before["cursor"])
    assert said["all"] and said["step"] == list(range(1, 30)) and set(said["train_loss"]["mean"]) == {1.0}
    path.write_text(line(1))
    curves.read()
    assert curves.since(0, 0)["step"] == [1]


def test_a_step_written_again_takes_the_place_of_the_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(line, (1, 2, 3))) + line(2, train_loss=7.0))
    assert [r["step"] for r in all_records(path)] == [1, 2]
    curves = Curves(path)
    curves.read()
    with open(path, "a") as file:
        file.write(line(2, train_loss=8.0))
    curves.read()
    said = curves.since(0, 0)
    assert said["step"] == [1, 2] and said["train_loss"]["mean"] == [4.0, 8.0]


HOSTILE = [
    b"",
    b"[]",
    b"1",
    b"null",
    b'{"step": true}',
    b'{"step": 1e400, "train_loss": 1}',
    b'{"step": -1}',
    b'{"step": 2.5}',
    b'{"step": "3"}',
    b'{"step": 99999999999999999999}',
    b'{"step": ' + b"9" * 5000 + b"}",
    b"[" * 60_000,
    b'{"step": 1, "tokens": ' + b"9" * 400 + b"}",
    b"\xff\xfe{}",
    b'{"step": 4, "train_loss": ' + b"1" * 70_000 + b"}",
]


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    assert [parse(words) for words in HOSTILE] == [None] * len(HOSTILE)
    odd = b'{"step": 3, "train_loss": NaN, "val_loss": Infinity, "lr": null, "grad_norm": [1]}'
    assert parse(odd) == {"step": 3}
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b"\n".join([*HOSTILE, odd, line(5).strip().encode(), line(6, train_loss=1e308).strip().encode()]) + b"\n"
    )
    curves = Curves(path)
    curves.read()
    said = curves.since(0, 0)
    assert said["step"] == [3, 5, 6]
    json.dumps(said, allow_nan=False)
    assert last_records(path)[-1]["train_loss"] == 1e308


def test_a_pipe_in_place_of_the_metrics_does_not_hold_the_page(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    curves = Curves(tmp_path / "metrics.jsonl")
    curves.read()
    assert curves.since(0, 0)["step"] == [] and last_records(tmp_path / "metrics.jsonl") == []


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_the_state_of_a_run_is_read_off_its_folder(tmp_path):
    done = write_run(tmp_path / "done", best_json='{"step": 8, "val_loss": 2.25}')
    found = summarise(done, total_parameters)
    assert (found.state, found.step, found.steps, found.val_loss, found.best) == ("finished", 8, 8, 2.5, 2.25)
    assert found.n_params == total_parameters(read_config(done).model)
    assert summarise(write_run(tmp_path / "stopped", planned=20)).state == "stopped"
    assert summarise(write_run(tmp_path / "died", planned=20, saved=(4,))).state == "died"
    early = write_run(tmp_path / "early", planned=20)
    assert summarise(early).state == "stopped"
    (early / "report.html").write_text("by patience")
    assert summarise(early).state == "finished"
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "train.log").write_text("kobza: no")
    assert summarise(failed).state == "died"
    (tmp_path / "other").mkdir()
    assert {folder.name for folder in run_folders(tmp_path)} == {"done", "stopped", "died", "early", "failed"}


def test_a_run_that_a_terminal_started_is_seen_by_its_lock_which_is_not_taken(tmp_path):
    folder = write_run(tmp_path / "live", planned=20)
    with lock(folder):
        found = summarise(folder)
        assert found.state == "running" and found.seconds_left == pytest.approx(12 / 5)
        if Path("/proc/locks").exists():
            assert jobs.worker(folder) == os.getpid()
        (folder / "metrics.jsonl").unlink()
        assert summarise(folder).state == "starting"
    assert summarise(folder).state == "empty"


@pytest.mark.parametrize("spoil", ["config", "metrics", "samples", "best", "checkpoints", "folders", "job"])
def test_a_spoiled_folder_is_shown_as_far_as_it_can_be_read(tmp_path, spoil):
    folder = write_run(tmp_path / "odd")
    junk = b"\x00\xff" * 40 + b"= [[[["
    if spoil == "config":
        (folder / "config.toml").write_bytes(junk)
        assert summarise(folder).step == 8 and nearest_or_none(folder) is None
        (folder / "config.toml").write_text("model = 3\n[train]\nsteps = 'x'\n")
        assert summarise(folder).steps is None
    elif spoil == "metrics":
        (folder / "metrics.jsonl").write_bytes(junk * 5000 + b"\n" + line(9).encode() + b'{"step": 10, "tr')
        assert summarise(folder).step == 9
    elif spoil == "samples":
        (folder / "samples.jsonl").write_bytes(junk + b'\n{"step": 1}\n{"step": 2, "text": "\xff"}\n{"step": 3, "te')
        assert read_samples(folder) == [{"step": 2, "text": "\ufffd"}]
    elif spoil == "best":
        (folder / "best.json").write_text('{"val_loss": [1]}')
        assert summarise(folder).best is None
    elif spoil == "checkpoints":
        shutil.rmtree(folder / "checkpoints")
        (folder / "checkpoints").write_text("no folder")
        assert summarise(folder).state == "died"
    elif spoil == "folders":
        for name in ("config.toml", "metrics.jsonl"):
            (folder / name).unlink()
            (folder / name).mkdir()
        assert run_folders(tmp_path) == []
    else:
        for content in (
            '{"pid": 1}',
            "[]",
            json.dumps({"pid": -1, "began": 0, "argv": [], "exit_code": None, "asked": 0}),
        ):
            (folder / "job.json").write_text(content)
            assert jobs.read_job(folder) is None
    client = TestClient(make_app([room(tmp_path, count=total_parameters)]))
    for path in ("/runs", "/runs/table", "/runs/data?run=0.0.odd"):
        assert client.get(path).status_code == 200
    assert client.get("/runs/at/odd").status_code == (400 if spoil == "folders" else 200)


def nearest_or_none(folder):
    config = read_config(folder)
    return nearest_preset(config) if config else None


def test_only_what_differs_from_the_preset_is_named():
    from kobza.config import preset

    values = preset("tiny")
    own = run_from_dict({"model": values["model"] | {"n_embd": 64}, "train": values["train"] | {"steps": 20}}, "test")
    assert nearest_preset(own) == ("tiny", {"model.n_embd": (64, 112), "train.steps": (20, 300)})


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "%2e%2e", "/etc", "x" * 300, "", "a\x00b", "con fig"])
def test_a_name_never_becomes_a_path(tmp_path, name):
    write_run(tmp_path / "runs" / "good")
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(InputError, match="no run"):
        find_run(tmp_path / "runs", name)
    if name:
        with pytest.raises(InputError, match="will not do"):
            claim(tmp_path / "runs", name, "tiny")
    client = TestClient(make_app([room(tmp_path / "runs")]))
    from urllib.parse import quote

    assert 400 <= client.get("/runs/at/" + quote(name, safe="").replace(".", "%2E")).status_code < 500
    assert client.get("/runs/data", params={"run": f"0.0.{name}"}).json()["runs"] == []


# ---- a start ---------------------------------------------------------------------------------------------------------


def test_the_form_has_every_setting_with_its_help():
    from kobza.config import SECTIONS

    found = settings("tiny")
    assert len(found) == sum(len(cls.__dataclass_fields__) for cls in SECTIONS.values())
    assert all(setting.help for setting in found)
    assert helps(SECTIONS["train"])["steps"] == "updates of the weights"
    assert {s.name: s.value for s in found}["model.n_embd"] == 112


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"train.steps": "abc"}, "steps is 'abc'; it must be of type int"),
        ({"train.steps": "9" * 6000}, "steps is '999"),
        ({"train.lr": "-1"}, "train.lr is -1.0; it must be above 0"),
        ({"train.lr": "nan"}, "lr is nan; it must be a finite number"),
        (
            {"model.n_head": "7", "model.n_embd": "30"},
            "model.n_embd is 30, not divisible by model.n_head 7; take n_embd 28",
        ),
        ({"model.mlp": "swish"}, "mlp is 'swish'; one of relu2"),
        ({"model.rope_factor": "2"}, "has no effect with rope_scaling=none"),
        ({"preset": "dmo"}, "unknown preset 'dmo'; did you mean demo?"),
        ({"seed": "-1"}, "--seed is '-1'"),
    ],
)
def test_what_the_config_refuses_the_form_refuses_in_its_words(form, said):
    with pytest.raises(InputError, match=re.escape(said)):
        read_start({"preset": "tiny"} | form)


def test_a_start_is_the_command_line_that_means_the_same(tmp_path):
    """The words are given to the real command line, whose config must be the form's."""
    from kobza import cli

    form = {"preset": "demo", "model.norm": "none", "model.tied": "on", "train.embed_weight_decay": "0.5", "seed": "7"}
    start = read_start(form | {"train.steps": "600", "model.n_ff": ""})
    assert start.changed == {"model.norm": "none", "model.tied": True, "train.embed_weight_decay": 0.5}
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cli, "recipe", lambda verb: type("R", (), {"main": staticmethod(lambda *a: caught.append(a) or 0)})
        )
        assert cli.main(start.argv(tmp_path / "a text.txt", tmp_path / "out")) == 0
    text, config, out = caught[0][:3]
    assert (text, config, out) == ([str(tmp_path / "a text.txt")], start.config, tmp_path / "out")


def test_a_name_is_taken_once(tmp_path):
    write_run(tmp_path / "there")
    with pytest.raises(InputError, match="there is there already; take another name"):
        claim(tmp_path, "there", "tiny")
    assert claim(tmp_path, "", "tiny").name == "tiny"
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "train.log").write_text("kobza: no such text")
    assert claim(tmp_path, "failed", "tiny") == failed and (failed / "train.log").read_text() == ""


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"source": "path", "path": "/no/such/text"}, "no text at '/no/such/text'"),
        ({"source": "path", "path": ""}, "no text at"),
        ({"source": "paste", "paste": "  "}, "the text is empty"),
        ({"source": "paste", "paste": "x" * 101}, "the text has 101 bytes and 100 is the most here"),
        ({"source": "upload"}, "the text is empty"),
        ({"source": "web"}, "unknown source of text 'web'"),
    ],
)
def test_a_text_that_will_not_do_leaves_no_folder(tmp_path, form, said):
    with pytest.raises(InputError, match=re.escape(said)):
        begin(tmp_path, {"preset": "tiny", "name": "new"} | form, None, 100)
    with pytest.raises(InputError, match="not UTF-8"):
        begin(tmp_path, {"preset": "tiny", "name": "new", "source": "upload"}, b"\xff\xfe", 100)
    assert list(tmp_path.iterdir()) == []


# ---- jobs and the machine --------------------------------------------------------------------------------------------


def test_a_job_is_known_again_and_never_mistaken(tmp_path):
    """Its number alone is not enough: the system gives numbers again."""
    me = jobs.Job(os.getpid(), jobs.began(os.getpid()), ["train"])
    jobs.note(tmp_path, me)
    assert jobs.is_alive(jobs.read_job(tmp_path))
    jobs.note(tmp_path, jobs.Job(os.getpid(), me.began - 100, ["train"]))
    assert not jobs.is_alive(jobs.read_job(tmp_path)) and jobs.worker(tmp_path) is None
    with pytest.raises(InputError, match="nothing runs there"):
        jobs.stop(tmp_path)


HOLDER = """
import signal, sys, time, filelock
signal.signal(signal.SIGINT, lambda *_: stops and sys.exit(0))
stops = sys.argv[2] == "stops"
with filelock.FileLock(sys.argv[1] + "/.lock"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not list its locks")
@pytest.mark.parametrize("how", ["stops", "does not"])
def test_a_run_that_a_terminal_started_is_stopped_by_its_lock(tmp_path, how):
    folder = write_run(tmp_path / "live", planned=20)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), how], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            client = TestClient(make_app([room(tmp_path)]))
            assert "Stop" in client.get("/runs/at/live").text
            assert client.post("/runs/at/live/resume").status_code == 400
            assert client.post("/runs/at/live/stop", follow_redirects=False).status_code == 303
            if how == "stops":
                assert process.wait(20) == 0
            else:
                time.sleep(0.2)
                assert process.poll() is None and summarise(folder).state == "running"
                assert client.post("/runs/at/live/kill", follow_redirects=False).status_code == 303
                assert process.wait(20) == -9
        finally:
            process.kill()
    assert summarise(folder).state == "stopped"
    assert client.post("/runs/at/live/kill").status_code == 400


def test_use_is_measured(tmp_path):
    found = Resources()
    assert {use.name for use in found.machine(tmp_path / "not" / "there")} >= {"Processor", "Memory", "Disk"}
    assert [use.name for use in found.process(os.getpid())] == ["Processor", "Memory"]
    assert found.process(2**22 + 1) == []
    assert read_line("NVIDIA H200, 1024, 143771, 37").share == pytest.approx(1024 / 143771)
    assert read_line("Old card, [N/A], [N/A], [N/A]") is None and read_line("") is None


# ---- the pages -------------------------------------------------------------------------------------------------------


def test_what_a_model_or_a_person_wrote_stays_text(tmp_path):
    folder = write_run(tmp_path / "x<script>y", samples_jsonl=json.dumps({"step": 1, "text": XSS}) + "\n")
    (folder / "train.log").write_text(XSS)
    client = TestClient(make_app([room(tmp_path)]))
    for page in (
        "/runs",
        "/runs/at/x%3Cscript%3Ey",
        "/runs/at/x%3Cscript%3Ey/part/samples",
        "/runs/at/x%3Cscript%3Ey/part/log",
    ):
        answer = client.get(page)
        assert answer.status_code == 200
        assert "<img src=x" not in answer.text and "<script>" not in answer.text and "<script>y" not in answer.text
    form = {"preset": "tiny", "name": XSS, "source": "paste", "paste": "</textarea>" + XSS}
    answer = client.post("/runs/new", data=form, files={"upload": b""})
    assert answer.status_code == 422 and "<img src=x" not in answer.text and "</textarea>&" not in answer.text


def test_a_studio_that_may_not_start_has_no_address_for_it(tmp_path):
    write_run(tmp_path / "done")
    client = TestClient(make_app([room(tmp_path, may_start=False)]))
    assert "/runs/new" not in client.get("/runs").text and "/resume" not in client.get("/runs/at/done").text
    for path in ("/runs/new", "/runs/at/done/stop", "/runs/at/done/kill", "/runs/at/done/resume"):
        assert client.post(path).status_code in (404, 405)


def test_requests_that_make_no_sense_hear_why(tmp_path):
    write_run(tmp_path / "done")
    client = TestClient(make_app([room(tmp_path)]))
    for query in ("run=done", "run=-1.0.done", "run=a.b.done", "run=%D9%A3.0.done", "&".join(["run=0.0.done"] * 9)):
        answer = client.get(f"/runs/data?{query}")
        assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"]
    assert client.get("/runs/at/done/part/new").status_code == 400
    assert client.post("/runs/at/done/stop").status_code == 400
    for steps in ("8", "x", "-3", "9" * 40, ""):
        assert client.post("/runs/at/done/resume", data={"steps": steps}).status_code == 400
    assert (
        client.post(
            "/runs/new", content=b"--x\r\ngarbage", headers={"content-type": "multipart/form-data; boundary=x"}
        ).status_code
        < 500
    )


# ---- the real page ---------------------------------------------------------------------------------------------------

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


class Coach:
    """The real one, as the recipe hands it in."""

    def landmarks(self, folder):
        from kobza.report.console import landmarks_of
        from kobza.run import open_run

        found = landmarks_of(open_run(folder))
        return {"uniform": found.uniform, "unigram": found.unigram, "bigram": found.bigram}

    def remarks(self, folder, records):
        from kobza.report.coach import remarks
        from kobza.report.console import facts_of, landmarks_of
        from kobza.run import open_run

        run = open_run(folder)
        return remarks(records, landmarks_of(run), facts_of(run, total_parameters(run.config.model)))


class Told:
    """A coach that says what it is told."""

    losses = {}

    def landmarks(self, folder):
        return {"uniform": self.losses.get(folder.name, 6.0), "unigram": 2.0, "bigram": 1.0}

    def remarks(self, folder, records):
        raise InputError("not now")


@contextmanager
def serving(app):
    """An app behind the guard on a free port -> its address."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app.add_middleware(Guarded, guard=Guard(max_body=8 << 20))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


def open_page(browser, width, base):
    """A page of a width, which must ask no other address and throw no error."""
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.set_default_timeout(30_000)
    page.problems = []
    page.on("request", lambda request: request.url.startswith(base) or page.problems.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    return page


def fits(page):
    """Whether the page has no sideways scrolling."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def fill_in(page, base, name, **more):
    """Fill in the form for a tiny run, and send it."""
    from test_run import verse

    page.goto(f"{base}/runs/new")
    page.select_option("#preset", "tiny")
    page.locator("#settings", has_text="preset tiny").wait_for()
    page.fill("#name", name)
    page.locator("label.switch", has_text="Paste").click()
    page.fill("#paste", verse())
    page.locator("summary", has_text="Training").click()
    for key, value in (SETTINGS | more).items():
        page.fill(f'[name="{key}"]', value)
    page.get_by_role("button", name="Start").click()


@pytest.mark.browser
@pytest.mark.slow
def test_a_person_starts_watches_stops_and_goes_on(browser, tmp_path, request):
    """Two runs through the page: a short one to its end, a long one that is stopped, found by a new studio, and gone on with."""
    runs = tmp_path / "runs"
    request.addfinalizer(lambda: jobs.worker(runs / "long") and jobs.kill(runs / "long"))
    app = make_app([room(runs, coach=Coach(), count=total_parameters)])
    with serving(app) as base:
        page, phone = open_page(browser, 1280, base), open_page(browser, 390, base)
        fill_in(page, base, "short", **{"train.steps": "20", "train.eval_interval": "10"})
        fill_in(phone, base, "long", **{"train.steps": "200000", "train.eval_interval": "200"})
        assert page.url == f"{base}/runs/at/short" and phone.url == f"{base}/runs/at/long"
        page.locator("#state", has_text="finished").wait_for()
        page.locator("#samples .sample", has_text="step 20").wait_for()
        page.locator(".chart.big path.curve").first.wait_for()
        page.get_by_text("knows nothing", exact=False).first.wait_for()
        phone.locator("#samples .sample").first.wait_for()
        phone.locator(".chart.big path.curve").first.wait_for()
        assert fits(page) and fits(phone)
        grew = phone.locator("#now dd").first.inner_text()
        phone.wait_for_function("old => document.querySelector('#now dd').innerText !== old", arg=grew)
    with serving(make_app([room(runs, coach=Coach())])) as base:  # a studio that knows nothing but the folder
        phone.goto(f"{base}/runs/at/long")
        phone.problems.clear()
        phone.get_by_role("button", name="Stop").click()
        phone.locator("#state", has_text="stopped").wait_for()
        stands = summarise(runs / "long").step
        assert summarise(runs / "long").state == "stopped" and stands < 200_000
        phone.locator("#actions button", has_text="Go on").click()
        phone.locator("#state", has_text="running").wait_for()
        phone.wait_for_function(
            "old => +document.querySelector('#now dd').innerText.split(' ')[0].replaceAll(',', '') > old", arg=stands
        )
        phone.goto(f"{base}/runs?show=short&show=long")
        phone.wait_for_function("() => document.querySelectorAll('.chart.big path.curve').length === 4")
        phone.locator("button", has_text="short").click()
        phone.wait_for_function("() => document.querySelectorAll('.chart.big path.curve').length === 2")
        assert fits(phone)
        phone.goto(f"{base}/runs/at/long")
        phone.get_by_role("button", name="Stop").click()
        phone.locator("#state", has_text="stopped").wait_for()
    assert page.problems == [] and not [p for p in phone.problems if not p.startswith("http://127.0.0.1")]
    page.close()
    phone.close()


@pytest.mark.browser
def test_a_person_reads_curves_and_nothing_hostile_runs(browser, tmp_path):
    name = "<img src=x onerror=window.hit=1>"
    write_run(tmp_path / name, samples_jsonl=json.dumps({"step": 1, "text": XSS}) + "\n")
    odd = [line(i, train_loss=float("nan") if i % 2 else 1e300, lr=-1.0, grad_norm=1e-300) for i in range(1, 30)]
    (write_run(tmp_path / "odd") / "metrics.jsonl").write_text("".join(odd) + '{"step": 31, "train')
    write_run(tmp_path / "good", steps=50, planned=100, tokenizer_json="{}")
    (tmp_path / name / "tokenizer.json").write_text("{}")
    coach = Told()
    with serving(make_app([room(tmp_path, coach)])) as base:
        for width in (1280, 390):
            page = open_page(browser, width, base)
            page.goto(f"{base}/runs?show=good&show=odd&show={name.replace('=', '%3D')}")
            page.wait_for_function("() => document.querySelectorAll('.chart.big path.curve').length >= 5")
            page.locator("label.switch", has_text="log scale").click()
            page.locator("label.switch", has_text="seconds").click()
            page.locator("button[data-chip=odd]").click()
            page.wait_for_function("() => document.querySelectorAll('.chart.big path.curve').length === 4")
            assert (
                "NaN" not in page.locator(".charts").inner_html()
                and "Infinity" not in page.locator(".charts").inner_html()
            )
            assert page.locator(".chart.big .mark-line").count() == 3 * (width == 1280), "of one text, and of two"
            box = page.locator(".chart.big svg").bounding_box()
            page.locator(".chart.big svg").hover(position={"x": 46 + (box["width"] - 52) / 2, "y": 100})
            assert re.search(
                r"second 5(\.2)? · good train 0\.1[56]", page.locator(".chart.big figcaption").inner_text()
            )
            page.locator("table a", has_text="<img").click()
            page.locator("#samples", has_text="<script>window.hit=1</script>").wait_for()
            assert page.evaluate("window.hit") is None and fits(page) and page.problems == []
            page.close()
            coach.losses = {"good": 9.0}
            (tmp_path / "good" / "tokenizer.json").write_text("{ }")
            os.utime(tmp_path / "good" / "tokenizer.json", (1, 1))
