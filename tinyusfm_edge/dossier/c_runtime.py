"""Libraries of a device whose program is written in C.

What libtinyusfm links, and the engines' C libraries.

Versions and hashes are those of a build folder of CMake, read from its cache and from the headers that it compiled
with; without one they are not known and said to be so. It does not know any output format.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tinyusfm_edge.dossier.facts import InstalledLibrary
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError

CACHE = "CMakeCache.txt"
OURS = "libtinyusfm"
UNKNOWN = "unknown"
ENGINES = {
    "onnxruntime": ("MIT", "Microsoft", "https://github.com/microsoft/onnxruntime/issues", "on the CPU"),
    "openvino": ("Apache-2.0", "Intel", "https://github.com/openvinotoolkit/openvino/issues", "on CPU, GPU or NPU"),
    "tensorrt": ("NVIDIA software licence", "NVIDIA", "", "on an NVIDIA GPU"),
    "tensorrt-rtx": ("NVIDIA software licence", "NVIDIA", "", "on an NVIDIA GPU"),
}
"""Library of an artefact -> licence, supplier, list of anomalies, where it computes."""


@dataclass(frozen=True, slots=True)
class _Linked:
    """A library that libtinyusfm links.

    Attributes:
        name: of the library.
        licence: SPDX expression.
        supplier: who makes it.
        purpose: what it is for.
        anomalies: address of the list of known ones.
        library: variable of the build's cache with its file.
        include: variable with the folder of its headers.
        headers: where its version stands.
        version: pattern of the version in them.
    """

    name: str
    licence: str
    supplier: str
    purpose: str
    anomalies: str
    library: str
    include: str
    headers: tuple[str, ...]
    version: str


_LINKED = (
    _Linked(
        "jansson", "MIT", "Petri Lehtinen", "reads the JSON of manifest, signature, trust store and policy",
        "https://github.com/akheron/jansson/issues", "JANSSON_LIBRARY", "JANSSON_INCLUDE", ("jansson.h",),
        r'JANSSON_VERSION\s+"([\d.]+)"',
    ),
    _Linked(
        "mbedtls", "Apache-2.0 OR GPL-2.0-or-later", "Trusted Firmware project",
        "SHA-256 of every byte of the bundle; ECDSA of its signature (mbedcrypto alone is linked)",
        "https://github.com/Mbed-TLS/mbedtls/issues", "MBEDCRYPTO_LIBRARY", "MBEDTLS_INCLUDE",
        ("mbedtls/build_info.h", "mbedtls/version.h"), r'MBEDTLS_VERSION_STRING\s+"([\d.]+)"',
    ),
)  # fmt: skip


def c_libraries(bundle: Bundle, build: Path | None = None) -> tuple[list[InstalledLibrary], tuple[str, ...]]:
    """Libraries that a device with this bundle and a program in C has.

    What is not known here is named too.

    Args:
        bundle: an open bundle.
        build: build folder of the C runtime, or None.

    Returns:
        The libraries, libtinyusfm first, and notes.

    Raises:
        InputError: the folder is no build folder of the C runtime.
    """
    cache = _cache(build) if build is not None else {}
    version = cache.get("CMAKE_PROJECT_VERSION", UNKNOWN)
    linked = [_linked(found, cache) for found in _LINKED]
    engines, notes = _engines(bundle)
    ours = InstalledLibrary(
        name=OURS, version=version, licence="Apache-2.0", purpose="runs the bundle: the C runtime of tinyusfm-edge",
        record_sha256=_sha256(build / "libtinyusfm.so") if build is not None else "",
        requires=(*(library.name for library in linked), *(engine.name for engine in engines), "libc"),
        purl=_purl("libtinyusfm", version),
    )  # fmt: skip
    system = InstalledLibrary(
        name="libc", version=UNKNOWN, purpose="C library and threads of the device's system", needed_by=OURS,
        purl=_purl("libc", UNKNOWN),
    )  # fmt: skip
    if build is None:
        notes.append(
            "versions and hashes of the C libraries are not known: give --c-build, the folder they were built in"
        )
    notes.append("libc is that of the device's system: the manufacturer names it")
    return [ours, *linked, *engines, system], tuple(notes)


def _engines(bundle: Bundle) -> tuple[list[InstalledLibrary], list[str]]:
    found: dict[str, InstalledLibrary] = {}
    notes = []
    for artefact in bundle.manifest.artefacts:
        name = str(artefact.requirements.get("library") or "")
        if not name or name in found or name.startswith("tinyusfm"):
            continue
        version = str(artefact.requirements.get("library_version") or UNKNOWN)
        licence, supplier, anomalies, where = ENGINES.get(name, ("", "", "", ""))
        found[name] = InstalledLibrary(
            name=name, version=version, verified_with=version, licence=licence, supplier=supplier,
            purpose=f"computes the network {where}".strip(), needed_by="an artefact of the bundle", anomalies=anomalies,
            purl=_purl(name, version),
        )  # fmt: skip
        notes.append(
            f"{name}: the gate ran with {version}; the device's C library is opened from options.engine_folder"
        )
    return list(found.values()), notes


def _linked(known: _Linked, cache: dict[str, str]) -> InstalledLibrary:
    version = UNKNOWN
    for header in known.headers:
        place = Path(cache.get(known.include, "/nowhere")) / header
        match = (
            re.search(known.version, place.read_text(encoding="utf-8", errors="replace")) if place.is_file() else None
        )
        version = match.group(1) if match else version
    library = cache.get(known.library)
    return InstalledLibrary(
        name=known.name, version=version, licence=known.licence, supplier=known.supplier, purpose=known.purpose,
        needed_by=OURS, record_sha256=_sha256(Path(library)) if library else "", anomalies=known.anomalies,
        purl=_purl(known.name, version),
    )  # fmt: skip


def _cache(build: Path) -> dict[str, str]:
    """Variables of a build folder."""
    try:
        text = (build / CACHE).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"--c-build {build} is no build folder: it has no {CACHE} ({error.strerror})") from error
    found = dict(re.findall(r"^(\w+):\w+=(.*)$", text, re.MULTILINE))
    if "JANSSON_LIBRARY" not in found or "MBEDCRYPTO_LIBRARY" not in found:
        raise InputError(f"--c-build {build} is not a build folder of the C runtime: run make capi")
    return found


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _purl(name: str, version: str) -> str:
    return f"pkg:generic/{name}" + ("" if version == UNKNOWN else f"@{version}")


__all__ = ["CACHE", "ENGINES", "OURS", "UNKNOWN", "c_libraries"]
