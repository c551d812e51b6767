"""A tiny model with a real tokenizer, a real server for it in a thread, and a gate before its rounds."""

from __future__ import annotations

import contextlib
import math
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
    """Rounds of a worker's engines wait while it is shut.

    held: one waits. rounds: how many began. admitted: how many prompts were admitted at once, each time. moves: (batch,
    batch) of the engines that a row moved between.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._change = threading.Condition()
        self._left = math.inf
        self.rounds = 0
        self.held = False
        self.admitted: list[int] = []
        self.moves: list[tuple[int, int]] = []
        for engine in worker.engines:
            self._watch(engine)

    def _watch(self, engine: Any) -> None:
        round, admit, adopt = engine.round, engine.admit, engine.adopt

        def gated() -> None:
            with self._change:
                self.held = self._left <= 0
                assert self._change.wait_for(lambda: self._left > 0, DEADLINE), "the gate was never opened"
                self.held = False
                self._left -= 1
                self.rounds += 1
            round()

        def noted(slots: Any, prompts: Any, max_new_tokens: Any) -> None:
            self.admitted.append(len(slots))
            admit(slots, prompts, max_new_tokens)

        def moved(other: Any, theirs: int, slot: int) -> None:
            self.moves.append((other.batch, engine.batch))
            adopt(other, theirs, slot)

        engine.round, engine.admit, engine.adopt = gated, noted, moved

    def let(self, rounds: float) -> None:
        """Let so many more rounds through."""
        with self._change:
            self._left += rounds
            self._change.notify_all()

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        with self._change:
            self._left = 0
        try:
            yield
        finally:
            self.let(math.inf)

    def forget(self) -> None:
        """Wait until nothing is decoded, then count from 0."""
        until(lambda: self.worker.load == (0, 0))
        self.rounds, self.admitted, self.moves = 0, [], []


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
