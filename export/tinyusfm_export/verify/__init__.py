"""Proof that an artefact answers like the PyTorch reference.

``reference`` computes what is expected, ``artefact`` runs an artefact in its own engine, ``parity`` measures the
differences in clinical units, ``gate`` judges them, ``verdict`` compares speed, ``bundle`` verifies a finished bundle.
"""
