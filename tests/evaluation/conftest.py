"""Small networks are fastest on one thread, and two threads fight with whatever else runs."""

from tests.one_thread import one_thread

__all__ = ["one_thread"]
