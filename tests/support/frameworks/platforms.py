"""vLLM-Ascend, Gaudi and TPU: platforms with layers or LoRA layer classes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from support.frameworks.framework import Framework

_PARALLEL = ("ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear")


def _add_layers(names: tuple[str, ...]) -> dict[str, Any]:
    """Have vLLM build subclasses in place of its own layers; each has a ``forward`` of its own."""
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers import linear

    def build(base: Any) -> Any:
        def forward(layer: Any, input_: Any) -> Any:
            return base.forward(layer, input_)

        return type(f"Platform{base.__name__}", (base,), {"forward": forward})

    classes = {name: build(getattr(linear, name)) for name in names}
    custom_op.op_registry_oot.update(classes)
    return classes


def _subclass(name: str, takes: Callable[..., bool]) -> Any:
    """Build a subclass of one of vLLM's LoRA layers that takes the layers for which ``takes`` is true."""
    from vllm.lora import layers

    def can_replace_layer(cls: Any, *args: Any, **kwargs: Any) -> bool:
        names = ("source_layer", "lora_config", "packed_modules_list")
        given = dict(zip(names, args)) | kwargs
        return takes(*(given[name] for name in names))

    body = {"can_replace_layer": classmethod(can_replace_layer)}
    return type(f"Platform{name}", (getattr(layers, name),), body)


class _Table(dict[Any, None]):
    """Stands in for the set that vLLM's table of LoRA layer classes is until 0.19.1.

    In later releases the classes' order matters, and the table is a tuple.
    """

    def add(self, layer_class: Any) -> None:
        self[layer_class] = None

    def discard(self, layer_class: Any) -> None:
        self.pop(layer_class, None)


def _as_set() -> Any:
    """Return vLLM's table of LoRA layer classes, to which classes can be added."""
    from vllm.lora import utils

    if isinstance(utils._all_lora_classes, tuple):
        utils._all_lora_classes = _Table.fromkeys(utils._all_lora_classes)
    return utils._all_lora_classes


class _Ascend(Framework):
    """It changes the table of LoRA layer classes when vLLM builds its punica wrapper."""

    def patch(self) -> None:
        from vllm.lora.punica_wrapper import punica_cpu

        self.add_layers()
        build = punica_cpu.PunicaWrapperCPU.__init__

        def __init__(wrapper: Any, *args: Any, **kwargs: Any) -> None:
            build(wrapper, *args, **kwargs)
            self.refresh()

        punica_cpu.PunicaWrapperCPU.__init__ = __init__

    def add_layers(self) -> None:
        if self.module is None:
            self.layers = _add_layers((*_PARALLEL, "RowParallelLinear"))
            return
        from vllm.model_executor import custom_op
        from vllm_ascend.ops import linear

        names = (*_PARALLEL, "RowParallelLinear")
        layers = {name: getattr(linear, f"Ascend{name}") for name in names}
        custom_op.op_registry_oot.update(layers)

    def refresh(self) -> None:
        if self.module is None:
            self.add_classes()
        else:
            self.module.refresh_all_lora_classes()

    def add_classes(self) -> None:
        """Add the stand-in's LoRA layer classes."""
        raise NotImplementedError


class Ascend018(_Ascend):
    name = "ascend-0.18"
    source = (
        "vllm-ascend 0.18.0, vllm_ascend/lora/utils.py (refresh_all_lora_classes), ops/linear.py"
    )
    # Its class for merged layers takes those of one module too, and expects a pair of tensors.
    unserved = ("mlp.input_linear",)

    def add_classes(self) -> None:
        layers = self.layers
        column, merged, qkv, row = (layers[name] for name in (*_PARALLEL, "RowParallelLinear"))
        table = _as_set()

        def add(name: str, layer_class: Any, modules: int | None = None) -> None:
            def takes(layer: Any, _: Any, packed: list[str]) -> bool:
                return type(layer) is layer_class and modules in (None, len(packed))

            table.add(_subclass(name, takes))

        add("ColumnParallelLinearWithLoRA", column)
        add("MergedColumnParallelLinearWithLoRA", merged)
        add("QKVParallelLinearWithLoRA", qkv, 1)
        add("MergedQKVParallelLinearWithLoRA", qkv, 3)
        add("RowParallelLinearWithLoRA", row)


class Ascend026(_Ascend):
    """Its classes for pairs and triples come before all others if there is one slot."""

    name = "ascend-0.26"
    source = "vllm-ascend 0.26.0rc1, vllm_ascend/lora/utils.py (refresh_all_lora_classes)"

    def add_classes(self) -> None:
        from vllm.lora import utils

        merged, qkv = (self.layers[name] for name in _PARALLEL[1:])

        def takes(layer_class: Any, modules: int) -> Callable[..., bool]:
            return lambda layer, config, packed: (
                config.max_loras == 1 and type(layer) is layer_class and len(packed) == modules
            )

        own = (
            _subclass("MergedColumnParallelLinearWithLoRA", takes(merged, 2)),
            _subclass("MergedQKVParallelLinearWithLoRA", takes(qkv, 3)),
        )
        utils._all_lora_classes = (*own, *utils._all_lora_classes)


class Ascend026OneSlot(Ascend026):
    name = "ascend-0.26, one slot"
    max_loras = 1


class Gaudi(Framework):
    name = "gaudi"
    source = (
        "vllm-gaudi, vllm_gaudi/lora/layers/hpu_row_parallel_linear.py (register_hpu_lora_layers)"
    )

    def patch(self) -> None:
        from vllm.lora import layers
        from vllm.model_executor.layers.linear import RowParallelLinear

        _add_layers(("RowParallelLinear",))
        table = _as_set()
        table.discard(layers.RowParallelLinearWithLoRA)
        table.discard(layers.RowParallelLinearWithShardedLoRA)
        table.add(
            _subclass(
                "RowParallelLinearWithLoRA",
                lambda layer, config, packed: isinstance(layer, RowParallelLinear),
            )
        )


class Tpu(Framework):
    """It shards a LoRA layer by its exact class, so it takes none but vLLM's."""

    name = "tpu"
    source = (
        "tpu-inference 0.32.0, tpu_inference/lora/lora_manager.py, "
        "layers/vllm/process_weights/cleanup_sharding.py (MODULE_TYPE_TO_SHARDING_FUNC)"
    )
    takes_layers = False

    def patch(self) -> None:
        from vllm import platforms
        from vllm.lora import worker_manager

        mock.patch.object(type(platforms.current_platform), "is_tpu", return_value=True).start()
        base = worker_manager.LRUCacheWorkerLoRAManager
        own = self.module and self.module.TPULRUCacheWorkerLoRAManager
        # Its model runner builds this class itself.
        worker_manager.LRUCacheWorkerLoRAManager = own or type("TPUWorkerManager", (base,), {})
