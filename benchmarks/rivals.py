"""The rivals: the unchanged network as stock tools write it, on the same weights.

* ``stock.onnx``: ``torch.onnx.export`` of the student itself, three normalised channels, none of our rewrites.
* ``nncf.xml``: ``nncf.quantize`` with its defaults on that ONNX, calibrated on the frames handed in. NNCF's
  telemetry stays out (see ``import_openvino``).

It does not measure anything.

Shapes: SNCHW uint8 inputs.
"""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from tinyusfm_edge.models.student import Student
from tinyusfm_runtime.spec import ModelSpec

OPSET = 20
"""What torch 2.13's exporter writes best; LayerNormalization and Gelu are one operator each."""


def write_stock_onnx(module: Student, spec: ModelSpec, out: Path) -> Path:
    """Exports the student as it is.

    Args:
        module: float32, evaluation mode.
        spec: gives the input's size.
        out: folder.

    Returns:
        Path of the ONNX.
    """
    import torch

    path = out / "stock.onnx"
    example = torch.zeros(1, 3, spec.preprocess.height, spec.preprocess.width)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (example,), path, dynamo=True, opset_version=OPSET, external_data=False, verbose=False
        )
    return path


def write_nncf(stock: Path, codes_SNCHW: np.ndarray, spec: ModelSpec, out: Path) -> Path:
    """Quantizes the stock ONNX with NNCF's defaults.

    Args:
        stock: the stock ONNX.
        codes_SNCHW: uint8 calibration inputs, one grey channel.
        spec: gives mean and std.
        out: folder.

    Returns:
        Path of the IR.
    """
    from tinyusfm_runtime.engines.ov import import_openvino

    openvino = import_openvino()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    import nncf

    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std))
    inputs = [((code.astype(np.float32).repeat(3, axis=1) / 255 - mean) / std) for code in codes_SNCHW]
    with redirect_stdout(sys.stderr):  # its progress bars
        model = nncf.quantize(openvino.Core().read_model(stock), nncf.Dataset(inputs), subset_size=len(inputs))
    path = out / "nncf.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def write_ort_dynamic(stock: Path, out: Path) -> Path:
    """Quantizes the stock ONNX with ONNX Runtime's dynamic quantizer and its defaults.

    Args:
        stock: the stock ONNX.
        out: folder.

    Returns:
        Path of the ONNX.
    """
    from onnxruntime.quantization import quantize_dynamic

    path = out / "dynamic.onnx"
    quantize_dynamic(str(_prepared(stock, out)), str(path))
    return path


def write_ort_static(stock: Path, codes_SNCHW: np.ndarray, spec: ModelSpec, out: Path) -> Path:
    """Quantizes the stock ONNX with ONNX Runtime's static quantizer, all defaults.

    Args:
        stock: the stock ONNX.
        codes_SNCHW: uint8 calibration inputs, one grey channel.
        spec: gives mean and std.
        out: folder.

    Returns:
        Path of the ONNX.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, quantize_static

    prepared, path = _prepared(stock, out), out / "static.onnx"
    name = onnx.load(str(prepared)).graph.input[0].name
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std))
    inputs = ({name: ((code.astype(np.float32).repeat(3, axis=1) / 255 - mean) / std)} for code in codes_SNCHW)

    class Reader:
        """Calibration inputs, one after the other."""

        def get_next(self) -> dict[str, np.ndarray] | None:
            """The next input, or None."""
            return next(inputs, None)

    quantize_static(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ)
    return path


def _prepared(stock: Path, out: Path) -> Path:
    """The stock ONNX after ONNX Runtime's own preparation for quantization, made once."""
    from tinyusfm_runtime.engines.ort import import_onnxruntime

    import_onnxruntime()
    from onnxruntime.quantization import quant_pre_process

    path = out / "prepared.onnx"
    if not path.is_file():
        quant_pre_process(str(stock), str(path))
    return path


__all__ = ["OPSET", "write_nncf", "write_ort_dynamic", "write_ort_static", "write_stock_onnx"]
