# SPDX-License-Identifier: Apache-2.0
"""Known fusions: which outputs of a fused projection each adapter-visible module covers.

Needed only where a projection has more outputs than modules and more than one module: with as many
modules as outputs each covers one, and a single module covers them all. Modules are told apart by
name, because row counts cannot place them (in Qwen3.5, ``v`` and ``z`` are equally wide).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: fused projection -> {module: indices of the outputs it covers}.
KNOWN: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    # Qwen3.5, Qwen3.5-MoE and the models that share their gated-delta-net layer: outputs q, k, v, z.
    # Source: the shard ids in vllm/model_executor/models/qwen3_5.py, 0.17.0 (load_weights) to
    # 0.32.0 (hf_to_vllm_mapper).
    "in_proj_qkvz": {"in_proj_qkv": (0, 1, 2), "in_proj_z": (3,)},
}


def outputs_by_module(
    fused: str, modules: Sequence[str], n_outputs: int
) -> tuple[tuple[int, ...], ...] | None:
    """Return the output indices of each of ``modules``, or None if names do not tell.

    Args:
        fused: the projection's own name, the last part of its path (``in_proj_qkvz``).
        modules: its adapter-visible modules, in the order of ``packed_modules_mapping``.
        n_outputs: how many outputs the projection has (``len(output_sizes)``).
    """
    if len(modules) == 1:
        return (tuple(range(n_outputs)),)
    if len(modules) == n_outputs:
        return tuple((output,) for output in range(n_outputs))
    known = KNOWN.get(fused, {})
    if set(known) != set(modules) or sum(map(len, known.values())) != n_outputs:
        return None
    return tuple(known[module] for module in modules)
