"""The export graph: one exactly equivalent form of a student.

Every target writes it.

``build`` turns a student into a graph with fixed names and a grey input, ``net`` lists its node kinds, ``rewrites``
replaces parts by forms that engines run well, and ``stages`` cuts a student with early exits into a chain.
It knows no target and no number format.
"""
