"""What a model's file may hold.

It is checked before any inference library sees a byte of it.

Inference libraries read more than they are given: files in the working directory, addresses in memory, other formats
under a known name; and they run what they read while they load it. So each format has a reader here, written for this
purpose alone (``onnx``, ``ir``, ``mil``): it takes only what is known, refuses everything else by name, and works out
the shape of every tensor (``shapes``), so that size and work are known before anything is allocated (``budget``).

Each reader is a function ``check`` that raises EngineError; an engine calls it first thing in ``load``. It knows no
library and runs nothing.
"""
