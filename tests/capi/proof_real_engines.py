"""Real engines on real frames, C and Python to the bit: make capi-proof BUNDLE=fetal-head.bundle.

Every artefact of the bundle is opened in both runtimes, by the library that is installed here, and answers the same 100
frames; readings, masks and drift are equal to the bit, times aside.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.capi.binding import Library, Session
from tests.capi.conftest import engine_folders
from tests.capi.real_frames import given, real_frames
from tests.capi.test_same_answers import assert_same
from tinyusfm_runtime.session import Session as PythonSession

BUNDLE = os.environ.get("TUSFM_PROOF_BUNDLE", "")
ENGINES = ("integer", "ort", "ov")


def artefacts() -> list[tuple[str, str, str]]:
    """(target, engine, precision) of the bundle's artefacts that the C runtime has an engine for."""
    if not BUNDLE:
        return []
    data = json.loads((Path(BUNDLE) / "manifest.json").read_text(encoding="ascii"))
    found = [(entry["target"], entry["engine"], entry["precision"]) for entry in data["artefacts"]]
    return [artefact for artefact in found if artefact[1] in ENGINES]


@pytest.mark.needs_shared
@pytest.mark.parametrize(("target", "engine", "precision"), artefacts() or [("", "", "")])
def test_a_real_engine_reads_real_frames_alike(
    target: str, engine: str, precision: str, library: Library, shared_folder: Path
) -> None:
    if not BUNDLE:
        pytest.skip("name a bundle: make capi-proof BUNDLE=fetal-head.bundle")
    folder = engine_folders().get(engine)
    options = {} if folder is None else {"engine_folder": str(folder)}
    said: dict[str, int] = {}
    with (
        Session(library, Path(BUNDLE), target=target, precision=precision, threads=1, **options) as here,
        PythonSession.open(BUNDLE, target=target, precision=precision, threads=1) as there,
    ):
        assert here.info().engine.decode() == there.engine_description
        for frame in real_frames(shared_folder, 75, 6):
            want = there.predict(frame)
            assert_same(here, here.predict(given(library, frame)), want, placed=True)
            for word in (want.reading.value, f"second pass {want.second_pass.value}", "frames"):
                said[word] = said.get(word, 0) + 1
        print(f"\n{here.info().engine.decode()}: {said}")
    assert said["frames"] >= 100
