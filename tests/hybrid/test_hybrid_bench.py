from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hybrid as tiny
import torch

from hybrid import save_pretrained
from hybrid.bench import (
    __main__,
    arithmetic,
    break_even,
    cases,
    floor_bytes,
    peers,
    predicted_speedup,
    round_parts,
    rows,
    timed,
    tokens_per_round,
    weight_bytes,
)
from hybrid.bench.cases import Bench, Settings
from hybrid.bench.rows import Row
from hybrid.bench.timed import RefusedError, Spread, TimedEngine, require
from hybrid.drafts import ModelDraft
from hybrid.engine import Generated, SpeculationStats
from hybrid.shapes import SHAPES

BANDWIDTH = 4.3e12


def test_the_floor_is_that_of_the_research_note() -> None:
    config = SHAPES["8b"]
    assert weight_bytes(config) == pytest.approx(15.82e9, rel=1e-3)
    assert weight_bytes(config) / BANDWIDTH == pytest.approx(3.68e-3, rel=2e-3)
    one, many = (floor_bytes(config, 4096, batch) for batch in (1, 64))
    assert one["ssm"] == 2 * 24 * 32 * 128 * 128 * 4  # 50.3 MB read, and as much written
    assert one["kv"] == 8 * 2 * 1024 * 2 * 4096  # 134 MB
    assert one["conv"] == 24 * 4 * 6144 * 2
    assert sum(one.values()) / BANDWIDTH == pytest.approx(3.73e-3, rel=2e-3)
    assert sum(many.values()) / BANDWIDTH == pytest.approx(7.18e-3, rel=3e-3)


def test_a_tied_embedding_is_read_once_and_an_untied_one_not_at_all() -> None:
    tied, untied = (tiny.config(tie_word_embeddings=tie) for tie in (True, False))
    assert weight_bytes(tied, 4) == weight_bytes(untied, 4)
    assert weight_bytes(tied, 4) == sum(p.numel() * 4 for p in tiny.model().parameters())


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.6, (1.96, 2.18, 2.31)), (0.7, (2.19, 2.53, 2.77)), (0.8, (2.44, 2.95, 3.36))]
)
def test_predicted_speedups_are_those_of_the_research_note(alpha: float, expected: tuple[float, ...]) -> None:
    found = [predicted_speedup(alpha, k, t_plain=3.73, t_verify=3.73) for k in (2, 3, 4)]
    assert found == pytest.approx(expected, abs=0.006)


def test_a_draft_and_the_rest_of_the_round_cost_what_they_take() -> None:
    # The note's two-layer draft at 0.45 ms per token: 2.30 times at K = 4.
    assert predicted_speedup(0.8, 4, 3.73, 3.68, t_draft=0.45) == pytest.approx(2.29, abs=0.01)
    assert predicted_speedup(0.8, 4, 3.73, 3.73, t_other=3.73) == pytest.approx(3.36 / 2, abs=0.005)


def test_tokens_per_round_at_its_ends() -> None:
    assert tokens_per_round(1.0, 4) == 5
    assert tokens_per_round(0.0, 4) == 1


def test_break_even() -> None:
    alpha = break_even(3, t_plain=1.0, t_verify=1.2, t_draft=0.1, t_other=0.1)
    assert alpha is not None
    assert predicted_speedup(alpha, 3, 1.0, 1.2, 0.1, 0.1) == pytest.approx(1.0)
    assert break_even(2, t_plain=1.0, t_verify=1.0, t_draft=1.5) is None
    assert break_even(2, t_plain=1.0, t_verify=0.9) == 0.0


def test_an_engine_decodes_as_if_it_had_read_its_prompt() -> None:
    engine = TimedEngine(tiny.model(), batch=3, max_length=100)
    engine.unread = True
    engine.restart([[1] * 40, [2] * 17], rounds=4)
    assert engine.cache.cursors.lengths.tolist() == [39, 16, 0]
    assert engine.slots.tolist() == [0, 1, -1]
    engine.round()
    assert engine.cache.cursors.lengths.tolist() == [40, 17, 0]
    assert torch.isfinite(engine._logits[:2]).all()
    spread, tokens = engine.time_rounds([[1] * 40, [2] * 17], rounds=4, repeats=5)
    assert spread.repeats == 5 and spread.median > 0 and tokens == 1.0
    engine.unread = False
    prompts = tiny.prompts(5, 9)
    assert engine.generate(prompts, 6).replies == [tiny.greedy(engine.model, p, 6) for p in prompts]


def test_rounds_of_injected_acceptance_yield_what_the_rate_says() -> None:
    model = tiny.model()
    engine = TimedEngine(
        model,
        make_draft=lambda: ModelDraft(tiny.model(1, n_layers=2, attention_layers=(1,))),
        k=3,
        batch=2,
        max_length=100,
        injected=1.0,
    )
    engine.unread = True
    assert engine.time_rounds([[1] * 30] * 2, rounds=3, repeats=2)[1] == 4.0


def test_rounds_that_do_not_fit_are_refused() -> None:
    engine = TimedEngine(tiny.model(), batch=1, max_length=20)
    with pytest.raises(ValueError, match="max_length"):
        engine.time_rounds([[1] * 16], rounds=4, repeats=1)


def test_a_sound_engine_may_be_timed() -> None:
    model = tiny.model()
    draft = tiny.model(1, n_layers=2, attention_layers=(1,))
    prompts = tiny.prompts(5, 9)
    require(TimedEngine(model, batch=2, max_length=40), prompts)
    require(TimedEngine(model, make_draft=lambda: ModelDraft(draft), k=2, batch=2, max_length=40), prompts)


def test_decode_that_differs_from_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    decode = model.decode
    for spoil in (1.01, float("nan")):
        monkeypatch.setattr(model, "decode", lambda *a, by=spoil, **k: decode(*a, **k) * by)
        with pytest.raises(RefusedError, match="decode's logits differ"):
            require(TimedEngine(model, batch=1, max_length=40), tiny.prompts(5))


def test_speculation_that_says_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(TimedEngine):
        def _accept(self) -> None:
            if self.k:
                self._logits = self._logits.roll(1, dims=-1)
            super()._accept()

    monkeypatch.setattr(timed, "TimedEngine", Careless)
    draft = tiny.model(1, n_layers=2, attention_layers=(1,))
    engine = Careless(tiny.model(), make_draft=lambda: ModelDraft(draft), k=2, batch=1, max_length=40)
    with pytest.raises(RefusedError, match="1 of 1 replies"):
        require(engine, tiny.prompts(5))


def test_graphs_that_say_something_else_are_refused() -> None:
    class Stale(TimedEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Generated:
            found = super().generate(*args, **kwargs)
            return replace(found, replies=[[token + 1 for token in reply] for reply in found.replies])

    engine = Stale(tiny.model(), batch=1, max_length=40)
    engine.graphs, engine._warm_up = True, lambda: None  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="graph and eager differ in 1 of 1"):
        require(engine, tiny.prompts(5))


def test_a_row_that_fails_its_check_has_no_time(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def wrong(*_: Any) -> None:
        raise RefusedError("wrong: for the test")

    monkeypatch.setattr(cases, "require", wrong)
    assert run("--only", "plain", "synthetic", "selfchat", "transformers") == 1
    report = result(capsys)
    assert {row["name"] for row in report["rows"]} == {"plain", "synthetic", "selfchat", "transformers"}
    for row in report["rows"]:
        assert row["note"] == "wrong: for the test"
        assert row["ms"] is row["tokens_per_second"] is row["ratio"] is None


def test_a_row_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plain = Bench.plain

    def fails_at_two(self: Bench, row: Row) -> None:
        if row.batch == 2:
            raise RuntimeError("out of something")
        plain(self, row)

    monkeypatch.setattr(Bench, "plain", fails_at_two)
    assert run("--only", "plain") == 1
    one, two = result(capsys)["rows"]
    assert one["ms"] > 0 and two["note"] == "failed: RuntimeError: out of something" and two["ms"] is None


def run(*arguments: str) -> int:
    return __main__.main(["--device", "cpu", *arguments])


def result(capsys: Any) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_rows_of_random_weights_run_on_a_cpu(tmp_path: Path, capsys: Any) -> None:
    assert run("--json", str(tmp_path / "bench.json"), "--repeats", "2", "--trace") == 0
    text = capsys.readouterr().out
    report = json.loads(text.splitlines()[-1])
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert {"hardware", "versions", "commit", "copy_bandwidth", "seconds", "trace"} <= report.keys()
    found = {(row["name"], row["batch"], row["k"]): row for row in report["rows"]}
    assert set(found) == {
        ("plain", 1, 0),
        ("plain", 2, 0),
        ("synthetic", 1, 1),
        ("synthetic", 1, 2),
        ("synthetic", 2, 2),
        ("selfchat", 4, 0),
        ("transformers", 1, 0),
    }
    for row in found.values():
        assert row["ms"] > 0 and row["iqr_ms"] >= 0 and row["tokens_per_second"] > 0 and row["ratio"] > 0
        assert row["target"] == ""  # targets are for a GPU
    assert all("SYNTHETIC" in row["note"] for row in found.values() if row["name"] == "synthetic")
    assert 1.0 <= found["synthetic", 1, 2]["details"]["tokens_per_round"] <= 3.0
    assert set(found["selfchat", 4, 0]["details"]["round_ms_at_length"]) == {"8", "16"}
    assert set(report["trace"]) == {
        "tiny, batch 1, length 48",
        "tiny-llama, batch 1, length 16",
        "tiny-llama, batch 4, length 16",
    }
    assert "kernels of one round of tiny, batch 1, length 48:" in text and "compared with" in text


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "needs an NVIDIA GPU" in said.err


def test_speculative_needs_a_model_and_prompts(capsys: Any) -> None:
    assert run("--only", "speculative") == 2
    assert "--model" in capsys.readouterr().err


def test_what_begins_too_late_is_skipped(capsys: Any) -> None:
    assert run("--only", "plain", "--budget", "0") == 0
    assert all("skipped" in row["note"] and row["ms"] is None for row in result(capsys)["rows"])


def test_speculation_of_real_folders(tmp_path: Path, capsys: Any) -> None:
    save_pretrained(tiny.model(eos_token_ids=(7,)), tmp_path / "model")
    save_pretrained(tiny.model(eos_token_ids=(7,)), tmp_path / "same")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(p) for p in tiny.prompts(4, 6, 9)) + "\n")
    arguments = ["--model", str(tmp_path / "model"), "--draft", str(tmp_path / "same"), "ngram", "--repeats", "2"]
    assert run("--only", "speculative", *arguments, "--prompts", str(prompts), "--k", "2") == 0
    report = result(capsys)["rows"]
    assert [(row["draft"], row["batch"], row["k"]) for row in report] == [
        ("same", 1, 2),
        ("ngram", 1, 2),
        ("same", 2, 2),
        ("ngram", 2, 2),
    ]
    for row in report:
        assert row["details"]["identity"] == {"exact": 8, "near_tie": 0, "wrong": 0}
        assert 1.0 <= row["details"]["tokens_per_verification"] <= 3.0
        assert row["ratio"] > 0 and row["note"] == "3 prompts, repeated to 8"
    assert report[0]["details"]["acceptance_by_position"] == [1.0, 1.0]


def test_acceptance_by_position_counts_what_was_reached() -> None:
    stats = [SpeculationStats([10, 10], [6, 3], 10, 19), SpeculationStats([10, 10], [4, 1], 10, 15)]
    found = cases.acceptance([Generated([], stats, 0.0, 1.0)], 2)
    assert found["acceptance_by_position"] == [0.5, 0.4]
    assert found["acceptance"] == 14 / 30
    assert found["tokens_per_verification"] == 34 / 20
    assert cases.acceptance([Generated([], [SpeculationStats([0], [0], 3, 3)], 0.0, 1.0)], 1)["acceptance"] is None


def test_prompts_of_a_corpus_shard_end_before_the_reply(tmp_path: Path) -> None:
    tokens = np.arange(12, dtype=np.uint32)
    assistant = np.isin(tokens, [3, 4, 8, 9])
    np.savez(tmp_path / "s.npz", tokens=tokens, starts=np.array([0, 5, 10, 12]), assistant=assistant, ids=list("abc"))
    assert cases.read_prompts(tmp_path / "s.npz") == [[0, 1, 2], [5, 6, 7]]
    (tmp_path / "p.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match="no prompt"):
        cases.read_prompts(tmp_path / "p.jsonl")


def test_what_the_phases_do_not_explain_is_other() -> None:
    phases = {"draft": 2.0, "verify": 5.0, "accept": 0.5, "round": 8.0}
    parts = round_parts(phases, 4)
    assert parts == {"t_verify": 5.0, "t_draft": 0.5, "t_other": 1.0}
    assert predicted_speedup(0.0, 4, 8.0, **parts) == 1.0
    assert round_parts({**phases, "round": 7.0}, 4)["t_other"] == 0.5
    assert round_parts({**phases, "draft": 0.0}, 0)["t_draft"] == 0.0


def test_the_best_row_is_held_against_the_target() -> None:
    def row(name: str, batch: int, ratio: float | None, rate: float | None = None, k: int = 0) -> Row:
        return Row(name, "s", batch, 1, "d", k=k, ratio=ratio, tokens_per_second=rate)

    table = [
        row("plain", 1, 0.86),
        row("plain", 8, 0.5),
        row("speculative", 1, 1.9, k=2),
        row("speculative", 1, 1.95, k=3),
        row("speculative", 64, None, k=2),
        row("selfchat", 2048, 4.0, 4.1e5),
    ]
    rows.judge(table)
    assert [r.met for r in table] == [True, None, None, False, None, True]
    assert [bool(r.target) for r in table] == [True, False, False, True, True, True]
    said = rows.verdicts(table)
    assert len(said) == 4 and "MISSED (K 3, ratio 1.95)" in said[1] and "not measured" in said[2]


def test_a_line_says_the_numbers_or_why_there_are_none() -> None:
    row = Row("plain", "8b", 1, 4096, "bfloat16", note="wrong: because")
    assert rows.line(row).endswith("wrong: because")
    row = Row("plain", "8b", 1, 4096, "bfloat16", details={"floor_ms": 3.7312})
    row.time(Spread.of([4.0, 4.2, 4.4, 4.1, 4.3]), 238.1)
    row.compare("floor 3.731 ms", 0.888)
    first, second = rows.line(row).splitlines()
    assert "4.200" in first and "0.200" in first and "0.89  floor" in first and second == "    floor_ms 3.731"
    row.details = {"a_ms": 1.5, "round_ms": {"64": 2.0}, "phases_ms": {"64": {"draft": 0.0}, "512": {"draft": 0.25}}}
    assert [text.strip() for text in rows.line(row).splitlines()[1:]] == [
        "a_ms 1.5",
        "round_ms: 64 2",
        "phases_ms 64: draft 0",
        "phases_ms 512: draft 0.25",
    ]


def test_transformers_twin_has_the_same_logits_and_replies() -> None:
    model = tiny.model(attention_layers=(0, 1, 2, 3))
    twin = peers.transformers_twin(model)
    tokens = tiny.tokens(2, 9)
    torch.testing.assert_close(twin(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    spread, replies = peers.generate_seconds(twin, tokens, 5, repeats=2, do_sample=False)
    assert spread.repeats == 2 and spread.median > 0
    assert replies == [tiny.greedy(model, p, 5) for p in tokens.tolist()]
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        peers.transformers_twin(tiny.model())


def test_transformers_twin_keeps_its_rotary_frequencies_in_float32() -> None:
    twin = peers.transformers_twin(tiny.model(attention_layers=(0, 1, 2, 3)).bfloat16())
    assert twin.dtype == torch.bfloat16
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32
    assert twin.config._attn_implementation == "sdpa"


def test_options_change_the_defaults_of_the_device() -> None:
    chosen = __main__._parser().parse_args(["--k", "2", "4", "--context", "512", "--no-transformers"])
    settings = __main__._settings(chosen)
    assert settings == replace(Settings(), ks=(2, 4), few_ks=(2, 4), context=512, transformers=False)
    assert arithmetic.weight_bytes(SHAPES[settings.shape]) > 15e9
