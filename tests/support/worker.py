"""The words of a worker that loads an adapter, to compare with those of ``check``."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

import vllm_nway_lora
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.check import check_adapter
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.diagnosis.report import Outcome, Report, fold_names


class Words(NamedTuple):
    """What a server says of an adapter.

    Attributes:
        refusal: the whole message; empty if the adapter is served.
        left_out: the modules that it is served without, by reason.
        rules: the translations of its layout.
    """

    refusal: str = ""
    left_out: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rules: str = ""


class Worker(logging.Handler):
    """A worker of one model on one rank, with the plugin. Call :meth:`close` at the end."""

    def __init__(self, model: Path, options: ServerOptions, rank: int = 0) -> None:
        super().__init__(logging.INFO)
        self.lines: list[logging.LogRecord] = []
        self._log = logging.getLogger("vllm.nway_lora")
        self._log.addHandler(self)
        self._level = self._log.level
        self._log.setLevel(logging.INFO)
        vllm_nway_lora.register()
        self._rank = offline.configure(str(model), rank, options)
        offline.build(self._rank)
        self._rank.wrap()
        self._rank.warm_up()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record)

    def close(self) -> None:
        self._log.removeHandler(self)
        self._log.setLevel(self._level)
        vllm_nway_lora.unregister()
        super().close()

    def load(self, folder: Path) -> Words:
        """Load an adapter as a request does, and remove it."""
        from vllm.lora.request import LoRARequest

        self.lines.clear()
        request = LoRARequest(folder.name, 1, str(folder))
        try:
            with self._rank.current():
                self._rank.worker_manager.add_adapter(request)
        except Exception as error:
            return Words(str(error))
        self._rank.worker_manager.remove_adapter(1)
        left_out, rules = [], ""
        for line in self.lines:
            if line.msg == "%s is served without %s: %s.":
                _, modules, reason = line.args
                left_out.append((reason, tuple(fold_names(modules.split(", ")))))
            elif line.msg == "%s is translated: %s.":
                rules = line.args[1]
        return Words("", tuple(left_out), rules)


def predict(model: Path, folder: Path, options: ServerOptions) -> tuple[Report, Words]:
    """Return the report of ``check`` with the same rank limit, and its words."""
    report = check_adapter(str(model), str(folder), options)
    if report.plugin.outcome is Outcome.REFUSED:
        return report, Words(report.plugin.reason)
    left_out = tuple((reason, tuple(modules)) for reason, modules in report.left_out.items())
    return report, Words("", left_out, "; ".join(report.rules))


def compare(model: Path, folders: list[Path], options: ServerOptions) -> dict[str, str]:
    """Return folder -> how ``check`` and the worker differ; empty if they agree word by word."""
    options = dataclasses.replace(options, max_lora_rank=options.max_lora_rank or 64)
    worker = Worker(model, options)
    try:
        said = {folder: worker.load(folder) for folder in folders}
    finally:
        worker.close()
    differences = {}
    for folder, words in said.items():
        report, predicted = predict(model, folder, options)
        served = report.plugin.outcome is Outcome.EXACT
        if words != predicted or served == bool(words.refusal):
            differences[folder.name] = f"worker: {words}\ncheck: {report.plugin} {predicted}"
    return differences
