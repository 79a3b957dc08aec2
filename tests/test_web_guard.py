"""The guard and the runner: who is let in, how much, how long; raw sockets where a client library would not misbehave."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode

import httpx
import pytest

pytest.importorskip("uvicorn")

from kobza.config import InputError
from kobza.web.guard import Guard, Guarded
from kobza.web.run import Patience, listening, serving

KEY = "a-key-of-some-length"


async def echo(scope, receive, send):
    """Answers with the body's length; /slow never ends by itself, /flood writes without end, /boom fails."""
    path, size = scope["path"], 0
    if path == "/boom":
        raise RuntimeError("boom")
    if path == "/lazy":
        return await reply(send, b"unread")
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size, more = size + len(message["body"]), message.get("more_body", False)
    if path == "/slow":
        scope["state"]["log"].append("began")
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            scope["state"]["log"].append("ended")
        return None
    if path == "/flood":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    if path == "/wait":
        await asyncio.sleep(float(scope["query_string"] or 1))
    return await reply(send, str(size).encode())


async def reply(send, body):
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]}
    )
    await send({"type": "http.response.body", "body": body})


def app(guard, log=None):
    """The echo behind a guard, its lifespan accepted."""
    inner, seen = Guarded(echo, guard), [] if log is None else log

    async def whole(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        scope["state"] = {"log": seen}
        await inner(scope, receive, send)

    return whole


@contextlib.contextmanager
def server(patience=None, log=None, **settings):
    guard = Guard(**settings)
    with serving(app(guard, log), guard, patience or Patience()) as url:
        yield url


def ask(guard, path="/", method="POST", body=b"", **headers):
    """One request without a socket -> response."""

    async def go():
        transport = httpx.ASGITransport(app=app(guard))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, content=body, headers=headers)

    return asyncio.run(go())


def raw(url, data, wait=5.0, parts=None):
    """What a server answers to these bytes, until it closes or `wait` is over."""
    host, port = url.removeprefix("http://").split(":")
    got = b""
    with socket.create_connection((host, int(port)), timeout=wait) as s:
        s.sendall(data)
        for part in parts or ():
            time.sleep(0.05)
            with contextlib.suppress(OSError):
                s.sendall(part)
        with contextlib.suppress(OSError):
            while chunk := s.recv(65536):
                got += chunk
    return got


def message(response):
    body = json.loads(response.content if hasattr(response, "content") else response.partition(b"\r\n\r\n")[2])
    assert set(body["error"]) == {"message", "type", "param", "code"} and "\n" not in body["error"]["message"]
    return body["error"]["message"]


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


# ---- keys, hosts, origins --------------------------------------------------------------------------------------------


def test_another_host_than_loopback_demands_a_key():
    with pytest.raises(InputError, match=r"0\.0\.0\.0 can be reached .*--key [\w-]{32}"):
        Guard(host="0.0.0.0")
    for host in ("192.168.1.2", "::", "my-machine", ""):
        with pytest.raises(InputError):
            Guard(host=host)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        Guard(host=host)
    Guard(host="0.0.0.0", keys=(KEY,))
    Guard(host="0.0.0.0", open_paths=("/",))  # an app that knows its guests itself
    for key in ("short", "a key with spaces in it", "ключ-що-не-є-ascii-ключем"):
        with pytest.raises(InputError, match="a key is"):
            Guard(keys=(key,))


def test_a_key_is_asked_for_in_three_forms():
    guard = Guard(host="0.0.0.0", keys=("other-key-0123456789", KEY))
    basic = b64encode(f"anyone:{KEY}".encode()).decode()
    for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"authorization": f"Basic {basic}"}):
        assert ask(guard, **headers).status_code == 200
    wrong = (
        {},
        {"authorization": KEY},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {KEY}x"},
        {"x-api-key": ""},
    )
    for headers in (
        *wrong,
        {"authorization": "Basic ###"},
        {"authorization": f"bearer {KEY[:-1]}"},
        {"x-api-key": "\xff"},
    ):
        refused = ask(guard, **{k: v.encode("latin-1") for k, v in headers.items()})
        assert refused.status_code == 401 and KEY not in refused.text and "Bearer KEY" in message(refused)
    assert ask(guard, "/health", "GET").status_code == 200
    assert ask(guard, "/healthy", "GET").status_code == 401
    assert ask(guard, accept="text/html").headers["www-authenticate"].startswith("Basic")


def test_a_page_elsewhere_cannot_reach_loopback():
    guard = Guard()
    for host in ("127.0.0.1", "127.0.0.1:8000", "localhost:1", "[::1]:8000", "LOCALHOST"):
        assert ask(guard, host=host).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "", "evil.example:8000", "[evil]", "127.0.0.1@evil.example"):
        assert ask(guard, host=host).status_code == 403, host
    assert ask(Guard(hosts=("kobza.local",)), host="kobza.local:80").status_code == 200
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:9999",
        "http://[",
        "https://127.0.0.1.evil.example",
    ):
        assert ask(guard, origin=origin).status_code == 403, origin
        assert (
            ask(guard, "/", "GET", origin=origin).status_code == 200
        )  # reads alone are harmless: it cannot see the answer
    assert ask(guard, origin="http://127.0.0.1").status_code == 200
    assert ask(guard, **{"sec-fetch-site": "cross-site"}).status_code == 403
    assert ask(Guard(origins=("https://friend.example",)), origin="https://friend.example").status_code == 200


# ---- how much, how long ----------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_refused_whether_announced_or_not():
    guard = Guard(max_body=1000)
    assert ask(guard, body=b"x" * 1000).text == "1000"
    announced = ask(guard, body=b"x" * 1001)
    assert announced.status_code == 413 and "1,001" in message(announced) and "1,000" in message(announced)

    async def chunks():
        for _ in range(11):
            yield b"x" * 100

    assert ask(guard, body=chunks()).status_code == 413
    with server(max_body=1000) as url:  # the client hears it although it sends ten megabytes
        assert httpx.post(url, content=b"x" * (10 << 20)).status_code == 413
        assert httpx.post(url, content=b"x" * 1000).text == "1000"
        assert b" 413 " in raw(
            url, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n"
        )
        assert b" 400 " in raw(url, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n")


def test_one_too_many_at_once_is_told_when_to_come_again():
    log = []
    with server(log=log, at_once=3, at_once_per_address=2) as url, httpx.Client(timeout=0.5) as client:
        threads = [threading.Thread(target=lambda: quiet(url + "/slow")) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: log.count("began") == 2)
        refused = client.post(url)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1" and "2 requests" in message(refused)
        assert client.get(url + "/health").status_code == 200
        for thread in threads:
            thread.join()
        until(lambda: log.count("ended") == 2)  # who hangs up gives the place back
        assert client.post(url).status_code == 200


def quiet(url):
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url, timeout=0.5)


def test_a_request_that_takes_too_long_ends():
    began = time.monotonic()
    late = ask(Guard(seconds=0.2), "/wait?30")
    assert late.status_code == 504 and "0.2 seconds" in message(late) and time.monotonic() - began < 5


def test_a_failure_is_one_body_without_its_insides(caplog):
    failed = ask(Guard(), "/boom")
    assert failed.status_code == 500 and "boom" not in failed.text and message(failed)
    assert [r.levelname for r in caplog.records if "failed" in r.message] == ["ERROR"]


def test_each_request_is_one_line_without_secrets(caplog):
    caplog.set_level(logging.INFO, "kobza.web")
    ask(Guard(keys=(KEY,)), "/a%0d%0ab?token=hidden", body=b"the body", **{"x-api-key": KEY})
    lines = [record.getMessage() for record in caplog.records if record.name == "kobza.web"]
    assert len(lines) == 1 and " POST /a%0d%0ab 200 " in lines[0]
    assert not any(word in lines[0] for word in (KEY, "hidden", "the body", "\n"))


# ---- raw sockets -----------------------------------------------------------------------------------------------------


def test_headers_that_trickle_are_cut_off():
    with server(Patience(head=0.4)) as url:
        began = time.monotonic()
        got = raw(url, b"GET / HTTP/1.1\r\n", parts=[b"X-%d: 1\r\n" % i for i in range(20)])
        assert b" 408 " in got and "0.4 seconds" in message(got) and time.monotonic() - began < 4
        assert b" 408 " in raw(url, b"")  # nor may a connection stay silent
        again = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"  # nor begin a second request and leave it
        got = raw(url, again + b"GET / HT")
        assert got.startswith(b"HTTP/1.1 200") and got.count(b"HTTP/1.1") <= 2


def test_a_body_that_trickles_is_cut_off_and_one_that_nobody_reads():
    with server(Patience(head=0.4), body_seconds=0.4) as url:
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        got = raw(url, head % b"/", parts=[b"x"] * 20)
        assert b" 408 " in got and "bytes of the body" in message(got)
        began = time.monotonic()
        got = raw(url, head % b"/lazy", parts=[b"x"] * 20)
        assert b"unread" in got and time.monotonic() - began < 5


def test_a_reader_that_does_not_read_is_dropped_and_holds_nobody(caplog):
    guard = Guard()
    with serving(app(guard), guard, Patience(read=0.4)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as s:
            s.sendall(b"POST /flood HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            until(lambda: guard.traffic.running.total() == 1)
            assert httpx.post(url, content=b"abc").text == "3"  # others are answered meanwhile
            until(lambda: guard.traffic.running.total() == 0)
            assert any("does not read its answer; dropped" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello in TLS",
        b"PRI * HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"\r\n\r\n\r\n\x00\x00",
    ],
)
def test_what_is_no_plain_request_gets_a_400(head, smuggling):
    got = raw(smuggling, head, wait=3)
    assert got.startswith(b"HTTP/1.1 400 ") and got.count(b"HTTP/1.1 ") == 1 and message(got)
    assert httpx.get(smuggling).status_code == 200


@pytest.fixture(scope="module")
def smuggling():
    with server(Patience(head=1.0)) as url:
        yield url


def test_two_hosts_are_no_host(smuggling):
    got = raw(smuggling, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", wait=3)
    assert got.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))


def test_one_connection_too_many_is_dropped():
    with server(Patience(head=5.0, connections=3)) as url, contextlib.ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        held = [stack.enter_context(socket.create_connection((host, int(port)), timeout=3)) for _ in range(6)]
        time.sleep(0.3)
        for s in held:
            s.setblocking(False)
        open_ones = 0
        for s in held:
            try:
                s.recv(1)
            except BlockingIOError:
                open_ones += 1
            except ConnectionError:
                pass
        assert open_ones == 3


# ---- the socket and the end ------------------------------------------------------------------------------------------


def test_a_port_in_use_is_said_in_one_line():
    with listening("127.0.0.1", 0) as (sock, _):
        sock.listen()
        port = sock.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"port {port} on 127.0.0.1 is in use; .*--port"),
            listening("127.0.0.1", port),
        ):
            pass
    for host, port in (("not a host", 0), ("no.such.host.invalid", 0), ("127.0.0.1", 99999), ("8.8.8.8", 0)):
        with pytest.raises(InputError, match="--"), listening(host, port):
            pass


SERVE = """
import asyncio, sys
from kobza.web.guard import Guard, Guarded
from kobza.web.run import run
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/health":
        status = 503 if guard.traffic.draining else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        return await send({"type": "http.response.body", "body": b""})
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for i in range(int(scope["query_string"])):
        await send({"type": "http.response.body", "body": b"%d " % i, "more_body": True})
        await asyncio.sleep(0.1)
    await send({"type": "http.response.body", "body": b"end"})
guard = Guard()
sys.exit(run(Guarded(app, guard), port=0, guard=guard, grace=float(sys.argv[1]), on_ready=lambda url: print(url, flush=True)))
"""


@contextlib.contextmanager
def process(grace):
    child = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(grace)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield child, child.stdout.readline().decode().strip()
    finally:
        child.kill()
        child.wait()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_signal_drains_and_a_second_one_ends():
    with process(grace=20) as (child, url), httpx.stream("GET", url + "/?15", timeout=20) as answer:
        child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert httpx.get(url + "/health").status_code == 503
        new = httpx.get(url + "/?1")
        assert new.status_code == 503 and "retry-after" in new.headers and "shutting down" in message(new)
        assert answer.read().endswith(b"14 end")  # what ran was finished
        assert child.wait(5) == 0
    with process(grace=20) as (child, url), httpx.stream("GET", url + "/?300", timeout=20):
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 1 and time.monotonic() - began < 5


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_grace_time_ends():
    with process(grace=0.5) as (child, url), httpx.stream("GET", url + "/?300", timeout=20) as answer:
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 1
        with pytest.raises(httpx.HTTPError):
            answer.read()
