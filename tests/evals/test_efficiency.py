import itertools

import pytest

from evals import efficiency


def test_speed_counts_new_tokens_of_the_whole_batch_and_takes_the_median(teacher, monkeypatch):
    # One repeat reads the clock twice: at the first token and at the end.
    clock = itertools.chain.from_iterable([(0.0, 1.0), (10.0, 12.0), (20.0, 24.0)])
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: next(clock))
    found = efficiency.decode_speed(teacher, [[5, 6, 7], [8]], new_tokens=10, repeats=3)
    assert found == {"batch": 2, "tokens_per_second": 10.0, "new_tokens": 10, "repeats": 3}


def test_replies_do_not_end_early(teacher, monkeypatch):
    asked = []

    def generate(model, prompts, new_tokens, *, eos_token_ids, callback=None):
        asked.append((len(prompts), new_tokens, eos_token_ids))
        if callback:
            callback(teacher.lm_head_weight[:2, 0])
        return [[0] * new_tokens for _ in prompts]

    monkeypatch.setattr(efficiency, "generate", generate)
    efficiency.decode_speed(teacher, [[5], [6]], new_tokens=16, repeats=2)
    assert asked == [(2, efficiency.WARM_UP_TOKENS, ()), (2, 17, ()), (2, 17, ())]


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
