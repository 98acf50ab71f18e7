"""A session in a process of its own, which can be killed (``isolate=True``).

``session`` is the side of the caller and looks like a ``Session``; ``process`` is the program that it starts;
``messages`` is what the two say to each other: no pickle, sizes checked.
"""
