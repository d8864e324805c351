"""Registration on tested, untested and too old releases; a release that lacks something."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import vllm
from support.processes import run_python

import vllm_nway_lora
from vllm_nway_lora.compat import defects, groups, registration, releases
from vllm_nway_lora.compat.defects import Defect, Seen
from vllm_nway_lora.compat.releases import TESTED, Support

COLUMN_PARALLEL = "vllm.lora.layers.column_parallel_linear"
WORKER_GROUP = next(g for g in groups.GROUPS if g.anchor == "vllm.lora.worker_manager")


class Lines(logging.Handler):
    """Collects a logger's lines: vLLM's loggers need not propagate to pytest's handler."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Return a function that registers the plugin as on another version of vLLM.

    It returns the plugin's log lines, and raises the plugin's errors.
    """
    import vllm.lora.worker_manager  # noqa: F401

    monkeypatch.setattr(groups, "GROUPS", (WORKER_GROUP,))
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


def is_applied() -> bool:
    """Return whether all of the workers' patches are in place, or none of them."""
    [is_whole] = {patch in registration.applied() for patch in WORKER_GROUP.patches}
    return is_whole


def test_installed_release_has_every_need(register: Callable[..., list[str]]) -> None:
    lines = register(vllm.__version__, "strict")
    assert is_applied()
    assert len(lines) == (releases.support(vllm.__version__) is Support.UNTESTED)


def test_tested_release_logs_nothing(register: Callable[..., list[str]]) -> None:
    assert register(TESTED[0]) == []
    assert is_applied()


@pytest.mark.parametrize("mode", ["1", "strict"])
@pytest.mark.parametrize("version", ["0.99.0", "0.34.0.dev12+g0a1b2c3", "0.32.0rc1", "dev"])
def test_untested_release_with_every_need_is_on_with_one_warning(
    register: Callable[..., list[str]], version: str, mode: str
) -> None:
    [line] = register(version, mode)
    assert line.startswith(f"WARNING vllm-nway-lora has not been tested on vLLM {version}.")
    assert is_applied()


def rename_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vllm.lora.utils._all_lora_classes")


def rename_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"{COLUMN_PARALLEL}._mcp_apply")


def rename_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.lora.utils.from_layer", lambda layer, max_loras, lora_config: layer)


def rename_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("classes", "nway"):
        monkeypatch.delitem(sys.modules, f"vllm_nway_lora.layers.{module}", raising=False)
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
def test_untested_release_that_lacks_a_need_is_left_unchanged(
    register: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    """One warning names the missing need. Under ``strict`` an error has the same text."""
    change(monkeypatch)
    [line] = register("0.99.0")
    prefix = "WARNING vllm-nway-lora stands aside and leaves vLLM unchanged: "
    assert line.startswith(f"{prefix}vLLM 0.99.0 lacks {words}")
    assert not is_applied()
    vllm_nway_lora.unregister()
    with pytest.raises(RuntimeError, match="VLLM_NWAY_LORA=strict") as error:
        register("0.99.0", "strict")
    assert line.removeprefix(prefix) in str(error.value)
    assert not is_applied()


def test_strict_ends_process_that_loads_lora() -> None:
    """In a process of its own, where an import of vLLM applies the patches, the error ends the import."""
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


def test_older_release_is_left_unchanged(register: Callable[..., list[str]]) -> None:
    [line] = register("0.16.0")
    assert "vLLM 0.16.0 is older than 0.17.0, the oldest supported release" in line
    assert not is_applied()


def test_group_without_a_defect_is_not_applied(
    register: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = Defect("fixed", "", (Seen("0.17.0", "0.30.0"),), (), "")
    monkeypatch.setattr(defects, "DEFECTS", (fixed,))
    monkeypatch.setattr(
        groups, "GROUPS", (groups.Group(WORKER_GROUP.anchor, WORKER_GROUP.patches, ("fixed",)),)
    )
    register("0.30.0")
    assert registration.applied() == WORKER_GROUP.patches
    vllm_nway_lora.unregister()
    line = register("0.31.0")[-1]
    assert line.startswith("INFO vllm-nway-lora does not apply lora-layer-class, ")
    assert line.endswith("vLLM 0.31.0 does not need it.")
    assert registration.applied() == ()
