# SPDX-License-Identifier: Apache-2.0
"""Which releases of vLLM this package knows, and what is wrong in which of them.

The only place where version numbers are written: patches, tests, CI and the README read them here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

#: The releases that this package is made for, oldest first: their sources have been read, and
#: ``ci/matrix.toml`` can run the suites on each. The first is the first with Qwen3.5, and so the
#: first with a projection that needs this package.
KNOWN = (
    *("0.17.0", "0.17.1", "0.18.0", "0.18.1", "0.19.0", "0.19.1"),
    *("0.20.0", "0.20.1", "0.20.2", "0.21.0", "0.22.0", "0.22.1", "0.23.0", "0.24.0"),
    *("0.25.0", "0.25.1", "0.26.0", "0.27.0", "0.27.1", "0.28.0"),
    *("0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"),
)

#: Those on which the suites have passed, as ``ci/results`` says: all, since there is no newer one.
TESTED = KNOWN

FIRST = Version(KNOWN[0])

#: The first release that serves Qwen3.5's text model by itself, and so the tests' tiny one
#: (model_executor/models/registry.py); before, engines are tested with a model of the tests' own.
QWEN3_5_TEXT = Version("0.27.0")


class Support(enum.Enum):
    """How a running vLLM relates to the releases that this package knows."""

    TESTED = "tested"
    UNTESTED = "untested"
    TOO_OLD = "too old"


def support(version: str) -> Support:
    """Classify a version string as vLLM reports it (``vllm.__version__``).

    A local part, as in ``0.32.0+cpu``, says how a release was built and is not looked at. A
    version that cannot be parsed, such as a source checkout's, is untested rather than an error.
    """
    try:
        release = Version(version)
    except InvalidVersion:
        return Support.UNTESTED
    if Version(release.base_version) < FIRST:
        return Support.TOO_OLD
    return Support.TESTED if release.public in TESTED else Support.UNTESTED


@dataclass(frozen=True)
class Seen:
    """How a defect shows in a run of releases.

    Attributes:
        first: the first of these releases.
        last: the last of them; None where the newest release that is known is still one.
        messages: parts of what vLLM says, any one of which is seen; none where it says nothing.
    """

    first: str
    last: str | None
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Defect:
    """Something that stock vLLM gets wrong, or does at a loss.

    This package mends those that a group of patches names.

    Attributes:
        name: what messages, tests and the README call it.
        user_sees: one sentence, from the user's side.
        seen: where and how it shows, oldest releases first.
        upstream: the threads about it (``vllm-project/vllm``), where there are any.
        retired_by: what upstream change would make our answer needless.
    """

    name: str
    user_sees: str
    seen: tuple[Seen, ...]
    upstream: tuple[str, ...]
    retired_by: str

    def messages(self, version: str) -> tuple[str, ...] | None:
        """Return what ``version`` of vLLM says when the defect shows; None if it does not have it.

        A version that cannot be parsed is taken for the newest.
        """
        try:
            release = Version(Version(version).public)
        except InvalidVersion:
            release = None
        for seen in self.seen:
            if seen.last is None and (release is None or Version(seen.first) <= release):
                return seen.messages
            if release and seen.last and Version(seen.first) <= release <= Version(seen.last):
                return seen.messages
        return None


DEFECTS = (
    Defect(
        "fewer-modules-than-outputs",
        "Qwen3.5 with `--enable-lora` does not start; eager, no adapter on its `in_proj_qkv` or "
        "`in_proj_z` loads.",
        # From 0.19.0 on Qwen3.5 avoids it (see "unfused"); the layer class has it to 0.20.2. With
        # one rank a slice of the wrong width is copied before the list runs out.
        (Seen("0.17.0", "0.20.2", ("list index out of range", "The size of tensor a (")),),
        ("#36372", "#36478", "#37912"),
        '#37912 did (0.21.0), at the price of "copied-lora-a".',
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
        "#57851, if it is merged.",
    ),
    Defect(
        "last-module-left-out",
        "An adapter on `in_proj_qkv` without `in_proj_z` does not load.",
        (
            Seen("0.17.0", "0.20.2", ("list index out of range", "The size of tensor a (")),
            Seen("0.21.0", "0.28.0", ("'NoneType' object has no attribute 'shape'",)),
        ),
        ("#47639", "#47640"),
        "#47640 did (0.29.0).",
    ),
    Defect(
        "unwrapped-when-fully-sharded",
        "With `--fully-sharded-loras`, adapters on a projection of three outputs or more, seen as "
        "one module or as three or more, are ignored (to 0.19.1 the engine does not start).",
        (
            Seen("0.17.0", "0.19.1", ("must be a BaseLayerWithLoRA instance, got",)),
            Seen("0.20.0", None, ("could not be wrapped by any LoRA layer implementation",)),
        ),
        ("#37019",),
        "A fully sharded class for such layers; #37019 is a start.",
    ),
    Defect(
        "one-module-cut-in-halves",
        "With tensor parallelism, an adapter on a merged projection of one output, or of two "
        "unequal ones, that is one module (Qwen3-Next's `in_proj_qkvz` and `in_proj_ba`) gives "
        "wrong output. Nothing is said.",
        (Seen("0.17.0", None),),
        (),
        "A `slice_lora_b` that follows `output_sizes`. Not reported upstream as far as we know.",
    ),
    Defect(
        "mamba2-one-group",
        "With tensor parallelism, an adapter on the `in_proj` of a Mamba2 mixer with one group "
        "(Granite 4 hybrid, Falcon-H1, Bamba) gives wrong output. Nothing is said.",
        (Seen("0.17.0", None),),
        (),
        "LoRA that follows the loader of that projection. Not reported upstream as far as we know.",
    ),
    Defect(
        "llama4-rotary-rows",
        "An adapter on Llama 4's `q_proj` or `k_proj` gives wrong output: vLLM moves the rows of both "
        "while it loads the weights, and not those of LoRA-B. Nothing is said.",
        (Seen("0.17.0", None),),
        (),
        "LoRA-B in the order of the weights. Not reported upstream as far as we know.",
    ),
    Defect(
        "misnamed-modules",
        "Bamba's `gate_up_proj` is said to pack `up_proj` and `down_proj`: an adapter on `gate_proj` "
        "does not load, one on the others gives wrong output. Nothing is said.",
        (Seen("0.17.0", "0.23.0", ("expected target modules in",)),),
        (),
        "Bamba's removal (0.24.0).",
    ),
    Defect(
        "served-in-part",
        "An adapter of which some tensors match no layer, or do not fit, is served without them.",
        (Seen("0.17.0", None),),
        ("#49354", "#55193"),
        "A check of every tensor before an adapter is taken.",
    ),
    Defect(
        "patterns-ignored",
        "An adapter with `rank_pattern` or `alpha_pattern` is served at the wrong scale.",
        (Seen("0.17.0", "0.31.0"),),
        (),
        "0.32.0 did.",
    ),
    Defect(
        "bias-for-matrix",
        "An adapter with a bias of its own (`lora_B.bias`) is served with the bias in place of LoRA-B.",
        (Seen("0.31.0", "0.31.0"),),
        (),
        "0.32.0 did.",
    ),
    Defect(
        "stale-replies",
        "With tensor parallelism, the load after a refused one fails with the refused one's error.",
        (Seen("0.17.0", None),),
        (),
        "A `collective_rpc` that hears all ranks before it raises.",
    ),
    Defect(
        "request-ends-engine",
        "A request with an adapter that cannot be loaded ends the engine.",
        (Seen("0.17.0", None),),
        (),
        "A failed load that fails its request alone.",
    ),
    Defect(
        "reloaded-every-step",
        "After `load_inplace` an adapter is read from disk again at every step of every request.",
        (Seen("0.17.0", "0.32.0"),),
        (),
        "0.33.0 did.",
    ),
    Defect(
        "gathered-when-whole",
        "With tensor parallelism, LoRA-A's products are gathered over all ranks although no rank "
        "lacks any; on CPU the request fails.",
        (Seen("0.20.0", "0.24.0", ("einsum(): subscript i has size",)),),
        (),
        "0.25.0 did.",
    ),
    Defect(
        "whole-layer-gathered",
        "With `--fully-sharded-loras` and tensor parallelism, LoRA-A's products are gathered for a "
        "projection that every rank holds whole (MLA); on CPU the request fails.",
        (Seen("0.17.0", "0.24.0", ("einsum(): subscript i has size",)),),
        (),
        "0.25.0 did.",
    ),
    Defect(
        "two-names-two-layers",
        "An adapter on the MLA projections (DeepSeek, Kimi-K2, A.X K1, openPangu) is served as the "
        "base model. Nothing is said. (To 0.19.1 the engine does not start where the projection's "
        "class is a subclass.)",
        (Seen("0.17.0", "0.21.0"),),
        (),
        "`wrapped_by_id` did (0.22.0).",
    ),
    Defect(
        "unfused",
        "Qwen3.5 runs two GEMMs per layer instead of one as soon as LoRA is on.",
        (Seen("0.19.0", "0.20.2"),),
        ("#36976",),
        "#37912 did (0.21.0). Left as it is: the pair of GEMMs costs 1 to 6 % more than the one.",
    ),
    Defect(
        "copied-lora-a",
        "Qwen3.5's LoRA-A is held, and multiplied, once per output (4) instead of once per module "
        "(2).",
        (Seen("0.21.0", None),),
        ("#37912",),
        "One LoRA-A per module in `MergedColumnParallelLinearWithLoRA`.",
    ),
)


def defect(name: str) -> Defect:
    """Return the defect of that name.

    Raises:
        KeyError: there is none.
    """
    return {known.name: known for known in DEFECTS}[name]
