"""Images, labelled tables and folders as people keep them.

``images`` decodes pools of images, ``table`` reads a table with labels, patients and splits, ``folder`` a folder
with or without one, ``calibration_pool`` the frames that a calibration set is chosen from. One file of a table is read
by ``frames``, its mask by ``masks``; ``reading`` holds what was asked for. It knows no training and no export.
"""
