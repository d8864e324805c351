"""Sleep, reloaded and updated weights, speculative decoding and cached prefixes, each followed by LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.adapters import Answer, prompts, save_adapter
from support.checkpoints import save_fused_llama, save_qwen3_5
from support.scale import Judge, Served, copy_as
from support.scale_offline import Results, run_steps
from support.scale_weights import OPTIONS as WEIGHT_TRANSFER

PROMPT = prompts(1)[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A Llama with an N-way fused projection: vLLM 0.32.0 neither caches Qwen3.5's prefixes by default nor
    speculates with it on CPU (its gated delta net's kernel is Triton's)."""
    root = tmp_path_factory.mktemp("llama")
    checkpoint = save_fused_llama(root / "model")
    modules = ("in_proj_qkv", "in_proj_z", "q_proj", "v_proj", "down_proj")
    good = {
        f"a{number}": save_adapter(checkpoint, root / f"a{number}", modules, number)
        for number in range(3)
    }
    return Served(root, checkpoint, good, [], Judge(checkpoint, good))


def check(results: Results, judge: Judge, expected: dict[int, str | None]) -> None:
    """Check the answers at some steps against the reference of an adapter each."""
    for number, adapter in expected.items():
        answer = results[number]
        assert isinstance(answer, Answer), (number, results)
        assert judge.is_exact(adapter, answer), (number, judge.compare(adapter, answer), answer)


def test_sleep_lost_weights_and_other_weights(served: Served, tmp_path: Path) -> None:
    """vLLM ignores sleep on CPU, so the test loses what a GPU loses at level 2: weights and slots."""
    other = save_qwen3_5(tmp_path / "other", initializer_range=0.06)
    a, b = str(served.good["a0"]), str(served.good["a1"])
    again = [("complete", "a", a, PROMPT), ("complete", "b", b, PROMPT)]
    # Only before the slots are lost: on CPU, vLLM multiplies tokens without LoRA with the last slot too.
    base = ("complete", None, None, PROMPT)
    steps = [
        ("add", "a", a),
        *again,
        base,
        ("sleep", 1),
        ("wake_up",),
        *again,
        base,
        ("sleep", 2),
        ("lose", "parameters"),
        ("lose", "slots"),
        ("wake_up",),
        ("reload", None),
        *again,
        ("add", "bad", str(served.bad[0])),
        ("reload", str(other)),
        *again,
    ]
    results = run_steps(served.checkpoint, steps, tmp_path / "log", {})
    check(results, served.judge, {1: "a0", 2: "a1", 3: None, 6: "a0", 7: "a1", 8: None})
    for lost in results[10:12]:
        assert min(lost) > 0, results
    check(results, served.judge, {14: "a0", 15: "a1"})
    assert "is refused on vLLM" in results[16]
    check(results, Judge(other, served.good), {18: "a0", 19: "a1"})
    assert not served.judge.is_exact("a0", results[18])


def test_weights_that_a_trainer_sends(served: Served, tmp_path: Path) -> None:
    """vLLM then removes all adapters of its workers, and requests load them again."""
    other = save_qwen3_5(tmp_path / "other", initializer_range=0.06)
    a, b = str(served.good["a0"]), str(served.good["a1"])
    again = [("complete", "a", a, PROMPT), ("complete", "b", b, PROMPT)]
    steps = [
        ("add", "a", a),
        *again,
        ("update", str(other)),
        *again,
        ("add", "bad", str(served.bad[0])),
        ("update", str(served.checkpoint)),
        *reversed(again),
    ]
    results = run_steps(served.checkpoint, steps, tmp_path / "log", WEIGHT_TRANSFER)
    assert results[3] is results[7] is None, results
    check(results, served.judge, {1: "a0", 2: "a1", 8: "a1", 9: "a0"})
    check(results, Judge(other, served.good), {4: "a0", 5: "a1"})
    assert not served.judge.is_exact("a0", results[4])
    assert "is refused on vLLM" in results[6]


def test_ngram_speculation_is_exact_with_adapters(llama: Served, tmp_path: Path) -> None:
    a, b = str(llama.good["a0"]), str(llama.good["a1"])
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    steps = [
        ("add", "a", a),
        ("add", "b", b),
        ("complete", "a", a, PROMPT * 3, 24),
        ("complete", "b", b, PROMPT * 3, 24),
        ("complete", None, None, PROMPT * 3, 24),
        ("drafted",),
    ]
    options = {
        "speculative_config": speculation | {"prompt_lookup_min": 1},
        "disable_log_stats": False,
    }
    results = run_steps(llama.checkpoint, steps, tmp_path / "log", options)
    check(results, llama.judge, {2: "a0", 3: "a1", 4: None})
    assert results[5] > 0, "no drafted token was accepted"


def test_cached_prefix_belongs_to_one_adapter(llama: Served, tmp_path: Path) -> None:
    """The same prompt with two adapters, the base model, and other files under one name."""
    live = copy_as(llama.good["a0"], tmp_path / "live")
    b, prompt = str(llama.good["a1"]), prompts(4)[3] * 4
    name = ("live", str(live), prompt)
    steps = [
        ("complete", *name),
        ("complete", *name),
        ("cached",),
        ("complete", "b", b, prompt),
        ("cached",),
        ("complete", None, None, prompt),
        ("cached",),
        ("overwrite", str(llama.good["a2"]), str(live)),
        ("add", "live", str(live), True),
        ("complete", *name),
        ("cached",),
    ]
    options = {"enable_prefix_caching": True, "block_size": 32}
    results = run_steps(llama.checkpoint, steps, tmp_path / "log", options)
    check(results, llama.judge, {0: "a0", 1: "a0", 3: "a1", 5: None, 9: "a2"})
    assert results[2] > 0
    assert [results[n] for n in (4, 6, 10)] == [0, 0, 0]
