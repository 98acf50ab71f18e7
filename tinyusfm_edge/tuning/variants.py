"""Students become bundles.

One for every target that works here in every precision that it writes, each through its gate.

A bundle stands as it is, and so do the bundles of a folder, which are one variant. What a student gives is kept in the
run's folder and made once: a killed run finds it again. A target and precision that misses its gate gives no bundle,
only the reason.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_edge.tuning.candidates import TuneVariant
from tinyusfm_runtime import plugins
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.bundle.manifest import MANIFEST_NAME
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import GateError, InputError, MissingExtra, UnsupportedError
from tinyusfm_runtime.strict_json import parse_json

if TYPE_CHECKING:
    from tinyusfm_edge.export import ExportRequest
    from tinyusfm_export.pipeline import Progress

PRECISIONS = ("int8", "bf16", "fp32")
"""Tried where nothing is said: what differs in speed on a CPU."""
MISSED_NAME, OF_NAME = "missed.json", "of.json"
"""Files in a variant's folder: what gave no bundle, and why; and what its bundles were made of."""
Export = Callable[["ExportRequest", "Progress | None"], object]
"""Writes one bundle; raises as ``export_student`` does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantBundles:
    """What a word on the command line stands for.

    Attributes:
        name: of the variant.
        bundles: its bundles; several where a student was exported for several targets.
        missed: ``target-precision`` -> why there is none.
    """

    name: str
    bundles: tuple[Path, ...]
    missed: dict[str, str] = field(default_factory=dict)

    def open(self) -> list[TuneVariant]:
        """Opens its bundles, all under the variant's name.

        Raises:
            BundleError, InputError: one of them cannot be used.
        """
        return [TuneVariant.of(bundle, self.name) for bundle in self.bundles]


def ready_bundles(typed: str) -> VariantBundles | None:
    """The bundles that a word names, or None where it names a student.

    A bundle's folder, a folder that holds bundles and nothing else (one variant then), or, where no torch could export
    a student, the name of a bundle that ships.

    Args:
        typed: on the command line.
    """
    place = Path(typed)
    if (place / MANIFEST_NAME).is_file():
        return VariantBundles(name=place.resolve().name.removesuffix(".bundle"), bundles=(place,))
    if place.is_dir():
        inside = tuple(sorted(path.parent for path in place.glob(f"*/{MANIFEST_NAME}")))
        if not inside:
            raise InputError(f"{typed} is a folder without a bundle: give a bundle, a folder of bundles or a student")
        return VariantBundles(name=place.resolve().name, bundles=inside)
    if find_spec("torch") is None:
        return VariantBundles(name=typed, bundles=(Bundle.open(typed).path,))
    return None


def combinations(targets: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Targets and precisions that can be written and run here.

    Args:
        targets: names or aliases; empty is every target whose engine works here.
        precisions: names; empty is ``PRECISIONS``.

    Raises:
        InputError: no such target, or nothing that can be tried.
    """
    named = [plugins.canonical("targets", target) for target in targets] or [
        name
        for name in plugins.names("targets")
        if plugins.available("targets", name).usable and plugins.available("engines", name).usable
    ]
    found = []
    for target in named:
        writes = plugins.load("targets", target).Target().precisions
        for precision in precisions or PRECISIONS:
            lacks_bf16 = precision == "bf16" and not machine_card().has_bf16
            if precision in writes and not lacks_bf16:
                found.append((plugins.public_name(target), precision))
    if not found:
        raise InputError("no target and precision can be tried here: tinyusfm-edge doctor says what is missing")
    return found


def export_variant(
    student: str, folder: Path, pairs: Sequence[tuple[str, str]], export: Export, base: ExportRequest,
    progress: Callable[[str, float], None] | None = None,
) -> VariantBundles:  # fmt: skip
    """Exports a student once for each target and precision.

    Args:
        student: name of a shipped student, or path of a weights file.
        folder: where its bundles go; what is there already is kept.
        pairs: targets and precisions.
        export: writes one bundle.
        base: data folder, gate and whatever else holds for all of them.
        progress: progress.

    Raises:
        InputError: the student cannot be used, or nothing of it passed.
    """
    from dataclasses import replace

    name = Path(student).stem if Path(student).suffix else Path(student).name
    _check_same(folder, made_of(student, base.data))
    missed = _read_missed(folder / MISSED_NAME)
    bundles, cannot = list[Path](), dict[str, str]()
    for number, (target, precision) in enumerate(pairs):
        what = f"{target}-{precision}"
        place = folder / f"{name}-{what}.bundle"
        if progress is not None:
            progress(f"export {name} {what}", number / len(pairs))
        if what not in missed and not (place / MANIFEST_NAME).is_file():
            request = replace(
                base, student=student, targets=(target,), precisions=(precision,), out=place, compare=False
            )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    export(request, None)
            except (MissingExtra, UnsupportedError) as error:
                cannot[what] = " ".join(str(error).split())[:300]  # another run may find it installed
                continue
            except GateError as error:
                missed[what] = " ".join(str(error).split())[:300]
                write_file(folder / MISSED_NAME, (json.dumps(missed, indent=1) + "\n").encode(), "what was missed")
                continue
        if what not in missed:
            bundles.append(place)
    wanted = {f"{target}-{precision}" for target, precision in pairs}
    missed = {key: why for key, why in {**missed, **cannot}.items() if key in wanted}
    if not bundles:
        raise InputError(f"{name}: nothing of it passed its gate: {'; '.join(f'{k}: {v}' for k, v in missed.items())}")
    return VariantBundles(name=name, bundles=tuple(bundles), missed=missed)


def made_of(student: str, data: Path | None) -> dict[str, str]:
    """What the bundles of a student depend on.

    That is what may change under the same name.

    Args:
        student: name of a shipped student, or path of a weights file.
        data: labelled frames of the gate, or None.
    """
    from tinyusfm_edge import __version__, students

    file = Path(student)
    if not file.is_file() and student in students.names():
        file = students.folder(student) / students.WEIGHTS
    content = file.read_bytes() if file.is_file() else b""
    return {
        "student": hashlib.sha256(content).hexdigest(),
        "data": "" if data is None else str(data.absolute()),
        "toolkit": __version__,
    }


def _check_same(folder: Path, now: dict[str, str]) -> None:
    """Keeps what the bundles of a folder are made of, and refuses to mix in others.

    Raises:
        InputError: the folder holds bundles of something else.
    """
    place = folder / OF_NAME
    if not place.is_file():
        write_file(place, (json.dumps(now, indent=1) + "\n").encode(), "what the bundles are made of")
        return
    then = _read_missed(place)
    if differ := sorted(key for key in now if then.get(key) != now[key]):
        raise InputError(
            f"{folder} holds bundles made of something else ({', '.join(differ)}): give --fresh, or another --out"
        )


def _read_missed(place: Path) -> dict[str, str]:
    try:
        found = parse_json(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


__all__ = [
    "MISSED_NAME",
    "OF_NAME",
    "PRECISIONS",
    "Export",
    "VariantBundles",
    "combinations",
    "export_variant",
    "made_of",
    "ready_bundles",
]
