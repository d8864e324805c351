"""The cases of ``benchmarks/layers.py``: projections, TP sizes, ranks and batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from shapes import SHAPES, Shape


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a projection, LoRA's r, a batch and how the layer runs.

    Attributes:
        shape: the projection.
        tensor_parallel_size: number of TP ranks.
        rank: LoRA's r.
        tokens: tokens in the batch.
        adapters: adapters in the batch.
        compiled: True to compile the layer with ``torch.compile``.
        fully_sharded: True for ``--fully-sharded-loras``.
    """

    shape: Shape
    tensor_parallel_size: int = 1
    rank: int = 16
    tokens: int = 64
    adapters: int = 1
    compiled: bool = False
    fully_sharded: bool = False

    @property
    def has_stock_layer(self) -> bool:
        """Return whether stock vLLM has a LoRA layer for it; its output may be wrong."""
        return not (
            self.fully_sharded and len(self.shape.sizes) > 2 and len(self.shape.modules) == 1
        )


def cases(full: bool) -> Iterator[Case]:
    """Yield all cases if ``full``, else a selection that shows the effect of each quantity."""
    ranks, tokens, adapters = (8, 16, 64), (1, 8, 64, 512), (1, 4)
    if full:
        for shape, size, rank, count, several, compiled in itertools.product(
            SHAPES, (1, 2), ranks, tokens, adapters, (False, True)
        ):
            if several <= count:
                yield Case(shape, size, rank, count, several, compiled)
        yield from (Case(shape, 2, fully_sharded=True) for shape in SHAPES)
        return
    for rank, count, several in itertools.product(ranks, tokens, adapters):
        if several <= count:
            yield Case(SHAPES[0], rank=rank, tokens=count, adapters=several)
    for shape, count, several in itertools.product(SHAPES[1:], (1, 64, 512), adapters):
        if several <= count:
            yield Case(shape, tokens=count, adapters=several)
    for shape, count in itertools.product((SHAPES[0], SHAPES[3]), (1, 64)):
        yield Case(shape, tokens=count, compiled=True)
    for shape, count in itertools.product(SHAPES, (1, 64)):
        yield Case(shape, 2, tokens=count)
    yield from (Case(shape, 2, fully_sharded=True) for shape in SHAPES)
