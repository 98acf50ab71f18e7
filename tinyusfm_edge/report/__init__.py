"""Reports for people: one self-contained HTML page.

Images and charts inside it, nothing fetched from anywhere.
"""
