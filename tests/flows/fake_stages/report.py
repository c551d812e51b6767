"""Stands in for steps/report.py: a page that names its inputs."""


def run(config, inputs, out, context):
    lines = "".join(f"<li>{role}</li>" for role in sorted(inputs))
    (out / "report.html").write_text(f"<html><body><h1>{config.title}</h1><ul>{lines}</ul></body></html>")
    return {}
