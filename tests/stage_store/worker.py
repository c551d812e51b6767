"""One process that computes a key: `worker.py URL LEASE_SECONDS`. It says "computing" and goes on when told to.

Answers on stdout; what it waits for or takes over is logged to stderr.
"""

import logging
import sys
from pathlib import Path

from store_helpers import compute

from stage_store import Store


def work(out: Path, checkpoints: object) -> dict[str, object]:
    (out / "half").write_bytes(b"h")
    print("computing", flush=True)
    sys.stdin.readline()
    (out / "model.safetensors").write_bytes(b"w" * 100_000)
    return {}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    for library in ("aiobotocore", "botocore"):
        logging.getLogger(library).setLevel(logging.ERROR)
    ref, hit = compute(Store(sys.argv[1], lease_seconds=float(sys.argv[2])), work=work)
    print("adopted" if hit else "computed", ref.digest, flush=True)
