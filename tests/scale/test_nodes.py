"""One engine on two nodes (multiprocessing): one rank per node, and both have an adapter or neither."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.adapters import prompts
from support.scale import SLOTS, ScaleServer, Served, send
from support.scale_nodes import SecondNode
from support.server import ServerError


def test_adapters_are_exact_or_refused_on_both_nodes(served: Served, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    server = ScaleServer(
        served.checkpoint,
        tmp_path / "first",
        *(*SLOTS, *nodes, "--node-rank", "0"),
        plugin=True,
        tensor_parallel_size=2,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0"},
    )
    log = tmp_path / "second"
    with SecondNode(server, log, VLLM_CPU_OMP_THREADS_BIND="1"), server:
        for name in ("a0", "a1"):
            server.load(name, served.good[name])
        for bad in served.bad:
            with pytest.raises(ServerError, match="is refused on vLLM"):
                server.load("bad", bad)
        server.load("a1", served.good["a2"], inplace=True)
        for name, adapter in (("a0", "a0"), ("a1", "a2")):
            reply = send(server, name, prompts(1)[0])
            assert reply.answer, reply
            assert served.judge.is_exact(adapter, reply.answer), reply
    assert "'a1'" in log.read_text()
    assert "is served" in log.read_text()
