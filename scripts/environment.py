"""Makes the project's own virtual environment and installs into it, with the tested versions.

``python3 scripts/environment.py --extras demo`` says what it is about to install and how large that is, creates
``.venv``, and installs this checkout editable with ``constraints.txt``. A torch of the pinned version that the
interpreter already has is used instead of a second copy, and so is an installed opencv-python: the headless build is
never put beside it. Run again with nothing changed, it does nothing.

It needs the standard library only. It knows no command of the toolkit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
"""The version that pyproject.toml pins (a test compares them)."""

DEMO_MB = (175, 660)
"""Download and disk of the demo without torch, measured on Linux x86-64, Python 3.11, with constraints.txt."""
TORCH_MB = (192, 755)
"""The same for torch's CPU build. Linux gets the CUDA build, several GB, where pip knows no CPU build."""
MORE_MB = {"test": (230, 700), "opencv": (60, 155), "lint": (27, 90), "docs": (20, 80), "bench": (50, 210)}
"""What an extra adds to the demo."""

SOURCES = ("pyproject.toml", "constraints.txt", "setup.py")
"""Files that decide what an environment holds."""


def main(argv: list[str] | None = None) -> int:
    """Command line of the script; returns the exit code."""
    parser = argparse.ArgumentParser(description="make the project's virtual environment")
    parser.add_argument("--extras", default="demo", help="extras of tinyusfm-edge, comma separated")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment goes")
    arguments = parser.parse_args(argv)
    extras = [extra for extra in arguments.extras.split(",") if extra]
    if sys.version_info < (3, 10):  # noqa: UP036 - make runs this file with whatever python3 is
        print(f"Python {sys.version.split()[0]} is too old, 3.10 at least: make PYTHON=python3.11", file=sys.stderr)
        return 2
    venv = arguments.venv
    key = environment_key()
    stamp = read_stamp(venv)
    if stamp.get("key") == key and set(extras) <= installed_extras(stamp):
        return 0
    try:
        reuse = has_pinned_torch(Path(sys.executable))
        python = create(venv, reuse=reuse)
        wanted = sorted(set(extras) | installed_extras(stamp))
        announce(venv, wanted, reuse=reuse)
        install(python, without_second_opencv(python, wanted))
    except subprocess.CalledProcessError as error:
        print(f"environment: {error.cmd[1:4]} failed, see above; nothing else was changed", file=sys.stderr)
        return error.returncode or 1
    (venv / "tinyusfm-edge.json").write_text(json.dumps({"key": key, "extras": wanted}), encoding="utf-8")
    return 0


def environment_key() -> str:
    """Hash of everything that decides what is installed."""
    digest = hashlib.sha256(sys.version.encode())
    for name in SOURCES:
        path = ROOT / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict[str, object]:
    """What an earlier run left in the environment, empty when there is none or it cannot be read."""
    try:
        stamp = json.loads((venv / "tinyusfm-edge.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def installed_extras(stamp: dict[str, object]) -> set[str]:
    """Extras that an earlier run installed."""
    extras = stamp.get("extras")
    return {str(extra) for extra in extras} if isinstance(extras, list) else set()


def has_pinned_torch(python: Path) -> bool:
    """Whether an interpreter can already import the torch that is pinned."""
    code = f"import importlib.metadata as m; raise SystemExit(m.version('torch').split('+')[0] != '{TORCH}')"
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def create(venv: Path, *, reuse: bool) -> Path:
    """Creates the environment unless it is there; returns its interpreter.

    Args:
        venv: its folder.
        reuse: let it see the packages of the interpreter that runs this script.
    """
    python = venv / "bin" / "python"
    if not python.is_file():
        inside = sys.prefix != sys.base_prefix
        option = ["--system-site-packages"] if reuse and not inside else []
        subprocess.run([sys.executable, "-m", "venv", *option, str(venv)], check=True)
        if reuse and inside:
            # an environment made from an environment sees neither's packages; a .pth file shows it the outer one's
            code = "import sysconfig; print(sysconfig.get_path('purelib'))"
            site = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
            (Path(site) / "outer.pth").write_text(sysconfig.get_path("purelib") + os.linesep, encoding="utf-8")
    return python


def announce(venv: Path, extras: list[str], *, reuse: bool) -> None:
    """Says what is about to be installed and how large it is."""
    parts = [DEMO_MB] + [MORE_MB.get(extra, (0, 0)) for extra in extras]
    download, disk = (sum(part[axis] for part in parts) for axis in (0, 1))
    if reuse:
        torch = f"torch {TORCH} is already here and is used"
    else:
        download, disk = download + TORCH_MB[0], disk + TORCH_MB[1]
        torch = f"with torch {TORCH}, CPU build (where pip offers the CUDA build alone, several GB more)"
    print(
        f"Installing tinyusfm-edge[{','.join(extras)}] into {venv}:\n"
        f"  about {download} MB to download, {disk} MB on disk, {torch}.",
        flush=True,
    )


def without_second_opencv(python: Path, extras: list[str]) -> list[str]:
    """Drops the headless OpenCV where another build of cv2 is installed, since both write the same folder."""
    if "opencv" not in extras:
        return extras
    code = (
        "import importlib.metadata as m; names = {(d.metadata['Name'] or '').lower() for d in m.distributions()};"
        "print(*names & {'opencv-python', 'opencv-contrib-python', 'opencv-contrib-python-headless'})"
    )
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    if found:
        print(f"  {found} is installed and is used; opencv-python-headless is left out.", flush=True)
        return [extra for extra in extras if extra != "opencv"]
    return extras


def install(python: Path, extras: list[str]) -> None:
    """Installs this checkout, editable, with the tested versions of what the extras bring."""
    target = f"{ROOT}[{','.join(extras)}]"
    # someone who watches sees pip's progress; a log keeps errors only
    quiet = [] if sys.stdout.isatty() else ["--quiet", "--quiet"]
    command = [str(python), "-m", "pip", "install", *quiet, "--disable-pip-version-check"]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), "--editable", target], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
