"""`python -m hybrid.serve MODEL [--draft ngram|FOLDER]`: an OpenAI-compatible server for trying a model.

Clients take `http://HOST:PORT/v1` as their base URL and any API key. Requests that are sampled alike are decoded
together and join while others run; who is sampled differently waits for their end; a sampled request with a seed runs
alone. For many users at once, export the model (`python -m hybrid.export`) and serve that with vLLM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hybrid.serve.loading import add_options, load, positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a shutdown, 1 if the port is taken, 2 if the model or the installation does not allow it."""
    options = _parser().parse_args(arguments)
    try:
        import uvicorn

        from hybrid.serve.app import create_app
    except ModuleNotFoundError as missing:
        sys.stderr.write(f"hybrid.serve: needs {missing.name}: pip install 'mamballama[serve]'\n")
        return 2
    try:
        loaded = load(options.model, options)
        app = create_app(loaded, name=options.name, max_batch=options.max_batch, max_queue=options.max_queue)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"hybrid.serve: {error}\n")
        return 2
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=5)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hybrid.serve", description=__doc__.split("\n\n")[1])
    add_options(parser)
    add = parser.add_argument
    add("--name", help="what clients call the model (the folder's name)")
    add(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 listens to other machines; there is no access control (%(default)s)",
    )
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add("--max-batch", type=positive, default=8, help="requests that are decoded at once (%(default)s)")
    add("--max-queue", type=positive, default=64, help="requests that wait before more are refused (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
