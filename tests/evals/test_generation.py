import numpy as np
import pytest

from evals.generation import replies


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 61, length).tolist() for length in (1, 40, 7, 23, 7, 90, 2)]


@pytest.mark.parametrize("batch_size", [2, 3, 64])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_a_batch_of_many_equals_batches_of_one(model, prompts, batch_size, request):
    model = request.getfixturevalue(model)
    alone = [replies(model, [p], 12, 1, 256)[0] for p in prompts]
    assert replies(model, prompts, 12, batch_size, 256) == alone
    assert len({tuple(r) for r in alone}) > 3  # the replies tell the prompts apart


def test_a_prompt_that_does_not_fit_with_its_reply_is_left_out_and_the_others_are_as_before(student, prompts):
    every = replies(student, prompts, 12, 3, 256)
    assert replies(student, prompts, 12, 3, 40 + 12 - 1) == [
        None if len(p) >= 40 else reply for p, reply in zip(prompts, every, strict=True)
    ]
    assert replies(student, prompts, 12, 3, 12) == [None] * len(prompts)


def test_progress_ends_at_one(student, prompts):
    seen: list[float] = []
    replies(student, prompts, 2, 3, 256, seen.append)
    assert seen == sorted(seen) and 0.0 < seen[1] < seen[-1] == 1.0
