"""How this package was installed, and so how an extra of it can be.

As long as the distribution is published nowhere, its bare name would be whatever a stranger registers under it. So the
line names what this very installation came from: a checkout or a wheel, known from ``direct_url.json`` of the installed
metadata (PEP 610), else the checkout that the sources lie in.
"""

from __future__ import annotations

import json
import shlex
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "tinyusfm-edge"


def pip_line(extra: str) -> str:
    """The command that installs an extra.

    Args:
        extra: such as ``dicom``, or several with commas between.

    Returns:
        ``pip install '/path/of/the/checkout[dicom]'``; from elsewhere a line that says where to type it.
    """
    origin = installed_from()
    if origin is None:
        return f"pip install '.[{extra}]' in a checkout of {DISTRIBUTION}"
    text = f"{origin}[{extra}]"
    return f"pip install {shlex.quote(text) if chr(39) in text else repr(text)}"


@lru_cache(maxsize=1)
def installed_from() -> Path | None:
    """Checkout or wheel that this installation came from, where it is still there."""
    return _from_metadata() or _from_sources()


def _from_metadata() -> Path | None:
    try:
        told = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
        url = urlsplit(json.loads(told or "{}").get("url", ""))
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    if url.scheme != "file":
        return None
    place = Path(unquote(url.path))
    return place if (place / "pyproject.toml").is_file() or place.suffix == ".whl" and place.is_file() else None


def _from_sources() -> Path | None:
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "runtime").is_dir() else None


__all__ = ["DISTRIBUTION", "installed_from", "pip_line"]
