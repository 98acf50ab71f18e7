"""The live loop: newest frame in, dated result out.

``loop`` owns the threads. ``check``, ``order`` and ``freeze`` judge frames as they arrive, ``queues`` holds and counts
them, ``fallback`` and ``watchdog`` run the engine within limits, ``state`` derives what the stream is, ``smoothing``
adds results over time, ``swap`` changes the bundle while the loop runs.
"""
