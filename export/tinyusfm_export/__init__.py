"""Export: a trained student becomes artefacts that other engines run, checked against the student itself.

The floor above the calibration package and below the workshop. Nothing here imports the workshop: an ``nn.Module``
and a ModelSpec are handed in.
"""
