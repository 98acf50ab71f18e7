"""The camera source on a real driver: vivid, on a kernel of its own under QEMU; unplugged and plugged in again.

Optional: TINYUSFM_VIVID names the folder of unpacked packages that scripts/vivid.py describes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_capture_and_unplugging_on_vivid() -> None:
    files = os.environ.get("TINYUSFM_VIVID")
    if not files:
        pytest.skip("set TINYUSFM_VIVID to a folder of unpacked packages (scripts/vivid.py says which)")
    command = [sys.executable, str(ROOT / "scripts" / "vivid.py"), "--files", files, "--timeout", "300"]
    guest = str(ROOT / "tests" / "fakes" / "vivid_guest.py")
    done = subprocess.run([*command, guest], capture_output=True, text=True, cwd=ROOT, timeout=900, check=False)
    assert done.returncode == 0 and "VIVID OK" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
