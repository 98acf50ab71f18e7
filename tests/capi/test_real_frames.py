"""100 real frames of heads and of other organs read alike; make capi-proof does it with real engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.capi.binding import Library, Session
from tests.capi.conftest import stub_parts
from tests.capi.real_frames import given, real_frames
from tests.capi.test_same_answers import assert_same, rules, statistic
from tests.conftest import tiny_spec
from tinyusfm_runtime.bundle.manifest import DRIFT_FILE
from tinyusfm_runtime.session import Session as PythonSession
from tinyusfm_runtime.spec import PreprocessSpec, SecondPass

HEADS, FROM_EACH_CLIP = 75, 6


@pytest.mark.needs_shared
@pytest.mark.usefixtures("stub_plug_in")
def test_real_frames_read_alike(library: Library, shared_folder: Path, tmp_path: Path) -> None:
    spec = tiny_spec(
        second_pass=SecondPass.SMALL, reading=rules("head"), preprocess=PreprocessSpec(height=112, width=112)
    )
    parts = stub_parts("tokens=7", spec=spec).with_files()
    whole = type(parts)(
        spec=parts.spec, artefacts=parts.artefacts, files={**parts.files, DRIFT_FILE: statistic(7).to_bytes()}
    )
    bundle, count, shapes = whole.publish(tmp_path / "real.bundle"), 0, set()
    with Session(library, bundle) as here, PythonSession.open(bundle) as there:
        for frame in real_frames(shared_folder, HEADS, FROM_EACH_CLIP):
            assert_same(here, here.predict(given(library, frame)), there.predict(frame), placed=True)
            count += 1
            shapes.add(frame.pixels.shape)
    assert count >= 100 and len(shapes) > 5
