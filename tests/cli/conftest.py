"""What the export commands are tried on: a data folder of phantoms with its table, and a small random student."""

from __future__ import annotations

import csv
from pathlib import Path

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
