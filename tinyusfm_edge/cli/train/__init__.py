"""Commands that train, select or evaluate students; one command per file."""
