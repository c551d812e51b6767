from types import SimpleNamespace

import pytest

from evals import efficiency


@pytest.fixture
def engine(monkeypatch):
    """A stand-in for the engine whose calls take 9, 1, 2, 4, … seconds; the options and requests it was given."""
    seen = []

    class Engine:
        def __init__(self, model, **options):
            seen.append(options)
            self.seconds = iter([9.0, 1.0, 2.0, 4.0])

        def generate(self, prompts, max_new_tokens):
            seen.append((len(prompts), max_new_tokens))
            return SimpleNamespace(decode_seconds=next(self.seconds))

    monkeypatch.setattr(efficiency, "DecodeEngine", Engine)
    return seen


def test_speed_counts_new_tokens_of_the_whole_batch_and_takes_the_median(teacher, engine):
    found = efficiency.decode_speed(teacher, [[5, 6, 7], [8]], new_tokens=10, repeats=3)
    assert found == {"batch": 2, "tokens_per_second": 10.0, "new_tokens": 10, "repeats": 3}


def test_replies_do_not_end_early(teacher, engine):
    efficiency.decode_speed(teacher, [[5], [6]], new_tokens=16, repeats=2)
    assert engine == [
        {"batch": 2, "max_length": 17, "eos_token_ids": ()},
        (2, efficiency.WARM_UP_TOKENS),
        (2, 16),
        (2, 16),
    ]


def test_speed_is_measured_for_real(teacher):
    assert efficiency.decode_speed(teacher, [[5, 6, 7], [8]], new_tokens=3, repeats=1)["tokens_per_second"] > 0


def test_state_bytes_grow_with_context_for_keys_and_values_only(teacher, student):
    found = efficiency.state_bytes(student, (512, 1024))
    assert [f["context"] for f in found] == [512, 1024]
    assert found[1]["kv"] == 2 * found[0]["kv"] > 0
    assert found[1]["ssm"] == found[0]["ssm"] > 0
    assert found[1]["conv"] == found[0]["conv"] > 0
    only_attention = efficiency.state_bytes(teacher, (512,))[0]
    assert only_attention["kv"] == 2 * found[0]["kv"]
    assert only_attention["ssm"] == only_attention["conv"] == 0
    assert pytest.approx(only_attention["kv"]) == 2 * 2 * 512 * 8 * 4  # layers · (k, v) · context · head_dim · bytes
