# SPDX-License-Identifier: Apache-2.0
"""The scheduler's queues of requests with LoRA. Engine core."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

#: Attributes with waiting requests (v1/core/sched/scheduler.py). The second one has requests that a
#: step has skipped (0.18.0, 0.26.0), the third one those that hold KV blocks (0.32.0, 0.33.0).
_QUEUES = ("waiting", "skipped_waiting", "kv_holding_waiting")


def with_lora(requests: Iterable[Any]) -> Iterator[Any]:
    """Yield the requests that use an adapter."""
    return (request for request in requests if request.lora_request is not None)


def waiting(scheduler: Any) -> Iterator[Any]:
    """Yield the waiting requests that use an adapter, from every queue of this release."""
    return with_lora(chain.from_iterable(_find_queues(scheduler)))


def unfinished(scheduler: Any) -> Iterator[Any]:
    """Yield the running and the waiting requests that use an adapter."""
    return chain(with_lora(scheduler.running), waiting(scheduler))


def next_requests(scheduler: Any) -> list[Any]:
    """Return the requests with an adapter that the next step is likely to run.

    The scheduler runs at most ``max_loras`` adapters at a time. A request that waits for something
    else too (a grammar, a KV transfer) comes last: it takes no place from one that can run.
    """
    running = list(with_lora(scheduler.running))
    if len(scheduler.running) >= scheduler.max_num_running_reqs:
        return running
    adapters = {request.lora_request.lora_int_id for request in running}
    able, blocked = [], []
    for request in waiting(scheduler):
        lora_id = request.lora_request.lora_int_id
        if request.status.name.startswith("WAITING_FOR_"):
            blocked.append(request)
        elif lora_id in adapters or len(adapters) < scheduler.lora_config.max_loras:
            adapters.add(lora_id)
            able.append(request)
    return running + able + blocked


@contextlib.contextmanager
def _hide(scheduler: Any, is_hidden: Callable[[Any], bool]) -> Iterator[None]:
    """Hide the waiting requests for which ``is_hidden`` is true from the scheduler within this context.

    Afterwards they are back in their old order. Requests that were added in between (preempted ones) stay
    at the front.
    """
    hidden = []
    for queue in _find_queues(scheduler):
        requests = [request for request in with_lora(queue) if is_hidden(request)]
        if requests:
            hidden.append((queue, list(queue), requests))
            queue.remove_requests(requests)
    try:
        yield
    finally:
        for queue, before, requests in hidden:
            _put_back(queue, before, requests)


@contextlib.contextmanager
def watch_schedule(scheduler: Any, is_hidden: Callable[[Any], bool]) -> Iterator[set[int]]:
    """Hide the waiting requests for which ``is_hidden`` is true from ``schedule`` within this context.

    All else in a step sees them: aborts, failed KV loads, and the number of unfinished requests.

    Yields:
        The ids of the running requests' adapters, once ``schedule`` has been called.
    """
    used: set[int] = set()
    own = vars(scheduler).get("schedule")
    schedule = scheduler.schedule

    def schedule_visible(*args: Any, **kwargs: Any) -> Any:
        # A full batch takes no waiting request, and hiding costs time for each that waits.
        is_full = len(scheduler.running) >= scheduler.max_num_running_reqs
        with contextlib.nullcontext() if is_full else _hide(scheduler, is_hidden):
            output = schedule(*args, **kwargs)
        used.update(request.lora_request.lora_int_id for request in with_lora(scheduler.running))
        return output

    scheduler.schedule = schedule_visible
    try:
        yield used
    finally:
        if own is None:
            del scheduler.schedule
        else:
            scheduler.schedule = own


def _put_back(queue: Any, before: list[Any], hidden: list[Any]) -> None:
    now, old = list(queue), set(before)
    known = {*now, *hidden}
    in_order = [request for request in now if request not in old]
    in_order += [request for request in before if request in known]
    queue.remove_requests(now)
    for request in reversed(in_order):
        queue.prepend_request(request)


def _find_queues(scheduler: Any) -> list[Any]:
    return [getattr(scheduler, name) for name in _QUEUES if hasattr(scheduler, name)]
