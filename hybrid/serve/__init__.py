"""An OpenAI-compatible server for trying a model: `python -m hybrid.serve MODEL`.

`loading` and `text` serve the terminal chat too; only `app` and `protocol` know HTTP.
"""
