"""The lock of the runtime: every file by its hash, the versions of constraints.txt, and nothing that is missing."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK, CONSTRAINTS = ROOT / "requirements" / "runtime.lock", ROOT / "constraints.txt"
EXTRAS = ("onnxruntime", "openvino", "opencv", "dicom", "dicom-objects", "video", "live")
FOREIGN = {"colorama"}
"""What other systems than Linux need."""


def pins(text: str) -> dict[str, str]:
    """Name -> version, of every line that pins one."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, flags=re.MULTILINE)
    return {plain(name): version for name, version in found}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def faults(lock: str, constraints: str) -> list[str]:
    """What is wrong with a lock."""
    found = [f"{line.strip()[:60]} is neither a pin nor a hash" for line in lock.splitlines() if not _known(line)]
    for block in re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]:
        name = block.split("==")[0]
        if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", block):
            found.append(f"{name} has no hash")
    wanted = pins(constraints)
    for name, version in pins(lock).items():
        if name not in FOREIGN and wanted.get(name) != version:
            found.append(f"{name} is {version} in the lock and {wanted.get(name)} in constraints.txt")
    return found


def _known(line: str) -> bool:
    pin = r"[A-Za-z0-9._-]+==\S+( ; .+)? \\"
    return bool(re.fullmatch(rf"#.*|\s*|{pin}|    --hash=sha256:[0-9a-f]{{64}}( \\)?", line))


def needed(extras: tuple[str, ...]) -> set[str]:
    """Every distribution that the project with some extras needs here, as the installed ones say."""
    seen: set[str] = set()
    waiting = [("tinyusfm-edge", frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        for line in metadata.requires(name) or ():
            requirement, _, marker = line.partition(";")
            extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", marker)
            if extra and extra[1] not in wanted or _elsewhere(marker):
                continue
            matched = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", requirement)
            assert matched is not None
            other = plain(matched[1])
            inner = frozenset(part.strip() for part in (matched[2] or "").split(",") if part.strip())
            if other == "tinyusfm-edge" or other not in seen:
                if other != "tinyusfm-edge":
                    seen.add(other)
                waiting.append((other, inner))
    return seen


def _elsewhere(marker: str) -> bool:
    """Whether a marker, apart from extras, is about another system or another Python."""
    from packaging.markers import Marker

    rest = " and ".join(part for part in re.split(r"\s+and\s+", marker.strip()) if "extra" not in part).strip(" ()")
    return bool(rest) and not Marker(rest).evaluate()


def test_every_file_has_a_hash_and_every_version_is_that_of_the_constraints() -> None:
    lock = LOCK.read_text(encoding="utf-8")
    assert not faults(lock, CONSTRAINTS.read_text(encoding="utf-8"))
    assert len(pins(lock)) > 20


def test_nothing_that_the_runtime_needs_is_missing() -> None:
    pytest.importorskip("packaging")
    missing = needed(EXTRAS) - set(pins(LOCK.read_text(encoding="utf-8")))
    assert not missing
    assert {"numpy", "onnxruntime", "openvino", "uvicorn", "h11"} <= needed(EXTRAS), "the control"
    assert "torch" not in needed(EXTRAS)


def test_what_is_wrong_is_caught() -> None:
    digest = "a" * 64
    good = f"numpy==2.3.5 \\\n    --hash=sha256:{digest}\n"
    assert not faults(good, "numpy==2.3.5\n")
    assert faults(good, "numpy==2.3.4\n") == ["numpy is 2.3.5 in the lock and 2.3.4 in constraints.txt"]
    assert faults(good, "") and faults("numpy==2.3.5 \\\n", "numpy==2.3.5\n") == ["numpy has no hash"]
    assert faults("--index-url https://example.org/simple\n" + good, "numpy==2.3.5\n")
    assert faults("numpy>=2\n", "numpy==2.3.5\n")
