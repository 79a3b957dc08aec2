"""What keeps the contest's pages from forgers: marks that only we can make, and a count of tries."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections import OrderedDict, deque
from pathlib import Path
from threading import Lock

from kobza.config import require
from kobza.contest.nouns import TooFast

WINDOW, MOST_KNOWN = 60.0, 10_000  # seconds; addresses remembered


class Sealed:
    """Marks that only this contest can make; its key lies beside it, so that they outlive a restart."""

    def __init__(self, folder: Path):
        path = folder / "pages.key"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as stream:
                stream.write(secrets.token_bytes(32))
        except FileExistsError:
            pass
        self._key = path.read_bytes()
        require(len(self._key) == 32, f"{path}: damaged; remove it, and all guests join again")

    def mark(self, *words: str) -> str:
        """The mark over some words."""
        said = "\0".join(words).encode("utf-8", errors="replace")
        return hmac.new(self._key, said, hashlib.sha256).hexdigest()

    def token(self, kind: str, word: str, *beside: str) -> str:
        """A word with its mark, bound to what it is for."""
        return f"{word}.{self.mark(kind, word, *beside)}"

    def read(self, token: str, kind: str, *beside: str) -> str | None:
        """The word of a token; None if we did not make it for this."""
        word, _, mark = token[:400].partition(".")
        good = hmac.compare_digest(mark.encode("utf-8", "replace"), self.mark(kind, word, *beside).encode())
        return word if good else None


class Tries:
    """At most `most` within WINDOW seconds, counted by whom."""

    def __init__(self, most: int):
        self.most, self._times, self._lock = most, OrderedDict[str, deque[float]](), Lock()

    def take(self, who: str) -> None:
        """Count one, or raise TooFast."""
        now = time.monotonic()
        with self._lock:
            times = self._times.setdefault(who, deque())
            self._times.move_to_end(who)
            while times and times[0] <= now - WINDOW:
                times.popleft()
            if len(times) >= self.most:
                seconds = max(1.0, times[0] + WINDOW - now)
                raise TooFast(f"{self.most} tries in a minute are the most; go on in {seconds:.0f} s", seconds)
            times.append(now)
            while len(self._times) > MOST_KNOWN:
                self._times.popitem(last=False)
