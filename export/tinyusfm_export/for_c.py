"""What a program in C ships, in one folder.

Library, engine, headers, licence texts, and a bundle of one target.

The bundle is the same one with the other artefacts and half of the golden frames left out, hashed again. Nothing is
downloaded: the library comes from a build, the engine from the wheel that is installed here.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyusfm_runtime.bundle.arrays import pack_arrays, unpack_arrays, unpack_metadata
from tinyusfm_runtime.bundle.manifest import DRIFT_FILE, GOLDEN_FRAMES, GOLDEN_REFERENCE, Artefact, choose_artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.bundle.writer import write_bundle
from tinyusfm_runtime.errors import InputError, MissingExtra, OutputError, UnsupportedError
from tinyusfm_runtime.plugins import public_name

ENGINE_FILES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ort": ("onnxruntime", ("capi/libonnxruntime.so.*",)),
    "ov": (
        "openvino",
        (
            "libs/libopenvino.so.*",
            "libs/libopenvino_c.so.*",
            "libs/libopenvino_intel_cpu_plugin.so",
            "libs/libopenvino_ir_frontend.so.*",
            "libs/libtbb.so.*",
        ),
    ),
    "integer": ("", ()),
}
"""Engine -> distribution, and the files of it that a program needs."""
LIBRARY = "libtinyusfm.so.0"
GOLDEN_KEPT = 16
"""Golden frames that a device's bundle keeps, evenly chosen: half of them, which is a third of its bytes."""
_STABLE_NAMES = {"libonnxruntime.so.": "libonnxruntime.so.1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of what is shipped.

    Attributes:
        name: ``library``, ``engine``, ``bundle``, ``headers`` or ``licences``.
        files: how many.
        size_bytes: of all of them.
    """

    name: str
    files: int
    size_bytes: int


ELSEWHERE = {
    "trt": "the C runtime runs TensorRT where it was built with it, and takes the library of the device",
    "litert": "an app takes its model.tflite along with LiteRT's own package (docs/tutorials/android.md)",
    "coreml": "an app takes its model along with Core ML",
}
"""Engine that is not gathered -> where its artefact runs from C."""


def _why_not(artefact: Artefact, bundle: Bundle) -> str:
    """Why an artefact cannot be gathered, and what can."""
    engines = ", ".join(public_name(engine) for engine in sorted(ENGINE_FILES))
    fitting = [one.name for one in bundle.manifest.artefacts if one.engine in ENGINE_FILES]
    there = f"this bundle has {', '.join(fitting)}" if fitting else "export one of them"
    where = f"; {ELSEWHERE[artefact.engine]}" if artefact.engine in ELSEWHERE else ""
    return f"cannot be gathered, the C runtime takes along {engines}: {there} (--target){where}"


def gather(
    bundle: str | Path, out: Path, *, prefix: Path, target: str | None = None, precision: str | None = None
) -> list[Part]:
    """Fills a folder with everything that a program in C needs to run one artefact.

    Args:
        bundle: the bundle's folder.
        out: folder to be made; it must not exist.
        prefix: where ``cmake --install`` put the library.
        target: of the artefact, None is the bundle's first.
        precision: likewise.

    Returns:
        The parts with their sizes.

    Raises:
        InputError: no such artefact, or no library under the prefix.
        UnsupportedError: an engine that C programs cannot take along; the message names those they can.
        MissingExtra: the engine's wheel is not installed.
        OutputError: the folder exists, or cannot be written.
    """
    opened = Bundle.open(bundle)
    artefact = choose_artefact(opened.manifest, target, precision)
    if artefact.engine not in ENGINE_FILES:
        raise UnsupportedError(f"artefact {artefact.name} {_why_not(artefact, opened)}")
    library = _library(prefix)
    wheel, files = _engine(artefact.engine)
    if out.exists():
        raise OutputError(f"{out} exists: name a folder to be made")
    try:
        for name in ("lib", "include", "licences"):
            (out / name).mkdir(parents=True)
        shutil.copy(library, out / "lib" / LIBRARY)
        for needed in _needed(library):
            shutil.copy(needed, out / "lib" / needed.name)
        own = sum(file.stat().st_size for file in (out / "lib").iterdir())
        count = sum(1 for _ in (out / "lib").iterdir())
        for file in files:
            shutil.copy(file, out / "lib" / _stable(file.name))
        for header in sorted((prefix / "include").iterdir()):
            shutil.copy(header, out / "include")
        _licences(wheel, _needed(library), out / "licences")
        _one_target(opened, artefact, out / f"{opened.manifest.spec.name}.bundle")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}") from error
    lib = _part("engine", out / "lib")
    return [
        Part(name="library", files=count, size_bytes=own),
        Part(name="engine", files=lib.files - count, size_bytes=lib.size_bytes - own),
        _part("bundle", out / f"{opened.manifest.spec.name}.bundle"),
        _part("headers", out / "include"),
        _part("licences", out / "licences"),
    ]


def _part(name: str, folder: Path) -> Part:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return Part(name=name, files=len(files), size_bytes=sum(path.stat().st_size for path in files))


def _library(prefix: Path) -> Path:
    for place in (prefix / "lib" / LIBRARY, *prefix.glob(f"lib/*/{LIBRARY}"), prefix / LIBRARY):
        if place.is_file():
            return place.resolve()
    raise InputError(f"{prefix} holds no {LIBRARY}: make capi, then cmake --install build/capi --prefix {prefix}")


def _engine(engine: str) -> tuple[str, list[Path]]:
    wheel, patterns = ENGINE_FILES[engine]
    if not wheel:
        return wheel, []
    try:
        distribution = importlib.metadata.distribution(wheel)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra("gathering an engine", wheel, wheel) from error
    root = Path(str(distribution.locate_file(wheel)))
    found = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    if len(found) < len(patterns):
        raise InputError(f"the installed {wheel} does not hold {', '.join(patterns)}: it is another platform's")
    return wheel, found


def _stable(name: str) -> str:
    return next((stable for start, stable in _STABLE_NAMES.items() if name.startswith(start)), name)


def _needed(library: Path) -> list[Path]:
    """jansson and mbedTLS, unless they are linked in."""
    output = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False).stdout
    words = [line.split() for line in output.splitlines() if "=>" in line]
    return [Path(line[2]) for line in words if line[0].startswith(("libjansson", "libmbedcrypto")) and len(line) > 2]


def _licences(wheel: str, needed: list[Path], out: Path) -> None:
    own = Path(__file__).resolve().parents[2] / "LICENSE"
    if own.is_file():
        shutil.copy(own, out / "tinyusfm-edge.txt")
    if wheel:
        for file in importlib.metadata.distribution(wheel).files or ():
            if "licen" in file.name.lower() or "notice" in file.name.lower() or "third" in file.name.lower():
                place = Path(str(file.locate()))
                if place.is_file() and place.suffix.lower() in ("", ".txt", ".md"):
                    shutil.copy(place, out / f"{wheel}-{file.name}")
    for library in needed:
        for copyright_file in Path("/usr/share/doc").glob(f"{library.name.split('.')[0]}*/copyright"):
            shutil.copy(copyright_file, out / f"{library.name.split('.')[0]}.txt")


def _one_target(opened: Bundle, artefact: Artefact, out: Path) -> None:
    manifest = opened.manifest
    kept = {GOLDEN_FRAMES, GOLDEN_REFERENCE, artefact.golden, *artefact.files, f"reports/{artefact.name}.json"}
    kept |= {DRIFT_FILE}
    files = {name: opened.read(name) for name in manifest.files if name in kept}
    for name in (GOLDEN_FRAMES, GOLDEN_REFERENCE, artefact.golden):
        files[name] = _fewer(files[name], name, len(opened.golden_frames()))
    write_bundle(
        out,
        spec=manifest.spec,
        artefacts=(artefact,),
        weights_sha256=manifest.weights_sha256,
        calibration_id=manifest.calibration_id,
        tools=manifest.tools,
        files=files,
        created_utc=manifest.created_utc,
        device_class=manifest.device_class,
        security_version=manifest.security_version,
        trace=manifest.trace,
    )


def _fewer(raw: bytes, name: str, count: int) -> bytes:
    """The arrays of some of the frames.

    What is not one per frame (the rule of early exits) stays as it is.
    """
    chosen = sorted({i * count // GOLDEN_KEPT for i in range(GOLDEN_KEPT)})
    arrays = unpack_arrays(raw, name)
    rule = ("exit_blocks", "exit_entropy", "exit_patience")
    kept = {key: value if key in rule else value[chosen] for key, value in arrays.items()}
    return pack_arrays(kept, unpack_metadata(raw, name))


__all__ = ["ELSEWHERE", "ENGINE_FILES", "GOLDEN_KEPT", "LIBRARY", "Part", "gather"]
