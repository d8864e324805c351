"""The cached answers: what a key depends on, what an answer keeps, and damaged or full folders."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from support.processes import evaluate

import vllm_nway_lora
from vllm_nway_lora.diagnosis import cache
from vllm_nway_lora.diagnosis.report import Outcome, Report, Row, Verdict
from vllm_nway_lora.rows.plan import FusionPlan, Slice


@dataclasses.dataclass(frozen=True)
class Options:
    tensor_parallel_size: int = 1
    trust_remote_code: bool = False


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vllm-nway-lora" / "answers"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    found = tmp_path / "model"
    found.mkdir()
    (found / "config.json").write_text('{"architectures": ["A"]}')
    (found / "modeling.py").write_text("one = 1")
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    found = tmp_path / "adapter"
    found.mkdir()
    (found / "adapter_config.json").write_text('{"r": 8}')
    save_tensors(found, [8, 16], b"\0" * 512)
    return found


def save_tensors(folder: Path, shape: list[int], data: bytes) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 512]}
    header = json.dumps({"a": entry}).ljust(100).encode()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def build_report() -> Report:
    part = Slice("v", 4, 6, 1, torch.tensor([0, 1, 3]))
    row = Row(
        "model.layers.*.qkv",
        {"v": 4, "q": None},
        8,
        plan=[FusionPlan("qkv", (part,), {"q": "no"})],
        stock=Verdict(Outcome.WRONG, "a reason"),
        count=3,
    )
    return Report(
        [row], Verdict(Outcome.WRONG, "a reason"), Verdict(), ["a rule"], {"why": ["m.*"]}
    )


def test_stored_report_returns_with_every_field() -> None:
    report = build_report()
    assert cache.load("key") is None
    assert cache.store("key", report)
    found = cache.load("key")
    assert found is not None
    for field in dataclasses.fields(Report):
        if field.name != "rows":
            assert getattr(found, field.name) == getattr(report, field.name)
    [row], [expected] = found.rows, report.rows
    for field in dataclasses.fields(Row):
        if field.name != "plan":
            assert getattr(row, field.name) == getattr(expected, field.name)
    [part] = row.plan[0].slices
    assert (part.module, part.rows, part.width, part.offset) == ("v", 4, 6, 1)
    assert list(part.local) == [0, 1, 3]
    assert row.plan[0].refusals == {"q": "no"}


def test_answer_that_machine_could_not_find_is_not_stored(folder: Path) -> None:
    report = build_report()
    report.plugin.worsen(Outcome.UNKNOWN, "no GPU here")
    assert not cache.store("key", report)
    assert not folder.exists()


def test_report_with_unknown_type_is_not_stored(folder: Path) -> None:
    report = build_report()
    report.rules.append(object())  # type: ignore[arg-type]
    assert not cache.store("key", report)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"class": "vllm_nway_lora.diagnosis.report:Report", "fields": {}}'],
)
def test_damaged_answer_is_none(folder: Path, text: str) -> None:
    assert cache.store("key", build_report())
    whole = (folder / "key.json").read_text()
    for damaged in (text, whole[:-5], whole.replace('"WRONG"', '"WORSE"')):
        (folder / "key.json").write_text(damaged)
        assert cache.load("key") is None
    (folder / "key.json").write_text(whole)
    assert cache.load("key") is not None


def test_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert not cache.store("key", build_report())
    assert cache.load("key") is None


def test_newest_answers_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CAPACITY", 3)
    for number in range(5):
        assert cache.store(str(number), build_report())
        os.utime(folder / f"{number}.json", (number, number))
    assert cache.store("last", build_report())
    assert sorted(path.name for path in folder.iterdir()) == ["3.json", "4.json", "last.json"]


def test_key_depends_on_what_answer_depends_on(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(command: str = "check", options: Options | None = None) -> str:
        found = cache.build_key(command, str(model), str(adapter), options or Options())
        assert found
        return found

    seen = [key()]
    assert key() == seen[0]
    seen += [key("plan"), key(options=Options(2)), key(options=Options(trust_remote_code=True))]
    save_tensors(adapter, [8, 16], b"\1" * 512)
    assert key() == seen[0], "the numbers of the tensors are not read"
    save_tensors(adapter, [16, 8], b"\0" * 512)
    seen.append(key())
    (adapter / "adapter_config.json").write_text('{"r": 4}')
    seen.append(key())
    (model / "config.json").write_text('{"architectures": ["B"]}')
    seen.append(key())
    monkeypatch.setenv("VLLM_NWAY_LORA", "lenient")
    seen.append(key())
    package = tmp_path / "site" / "another-2.0.dist-info"
    package.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(package.parent)])
    seen.append(key())
    # This package's own sources.
    copy = tmp_path / "package"
    copy.mkdir()
    (copy / "__init__.py").write_text("one = 1")
    monkeypatch.setattr(vllm_nway_lora, "__file__", str(copy / "__init__.py"))
    seen.append(key())
    (copy / "__init__.py").write_text("one = 2")
    seen.append(key())
    assert len(set(seen)) == len(seen)


def test_key_depends_on_trusted_code(model: Path) -> None:
    trusting = Options(trust_remote_code=True)
    before = cache.build_key("plan", str(model), None, trusting)
    inner = model / "inner"
    inner.mkdir()
    (inner / "part.py").write_text("two = 2")
    after = cache.build_key("plan", str(model), None, trusting)
    assert before
    assert after not in (None, before)
    config = {"auto_map": {"AutoConfig": "owner/name--configuration.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    assert cache.build_key("plan", str(model), None, trusting) is None
    assert cache.build_key("plan", str(model), None, Options())


def test_missing_folder_has_no_key(tmp_path: Path) -> None:
    assert cache.build_key("plan", str(tmp_path / "none"), None, Options()) is None


def test_cached_answer_imports_neither_torch_nor_vllm(model: Path) -> None:
    assert cache.store("key", build_report())
    imported = evaluate(
        """
        import json, sys
        from vllm_nway_lora.diagnosis import cache
        from vllm_nway_lora.diagnosis.options import ServerOptions
        assert cache.build_key("plan", sys.argv[1], None, ServerOptions())
        assert cache.load("key").rows[0].plan[0].slices[0].module == "v"
        print(json.dumps([name for name in ("torch", "vllm", "transformers") if name in sys.modules]))
        """,
        str(model),
    )
    assert imported == []
