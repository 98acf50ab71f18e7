"""Training without labels: distillation from a teacher, and plain MAE.

``run`` is the command's work from pool to student file, ``views`` and ``masking`` make what the student sees,
``teacher_bank`` keeps what the teacher answered, ``distill`` and ``mae`` are the losses.
"""
