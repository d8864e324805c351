"""What the suite ``tests/scale`` shares: a served model, a server with its processes, bursts of requests."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import psutil
import requests

from support import damage
from support.adapters import Answer, Comparison, Reference, prompts, save_adapter
from support.checkpoints import save_qwen3_5
from support.server import Server, ServerError

#: Stock vLLM serves adapters on these modules exactly, so its figures can stand beside the plugin's.
MODULES = ("in_proj_qkv", "in_proj_z", "q_proj", "down_proj")

#: Eight adapters on four slots and six places: requests evict adapters from both.
ADAPTERS = 8
SLOTS = ("--max-loras", "4", "--max-cpu-loras", "6")

#: A KV cache that the first burst fills: a worker's memory grows while blocks are used for the first time.
BLOCKS = ("--num-gpu-blocks-override", "256")

#: Few, so that a burst takes seconds; each is compared with the reference.
NEW_TOKENS = 6


class Judge(Reference):
    """A reference that computes each sequence only once."""

    def __init__(self, checkpoint: Path, adapters: dict[str, Path]) -> None:
        super().__init__(checkpoint, adapters)
        self._computed = cache(super().logprobs)

    def logprobs(self, adapter: str | None, tokens: Iterable[int]) -> Any:
        return self._computed(adapter, tuple(tokens))

    def is_exact(self, adapter: str | None, answer: Answer) -> bool:
        """Return whether an answer equals the reference; None is the base model."""
        comparison: Comparison = self.compare(adapter, answer)
        return comparison.is_exact if adapter else comparison.error < 0.2


@dataclass(frozen=True)
class Served:
    """A checkpoint with good and bad adapters below ``root``."""

    root: Path
    checkpoint: Path
    good: dict[str, Path]
    bad: list[Path]
    judge: Judge


def save_served(root: Path, adapters: int = ADAPTERS) -> Served:
    """Save a tiny Qwen3.5, ``adapters`` good adapters and one bad adapter per damage."""
    checkpoint = save_qwen3_5(root / "model")
    good = {
        f"a{number}": save_adapter(checkpoint, root / f"a{number}", MODULES, number)
        for number in range(adapters)
    }
    bad = [
        damage.copy_adapter(good["a0"], root / change.__name__, change) for change in damage.DAMAGES
    ]
    return Served(root, checkpoint, good, bad, Judge(checkpoint, good))


class ScaleServer(Server):
    """A server whose processes and memory can be looked at.

    Attributes:
        timeout: seconds after which a request's client gives up.
    """

    timeout = 60.0

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        *arguments: str,
        plugin: bool,
        tensor_parallel_size: int = 1,
        environment: Mapping[str, str] = {},
    ) -> None:
        super().__init__(
            checkpoint,
            log,
            *arguments,
            plugin=plugin,
            tensor_parallel_size=tensor_parallel_size,
        )
        # More threads than cores would make the figures those of the scheduler.
        self._env |= {"OMP_NUM_THREADS": "1", **environment}

    def headers(self) -> dict[str, str]:
        """Return more headers for each request."""
        return {}

    def _request(self, path: str, body: dict[str, Any] | None = None) -> str:
        # A request to a server that has ended must not wait for the five minutes of the base class.
        try:
            response = requests.request(
                "GET" if body is None else "POST",
                f"http://127.0.0.1:{self.port}{path}",
                json=body,
                headers=self.headers(),
                timeout=self.timeout,
                proxies={"http": ""},
            )
        except requests.RequestException as error:
            raise ServerError(f"{type(error).__name__}: {error}") from None
        if response.ok:
            return str(response.text)
        text = response.text
        with contextlib.suppress(ValueError, KeyError, TypeError):
            text = response.json()["error"]["message"]
        raise ServerError(f"{response.status_code}: {text}")

    def processes(self) -> dict[int, psutil.Process]:
        """Return the server's process and all below it, by process id."""
        server = psutil.Process(self._process.pid)
        return {process.pid: process for process in (server, *server.children(recursive=True))}

    def find_process(self, title: str) -> psutil.Process:
        """Return the process whose title contains ``title``."""
        [found] = [p for p in self.processes().values() if title in " ".join(p.cmdline())]
        return found

    def terminate(self) -> None:
        """Send SIGTERM to the server's process."""
        self._process.terminate()

    def resident(self) -> dict[str, int]:
        """Return the resident mebibytes of the server and of its other processes, by kind."""
        found: Counter[str] = Counter()
        for title, size in self.memory().items():
            kind = title.partition(" (")[0].strip()
            found["server" if kind.startswith("python") else kind] += size >> 20
        return dict(found)


def wait_for_end(processes: Mapping[int, psutil.Process], limit: float) -> list[str]:
    """Wait until the processes have ended; return the titles of those that run after ``limit`` seconds."""
    _, alive = psutil.wait_procs(list(processes.values()), timeout=limit)
    titles = []
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            titles.append(f"{process.status()} {' '.join(process.cmdline())[:80]}")
    return titles


@dataclass(frozen=True)
class Reply:
    """What became of a request: an answer, or the text of the error."""

    name: str
    answer: Answer | None
    error: str
    seconds: float


def send(server: Server, name: str, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Reply:
    """Send one request and wait for its answer."""
    started = time.perf_counter()
    try:
        answer = server.complete(name, prompt, score_prompt=False, new_tokens=new_tokens)
    except (ServerError, OSError) as error:
        return Reply(name, None, str(error), time.perf_counter() - started)
    return Reply(name, answer, "", time.perf_counter() - started)


def burst(
    server: Server,
    names: Iterable[str],
    count: int,
    random: Random,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[list[Reply], float]:
    """Send ``count`` requests at once, spread over ``names``; return the replies and the seconds.

    ``meanwhile`` runs while the server answers; its error is raised here.
    """
    named = list(names)
    requests = [(named[n % len(named)], prompts(4)[n % 4]) for n in range(count)]
    random.shuffle(requests)
    with ThreadPoolExecutor(count + 1) as pool:
        started = time.perf_counter()
        sent = [pool.submit(send, server, name, prompt) for name, prompt in requests]
        other = pool.submit(meanwhile)
        replies = [future.result() for future in sent]
        seconds = time.perf_counter() - started
        other.result()
    return replies, seconds


def percentile(seconds: Iterable[float], percent: int) -> int:
    """Return a percentile in milliseconds."""
    ordered = sorted(seconds)
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1000)


def copy_as(folder: Path, target: Path) -> Path:
    """Copy an adapter's folder to ``target``, which may exist."""
    return Path(shutil.copytree(folder, target, dirs_exist_ok=True))
