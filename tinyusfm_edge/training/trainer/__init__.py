"""One resumable training loop for everything that is trained here.

``loop`` runs steps over a task, ``checkpoints`` saves and restores its state, ``progress`` shows where it is.
"""
