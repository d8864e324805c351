"""Tensor-parallel ranks in real processes (gloo), shared by many test cases."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Ranks:
    """A tensor-parallel group of ``size`` processes that run one function at a time, together.

    The processes are forked from a server that has imported vLLM, so vLLM is imported only once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vllm.lora.model_manager", "support.layers"])
        # A file, not a port: another process can take a free port before rank 0 listens on it.
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        address = f"file://{self._folder.name}/store"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, address, rank, size))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
            theirs.close()  # so that the end of a rank ends `recv` too
        self._receive()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank; return the results in rank order.

        Raises:
            RuntimeError: a rank raised; its traceback is the message.
        """
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        return self._receive()

    def _receive(self) -> list[Any]:
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
        # vLLM's CPU communicator leaves its shared memory behind (0.17.1 to 0.33.0).
        for segment in Path("/dev/shm").glob(f"{Path(self._folder.name).name}-*"):
            segment.unlink()
        self._folder.cleanup()


def _serve(pipe: Connection, address: str, rank: int, size: int) -> None:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    torch.set_num_threads(1)
    # vLLM's launcher sets this; vLLM's CPU communicator uses it to name the group's shared memory.
    os.environ["VLLM_DIST_IDENT"] = Path(address).parent.name
    with set_current_vllm_config(VllmConfig()):
        try:
            parallel_state.init_distributed_environment(size, rank, address, rank, "gloo")
            parallel_state.initialize_model_parallel(size)
        except Exception:
            pipe.send((traceback.format_exc(), None))
            return
        pipe.send((None, None))
        while (job := pipe.recv()) is not None:
            function, args, kwargs = job
            try:
                pipe.send((None, function(*args, **kwargs)))
            except Exception:
                pipe.send((traceback.format_exc(), None))
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
