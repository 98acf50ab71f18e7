"""The students, their weights files and their cost.

Nothing here knows training, data or export.
"""
