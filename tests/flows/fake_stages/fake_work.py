"""What a fake stage does: leaves a trace, says where its inputs came from; on request it fails or waits for its end."""

import json
import os
import signal
import sys
from pathlib import Path

from steps.stage import Progress


class FakeError(ValueError):
    """A failure of the project's own kind."""


def work(name, config, inputs, out, context):
    log = Path(os.environ["FAKE_LOG"])
    with log.open("a") as file:
        file.write(f"{name} {os.getpid()} {'torch' in sys.modules}\n")
    (out / "result.json").write_text(
        json.dumps({"stage": name, "config": config.model_dump(mode="json"), "inputs": sorted(inputs)})
    )
    context.progress(Progress(2, 2, "steps", 1.0, {"loss": 0.5}))
    if os.environ.get("FAKE_FAIL") == name:
        raise FakeError("the loss is NaN at step 5")
    if os.environ.get("FAKE_BUG") == name:
        raise KeyError("a bug")
    if os.environ.get("FAKE_HANG") == name:
        log.with_suffix(".hanging").write_text(str(os.getpid()))
        signal.pause()
    return {role: json.loads((folder / "result.json").read_text())["stage"] for role, folder in inputs.items()}
