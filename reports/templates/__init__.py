"""Jinja2 templates and the style sheet of the page; a package only so that they are installed with the code."""
