"""Exports the shipped student, verifies the bundle against PyTorch, and prints what was measured.

pip install '.[export,openvino,dicom]'
python examples/export_and_verify.py out.bundle openvino
"""

from __future__ import annotations

import sys
from pathlib import Path

from tinyusfm_edge import ExportRequest, export_student, load_student
from tinyusfm_export import verify_bundle


def main(out: Path, target: str) -> bool:
    """Exports and verifies; True if the bundle holds its gate."""
    request = ExportRequest(student="fetal-head", targets=(target,), precisions=("int8",), out=out, compare=False)
    exported = export_student(request)
    for artefact in exported.result.artefacts:
        print(f"published    {artefact.name} in {exported.result.path}")

    # the whole gate again, as anybody who has the student could run it
    report = verify_bundle(exported.result.path, module=load_student("fetal-head").module)
    for name, demand, measured, limit, verdict in report.table():
        print(f"{name:<16} {demand:<40} {measured:>10} {limit:>10}  {verdict}")
    print(report.headline)
    return bool(report)


if __name__ == "__main__":
    sys.exit(0 if main(Path(sys.argv[1]), *sys.argv[2:] or ["openvino"]) else 1)
