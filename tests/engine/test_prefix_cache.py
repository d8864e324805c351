"""Cached prefixes of other weights under the same name do not match, on vLLM's own block hashes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.executors import Engine, Executor, Request, Worker

from vllm_nway_lora.engine import loading, prefix_cache

pytest.importorskip("vllm")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "_files", {})
    monkeypatch.setattr(prefix_cache, "_labels", {})


@pytest.fixture
def hasher(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own hasher of a request's blocks of 4 tokens, with the plugin's patch."""
    import wrapt
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils

    kv_cache_utils.init_none_hash(sha256)
    original = kv_cache_utils._gen_lora_extra_hash_keys
    patched = wrapt.FunctionWrapper(
        getattr(original, "__wrapped__", original), prefix_cache.add_label
    )
    monkeypatch.setattr(kv_cache_utils, "_gen_lora_extra_hash_keys", patched)
    return kv_cache_utils.get_request_block_hasher(4, sha256)


def hashed(hasher: Any, lora_request: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request as EngineRequest

    request = EngineRequest(
        request_id="r",
        prompt_token_ids=list(range(9)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        lora_request=lora_request,
        block_hasher=hasher,
    )
    assert len(request.block_hashes) == 2
    return request


ONE, TWO = (("adapter_model.safetensors", 1, 1),), (("adapter_model.safetensors", 1, 2),)


def test_other_files_under_a_name_change_its_keys(hasher: Any) -> None:
    a, b, base = Request("/a", name="a"), Request("/b", name="b"), None
    before = {id(r): hashed(hasher, r).block_hashes for r in (a, b, base)}
    assert not prefix_cache.note_weights("a", ONE)
    assert not prefix_cache.note_weights("a", ONE)
    assert hashed(hasher, a).block_hashes == before[id(a)]
    assert prefix_cache.note_weights("a", TWO)
    changed = hashed(hasher, a).block_hashes
    assert not set(changed) & set(before[id(a)])
    assert hashed(hasher, b).block_hashes == before[id(b)]
    assert hashed(hasher, base).block_hashes == before[id(base)]
    assert not prefix_cache.note_weights("a", TWO)
    assert hashed(hasher, a).block_hashes == changed


def test_weights_without_files_change_the_keys_each_time(hasher: Any) -> None:
    a = Request("/a", name="a")
    seen = set()
    for _ in range(3):
        prefix_cache.note_weights("a", None)
        seen.add(tuple(hashed(hasher, a).block_hashes))
    assert len(seen) == 3


def test_request_that_was_hashed_before_the_change_is_hashed_again(hasher: Any) -> None:
    """vLLM hashes a prompt in its input thread, before the request is added."""
    prefix_cache.note_weights("a", ONE)
    request = hashed(hasher, Request("/a", name="a"))
    stale = list(request.block_hashes)
    prefix_cache.note_weights("a", TWO)
    engine = SimpleNamespace(request_block_hasher=hasher)
    prefix_cache.rehash(engine, request)
    fresh = list(request.block_hashes)
    assert not set(fresh) & set(stale)
    prefix_cache.rehash(engine, request)
    assert request.block_hashes == fresh
    prefix_cache.rehash(SimpleNamespace(), request)  # without a prefix cache


def test_waiting_request_is_hashed_again(hasher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/a": ONE}
    monkeypatch.setattr(loading, "list_files", files.get)
    engine = Engine(Worker())
    engine.request_block_hasher = hasher  # type: ignore[attr-defined]
    engine.add_request(Request("/a", name="a"), steps=9)
    engine.step()
    engine.scheduler.max_num_running_reqs = 0
    waiting = hashed(hasher, Request("/a", name="a"))
    engine.scheduler.waiting.append(waiting)
    stale = list(waiting.block_hashes)
    files["/a"] = TWO
    engine.model_executor.add_lora(Request("/a", name="a", inplace=True))
    monkeypatch.setattr(engine, "_stock_step", lambda: None)
    engine.step()
    assert not set(waiting.block_hashes) & set(stale)


@pytest.mark.parametrize("change", ["reload", "replace", "push"])
def test_loads_of_other_weights_are_noted(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    files = {"/a": ONE}
    monkeypatch.setattr(loading, "list_files", files.get)
    worker = Worker()
    executor = Executor(worker)
    executor.add_lora(Request("/a", name="a"))
    executor.remove_lora(1)
    executor.add_lora(Request("/a", name="a", number=2))
    assert not prefix_cache._labels
    files["/a"] = TWO
    if change == "reload":
        executor.remove_lora(2)
        executor.add_lora(Request("/a", name="a", number=3))
    elif change == "replace":
        executor.add_lora(Request("/a", name="a", number=2, inplace=True))
    else:  # straight to the workers, as RL frameworks do
        worker.remove_adapter(2)
        worker.add_lora(Request("/a", name="a", number=4))
        executor.add_lora(Request("/a", name="a", number=4))
    assert list(prefix_cache._labels) == ["a"]
