"""Training recipes, the tables they read, and the packaging of what they make."""
