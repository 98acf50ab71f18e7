"""Weights files in and out.

Fill a student from a checkpoint, write and read student files.

A *student file* is a safetensors file whose metadata says what the tensors are: ``{"tinyusfm_edge": JSON}`` with
``{"version": 1, "spec": ModelSpec, "student": StudentConfig}``. The same JSON may lie beside a foreign file as
``NAME.json``. ``load_weights`` starts a training from somebody's backbone; ``load_student_file`` gives a whole
student to export, so there nothing may be missing.

It does not know the shipped students (tinyusfm_edge/students) or how files are parsed (weights_file.py).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyusfm_edge.models.state_dict import AVERAGES, Fit, find_tensors, fit
from tinyusfm_edge.models.student import Student, StudentConfig, build_student
from tinyusfm_edge.models.upstream import TRACE_KEY, read_stages, write_stages
from tinyusfm_edge.models.weights_file import WeightsFile, check_finite, read_limited, read_weights_file
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import CheckpointError, InputError
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task
from tinyusfm_runtime.strict_json import parse_json

METADATA_KEY = "tinyusfm_edge"
"""Key of the JSON in a student file's metadata."""
FORMAT_VERSION = 1
"""Version of that JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What loading a weights file did.

    Attributes:
        sha256: hash of the file's bytes, hex.
        format: ``safetensors`` or ``torch-zip``.
        container: key of the checkpoint that held the weights, or None.
        prefix: what stood before the backbone's names.
        num_loaded: tensors taken from the file.
        missing_heads: head tensors that stayed as they were.
        unexpected: names in the file that the student has no place for.
        notes: what was done beyond plain copying; each is also a ``UserWarning``.
        name: the student's name where the file says it, else the file's.
        origin: where the weights come from, as the file says it, or empty.
        stages: what it was made of, as the file says it: stage -> sha256 (hex), see upstream.py.
    """

    sha256: str
    format: str
    container: str | None
    prefix: str
    num_loaded: int
    missing_heads: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...]
    name: str = ""
    origin: str = ""
    stages: Mapping[str, str] = field(default_factory=dict)

    @property
    def random_head(self) -> str:
        """A line where tensors of the head stayed as they were; else empty.

        In a new student these are random.
        """
        if not self.missing_heads:
            return ""
        return (
            f"{self.name}: the head is not in the file, or is of another shape, and stays random "
            f"({len(self.missing_heads)} tensors, first {self.missing_heads[0]}): train it before anything is read off "
            "it"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStudent:
    """A whole student, ready for export.

    Attributes:
        module: float32, evaluation mode.
        spec: what goes in and out; ``weights_sha256`` is set.
        ranges: activation ranges of its calibration set (``tinyusfm_calibration`` Ranges), or None.
        weights_sha256: hash of the weights file, hex.
        name: the spec's name.
        report: what loading did.
    """

    module: Student
    spec: ModelSpec
    ranges: Any
    weights_sha256: str
    name: str
    report: LoadReport


def load_weights(
    student: Student, path: Path | str, *, container: str | None = None, resize_positions: bool = False
) -> LoadReport:
    """Fills a student from a checkpoint; heads that the file lacks stay as they are.

    Args:
        student: filled in place, in its own element type.
        path: official TinyUSFM file, MAE-Lite file, plain state dict or safetensors.
        container: which model of a checkpoint that holds several (``teacher`` or ``student``).
        resize_positions: interpolate a position table of another image size.

    Returns:
        What was loaded, left out and not expected.

    Raises:
        CheckpointError: the file is unusable or hostile, or its backbone is not the student's.
    """
    file = read_weights_file(Path(path))
    _check_heads(student, file)
    fitted, report = _fit_file(student, file, container, resize_positions)
    student.load_state_dict(fitted.state, strict=False)
    return report


def _check_heads(student: Student, file: WeightsFile) -> None:
    """Refuses a student file of another number of heads.

    The shapes are equal, the attention is not.
    """
    try:
        heads = json.loads(file.metadata[METADATA_KEY])["student"]["heads"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return
    if heads != student.config.heads:
        raise CheckpointError(
            f"{file.path} has {heads} attention heads, the student {student.config.heads}: set student.heads={heads}, "
            "or take another start"
        )


def load_start(
    student: Student,
    path: Path | str,
    *,
    container: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> LoadReport:
    """Fills a student from a checkpoint as the start of a training.

    Returns what was done beyond plain copying.

    Args:
        student: filled in place.
        path: as ``load_weights`` reads them; a position table of another size is interpolated.
        container: which model of a checkpoint that holds several.
        say: called with each note, and in one line that the head stays random where the file has none.

    Raises:
        CheckpointError: the file is unusable or hostile, or its backbone is not the student's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = load_weights(student, path, container=container, resize_positions=True)
    for line in (*report.notes, report.random_head):
        if line:
            say(line)
    return report


def _fit_file(
    student: Student, file: WeightsFile, container: str | None, resize_positions: bool
) -> tuple[Fit, LoadReport]:
    try:
        key, tensors = find_tensors(file.content, container)
        fitted = fit(student, tensors, resize_positions=resize_positions)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    check_finite(fitted.state, file.path)
    average = next((name for name in (key or "", *fitted.prefix.split(".")) if name in AVERAGES), "")
    taken = (f"the weights are the moving average under {average!r}",) if average and container is None else ()
    notes = (*taken, *fitted.notes)
    for note in notes:
        warnings.warn(f"{file.path}: {note}", stacklevel=3)
    about = _about(file)
    report = LoadReport(
        name=about[0],
        origin=about[1],
        stages=_stages(file),
        sha256=file.sha256,
        format=file.format,
        container=key,
        prefix=fitted.prefix,
        num_loaded=len(fitted.state),
        missing_heads=fitted.missing_heads,
        unexpected=fitted.unexpected,
        notes=notes,
    )
    return fitted, report


def _stages(file: WeightsFile) -> dict[str, str]:
    try:
        return read_stages(file.metadata)
    except InputError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


def _about(file: WeightsFile) -> tuple[str, str]:
    """Name and origin that a student file states of itself.

    Else the file's name and nothing.
    """
    try:
        spec = json.loads(file.metadata[METADATA_KEY])["spec"]
        return str(spec["name"]), str(spec.get("origin", ""))
    except (KeyError, TypeError, ValueError, RecursionError):
        return file.path.name, ""


def load_student_file(
    path: Path | str,
    *,
    task: str | None = None,
    num_classes: int | None = None,
    labels: Sequence[str] | None = None,
    name: str | None = None,
    postprocess: str | None = None,
    config: StudentConfig | None = None,
    container: str | None = None,
    resize_positions: bool = False,
) -> LoadedStudent:
    """Loads a whole student.

    A student file says itself what it is; the options then only rename (``name``, ``labels``, ``postprocess``) and must
    not contradict it. A foreign file needs ``task`` and its labels or number of classes, or a ``NAME.json`` beside it.

    Args:
        path: weights file.
        task: ``segment``, ``classify`` or ``features``.
        num_classes: classes, background counted in segmentation.
        labels: names of the outputs; a binary mask has one (or two, background first).
        name: short name of the model.
        postprocess: what is made of the logits: ``none``, ``mask`` or ``ellipse_hc``.
        config: architecture of a foreign file where it is not the published one (heads, image size, lite head).
        container: which model of a checkpoint that holds several.
        resize_positions: interpolate a position table of another image size.

    Returns:
        The student, in float32 and evaluation mode, without ranges.

    Raises:
        InputError: the file does not say what it is and the options do not either, or they contradict it.
        CheckpointError: the file is unusable or hostile, or not a whole student.
    """
    file = read_weights_file(Path(path))
    described = _description(file)
    if described is None:
        config = _foreign_config(file.path, task, num_classes, labels, config)
        spec = _foreign_spec(file.path, config, labels, name, postprocess)
    else:
        spec, stored = described
        for option, given, own in (
            ("task", task, stored.task),
            ("num_classes", num_classes, stored.num_classes),
            ("config", config, stored),
        ):
            if given is not None and given != own:
                raise InputError(f"{file.path} says {option} {own!r}: leave {option} out, or give {own!r}")
        config = stored
        spec = _renamed(spec, config, labels, name, postprocess)
    spec = replace(spec, weights_sha256=file.sha256, architecture=config.to_json())
    module, report = _build(file, config, container, resize_positions)
    if described is not None and report.unexpected:
        raise CheckpointError(f"{file.path} holds {report.unexpected[0]!r}, which its description has no place for")
    return LoadedStudent(
        module=module, spec=spec, ranges=None, weights_sha256=file.sha256, name=spec.name, report=report
    )


def _build(
    file: WeightsFile, config: StudentConfig, container: str | None, resize_positions: bool
) -> tuple[Student, LoadReport]:
    with torch.device("meta"):
        student = build_student(config)  # names and shapes only: nothing is allocated before the file fits
    fitted, report = _fit_file(student, file, container, resize_positions)
    if report.missing_heads:
        raise CheckpointError(
            f"{file.path} is no whole student: {len(report.missing_heads)} tensors of its head are missing or of "
            f"another shape, first {report.missing_heads[0]}; check task, labels and head, or train a head first"
        )
    state = {k: v.float() for k, v in fitted.state.items()}
    counters = (k for k in student.state_dict() if k.endswith("num_batches_tracked"))
    student.load_state_dict({**state, **{k: torch.tensor(0) for k in counters}}, assign=True)
    return student.eval(), report


def _description(file: WeightsFile) -> tuple[ModelSpec, StudentConfig] | None:
    text = file.metadata.get(METADATA_KEY)
    sidecar = file.path.with_suffix(".json")
    if text is not None:
        return parse_description(text, file.path)
    if sidecar.is_file():
        data = read_limited(sidecar, 1 << 20)
        return parse_description(data.decode("utf-8", errors="replace"), sidecar)
    return None


def describes_itself(path: Path) -> bool:
    """Whether a weights file, or the description beside it, says what it is.

    Args:
        path: of the weights file.

    Raises:
        CheckpointError: the file cannot be used.
    """
    return _description(read_weights_file(path)) is not None


def parse_description(text: str, path: Path) -> tuple[ModelSpec, StudentConfig]:
    """Reads a student's description.

    Args:
        text: the JSON of a student file's metadata or sidecar.
        path: where it stood, for messages.

    Raises:
        InputError: not JSON, of another version, or its parts contradict each other.
    """
    try:
        data = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the student's description is not JSON: {error}") from error
    if not isinstance(data, dict) or set(data) != {"version", "spec", "student"}:
        raise InputError(f"{path}: a student's description has version, spec and student, nothing else")
    if data["version"] != FORMAT_VERSION:
        raise InputError(f"{path} is of student format {data['version']!r}; this release reads {FORMAT_VERSION}")
    try:
        spec, config = ModelSpec.from_json(data["spec"]), StudentConfig.from_json(data["student"])
        _check_agreement(spec, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return spec, config


def _check_agreement(spec: ModelSpec, config: StudentConfig) -> None:
    size = (spec.preprocess.height, spec.preprocess.width)
    if spec.task.value != config.task:
        raise InputError(f"the spec says {spec.task.value}, the architecture {config.task}")
    if size != config.input_hw:
        rows, cols = config.input_hw
        raise InputError(f"the spec's input is {size[0]}x{size[1]}, the architecture's {rows}x{cols}")
    if config.task != "features" and len(spec.labels) != config.outputs:
        raise InputError(f"{len(spec.labels)} labels for {config.outputs} outputs")
    if spec.exits is not None and spec.exits.blocks != config.exits:
        raise InputError(f"the spec's early exits {spec.exits.blocks} are not the architecture's {config.exits}")


def _foreign_config(
    path: Path, task: str | None, num_classes: int | None, labels: Sequence[str] | None, config: StudentConfig | None
) -> StudentConfig:
    given = task or (config.task if config else None)
    if given is None:
        raise InputError(
            f"{path} does not say what it is: give --task segment, classify or features with --labels, or put its "
            f"description beside it as {path.with_suffix('.json').name}"
        )
    if num_classes is None and labels is not None:
        num_classes = max(2, len(labels)) if given == "segment" else len(labels)
    if num_classes is None and config is not None:
        num_classes = config.num_classes
    if num_classes is None and given == "classify":
        raise InputError(f"{path}: a classifier needs --labels or --num-classes")
    base = config or StudentConfig()
    return replace(base, task=given, num_classes=num_classes or base.num_classes)  # type: ignore[arg-type]


def _foreign_spec(
    path: Path, config: StudentConfig, labels: Sequence[str] | None, name: str | None, postprocess: str | None
) -> ModelSpec:
    default = {"segment": PostProcess.MASK}.get(config.task, PostProcess.NONE)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-_") or "student"
    if config.task == "features":
        names: tuple[str, ...] = ()
    elif config.task == "segment" and config.outputs == 1:
        names = ("foreground",)
    else:
        names = tuple(f"class_{index}" for index in range(config.outputs))
    spec = ModelSpec(
        name=stem,
        task=Task(config.task),
        labels=names,
        preprocess=PreprocessSpec(height=config.input_hw[0], width=config.input_hw[1]),
        postprocess=default,
    )
    return _renamed(spec, config, labels, name, postprocess)


def _renamed(
    spec: ModelSpec, config: StudentConfig, labels: Sequence[str] | None, name: str | None, postprocess: str | None
) -> ModelSpec:
    if name is not None:
        spec = replace(spec, name=name)
    if labels is not None:
        given = tuple(labels)
        if config.task == "segment" and config.outputs == 1 and len(given) == 2:
            given = given[1:]
        spec = replace(spec, labels=given)
    if postprocess is not None:
        known = [p.value for p in PostProcess]
        if postprocess not in known:
            raise InputError(f"post-processing {postprocess!r} is unknown: use {', '.join(known)}")
        spec = replace(spec, postprocess=PostProcess(postprocess))
    _check_agreement(spec, config)
    return spec


def describe(spec: ModelSpec, config: StudentConfig) -> str:
    """The description of a student, as its file's metadata holds it (JSON text)."""
    _check_agreement(spec, config)
    spec = replace(spec, weights_sha256="", architecture=config.to_json())  # a file cannot hold its own hash
    return json.dumps({"version": FORMAT_VERSION, "spec": spec.to_json(), "student": config.to_json()}, sort_keys=True)


def save_student(
    path: Path | str,
    student: Student,
    spec: ModelSpec,
    dtype: torch.dtype = torch.float16,
    stages: Mapping[str, str] | None = None,
) -> str:
    """Writes a student file, whole or not at all.

    Args:
        path: file to write; an existing one is replaced.
        student: the student.
        spec: what goes in and out.
        dtype: ``torch.float16`` or ``torch.float32``.
        stages: what it was made of (upstream.py), or None.

    Returns:
        sha256 of the file, hex.

    Raises:
        CheckpointError: a weight is not finite in that type.
        InputError: spec and student contradict each other, or another type was asked for.
        OutputError: the file cannot be written; nothing is left behind.
    """
    import hashlib

    from safetensors.torch import save

    if dtype not in (torch.float16, torch.float32):
        raise InputError(f"a student file holds float16 or float32, not {dtype}")
    path = Path(path)
    tensors: dict[str, Tensor] = {
        k: v.detach().to("cpu", dtype).contiguous()
        for k, v in student.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    check_finite(tensors, path)
    metadata = {METADATA_KEY: describe(spec, student.config)}
    if stages:
        metadata[TRACE_KEY] = write_stages(stages)
    data = _in_order(save(tensors, metadata=metadata))
    write_file(path, data)
    return hashlib.sha256(data).hexdigest()


def _in_order(data: bytes) -> bytes:
    """The same file with its texts in the order of their keys.

    The library keeps them in a hash table, so that two texts come in either order.
    """
    length = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "LoadReport",
    "LoadedStudent",
    "describe",
    "describes_itself",
    "load_start",
    "load_student_file",
    "load_weights",
    "parse_description",
    "save_student",
]
