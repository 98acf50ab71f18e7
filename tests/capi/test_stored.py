"""What was published stays: a bundle of every format opens, and the ABI only grows at its ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.capi.abi import listing
from tests.capi.binding import Library, Session
from tests.capi.conftest import ROOT
from tests.capi.stored import stored_parts
from tests.capi.test_same_answers import assert_same
from tinyusfm_runtime.bundle.manifest import SCHEMA_VERSION
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.session import Session as PythonSession

STORED = ROOT / "tests" / "data" / "bundles"
HC_MM = 21.53186206918605
"""Of the frame below, since schema 2."""


def frame() -> np.ndarray:
    y, x = np.mgrid[:60, :80]
    return np.where((y - 30) ** 2 + (x - 40) ** 2 < 300, 200, 10).astype(np.uint8)


@pytest.mark.parametrize("schema", range(2, SCHEMA_VERSION + 1))
def test_a_bundle_of_every_format_opens_in_both_runtimes(schema: int, library: Library, tmp_path: Path) -> None:
    """From the first release on they open for ever; before it a new format may replace the one that is stored."""
    bundle = tmp_path / "stored.bundle"
    shutil.copytree(STORED / f"schema{schema}", bundle)
    assert json.loads((bundle / "manifest.json").read_text())["schema"] == schema
    pixels = frame()
    with Session(library, bundle) as here, PythonSession.open(bundle) as there:
        want = there.predict(Frame(pixels=pixels, spacing_mm=(0.2, 0.2)))
        reading = here.predict(library.frame(pixels, spacing_row_mm=0.2, spacing_column_mm=0.2))
        assert_same(here, reading, want, placed=True)
        assert here.info().executed.decode() == there.executed == "integers from pixels to logits"
        assert reading.hc_mm == HC_MM


def test_the_stored_bundle_of_today_is_what_its_program_writes(tmp_path: Path) -> None:
    made = stored_parts().publish(tmp_path / "made.bundle")
    kept = STORED / f"schema{SCHEMA_VERSION}"
    for path in (path for path in kept.rglob("*") if path.is_file()):
        assert (made / path.relative_to(kept)).read_bytes() == path.read_bytes(), path.name


def test_the_abi_only_grows_at_its_ends() -> None:
    """What is listed stays as it is. To add: python -m tests.capi.abi > tests/capi/abi.json"""
    now, then = listing(), json.loads((ROOT / "tests" / "capi" / "abi.json").read_text(encoding="utf-8"))
    if now["pointer_bytes"] != then["pointer_bytes"]:
        pytest.skip("the list holds the places of 64-bit machines")
    assert now["abi"] == then["abi"]
    for name, fields in then["structs"].items():
        assert now["structs"][name][: len(fields)] == fields, name
    for kind in ("functions", "enums"):
        for name, what in then[kind].items():
            found = now[kind].get(name)
            assert found == what if kind == "functions" else what.items() <= found.items(), name
    assert len(then["functions"]) >= 28 and len(then["enums"]) >= 9


def test_everything_that_is_offered_is_listed() -> None:
    now, then = listing(), json.loads((ROOT / "tests" / "capi" / "abi.json").read_text(encoding="utf-8"))
    assert now["functions"].keys() == then["functions"].keys() and now["structs"].keys() == then["structs"].keys()
