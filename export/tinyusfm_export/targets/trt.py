"""Target ``tensorrt``: one strongly typed ONNX.

Every TensorRT builds its engine from it, where it runs.

* fp32: the graph as it is, TF32 off; fp16: explicit casts, LayerNorm, softmax and means in float32 (onnx_half.py);
  int8: explicit symmetric Q/DQ on inputs and weights, biases in float, the rest in FP16 whatever the decision says of
  CPUs, since that is what a GPU multiplies fast (and Turing, SM75, has no float32 products in TensorRT for RTX 1.7).
* An engine is native code for one GPU, driver and version, so it does not belong to the artefact. Here the file is
  parsed with TensorRT's own parser, every layer's type is checked, and the file itself is judged in ONNX Runtime with
  graph optimisation off (``StandIn``). The artefact is ``unverified`` until ``tinyusfm-edge build`` has run the gate on
  the device. Where TensorRT for RTX is installed, engines can be built ahead of time for named compute capabilities.

TensorRT execution: not run by us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.onnx_files.half import half_onnx
from tinyusfm_export.onnx_files.half import half_weight as written_weight
from tinyusfm_export.onnx_files.int8 import qdq_onnx
from tinyusfm_export.onnx_files.writer import save_checked, write_onnx
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.targets import BuiltArtefact, Requirements
from tinyusfm_runtime.engines import EngineConfig, ort
from tinyusfm_runtime.engines.ort import import_onnxruntime
from tinyusfm_runtime.engines.trt.build import (
    NOT_RUN,
    BuildFlags,
    Progress,
    build_plan,
    check_capabilities,
    check_types,
    import_tensorrt,
    parse,
)
from tinyusfm_runtime.engines.trt.cache import CACHE_SUFFIX, timing_content
from tinyusfm_runtime.engines.trt.device import MODEL_FILE, TIMING_SUFFIX, model_of, prebuilt_name
from tinyusfm_runtime.errors import EdgeError, InputError, MissingExtra, TamperedError, UnsupportedError
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import ModelSpec

PENDING = "engine not yet verified on its GPU: run `tinyusfm-edge build BUNDLE` there"
"""What an artefact waits for."""
_FORMS = {
    "fp32": "float32 ONNX, opset 20, strongly typed",
    "fp16": "float16 ONNX with explicit casts, LayerNorm and softmax in float32",
    "int8": "explicit symmetric Q/DQ, static ranges, rest float16 with LayerNorm and softmax in float32",
}


PRUNES = True
"""It writes graphs that were pruned to a sector."""


def available() -> Availability:
    """Tells whether TensorRT's ONNX can be written, parsed and judged here.

    Never raises.
    """
    try:
        library = import_tensorrt()
        import onnx

        onnxruntime = import_onnxruntime()
    except MissingExtra as error:
        return Availability(usable=False, reason=f"{error.library} is not installed", extra="tensorrt")
    except ImportError as error:
        missing = str(error.name or "onnx").split(".")[0]
        extra = "export" if missing == "onnx" else "onnxruntime"
        return Availability(usable=False, reason=f"{missing} is not installed", extra=extra)
    except EdgeError as error:
        return Availability(usable=False, reason=str(error), extra="tensorrt")
    except Exception as error:  # a broken installation may raise anything
        return Availability(
            usable=False, reason=f"onnx or onnxruntime is broken: {type(error).__name__}", extra="export"
        )
    found = (
        f"{library.name} {library.version}, onnx {onnx.__version__}, judged by onnxruntime {onnxruntime.__version__}"
    )
    return Availability(usable=True, reason=f"{found}; {NOT_RUN}", extra="tensorrt")


class Target:
    """Writes ``model.onnx`` and has TensorRT parse it."""

    name = "tensorrt"
    suffix = ".onnx"
    precisions = ("fp32", "fp16", "int8")

    def build(self, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
        """Writes the artefact (see target.Target)."""
        precision = decision.precision
        if precision not in self.precisions:
            raise UnsupportedError(f"target tensorrt does not write {precision}: use {', '.join(self.precisions)}")
        library = import_tensorrt()
        if precision == "int8":
            data = qdq_onnx(graph, decision, half=True)
        else:
            data = write_onnx(graph) if precision == "fp32" else half_onnx(write_onnx(graph))
        path = save_checked(data, out / MODEL_FILE)
        try:
            check_types(parse(library, data), precision, quantized=len(decision.quantized()))
        except UnsupportedError:
            path.unlink()
            raise
        return BuiltArtefact(
            files=(path,),
            form=_FORMS[precision],
            rest_precision="f32" if precision == "fp32" else "f16",
            requirements=Requirements(
                cpu_features=(), library=library.name, library_version=library.version, pending=PENDING
            ),
        )


class StandIn(ort.Engine):
    """The ONNX itself in ONNX Runtime with graph optimisation off.

    Q, DQ and casts are computed as they stand.

    FP16 operators that ONNX Runtime has no CPU kernel for are computed in float32 between their casts. It judges the
    file; what TensorRT's kernels make of it is judged on the device.
    """

    optimisation = "ORT_DISABLE_ALL"

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Loads the ONNX among the files (see engine.Engine)."""
        plain = EngineConfig(threads=config.threads, rest_precision="f32")
        super().load({ort.MODEL_FILE: model_of(files)}, spec, plain)

    @property
    def description(self) -> str:
        """What ran, one line."""
        return f"the ONNX itself on {super().description}, graph optimisation off (no TensorRT engine was run)"


def build_ahead(
    files: Mapping[str, bytes], precision: str, capabilities: Sequence[str], progress: Progress | None = None
) -> dict[str, bytes]:
    """Engines for named compute capabilities, built without a GPU; they have not run.

    Args:
        files: the artefact's files.
        precision: fp32, fp16 or int8.
        capabilities: such as ``8.6``.
        progress: called with what is done and the share done.

    Returns:
        File name -> engine.

    Raises:
        MissingExtra: TensorRT is not installed.
        UnsupportedError: the edition installed builds for the GPU at hand only.
        InputError: a compute capability that it does not know.
        EngineError: the builder failed.
    """
    library = import_tensorrt()
    check_capabilities(library, tuple(capabilities))
    engines = {}
    for number, capability in enumerate(capabilities):
        network = parse(library, model_of(files))
        check_types(network, precision)
        if progress is not None:
            progress(
                f"building {precision} ahead of time for compute capability {capability}", number / len(capabilities)
            )
        plan, _ = build_plan(library, network, BuildFlags(), compute_capabilities=(capability,))
        engines[prebuilt_name(library, capability)] = plan
    return engines


def timing_files(caches: Sequence[Path]) -> dict[str, bytes]:
    """Timing caches of devices, as files of an artefact.

    Args:
        caches: files of the folder ``timing`` in a device's engine cache.

    Returns:
        File name -> what the device measured.

    Raises:
        InputError: a file cannot be read, has another suffix, or is not as the device wrote it.
    """
    found = {}
    for place in caches:
        if place.suffix != CACHE_SUFFIX:
            raise InputError(f"{place} is no timing cache: give a {CACHE_SUFFIX} file of a device's folder timing")
        try:
            found[f"{place.stem}{TIMING_SUFFIX}"] = timing_content(place.read_bytes())
        except OSError as error:
            raise InputError(f"the timing cache {place} cannot be read: {error.strerror or error}") from error
        except TamperedError as error:
            raise InputError(f"{place}: {error}") from error
    return found


def check_ahead(capabilities: Sequence[str]) -> None:
    """Checks compute capabilities before anything slow starts.

    Raises:
        MissingExtra: TensorRT is not installed.
        UnsupportedError: the edition installed builds for the GPU at hand only.
        InputError: a compute capability that it does not know.
    """
    check_capabilities(import_tensorrt(), tuple(capabilities))


__all__ = [
    "PENDING",
    "PRUNES",
    "StandIn",
    "Target",
    "available",
    "build_ahead",
    "check_ahead",
    "timing_files",
    "written_weight",
]
