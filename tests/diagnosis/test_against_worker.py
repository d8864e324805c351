"""``check`` beside a worker that loads the same files: their words are the same.

The models are built without stubs, as a user's are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm
from packaging.version import Version
from support import damage
from support.layout_models import MODELS
from support.layout_table import LAYOUTS
from support.layouts import Model, checkpoint
from support.models import import_classes, save_config
from support.worker import compare

from vllm_nway_lora.diagnosis.options import ServerOptions

RELEASE = Version(vllm.__version__)
HERE = [model for model in MODELS if Version(model.since) <= RELEASE]


@pytest.mark.parametrize("size", [1, 2], ids="tp{}".format)
@pytest.mark.parametrize("model", HERE, ids=lambda model: model.name)
def test_check_has_the_words_of_the_worker(tmp_path: Path, model: Model, size: int) -> None:
    save_config(tmp_path, model.config)
    import_classes(model.config)
    folders = []
    for number, layout in enumerate(LAYOUTS):
        if files := layout.write(model):
            folders.append(files.save(tmp_path / f"{number}"))
    good = checkpoint(model).save(tmp_path / "good")
    for change in (damage.cut_rows, damage.drop_lora_a, damage.rename_layer):
        folders.append(damage.copy_adapter(good, tmp_path / change.__name__, change))
    differences = compare(tmp_path, folders, ServerOptions(tensor_parallel_size=size))
    assert not differences, "\n\n".join(f"{name}\n{text}" for name, text in differences.items())
