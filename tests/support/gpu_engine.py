"""An engine on a GPU without vLLM's compiled extensions: a process of one model and one mode.

The operators of ``gpu_standins`` replace the extensions. Attention, the gated delta net, Mamba2,
experts and LoRA run on vLLM's Triton kernels. The reference is computed elsewhere
(``gpu_engine_models``): its logprobs of fixed prompts are compared here, and the generated tokens there.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support import gpu_standins

NEW_TOKENS = 8
#: Selects vLLM's first model runner; by default 0.33.0 takes the second.
FIRST_RUNNER = "-v1"
BASE = ""  # the name of requests without an adapter
MIB = 2**20

#: Compilation passes for compiled operators.
FUSIONS = (
    "fuse_norm_quant",
    "fuse_act_quant",
    "fuse_attn_quant",
    "enable_qk_norm_rope_fusion",
    "fuse_allreduce_rms",
    "fuse_rope_kvcache",
    "fuse_rope_kvcache_cat_mla",
    "fuse_act_padding",
    "fuse_mla_dual_rms_norm",
    "fuse_qk_norm_rope_kvcache",
)

#: The mode -> the engine's arguments. A mode's name may end in :data:`FIRST_RUNNER`.
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}},
    "graph": {
        "compilation_config": {
            "mode": 0,
            "custom_ops": ["none"],
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
        }
    },
    "compile": {
        "compilation_config": {
            "custom_ops": ["none"],
            "pass_config": dict.fromkeys(FUSIONS, False),
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
        }
    },
}
# Attention outside of the graphs.
MODES["piecewise"] = {
    "compilation_config": MODES["compile"]["compilation_config"] | {"cudagraph_mode": "PIECEWISE"}
}


class Run:
    """One engine's answers, written to a file after each step, because the process has a time limit.

    Args:
        job: ``model``, ``mode`` and ``plugin``; ``folder`` of the model, its adapters and
            ``expected.json``; ``results``, the file.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.folder = Path(job["folder"])
        self.expected = json.loads((self.folder / "expected.json").read_text())
        self._results = Path(job["results"])
        self.mode = job["mode"]
        self._began = time.monotonic()
        self.found: dict[str, Any] = {
            **{key: job[key] for key in ("model", "mode", "plugin")},
            "reached": [],
            "adapters": {},
            "together": [],
        }
        self.requests: dict[str, Any] = {BASE: None}

    def reach(self, stage: str) -> None:
        """Print and save what the run has reached."""
        seconds = time.monotonic() - self._began
        self.found["reached"].append(f"{stage} ({seconds:.0f} s)")
        print(f"[{self.found['model']} {self.mode}] {stage} after {seconds:.1f} s", flush=True)
        self._results.write_text(json.dumps(self.found))

    def fail(self, stage: str) -> None:
        """Print and save the exception at hand."""
        kind, error, _ = sys.exc_info()
        frames = traceback.extract_tb(error and error.__traceback__)[-6:]
        places = [f"{Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in frames]
        self.found.setdefault("failed", []).append(
            {"stage": stage, "error": f"{kind and kind.__name__}: {error}"[:1500], "at": places}
        )
        self.reach(f"FAILED at {stage}: {kind and kind.__name__}: {str(error)[:300]}")
        for place in places:
            print(f"    {place}", flush=True)

    def start(self) -> None:
        """Start the engine and load the adapters."""
        import torch
        import vllm
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        from vllm_nway_lora.diagnosis import offline

        gpu_standins.install()
        config = json.loads((self.folder / "model" / "config.json").read_text())
        for architecture in config["architectures"]:
            offline.import_class(architecture)
        self.found |= {
            "card": torch.cuda.get_device_name(),
            "platform": type(current_platform).__name__,
            "vllm": vllm.__version__,
        }
        self.reach("imported")
        names = list(self.expected["adapters"])
        self._llm = vllm.LLM(str(self.folder / "model"), **arguments(self.mode, len(names), config))
        self.found["layers"] = self._llm.apply_model(list_layers)[0]
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.found["runner"] = type(runner).__module__
        self.reach("started")
        for number, name in enumerate(names, start=1):
            folder = self.folder / self.expected["adapters"][name]["folder"]
            request = LoRARequest(name, number, str(folder))
            try:
                self._llm.llm_engine.add_lora(request)
            except Exception as error:
                refusal = f"{type(error).__name__}: {error}"
                self.found["adapters"][name] = {"outcome": "refused", "refusal": refusal[:500]}
            else:
                self.requests[name] = request
        self.reach(f"loaded {len(self.requests) - 1} of {len(names)} adapters")

    def serve(self) -> None:
        """Complete the prompts with each adapter alone, then in one batch, then without adapters."""
        prompts = self.expected["prompts"]
        for name, request in self.requests.items():
            try:
                answers = [self._complete([prompt], [request], True)[0] for prompt in prompts]
                self.found["adapters"][name] = self._compare(name, answers)
            except Exception:
                self.fail(f"adapter {name!r}")
        self.reach("each alone: " + json.dumps(self._outcomes()))
        names = list(self.requests)
        # Requests without an adapter are first, in the middle and last.
        batch = [BASE, *names[1 : len(names) // 2], BASE, *names[len(names) // 2 :], BASE]
        used = [prompts[n % len(prompts)] for n in range(len(batch))]
        answers = self._complete(used, [self.requests[name] for name in batch], False)
        self.found["together"] = list(zip(batch, answers, strict=True))
        self.reach(f"one batch of {len(batch)}")
        for name in names[1:]:
            self._llm.llm_engine.remove_lora(self.requests[name].lora_int_id)
        afterwards = [self._complete([prompt], [None], True)[0] for prompt in prompts]
        self.found["afterwards"] = self._compare(BASE, afterwards)
        self.reach("done")

    def _complete(
        self, prompts: list[list[int]], requests: list[Any], score_prompts: bool
    ) -> list[dict[str, Any]]:
        """Complete prompts greedily in one batch; an answer has the fields of ``adapters.Answer``."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=NEW_TOKENS,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            prompt_logprobs=0 if score_prompts else None,
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = []
        for done, prompt in zip(
            self._llm.generate(inputs, sampling, lora_request=requests, use_tqdm=False),
            prompts,
            strict=True,
        ):
            [completion] = done.outputs
            scored = [*(done.prompt_logprobs or [])[1:], *completion.logprobs]
            tokens = [*prompt, *completion.token_ids]
            logprobs = [
                p[t].logprob
                for p, t in zip(scored, tokens[len(tokens) - len(scored) :], strict=True)
            ]
            answers.append({"tokens": tokens, "logprobs": logprobs, "prompt_length": len(prompt)})
        return answers

    def _compare(self, name: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the prompts' largest error and effect, with the outcome, and the answers."""
        expected = self.expected["adapters"].get(name, {}).get("logprobs", self.expected["base"])
        errors, changes, effects = [0.0], [0.0], [0.0]
        for answer, ours, base in zip(answers, expected, self.expected["base"], strict=True):
            served = answer["logprobs"][: answer["prompt_length"] - 1]
            for found, wanted, before in zip(served, ours, base, strict=True):
                errors.append(abs(found - wanted))
                changes.append(abs(found - before))
                effects.append(abs(wanted - before))
        error, change, effect = max(errors), max(changes), max(effects)
        if name == BASE:
            outcome = "exact" if error < self.expected["noise"] else "wrong"
        else:
            outcome = "exact" if error < effect / 5 else "wrong"
            outcome = "ignored" if outcome == "wrong" and change < effect / 5 else outcome
        return {"outcome": outcome, "error": error, "effect": effect, "answers": answers}

    def _outcomes(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, result in self.found["adapters"].items():
            found[name or "base"] = result["outcome"]
            if "effect" in result:
                found[name or "base"] += f" {result['error']:.3f} of {result['effect']:.2f}"
        return found


def arguments(mode: str, adapters: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the engine's arguments for a model's ``config.json``.

    The cache's size is given: beside other processes, vLLM cannot measure the free memory.
    """
    return {
        "dtype": "bfloat16",
        "enable_lora": True,
        "max_loras": adapters,
        "max_lora_rank": 16,
        "attention_backend": "TRITON_MLA" if "kv_lora_rank" in config else "TRITON_ATTN",
        "gdn_prefill_backend": "triton",  # by default it is FlashInfer's
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "enable_prefix_caching": False,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 256 * MIB,
        "disable_log_stats": True,
        **MODES[mode.removesuffix(FIRST_RUNNER)],
    }


def list_layers(model: Any) -> dict[str, int]:
    """Return the model's LoRA classes -> the number of their layers."""
    names = [f"{type(m).__module__}.{type(m).__name__}" for m in model.modules()]
    return {name: names.count(name) for name in sorted(set(names)) if "LoRA" in name}


def main(job: dict[str, Any]) -> None:
    """Run one engine; every stage that fails is written to the results."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NWAY_LORA": "1" if job["plugin"] else "0",
        # apply_model sends a function.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    if job["mode"].endswith(FIRST_RUNNER):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    run = Run(job)
    for stage in (run.start, run.serve):
        try:
            stage()
        except Exception:
            run.fail(stage.__name__)
            break
    sys.stdout.flush()
    os._exit("failed" in run.found)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
