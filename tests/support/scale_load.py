"""Bursts mixed with bad, vanished, unloaded and replaced adapters; and bursts beside stock vLLM.

``python3 ci/scale.py`` runs them for longer; the suite ``tests/scale`` runs a part.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from support.adapters import prompts
from support.scale import (
    BLOCKS,
    SLOTS,
    Reply,
    ScaleServer,
    Served,
    burst,
    copy_as,
    percentile,
    send,
)
from support.server import Server, ServerError

OUTCOMES = ("exact", "refused", "not found", "wrong", "failed")


class Load:
    """Bursts on one server whose adapters come, go and change; every answer is compared with PEFT's.

    Attributes:
        counts: outcome of the requests -> how many. ``wrong`` is an answer that differs from the
            reference, ``failed`` an error that is not the expected one.
        calls: kind of the other calls -> how many; ``bad call`` is one with an unexpected result.
        latencies: seconds of each answered request.
        faults: one line per wrong answer, failed request and bad call.
    """

    def __init__(self, served: Served, server: Server, seed: int = 0) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.calls: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.faults: list[str] = []
        self.seconds = 0.0
        self._served, self._server, self._random = served, server, Random(seed)
        self._names = sorted(served.good)
        self._round = 0
        for name in (*self._names, "replaced"):
            server.load(name, served.good.get(name, served.good["a0"]))

    def run(self, count: int, *, vanished: bool) -> None:
        """Run one burst of ``count`` requests; with ``vanished``, one adapter's folder is deleted first."""
        self._round += 1
        gone = [self._lose_folder()] if vanished else []
        names = [*self._names, *gone, "unknown"]
        replies, seconds = burst(self._server, names, count, self._random, self._disturb)
        self.seconds += seconds
        # Then each of the other adapters in turn, which evicts the vanished one.
        replies += [send(self._server, name, prompts(1)[0]) for name in (*self._names, *gone)]
        for reply in replies:
            self._judge(reply, "a1" if reply.name in gone else reply.name)
        for name in gone:
            self._server.unload(name)

    def _lose_folder(self) -> str:
        name = f"vanished{self._round}"
        folder = copy_as(self._served.good["a1"], self._served.root / name)
        self._server.load(name, folder)
        shutil.rmtree(folder)
        return name

    def _judge(self, reply: Reply, adapter: str) -> None:
        outcome = self._find_outcome(reply, adapter)
        self.counts[outcome] += 1
        if outcome in ("wrong", "failed"):
            self.faults.append(f"{outcome}: {reply}"[:600])

    def _find_outcome(self, reply: Reply, adapter: str) -> str:
        if reply.answer:
            self.latencies.append(reply.seconds)
            return "exact" if self._served.judge.is_exact(adapter, reply.answer) else "wrong"
        if reply.name.startswith("vanished") and "is refused on vLLM" in reply.error:
            return "refused"
        # The last adapter is unloaded during a burst.
        if reply.error.startswith("404") and reply.name in ("unknown", self._names[-1]):
            return "not found"
        return "failed"

    def _disturb(self) -> None:
        """Load, unload and replace adapters while the server answers a burst."""
        adapter = self._random.choice(self._names)
        for bad in self._served.bad:
            self._refuse(f"bad{self._round}", bad, inplace=False)
            self._refuse("replaced", bad, inplace=True)
        self._server.unload(self._names[-1])
        self._server.load("replaced", self._served.good[adapter], inplace=True)
        self._server.load(self._names[-1], self._served.good[self._names[-1]])
        self.calls.update(["unload", "load", "replacement"])
        self._judge(send(self._server, "replaced", prompts(1)[0]), adapter)

    def _refuse(self, name: str, folder: Path, *, inplace: bool) -> None:
        try:
            self._server.load(name, folder, inplace=inplace)
            text = "loaded"
        except ServerError as error:
            text = str(error)
        good = "is refused on vLLM" in text
        self.calls["refusal" if good else "bad call"] += 1
        if not good:
            self.faults.append(f"load of {folder.name} as {name}: {text}")

    def summary(self) -> dict[str, Any]:
        """Return the counts, and the latencies of the answered requests in milliseconds."""
        return {
            "requests": dict(self.counts),
            "calls": dict(self.calls),
            "requests/s": round(self.counts.total() / self.seconds, 1),
            "p50 ms": percentile(self.latencies, 50),
            "p99 ms": percentile(self.latencies, 99),
        }


def run_soak(served: Served, log: Path, seconds: float, count: int = 200) -> dict[str, Any]:
    """Run bursts of ``count`` requests for ``seconds``; return the figures and the memory."""
    with ScaleServer(served.checkpoint, log, *SLOTS, *BLOCKS, plugin=True) as server:
        load = Load(served, server)
        load.run(count, vanished=True)  # lets caches and memory arenas reach their final sizes
        before, started = server.resident(), time.monotonic()
        halfway: dict[str, int] = {}
        while (passed := time.monotonic() - started) < seconds:
            load.run(count, vanished=True)
            if not halfway and passed > seconds / 2:
                halfway = server.resident()
            print(round(passed), dict(load.counts), server.resident(), flush=True)
        after = server.resident()
    return {
        "seconds": round(time.monotonic() - started),
        **load.summary(),
        "resident MiB before": before,
        "resident MiB halfway": halfway,
        "resident MiB after": after,
        "faults": load.faults[:20],
    }


def run_beside_stock(served: Served, folder: Path, rounds: int, count: int) -> dict[str, Any]:
    """Send the same bursts to stock vLLM and to vLLM with the plugin, in turn; return both's figures.

    Every adapter is good: a bad one would end stock vLLM.
    """
    sides = {"stock": False, "plugin": True}
    replies: dict[str, list[Reply]] = {side: [] for side in sides}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    resident: dict[str, list[dict[str, int]]] = {side: [] for side in sides}
    servers: dict[str, ScaleServer] = {}
    with contextlib.ExitStack() as stack:
        for side, plugin in sides.items():
            log = folder / f"{side}.log"
            servers[side] = stack.enter_context(
                ScaleServer(served.checkpoint, log, *SLOTS, *BLOCKS, plugin=plugin)
            )
        for server in servers.values():
            for name, adapter in served.good.items():
                server.load(name, adapter)
            burst(server, served.good, count // 4, Random(0))
        for side, server in servers.items():
            resident[side].append(server.resident())
        for number in range(rounds):
            order = list(servers.items())
            for side, server in reversed(order) if number % 2 else order:
                got, seconds = burst(server, served.good, count, Random(number))
                replies[side] += got
                rates[side].append(count / seconds)
        for side, server in servers.items():
            resident[side].append(server.resident())
    return {side: _summarise(served, replies[side], rates[side], resident[side]) for side in sides}


def _summarise(
    served: Served, replies: list[Reply], rates: list[float], resident: list[dict[str, int]]
) -> dict[str, Any]:
    latencies = [reply.seconds for reply in replies]
    exact = [reply.answer and served.judge.is_exact(reply.name, reply.answer) for reply in replies]
    return {
        "requests": len(replies),
        "exact": sum(map(bool, exact)),
        "requests/s by burst": [round(rate, 1) for rate in rates],
        "p50 ms": percentile(latencies, 50),
        "p99 ms": percentile(latencies, 99),
        "resident MiB before": resident[0],
        "resident MiB after": resident[1],
    }
