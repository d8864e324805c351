"""``check`` and a worker on the published configurations: ``python -P -m support.published_walk OUT``.

``ci/published.py`` runs this module in a release's environment. vLLM is imported once, and each case
runs in a process forked from this one, so that its seconds and its memory are its own.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support import published, published_adapters
from support.worker import Words, Worker, predict
from vllm_nway_lora.diagnosis import offline
from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.diagnosis.report import Outcome

Row = dict[str, Any]

LIMIT = 900  # seconds per case
MEMORY = 12 << 30  # bytes per case
_REASON = 120  # characters of a reason that a row keeps
_LABEL = re.compile(r"^LoRA adapter '[^']*' \(\S*\) is refused on vLLM \S+: ")


def walk(out: Path, source: str, names: list[str]) -> None:
    """Examine the configurations, and write one row per tensor-parallel size and adapter.

    Args:
        out: the result. Rows that it has of the same ``source`` are kept, so that a run can be continued.
        source: a digest of all that the rows depend on.
        names: of configurations; empty for all.
    """
    kept = json.loads(out.read_text()) if out.exists() else {}
    rows: dict[str, list[Row]] = kept.get("rows", {}) if kept.get("source") == source else {}
    for name in names or published.list_names():
        for size, is_whole in list_cases(name):
            case = f"{name}, TP {size}"
            if case in rows:
                continue
            rows[case] = examine(name, size, is_whole)
            ordered = dict(sorted(rows.items(), key=lambda item: item[0].lower()))
            out.write_text(json.dumps({"source": source, "rows": ordered}, indent=1) + "\n")


def list_cases(name: str) -> Iterator[tuple[int, bool]]:
    """Yield the tensor-parallel sizes of a configuration, and whether it keeps all of its layers."""
    for size in (1, 2, *published.LARGER.get(name, ())):
        yield size, size in published.WHOLE.get(name, ())


def examine(name: str, size: int, is_whole: bool) -> list[Row]:
    """Return a row per adapter of one configuration and tensor-parallel size."""
    whole = published.read(name)
    config = whole if is_whole else published.shorten(whole)
    layers, of = published.count_layers(config), published.count_layers(whole)
    base = {
        "model": name,
        "precision": published.describe_precision(whole),
        "layers": f"{layers}" if layers == of else f"{layers} of {of}",
        "tp": size,
    }
    with tempfile.TemporaryDirectory() as temporary:
        model = published.save(config, Path(temporary, "model"))
        skipped = published.LARGE_ADAPTERS if is_whole and name in published.LARGE else ()
        made = in_fork(write_adapters, config, skipped, Path(temporary, "adapters"))
        if isinstance(made, str):
            return [{**base, "adapter": "none", **_crash(f"no adapter: {made}")}]
        # LoRA's slots have this rank, and those of all layers are much of the memory.
        rank = published_adapters.MOST_RANK if is_whole else 64
        options = ServerOptions(tensor_parallel_size=size, max_lora_rank=rank)
        folders = {adapter: Path(folder) for adapter, folder in made.items()}
        said = in_fork(ask_worker, model, folders, options)
        rows = []
        for adapter, folder in folders.items():
            row = {**base, "adapter": adapter, **measure(model, folder, options, said)}
            rows.append(row)
            words = row.get("fault") or f"{row['stock']} -> {row['plugin']}"
            print(f"{name}, TP {size}, {adapter}: {words}", flush=True)
        return rows


def measure(
    model: Path, folder: Path, options: ServerOptions, said: Mapping[str, Words] | str
) -> Row:
    """Return the part of a row that ``check`` and the worker's words give."""
    checked = in_fork(check, model, folder, options)
    if isinstance(checked, str):
        return _crash(f"check: {checked}")
    row, predicted = checked
    reasons = row["stock reason"] + row["plugin reason"]
    if "allocate memory" in reasons:
        return {**row, "fault": reasons}
    if isinstance(said, str):
        # The worker does not start, and check must say so with the same reason.
        same = (row["plugin"], row["plugin reason"]) == (Outcome.FAILS.value, _cut(said))
        return row if same else {**row, "fault": f"worker: {said}"}
    words = said[folder.name]
    served = row["plugin"] == Outcome.EXACT.value
    if Outcome.UNKNOWN.value in (row["stock"], row["plugin"]):
        row["fault"] = f"{Outcome.UNKNOWN.value}: {row['plugin reason'] or row['stock reason']}"
    elif words != predicted or served == bool(words.refusal):
        row["fault"] = f"check differs from the worker: {predicted} and {words}"
    return row


def write_adapters(
    config: Mapping[str, Any], skipped: Collection[str], folder: Path
) -> dict[str, str]:
    """Write the adapters of a configuration below ``folder``; return adapter -> its folder."""
    chosen = published_adapters.choose_targets(published_adapters.build(config))
    return {
        name: str(published_adapters.write(config, of, folder / name.replace(" ", "-")))
        for name, of in chosen.items()
        if name not in skipped
    }


def check(model: Path, folder: Path, options: ServerOptions) -> tuple[Row, Words]:
    """Return a row of ``check`` in this process, which nothing else has used, and its words."""
    report, words = predict(model, folder, options)
    row = {
        "stock": report.stock.outcome.value,
        "stock reason": _cut(report.stock.reason),
        "plugin": report.plugin.outcome.value,
        "plugin reason": _cut(report.plugin.reason),
        "left out": report.left_out,
        "by table": sorted({row.layer for row in report.rows if row.by_table}),
        "seconds": round(time.process_time(), 1),
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    return row, words


def ask_worker(
    model: Path, folders: Mapping[str, Path], options: ServerOptions
) -> dict[str, Words]:
    """Return the words of one worker on every adapter, by the folder's name."""
    worker = Worker(model, options)
    try:
        return {folder.name: worker.load(folder) for folder in folders.values()}
    finally:
        worker.close()


def in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``function`` returns in a forked process, or the text of its error."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(LIMIT) else f"more than {LIMIT} s"
    except EOFError:
        process.join()
        answer = f"exit status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return answer


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    log = os.environ.get("PUBLISHED_LOG", os.devnull)
    with open(log, "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        try:
            pipe.send(function(*arguments))
        except Exception as error:
            logging.exception("%s", function.__name__)
            text = " ".join(str(error).split())
            pipe.send(f"{type(error).__name__}: {text}"[:300])


def _crash(reason: str) -> Row:
    """Return the part of a row that has no answer."""
    words = dict.fromkeys(("stock", "plugin"), "crash")
    reasons = {"stock reason": "", "plugin reason": _cut(reason), "left out": {}, "by table": []}
    return {**words, **reasons, "seconds": 0.0, "mib": 0, "fault": reason}


def _cut(reason: str) -> str:
    """Return the beginning of a reason, without the adapter's name and temporary paths."""
    text = _LABEL.sub("", re.sub(r"/tmp/\S*/", "", " ".join(reason.split())))
    return text if len(text) <= _REASON else f"{text[:_REASON]}..."


if __name__ == "__main__":
    logging.basicConfig()
    offline.initialize()
    walk(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
