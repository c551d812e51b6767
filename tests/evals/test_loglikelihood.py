import numpy as np
import pytest
import torch

from evals.batches import length_sorted
from evals.head import EvaluationError
from evals.loglikelihood import loglikelihoods


def requests(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for length in (1, 5, 12, 40, 7):
        context = rng.integers(3, 61, length).tolist()
        pairs += [(context, rng.integers(3, 61, n).tolist()) for n in (1, 1, 4)]
    return pairs


def by_hand(model: torch.nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    log_p = model(torch.tensor([context + continuation]))[0].double().log_softmax(-1)[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return float(log_p.gather(-1, target[:, None]).sum()), bool((log_p.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_any_batch_size_equals_one_request_at_a_time(student, batch_size):
    pairs = requests()
    best = int(student(torch.tensor([pairs[0][0]]))[0, -1].argmax())
    pairs.append((pairs[0][0], [best]))
    found = loglikelihoods(student, pairs, batch_size)
    expected = [by_hand(student, *pair) for pair in pairs]
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], atol=2e-5)
    assert [g for _, g in found] == [g for _, g in expected]
    assert found[-1][1]


def test_a_text_shared_by_several_answers_is_read_once(student):
    class Counting(torch.nn.Module):
        lm_head_weight, config = student.lm_head_weight, student.config
        rows = 0

        def hidden(self, tokens):
            self.rows += len(tokens)
            return student.hidden(tokens)

    model = Counting()
    loglikelihoods(model, [([5, 6, 7], [letter]) for letter in (10, 11, 12, 13)] + [([5, 6], [7])], 8)
    assert model.rows == 2


def test_a_long_context_loses_its_beginning(student):
    rng = np.random.default_rng(1)
    context, continuation = rng.integers(3, 61, 400).tolist(), [4, 9, 30]
    limit = student.config.max_position_embeddings
    kept = (context + continuation[:-1])[-limit:]
    expected = by_hand(student, kept[:-2], continuation)
    assert loglikelihoods(student, [(context, continuation)], 2)[0][0] == pytest.approx(expected[0], abs=2e-5)


def test_empty_sides_and_broken_output_are_refused(student):
    with pytest.raises(EvaluationError, match="request 1: context of 0"):
        loglikelihoods(student, [([3], [4]), ([], [4])], 2)

    class Broken(torch.nn.Module):
        lm_head_weight, config = student.lm_head_weight, student.config

        def hidden(self, tokens):
            return student.hidden(tokens) * float("nan")

    with pytest.raises(EvaluationError, match="not finite"):
        loglikelihoods(Broken(), [([3], [4])], 1)


def test_batches_go_from_long_to_short_and_hold_everything_once():
    sequences = [[1] * 3, [2] * 9, [3], [4] * 9, [5] * 4]
    batches = list(length_sorted(sequences, 2))
    assert [chosen for chosen, _ in batches] == [[1, 3], [4, 0], [2]]
    assert batches[1][1].tolist() == [[5, 5, 5, 5], [1, 1, 1, 0]]
