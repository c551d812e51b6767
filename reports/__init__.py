"""Rows and manifests in, one self-contained HTML page, its JSON twin and a CSV of the rows out. Loads no model.

Read in this order: rows.py (what the stages left), twin.py (the content), verdict.py (sentences and red flags),
tables.py and figures.py with svg.py (what is drawn), build.py and templates/ (the page).
"""
