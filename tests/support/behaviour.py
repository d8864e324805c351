"""One engine without a server, and scenarios in which stock vLLM serves adapters correctly.

Each scenario records the tokens of its requests, the adapters' files that were read, the folders that
were listed, and the calls of the workers other than model steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.adapters import prompts
from support.processes import run_module
from support.server import engine_environment

TIMEOUT = 900  # seconds
STEPS = ("execute_model", "sample_tokens", "execute_dummy_batch", "take_draft_token_ids")


@dataclass
class Record:
    """What one scenario has done.

    Attributes:
        tokens: request -> its tokens, or the text of the error that ended the scenario.
        reads: how often an ``adapter_config.json`` was opened.
        listings: how often a folder of adapters was listed.
        calls: how often the workers were called, model steps excepted.
    """

    tokens: dict[str, Any] = field(default_factory=dict)
    reads: int = 0
    listings: int = 0
    calls: int = 0


def run_scenarios(
    checkpoint: Path, adapters: dict[str, Path], log: Path, *, plugin: bool
) -> dict[str, Record]:
    """Run every scenario in one engine in a child process; return the records by name.

    Raises:
        RuntimeError: the engine did not start or did not end; the message is the end of its log.
    """
    folder = log.parent / f"{log.name}-adapters"
    for name, adapter in adapters.items():
        shutil.copytree(adapter, folder / name)
    job = {"checkpoint": str(checkpoint), "folder": str(folder), "records": f"{log}.json"}
    environment = engine_environment(plugin, 1) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run_module("support.behaviour", job, log, environment, TIMEOUT)
    found = json.loads(Path(job["records"]).read_text())
    return {name: Record(**record) for name, record in found.items()}


class Engine:
    """An engine with two slots and two places, and its counters."""

    def __init__(self, checkpoint: str, folder: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            checkpoint,
            dtype="float32",
            enforce_eager=True,
            enable_lora=True,
            max_loras=2,
            max_cpu_loras=2,
            max_lora_rank=16,
            max_model_len=128,
            max_num_seqs=8,
            enable_prefix_caching=False,
        )
        self.folder = Path(folder)
        self.record = Record()
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        call = executor.collective_rpc

        def collective_rpc(method: Any, *args: Any, **kwargs: Any) -> Any:
            self.record.calls += getattr(method, "__name__", method) not in STEPS
            return call(method, *args, **kwargs)

        executor.collective_rpc = collective_rpc
        sys.addaudithook(self._count)

    def _count(self, event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.scandir", "os.listdir"):
            path = str(args[0])
            self.record.reads += event == "open" and path.endswith("adapter_config.json")
            self.record.listings += event != "open" and path.startswith(str(self.folder))

    def request(self, name: str, number: int = 0, path: str = "") -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, number or ord(name[0]), path or str(self.folder / name))

    @contextlib.contextmanager
    def scenario(self, name: str, records: dict[str, Record]) -> Iterator[Record]:
        records[name] = self.record = Record()
        try:
            yield self.record
        except Exception as error:
            self.record.tokens["error"] = f"{type(error).__name__}: {error}"

    def run(
        self, *arrivals: tuple[int, str, Any, int], at: dict[int, Callable[[], Any]] | None = None
    ) -> None:
        """Step until all requests are finished.

        Args:
            arrivals: (step, request, ``LoRARequest`` or None, number of tokens).
            at: step -> what happens before it, after the arrivals.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        step, pending = 0, list(arrivals)
        while pending or engine.has_unfinished_requests():
            for arrival in [a for a in pending if a[0] <= step]:
                pending.remove(arrival)
                _, name, lora_request, tokens = arrival
                sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
                prompt = {"prompt_token_ids": prompts(1)[0]}
                engine.add_request(name, prompt, sampling, lora_request=lora_request)
            (at or {}).get(step, lambda: None)()
            for output in engine.step():
                if output.finished:
                    self.record.tokens[output.request_id] = list(output.outputs[0].token_ids)
            step += 1


def push(worker: Any, folder: str, number: int) -> None:
    """Put an adapter into a worker from memory, as RL frameworks do."""
    from safetensors.torch import load_file
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    manager = worker.model_runner.lora_manager._adapter_manager
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    adapter = LoRAModel.from_lora_tensors(
        lora_model_id=number,
        tensors=load_file(Path(folder, "adapter_model.safetensors")),
        peft_helper=PEFTHelper.from_dict(config),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
    )
    if len(manager) + 1 > manager.capacity:
        manager.remove_oldest_adapter()
    manager.add_adapter(adapter)
    manager.activate_adapter(number)


def main(job: dict[str, str]) -> None:
    """Run the scenarios in this process and write their records to ``job["records"]``."""
    engine = Engine(job["checkpoint"], job["folder"])
    folder = engine.folder
    a, b, c, d = (engine.request(name) for name in "abcd")
    records: dict[str, Record] = {}
    with engine.scenario("base model", records):
        engine.run((0, "1", None, 4), (1, "2", None, 4))
    with engine.scenario("first use", records):
        engine.run((0, "1", a, 4))
    with engine.scenario("resident adapter", records):
        engine.run(*((n, str(n), a, 4) for n in range(20)))
    with engine.scenario("touched folder", records):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            os.utime(folder / "a" / name)
        engine.run(*((n, str(n), a, 2) for n in range(10)))
    with engine.scenario("a third adapter arrives", records):
        engine.run((0, "a", a, 12), (0, "b", b, 12), (4, "c", c, 4))
    with engine.scenario("two more adapters arrive", records):
        engine.run((0, "a", a, 12), (0, "b", b, 12), (4, "c", c, 4), (5, "d", d, 4))
    with engine.scenario("folder of a running adapter is deleted", records):
        moved = folder.parent / "moved"
        engine.run(
            (0, "a", a, 20),
            (0, "b", b, 20),
            (8, "c", c, 4),
            at={4: lambda: shutil.move(folder / "a", moved)},
        )
        shutil.move(moved, folder / "a")
    with engine.scenario("adapter from memory", records):
        core = engine.llm.llm_engine.engine_core.engine_core
        core.collective_rpc(push, args=(str(folder / "d"), 77))
        memory = engine.request("memory", 77, "made-up")
        engine.record.reads = 0
        engine.run(*((n, str(n), memory, 4) for n in range(6)))
    with engine.scenario("another arrives beside an adapter from memory", records):
        engine.run((0, "1", memory, 12), (4, "d", d, 4))
    Path(job["records"]).write_text(json.dumps({n: asdict(r) for n, r in records.items()}))
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
