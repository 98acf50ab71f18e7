"""Reports for people: one self-contained HTML page, pictures and charts inside it, nothing fetched from anywhere."""
