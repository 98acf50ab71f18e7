"""A transfer set for distillation: pairs of image and mask that no patient gave.

``config`` says how, ``diffusion`` trains a pixel diffusion model and draws from it, ``warped`` bends labelled images,
``features`` and ``distances`` look at both through a teacher, ``judge`` says whether a set may be used, ``make`` puts
it together.
"""
