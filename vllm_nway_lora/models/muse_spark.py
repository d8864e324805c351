# SPDX-License-Identifier: Apache-2.0
"""Muse Spark: one layer holds its attention's q, k, v and output gate, and vLLM has no LoRA for it.

Source: models/muse_spark/common/layers.py (``MuseSpark1xQKVOGateParallelLinear``, which is not a
merged layer to vLLM and does not list its parts), nvidia/model.py and amd/model.py, 0.33.0. The class
removes ``qkv_proj`` from its ``packed_modules_mapping``. The order of the rows is traced.
"""

from __future__ import annotations

from torch import nn

from vllm_nway_lora.rows.notes import set_notes


def prepare(model: nn.Module) -> None:
    """Note the modules and the outputs of the fused projections."""
    for projection in model.modules():
        if type(projection).__name__ != "MuseSpark1xQKVOGateParallelLinear":
            continue
        q, kv = (
            heads * projection.tp_size * projection.head_size
            for heads in (projection.num_heads, projection.num_kv_heads)
        )
        set_notes(
            projection,
            modules=("q_proj", "k_proj", "v_proj", "gate_proj"),
            shards=(("q", q), ("k", kv), ("v", kv), ("o_gate", q)),
        )
