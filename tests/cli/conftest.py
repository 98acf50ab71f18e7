"""What the export commands are tried on: a data folder of phantoms with its table, and small random students."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.phantom import make_phantom

SPLITS = {"train": range(300, 320), "val": range(320, 356), "test": range(356, 360)}
"""Split -> phantom seeds."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of phantoms with a table like that of HC18: the pixel size is that of pictures twice as large."""
    pytest.importorskip("cv2", reason="install tinyusfm-edge[opencv]")
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for split, seeds in SPLITS.items():
        for seed in seeds:
            frame = make_phantom(seed, height=96, width=128).frame
            (folder / f"{seed}.png").write_bytes(encode_png(frame.pixels))
            assert frame.spacing_mm is not None
            rows.append(
                {"file": f"{seed}.png", "split": split, "group": str(seed), "label": "head",
                 "pixel_size_mm": frame.spacing_mm[0] / 2, "orig_w": 256, "orig_h": 192}
            )  # fmt: skip
    with (folder / "split.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


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
    from tinyusfm_export.reference import normalise
    from tinyusfm_runtime.early_exit import normalised_entropy
    from tinyusfm_runtime.phantom import make_phantom
    from tinyusfm_runtime.preprocess import preprocess
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
        codes = preprocess(make_phantom(seed, height=96, width=128).frame, spec.preprocess)[0]
        logits = all_exits(module, normalise(torch.from_numpy(codes).float(), spec))
        found.append(normalised_entropy(logits[0, 0].double().softmax(-1).numpy()))
    inner = np.sort(found)[len(found) // 4 : -len(found) // 4]
    widest = int(np.argmax(np.diff(inner)))
    threshold = float(inner[widest : widest + 2].mean())
    path = tmp_path_factory.mktemp("student") / "stops.safetensors"
    spec = ModelSpec.from_json({**spec.to_json(), "exits": {"blocks": [1], "entropy": [threshold], "patience": 0}})
    assert spec.exits == ExitPolicy(blocks=(1,), entropy=(threshold,))
    save_student(path, module, spec, torch.float32)
    return path
