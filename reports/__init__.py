"""Rows and manifests in, one self-contained HTML page, its JSON twin and a CSV of the rows out. Loads no model.

Read in this order: rows.py (what the stages left), sections.py and twin.py (the content), flips.py (changed answers),
verdict.py (sentences and red flags), combine.py (several runs), tables.py, paper.py and figures/ with svg.py (what is
drawn), build.py and templates/ (the page). `python -m reports compare` puts finished runs side by side.
"""
