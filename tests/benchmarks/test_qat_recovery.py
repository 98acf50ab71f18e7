"""The benchmark of QAT: every setting runs to its end, costs are those of frames, and the share comes from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qat_recovery import POLICIES, interval, main
from tests.export.students import make_student
from tests.tables import phantom_table
from tinyusfm_edge.models.checkpoint import save_student

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms with a table, and a small random student beside them."""
    splits = {"train": range(20), "val": range(20, 26), "test": range(26, 30)}
    folder = phantom_table(tmp_path_factory.mktemp("frames"), splits, masks=False)
    module, spec = make_student()
    save_student(folder / "student.safetensors", module, spec, torch.float32)
    return folder


@pytest.mark.parametrize("setting", sorted(POLICIES))
def test_a_setting_runs_to_its_end(folder: Path, tmp_path: Path, setting: str) -> None:
    out = tmp_path / "found.json"
    words = ["--data", str(folder), "--student", str(folder / "student.safetensors"), "--setting", setting]
    assert main([*words, "--steps", "3", "--batch", "2", "--frames", "6", "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["frames"]) == 6 and found["wider"] == (8.0 if setting == "outliers" else None)
    for which in ("ptq", "qat"):
        assert found["mean"][which]["cost"] == pytest.approx(np.mean([f[which]["cost"] for f in found["frames"]]))
    assert found["mean"]["ptq"]["logit_abs"] > 0
    assert found["recovered"] == pytest.approx(1 - found["mean"]["qat"]["cost"] / found["mean"]["ptq"]["cost"])


def test_bad_words_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(folder / "nowhere"), "--setting", "w4", "--out", str(tmp_path / "x.json")]
    assert main(words) != 0
    assert capsys.readouterr().err.count("\n") == 1
    assert set(POLICIES) == {"w4", "outliers", "full"}


def test_the_interval_is_over_patients() -> None:
    """One patient's many frames count as one; what is equal in all has no width."""
    ptq = np.full(40, 0.02)
    assert interval(ptq, ptq / 4, [str(i) for i in range(40)]) == pytest.approx((0.75, 0.75))
    qat = np.r_[np.full(20, 0.02), np.zeros(20)]
    alone = interval(ptq, qat, [str(i) for i in range(40)])
    grouped = interval(ptq, qat, [str(i // 10) for i in range(40)])
    assert grouped[1] - grouped[0] > alone[1] - alone[0] > 0.1
