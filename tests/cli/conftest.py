"""What the export commands are tried on: a data folder of phantoms with its table, and small random students."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Parts
from tests.tables import phantom_table
from tinyusfm_runtime import plugins
from tinyusfm_runtime.numerics.order import wide

SPLITS = {"train": range(300, 320), "val": range(320, 356), "test": range(356, 360)}
"""Split -> phantom seeds."""


ENGINES = [name for name in ("ort", "ov") if plugins.available("engines", name).usable]
"""Engines that work here."""


@pytest.fixture(scope="session")
def bundle(engine_parts: Callable[[str], Parts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that the first working engine runs; do not change it, copy it."""
    if not ENGINES:
        pytest.skip("no engine is installed: pip install 'tinyusfm-edge[onnxruntime]'")
    return engine_parts(ENGINES[0]).publish(tmp_path_factory.mktemp("cli") / "tiny.bundle")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of phantoms with a table like that of HC18: the pixel size is that of images twice as large."""
    pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    # so many rows that no pixel is larger than a millimetre, which would be a doubt
    return phantom_table(tmp_path_factory.mktemp("data"), SPLITS, height=120, width=160, masks=False)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student file whose mask covers part of every phantom."""
    torch = pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
    from tinyusfm_edge.models.checkpoint import save_student
    from tinyusfm_edge.models.student import StudentConfig, build_student
    from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

    torch.manual_seed(7)
    config = StudentConfig(image_size=64, width=24, heads=3)
    spec = ModelSpec(
        name="small", task=Task.SEGMENT, labels=("head",), preprocess=PreprocessSpec(height=64, width=64),
        postprocess=PostProcess.ELLIPSE_HC, architecture=config.to_json(),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("student") / "small.safetensors"
    save_student(path, build_student(config).eval(), spec)
    return path


@pytest.fixture(scope="session")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier that stops at block 1 for about half of the phantoms."""
    torch = pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
    from tinyusfm_edge.models.checkpoint import save_student
    from tinyusfm_edge.models.early_exit import all_exits
    from tinyusfm_edge.models.student import ClassificationStudent, StudentConfig, build_student
    from tinyusfm_export.verify.reference import normalise
    from tinyusfm_runtime.early_exit import normalised_entropy
    from tinyusfm_runtime.numerics.preprocess import preprocess
    from tinyusfm_runtime.phantom import make_phantom
    from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, PreprocessSpec, Task

    torch.manual_seed(7)
    config = StudentConfig(
        task="classify", num_classes=2, image_size=32, width=24, heads=3, depth=3, exits=(1,), drop_path=0.0
    )
    module = build_student(config).eval()
    assert isinstance(module, ClassificationStudent)
    for head in (module.exits["1"].head, module.head):  # type: ignore[union-attr]
        head.weight.data.normal_(0.0, 1.0)
    spec = ModelSpec(
        name="stops", task=Task.CLASSIFY, labels=("a", "b"), preprocess=PreprocessSpec(height=32, width=32),
        architecture=config.to_json(),
    )  # fmt: skip
    found = []
    for seed in SPLITS["val"]:
        codes = preprocess(make_phantom(seed, height=120, width=160).frame, spec.preprocess)[0]
        logits = all_exits(module, normalise(torch.from_numpy(codes).float(), spec.preprocess))
        found.append(normalised_entropy(logits[0, 0].double().softmax(-1).numpy()))
    inner = np.sort(wide(found))[len(found) // 4 : -len(found) // 4]
    widest = int(np.argmax(np.diff(inner)))
    threshold = float(inner[widest : widest + 2].mean())
    path = tmp_path_factory.mktemp("student") / "stops.safetensors"
    spec = ModelSpec.from_json({**spec.to_json(), "exits": {"blocks": [1], "entropy": [threshold], "patience": 0}})
    assert spec.exits == ExitPolicy(blocks=(1,), entropy=(threshold,))
    save_student(path, module, spec, torch.float32)
    return path
