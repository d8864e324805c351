"""Time several calls in turn, and compare their times round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "processor": time.thread_time}


def time_in_turn(
    calls: dict[str, Callable[[], Any]],
    max_repeats: int,
    rounds: int,
    clock: Clock,
    wait: Callable[[], None],
) -> dict[str, list[float]]:
    """Time every call in turn, once per round; return seconds per round by name.

    Each round starts with another call.

    Args:
        calls: the calls by name.
        max_repeats: a limit for the repetitions of a short call within a round.
        rounds: number of rounds.
        clock: returns seconds.
        wait: waits for the device.
    """
    repeats = {}
    for name, call in calls.items():
        started = clock()
        call()
        wait()
        # Repeat short calls, because of the clock's resolution.
        repeats[name] = max(1, min(max_repeats, int(0.005 / (clock() - started))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            for _ in range(repeats[name]):
                calls[name]()
            wait()
            seconds[name].append((clock() - started) / repeats[name])
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
