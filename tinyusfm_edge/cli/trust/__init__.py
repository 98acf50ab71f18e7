"""What an auditor asks of a bundle: its origin, what changed, its papers."""
