"""One file per target; the stem is the name people type. Listed without being imported (runtime/plugins.py)."""
