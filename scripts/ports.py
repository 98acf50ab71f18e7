"""Bundles, images and answers for the checks on other CPUs and systems (scripts/ports.sh), and their comparison.

    python scripts/ports.py export FILE [TARGETS]      the shipped student as a CPU without bfloat16 exports it
    python scripts/ports.py prepare BUNDLE FOLDER      four.bundle, one.bundle (so many golden frames) and list.txt
    python scripts/ports.py frames BUNDLE FOLDER COUNT model.table and frames.bin for tests/integer_check.c
    python scripts/ports.py compare HERE THERE TARGET  what tests/answers.c printed here and there

The integer target has to answer alike to the last bit; the others within what their golden check allows.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinyusfm_runtime.bundle.arrays import pack_arrays, unpack_arrays
from tinyusfm_runtime.bundle.golden import pack_golden
from tinyusfm_runtime.bundle.manifest import DRIFT_FILE, GOLDEN_FRAMES, GOLDEN_REFERENCE, file_entry
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.bundle.writer import write_bundle
from tinyusfm_runtime.engines.integer import MODEL_FILE
from tinyusfm_runtime.engines.integer.layout import TYPES
from tinyusfm_runtime.engines.integer.model_file import read_tensors
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess

SHARED = Path(os.environ.get("TINYUSFM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
"""The folder of real data, as in the tests."""
REAL = SHARED / "data" / "hc18"
REAL_FRAMES = 8
TOLERANCE = {"hc_mm": 1.0, "marked": 0.01}
"""Largest difference of circumference, and of marked pixels as a share, of targets that are not exact."""


def main() -> int:
    """Runs one of the two commands."""
    match sys.argv[1:]:
        case ["export", bundle]:
            return export(bundle, "integer,onnx,openvino,litert")
        case ["export", bundle, targets]:
            return export(bundle, targets)
        case ["prepare", bundle, folder]:
            prepare(Path(bundle), Path(folder))
        case ["frames", bundle, folder, count]:
            write_frames(Path(bundle), Path(folder), int(count))
        case ["compare", here, there, target]:
            return compare(Path(here), Path(there), target)
        case _:
            print(__doc__)
            return 2
    return 0


def export(bundle: str, targets: str) -> int:
    """Exports with float32 around int8, which every CPU computes; this one may prefer bfloat16.

    Args:
        bundle: to write.
        targets: with commas between.

    Returns:
        The command's exit code.
    """
    from tinyusfm_edge.cli.main import main as command
    from tinyusfm_export import artefacts

    offered = artefacts.default_policies
    artefacts.default_policies = lambda task: tuple(replace(policy, rest_precision="f32") for policy in offered(task))
    return command(["export", "fetal-head", "--target", targets, "--int8", "--no-compare", "--out", bundle])


def prepare(path: Path, folder: Path) -> None:
    """Writes everything that another machine needs.

    Args:
        path: a bundle.
        folder: to write to.
    """
    bundle = Bundle.open(path)
    for count, name in ((4, "four.bundle"), (1, "one.bundle")):
        shutil.rmtree(folder / name, ignore_errors=True)
        with_fewer_golden_frames(bundle, count, folder / name)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    frames = [*bundle.golden_frames()[:4], *real_frames(REAL_FRAMES)]
    for number, frame in enumerate(frames):
        rows, columns = frame.pixels.shape[:2]
        pixels = frame.pixels if frame.pixels.ndim == 2 else frame.pixels[..., 0]
        name = f"images/{number:02d}.pgm"
        (folder / name).write_bytes(f"P5\n{columns} {rows}\n255\n".encode() + np.ascontiguousarray(pixels).tobytes())
        mm = frame.spacing_mm or (0.0, 0.0)
        lines.append(f"{name} {mm[0]!r} {mm[1]!r}\n")
    (folder / "list.txt").write_text("".join(lines), encoding="ascii")
    print(f"{len(frames)} images, {min(4, len(frames))} of them golden frames")


def with_fewer_golden_frames(bundle: Bundle, count: int, target: Path) -> None:
    """The same bundle with its first golden frames alone, so that an emulated machine opens it in minutes.

    Args:
        bundle: to copy.
        count: golden frames to keep.
        target: of the copy.
    """
    manifest = bundle.manifest
    files = {name: bundle.read(name) for name in manifest.files}
    arrays = unpack_arrays(files[GOLDEN_FRAMES], GOLDEN_FRAMES)
    files[GOLDEN_FRAMES] = pack_arrays({name: value[:count] for name, value in arrays.items()})
    spec = manifest.spec
    prepared = [preprocess(frame, spec.preprocess) for frame in bundle.golden_frames()[:count]]
    for name in (GOLDEN_REFERENCE, *(artefact.golden for artefact in manifest.artefacts)):
        logits = unpack_arrays(files[name], name)["logits"][:count]
        files[name] = pack_golden(logits, spec, prepared)
    artefacts = [
        replace(artefact, files={name: file_entry(files[name]) for name in artefact.files})
        for artefact in manifest.artefacts
    ]
    write_bundle(
        target,
        spec=spec,
        artefacts=artefacts,
        weights_sha256=manifest.weights_sha256,
        calibration_id=manifest.calibration_id,
        tools=manifest.tools,
        files={name: content for name, content in files.items() if name != DRIFT_FILE or manifest.drift},
    )


def real_frames(count: int) -> Iterator[Frame]:
    """Validation images, where the data folder is there."""
    table = REAL / "split.csv"
    if not count or not table.exists():
        return
    import csv

    from PIL import Image

    with table.open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["split"] == "val"]
    for row in rows[:: max(1, len(rows) // count)][:count]:
        mm = float(row["pixel_size_mm"])
        pixels = np.asarray(Image.open(REAL / row["file"]).convert("L"))
        yield Frame(pixels=pixels, spacing_mm=(mm, mm))


def write_frames(path: Path, folder: Path, count: int) -> None:
    """Writes the integer model and input tensors in forms that need no parser.

    Args:
        path: a bundle.
        folder: to write to.
        count: real images beside all golden frames.
    """
    bundle = Bundle.open(path)
    artefact = next(each for each in bundle.manifest.artefacts if each.target == "integer")
    tensors = read_tensors(bundle.artefact_files(artefact)[MODEL_FILE])
    parts = [struct.pack("<i", len(tensors))]
    for name, value in tensors.items():
        kind = TYPES.index(value.dtype.str.replace("|", ""))
        shape = (*value.shape, 0, 0, 0, 0)[:4]
        parts += [struct.pack("<64sii4qq", name.encode(), kind, value.ndim, *shape, value.nbytes), value.tobytes()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.table").write_bytes(b"".join(parts))
    frames = [*bundle.golden_frames(), *real_frames(count)]
    spec = bundle.manifest.spec.preprocess
    (folder / "frames.bin").write_bytes(b"".join(preprocess(frame, spec)[0].tobytes() for frame in frames))
    print(f"{len(frames)} frames")


def compare(here: Path, there: Path, target: str) -> int:
    """Compares answers and prints what was found.

    Args:
        here: printed by the program on this machine.
        there: printed on the other one.
        target: that answered.

    Returns:
        The exit code, 1 for a difference that must not be.
    """
    mine, other = answers(here), answers(there)
    if len(mine) != len(other) or not mine:
        print(f"{target}: {len(mine)} answers here, {len(other)} there")
        return 1
    if target == "integer":
        wrong = [i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b]
        print(f"{target}: {len(mine)} answers, " + (f"other bytes at {wrong}" if wrong else "the same bytes"))
        return 1 if wrong else 0
    hc = max(abs(float(a["hc"]) - float(b["hc"])) for a, b in zip(mine, other, strict=True))
    share = max(
        abs(int(a["marked"]) - int(b["marked"])) / max(1, int(a["marked"])) for a, b in zip(mine, other, strict=True)
    )
    print(f"{target}: {len(mine)} answers, circumference within {hc:.3f} mm, marked pixels within {100 * share:.3f} %")
    # not "hc > limit": NaN must not pass
    return 0 if hc <= TOLERANCE["hc_mm"] and share <= TOLERANCE["marked"] else 1


def answers(path: Path) -> list[dict[str, str]]:
    """The lines of answers, as words by name."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[:1] == ["answer"]:
            found.append(dict(zip(words[1::2], words[2::2], strict=True)))
    return found


if __name__ == "__main__":
    sys.exit(main())
