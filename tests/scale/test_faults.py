"""A worker is killed, a server is stopped during a load: no process is left, and the next start is exact."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from support.adapters import prompts
from support.scale import SLOTS, ScaleServer, Served, burst, send, wait_for_end
from support.server import ServerError

#: vLLM waits for its workers before it kills them.
LIMIT = 60  # seconds

#: They take several seconds, so that most are unfinished when the process is killed.
REQUESTS = 200


def start(served: Served, log: Path) -> ScaleServer:
    server = ScaleServer(served.checkpoint, log, *SLOTS, plugin=True, tensor_parallel_size=2)
    # vLLM never answers a load that is in flight when its engine ends, and the server then waits for the
    # client (0.32.0, _call_utility_async in v1/engine/core_client.py).
    server.timeout = 15
    return server


def digest(served: Served) -> str:
    """Return a digest of all files of the checkpoint and of the adapters, and of their names."""
    total = hashlib.sha256()
    for file in sorted(served.root.rglob("*")):
        total.update(str(file).encode() + (file.read_bytes() if file.is_file() else b""))
    return total.hexdigest()


def check_exact(served: Served, server: ScaleServer) -> None:
    for name in ("a0", "a1"):
        server.load(name, served.good[name])
        reply = send(server, name, prompts(1)[0])
        assert reply.answer, reply
        assert served.judge.is_exact(name, reply.answer), reply


def disturb(served: Served, server: ScaleServer) -> None:
    """Replace an adapter until the server is gone."""
    try:
        while True:
            server.load("a0", served.good["a2"], inplace=True)
    except (ServerError, OSError):
        return


def test_killed_worker_leaves_nothing(served: Served, tmp_path: Path) -> None:
    before = digest(served)
    with start(served, tmp_path / "killed") as server:
        check_exact(served, server)
        processes = server.processes()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(burst, server, ("a0", "a1"), REQUESTS, Random(0))
            time.sleep(0.5)
            server.find_process("Worker_TP1").kill()
            # Requests of the ended engine fail; none hangs.
            assert wait_for_end(processes, LIMIT) == []
            replies, _ = running.result()
        assert any(reply.error for reply in replies)
    with start(served, tmp_path / "again") as server:
        check_exact(served, server)
    assert digest(served) == before


def test_stopped_server_leaves_nothing(served: Served, tmp_path: Path) -> None:
    before = digest(served)
    with start(served, tmp_path / "stopped") as server:
        check_exact(served, server)
        processes = server.processes()
        with ThreadPoolExecutor(2) as pool:
            pool.submit(disturb, served, server)
            running = pool.submit(burst, server, ("a0", "a1"), REQUESTS, Random(0))
            time.sleep(0.5)
            server.terminate()
            assert wait_for_end(processes, LIMIT) == []
            replies, _ = running.result()
        assert any(reply.error for reply in replies)
    with start(served, tmp_path / "again") as server:
        check_exact(served, server)
    assert digest(served) == before
