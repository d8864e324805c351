"""Two engines behind one server (internal balancer): both have an adapter, or neither has it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from support.adapters import prompts
from support.scale import ScaleServer, Served, burst, send
from support.server import ServerError


class RankServer(ScaleServer):
    """A client that can choose the engine."""

    rank: int | None = None

    def headers(self) -> dict[str, str]:
        return {} if self.rank is None else {"X-data-parallel-rank": str(self.rank)}


def check_on_both(served: Served, server: RankServer, name: str, adapter: str) -> None:
    for server.rank in (0, 1):
        reply = send(server, name, prompts(1)[0])
        assert reply.answer, (server.rank, reply)
        assert served.judge.is_exact(adapter, reply.answer), (server.rank, reply)
    server.rank = None


def test_both_engines_serve_what_was_loaded(served: Served, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with RankServer(
        served.checkpoint,
        log,
        *("--data-parallel-size", "2", "--max-loras", "4", "--max-cpu-loras", "4"),
        plugin=True,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as server:
        for name in ("a0", "a1"):
            server.load(name, served.good[name])
            check_on_both(served, server, name, name)
        for bad in served.bad:
            with pytest.raises(ServerError, match="is refused on vLLM"):
                server.load("bad", bad)
            with pytest.raises(ServerError, match="is refused on vLLM"):
                server.load("a1", bad, inplace=True)
        check_on_both(served, server, "a1", "a1")
        server.load("a2", served.good["a2"])
        check_on_both(served, server, "a2", "a2")
        server.load("a1", served.good["a3"], inplace=True)
        check_on_both(served, server, "a1", "a3")
        replies, _ = burst(server, ("a0", "a2"), 120, Random(0))
        exact: Counter[bool] = Counter(
            bool(reply.answer and served.judge.is_exact(reply.name, reply.answer))
            for reply in replies
        )
        assert exact == {True: 120}
        served_by = {line.partition(")")[0] for line in log.read_text().splitlines()
                     if "'a2'" in line and "is served" in line}  # fmt: skip
        assert len(served_by) == 2, served_by
