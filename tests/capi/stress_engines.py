"""5,000 predictions, a stream and openings in each real engine, without growth: make capi-stress.

Not part of the suite: it takes minutes. The stub engine's 100,000 predictions and 1,000 openings are (test_memory.py).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.capi.conftest import ROOT, engine_folders, run
from tests.conftest import make_parts

PREDICTS = int(os.environ.get("TUSFM_STRESS_PREDICTS", "5000"))
OPENS = int(os.environ.get("TUSFM_STRESS_OPENS", "60"))
PREDICTS_KB, OPENS_KB = 2048, 24 * 1024
"""Most that resident memory may grow over all predictions, and over all openings: libraries keep some for later."""


@pytest.mark.parametrize("engine", ["ort", "ov", "integer"])
def test_a_real_engine_does_not_grow(
    engine: str, build_folder: Path, tmp_path: Path, tiny_files: Callable[[str], dict[str, bytes]]
) -> None:
    bundle, folder = tmp_path / "tiny.bundle", engine_folders().get(engine)
    if engine == "integer":
        shutil.copytree(ROOT / "tests" / "data" / "bundles" / "schema2", bundle)
    elif folder is None:
        pytest.skip(f"the library of engine {engine} is not installed")
    else:
        make_parts({engine: tiny_files(engine)}).publish(bundle)
    places = {} if folder is None else {"TUSFM_ENGINES": str(folder)}
    said = run(build_folder / "tests" / "growth", bundle, PREDICTS, OPENS, env={**os.environ, **places})
    print(f"\n{engine}: {said.strip()}")
    found = {name: int(value) for name, value in re.findall(r"(\w+) (-?\d+)", said)}
    assert found["memory_kb"] < PREDICTS_KB and found["opens_kb"] < OPENS_KB, found
    if engine == "integer":
        assert found["allocations"] == 0
