"""``check`` beside a worker that loads the same files: their words are the same.

The models are built without stubs, as a user's are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vllm
from packaging.version import Version
from support import damage
from support.families.mla import MLA_FAMILIES
from support.layout_models import MODELS
from support.layout_table import LAYOUTS
from support.layouts import Model, checkpoint
from support.models import import_classes, save_config
from support.verdicts import save_adapter
from support.worker import compare

from vllm_nway_lora.diagnosis.options import ServerOptions

RELEASE = Version(vllm.__version__)
HERE = [model for model in MODELS if Version(model.since) <= RELEASE]


@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
@pytest.mark.parametrize("model", HERE, ids=lambda model: model.name)
def test_check_has_the_words_of_the_worker(tmp_path: Path, model: Model, size: int) -> None:
    save_config(tmp_path, model.config)
    import_classes(model.config)
    folders = []
    for number, layout in enumerate(LAYOUTS):
        if files := layout.write(model):
            folders.append(files.save(tmp_path / f"{number}"))
    good = checkpoint(model).save(tmp_path / "good")
    for change in (damage.cut_rows, damage.drop_lora_a, damage.rename_layer):
        folders.append(damage.copy_adapter(good, tmp_path / change.__name__, change))
    differences = compare(tmp_path, folders, ServerOptions(tensor_parallel_size=size))
    assert not differences, "\n\n".join(f"{name}\n{text}" for name, text in differences.items())


@pytest.mark.skipif(Version("0.29.0") >= RELEASE, reason="vLLM has no MLA on CPU")
@pytest.mark.parametrize(
    "options",
    [
        ServerOptions(),
        ServerOptions(tensor_parallel_size=2),
        ServerOptions(tensor_parallel_size=2, fully_sharded_loras=True),  # refused
    ],
    ids=["tp1", "tp2", "tp2-sharded"],
)
def test_check_has_the_words_of_the_worker_on_kv_b_proj(
    tmp_path: Path, options: ServerOptions
) -> None:
    [config] = [f.config for f in MLA_FAMILIES if f.name.startswith("DeepSeek-V3,")]
    save_config(tmp_path, config)
    import_classes(config)
    rows = config["num_attention_heads"] * (config["qk_nope_head_dim"] + config["v_head_dim"])
    pair = torch.ones(8, config["kv_lora_rank"]), torch.ones(rows, 8)
    (folder := tmp_path / "adapter").mkdir()
    save_adapter(folder, {"model.layers.0.self_attn.kv_b_proj": pair})
    assert not compare(tmp_path, [folder], options)
