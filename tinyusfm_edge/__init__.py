"""Training, evaluation, release and the command line of tinyusfm-edge.

The package at the top of the four.

    from tinyusfm_edge import ExportRequest, export_student, load_student

    student = load_student("fetal-head")                            # an nn.Module with its ModelSpec and ranges
    exported = export_student(ExportRequest(targets=("openvino",)))  # a verified bundle

``data`` reads images and tables, ``models`` and ``students`` are the networks, ``training`` makes them, ``evaluation``
measures them, ``release`` packages those that ship, ``report`` shows results as pages, ``calibrate`` and ``export``
lead to bundles, ``cli`` is the command line. Importing this package loads none of its modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from tinyusfm_edge.calibrate import CalibrateOptions as CalibrateOptions
    from tinyusfm_edge.calibrate import calibrate_student as calibrate_student
    from tinyusfm_edge.data.calibration_pool import open_pool as open_pool
    from tinyusfm_edge.export import ExportRequest as ExportRequest
    from tinyusfm_edge.export import export_student as export_student
    from tinyusfm_edge.students.choice import ForeignOptions as ForeignOptions
    from tinyusfm_edge.students.choice import load_student as load_student

_HOMES = {
    "calibrate": ("CalibrateOptions", "calibrate_student"),
    "data.calibration_pool": ("open_pool",),
    "export": ("ExportRequest", "export_student"),
    "students.choice": ("ForeignOptions", "load_student"),
}
if not TYPE_CHECKING:
    from tinyusfm_runtime.face import lazy_names as _lazy_names

    __getattr__, __dir__ = _lazy_names(__name__, _HOMES)

__all__ = [
    "CalibrateOptions",
    "ExportRequest",
    "ForeignOptions",
    "calibrate_student",
    "export_student",
    "load_student",
    "open_pool",
]
