"""Training with labels: head, supervision, and a teacher that was adapted first.

``run`` is the command's work from table to student file, ``fit`` one training run, ``objective`` and ``losses`` what is
minimised, ``teacher``, ``lora`` and ``guide`` the task-specific teacher (TS-KD), ``transkd`` the TransKD parts.
"""
