"""Checkpoints of other hands fill our students or are refused by name; student files survive the round trip."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tinyusfm_edge.models.checkpoint import METADATA_KEY, describe, load_student_file, load_weights, save_student
from tinyusfm_edge.models.student import Student, StudentConfig, build_student
from tinyusfm_edge.models.upstream import TRACE_KEY, joined
from tinyusfm_runtime.errors import CheckpointError, InputError, OutputError
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

SMALL = StudentConfig(image_size=32, width=48, heads=3)
SPEC = ModelSpec(
    name="small",
    task=Task.SEGMENT,
    labels=("head",),
    preprocess=PreprocessSpec(height=32, width=32),
    postprocess=PostProcess.ELLIPSE_HC,
    threshold=0.6,
    licence="CC-BY-4.0",
)
State = dict[str, Tensor]


def student(config: StudentConfig = SMALL, seed: int = 0) -> Student:
    torch.manual_seed(seed)
    return build_student(config).eval()


def backbone_state(seed: int = 0) -> State:
    """Names and tensors as in the official file, without its ``model.``."""
    return dict(student(seed=seed).backbone.state_dict())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def same_backbone(found: Student, state: State) -> bool:
    own = found.backbone.state_dict()
    return all(torch.equal(own[name], state[name].float()) for name in own)


@pytest.mark.parametrize(
    "prefix", ["module.model.", "module.", "model.", "backbone.", "", "module.backbone.", "model.backbone."]
)
@pytest.mark.parametrize("container", ["state_dict", "model", "teacher", "student", None])
def test_known_prefixes_and_containers(tmp_path: Path, prefix: str, container: str | None) -> None:
    state = prefixed(backbone_state(), prefix)
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "w.pth")
    found = student(seed=1)
    report = load_weights(found, tmp_path / "w.pth")
    assert same_backbone(found, backbone_state())
    assert (report.prefix, report.container) == (prefix, container)
    assert report.missing_heads and all(name.startswith(("neck.", "head.")) for name in report.missing_heads)
    assert report.num_loaded == len(state)
    assert not report.unexpected


def test_official_layout_with_a_head_and_strangers(tmp_path: Path) -> None:
    """The official file: flat, ``model.``, an old head, and names that segmentation has no place for."""
    state = prefixed(backbone_state(), "model.")
    state |= {"model.head.weight": torch.ones(7, 48), "model.head.bias": torch.ones(7), "mask_token": torch.ones(1)}
    torch.save(state, tmp_path / "TinyUSFM.pth")
    report = load_weights(student(seed=1), tmp_path / "TinyUSFM.pth")
    assert set(report.unexpected) == {"model.head.weight", "model.head.bias", "mask_token"}
    assert report.format == "torch-zip"


def test_mae_lite_file(tmp_path: Path) -> None:
    """``model`` beside an optimiser and a Namespace; a decoder that the student has no place for."""
    state = backbone_state() | {"mask_token": torch.ones(1, 1, 48), "decoder_blocks.0.attn.qkv.weight": torch.ones(3)}
    content = {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(batch_size=64), "epoch": 400}
    torch.save(content, tmp_path / "mae_tiny.pth")
    found = student(seed=1)
    report = load_weights(found, tmp_path / "mae_tiny.pth")
    assert same_backbone(found, backbone_state())
    assert set(report.unexpected) == {"mask_token", "decoder_blocks.0.attn.qkv.weight"}


def test_half_precision_is_widened(tmp_path: Path) -> None:
    save_file({k: v.half() for k, v in backbone_state().items()}, tmp_path / "w.safetensors")
    found = student(seed=1)
    load_weights(found, tmp_path / "w.safetensors")
    assert same_backbone(found, {k: v.half() for k, v in backbone_state().items()})
    assert {p.dtype for p in found.parameters()} == {torch.float32}


def test_norm_starts_fc_norm_with_a_warning(tmp_path: Path) -> None:
    state = backbone_state() | {"norm.weight": torch.full((48,), 2.0)}
    save_file(state, tmp_path / "w.safetensors")
    found = student(replace(SMALL, task="classify", num_classes=3), seed=1)
    with pytest.warns(UserWarning, match="fc_norm"):
        report = load_weights(found, tmp_path / "w.safetensors")
    assert torch.equal(found.fc_norm.weight, torch.full((48,), 2.0))
    assert len(report.notes) == 2
    assert set(report.missing_heads) == {"head.weight", "head.bias"}


def test_own_fc_norm_wins_over_norm(tmp_path: Path) -> None:
    state = backbone_state() | {"fc_norm.weight": torch.full((48,), 3.0), "fc_norm.bias": torch.zeros(48)}
    save_file(state, tmp_path / "w.safetensors")
    found = student(replace(SMALL, task="classify", num_classes=3))
    report = load_weights(found, tmp_path / "w.safetensors")
    assert torch.equal(found.fc_norm.weight, torch.full((48,), 3.0))
    assert not report.notes
    assert set(report.unexpected) == {"norm.weight", "norm.bias"}


def test_missing_norm_matters_only_where_it_is_used(tmp_path: Path) -> None:
    state = {k: v for k, v in backbone_state().items() if not k.startswith("norm.")}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match="segmentation does not use it"):
        load_weights(student(), tmp_path / "w.safetensors")
    for task in ("features", "classify"):
        with pytest.raises(CheckpointError, match="incomplete model: 2 of"):
            load_weights(student(replace(SMALL, task=task)), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("blocks.11.mlp.fc2.bias"), "incomplete model: 1 of .*blocks.11.mlp.fc2.bias is missing"),
        (lambda s: s.pop("cls_token"), "cls_token is missing"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.7.")], "incomplete model: 12 of"),
        (
            lambda s: s.update({"blocks.3.attn.qkv.weight": torch.zeros(48, 48)}),
            r"another model: 1 of .*\(48, 48\), want",
        ),
        (lambda s: s.update({"blocks.12.norm1.weight": torch.ones(48)}), "deeper net"),
        (lambda s: s.update({"blocks.0.norm1.weight": torch.ones(48, dtype=torch.int32)}), "floating point"),
        (lambda s: s.update({"blocks.0.norm1.weight": torch.full((48,), float("inf"))}), "NaN or infinity"),
        (lambda s: s.update(prefixed(dict(s), "module.")), "several models"),
        (lambda s: s.clear() or s.update({"conv1.weight": torch.ones(3)}), "all 20[0-9] tensors.*conv1.weight"),
        (lambda s: [s.update({"enc." + k: s.pop(k)}) for k in list(s)], "unknown prefix 'enc.'"),
    ],
)
def test_wrong_backbones_are_refused(tmp_path: Path, spoil: Callable[[State], Any], message: str) -> None:
    state = backbone_state()
    spoil(state)
    torch.save(state, tmp_path / "w.pth")
    found = student(seed=1)
    before = {k: v.clone() for k, v in found.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(found, tmp_path / "w.pth")
    assert all(torch.equal(before[k], v) for k, v in found.state_dict().items()), "the student was changed"


def test_another_width_names_three_and_counts_all(tmp_path: Path) -> None:
    torch.save(student(replace(SMALL, width=96)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"another model: \d\d\d of \d\d\d tensors do not fit") as caught:
        load_weights(student(), tmp_path / "w.pth")
    assert str(caught.value).count("want") == 3


def test_several_containers_need_a_choice(tmp_path: Path) -> None:
    torch.save({"teacher": backbone_state(1), "student": backbone_state(2)}, tmp_path / "dino.pth")
    found = student()
    with pytest.raises(CheckpointError, match="teacher, student: choose"):
        load_weights(found, tmp_path / "dino.pth")
    load_weights(found, tmp_path / "dino.pth", container="student")
    assert same_backbone(found, backbone_state(2))
    with pytest.raises(CheckpointError, match="under 'model'"):
        load_weights(found, tmp_path / "dino.pth", container="model")


def test_position_table_of_another_size(tmp_path: Path) -> None:
    torch.save(student(replace(SMALL, image_size=64)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"64x64 \(4x4 patches\).*takes 32x32.*resize_positions"):
        load_weights(student(), tmp_path / "w.pth")
    found = student()
    with pytest.warns(UserWarning, match="interpolated from 4x4 to 2x2"):
        report = load_weights(found, tmp_path / "w.pth", resize_positions=True)
    assert not report.missing_heads
    source = student(replace(SMALL, image_size=64)).backbone.pos_embed
    assert torch.equal(found.backbone.pos_embed[:, 0], source[:, 0])
    assert found.backbone.pos_embed.shape == (1, 5, 48)


def test_loading_gives_the_same_answer(tmp_path: Path) -> None:
    source, found = student(seed=3), student(seed=4)
    torch.save({"state_dict": prefixed(dict(source.state_dict()), "module.")}, tmp_path / "w.pth")
    assert not load_weights(found, tmp_path / "w.pth").missing_heads
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(source(image), found(image))


# ------------------------------------------------------------------------------------------------ student files


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_student_file_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    source = student()
    sha256 = save_student(tmp_path / "s.safetensors", source, SPEC, dtype)
    before = torch.get_rng_state()
    loaded = load_student_file(tmp_path / "s.safetensors")
    assert torch.equal(before, torch.get_rng_state()), "loading drew random numbers"
    assert loaded.weights_sha256 == sha256 == loaded.spec.weights_sha256
    assert loaded.spec == replace(SPEC, weights_sha256=sha256, architecture=SMALL.to_json())
    assert (loaded.name, loaded.ranges, loaded.module.config) == ("small", None, SMALL)
    assert not loaded.module.training
    own, other = source.state_dict(), loaded.module.state_dict()
    for name, tensor in own.items():
        want = tensor.to(dtype).float() if tensor.is_floating_point() else torch.tensor(0)
        assert torch.equal(other[name], want), name
        assert other[name].dtype == tensor.dtype


def test_student_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    assert save_student(tmp_path / "a", student(), SPEC) == save_student(tmp_path / "b", student(), SPEC)


def test_options_rename_a_student_file_but_do_not_contradict_it(tmp_path: Path) -> None:
    save_student(tmp_path / "s.safetensors", student(), SPEC)
    loaded = load_student_file(
        tmp_path / "s.safetensors", task="segment", name="mine", labels=["background", "cyst"], postprocess="mask"
    )
    assert (loaded.spec.name, loaded.spec.labels, loaded.spec.postprocess) == ("mine", ("cyst",), PostProcess.MASK)
    assert loaded.spec.threshold == SPEC.threshold
    for wrong in ({"task": "classify"}, {"num_classes": 5}, {"config": StudentConfig()}):
        with pytest.raises(InputError, match="says"):
            load_student_file(tmp_path / "s.safetensors", **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 labels for 1 outputs"):
        load_student_file(tmp_path / "s.safetensors", labels=["a", "b", "c"])
    with pytest.raises(InputError, match="unknown: use none, mask"):
        load_student_file(tmp_path / "s.safetensors", postprocess="magic")


def test_foreign_file_needs_a_task(tmp_path: Path) -> None:
    path = tmp_path / "my net (2).safetensors"
    save_file({k: v for k, v in student().state_dict().items()}, path)
    with pytest.raises(InputError, match=r"--task .*--labels.* my net \(2\).json"):
        load_student_file(path)
    loaded = load_student_file(path, task="segment", config=SMALL)
    assert (loaded.name, loaded.spec.labels, loaded.spec.postprocess) == ("my-net-2", ("foreground",), PostProcess.MASK)
    assert loaded.spec.preprocess.height == 32
    assert loaded.spec.architecture["heads"] == 3


def test_foreign_classifier_is_named_by_its_labels(tmp_path: Path) -> None:
    config = replace(SMALL, task="classify", num_classes=3)
    torch.save(student(config).state_dict(), tmp_path / "c.pth")
    with pytest.raises(InputError, match="classifier needs --labels"):
        load_student_file(tmp_path / "c.pth", task="classify")
    loaded = load_student_file(
        tmp_path / "c.pth",
        task="classify",
        labels=["normal", "benign", "malignant"],
        config=replace(SMALL, task="segment"),
    )
    assert loaded.spec.labels == ("normal", "benign", "malignant")
    assert loaded.spec.postprocess is PostProcess.NONE
    with pytest.raises(CheckpointError, match="2 tensors of its head"):
        load_student_file(tmp_path / "c.pth", task="classify", labels=["normal", "other"], config=SMALL)


def test_sidecar_describes_a_foreign_file(tmp_path: Path) -> None:
    save_file(dict(student().state_dict()), tmp_path / "s.safetensors")
    description = {"version": 1, "spec": SPEC.to_json(), "student": SMALL.to_json()}
    (tmp_path / "s.json").write_text(json.dumps(description))
    loaded = load_student_file(tmp_path / "s.safetensors")
    assert loaded.spec.licence == "CC-BY-4.0"
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(InputError, match="s.json.*not JSON"):
        load_student_file(tmp_path / "s.safetensors")


def test_backbone_alone_is_no_student(tmp_path: Path) -> None:
    torch.save(backbone_state(), tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="no whole student: .* head"):
        load_student_file(tmp_path / "b.pth", task="segment", config=SMALL)
    features = load_student_file(tmp_path / "b.pth", task="features", config=SMALL)
    assert features.spec.task is Task.FEATURES
    assert features.spec.labels == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "student format 2; this release reads 1"),
        ({"extra": 1}, "nothing else"),
        ({"student": {**SMALL.to_json(), "width": 10**9}}, "width must be"),
        ({"student": {**SMALL.to_json(), "width": 96}}, "another model"),
        ({"student": {**SMALL.to_json(), "image_size": 64}}, "32x32, the architecture's 64"),
        ({"student": {**SMALL.to_json(), "patch": 8}}, "unknown keys"),
        ({"spec": {**SPEC.to_json(), "task": "classify"}}, "the spec says classify"),
        ({"spec": {**SPEC.to_json(), "labels": ["a", "b"]}}, "2 labels for 1"),
        ({"spec": []}, "spec"),
        ({"student": None}, "table"),
    ],
)
def test_forged_descriptions_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    description = {"version": 1, "spec": SPEC.to_json(), "student": SMALL.to_json(), **change}
    data = save(dict(student().state_dict()), metadata={METADATA_KEY: json.dumps(description)})
    (tmp_path / "s.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_student_file(tmp_path / "s.safetensors")


def test_student_file_with_a_stranger_is_refused(tmp_path: Path) -> None:
    save_student(tmp_path / "s.safetensors", student(), SPEC)
    state = load_file(tmp_path / "s.safetensors") | {"more": torch.ones(1)}
    description = {"version": 1, "spec": SPEC.to_json(), "student": SMALL.to_json()}
    save_file(state, tmp_path / "s.safetensors", metadata={METADATA_KEY: json.dumps(description)})
    with pytest.raises(CheckpointError, match="holds 'more'"):
        load_student_file(tmp_path / "s.safetensors")


def test_saving_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    large = student()
    with torch.no_grad():
        large.backbone.cls_token.fill_(1e6)
    with pytest.raises(CheckpointError, match="cls_token.*infinity"):
        save_student(tmp_path / "s", large, SPEC)
    with pytest.raises(InputError, match="float16 or float32"):
        save_student(tmp_path / "s", student(), SPEC, torch.bfloat16)
    with pytest.raises(InputError, match="32x32"):
        save_student(tmp_path / "s", student(replace(SMALL, image_size=64)), SPEC)
    with pytest.raises(OutputError, match="cannot write"):
        save_student(tmp_path / "no" / "s", student(), SPEC)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_student(tmp_path / "s", student(), SPEC)
    before = (tmp_path / "s").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save_student(tmp_path / "s", student(seed=5), SPEC)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert (tmp_path / "s").read_bytes() == before


def test_a_student_says_what_it_was_made_of_and_what_its_start_was(tmp_path: Path) -> None:
    own, before = {"images": "1" * 64, "teacher": "2" * 64}, {"images": "3" * 64, "start.coreset": "4" * 64}
    stages = joined(own, before, "5" * 64)
    assert stages == {**own, "start": "5" * 64, "start.images": "3" * 64, "start.start.coreset": "4" * 64}
    save_student(tmp_path / "a.safetensors", student(), SPEC, torch.float32, stages)
    assert dict(load_student_file(tmp_path / "a.safetensors").report.stages) == stages
    save_student(tmp_path / "b.safetensors", student(), SPEC, torch.float32)
    assert not load_student_file(tmp_path / "b.safetensors").report.stages
    for name, digest in (("weather", "1" * 64), ("images", "1" * 63), ("start.", "1" * 64)):
        with pytest.raises(InputError, match="is not a stage"):
            joined({name: digest}, {})


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"version": 2, "stages": {}}', '{"version": 1, "stages": {"images": "x"}}']
)
def test_a_damaged_trace_of_a_student_is_refused(tmp_path: Path, text: str) -> None:
    tensors = dict(student().state_dict())
    metadata = {METADATA_KEY: describe(SPEC, SMALL), TRACE_KEY: text}
    (tmp_path / "a.safetensors").write_bytes(save(tensors, metadata=metadata))
    with pytest.raises(CheckpointError, match="trace|stage"):
        load_student_file(tmp_path / "a.safetensors")
