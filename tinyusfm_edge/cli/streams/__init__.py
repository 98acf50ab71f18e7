"""Commands that run a bundle on frames: ``run``, ``live``, ``replay``.

One command per file.
"""
