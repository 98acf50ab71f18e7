"""Finding what runs best on this device.

Variants, engines, precisions, threads and pinning are measured in turns.

``candidates`` lists what can be tried, ``visit`` times one of them in a fresh process, ``rounds`` asks all of them in
turns and keeps what was measured in a file, ``choice`` makes rows of the samples and picks one, ``variants`` turns
students into bundles, ``recipe`` writes the pick down. Nothing here prints.
"""
