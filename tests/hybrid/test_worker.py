"""The decoding thread by itself: who is decoded with whom, what everyone gets, and that nobody waits for ever.

A gate before its rounds takes the place of time. Where `late` is 1, tokens are handed out one round late, as on CUDA.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hybrid.engine import DecodeEngine, Sampling
from hybrid.generate import generate
from hybrid.serve.worker import Job, QueueFullError, Worker
from tests.hybrid import serving
from tests.hybrid.serving import DEADLINE, Gate, until
from tests.hybrid.tiny_hybrid import prompts

MODEL = serving.model()
GREEDY, HOT = Sampling(), Sampling(1.2, 0, 0.95)
PROMPTS = prompts(9, 1, 22, 4, 17, 3, 2, 12, 1, 6)
LIMITS = [14, 3, 29, 1, 40, 6, 11, 2, 14, 5]
DRAFTS = {"plain": {}, "n-gram": {"draft": "ngram", "k": 3}, "a model": {"draft": serving.model(5), "k": 2}}


class Asked:
    """A job and what was delivered to it; `ended` is set with its last token or its exception."""

    def __init__(self, number: int, limit: int | None = None, sampling: Sampling = GREEDY, seed: int | None = None):
        self.job = Job(PROMPTS[number], limit or LIMITS[number], sampling, seed, self._deliver)
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.ended = threading.Event()

    def _deliver(self, arrived: list[int] | Exception) -> None:
        assert not self.ended.is_set()
        if isinstance(arrived, Exception):
            self.error = arrived
        else:
            self.tokens += arrived
        if self.error or len(self.tokens) == self.job.max_new_tokens or self.tokens[-1] == serving.EOS:
            self.ended.set()

    @property
    def reply(self) -> list[int]:
        assert self.ended.wait(DEADLINE)
        assert self.error is None
        return self.tokens


def alone(number: int, limit: int | None = None) -> list[int]:
    return generate(MODEL, [PROMPTS[number]], limit or LIMITS[number], eos_token_ids=())[0]


class Desk:
    """A running worker, its gate, and `ask`."""

    def __init__(self, slots: int = 3, late: int = 0, queue: int = 20, **changes: Any) -> None:
        self.worker = Worker(serving.loaded(model=MODEL, **changes).engine, slots, queue)
        self.worker.look_back = late
        self.gate = Gate(self.worker)
        self.worker.start()
        self.gate.forget()

    def ask(self, *arguments: Any, **options: Any) -> Asked:
        asked = Asked(*arguments, **options)
        self.worker.submit(asked.job)
        return asked

    def run(self, rounds: int) -> None:
        """Let so many rounds through a shut gate."""
        wanted = self.gate.rounds + rounds
        self.gate.let(rounds)
        until(lambda: self.gate.rounds == wanted and self.gate.held)


@pytest.fixture
def desk() -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(*arguments: Any, **options: Any) -> Desk:
        made.append(Desk(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.worker.close()
        assert not one.worker._thread.is_alive()


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("draft", DRAFTS)
def test_ten_requests_through_three_slots(desk, draft, late):
    one = desk(late=late, **DRAFTS[draft])
    for _ in range(2):
        with one.gate.shut():
            first = one.ask(0)
            until(lambda: one.worker.load == (0, 1))
            asked = [first, *(one.ask(number) for number in range(1, 10))]
            assert one.worker.load == (9, 1)
        assert [a.reply for a in asked] == [alone(number) for number in range(10)]
        until(lambda: one.worker.load == (0, 0))
        assert one.gate.admitted[:2] == [1, 2] and sum(one.gate.admitted) == 10
        assert one.gate.rounds < sum(LIMITS) * 2 // 3
        one.gate.forget()


@pytest.mark.parametrize("late", [0, 1])
def test_rows_that_end_by_a_token_make_room(desk, late):
    whole = [alone(number, 30) for number in range(10)]
    stop = [whole[0][2], whole[4][0], whole[9][5]]
    wanted = generate(MODEL, PROMPTS, 30, eos_token_ids=stop)
    assert len({len(reply) for reply in wanted}) > 2
    worker = Worker(
        lambda rows: DecodeEngine(MODEL, batch=rows, max_length=64, eos_token_ids=stop), max_batch=3, max_queue=10
    )
    worker.look_back = late
    worker.start()
    asked = [Asked(number, 30) for number in range(10)]
    for a in asked:
        worker.submit(a.job)
    until(lambda: worker.load == (0, 0))
    worker.close()
    assert [a.tokens for a in asked] == wanted


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_newcomer_is_answered_before_the_long_reply_ends(desk, draft, late):
    one = desk(late=late, **DRAFTS[draft])
    with one.gate.shut():
        long = one.ask(2, 200)
        until(lambda: one.gate.held)
        one.run(5)
        short = one.ask(1, 3)
        one.gate.let(12)
        assert short.reply == alone(1, 3)
        until(lambda: one.worker.load == (0, 1))
        assert not long.ended.is_set()
    assert long.reply == alone(2, 200)


@pytest.mark.parametrize("late", [0, 1])
def test_a_lone_request_has_an_engine_of_one_row(desk, late):
    """It moves when a second comes; whoever is left by the others goes back."""
    one = desk(late=late)
    with one.gate.shut():
        first = one.ask(0, 30)
        until(lambda: one.gate.held)
        one.run(9)
        assert one.worker._engine.batch == 1
        second = one.ask(1, 100)
        one.run(1 + 1)
        assert one.gate.moves == [(1, 3)] and one.worker._engine.batch == 3 and one.worker.load == (0, 2)
    assert first.reply == alone(0, 30) and second.reply == alone(1, 100)
    assert one.gate.moves == [(1, 3), (3, 1)]


def test_another_sampling_is_not_starved(desk):
    """Greedy requests keep coming: those before the sampled one go first, those after it wait for it."""
    one = desk(slots=2)
    order: list[str] = []

    def ask(name: str, limit: int, **options: Any) -> Asked:
        asked = Asked(0, limit, **options)
        deliver = asked.job.deliver

        def noted(arrived: list[int] | Exception) -> None:
            if not asked.tokens:
                order.append(name)
            deliver(arrived)

        asked.job.deliver = noted
        one.worker.submit(asked.job)
        return asked

    with one.gate.shut():
        asked = [ask("first", 20)]
        until(lambda: one.gate.held)
        asked += [
            ask("before", 4),
            ask("hot", 6, sampling=HOT),
            ask("after", 5),
            ask("seeded", 6, sampling=HOT, seed=3),
        ]
        asked += [ask("last", 5)]
        one.run(10)
        assert order == ["first", "before"] and one.worker.load == (4, 1), "a free slot, and nobody overtakes"
    replies = [a.reply for a in asked]
    assert order == ["first", "before", "hot", "after", "last", "seeded"]
    assert [replies[n] for n in (0, 1, 3, 5)] == [alone(0, limit) for limit in (20, 4, 5, 5)]


@pytest.mark.parametrize("late", [0, 1])
def test_a_seeded_reply_depends_on_nothing_else(desk, late):
    one = desk(late=late)
    wanted = one.ask(4, sampling=HOT, seed=5).reply
    with one.gate.shut():
        one.ask(2)
        until(lambda: one.gate.held)
        asked = [one.ask(4, sampling=HOT, seed=seed) for seed in (5, 6, 5)]
        one.ask(3, sampling=HOT)
        one.ask(5)
    first, other, again = (a.reply for a in asked)
    assert first == again == wanted != other
    until(lambda: one.worker.load == (0, 0))


@pytest.mark.parametrize("late", [0, 1])
def test_cancelling_gives_the_slot_to_the_next(desk, late):
    one = desk(slots=2, late=late)
    with one.gate.shut():
        gone, stays = one.ask(0, 200), one.ask(1, 60)
        until(lambda: one.gate.held)
        one.run(4)
        assert one.worker.load == (0, 2)
        following, never = one.ask(2, 8), one.ask(3, 8)
        one.worker.cancel(gone.job)
        one.worker.cancel(never.job)
        assert one.worker.load == (1, 2)
        one.run(3)
        assert one.worker.load == (0, 2) and following.tokens
        assert set(one.worker._running.values()) == {stays.job, following.job}
    assert following.reply == alone(2, 8) and stays.reply == alone(1, 60)
    until(lambda: one.worker.load == (0, 0))
    assert len(gone.tokens) <= 6 and never.tokens == [] and one.gate.rounds < 100


def test_the_last_one_cancelled_leaves_nothing_running(desk):
    one = desk(late=1)
    with one.gate.shut():
        gone = one.ask(0, 200)
        until(lambda: one.gate.held)
        one.worker.cancel(gone.job)
    until(lambda: one.worker.load == (0, 0))
    assert one.ask(4).reply == alone(4)
    assert one.gate.rounds <= 3 + 1 + LIMITS[4]


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("what", ["round", "admit", "adopt", "look"])
def test_a_failure_ends_who_was_decoded_and_no_one_else(desk, monkeypatch, what, late):
    """It comes when a second request joins the first."""
    one = desk(slots=2, late=late)
    broken = RuntimeError("out of memory")

    def fail(*_: Any) -> None:
        raise broken

    with one.gate.shut():
        first = one.ask(0, 50)
        until(lambda: one.gate.held)
        one.run(3)
        second, waits, seeded = one.ask(1), one.ask(2), one.ask(4, sampling=HOT, seed=1)
        with monkeypatch.context() as patched:
            patched.setattr(one.worker.engines[1], what, fail)
            one.gate.let(2)
            assert first.ended.wait(DEADLINE) and second.ended.wait(DEADLINE)
            until(lambda: one.worker.load == (1, 1))
        assert first.error is second.error is broken and 3 <= len(first.tokens) <= 5
    assert waits.reply == alone(2) and len(seeded.reply) == LIMITS[4]
    assert one.ask(0).reply == alone(0)


def test_load_says_who_waits_and_who_is_decoded(desk):
    one = desk(slots=3, queue=2)
    assert one.worker.load == (0, 0)
    with one.gate.shut():
        one.ask(0, 30)
        until(lambda: one.worker.load == (0, 1) and one.gate.held)
        one.ask(1, 3)
        one.ask(2, 9, sampling=HOT)
        assert one.worker.load == (2, 1)
        with pytest.raises(QueueFullError, match="2 requests are waiting already"):
            one.ask(3)
        one.run(2)
        assert one.worker.load == (1, 2)
        one.run(6)
        assert one.worker.load == (1, 1), "one has ended, and the other sampling waits for both"
    until(lambda: one.worker.load == (0, 0))


def test_what_cannot_be_decoded_is_refused_at_once(desk):
    with pytest.raises(ValueError, match="raise `max_length`"):
        desk().ask(0, 1000)


@pytest.mark.parametrize("late", [0, 1])
def test_closing_while_requests_run_and_wait(desk, late):
    one = desk(slots=2, late=late)
    with one.gate.shut():
        running = [one.ask(0, 200), one.ask(1, 200)]
        until(lambda: one.gate.held)
        one.run(3)
        waits = one.ask(2)
        closing = threading.Thread(target=one.worker.close)
        closing.start()
        until(lambda: all(a.job.cancelled for a in running))
        assert closing.is_alive(), "it waits for the round"
    closing.join(DEADLINE)
    assert not closing.is_alive() and one.worker.load == (0, 0)
    assert all(len(a.tokens) < 10 and a.error is None for a in running) and waits.tokens == []
