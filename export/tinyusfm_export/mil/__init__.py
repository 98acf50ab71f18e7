"""Core ML programs on any CPU: a reference interpreter of what an ``.mlpackage`` really holds."""
