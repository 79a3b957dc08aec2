"""Numbers and states of runs in a few letters, for templates."""

from __future__ import annotations

import time

from kobza.studio.runs_curves import MEASURES


def duration(seconds: float | None) -> str:
    """duration(75) -> "1 min 15 s"."""
    if seconds is None:
        return "–"
    whole = int(min(seconds, 1e9))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600:,} h {whole % 3600 // 60} min"


def ago(moment: float) -> str:
    """When something was, seen from now."""
    past = time.time() - moment
    if past < 5:
        return "now"
    day = time.strftime("%Y-%m-%d", time.localtime(max(0, min(moment, 4e9))))
    return (
        f"{duration(past).split(' min')[0]}{' min' if 60 <= past < 3600 else ''} ago"
        if past < 3600
        else (f"{past / 3600:.0f} h ago" if past < 86400 else day)
    )


def loss(value: float | None) -> str:
    """A loss for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.2g}"


def whole(value: float | None) -> str:
    """A count for a table."""
    return "–" if value is None else f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.2g}"


STATES = {  # state -> (badge, what it means)
    "running": ("busy", "training now"),
    "starting": ("busy", "preparing: no step yet"),
    "finished": ("good", "all steps are done"),
    "stopped": ("", "saved; it can go on"),
    "died": ("bad", "it ended without saving what came last; it can go on from its last checkpoint"),
    "empty": ("", "no step was made"),
}
WORDS = {"duration": duration, "ago": ago, "loss": loss, "whole": whole, "states": STATES, "measures": MEASURES}
