"""``python -m tinyusfm_edge`` is the command line ``tinyusfm-edge``."""

from __future__ import annotations

from tinyusfm_edge.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
