"""Commands that one starts with.

The demonstration, what works here, a project of one's own.
"""
