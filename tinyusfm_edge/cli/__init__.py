"""The command line: one command a file, put together in main.py.

Importing it loads no engine and no torch.
"""
