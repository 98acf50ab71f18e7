"""Broken on purpose: bundles, input files, killed runs, opening time.

Prints a table; exit code 1 where a limit is missed.

    python benchmarks/broken.py --scale 0.01 --table table.md

R6: random mutations of every file of a bundle, unsigned, signed, and with the manifest hashed again under a demanded
signature; external data, pickles, archives and folders with traps. R7: export, calibrate, distill and bundle sign are
killed at random moments, and run out of room on a memory disk (root mounts one; others have the size of files limited).
R8: mutated DICOM, .mha, manifest, checkpoint, recipe, split.csv and calibration files meet their readers. R11: a bundle
opens. Each row of the table names its limit.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tinyusfm_runtime
from broken_cases import external_data, folders, weights_files
from broken_outcome import TABLE_HEADER, Outcome, mutate, try_once
from broken_outcome import hashed_again as manifest_hashed_again
from broken_runs import commands, full_disk, kill_runs, make_inputs, memory_disk
from tinyusfm_runtime.bundle.manifest import MANIFEST_NAME, read_manifest
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.trust.policy import Trust
from tinyusfm_runtime.trust.rollback import ReadOnlyFloor
from tinyusfm_runtime.trust.statement import SIGNATURE_NAME

OPEN_LIMIT_S, READ_LIMIT_S, RSS_LIMIT_MB, START_LIMIT_S = 1.0, 5.0, 1024.0, 1.0
PARTS = ("R6", "R7", "R8", "R11")
SHIPPED = Path(tinyusfm_runtime.__file__).parent / "bundles" / "fetal-head.bundle"
KINDS = ("dicom", "mha", "manifest", "checkpoint", "recipe", "split.csv", "calibration")


def attack_bundle(bundle: Path, count: int, seed: int, trust: Trust | None, *, hashed_again: bool) -> Outcome:
    """R6: mutations over all files; with ``hashed_again`` the manifest names the new hashes.

    Args:
        bundle: the bundle, signed where ``trust`` is given.
        count: of the mutations.
        seed: of the draws.
        trust: what is demanded, or None.
        hashed_again: an attacker rewrites the manifest too.
    """
    signed = "signed" if trust is not None else "unsigned"
    free = hashed_again and trust is None
    outcome = Outcome(
        name=f"R6 {signed}{', hashed again' if hashed_again else ''}",
        limit="typed errors, 1 s" if free else "refused, 1 s",
    )
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "b.bundle"
        shutil.copytree(bundle, place)
        manifest = read_manifest((place / MANIFEST_NAME).read_bytes())
        names = sorted(manifest.files) if hashed_again else [*sorted(manifest.files), MANIFEST_NAME]
        names += [SIGNATURE_NAME] if trust is not None and not hashed_again else []
        for _ in range(count):
            name = rng.choice(names)
            before = {path: (place / path).read_bytes() for path in {name, MANIFEST_NAME}}
            damaged = mutate(before[name], rng)
            if damaged == before[name]:
                continue
            _write(place / name, damaged)
            if hashed_again:
                _write(place / MANIFEST_NAME, manifest_hashed_again(before[MANIFEST_NAME], name, damaged))
            found = try_once(outcome, lambda: Bundle.open(place, trust=trust, on_device=False), OPEN_LIMIT_S)
            if found == "accepted" and not free:
                outcome.faults.append(f"{name} was changed and accepted")
            for path, raw in before.items():
                _write(place / path, raw)
    return outcome


def _write(place: Path, content: bytes) -> None:
    place.unlink()
    place.write_bytes(content)


@contextmanager
def signed_copy(bundle: Path) -> Iterator[tuple[Path, Trust]]:
    """A signed copy of a bundle and what demands its signature."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    from tinyusfm_edge.release.sign import key_signer, sign_bundle
    from tinyusfm_runtime.trust.store import TrustStore

    key = ec.generate_private_key(ec.SECP256R1())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (root / "key.pem").write_bytes(secret)
        (root / "trust").mkdir()
        (root / "trust" / "release.pub").write_bytes(public)
        listed = {"version": 1, "keys": [{"file": "release.pub", "roles": ["release"]}], "revoked": []}
        (root / "trust" / "trust.json").write_text(json.dumps(listed), encoding="utf-8")
        shutil.copytree(bundle, root / "signed.bundle")
        sign_bundle(root / "signed.bundle", key_signer(root / "key.pem"), security_version=1)
        yield root / "signed.bundle", Trust(store=TrustStore.open(root / "trust"), floor=ReadOnlyFloor())


def fuzz_readers(seeds: dict[str, tuple[bytes, Callable[[Path], object]]], count: int, seed: int) -> list[Outcome]:
    """R8: mutated files meet their readers.

    Args:
        seeds: kind -> (good content, reader of a path).
        count: mutations of all kinds together.
        seed: of the draws.
    """
    rng, outcomes = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        for kind, (good, reader) in seeds.items():
            outcome = Outcome(name=f"R8 {kind}", limit="typed errors, 5 s, 1 GB")
            place = Path(folder) / kind
            place.mkdir()
            for _ in range(max(1, count // len(seeds))):
                damaged = good
                for _ in range(rng.randrange(1, 4)):
                    damaged = mutate(damaged, rng)
                file = place / FILE_NAMES[kind]
                file.write_bytes(damaged)
                try_once(outcome, lambda reader=reader, file=file: reader(file), READ_LIMIT_S)  # type: ignore[misc]
            outcomes.append(outcome)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    outcomes[-1].counts[f"peak {peak_mb:.0f} MB"] = 1
    if peak_mb > RSS_LIMIT_MB:
        outcomes[-1].faults.append(f"{peak_mb:.0f} MB, {RSS_LIMIT_MB:.0f} allowed")
    return outcomes


FILE_NAMES = {
    "dicom": "a.dcm", "mha": "a.mha", "manifest": "manifest.json", "checkpoint": "a.safetensors",
    "recipe": "a.toml", "split.csv": "split.csv", "calibration": "a.json",
}  # fmt: skip


def reader_seeds(manifest: bytes) -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """Good files and their readers.

    Args:
        manifest: of a bundle.
    """
    import numpy as np
    from pydicom.data import get_testdata_file
    from safetensors.numpy import save

    import tinyusfm_export
    from tinyusfm_calibration.tables import read_table_rows
    from tinyusfm_edge.models.weights_file import read_weights_file
    from tinyusfm_export.quantize.calibration_file import read_calibration_file
    from tinyusfm_export.recipe import load_recipe
    from tinyusfm_runtime.sources import open_source

    def frames(path: Path) -> None:
        with open_source(str(path)) as source:
            for _ in source:
                pass

    header = "ObjectType = Image\nNDims = 2\nDimSize = 32 24\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    mha = header.encode() + np.arange(32 * 24, dtype=np.uint8).tobytes()
    recipe = (Path(tinyusfm_export.__file__).parent / "recipes" / "laptop_cpu.toml").read_bytes()
    table = "file,split,group,label\n1.png,train,a,x\n2.png,val,b,y\n"
    dicom = Path(str(get_testdata_file("examples_rgb_color.dcm", download=False))).read_bytes()
    return {
        "dicom": (dicom, frames),
        "mha": (mha, frames),
        "manifest": (manifest, lambda path: read_manifest(path.read_bytes())),
        "checkpoint": (save({"a": np.ones((3, 4), np.float32)}), read_weights_file),
        "recipe": (recipe, lambda path: load_recipe(str(path))),
        "split.csv": (table.encode(), lambda path: read_table_rows(path.parent, ("file", "split"))),
        "calibration": (_calibration_file(), read_calibration_file),
    }


def _calibration_file() -> bytes:
    """A small calibration file of phantoms."""
    from tinyusfm_calibration.ranges import Ranges
    from tinyusfm_calibration.sets import describe_frames, phantom_frames
    from tinyusfm_export.quantize.calibration_file import CalibrationFile

    frames = describe_frames("phantoms", phantom_frames(range(16)))
    hashes = tuple(sorted(frames.hashes))
    ranges = Ranges(tensors={"a": (-1.0, 2.0)}, method="minmax", set_id=frames.id, frame_sha256=hashes)
    return json.dumps(CalibrationFile(frames=frames, ranges=ranges).to_json()).encode()


def open_time(bundle: Path, count: int) -> Outcome:
    """R11: hash, load, golden subset and warm-up, in a fresh process each time.

    Args:
        bundle: to be opened.
        count: of the starts.
    """
    from tinyusfm_runtime.latency import cold_start

    outcome = Outcome(name="R11 open", limit="1 s on a quiet machine")
    for _ in range(count):
        took = cold_start(bundle).cold_load_ms / 1e3
        outcome.tries += 1
        outcome.slowest_s = max(outcome.slowest_s, took)
        outcome.counts["opened"] += 1
    if outcome.slowest_s > START_LIMIT_S:
        outcome.faults.append(f"{outcome.slowest_s:.2f} s, {START_LIMIT_S:g} allowed on a quiet machine")
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="broken on purpose")
    parser.add_argument("bundle", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--scale", type=float, default=1.0, help="share of every count, such as 0.01 for a short run")
    parser.add_argument("--mutations", type=int, default=1000, help="of each of the signed and the unsigned bundle")
    parser.add_argument("--fuzz", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--opens", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--table", type=Path, help="also write a Markdown table")
    asked = parser.parse_args(argv)
    if not 0 < asked.scale <= 100:
        parser.error("--scale: a number above 0, such as 0.01")
    rows = []
    for outcome in outcomes(asked):
        print(outcome.row(), flush=True)
        rows.append(outcome)
        if asked.table is not None:
            lines = [TABLE_HEADER, *(row.table_row() for row in rows)]
            asked.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any(outcome.faults for outcome in rows))


def outcomes(asked: argparse.Namespace) -> Iterator[Outcome]:
    """Every attack in turn.

    Args:
        asked: the command line.
    """
    if "R6" in asked.only:
        yield from _bundles(asked)
    if "R7" in asked.only:
        yield from _runs(asked)
    if "R8" in asked.only:
        count = _scaled(asked.fuzz, asked.scale)
        yield from fuzz_readers(reader_seeds((asked.bundle / MANIFEST_NAME).read_bytes()), count, asked.seed)
    if "R11" in asked.only:
        yield open_time(asked.bundle, asked.opens)


def _scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def _bundles(asked: argparse.Namespace) -> Iterator[Outcome]:
    count = _scaled(asked.mutations, asked.scale)
    yield attack_bundle(asked.bundle, count, asked.seed, None, hashed_again=False)
    yield attack_bundle(asked.bundle, max(1, count // 4), asked.seed, None, hashed_again=True)
    with signed_copy(asked.bundle) as (signed, trust):
        for again in (False, True):
            yield attack_bundle(signed, count, asked.seed + 1, trust, hashed_again=again)
    yield folders(asked.bundle)
    yield from weights_files()
    yield external_data(asked.bundle)


def _runs(asked: argparse.Namespace) -> Iterator[Outcome]:
    """Four commands, each with its share of the kills and of the full disks."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, out, disk = (Path(folder) / name for name in ("inputs", "out", "disk"))
        for place in (inputs, out, disk):
            place.mkdir()
        make_inputs(inputs)
        shutil.copytree(asked.bundle, out / "signed.bundle")
        for command in commands(inputs, out):
            yield kill_runs(command, _scaled(asked.kills // 4, asked.scale), asked.seed)
        with memory_disk(disk) as mounted:
            shutil.copytree(asked.bundle, disk / "signed.bundle")
            for command in commands(inputs, disk):
                yield full_disk(command, _scaled(asked.full_disks // 4, asked.scale), tmpfs=mounted)


if __name__ == "__main__":
    raise SystemExit(main())
