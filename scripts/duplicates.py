"""Code that stands twice, by pylint's check in an environment of its own: ``make duplicates``.

Six equal lines, comments, docstrings, imports and signatures left out, are a fault; in tests it is twelve. The tool is
installed into a temporary environment and is no dependency of the toolkit. What looks alike and stays has its reason in
CONTRIBUTING.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = "pylint==4.1.4"
ROOT = Path(__file__).resolve().parents[1]
CHECKS = {
    6: ("tinyusfm_edge", "export", "runtime", "calibration", "benchmarks", "scripts"),
    12: ("tests",),
}
"""Equal lines that are a fault -> folders."""


def pylint_line(python: Path, lines: int, folders: tuple[str, ...]) -> list[str]:
    """The command that checks some folders."""
    kinds = ("comments", "docstrings", "imports", "signatures")
    return [
        *(str(python), "-m", "pylint", "--disable=all", "--enable=duplicate-code", "--score=n", "--recursive=y"),
        *(f"--ignore-{kind}=y" for kind in kinds),
        f"--min-similarity-lines={lines}",
        *folders,
    ]


def main() -> int:
    """Installs the tool, runs it over all folders, and gives the worst exit code."""
    with tempfile.TemporaryDirectory(prefix="duplicates-") as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", TOOL], check=True)
        codes = [
            subprocess.run(pylint_line(python, lines, folders), cwd=ROOT).returncode
            for lines, folders in CHECKS.items()
        ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
