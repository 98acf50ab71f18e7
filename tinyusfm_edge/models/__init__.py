"""The student nets, their weights files and their cost; nothing here knows training, data or export."""
