"""Engines of the oracle: each runs in a fork of one process that has imported vLLM."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support import oracle_cases as cases
from support import oracle_moe
from support.oracle_family import Family, save_checkpoint

#: Seconds that one engine may take.
LIMIT = 240
VOCABULARY = 512
PROMPT = torch.randint(3, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1)).tolist()
#: Decoded tokens. They are forced, so that all answers score the same tokens.
FORCED, DECODED = 7, 3

#: Log-probabilities (positions, vocabulary), or the error of the engine.
Answer = torch.Tensor | str


@dataclass(frozen=True)
class Answers:
    """One engine's answers.

    Attributes:
        base: without an adapter, or with the unmerged weights.
        cases: case -> answer.
        together: the modules of the case "all together".
    """

    base: torch.Tensor
    cases: dict[str, Answer]
    together: list[str]


TOGETHER = "all together"
#: The base model, after all adapters.
AFTERWARDS = "no adapter, afterwards"


def prepare() -> None:
    """Import vLLM once, before the first fork."""
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.lora.request
    import vllm.model_executor.models.registry
    import vllm.v1.engine.llm_engine  # noqa: F401

    torch.set_num_threads(1)  # libgomp: a process that has run threads cannot be forked


class ChildError(RuntimeError):
    """A forked process failed; the message is its traceback."""


def call_in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``function`` returns in a forked process, which may take ``LIMIT`` seconds.

    Raises:
        ChildError: the function raised an error, or the process ended without an answer.
    """
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answer.pt")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(LIMIT)
                os.setsid()
                torch.save(function(*arguments), path)
                status = 0
            except BaseException:
                path.with_suffix(".txt").write_text(traceback.format_exc())
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what the child has started
        if status:
            error = path.with_suffix(".txt")
            text = error.read_text() if error.exists() else ""
            raise ChildError(text or f"RuntimeError: the process ended with status {status}")
        return torch.load(path, weights_only=False)


def save(family: Family, folder: Path) -> dict[str, torch.Size]:
    """Save a family's checkpoint; return the shapes of its modules."""
    save_checkpoint(family, folder / "model")
    modules = {
        name: shape[::-1] if cases.is_transposed(name, family.transposed) else shape
        for name, shape in cases.list_modules(folder / "model").items()
    }
    if family.config["tie_word_embeddings"]:
        # A merged embedding would change the head too, which an adapter does not.
        return {name: shape for name, shape in modules.items() if not cases.is_embedding(name)}
    return modules


def serve(
    family: Family,
    folder: Path,
    shapes: Mapping[str, torch.Size],
    plugin: bool,
    together: list[str] | None = None,
) -> Answers:
    """Serve one adapter after the other; ``together``: the modules of the last one, else all served."""
    from vllm.lora.request import LoRARequest

    os.environ["VLLM_NWAY_LORA"] = str(int(plugin))
    # A free slot stays: to 0.32.0, tokens without LoRA get the last slot's adapter on CPU.
    llm = _start(family, folder, enable_lora=True, max_loras=3, max_lora_rank=8)
    base, answers = _ask(llm), {}

    def serve(name: str, modules: list[str]) -> None:
        number = len(answers) + 1
        adapter = folder / f"adapter-{plugin:d}" / str(number)
        cases.save_adapter(adapter, dict(shapes), modules, name.endswith(cases.STACKED))
        request = LoRARequest(name, number, str(adapter))
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}".replace(str(adapter), "-")
        else:
            answers[name] = _ask(llm, request)
            llm.llm_engine.remove_lora(number)

    listed = cases.list_cases(shapes)
    for name, modules in listed.items():
        serve(name, modules)
    if together is None:
        served = {m for n, a in answers.items() if not isinstance(a, str) for m in listed[n]}
        together = [m for m in shapes if m in served]
    serve(TOGETHER, together)
    answers[AFTERWARDS] = _ask(llm)
    return Answers(base, answers, together)


def serve_merged(
    family: Family, folder: Path, shapes: Mapping[str, torch.Size], together: list[str]
) -> Answers:
    """Serve merged weights, without LoRA and without the plugin."""
    os.environ["VLLM_NWAY_LORA"] = "0"
    llm = _start(family, folder)
    base, answers = _ask(llm), {}
    weights = list(cases.read_checkpoint(folder / "model"))
    merged = folder / "merged"
    shutil.copytree(folder / "model", merged, ignore=shutil.ignore_patterns("*.safetensors*"))

    def load(modules: list[str]) -> torch.Tensor:
        save_file(
            dict(cases.merge(weights, modules, family.transposed)), merged / "model.safetensors"
        )
        llm.collective_rpc(_load_again, args=(str(merged),))
        return _ask(llm)

    for name, modules in {**cases.list_cases(shapes), TOGETHER: together}.items():
        answers[name] = load(modules)
    difference = (base - load([])).abs().max().item()
    if not difference < 1e-3:
        raise RuntimeError(f"the reference is not the checkpoint: {difference}")
    return Answers(base, answers, together)


def _load_again(worker: Any, checkpoint: str) -> None:
    """Replace a worker's model by a new one of ``checkpoint``.

    vLLM's own reloading in place does not restore packed experts on CPU (0.32.0).
    """
    from vllm.config import set_current_vllm_config

    runner = worker.model_runner
    compilation = runner.vllm_config.compilation_config
    compilation.static_forward_context.clear()
    compilation.static_all_moe_layers.clear()
    runner.vllm_config.model_config.model = checkpoint
    for attribute in ("attn_groups", "kv_caches"):
        getattr(runner, attribute).clear()
    for group in runner.kv_cache_config.kv_cache_groups:  # else these layers are added twice
        group.layer_names[:] = [
            n for n in group.layer_names if n not in runner.shared_kv_cache_layers
        ]
    with set_current_vllm_config(runner.vllm_config):
        runner.load_model()
        runner.initialize_kv_cache(runner.kv_cache_config)


def _start(family: Family, folder: Path, **options: Any) -> Any:
    from vllm import LLM
    from vllm.model_executor.models import ModelRegistry

    if family.experts:
        oracle_moe.replace_kernels()
    for architecture in [*family.config["architectures"], "TransformersForCausalLM"]:
        # Else vLLM inspects the class in a new process, which imports vLLM again.
        with contextlib.suppress(Exception):
            model_class = ModelRegistry.models[architecture].load_model_cls()
            ModelRegistry.register_model(architecture, model_class)
    return LLM(
        str(folder / "model"),
        skip_tokenizer_init=True,
        dtype=family.dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=128,
        max_logprobs=VOCABULARY,
        num_gpu_blocks_override=32,
        disable_log_stats=True,
        **dict(family.engine) | options,
    )


def _ask(llm: Any, request: Any = None) -> torch.Tensor:
    """Return the log-probabilities of the vocabulary after each token of prompt and answer."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=DECODED,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        allowed_token_ids=[FORCED],
        logprobs=VOCABULARY,
        prompt_logprobs=VOCABULARY,
    )
    [done] = llm.generate(
        [{"prompt_token_ids": PROMPT}], sampling, lora_request=request, use_tqdm=False
    )
    [completion] = done.outputs
    assert list(completion.token_ids) == [FORCED] * DECODED
    positions = [*done.prompt_logprobs[1:], *completion.logprobs]
    return torch.tensor([[p[token].logprob for token in range(VOCABULARY)] for p in positions])
