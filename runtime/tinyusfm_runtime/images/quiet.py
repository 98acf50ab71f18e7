"""Quiet: pydicom neither logs nor warns while it reads or writes.

Its warnings quote element values, which may name patients.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Silences pydicom's logger and all warnings inside the context."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


__all__ = ["quiet_pydicom"]
