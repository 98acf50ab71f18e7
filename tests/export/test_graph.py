"""The export graph against the student: equal outputs on frames, whatever the task, size and head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.export.students import make_student, normalised, phantom_inputs, small_graph
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_export.graph.build import build_graph
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("segment", {}),
    ("segment", {"seg_head": "lite"}),
    ("segment", {"num_classes": 4, "image_size": 64}),
    ("classify", {"num_classes": 5}),
    ("classify", {"num_classes": 2, "depth": 2, "heads": 12}),
    ("features", {}),
]


@pytest.mark.parametrize("task, changes", VARIANTS, ids=[f"{t}-{'-'.join(map(str, c.values()))}" for t, c in VARIANTS])
def test_graph_equals_the_student(task: str, changes: dict[str, Any]) -> None:
    student, spec = make_student(task, **changes)
    graph = build_graph(student, spec)
    for tensor in phantom_inputs(spec):
        with torch.no_grad():
            wanted = student(normalised(tensor, spec))
            (found,) = graph.module(torch.from_numpy(tensor))
        assert found.shape == wanted.shape
        assert wanted.std() > 0.01, "the student answers the same everywhere: nothing is compared"
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_changed_weight_would_show() -> None:
    student, spec = make_student()
    graph = build_graph(student, spec)
    (tensor,) = phantom_inputs(spec, 1)
    student.backbone.blocks[4].norm1.bias.data += 0.05  # type: ignore[index, union-attr]
    with torch.no_grad():
        difference = (graph.module(torch.from_numpy(tensor))[0] - student(normalised(tensor, spec))).abs().max()
    assert difference > 1e-3


def test_published_student_at_its_own_size() -> None:
    config = StudentConfig()
    torch.manual_seed(0)
    student = build_student(config).eval()
    spec = ModelSpec(name="full", task=Task.SEGMENT, labels=("head",), architecture=config.to_json())
    graph = build_graph(student, spec)
    (tensor,) = phantom_inputs(spec, 1)
    with torch.no_grad():
        wanted = student(normalised(tensor, spec))
        (found,) = graph.module(torch.from_numpy(tensor))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    linears = [layer for layer in graph.linear_inputs.values() if layer.startswith("blocks.")]
    assert len(linears) == 48
    assert {"patch_embed", "head.lateral.0", "head.smooth.3", "head.classifier.1"} < set(graph.linear_inputs.values())


def test_codes_may_be_uint8_or_float() -> None:
    graph = small_graph()
    (tensor,) = phantom_inputs(graph.spec, 1)
    as_codes, as_floats = torch.from_numpy(tensor), torch.from_numpy(tensor).float()
    assert torch.equal(graph.module(as_codes)[0], graph.module(as_floats)[0])


@pytest.mark.parametrize("task", ["segment", "classify", "features"])
def test_auxiliary_outputs_are_mean_patch_tokens(task: str) -> None:
    student, spec = make_student(task)
    names = ("tokens_block2", "tokens_block11")
    graph = build_graph(student, spec, auxiliary=names)
    assert graph.outputs == ("logits", *names)
    (tensor,) = phantom_inputs(spec, 1)
    with torch.no_grad():
        wanted = student.backbone.taps(normalised(tensor, spec), (2, 11))  # type: ignore[operator, union-attr]
        found = graph.module(torch.from_numpy(tensor))
    for got, tokens in zip(found[1:], wanted, strict=True):
        mean = tokens[:, 1:].mean(1)
        assert (got - mean).abs().max() <= 1e-5 * mean.abs().max()


@pytest.mark.parametrize("task", ["segment", "classify", "features"])
def test_peaks_are_the_largest_absolute_value_behind_a_gelu(task: str) -> None:
    student, spec = make_student(task)
    names = ("peak_block11", "tokens_block2", "peak_block0")
    graph = build_graph(student, spec, auxiliary=names)
    assert graph.outputs == ("logits", *names)
    (tensor,) = phantom_inputs(spec, 1)
    seen: dict[int, torch.Tensor] = {}
    for index in (0, 11):
        fc2 = student.backbone.blocks[index].mlp.fc2  # type: ignore[union-attr, index]
        fc2.register_forward_pre_hook(lambda _, inputs, index=index: seen.__setitem__(index, inputs[0]))
    with torch.no_grad():
        student(normalised(tensor, spec))
        found = graph.module(torch.from_numpy(tensor))
    # the last block of the export graph has lost the class token
    wanted = {0: seen[0].abs().max(), 11: seen[11][:, 1:].abs().max()}
    for got, index in ((found[1], 11), (found[3], 0)):
        assert got.shape == (1,) and (got - wanted[index]).abs() <= 1e-5 * wanted[index]


def test_auxiliary_outputs_are_off_by_default() -> None:
    assert small_graph().outputs == ("logits",)


@pytest.mark.parametrize(
    "name", ["tokens_block12", "peak_block12", "peak_block", "tokens_block", "tokens_block-1", "logits", "attention"]
)
def test_unknown_auxiliary_output_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="tokens_block0 to tokens_block11"):
        build_graph(*make_student(), auxiliary=(name,))


def test_exported_program_is_the_same_graph() -> None:
    student, spec = make_student()
    graph = build_graph(student, spec, auxiliary=("tokens_block4",))
    (tensor,) = phantom_inputs(spec, 1)
    wanted = graph.module(torch.from_numpy(tensor))
    found = graph.exported.module()(torch.from_numpy(tensor).float())
    assert len(found) == 2
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


def test_a_model_that_is_not_grey_is_refused() -> None:
    student, spec = make_student()
    colour = ModelSpec.from_json({**spec.to_json(), "preprocess": {"height": 80, "width": 80, "grey": False}})
    with pytest.raises(InputError, match="not grey"):
        build_graph(student, colour)


@pytest.mark.parametrize("architecture", [{}, {"heads": 5}, {"heads": 0}, {"heads": "3"}])
def test_heads_come_from_the_spec(architecture: dict[str, Any]) -> None:
    student, spec = make_student()
    with pytest.raises(InputError, match="heads"):
        build_graph(student, ModelSpec.from_json({**spec.to_json(), "architecture": architecture}))


def test_a_size_that_does_not_fit_is_refused() -> None:
    student, spec = make_student()
    data = spec.to_json()
    data["preprocess"] |= {"height": 96}
    with pytest.raises(InputError, match="25 patches"):
        build_graph(student, ModelSpec.from_json(data))


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_a_student_of_another_task_is_refused(task: str) -> None:
    student, _ = make_student("features")
    _, spec = make_student(task)
    with pytest.raises(InputError, match=f"not a student for task '{task}'"):
        build_graph(student, spec)


def test_the_student_is_only_read() -> None:
    student, spec = make_student()
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    graph = build_graph(student, spec)
    graph.module(torch.from_numpy(np.zeros(spec.input.shape, np.uint8)))
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_tensor_names_do_not_depend_on_the_weights() -> None:
    first, second = small_graph(), build_graph(*make_student())
    assert first.linear_inputs == second.linear_inputs
    assert first.linear_inputs["blocks.3.mlp.fc1.input"] == "blocks.3.mlp.fc1"


def test_preprocess_normalisation_is_used() -> None:
    student, spec = make_student()
    other = ModelSpec.from_json({**spec.to_json(), "preprocess": {"height": 80, "width": 80, "mean": (0.1, 0.1, 0.1)}})
    assert isinstance(other.preprocess, PreprocessSpec)
    tensor = torch.from_numpy(phantom_inputs(spec, 1)[0])
    assert not torch.allclose(
        build_graph(student, spec).module(tensor)[0], build_graph(student, other).module(tensor)[0]
    )
