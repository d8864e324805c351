"""The layer on vLLM's GPU kernels as one graph: of torch.compile and, on a GPU, of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import gpu, gpu_layers
from support.gpu_cases import QKVZ
from support.gpu_layers import KernelCase, KernelLayer
from vllm.distributed import parallel_state

#: The slots of the batches: other sizes and other adapters after the first. No size is 5, the size of
#: the mapping's tables: torch would make one symbol of both.
BATCHES = ((-1, 0, 0, -1, 0, 0, 1), (0,) * 9, (-1,) * 4, (1, 0, 1))
#: Batches of one size, as a CUDA graph requires, none without LoRA (vLLM has another graph for that).
SAME_SIZE = ((0, 1, -1, 0, 1, 1, -1, 0), (1,) * 8, (-1, -1, -1, -1, -1, -1, -1, 0), (1, 0) * 4)
SHARDED = pytest.mark.parametrize("sharded", [False, True], ids=["tp1", "tp2-sharded"])


class TraceableGroup:
    """Rank 0 of 2 without a list of messages; the other rank's part is its own."""

    world_size, rank_in_group, rank, unique_name = 2, 0, 0, "traceable"

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat([x, x], dim)


@pytest.fixture
def layer(sharded: bool) -> Iterator[KernelLayer]:
    """Yield a layer with two adapters; with ``sharded`` it is rank 0 of 2."""
    case = KernelCase("graph", QKVZ, ((0, 1), (1,)), size=1 + sharded, fully_sharded=sharded)
    built = KernelLayer(case, torch.float16)
    real = parallel_state._TP
    if sharded:
        parallel_state._TP = TraceableGroup()
    yield built
    parallel_state._TP = real


def backends() -> list[str]:
    return ["eager", "aot_eager", *["inductor"] * gpu.is_native()]


@SHARDED
@pytest.mark.parametrize("backend", backends())
def test_compiles_into_one_graph(layer: KernelLayer, backend: str) -> None:
    graphs: list[Any] = []
    compile_graph = torch._dynamo.lookup_backend(backend)

    def count(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return compile_graph(graph, example)

    torch._dynamo.reset()
    eager = layer.layers[0]
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=count)
    for slots in BATCHES:
        layer.map_tokens(slots)
        x = layer.input(len(slots))
        assert torch.equal(compiled(x)[0], eager(x)[0])
    assert len(graphs) == 1
    operators = {str(node.target) for node in graphs[0].graph.nodes if "vllm" in str(node.target)}
    assert operators == {"vllm.lora_shrink", "vllm.lora_expand"}
    assert not any("nway_lora" in str(node.target) for node in graphs[0].graph.nodes)


if gpu.is_native():

    @SHARDED
    def test_cuda_graph_equals_eager(layer: KernelLayer) -> None:
        """One captured graph serves other adapters, other mappings, and slots set after the capture."""
        served = layer.layers[0]
        x = layer.input(len(SAME_SIZE[0]))
        layer.map_tokens(SAME_SIZE[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):  # compiles the kernels and fills their tables of addresses
                served(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            output = served(x)[0]

        def check() -> None:
            for slots in SAME_SIZE:
                layer.map_tokens(slots)
                graph.replay()
                assert torch.equal(output, served(x)[0])

        check()
        first = [
            pair and [t.half() for t in pair] for pair in gpu_layers.tensors(layer.case).adapters[1]
        ]
        before = output.clone()
        gpu_layers.set_adapter(served, 0, first)
        check()
        assert not torch.equal(output, before)
