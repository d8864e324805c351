"""Tensor-parallel ranks in real processes (gloo), shared by many test cases."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Ranks:
    """A tensor-parallel group of ``size`` processes that run one function at a time, together.

    The processes are forked from a server that has imported vLLM, so vLLM is imported only once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vllm.lora.model_manager", "support.layers"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, address, rank, size))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank; return the results in rank order.

        Raises:
            RuntimeError: a rank raised; its traceback is the message.
        """
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers = [pipe.recv() for pipe in self._pipes]
        for rank, (error, _) in enumerate(answers):
            if error:
                raise RuntimeError(f"rank {rank} of {self.size}:\n{error}")
        return [result for _, result in answers]

    def close(self) -> None:
        """Stop all processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)
            if process.is_alive():
                process.kill()


def _serve(pipe: Connection, address: str, rank: int, size: int) -> None:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    torch.set_num_threads(1)
    # vLLM's launcher sets this; vLLM's CPU communicator uses it to name the group's shared memory.
    os.environ["VLLM_DIST_IDENT"] = address.rpartition(":")[2]
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(size, rank, address, rank, "gloo")
        parallel_state.initialize_model_parallel(size)
        while (job := pipe.recv()) is not None:
            function, args, kwargs = job
            try:
                pipe.send((None, function(*args, **kwargs)))
            except Exception:
                pipe.send((traceback.format_exc(), None))
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
