"""The search for the smallest change of a weight finds the factor it should, and its edits are what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from smallest_change import LARGEST, float_names, hashed_again, least_factor, scaled
from tests.conftest import Parts
from tinyusfm_runtime.bundle.reader import Bundle


def test_the_least_factor_is_found_from_above() -> None:
    found = least_factor(lambda factor: 2.0 * (factor - 1.0), steps=12)
    assert found is not None and 1.5 < found < 1.502
    assert least_factor(lambda factor: 0.1 * (factor - 1.0), steps=12) is None, f"not up to {LARGEST}"


def test_an_edit_changes_one_tensor_and_the_manifest_names_it(
    engine_parts: Callable[[str], Parts], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason="install tinyusfm-edge[export]")
    bundle = Bundle.open(engine_parts("ort").publish(tmp_path / "b.bundle"))
    (path,) = bundle.manifest.artefacts[0].files
    model = bundle.read(path)
    assert float_names(model, 9) == ["kernel"], "single numbers are left out"
    changed = hashed_again(bundle, path, scaled(model, "kernel", 2.0))
    assert changed.manifest.bundle_id != bundle.manifest.bundle_id

    def kernel(content: bytes) -> np.ndarray:
        tensors = onnx.load_from_string(content).graph.initializer
        return np.array(onnx.numpy_helper.to_array(next(tensor for tensor in tensors if tensor.name == "kernel")))

    np.testing.assert_array_equal(kernel(changed.read(path)), 2.0 * kernel(model))
