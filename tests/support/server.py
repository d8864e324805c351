"""vLLM's OpenAI-compatible server as a child process, and a client for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from support.adapters import Answer

NEW_TOKENS = 16
TESTS = Path(__file__).resolve().parent.parent


class ServerError(RuntimeError):
    """The server did not start (the message ends with its log), or answered with an error."""


class Server:
    """A server that runs inside a ``with`` block; on exit it is stopped with all its processes."""

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        *arguments: str,
        plugin: bool,
        tensor_parallel_size: int = 1,
        compiled: bool = False,
        tick: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        self._tick = tick
        # `vllm serve` needs a distribution named vllm; the CPU build has another name.
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(checkpoint), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--tensor-parallel-size", str(tensor_parallel_size), "--dtype", "bfloat16"),
            *("--enable-lora", "--max-loras", "8", "--max-lora-rank", "16"),
            *("--max-model-len", "128", "--max-num-seqs", "16"),
            *(() if compiled else ("--enforce-eager",)),
            *("--fail-on-environ-validation", *arguments),
        ]
        self._env = engine_environment(plugin, tensor_parallel_size) | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"
        }

    def __enter__(self) -> Server:
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=TESTS,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = time.monotonic()
        while True:
            self._tick(time.monotonic() - started)
            try:
                self._request("/health")
                return self
            except (ServerError, OSError):
                if self._process.poll() is not None or time.monotonic() - started > 600:
                    self.__exit__(None, None, None)
                    tail = self.log.read_text()[-3000:]
                    raise ServerError(f"The server did not start:\n{tail}") from None
            time.sleep(1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        # Workers can outlive a failed engine. They are all in the server's session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def load(self, name: str, folder: Path, *, inplace: bool = False) -> None:
        """Load an adapter; with ``inplace``, replace a loaded adapter of that name."""
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": inplace}
        self._request("/v1/load_lora_adapter", body)

    def unload(self, name: str) -> None:
        """Unload an adapter."""
        self._request("/v1/unload_lora_adapter", {"lora_name": name})

    def models(self) -> list[str]:
        """Return the names of the served models: the base model's, then the adapters'."""
        return [model["id"] for model in json.loads(self._request("/v1/models"))["data"]]

    def complete(
        self,
        model: str,
        prompt: list[int],
        *,
        score_prompt: bool = True,
        new_tokens: int = NEW_TOKENS,
    ) -> Answer:
        """Complete ``prompt`` greedily; return all tokens and their logprobs.

        Without ``score_prompt``, the answer has logprobs of the new tokens only. Concurrent requests
        need this: with LoRA on CPU, vLLM 0.32.0 cannot score prompts in batches of several requests
        (its LM head's LoRA gets a wrong batch size).
        """
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "prompt_logprobs": 0 if score_prompt else None,
            "return_tokens_as_token_ids": True,
        }
        choice = json.loads(self._request("/v1/completions", body))["choices"][0]
        generated = [int(token.partition(":")[2]) for token in choice["logprobs"]["tokens"]]
        prompt_logprobs = [
            position[str(token)]["logprob"]
            for token, position in zip(prompt[1:], (choice["prompt_logprobs"] or [])[1:])
        ]
        logprobs = prompt_logprobs + choice["logprobs"]["token_logprobs"]
        return Answer(prompt + generated, logprobs, len(prompt))

    def memory(self) -> dict[str, int]:
        """Return the resident bytes of the server and of its child processes, by process title."""
        import psutil

        process = psutil.Process(self._process.pid)
        found = {}
        for child in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(child.cmdline())[:40] or child.name()
                title = title if title.startswith("VLLM::") else child.name()
                found[f"{title} ({child.pid})"] = child.memory_info().rss
        return found

    def _request(self, path: str, body: dict[str, Any] | None = None) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        # The server is on this machine, so environment variables for proxies must not apply.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=300) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]["message"]
            raise ServerError(f"{error.code}: {text}") from None


def engine_environment(plugin: bool, tensor_parallel_size: int) -> dict[str, str]:
    """Return this process's environment with the settings of a small CPU engine."""
    return {
        **os.environ,
        "VLLM_NWAY_LORA": "1" if plugin else "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # On one NUMA node, every TP rank would otherwise use all cores.
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(tensor_parallel_size))
        if tensor_parallel_size > 1
        else "auto",
        # vLLM's processes find the tests' own plugins (see dense_qwen3_next.py) on this path.
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS / "support" / "plugin"))),
        "VLLM_LOGGING_LEVEL": "INFO",  # tests read the logs, so the caller's level must not apply
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
