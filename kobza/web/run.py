"""Run an app: the socket, the patience with clients, the end at a signal. uvicorn does the HTTP; what it lacks stands here.

uvicorn waits for ever on a client that sends its headers a byte a minute, that sends a body nobody asked for, or that does not
read its answer. `Patient` gives each of them a time and then ends the connection. At SIGTERM or Ctrl-C the server drains: it
goes on listening, so that /health can say so, refuses what is new (503) and ends when the last answer has gone out or the grace
time is over; a second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import http
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from kobza.config import InputError, require
from kobza.web.guard import MOST_HEAD, Guard, error_body

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise InputError(f'a server needs {error.name}; pip install "kobza[serve]"') from None

log = logging.getLogger("kobza.web")


@dataclass(frozen=True)
class Patience:
    """Seconds that a client has, and how many may be connected."""

    head: float = 10.0  # for the next request's head, from the first byte or the last answer on
    read: float = 30.0  # to take something of an answer that waits for it
    connections: int = 1024


PATIENT = Patience()


class Patient(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to waiting."""

    def __init__(self, *args: Any, patience: Patience, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.patience = patience
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head; one connection too many is dropped."""
        super().connection_made(transport)
        if len(self.connections) > self.patience.connections:
            log.warning("over %d connections; one more dropped", self.patience.connections)
            transport.abort()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all waiting."""
        self._stop_timers()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """A head that has come ends the wait for it."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._head_timer is not None:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        """From here on the next head is awaited, and the rest of a body that nobody read."""
        self._await_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not keep up with its answer."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.patience.read, self._drop, "does not read its answer")

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Say that no request could be read out of the bytes; in the midst of an answer just hang up."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or (self.cycle and self.cycle.response_started):
            self.transport.abort()
            return
        self._say(400, f"{msg.rstrip('.')}: bad or oversized headers, or bad framing; send plain HTTP/1.1")

    def _say(self, status: int, message: str) -> None:
        body = json.dumps(error_body(status, message)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            head = h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase.encode())
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            self.transport.abort()
        self._stop_timers()
        self._read_timer = self.loop.call_later(self.patience.read, self.transport.abort)
        self.transport.close()

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.patience.head, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            return self._say(408, f"no request came within {self.patience.head:g} seconds; send its headers at once")
        self._drop("sends no request")

    def _drop(self, why: str) -> None:
        log.warning("%s %s; dropped", self.client[0] if self.client else "?", why)
        self.transport.abort()

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()


class Server(uvicorn.Server):
    """uvicorn's server that drains first and closes its door afterwards."""

    def __init__(self, config: uvicorn.Config, guard: Guard | None, grace: float, on_ready: Callable[[], Any]):
        super().__init__(config)
        self.guard, self.grace, self.on_ready = guard, grace, on_ready
        self.drain_by: float | None = None
        self.cut = False  # whether answers were cut off

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends."""
        if self.drain_by is not None:
            self.should_exit = self.force_exit = self.cut = True
        else:
            self.drain()

    def drain(self) -> None:
        """Take nothing new; end when all answers have gone out, or when the grace time is over."""
        self.drain_by = time.monotonic() + self.grace
        if self.guard is not None:
            self.guard.traffic.draining = True
        log.warning("draining: up to %g seconds for running answers; a second signal ends at once", self.grace)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets=sockets)
        self.on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it time to go?"""
        if self.drain_by is not None and not self.should_exit:
            late = time.monotonic() > self.drain_by
            self.cut = late and bool(self.server_state.tasks)
            self.should_exit = late or not self.server_state.tasks
        return await super().on_tick(counter)


def run(
    app: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    guard: Guard | None = None,
    grace: float = 30.0,
    patience: Patience = PATIENT,
    on_ready: Callable[[str], Any] | None = None,
) -> int:
    """Serve until a signal -> exit code: 0 when every answer went out whole, 1 when some were cut off. on_ready(url) is called
    once it listens. `guard` is the one that stands before the app: it hears when the server drains."""
    with listening(host, port) as (sock, url):
        server = make_server(app, guard, grace, patience, lambda: on_ready(url) if on_ready else None)
        server.run(sockets=[sock])
    return int(server.cut)


def make_server(app: Any, guard: Guard | None, grace: float, patience: Patience, on_ready: Callable[[], Any]) -> Server:
    """uvicorn with our patience; it logs nothing of its own but what goes wrong, the guard has a line for each request."""
    config = uvicorn.Config(
        app,
        http=functools.partial(Patient, patience=patience),  # type: ignore[arg-type]
        ws="none",
        lifespan="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # an address is who is connected, not who a header says
        timeout_graceful_shutdown=1,  # of cancelled answers; the grace time is over by then
        h11_max_incomplete_event_size=MOST_HEAD,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return Server(config, guard, grace, on_ready)


@contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """A bound socket and the address to open in a browser; port 0 takes a free one."""
    require(0 <= port < 65536, f"--port is {port}; it must be in [0, 65535]")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, UnicodeError) as error:
        sock.close()
        raise InputError(cannot_bind(host, port, error)) from None
    name = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        yield sock, f"http://{f'[{name}]' if ':' in name else name}:{sock.getsockname()[1]}"
    finally:
        sock.close()


def cannot_bind(host: str, port: int, error: Exception) -> str:
    """Why there is no socket, and what to do."""
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"--host {host!r} is no address of this machine; take 127.0.0.1, or 0.0.0.0 for all"
    if getattr(error, "errno", 0) == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; end what listens there or take another: --port 0 finds a free one"
    return f"cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}; take another --host or --port"


@contextmanager
def serving(
    app: Any,
    guard: Guard | None = None,
    patience: Patience = PATIENT,
    grace: float = 5.0,
    host: str = "127.0.0.1",
    port: int = 0,
) -> Iterator[str]:
    """A server in a thread of its own -> its address; beside another, or for a program that is client and server at once."""
    ready = threading.Event()
    with listening(host, port) as (sock, url):
        server = make_server(app, guard, 0.0, patience, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            require(ready.wait(20), "the server did not start within 20 seconds; see its log")
            yield url
        finally:
            server.should_exit = True
            thread.join(10)
