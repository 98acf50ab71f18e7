"""The second build of ``export --twice``, compared with the first.

The same request runs in a fresh process with another hash seed.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tinyusfm_edge.data.doubts import Doubts
from tinyusfm_edge.export import ExportRequest, export_student
from tinyusfm_export.twice import Twice, compare_builds
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import EdgeError, GateError

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

HASH_SEED = "4711"
"""Of the second process: the order of sets and of what hangs on it is another one than here."""


def build_again(request: ExportRequest, first: Path) -> Twice:
    """Builds a bundle a second time and compares.

    Args:
        request: as the first build had it.
        first: the first build's bundle.

    Returns:
        What differs; the second bundle is thrown away.

    Raises:
        GateError: the second build failed, where the first did not.
    """
    context = multiprocessing.get_context("spawn")
    reading = request.reading
    if reading.doubts is not None:  # what the first build reported is not reported again, and not refused either
        reading = replace(reading, doubts=Doubts())
    with TemporaryDirectory() as folder:
        second = Path(folder) / "second.bundle"
        answers = context.SimpleQueue()
        with _variable("PYTHONHASHSEED", HASH_SEED):
            process = context.Process(target=_build, args=(replace(request, out=second, reading=reading), answers))
            process.start()
        process.join()
        failed = "its process ended without a word" if answers.empty() else answers.get()
        if failed:
            raise GateError(f"the second build of the same parts failed: {failed}")
        return compare_builds(Bundle.open(first, on_device=False), Bundle.open(second, on_device=False))


def _build(request: ExportRequest, answers: SimpleQueue[Any]) -> None:
    """What the second process does."""
    try:
        export_student(request)
    except EdgeError as error:
        answers.put(str(error))
    else:
        answers.put("")


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


__all__ = ["HASH_SEED", "build_again"]
