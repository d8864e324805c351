"""``check`` beside a worker on published configurations, with few layers and PEFT's adapters.

``ci/published.py`` does the same with all configurations.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import vllm
from packaging.version import Version
from support import published, published_adapters
from support.models import import_classes
from support.worker import Worker, predict

from vllm_nway_lora.diagnosis.options import ServerOptions
from vllm_nway_lora.diagnosis.report import Outcome

#: Configuration -> the adapter whose outcome must be exact with the plugin: a mixture in FP8, one in
#: NVFP4, models with a vision tower (Gemma 3's has other paths in transformers 5), and a hybrid.
CASES = {
    "MiniMax-M2": "experts",
    "Qwen3.6-35B-A3B-NVFP4": "all linear",
    "Gemma-3-27B": "all linear",
    "Gemma-4-31B": "usual seven",
    "Granite-4.0-H-Micro-w4a16": "mixer",
}
OPTIONS = ServerOptions(tensor_parallel_size=2, max_lora_rank=64)


@pytest.mark.parametrize(("name", "adapter"), CASES.items(), ids=CASES)
def test_an_adapter_of_peft_on_a_published_model_is_exact(
    tmp_path: Path, name: str, adapter: str
) -> None:
    if name == "Gemma-4-31B" and Version(vllm.__version__) < Version("0.27.0"):
        pytest.skip("this vLLM cannot read Gemma 4's configuration of transformers 5")
    config = published.shorten(published.read(name))
    model = published.save(config, tmp_path / "model")
    import_classes(config)
    try:
        built = published_adapters.build(config)
    except AttributeError as error:
        # The oldest releases need a transformers that has not all of the classes.
        assert Version(vllm.__version__) < Version("0.20.0"), error
        pytest.skip(str(error))
    targets = published_adapters.choose_targets(built)
    folder = published_adapters.write(config, targets[adapter], tmp_path / "adapter")
    worker = Worker(model, OPTIONS)
    try:
        said = worker.load(folder)
    finally:
        worker.close()
    report, predicted = predict(model, folder, OPTIONS)
    assert said == predicted
    assert report.plugin.outcome is Outcome.EXACT, report.plugin


@pytest.mark.parametrize("name", published.list_names())
def test_few_layers_have_every_kind_of_a_configuration(name: str) -> None:
    whole = published.read(name)
    short = published.shorten(whole)
    assert published.count_layers(short) <= min(8, published.count_layers(whole))
    kinds = [set(published.get_text(config).get("layer_types") or "") for config in (whole, short)]
    assert kinds[0] == kinds[1]
    assert published.describe_precision(short) == published.describe_precision(whole)


def test_the_saved_results_have_every_configuration_and_no_fault() -> None:
    results = Path(__file__).parent.parent.parent / "ci" / "results"
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("published-*.json")}
    assert found
    for name, result in found.items():
        rows = [row for of in result["rows"].values() for row in of]
        assert sorted({row["model"] for row in rows}, key=str.lower) == published.list_names(), name
        assert [row["fault"] for row in rows if "fault" in row] == [], name
