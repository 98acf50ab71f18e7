"""How a float graph becomes INT8: ranges, decisions, corrections, training.

``decision`` is the one quantization decision that every target writes in its own form. ``ptq`` makes it from ranges,
``qat`` from fake-quantized training; ``equalise`` and ``bias_correction`` reduce the error, ``sensitivity`` measures
which layer costs what. It writes no files of an engine.
"""
