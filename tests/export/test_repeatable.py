"""What goes into a bundle does not depend on how many threads PyTorch has: convolutions round otherwise on two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.students import observed, phantom_inputs, small_graph
from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.quantize.bias_correction import measure_means
from tinyusfm_export.quantize.fake_quant import float_net, int8_net
from tinyusfm_export.quantize.ptq import activation_taps, decide
from tinyusfm_export.quantize.spans import calibration_taps
from tinyusfm_export.verify.first_drift import float_tensors


def decided_answer(graph: ExportGraph, tensor_NCHW: np.ndarray) -> Mapping[str, np.ndarray]:
    return int8_net(graph, decide(graph, "int8", observed(graph)))(tensor_NCHW)


OBSERVERS: dict[str, Callable[[ExportGraph, np.ndarray], Mapping[str, np.ndarray]]] = {
    "the ranges": lambda graph, tensor: calibration_taps(graph)(tensor),
    "the inputs of layers": lambda graph, tensor: activation_taps(graph)(tensor),
    "the means of biases": lambda graph, tensor: measure_means(graph, [tensor]),
    "the tensors of a float net": float_tensors,
    "the float net": lambda graph, tensor: float_net(graph)(tensor),
    "the int8 net": decided_answer,
}


@pytest.mark.parametrize("what", OBSERVERS)
def test_two_threads_give_the_bytes_of_one(what: str) -> None:
    graph = small_graph()
    seen: list[int] = []
    for layer in graph.module.modules():
        layer.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    (tensor,) = phantom_inputs(graph.spec, 1)
    before = torch.get_num_threads()
    found: list[dict[str, Any]] = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append({name: np.array(value) for name, value in OBSERVERS[what](graph, tensor).items()})
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen and set(seen) == {1}
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(value, found[1][name]) for name, value in found[0].items())
