"""Registration on tested, untested and too old releases; a release that lacks something."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import vllm
from packaging.version import Version
from support.processes import evaluate, run_python

import vllm_nway_lora
from vllm_nway_lora.compat import defects, groups, needs, registration, releases
from vllm_nway_lora.compat.defects import Defect, Seen
from vllm_nway_lora.compat.patching import Need
from vllm_nway_lora.compat.releases import TESTED, Support
from vllm_nway_lora.compat.sources import Sources

COLUMN_PARALLEL = "vllm.lora.layers.column_parallel_linear"
WORKER_GROUP = next(g for g in groups.GROUPS if g.anchor == "vllm.lora.worker_manager")


#: Prints what a vLLM lacks in whose sources one word is replaced by another. Writes no byte code.
RENAMED = """
import json, re, sys
from importlib.machinery import SourceFileLoader
sys.dont_write_bytecode = True
*words, version = sys.argv[1:]
old, new = (word.encode() for word in words)
read = SourceFileLoader.get_data
def get_data(loader, path):
    is_vllms = "/vllm/" in path and path.endswith(".py")
    return re.sub(rb"\\b" + old + rb"\\b", new, read(loader, path)) if is_vllms else read(loader, path)
SourceFileLoader.get_data = get_data
import vllm_nway_lora
from vllm_nway_lora.compat import registration
vllm_nway_lora.register()
missing = registration.find_missing(version)
assert "vllm" not in sys.modules and "torch" not in sys.modules
print(json.dumps(missing))
"""


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


def has_recent_attributes() -> bool:
    """Return whether the installed release has all that a release after the newest one must have."""
    return not any(Sources().find_fault(need) for need in needs.RECENT)


#: An untested version whose needs the installed release has.
UNTESTED = (
    "0.99.0" if has_recent_attributes() else f"{Version(vllm.__version__).base_version}.post1"
)


@pytest.mark.parametrize("mode", ["1", "strict"])
@pytest.mark.parametrize(
    "version",
    [UNTESTED, "0.32.0rc1"]
    + ["0.34.0.dev12+g0a1b2c3", "dev", "0.1.dev1+g1234567"] * has_recent_attributes(),
)
def test_untested_release_with_every_need_is_on_with_one_warning(
    register: Callable[..., list[str]], version: str, mode: str
) -> None:
    [line] = register(version, mode)
    assert line.startswith(f"WARNING vllm-nway-lora has not been tested on vLLM {version}.")
    assert is_applied()


def rename_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vllm.lora.model_manager.process_packed_modules_mapping")


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
        (
            rename_a_target,
            "vllm.lora.model_manager.process_packed_modules_mapping (packed-modules-mapping)",
        ),
        (rename_a_function, f"{COLUMN_PARALLEL}._mcp_apply"),
        (
            rename_a_parameter,
            "the parameter model_config, packed_modules_list of vllm.lora.utils.from_layer "
            "(lora-layer-class)",
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
    [line] = register(UNTESTED)
    prefix = "WARNING vllm-nway-lora stands aside and leaves vLLM unchanged: "
    assert line.startswith(f"{prefix}vLLM {UNTESTED} lacks {words}")
    assert not is_applied()
    vllm_nway_lora.unregister()
    with pytest.raises(
        RuntimeError, match="VLLM_NWAY_LORA=strict: vllm-nway-lora cannot be on"
    ) as error:
        register(UNTESTED, "strict")
    assert line.removeprefix(prefix) in str(error.value)
    assert not is_applied()


def test_strict_ends_process_that_loads_lora() -> None:
    """In a process of its own, where an import of vLLM applies the patches, the error ends the import."""
    done = run_python(
        """
        import sys
        import vllm, vllm.lora.layers.column_parallel_linear as module, vllm_nway_lora
        vllm.__version__ = sys.argv[1]
        module.renamed = module.__dict__.pop("_mcp_apply")
        vllm_nway_lora.register()
        import vllm.lora.worker_manager
        """,
        UNTESTED,
        VLLM_NWAY_LORA="strict",
    )
    assert done.returncode != 0
    assert f"vLLM {UNTESTED} lacks {COLUMN_PARALLEL}._mcp_apply" in done.stderr.splitlines()[-1]


def test_untested_release_that_lacks_an_attribute_of_another_process_is_left_unchanged(
    register: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker looks for what the engine core uses: all processes of an engine decide the same."""
    missing = [Need("vllm.v1.engine.core", "EngineCore.lost"), Need("vllm.gone", "lost")]
    monkeypatch.setattr(needs, "NEEDS", (*missing, *needs.NEEDS))
    version = f"{UNTESTED}.dev1"  # not looked at before
    [line] = register(version)
    lost = "vllm.v1.engine.core.EngineCore.lost, vllm.gone.lost"
    assert line.endswith(f"vLLM {version} lacks {lost}.")
    assert not is_applied()


def test_decision_depends_on_the_sources_alone() -> None:
    """A process that imports nothing of vLLM finds the same, also what classes set on instances."""
    missing = evaluate(RENAMED, "token_lora_indices", "tokens_lora_indices", vllm.__version__)
    assert missing == ["vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU.token_lora_indices"]
    missing = evaluate(RENAMED, "output_queue", "outputs_queue", vllm.__version__)
    assert missing == ["vllm.v1.engine.core.EngineCoreProc.output_queue"]


def test_unreadable_sources_count_as_missing() -> None:
    [missing] = evaluate(RENAMED, "def", "lambda", vllm.__version__)
    assert missing.startswith("sources that can be read (SyntaxError: ")


def test_tested_release_reads_no_sources(
    register: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "find_missing", None)
    assert register(TESTED[-1]) == []
    assert is_applied()


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
