"""What the plugin does on releases that it knows, and on those that it does not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import vllm
from packaging.version import Version
from support.processes import run_python

import vllm_nway_lora
from vllm_nway_lora import patches, releases
from vllm_nway_lora.releases import DEFECTS, KNOWN, TESTED, Defect, Seen, Support

COLUMN_PARALLEL = "vllm.lora.layers.column_parallel_linear"
WORKER_GROUP = next(g for g in patches.GROUPS if g.anchor == "vllm.lora.worker_manager")


class Lines(logging.Handler):
    """Keeps what a logger says; vLLM's loggers need not propagate to where pytest listens."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Register in a process with vLLM's LoRA modules, as on another version of vLLM.

    Returns what the plugin says, and raises what it raises.
    """
    import vllm.lora.worker_manager  # noqa: F401

    monkeypatch.setattr(patches, "GROUPS", (WORKER_GROUP,))
    logger, handler = logging.getLogger("vllm.nway_lora"), Lines()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    vllm_nway_lora.unregister()

    def register(version: str, mode: str = "1") -> list[str]:
        monkeypatch.setattr("vllm.__version__", version)
        monkeypatch.setenv("VLLM_NWAY_LORA", mode)
        vllm_nway_lora.register()
        vllm_nway_lora.register()
        return handler.lines

    yield register
    logger.setLevel(level)
    logger.removeHandler(handler)
    vllm_nway_lora.unregister()


def applied() -> bool:
    """Tell whether the workers' patches are in place: all, or none of them."""
    [whole] = {patch in patches.applied() for patch in WORKER_GROUP.patches}
    return whole


def test_this_release_has_all_that_is_needed(register: Callable[..., list[str]]) -> None:
    lines = register(vllm.__version__, "strict")
    assert applied()
    assert len(lines) == (releases.support(vllm.__version__) is Support.UNTESTED)


def test_of_a_tested_release_nothing_is_said(register: Callable[..., list[str]]) -> None:
    assert register(TESTED[0]) == []
    assert applied()


@pytest.mark.parametrize("mode", ["1", "strict"])
@pytest.mark.parametrize("version", ["0.99.0", "0.34.0.dev12+g0a1b2c3", "0.32.0rc1", "dev"])
def test_an_unknown_release_that_has_all_is_on_with_one_warning(
    register: Callable[..., list[str]], version: str, mode: str
) -> None:
    [line] = register(version, mode)
    assert line.startswith(f"WARNING vllm-nway-lora has not been tested on vLLM {version};")
    assert applied()


def rename_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vllm.lora.utils._all_lora_classes")


def rename_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"{COLUMN_PARALLEL}._mcp_apply")


def rename_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.lora.utils.from_layer", lambda layer, max_loras, lora_config: layer)


def rename_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm_nway_lora.layer", raising=False)
    monkeypatch.delattr("vllm.distributed.utils.divide")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_the_table, "vllm.lora.utils._all_lora_classes (lora-layer-class)"),
        (rename_a_function, f"{COLUMN_PARALLEL}._mcp_apply"),
        (
            rename_a_parameter,
            "the parameter model_config, packed_modules_list of vllm.lora.utils.from_layer",
        ),
        (rename_an_import, "what this package imports: cannot import name 'divide'"),
    ],
)
def test_an_unknown_release_that_lacks_something(
    register: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    """One warning that names it, and stock vLLM; under ``strict`` the same words, and no start."""
    change(monkeypatch)
    [line] = register("0.99.0")
    prefix = "WARNING vllm-nway-lora stands aside and leaves vLLM as it is: "
    assert line.startswith(f"{prefix}vLLM 0.99.0 lacks {words}")
    assert not applied()
    vllm_nway_lora.unregister()
    with pytest.raises(RuntimeError, match="VLLM_NWAY_LORA=strict") as error:
        register("0.99.0", "strict")
    assert line.removeprefix(prefix) in str(error.value)
    assert not applied()


def test_strict_ends_a_process_that_loads_lora() -> None:
    """As above in a process of its own, where vLLM's import calls us: the error is not swallowed."""
    done = run_python(
        """
        import vllm, vllm.lora.utils, vllm_nway_lora
        vllm.__version__ = "0.99.0"
        vllm.lora.utils.renamed = vllm.lora.utils.__dict__.pop("_all_lora_classes")
        vllm_nway_lora.register()
        import vllm.lora.worker_manager
        """,
        VLLM_NWAY_LORA="strict",
    )
    assert done.returncode != 0
    assert "vLLM 0.99.0 lacks vllm.lora.utils._all_lora_classes" in done.stderr.splitlines()[-1]


def test_an_older_release_is_left_as_it_is(register: Callable[..., list[str]]) -> None:
    [line] = register("0.16.0")
    assert "vLLM 0.16.0 is older than 0.17.0, the first that it serves" in line
    assert not applied()


def test_a_group_retires_when_nothing_is_left_to_mend(
    register: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = Defect("mended", "", (Seen("0.17.0", "0.30.0"),), (), "")
    monkeypatch.setattr(releases, "DEFECTS", (mended,))
    monkeypatch.setattr(
        patches, "GROUPS", (patches.Group(WORKER_GROUP.anchor, WORKER_GROUP.patches, ("mended",)),)
    )
    register("0.30.0")
    assert patches.applied() == WORKER_GROUP.patches
    vllm_nway_lora.unregister()
    line = register("0.31.0")[-1]
    assert line.startswith("INFO vllm-nway-lora does without lora-layer-class, ")
    assert line.endswith("vLLM 0.31.0 needs it no more.")
    assert patches.applied() == ()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.16.9", Support.TOO_OLD),
        ("0.17.1", Support.TESTED),
        ("0.32.0+cpu", Support.TESTED),
        ("0.32.0.dev3", Support.UNTESTED),
        ("0.32.0.post1", Support.UNTESTED),
        ("0.33.1", Support.UNTESTED),
        ("1.0", Support.UNTESTED),
        ("dev", Support.UNTESTED),
        ("", Support.UNTESTED),
    ],
)
def test_support(version: str, expected: Support) -> None:
    assert releases.support(version) is expected


def test_messages_of_a_defect() -> None:
    gap = Defect(
        "gap", "", (Seen("0.17.0", "0.18.1", ("a",)), Seen("0.29.0", None, ("b",))), (), ""
    )
    for version, messages in [
        ("0.16.0", None),
        ("0.17.0", ("a",)),
        ("0.18.1+cpu", ("a",)),
        ("0.19.0", None),
        ("0.28.0", None),
        ("0.29.0", ("b",)),
        ("9", ("b",)),
        ("dev", ("b",)),
    ]:
        assert gap.messages(version) == messages, version


def test_the_table_is_in_order() -> None:
    assert list(KNOWN) == sorted(KNOWN, key=Version)
    assert set(TESTED) <= set(KNOWN)
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    for defect in DEFECTS:
        bounds = [bound for seen in defect.seen for bound in (seen.first, seen.last)]
        assert set(bounds) <= {*KNOWN, None}
        assert None not in bounds[:-1]
        assert bounds[:-1] == sorted(bounds[:-1], key=Version)


def test_every_defect_that_groups_mend_is_in_the_table() -> None:
    for group in patches.GROUPS:
        assert group.defects
        assert group.needed(KNOWN[0])
        for name in group.defects:
            assert releases.defect(name).name == name
