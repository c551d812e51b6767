from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid import load_pretrained, save_pretrained
from hybrid.engine import DecodeEngine, SpeculationStats
from hybrid.init_map import from_attention
from kernels_ext import dispatch
from steps import draft, speculative_profile
from steps.config import SpeculativeStageConfig
from steps.speculative_profile import ProfileError, figures, prediction
from tests.hybrid import tiny_hybrid
from tests.steps import tiny_stages

CONFIG = SpeculativeStageConfig(max_k=3, ngram=2, prompts=3, new_tokens=12)
LAYERS = "layers:[0, 2]"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("upstream")
    made = tiny_stages.upstream(root)
    student = from_attention(load_pretrained(made["teacher"]), (1,))
    save_pretrained(student.bfloat16(), root / "student")
    save_pretrained(draft.shrink(student, (0, 2)), root / "draft")
    return {"corpus": made["corpus"], "student": root / "student", "draft": root / "draft"}


def profile(inputs, out, config=CONFIG, roles=("corpus", "student")):
    told = []
    given = {role: inputs[role] for role in roles}
    summary = speculative_profile.run(config, given, out, tiny_stages.context(out, progress=told.append))
    return summary, json.loads((out / "profile.json").read_text(), parse_constant=pytest.fail), told


def test_profile(inputs, tmp_path):
    summary, written, told = profile(inputs, tmp_path)
    assert (written["dtype"], written["ngram"], written["synthetic"]) == ("float32", 2, False)
    (group,) = written["groups"]
    assert (group["draft"], group["batch"], group["temperature"], group["prompts"]) == ("ngram", 1, 0.0, 3)
    rows = group["rows"]
    assert [row["k"] for row in rows] == [0, 1, 2, 3]
    assert all(row["identity"] == {"exact": 3, "near_tie": 0, "wrong": 0, "largest_gap": 0.0} for row in rows)
    assert all(row["identical_to_greedy"] for row in rows)
    plain = rows[0]
    assert (plain["acceptance"], plain["proposed"], plain["tokens_per_verification"]) == (None, 0, 1.0)
    assert plain["speedup"] == plain["steady_speedup"] == plain["predicted_speedup"] == 1.0
    emitted = {round(row["tokens_per_verification"] * row["verifications"]) for row in rows}
    assert len(emitted) == 1, "every K gives the same tokens"
    for row in rows:
        assert 1.0 <= row["ci_low"] <= row["tokens_per_verification"] <= row["ci_high"] <= row["k"] + 1
        assert len(row["acceptance_by_position"]) == row["k"]
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / plain["tokens_per_second"])
        times = row["milliseconds"]
        assert set(times) == {"draft", "verify", "accept", "other", "round"} and times["round"] > 0
        assert (times["draft"] > 0) == (row["k"] > 0)
        assert set(row["cache_bytes"]) == {"kv", "ssm", "conv", "ring"}
        assert row["ssm_bytes_per_round"] > 0
        assert row["copy_bandwidth_share"] is row["ssm_microseconds"] is row["peak_memory_bytes"] is None
    best = max(rows, key=lambda row: row["tokens_per_second"])
    assert group["best_k"] == written["best"]["best_k"] == best["k"]
    assert summary == {
        **{"draft": "ngram", "batch": 1, "best_k": best["k"], "speedup": best["speedup"]},
        **{"identical": True, "synthetic": False},
    }
    assert [(p.done, p.total) for p in told] == [(n, 4) for n in range(1, 5)]


def test_every_draft_batch_and_temperature_has_its_group(inputs, tmp_path):
    config = CONFIG.model_copy(
        update={"max_k": 1, "batches": [1, 3], "sampling_temperature": 0.8, "draft": LAYERS, "new_tokens": 6}
    )
    summary, written, told = profile(inputs, tmp_path, config, ("corpus", "student", "draft"))
    found = [(g["batch"], g["temperature"], g["draft"]) for g in written["groups"]]
    assert found == [(b, t, d) for b in (1, 3) for t in (0.0, 0.8) for d in (LAYERS, "ngram")]
    for group in written["groups"]:
        checked = group["temperature"] == 0.0
        assert [row["identical_to_greedy"] for row in group["rows"]] == [True if checked else None] * 2
    assert told[-1].done == told[-1].total == 2 * 2 * (1 + 2)
    assert written["parameters"][LAYERS] < written["parameters"]["student"]
    assert summary["batch"] == 1
    by_draft = {g["draft"]: g["rows"][1] for g in written["groups"] if (g["batch"], g["temperature"]) == (1, 0.0)}
    assert by_draft[LAYERS]["cache_bytes"]["kv"] == by_draft["ngram"]["cache_bytes"]["kv"], "0 and 2 have no attention"
    assert by_draft[LAYERS]["cache_bytes"]["ssm"] == 2 * by_draft["ngram"]["cache_bytes"]["ssm"]


def test_the_student_as_its_own_draft_is_always_accepted(inputs, tmp_path):
    given = {**inputs, "draft": inputs["student"]}
    config = CONFIG.model_copy(update={"max_k": 2, "draft": "layers:[0, 1, 2]"})
    _, written, _ = profile(given, tmp_path, config, ("corpus", "student", "draft"))
    row = written["groups"][0]["rows"][2]
    assert row["acceptance"] == row["effective_acceptance"] == 1.0
    assert row["acceptance_by_position"] == [1.0, 1.0]
    assert 2.5 < row["tokens_per_verification"] <= 3.0


def test_a_batch_is_filled_and_repeated_prompts_count_once(inputs, tmp_path):
    config = CONFIG.model_copy(update={"max_k": 1, "batches": [5]})
    _, written, _ = profile(inputs, tmp_path, config)
    (group,) = written["groups"]
    assert group["prompts"] == 4, "all there are"
    one, five = (
        next(r for r in w["groups"][0]["rows"] if r["k"] == 1)
        for w in (profile(inputs, tmp_path, CONFIG.model_copy(update={"max_k": 1, "prompts": 4}))[1], written)
    )
    for name in ("verifications", "proposed", "accepted", "tokens_per_verification", "ci_low", "ci_high"):
        assert one[name] == five[name], name


def test_injected_acceptance_is_synthetic_and_compared_with_nothing(inputs, tmp_path):
    config = CONFIG.model_copy(update={"injected_acceptance": 0.9, "max_k": 2, "new_tokens": 40})
    summary, written, _ = profile(inputs, tmp_path, config)
    assert written["synthetic"] and summary["synthetic"] and summary["identical"] is None
    assert written["injected_acceptance"] == 0.9
    for row in written["groups"][0]["rows"]:
        assert row["identity"] is row["identical_to_greedy"] is None
        tokens = row["tokens_per_verification"] * row["verifications"]
        assert tokens == pytest.approx(3 * 40), "nothing ends a reply"


def test_figures_by_hand():
    """Two prompts; at the second position 2 of 3 proposals that were reached are accepted."""
    stats = [SpeculationStats([4, 2], [3, 1], 5, 9), SpeculationStats([1, 1], [1, 1], 1, 3)]
    row = figures(2, stats)
    assert row["acceptance_by_position"] == pytest.approx([4 / 5, 2 / 3])
    assert row["acceptance"] == pytest.approx(6 / 8)
    assert row["effective_acceptance"] == pytest.approx(6 / (6 + 4))
    assert (row["proposed"], row["accepted"], row["verifications"]) == (8, 6, 6)
    assert row["tokens_per_verification"] == pytest.approx(12 / 6)
    assert row["ci_low"] == pytest.approx(9 / 5)
    assert row["ci_high"] == pytest.approx(3.0)


def test_more_than_k_plus_1_tokens_per_verification_cannot_be_reported():
    with pytest.raises(AssertionError, match="4.04 tokens per verification with K = 3"):
        figures(3, [SpeculationStats([100] * 3, [100] * 3, 100, 404)])


def test_replies_that_never_began_do_not_count():
    row = figures(1, [SpeculationStats([0], [0], 0, 0), SpeculationStats([3], [2], 3, 5)])
    assert row["tokens_per_verification"] == row["ci_low"] == row["ci_high"] == pytest.approx(5 / 3)


def test_prediction_by_hand():
    """Plain 10 ms; a round of K = 2 costs 2 + 12 + 1 and 1 for nobody: 1.6 steps; τ(½) = 1.75."""
    plain = {"draft": 0.0, "verify": 8.0, "accept": 1.0, "round": 10.0}
    phases = {"draft": 2.0, "verify": 12.0, "accept": 1.0, "round": 16.0}
    found = prediction(0.5, 2, phases, plain)
    assert found["predicted_speedup"] == pytest.approx(1.75 / 1.6)
    alpha = found["break_even_acceptance"]
    assert 1 + alpha + alpha**2 == pytest.approx(1.6)
    too_dear = prediction(1.0, 2, {**phases, "verify": 27.0, "round": 30.0}, plain)
    assert too_dear == {"predicted_speedup": pytest.approx(1.0), "break_even_acceptance": None}
    assert prediction(None, 0, plain, plain) == {"predicted_speedup": 1.0, "break_even_acceptance": None}


@pytest.fixture
def wrong_engine(monkeypatch):
    """An engine that leaves out the last token where K is 2."""

    class Wrong(DecodeEngine):
        def generate_all(self, *arguments: Any, **more: Any):
            made = super().generate_all(*arguments, **more)
            if self.k == 2:
                made.replies[:] = [reply[:-1] for reply in made.replies]
            return made

    monkeypatch.setattr(speculative_profile, "DecodeEngine", Wrong)


def test_another_output_is_told(inputs, tmp_path, wrong_engine):
    """A profile that could not fail would prove nothing."""
    summary, written, _ = profile(inputs, tmp_path)
    (group,) = written["groups"]
    assert [row["identical_to_greedy"] for row in group["rows"]] == [True, True, False, True]
    assert group["rows"][2]["identity"]["wrong"] == 3
    assert not summary["identical"]
    assert group["best_k"] != 2


def test_nothing_to_measure_is_an_error(inputs, tmp_path):
    with pytest.raises(ProfileError, match="no reply to 3 prompts has a second token .*new_tokens is 1"):
        profile(inputs, tmp_path, CONFIG.model_copy(update={"new_tokens": 1}))
    tiny_stages.shard(tmp_path / "corpus" / "held_out.npz", range(0))
    with pytest.raises(ProfileError, match="no held-out conversation has an opening of at most 256 tokens"):
        profile({**inputs, "corpus": tmp_path / "corpus"}, tmp_path)


# What the SSM operators move


@pytest.mark.parametrize(
    ("window", "ring", "committed", "expected"),
    [
        (1, 32, 1.0, [(0, False, 1.0)]),
        # Histories 4, 8, 12, 16, 20, 24, 28: a round folds where 8 more do not fit 32, so at 28, and leaves 4.
        (4, 32, 4.0, [(28, True, 1 / 7), (14, False, 6 / 7)]),
        (4, 8, 2.5, [(2, True, 1.0)]),
    ],
)
def test_what_a_round_finds_in_the_ring(window, ring, committed, expected):
    found = speculative_profile.ssm_places(window, ring, committed)
    assert [place[1] for place in found] == [place[1] for place in expected]
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=2)
        assert one[2] == pytest.approx(other[2], abs=0.02)
    assert sum(place[2] for place in found) == pytest.approx(1.0)


@pytest.mark.parametrize(("k", "operator"), [(0, "ssd_update"), (2, "ssd_verify")])
def test_the_ssm_operators_of_a_round_are_timed_and_left_as_they_were(k, operator):
    model = tiny_hybrid.model()  # two Mamba layers
    own = speculative_profile.NGramDraft() if k else None
    engine = DecodeEngine(model, batch=2, max_length=80, draft=own, k=k)
    before, seen = getattr(dispatch, operator), []

    def timer(calls):
        seen.extend(call().shape for call in calls)
        return 3.0

    assert speculative_profile.ssm_microseconds(engine, 10, timer) == 2 * 3.0
    assert len(seen) == 2 and all(shape[0] == 2 for shape in seen)
    assert getattr(dispatch, operator) is before
    state, token = 6 * 8 * 8, 4 * 2 * 2 * 8 + 4 * 6  # elements; bytes of x, B and dt
    rest = 4 * 2 * 6 * 8 * (k + 1)  # C and y
    constants = 4 * 2 * 6
    if k:
        per_layer = 2 * (4 * state + (10 + 3) * token + rest) + constants
    else:
        per_layer = 2 * (2 * 4 * state + token + rest) + constants
    assert speculative_profile.ssm_bytes(engine, 10, False) == 2 * per_layer
