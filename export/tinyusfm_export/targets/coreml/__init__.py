"""Target ``coreml``: an ``.mlpackage`` with a grey image as input.

ML program, iOS 17 and macOS 14 or later.

* fp32 and fp16; int8 is W8A8 with the decision's own ranges; w6 and w4 are palettes of 64 and 16 values a weight, with
  everything else in FP16 (writer.py has the forms).
* Labels, task, origin and licence stand in the package itself.
* Core ML predicts on macOS only. There the artefact is judged by Core ML; elsewhere the saved program is read back and
  executed by the reference interpreter (``StandIn``), and the artefact is ``unverified`` until a Mac has verified it.
* A student with three heads of 64 suits the Neural Engine better than twelve of 16; it is the same student type with
  ``heads=3`` and is exported like any other.

Core ML execution: not run by us.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import Any

from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.onnx_files.half import half_weight as written_weight
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.targets import BuiltArtefact, Requirements
from tinyusfm_export.targets.coreml.stand_in import MilEngine
from tinyusfm_export.targets.coreml.writer import write_program
from tinyusfm_runtime.engines.coreml import NOT_RUN, PACKAGE, PLACES, import_coremltools, runs_here
from tinyusfm_runtime.errors import MissingExtra, OutputError, UnsupportedError
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import INPUT_NAME, ModelSpec

PENDING = "checked by interpreting its saved program, not yet by Core ML: run `tinyusfm-edge verify BUNDLE` on a Mac"
"""What an artefact waits for that was not exported on a Mac."""
PRUNES = True
"""It writes graphs that were pruned to a sector."""
_FORMS = {
    "fp32": "ML program of iOS 17, float32",
    "fp16": "ML program of iOS 17, float16",
    "int8": "ML program of iOS 17, W8A8 with static symmetric ranges, rest float16",
    "w4": "ML program of iOS 17, weights as palettes of 16 values with a scale a row, rest float16",
    "w6": "ML program of iOS 17, weights as palettes of 64 values with a scale a row, rest float16",
}
_NAMESPACE = uuid.UUID("8b0c2f5e-7f43-5a4e-9a5c-0d4f3b1f6a10")  # ours, any fixed one: ids in a package are derived


def available() -> Availability:
    """Tells whether Core ML packages can be written and judged here; never raises."""
    try:
        ct = import_coremltools()
        import torch
    except MissingExtra:
        return Availability(usable=False, reason="coremltools is not installed", extra="coreml")
    except ImportError:
        return Availability(usable=False, reason="torch is not installed", extra="export")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"coremltools is broken: {type(error).__name__}", extra="coreml")
    judge = "judged by Core ML" if runs_here() else f"judged by interpreting the program over torch {torch.__version__}"
    return Availability(usable=True, reason=f"coremltools {ct.__version__}, {judge}; {NOT_RUN}", extra="coreml")


class Target:
    """Writes the three files of ``model.mlpackage``."""

    name = "coreml"
    suffix = ".mlmodel"
    precisions = ("fp32", "fp16", "int8", "w6", "w4")

    def build(self, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
        """Writes the artefact (see target.Target)."""
        if decision.precision not in self.precisions:
            raise UnsupportedError(f"Core ML does not compute {decision.precision}: use {', '.join(self.precisions)}")
        ct = import_coremltools()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            files = _package_files(ct, write_program(graph, decision), graph.spec, out)
        paths = []
        try:
            for name, content in files.items():
                paths.append(out / name)
                paths[-1].write_bytes(content)
        except OSError as error:
            for path in paths:
                path.unlink(missing_ok=True)
            raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
        pending = "" if runs_here() else PENDING
        return BuiltArtefact(
            files=tuple(paths),
            form=_FORMS[decision.precision],
            rest_precision="f32" if decision.precision == "fp32" else "f16",
            requirements=Requirements(
                cpu_features=(), library="coremltools", library_version=ct.__version__, pending=pending
            ),
        )


if not runs_here():
    StandIn = MilEngine


def _package_files(ct: Any, program: Any, spec: ModelSpec, out: Path) -> dict[str, bytes]:
    """The converted program as the artefact's files; equal programs give equal bytes."""
    image = ct.ImageType(name=INPUT_NAME, shape=tuple(spec.input.shape), color_layout=ct.colorlayout.GRAYSCALE)
    failure = ""
    with tempfile.TemporaryDirectory(prefix="tinyusfm-") as folder, contextlib.redirect_stderr(io.StringIO()):
        try:
            model = ct.convert(
                program,
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS17,
                compute_precision=ct.precision.FLOAT32,  # the types stand in the program already
                inputs=[image],
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
                package_dir=f"{folder}/{PACKAGE}",
            )
            described = _describe(model.get_spec(), spec)
            weights = (Path(model.weights_dir) / "weight.bin").read_bytes()
        except (OSError, RuntimeError) as error:  # coremltools' own writer of the weight file raises RuntimeError
            failure = " ".join(str(error).split())[:200] or type(error).__name__
            error.__traceback__ = None
    if failure:
        with warnings.catch_warnings():  # what coremltools left open goes now, not in the middle of something else
            warnings.simplefilter("ignore")
            gc.collect()
        raise OutputError(f"cannot write {out}: the package could not be made ({failure})")
    return {
        "model.mlmodel": described.SerializeToString(deterministic=True),
        "weight.bin": weights,
        "Manifest.json": _manifest(spec),
    }


def _describe(model_spec: Any, spec: ModelSpec) -> Any:
    """Puts labels and origin into the package's own description.

    The date is removed.
    """
    about = model_spec.description.metadata
    about.shortDescription = f"{spec.name}: {spec.task.value} of ultrasound frames. {spec.intended_use}"
    about.author, about.license, about.versionString = spec.origin, spec.licence, spec.weights_sha256[:16]
    about.userDefined.clear()
    about.userDefined["labels"] = json.dumps(list(spec.labels))
    about.userDefined["task"] = spec.task.value
    about.userDefined["spec"] = json.dumps(spec.to_json(), sort_keys=True)
    model_spec.description.input[0].shortDescription = "grey frame, brightness codes 0 to 255"
    model_spec.description.output[0].shortDescription = f"logits of {', '.join(spec.labels)}"
    return model_spec


def _manifest(spec: ModelSpec) -> bytes:
    """The package's table of contents, with ids derived from the model's name."""
    items = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}
    ids = {name: str(uuid.uuid5(_NAMESPACE, f"{spec.name}/{name}")) for name in items}
    entries = {
        ids[name]: {
            "author": "com.apple.CoreML",
            "description": about,
            "name": name,
            "path": f"com.apple.CoreML/{name}",
        }
        for name, about in items.items()
    }
    table = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": ids["model.mlmodel"],
    }
    return (json.dumps(table, indent=4, sort_keys=True) + "\n").encode("ascii")


FOLDERS = {name: f"{PACKAGE}/{place}" for name, place in PLACES.items()}
"""Where an artefact's files lie in its folder of the bundle, so that Xcode opens the package as it stands."""

__all__ = ["FOLDERS", "PENDING", "PRUNES", "Target", "available", "written_weight"]
