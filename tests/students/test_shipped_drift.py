"""The shipped drift statistic on real frames: patients it never saw pass, other organs, probes and Doppler do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyusfm_calibration.tables import read_table_rows
from tinyusfm_edge import students
from tinyusfm_edge.data.frames import read_row
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.verify.artefact import load_target
from tinyusfm_export.verify.engine_run import open_engine
from tinyusfm_runtime import plugins
from tinyusfm_runtime.drift import DriftMonitor, DriftStatistic
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.results import DriftReading
from tinyusfm_runtime.sources import open_source

pytestmark = pytest.mark.needs_shared
PATIENTS = 50
Outputs = dict[str, np.ndarray]
FOREIGN = {
    "cardiac": "cardiac-0011_320.mp4",
    "lung": "lung_320.mp4",
    "gallbladder and kidney": "ruq-simple_320.mp4",
    "vein": "soft-tissue_320.mp4",
    "colour Doppler": "low-frame-count_320.mp4",
    "colour cine": "examples_ybr_color.dcm",
}
"""What must alarm; none of it was used for the statistic."""


@pytest.fixture(scope="module")
def statistic() -> DriftStatistic:
    """The shipped one."""
    found = students.drift("fetal-head")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def listen(statistic: DriftStatistic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Frame], Outputs]]:
    """The INT8 artefact in its own engine: frame -> auxiliary outputs."""
    target = next((t for t in ("ov", "ort") if plugins.available("targets", t).usable), None)
    if target is None:
        pytest.skip("no inference library is installed")
    loaded = students.load("fetal-head")
    graph = build_graph(loaded.module, loaded.spec, auxiliary=statistic.auxiliary)
    decision = decide(graph, "int8", loaded.ranges, policy=PtqPolicy(rest_precision="f32"))
    built = load_target(target).build(graph, decision, tmp_path_factory.mktemp("built"))
    files = {path.name: path.read_bytes() for path in built.files}
    with open_engine(target, files, loaded.spec, threads=1, rest_precision=built.rest_precision) as engine:
        yield lambda frame: {
            name: np.array(value)
            for name, value in engine.run(preprocess(frame, loaded.spec.preprocess)[0]).items()
            if name != "logits"
        }


def watch(monitor: DriftMonitor, seen: Iterable[tuple[Frame, Outputs]]) -> list[DriftReading]:
    """Readings of a stream."""
    monitor.reset()
    return [monitor.observe(SimpleNamespace(auxiliary=aux, valid=True, drift=None), frame) for frame, aux in seen]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def patients(listen: Callable[[Frame], Outputs], shared_folder: Path) -> list[tuple[Frame, Outputs]]:
    """One frame of each of some patients of the test split."""
    folder = shared_folder / "data" / "hc18"
    rows = {row.group: row for row in read_table_rows(folder) if row.split == "test"}
    frames = (read_row(row).frame for row in itertools.islice(rows.values(), PATIENTS))
    return [(frame, listen(frame)) for frame in frames]


@pytest.fixture(scope="module")
def clips(listen: Callable[[Frame], Outputs], shared_folder: Path) -> dict[str, list[tuple[Frame, Outputs]]]:
    """Fifteen frames of each foreign clip."""
    found = {}
    for what, name in FOREIGN.items():
        with open_source(str(shared_folder / "data" / "clips" / name)) as source:
            found[what] = [(frame, listen(frame)) for frame in itertools.islice(source, 15)]
    return found


def test_new_patients_are_strange_no_more_often_than_declared(
    statistic: DriftStatistic, patients: list[tuple[Frame, Outputs]]
) -> None:
    readings = watch(DriftMonitor(statistic, statistic.auxiliary), patients)
    assert len(readings) == PATIENTS and readings[0].kind == "features"
    wanted = statistic.false_alarms / 2 * PATIENTS
    strange = sum(reading.strange for reading in readings)
    # three standard deviations of as many coins: a rate, not a guarantee for these very patients
    assert strange <= wanted + 3 * wanted**0.5
    assert not any(reading.alarm for reading in readings)


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_clips_alarm(
    what: str, statistic: DriftStatistic, clips: dict[str, list[tuple[Frame, Outputs]]]
) -> None:
    readings = watch(DriftMonitor(statistic, statistic.auxiliary, window=15), clips[what])
    assert not any(reading.alarm for reading in readings[:14]), "no decision before the window is full"
    assert readings[14].alarm and readings[-1].alarm
    assert np.mean([reading.strange for reading in readings]) >= 0.8


def test_grey_levels_alone_see_most_of_them_too_and_say_what_they_are(
    statistic: DriftStatistic,
    patients: list[tuple[Frame, Outputs]],
    clips: dict[str, list[tuple[Frame, Outputs]]],
) -> None:
    monitor = DriftMonitor(statistic, (), window=15)
    assert monitor.kind == "grey levels"
    assert sum(r.strange for r in watch(monitor, patients)) <= 0.1 * PATIENTS
    alarmed = [what for what, seen in clips.items() if watch(monitor, seen)[-1].alarm]
    assert len(alarmed) >= 4
    coloured = watch(monitor, clips["colour Doppler"])[-1]
    assert coloured.kind == "grey levels" and coloured.strange


def test_features_of_the_right_organ_do_not_alarm_whatever_the_clip_is_called(
    statistic: DriftStatistic,
    patients: list[tuple[Frame, Outputs]],
    clips: dict[str, list[tuple[Frame, Outputs]]],
) -> None:
    # the control: only what is seen may count
    exchanged = [own for own, _ in zip(patients, clips["cardiac"], strict=False)]
    assert not any(r.alarm for r in watch(DriftMonitor(statistic, statistic.auxiliary, window=15), exchanged))
    mixed = [(frame, aux) for (frame, _), (_, aux) in zip(patients, clips["cardiac"], strict=False)]
    assert watch(DriftMonitor(statistic, statistic.auxiliary, window=15), mixed)[-1].alarm, "tokens alone tell"
