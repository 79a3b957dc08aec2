"""Guard: who is let in, and how much of whom. One ASGI middleware before every server of ours: serve, studio and contest.

A server listens to this machine alone unless told otherwise. As soon as others can reach it a key is demanded. Even a loopback
server has guests that nobody invited: every page open in a browser on this machine can send requests to it. So the Host header
must name this machine (against DNS rebinding), and what changes something must come from our own pages (Origin). Then the
limits: bytes of a body, counted while they come; seconds for a body, so that a trickle holds nothing; seconds for a whole
request; requests at once, in all and from one address. A refusal is a JSON body with one line that says what, the value, the
limit and the remedy. Each request leaves one line in the log: no body, no key, no query string.

What a socket does before there is a request (slow headers, bad framing, readers that do not read) is run.py's business.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import secrets
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kobza.config import require

log = logging.getLogger("kobza.web")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
MOST_HEAD = 32 << 10  # bytes of a request's path and headers
DISCARD = 32 << 20  # bytes of a body too large that are read and dropped, so that its sender hears why
BODY_RATE = 32 << 10  # bytes a second that a body may take its time for, beyond body_seconds
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class Refused(Exception):
    """A request that is answered by a status and one line."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers or {}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The one form of every error. error_body(404, "no such run") -> {"error": {"message": "no such run", "type": ...}}"""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass
class Traffic:
    """Requests that are being answered, and whether new ones still may come."""

    running: Counter[str] = field(default_factory=Counter)  # by address
    draining: bool = False

    @contextmanager
    def entered(self, address: str, guard: Guard) -> Iterator[None]:
        """Count a request in and out; one too many is refused."""
        again = {"retry-after": "1"}
        if self.draining:
            raise Refused(
                503, "the server is shutting down; try another or wait for it to come back", {"retry-after": "5"}
            )
        if self.running.total() >= guard.at_once:
            raise Refused(429, f"{guard.at_once} requests are being answered, the most at once; try again soon", again)
        if self.running[address] >= guard.at_once_per_address:
            most = f"{guard.at_once_per_address} requests from {address} are being answered, the most from one address"
            raise Refused(429, f"{most}; wait for one to end", again)
        self.running[address] += 1
        try:
            yield
        finally:
            self.running[address] -= 1
            if not self.running[address]:
                del self.running[address]


@dataclass(frozen=True)
class Guard:
    """What is let in. Guard(host="0.0.0.0", keys=("...",)); put before an app by app.add_middleware(Guarded, guard=guard)

    `hosts`: names besides the machine's own under which a browser may ask. `origins`: other sites whose pages may call.
    `open_paths`: beginnings of paths that need no key; ("/",) where the app has its own way to know its guests.
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    open_paths: tuple[str, ...] = ("/health",)
    max_body: int = 4 << 20
    at_once: int = 256
    at_once_per_address: int = 128
    body_seconds: float = 30.0
    seconds: float = 3600.0
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def __post_init__(self) -> None:
        for key in self.keys:
            long = len(key) >= 16 and key.isascii() and key.isprintable() and " " not in key
            require(long, "a key is shorter than 16 characters or not plain ASCII; take: " + new_key())
        closed = self.keys or "/" in self.open_paths
        seen = f"{self.host} can be reached from other machines and no key is set"
        require(bool(is_loopback(self.host) or closed), f"{seen}; give --key {new_key()} or leave --host at 127.0.0.1")

    def is_open(self, path: str) -> bool:
        """Whether a path needs no key."""
        return any(path == p or path.startswith(p if p.endswith("/") else p + "/") for p in self.open_paths)

    def check(self, scope: dict[str, Any]) -> None:
        """Refuse a request by its head alone."""
        headers, size = Headers(scope["headers"]), sum(len(n) + len(v) + 4 for n, v in scope["headers"])
        if scope.get("http_version") not in ("1.0", "1.1"):
            raise Refused(400, "the version of HTTP is neither 1.0 nor 1.1; send HTTP/1.1")
        if size + len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MOST_HEAD:
            raise Refused(400, f"path and headers have over {MOST_HEAD:,} bytes; send less")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise Refused(400, "both Content-Length and Transfer-Encoding are given; send one of them")
        self._check_host(headers.get("host", ""))
        if scope["method"] not in SAFE:
            self._check_origin(headers)
        if self.keys and not self.is_open(scope["path"]) and not self._has_key(headers):
            ask = "Basic" if "text/html" in headers.get("accept", "") else "Bearer"
            message = "no key or a wrong one; send it as Authorization: Bearer KEY or as X-Api-Key"
            raise Refused(401, message, {"www-authenticate": f'{ask} realm="kobza"'})
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise Refused(400, "Content-Length is not a number; send the number of bytes")

    def _check_host(self, host: str) -> None:
        if not is_loopback(self.host) and not self.hosts:
            return
        known = {self.host, *LOOPBACK, *self.hosts}
        if host_name(host) not in known:
            shown = host[:80].encode("ascii", "backslashreplace").decode()
            raise Refused(403, f"Host {shown!r} is not this server; open it as {self.host}, or allow it: --allow-host")

    def _check_origin(self, headers: Headers) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self.origins:
            return
        foreign = origin is not None and urlsplit_safe(origin) != headers.get("host", "").lower()
        if foreign or (origin is None and site in ("cross-site", "same-site")):
            shown = (origin or "?")[:80].encode("ascii", "backslashreplace").decode()
            raise Refused(403, f"a page of {shown!r} may not send this; allow it: --allow-origin")

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, word = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), word.strip() if scheme.lower() == "bearer" else ""]
        if scheme.lower() == "basic":  # a browser asks its user by itself; the user's name does not matter
            try:
                given.append(b64decode(word, validate=True).decode("utf-8").partition(":")[2])
            except ValueError:
                pass
        pairs = [(a.encode("utf-8", "surrogateescape"), b.encode()) for a in given for b in self.keys]
        return any([hmac.compare_digest(a, b) for a, b in pairs])  # a list: all are compared, whichever fits


class Headers(dict[str, str]):
    """Of a scope, names in lower case; the last of several wins, but for those that frame a request."""

    def __init__(self, raw: list[tuple[bytes, bytes]]):
        super().__init__((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in raw)
        if sum(name.lower() == b"host" for name, _ in raw) > 1:
            self["host"] = ""


def new_key() -> str:
    """A key nobody guesses."""
    return secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """The name in a Host header. host_name("[::1]:8000") -> "::1" """
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def urlsplit_safe(origin: str) -> str:
    """The host and port of an origin; "" if it is none, such as "null"."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


class Guarded:
    """An ASGI app behind a Guard. on_end(scope, status, seconds) hears of each answer."""

    def __init__(self, app: Callable[..., Any], guard: Guard, on_end: Callable[[Any, int, float], None] | None = None):
        self.app, self.guard, self.on_end = app, guard, on_end

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or say why not; one line in the log either way."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange, began = Exchange(self.guard, receive, send), time.monotonic()
        try:
            await self._answer(scope, exchange)
        except Refused as refused:
            await exchange.refuse(refused)
        except Exception:
            if (
                not exchange.gone and exchange.refused is None
            ):  # what an app does once its client left is no fault of it
                log.exception("%s %s failed", scope["method"], shown_path(scope))
                await exchange.refuse(Refused(500, "the server failed on this request; its log says where"))
        finally:
            took = time.monotonic() - began
            line = (address_of(scope), scope["method"], shown_path(scope), exchange.status or "-", took)
            log.info("%s %s %s %s %.3f s%s", *line, " (left)" if exchange.gone and not exchange.ended else "")
            if self.on_end is not None and exchange.status is not None:
                self.on_end(scope, exchange.status, took)

    async def _answer(self, scope: dict[str, Any], exchange: Exchange) -> None:
        guard = self.guard
        guard.check(scope)
        length = int(Headers(scope["headers"]).get("content-length", "0")[:20])
        if length > guard.max_body:
            await exchange.discard(length)
            raise too_large(guard, f"{length:,}")
        if scope["path"] == "/health":  # always answered: that is its use
            await self.app(scope, exchange.receive, exchange.send)
            return
        with guard.traffic.entered(address_of(scope), guard):
            try:
                async with asyncio.timeout(guard.seconds) as deadline:
                    await self.app(scope, exchange.receive, exchange.send)
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise Refused(504, f"not done within {guard.seconds:g} seconds, the most; ask for less") from None
        if exchange.refused is not None:
            raise exchange.refused


def too_large(guard: Guard, size: str) -> Refused:
    """What a body over the limit hears."""
    return Refused(413, f"the body has {size} bytes and {guard.max_body:,} is the most; send less")


def address_of(scope: dict[str, Any]) -> str:
    """Who asks."""
    return str((scope.get("client") or ("?",))[0])


def shown_path(scope: dict[str, Any]) -> str:
    """The path as it was sent, without its query: ASCII, and no line ends in it."""
    raw = scope.get("raw_path") or scope["path"].encode("ascii", "backslashreplace")
    return raw[:200].decode("ascii", "backslashreplace")


class Exchange:
    """What passes in and out of one request: the body counted and timed, the answer's state known."""

    def __init__(self, guard: Guard, receive: Any, send: Any):
        self.guard, self._receive, self._send = guard, receive, send
        self.taken, self.whole, self.gone, self.ended = 0, False, False, False
        self.status: int | None = None
        self.refused: Refused | None = None
        self.began = time.monotonic()

    async def receive(self) -> dict[str, Any]:
        """The next part of the body. One that breaks a limit ends the request: the app sees a client that has left."""
        if self.refused is not None:
            return {"type": "http.disconnect"}
        if self.whole:  # the app waits for its client to leave
            message: dict[str, Any] = await self._receive()
        else:
            try:
                left = self.guard.body_seconds + self.taken / BODY_RATE - (time.monotonic() - self.began)
                message = await asyncio.wait_for(self._receive(), max(0.0, left))
            except TimeoutError:
                slow = f"{self.taken:,} bytes of the body came within {self.guard.body_seconds:g} seconds"
                return self._stop(Refused(408, f"{slow}; send it faster"))
        if message["type"] == "http.disconnect":
            self.gone = True
            return message
        self.taken += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.taken > self.guard.max_body:
            return self._stop(too_large(self.guard, f"over {self.taken - 1:,}"))
        return message

    def _stop(self, refused: Refused) -> dict[str, Any]:
        self.refused = refused
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        """Pass on the app's answer, unless the request was refused meanwhile."""
        if self.refused is not None:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self._send(message)

    async def discard(self, length: int) -> None:
        """Read a body too large, within bounds: who is cut off while sending does not hear why."""
        if length > DISCARD:
            return
        try:
            async with asyncio.timeout(self.guard.body_seconds):
                while (message := await self._receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            pass

    async def refuse(self, refused: Refused) -> None:
        """Answer with the refusal, unless an answer is under way: then it stays unfinished, and the connection ends."""
        if self.status is not None:
            return
        self.status = refused.status
        body = json.dumps(error_body(refused.status, str(refused)), ensure_ascii=False).encode("utf-8", "replace")
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        raw = [(name.encode(), value.encode()) for name, value in (headers | refused.headers).items()]
        await self._send({"type": "http.response.start", "status": refused.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.ended = True
