"""An adapter's folder: vLLM's own layouts, shards, and the files of other trainers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import manager, tiny
from support.ranks import Ranks

from vllm_nway_lora.adapters.errors import AdapterError
from vllm_nway_lora.adapters.files import admission_follows, find_files, load_checkpoint
from vllm_nway_lora.adapters.origin import get_origin

Tensors = dict[str, torch.Tensor]

SHARDS = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX = "adapter_model.safetensors.index.json"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
MODULES = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]


def pair(module: str) -> Tensors:
    generator = torch.Generator().manual_seed(len(module))
    shapes = {"A": (4, 3), "B": (5, 4)}
    return {
        f"{tiny.PREFIX}{module}.lora_{half}.weight": torch.randn(shape, generator=generator)
        for half, shape in shapes.items()
    }


TENSORS = {name: tensor for module in MODULES for name, tensor in pair(module).items()}


def shard(folder: Path, *, index: bool = False, shards: int = 2) -> None:
    """Write one module per shard."""
    parts = [pair(module) for module in MODULES]
    for name, part in list(zip(SHARDS, parts, strict=True))[:shards]:
        save_file(part, folder / name)
    if index:
        names = {tensor: name for name, part in zip(SHARDS, parts, strict=True) for tensor in part}
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def write(folder: Path, layout: str) -> None:
    """Write :data:`TENSORS` in a layout."""
    if layout == "stock":
        save_file(TENSORS, folder / "adapter_model.safetensors")
    elif layout in ("bin", "pt"):
        torch.save(TENSORS, folder / f"adapter_model.{layout}")
    elif layout == "shards":
        shard(folder)
    elif layout == "shards and index":
        shard(folder, index=True)
    elif layout == "diffusers":
        save_file(TENSORS, folder / "pytorch_lora_weights.safetensors")
    elif layout == "state dict":
        names = {name.replace(".weight", ".default.weight"): t for name, t in TENSORS.items()}
        save_file(names, folder / "adapter_model.safetensors")
    elif layout == "state dict in a bin":
        names = {name.replace(".weight", ".default.weight"): t for name, t in TENSORS.items()}
        torch.save(names, folder / "adapter_model.bin")
    else:
        turned = {
            name.removeprefix(tiny.PREFIX)
            .replace("lora_A.weight", "lora_a")
            .replace("lora_B.weight", "lora_b"): t.t().contiguous()
            for name, t in TENSORS.items()
        }
        save_file(turned, folder / "adapters.safetensors")


#: Layout -> the rules that the adapter's origin has.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "stock": (),
    "bin": (),
    "pt": (),
    "shards": ("2 shards of adapter_model.safetensors read",),
    "shards and index": ("2 shards of adapter_model.safetensors read",),
    "diffusers": ("pytorch_lora_weights.safetensors of diffusers read",),
    "state dict": ("adapter's name 'default' left out of names",),
    "state dict in a bin": ("adapter's name 'default' left out of names",),
    "MLX-LM": (
        "adapters.safetensors of MLX-LM read",
        "MLX-LM's lora_a and lora_b read as lora_A and lora_B",
    ),
}


@pytest.fixture(autouse=True)
def admitted_later(plugin: None) -> Iterator[None]:
    """As the plugin's own hooks load a folder."""
    with admission_follows():
        yield


def load(folder: Path, config: dict[str, Any] = CONFIG, **options: Any) -> Any:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    (folder / "adapter_config.json").write_text(json.dumps(config))
    helper = PEFTHelper.from_local_dir(str(folder), None)
    options = {"lora_model_id": 1, "device": "cpu", "dtype": torch.float32} | options
    return LoRAModel.from_local_checkpoint(str(folder), {"no such module"}, helper, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_weights(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout)
    mlx = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
    adapter = load(tmp_path, mlx if layout == "MLX-LM" else CONFIG)
    assert list(adapter.loras) == MODULES
    for module, weights in adapter.loras.items():
        a, b = pair(module).values()
        assert torch.equal(weights.lora_a, a)
        assert torch.equal(weights.lora_b, b)
        assert (weights.rank, weights.scaling) == (4, 2.0)
    assert adapter.id == 1
    assert get_origin(adapter).rules == LAYOUTS[layout]
    assert get_origin(adapter).names == {module: module for module in MODULES}


def test_an_id_is_given_where_there_is_none(tmp_path: Path) -> None:
    write(tmp_path, "shards")
    assert load(tmp_path, lora_model_id=None).id != load(tmp_path, lora_model_id=None).id


def test_vllms_own_reader_reads_plain_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it reads first counts."""
    for layout in ("stock", "shards", "diffusers"):
        write(tmp_path, layout)
    monkeypatch.setattr("vllm_nway_lora.adapters.files._read", None)
    assert get_origin(load(tmp_path)).rules == ()


def test_without_admission_vllm_judges_the_modules(tmp_path: Path) -> None:
    """The managers of other platforms are not guarded."""
    from vllm_nway_lora.adapters import files

    token = files._is_admitted_later.set(False)
    try:
        write(tmp_path, "stock")
        with pytest.raises(ValueError, match="expected target modules in {'no such module'}"):
            load(tmp_path)
        (tmp_path / "adapter_model.safetensors").unlink()
        write(tmp_path, "shards")
        with pytest.raises(ValueError, match="doesn't contain tensors"):
            load(tmp_path)
    finally:
        files._is_admitted_later.reset(token)


def test_tensorizer_is_left_to_vllm(tmp_path: Path) -> None:
    """It reads from another place than the folder."""

    def load(
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: Any,
        tensorizer_config_dict: dict[str, Any] | None = None,
    ) -> Any:
        assert "any module" in expected_lora_modules
        return tensorizer_config_dict

    write(tmp_path, "shards")
    arguments = (str(tmp_path), {"no such module"}, None, {"tensorizer_dir": "s3://bucket"})
    assert load_checkpoint(load, None, arguments, {}) == {"tensorizer_dir": "s3://bucket"}


def test_an_empty_folder_is_left_to_vllm(tmp_path: Path) -> None:
    assert find_files(tmp_path) is None
    with pytest.raises(ValueError, match="doesn't contain tensors"):
        load(tmp_path)


def test_unsupported_names_are_left_to_vllm(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        save_file({"a.b.weight": torch.ones(2)}, tmp_path / name)
        with pytest.raises(ValueError, match="a.b.weight is unsupported LoRA weight"):
            load(tmp_path)
        (tmp_path / name).unlink()


def refuse(folder: Path, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        load(folder)


@pytest.mark.parametrize("index", [False, True])
def test_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    shard(tmp_path, index=index, shards=1)
    source = INDEX if index else SHARDS[0]
    refuse(tmp_path, f"{source} tells of 2 files, and {SHARDS[1]} is missing. Copy every file")


def test_tensor_that_only_the_index_names_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, index=True)
    save_file({"x.lora_A.weight": torch.ones(4, 3)}, tmp_path / SHARDS[1])
    name = next(iter(pair(MODULES[1])))
    refuse(tmp_path, f"{INDEX} names tensor {name}, which no shard has")


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in SHARDS:
        save_file(pair(MODULES[0]), tmp_path / name)
    refuse(tmp_path, f"tensor .* is in {SHARDS[0]} and in {SHARDS[1]}")


def test_shards_of_two_adapters_are_refused(tmp_path: Path) -> None:
    shard(tmp_path)
    save_file(pair(MODULES[0]), tmp_path / "adapter_model-00001-of-00003.safetensors")
    refuse(
        tmp_path, "its shards are of several adapters: adapter_model-00001-of-00002.safetensors, "
    )


def test_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter.gguf").touch()
    refuse(tmp_path, "adapter.gguf is a GGUF file.*Give the PEFT folder")


def test_experts_of_other_ranks_are_not_read(tmp_path: Path) -> None:
    from vllm.lora import lora_model

    if not hasattr(lora_model, "MoEEPLoadSpec"):
        pytest.skip("this release reads all experts")
    experts = [f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(4)]
    for n, name in enumerate(SHARDS):
        parts = [pair(module) for module in experts[2 * n : 2 * n + 2]]
        save_file(parts[0] | parts[1], tmp_path / name)
    spec = lora_model.MoEEPLoadSpec(ep_rank=1, local_num_experts=2, global_num_experts=4)
    assert list(load(tmp_path, moe_ep_spec=spec).loras) == experts[2:]
    names = {tensor: SHARDS[n // 2] for n, m in enumerate(experts) for tensor in pair(m)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    assert list(load(tmp_path, moe_ep_spec=spec).loras) == experts[2:]


def test_a_worker_serves_shards_and_state_dicts(ranks: Ranks, tmp_path: Path) -> None:
    """Through vLLM's own manager: the slots are those of the plain folder."""
    tensors = tiny.tensors(0)
    plain = tiny.save(tmp_path / "plain", tensors)
    ranks.run(manager.start)
    folder = tiny.save(tmp_path / "sharded", {})
    (folder / "adapter_model.safetensors").unlink()
    names = list(tensors)
    for part, file in ((names[::2], SHARDS[0]), (names[1::2], SHARDS[1])):
        save_file({f"_orig_mod.{name}": tensors[name].contiguous() for name in part}, folder / file)
    assert ranks.run(manager.add, "sharded", 1, folder) == [""] * ranks.size
    assert all(ranks.run(manager.is_exact, 1, plain))


def test_an_adapter_of_unknown_modules_only_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "a", pair("model.layers.0.mlp.x_proj"))
    ranks.run(manager.start)
    for error in ranks.run(manager.add, "a", 1, folder):
        assert "module model.layers.0.mlp.x_proj: this model has no such layer" in error
