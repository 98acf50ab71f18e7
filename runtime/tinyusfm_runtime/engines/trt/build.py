"""ONNX -> TensorRT engine, by one path over all its libraries.

``tensorrt`` (10 and 11) and ``tensorrt_rtx``, whichever is installed.

Networks are strongly typed: what is INT8, FP16 or float32 stands in the file (as Q/DQ and casts) and is checked here in
the parsed network, so that neither edition chooses a precision. TF32 is off. ``tensorrt`` tunes kernels for the GPU it
runs on and has a timing cache; ``tensorrt_rtx`` compiles ahead of time for named compute capabilities, without a GPU if
need be, and finishes on the device when the engine is loaded. It does not know bundles, caches or CUDA memory.

TensorRT execution: not run by us. Parsing and building are (tensorrt-rtx 1.7.1); ``tensorrt`` itself could not be
installed where this was made, its calls are those that both editions document.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tinyusfm_runtime.engines import one_line
from tinyusfm_runtime.errors import EngineError, InputError, MissingExtra, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXTRA = "tensorrt"
"""The extra that brings TensorRT for RTX; ``tensorrt`` comes with JetPack or from NVIDIA's index."""
EDITIONS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Module -> distribution, in the order in which they are looked for."""
NOT_RUN = "TensorRT execution: not run by us"
"""What has to be said wherever this engine is listed."""
MIN_HARDWARE_COMPATIBLE = 8.0
"""Engines for several GPUs exist from Ampere on (HardwareCompatibilityLevel.AMPERE_PLUS)."""
FLOAT_LAYERS = ("NORMALIZATION", "SOFTMAX")
"""Layers that must compute in float32 whatever the precision; FP16 spoils them."""

Progress = Callable[[str, float], None]
"""Called with what the builder is doing and the share that is done, 0..1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """The edition that is installed.

    Attributes:
        module: the imported module.
        name: its distribution.
        version: such as ``10.3.0``.
    """

    module: Any
    name: str
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX."""
        return self.name == "tensorrt-rtx"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildFlags:
    """What changes the engine.

    Attributes:
        hardware_compatible: run on every GPU from compute capability 8.0 on, somewhat slower.
        dla: put what its Deep Learning Accelerator can run there (Orin); the GPU takes the rest.
    """

    hardware_compatible: bool = False
    dla: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A parsed model; TensorRT needs all three parts alive.

    Attributes:
        builder: the builder that owns it.
        definition: the network.
        parser: it owns the weights.
    """

    builder: Any
    definition: Any
    parser: Any

    def layers(self) -> Counter[tuple[str, str]]:
        """(layer type, type of its first output) -> how many."""
        found = (self.definition.get_layer(i) for i in range(self.definition.num_layers))
        return Counter((_word(layer.type), _word(layer.get_output(0).dtype)) for layer in found)

    def count(self, kind: str, dtype: str | None = None) -> int:
        """Number of layers of a type, and of an output type if one is given."""
        return sum(n for (k, d), n in self.layers().items() if k == kind and dtype in (None, d))


def import_tensorrt() -> Library:
    """The first edition that can be imported.

    Raises:
        MissingExtra: none is installed.
        UnsupportedError: one is installed and broken.
    """
    for name, distribution in EDITIONS.items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            if error.name in (name, None) and importlib.util.find_spec(name) is None:
                continue
            raise UnsupportedError(f"{distribution} is broken: {one_line(error)}") from error
        except Exception as error:  # its loader raises RuntimeError and OSError for libraries that do not fit
            raise UnsupportedError(f"{distribution} is broken: {one_line(error)}") from error
        if not hasattr(module, "OnnxParser"):
            raise UnsupportedError(f"this {distribution} has no ONNX parser (a lean runtime?): install the full one")
        return Library(module=module, name=distribution, version=str(module.__version__))
    raise MissingExtra("TensorRT", "tensorrt-rtx", EXTRA)


@lru_cache(maxsize=2)
def messages(module: Any) -> Any:
    """The process's one logger for a module: TensorRT keeps the first it gets.

    ``errors`` holds what it said.
    """

    class Messages(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= int(module.ILogger.ERROR):
                self.errors.append(" ".join(str(text).split())[:300])
                del self.errors[:-20]

    return Messages()


@contextmanager
def heard(library: Library) -> Iterator[Any]:
    """The logger, emptied; inside it the library's deprecation warnings are silent."""
    logger = messages(library.module)
    logger.errors.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield logger


def parse(library: Library, onnx: bytes) -> Network:
    """Parses a model with TensorRT's own parser, strongly typed.

    Args:
        library: the edition.
        onnx: the model.

    Raises:
        UnsupportedError: an operator or a type that TensorRT does not take; the message names the node.
    """
    trt = library.module
    with heard(library) as logger:
        builder = trt.Builder(logger)
        strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
        definition = builder.create_network(0 if strong is None else 1 << int(strong))
        parser = trt.OnnxParser(definition, logger)
        if not parser.parse(onnx):
            found = [parser.get_error(i) for i in range(parser.num_errors)]
            texts = [f"{error.node_name() or 'the file'}: {one_line(error.desc())}" for error in found]
            raise UnsupportedError(f"{_named(library)} cannot parse the model: {'; '.join(texts[:3]) or _last(logger)}")
    return Network(builder=builder, definition=definition, parser=parser)


def check_types(network: Network, precision: str, *, quantized: int | None = None) -> None:
    """Checks the parsed network's own types against what the artefact is called.

    Args:
        network: the parsed model.
        precision: fp32, fp16 or int8.
        quantized: number of INT8 layers there must be; None demands at least one of an int8 artefact.

    Raises:
        UnsupportedError: INT8 without Q/DQ, another number of INT8 layers, a LayerNorm or softmax that is not float32,
            or products in another type than the precision says.
    """
    found = network.count("QUANTIZE", "INT8")
    if precision == "int8" and not found:
        raise UnsupportedError("the ONNX has no Q/DQ nodes, so it cannot become an INT8 engine: export with --int8")
    wanted = (quantized or 0) if precision != "int8" else (found if quantized is None else quantized)
    if found != wanted:
        raise UnsupportedError(f"TensorRT sees {found} quantized inputs and the decision has {wanted}: export again")
    for kind in FLOAT_LAYERS:
        if network.count(kind) != network.count(kind, "FLOAT"):
            raise UnsupportedError(f"a {kind.lower()} layer is not float32, which FP16 spoils: export again")
    products = "FLOAT" if precision == "fp32" else "HALF"
    if network.count("MATRIX_MULTIPLY") != network.count("MATRIX_MULTIPLY", products):
        raise UnsupportedError(f"a product of this {precision} model is not typed {products}: export again")


def build_plan(
    library: Library,
    network: Network,
    flags: BuildFlags,
    *,
    compute_capabilities: tuple[str, ...] = (),
    timing_cache: bytes = b"",
    progress: Progress | None = None,
) -> tuple[bytes, bytes]:
    """Builds an engine.

    Args:
        library: the edition.
        network: what ``parse`` gave.
        flags: what changes the engine.
        compute_capabilities: build ahead of time for these, such as ``8.6``; TensorRT for RTX only. Empty builds for
            the GPU at hand.
        timing_cache: what an earlier build measured; empty if none did.
        progress: called with what is done and the share done.

    Returns:
        The engine, and the timing cache to keep (empty for TensorRT for RTX, which has none).

    Raises:
        UnsupportedError: the edition or the GPU cannot do what the flags or capabilities ask.
        EngineError: the builder failed; the message carries its reason.
    """
    trt = library.module
    with heard(library) as logger:
        config = network.builder.create_builder_config()
        _apply(library, network, config, flags, compute_capabilities)
        if not library.is_rtx:
            config.set_timing_cache(config.create_timing_cache(timing_cache), False)
        if progress is not None and hasattr(trt, "IProgressMonitor"):
            config.progress_monitor = _monitor(trt, progress)
        plan = network.builder.build_serialized_network(network.definition, config)
        if plan is None:
            raise EngineError(f"{_named(library)} could not build the engine: {_last(logger)}")
        kept = b"" if library.is_rtx else bytes(config.get_timing_cache().serialize())
        return bytes(plan), kept


def offered_capabilities(library: Library) -> tuple[str, ...]:
    """Compute capabilities that engines can be built for ahead of time.

    None with ``tensorrt``.
    """
    offered = getattr(library.module, "ComputeCapability", None)
    members: Mapping[str, Any] = getattr(offered, "__members__", {})
    numbers = [name[2:] for name in members if name.startswith("SM") and name[2:].isdigit()]
    return tuple(f"{number[:-1]}.{number[-1]}" for number in sorted(numbers, key=int))


def check_capabilities(library: Library, wanted: tuple[str, ...]) -> None:
    """Checks a list of compute capabilities before anything slow starts.

    Raises:
        UnsupportedError: the edition builds for the GPU at hand only.
        InputError: one that it does not know.
    """
    offered = offered_capabilities(library)
    if not offered:
        raise UnsupportedError(
            f"{_named(library)} builds for the GPU at hand only: building ahead of time needs tensorrt-rtx"
        )
    unknown = [capability for capability in wanted if capability not in offered]
    if unknown:
        raise InputError(f"compute capability {unknown[0]!r}: {_named(library)} builds for {', '.join(offered)}")


def _apply(library: Library, network: Network, config: Any, flags: BuildFlags, capabilities: tuple[str, ...]) -> None:
    trt = library.module
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if flags.dla:
        if not network.builder.num_DLA_cores:
            raise UnsupportedError(
                f"{_named(library)} finds no DLA core here (Orin with JetPack has one): leave --dla out"
            )
        config.default_device_type, config.DLA_core = trt.DeviceType.DLA, 0
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if flags.hardware_compatible and not library.is_rtx:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if flags.hardware_compatible and library.is_rtx and not capabilities:
        capabilities = tuple(c for c in offered_capabilities(library) if float(c) >= MIN_HARDWARE_COMPATIBLE)
    if capabilities:
        check_capabilities(library, capabilities)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
            config.set_compute_capability(member, index)


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports the outermost phase; the builder calls it from its own threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.top: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = max(1, num_steps)
            self.top = phase_name if parent_phase is None else self.top

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.top:
                with suppress(Exception):  # an exception must not cross into the builder's C++ thread
                    progress(phase_name, min(1.0, (step + 1) / self.steps.get(phase_name, 1)))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _named(library: Library) -> str:
    return f"{library.name} {library.version}"


def _word(member: Any) -> str:
    return str(member).rsplit(".", 1)[-1]


def _last(logger: Any) -> str:
    return str(logger.errors[-1]) if logger.errors else "it gave no reason"


__all__ = [
    "EDITIONS",
    "EXTRA",
    "FLOAT_LAYERS",
    "MIN_HARDWARE_COMPATIBLE",
    "NOT_RUN",
    "BuildFlags",
    "Library",
    "Network",
    "Progress",
    "build_plan",
    "check_capabilities",
    "check_types",
    "heard",
    "import_tensorrt",
    "messages",
    "offered_capabilities",
    "parse",
]
