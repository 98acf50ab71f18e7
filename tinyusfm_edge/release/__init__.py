"""How a trained student becomes one that ships.

``package`` writes its weights, ranges and drift statistic, ``card`` and ``texts`` its model card, ``patient_gate``
checks its INT8 on patients.
"""
