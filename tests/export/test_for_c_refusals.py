"""``bundle for-c`` of an engine that C programs cannot take along: refused, with what they can."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_parts
from tinyusfm_edge.cli.main import main


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"litert": {"model.tflite": b"x"}}, "export one of them"),
        ({"litert": {"model.tflite": b"x"}, "ort": {"model.onnx": b"x"}}, "this bundle has onnx-fp32"),
    ],
    ids=["alone", "beside onnx"],
)
def test_litert_is_refused_with_the_engines_of_the_c_runtime(
    files: dict[str, dict[str, bytes]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_parts(files).publish(tmp_path / "tiny.bundle")
    command = ["bundle", "for-c", str(tmp_path / "device"), str(bundle), "--prefix", str(tmp_path)]
    assert main([*command, "--target", "litert"]) == 3
    said = capsys.readouterr().err
    assert "takes along integer, onnx, openvino" in said and words in said and "android.md" in said
    assert not (tmp_path / "device").exists()
