# SPDX-License-Identifier: Apache-2.0
"""The defects of stock vLLM that concern LoRA: the affected releases, the messages, the threads.

Patches, tests, CI and docs/releases.md read this table. Thread numbers are of ``vllm-project/vllm``.
"""

from __future__ import annotations

from vllm_nway_lora.compat.defect import Defect, Seen

DEFECTS = (
    Defect(
        "fewer-modules-than-outputs",
        "Qwen3.5 with `--enable-lora` does not start. With `--enforce-eager` it starts, and no adapter "
        "on its `in_proj_qkv` or `in_proj_z` loads.",
        # From 0.19.0 on Qwen3.5 avoids it (see "unfused"); the layer class has it until 0.20.2. With
        # one TP rank, a slice of the wrong width is copied before the list index fails.
        (Seen("0.17.0", "0.20.2", ("list index out of range", "The size of tensor a (")),),
        ("#36372", "#36478", "#37912"),
        '#37912 (0.21.0), which introduced "copied-lora-a".',
    ),
    Defect(
        "first-module-left-out",
        "An adapter on `in_proj_z` without `in_proj_qkv` does not load.",
        (
            Seen("0.17.0", "0.20.2", ("list index out of range", "The size of tensor a (")),
            Seen("0.21.0", "0.28.0", ("'NoneType' object has no attribute 'shape'",)),
            Seen("0.29.0", None, ("Cannot determine how to split lora_b with",)),
        ),
        ("#57851",),
        "#57851, once merged.",
    ),
    Defect(
        "last-module-left-out",
        "An adapter on `in_proj_qkv` without `in_proj_z` does not load.",
        (
            Seen("0.17.0", "0.20.2", ("list index out of range", "The size of tensor a (")),
            Seen("0.21.0", "0.28.0", ("'NoneType' object has no attribute 'shape'",)),
        ),
        ("#47639", "#47640"),
        "#47640 (0.29.0).",
    ),
    Defect(
        "unwrapped-when-fully-sharded",
        "With `--fully-sharded-loras`, adapters on a projection with three or more outputs are ignored "
        "if adapters see it as one module or as three or more. Until 0.19.1 the engine does not start.",
        (
            Seen("0.17.0", "0.19.1", ("must be a BaseLayerWithLoRA instance, got",)),
            Seen("0.20.0", None, ("could not be wrapped by any LoRA layer implementation",)),
        ),
        ("#37019",),
        "A fully sharded class for such layers; #37019 begins it.",
    ),
    Defect(
        "one-module-cut-in-halves",
        "With tensor parallelism, an adapter on a merged projection that is one module and has one "
        "output or two unequal outputs (Qwen3-Next's `in_proj_qkvz` and `in_proj_ba`) silently "
        "produces wrong output.",
        (Seen("0.17.0", None),),
        (),
        "A `slice_lora_b` that follows `output_sizes`. Not reported upstream as far as we know.",
    ),
    Defect(
        "mamba2-one-group",
        "With tensor parallelism, an adapter on the `in_proj` of a Mamba2 mixer with one group "
        "(Granite 4 hybrid, Falcon-H1, Bamba) silently produces wrong output.",
        (Seen("0.17.0", None),),
        (),
        "LoRA that follows that projection's weight loader. Not reported upstream as far as we know.",
    ),
    Defect(
        "llama4-rotary-rows",
        "An adapter on Llama 4's `q_proj` or `k_proj` silently produces wrong output: vLLM permutes "
        "the rows of both weights when it loads them, and does not permute those of LoRA-B.",
        (Seen("0.17.0", None),),
        (),
        "LoRA-B in the order of the weights. Not reported upstream as far as we know.",
    ),
    Defect(
        "misnamed-modules",
        "Bamba's class lists `up_proj` and `down_proj` as the modules of `gate_up_proj`. An adapter on "
        "`gate_proj` does not load; an adapter on the others silently produces wrong output.",
        (Seen("0.17.0", "0.23.0", ("expected target modules in",)),),
        (),
        "Bamba's removal (0.24.0).",
    ),
    Defect(
        "served-in-part",
        "An adapter with tensors that match no layer, or do not fit their layer, is served without "
        "these tensors.",
        (Seen("0.17.0", None),),
        ("#49354", "#55193"),
        "A check of every tensor before an adapter is activated.",
    ),
    Defect(
        "patterns-ignored",
        "An adapter with `rank_pattern` or `alpha_pattern` is served at the wrong scale.",
        (Seen("0.17.0", "0.31.0"),),
        (),
        "0.32.0.",
    ),
    Defect(
        "experts-without-rslora",
        "An adapter with `use_rslora` on a mixture's experts, one tensor per expert, is served at the "
        "wrong scale.",
        (Seen("0.17.0", "0.29.0"),),
        ("#55545", "#55548"),
        "#55548 (0.30.0). This package refuses such adapters.",
    ),
    Defect(
        "bias-for-matrix",
        "An adapter with a LoRA bias (`lora_B.bias`) is served with the bias in place of LoRA-B.",
        (Seen("0.31.0", "0.31.0"),),
        (),
        "0.32.0.",
    ),
    Defect(
        "stale-replies",
        "With tensor parallelism, the load that follows a refused load fails with the error of the "
        "refused one.",
        (Seen("0.17.0", None),),
        (),
        "A `collective_rpc` that collects the replies of all ranks before it raises.",
    ),
    Defect(
        "request-ends-engine",
        "A request with an adapter that cannot be loaded ends the engine.",
        (Seen("0.17.0", None),),
        (),
        "An engine in which a failed load fails only its request.",
    ),
    Defect(
        "evicted-by-its-own-step",
        "A step that adds an adapter can evict another adapter of the same step, which is then read "
        "from disk again. If its files are gone, the engine ends.",
        (Seen("0.17.0", None),),
        (),
        "A step that uses its resident adapters first. Not reported upstream as far as we know.",
    ),
    Defect(
        "stale-prefix-cache",
        "After other weights have been loaded under an adapter's name, prompts are answered from the "
        "cached prefixes of the old weights.",
        (Seen("0.17.0", None),),
        ("#42125", "#30931", "#48352"),
        "A prefix cache whose keys depend on the adapter's contents.",
    ),
    Defect(
        "reloaded-every-step",
        "After `load_inplace`, every step of every request reads the adapter from disk again.",
        (Seen("0.17.0", "0.32.0"),),
        (),
        "0.33.0.",
    ),
    Defect(
        "replaced-on-some-engines",
        "With data parallelism, a `load_inplace` that one engine refuses leaves the new adapter on the "
        "others, under the same name.",
        (Seen("0.17.0", None),),
        (),
        "A load that all engines confirm before any of them replaces the adapter.",
    ),
    Defect(
        "gathered-when-whole",
        "With tensor parallelism, LoRA-A's products are gathered over all ranks although every rank "
        "has all of them. On CPU the request fails.",
        (Seen("0.20.0", "0.24.0", ("einsum(): subscript i has size",)),),
        (),
        "0.25.0.",
    ),
    Defect(
        "whole-layer-gathered",
        "With `--fully-sharded-loras` and tensor parallelism, LoRA-A's products are gathered for a "
        "projection that every rank holds whole (MLA). On CPU the request fails.",
        (Seen("0.17.0", "0.24.0", ("einsum(): subscript i has size",)),),
        (),
        "0.25.0.",
    ),
    Defect(
        "two-names-two-layers",
        "An adapter on the MLA projections (DeepSeek, Kimi-K2, A.X K1, openPangu) is silently served "
        "as the base model. Until 0.19.1 the engine does not start if the projection's class is a "
        "subclass.",
        (Seen("0.17.0", "0.21.0"),),
        (),
        "`wrapped_by_id` (0.22.0).",
    ),
    Defect(
        "read-past-lora",
        "An adapter on `kv_b_proj` (every model with MLA) or on `shared_expert_gate` (Qwen's mixtures of "
        "experts) is silently served as the base model.",
        (Seen("0.17.0", None),),
        ("#48974",),
        "LoRA in MLA's prefill and decode, and one LoRA layer for both names of the gate.",
    ),
    Defect(
        "one-module-two-outputs",
        "Gemma 4 (31B, 26B-A4B) loads `k_proj` into K and V. An adapter on it is added to K only.",
        (Seen("0.20.2", None),),
        ("#47026",),
        "LoRA of `k_proj` in both outputs.",
    ),
    Defect(
        "no-lora-flags",
        "vLLM refuses LoRA on models whose classes lack only its flags, such as Gemma 3n, Kimi K2.5, GPT-2 "
        "and Mamba.",
        (
            Seen("0.17.0", "0.32.0", ("does not support LoRA yet",)),
            Seen("0.33.0", None, ("does not support LoRA yet", "LoRA is not supported for")),
        ),
        ("#21746", "#43840"),
        "`SupportsLoRA` on these classes.",
    ),
    Defect(
        "no-lora-flags-in-configuration",
        "The server refuses LoRA on the same models when it reads the configuration, before a worker starts.",
        (Seen("0.33.0", None, ("LoRA is not supported for",)),),
        ("#21746", "#43840"),
        "`SupportsLoRA` on these classes.",
    ),
    Defect(
        "lora-asserted-off",
        "Mamba 2 and Zamba 2 do not start with `--enable-lora`.",
        (Seen("0.17.0", "0.32.0", ("assert not is_lora_enabled",)),),
        (),
        "0.33.0, which then refuses LoRA on them by their missing flags.",
    ),
    Defect(
        "unfused",
        "Qwen3.5 runs two GEMMs per layer instead of one when LoRA is on.",
        (Seen("0.19.0", "0.20.2"),),
        ("#36976",),
        "#37912 (0.21.0). This package leaves it: two GEMMs cost 1 to 6 % more than one.",
    ),
    Defect(
        "copied-per-token",
        "On CPU, every LoRA layer copies the adapter for each token: a prompt is read at a tenth of the "
        "base model's speed.",
        (Seen("0.17.0", None),),
        (),
        "Products on CPU that multiply all tokens of an adapter at once.",
    ),
    Defect(
        "last-slot-on-cpu",
        "On CPU, a token without LoRA in a batch with adapters gets the LoRA of the last slot, if it has "
        "an adapter (`--max-loras` adapters are in use).",
        (Seen("0.17.0", "0.32.0"),),
        (),
        "0.33.0.",
    ),
    Defect(
        "copied-lora-a",
        "Qwen3.5's LoRA-A is stored and multiplied once per output (4) instead of once per module (2).",
        (Seen("0.21.0", None),),
        ("#37912",),
        "One LoRA-A per module in `MergedColumnParallelLinearWithLoRA`.",
    ),
)


def find(name: str) -> Defect:
    """Return the defect of that name.

    Raises:
        KeyError: no defect has that name.
    """
    return {defect.name: defect for defect in DEFECTS}[name]
