"""A tiny model with a real tokenizer, a real server for it in a thread, and a gate before its rounds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hybrid import HybridForCausalLM, save_pretrained
from hybrid.serve.loading import Loaded
from hybrid.serve.worker import Worker
from tests.corpora import tiny
from tests.hybrid import tiny_hybrid

EOS = 2
NAME = "tiny"
DEADLINE = 60.0


def model(seed: int = 0, **changes: Any) -> HybridForCausalLM:
    """Never says the end-of-turn token greedily: its logit is 0, and one of the others is larger."""
    made = tiny_hybrid.model(seed, vocab_size=300, **changes)
    with torch.no_grad():
        made.model.embed_tokens.weight[EOS] = 0.0
    return made


def loaded(**changes: Any) -> Loaded:
    return Loaded(**{"name": NAME, "model": model(), "tokenizer": tiny.tokenizer(), "max_length": 256, **changes})


def folder(path: Path, **changes: Any) -> Path:
    """The same as `python -m hybrid.serve` and `python -m hybrid.chat` take it."""
    save_pretrained(model(**changes), path)
    tiny.tokenizer().save_pretrained(path)
    return path


class Gate:
    """Rounds of a worker's engines wait while it is shut; `rounds` counts those that ran, `batches` their sizes."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._open = threading.Event()
        self._open.set()
        self.rounds, self.batches, self.waiting = 0, [], 0
        for engine in worker.engines:
            engine.round = self._gated(engine.round)  # type: ignore[method-assign]
            engine.generate = self._counted(engine.generate)  # type: ignore[method-assign]

    def _gated(self, call: Callable[[], None]) -> Callable[[], None]:
        def round() -> None:
            self.waiting += 1
            assert self._open.wait(DEADLINE), "the gate was never opened"
            self.waiting -= 1
            self.rounds += 1
            call()

        return round

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def generate(prompts: Any, *arguments: Any, **options: Any) -> Any:
            self.batches.append(len(prompts))
            return call(prompts, *arguments, **options)

        return generate

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def forget(self) -> None:
        """Wait until nothing is decoded, then count from 0."""
        until(lambda: self.worker.load == (0, 0))
        self.rounds, self.batches = 0, []


class Served:
    """A running server: its address, a client of it, its gate."""

    def __init__(self, port: int, gate: Gate) -> None:
        from openai import OpenAI

        self.port, self.gate, self.worker = port, gate, gate.worker
        self.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=DEADLINE)


@contextlib.contextmanager
def serving(given: Loaded, **options: Any) -> Iterator[Served]:
    import uvicorn

    from hybrid.serve.app import create_app

    app = create_app(given, **options)
    gate = Gate(app.state.worker)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    gate.forget()
    try:
        yield Served(server.servers[0].sockets[0].getsockname()[1], gate)
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
        assert not thread.is_alive()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
