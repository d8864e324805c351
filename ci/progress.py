"""How long the suites take, and a guess of the time that is left.

The figures of the last complete run are in ``ci/results/durations.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

PATH = Path(__file__).resolve().parent / "results" / "durations.json"


class Progress:
    """The suites of one run. :meth:`finish` returns the time taken and the time left.

    Args:
        names: the suites, in the order in which they run.
        path: the file with the seconds that each took in an earlier run.
    """

    def __init__(self, names: Sequence[str], path: Path = PATH) -> None:
        self._names, self._path = list(names), path
        self._known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self.taken: dict[str, float] = {}
        self._started = time.monotonic()

    def finish(self, name: str) -> str:
        """Note that a suite has ended; return the time that it took, and about how much is left."""
        now = time.monotonic()
        self.taken[name], self._started = now - self._started, now
        expected = sum(self._known.get(of, 0) for of in self.taken)
        # A slower machine than the one of the figures is slower for the rest too.
        factor = sum(self.taken.values()) / expected if expected else 1
        left = factor * sum(self._known.get(of, 0) for of in self._names if of not in self.taken)
        text = f"in {format_seconds(self.taken[name])}"
        return f"{text}, about {format_seconds(left)} left" if left else text

    def save(self) -> None:
        """Write the seconds of this run."""
        self._path.write_text(
            json.dumps({name: round(of) for name, of in self.taken.items()}, indent=1) + "\n"
        )


def format_seconds(seconds: float) -> str:
    """Return a duration in seconds below two minutes, else in minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
