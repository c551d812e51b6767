import importlib
import itertools
import json
import re

import pytest
import torch

from kernels_ext import bench
from kernels_ext.bench import cases, table, timing
from kernels_ext.bench.__main__ import main
from kernels_ext.bench.circumstances import circumstances, first_line
from kernels_ext.bench.measure import (
    Baseline,
    Case,
    Deviation,
    Phase,
    Row,
    Setup,
    Target,
    UnavailableError,
    Workload,
    compare,
    measure,
    sweep,
)
from tests.kernels_ext.interpreted import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
snapshots = interpreted("kernels_ext.bench.snapshots")

# speculation.md §4: x repeated for all heads and dt in bfloat16; C and y are not counted there.
PAPER_MAMBA2 = bench.MixerShape(state=32 * 128 * 128, cached=4096 + 1024, dt=16, C=0, y=0, constants=0)
PAPER_MAMBA1 = bench.MixerShape(state=4096 * 16, cached=4096 + 1024, dt=2048, C=0, y=0, constants=0)


@pytest.mark.parametrize("shape, cached", [(PAPER_MAMBA2, 10.3e3), (PAPER_MAMBA1, 18.4e3)])
def test_cached_inputs_of_a_token_are_those_of_the_table(shape, cached):
    assert shape.token_bytes() == pytest.approx(cached, rel=5e-3)


def test_bytes_are_those_of_the_table():
    mega = 1e6
    assert 5 * bench.update_bytes(PAPER_MAMBA2) / mega == pytest.approx(
        20.97, abs=0.06
    )  # the table leaves out x, B, dt
    assert bench.snapshot_bytes(PAPER_MAMBA2, 1, 5) / mega == pytest.approx(12.63, abs=5e-3)
    assert bench.snapshot_bytes(PAPER_MAMBA1, 1, 5) / mega == pytest.approx(1.67, abs=6e-3)
    for shape, expected in ((PAPER_MAMBA2, 2.79), (PAPER_MAMBA1, 0.62)):
        ring = bench.verify_bytes(shape, 1, 5, history=6, due=0.25) + bench.append_bytes(shape, 1, 5)
        assert ring / mega == pytest.approx(expected, abs=5e-3)


def test_states_moved_count_states_of_the_whole_batch_in_their_own_width():
    snapshots_moved = bench.states_moved(bench.snapshot_bytes(PAPER_MAMBA2, 64, 5), PAPER_MAMBA2, 64)
    assert snapshots_moved == pytest.approx(6.02, abs=5e-3)
    fp32 = bench.update_bytes(PAPER_MAMBA2, 8, state_bytes=4)
    bf16 = bench.update_bytes(PAPER_MAMBA2, 8, state_bytes=2)
    assert fp32 - bf16 == 2 * 8 * PAPER_MAMBA2.state * 2
    assert bench.states_moved(bf16, PAPER_MAMBA2, 8, 2) == pytest.approx(2.01, abs=5e-3)


def test_our_shapes_share_x_and_B_in_a_group():
    mamba2 = bench.mamba2_shape(heads=32, groups=8, headdim=128, d_state=128)
    assert (mamba2.state, mamba2.token_bytes()) == (524288, 2048 + 2048 + 128)
    mamba1 = bench.mamba1_shape(heads=32, groups=8, headdim=128, d_state=16)
    assert (mamba1.state, mamba1.token_bytes()) == (65536, 2048 + 2048 + 16384)


def test_five_token_verification_moves_less_than_one_and_a_half_states():
    shape = bench.mamba2_shape(32, 8, 128, 128)
    schedule = bench.fold_schedule(window=5, ring=32, committed=3)
    moved = bench.verify_bytes(shape, 64, 5, schedule.mean_history, schedule.due) + bench.append_bytes(shape, 64, 5)
    assert 1.125 < bench.states_moved(moved, shape, 64) < 1.5


@pytest.mark.parametrize(
    "window, ring, committed", [(5, 32, 3), (5, 10, 3), (8, 32, (1, 5)), (4, 9, (0, 0, 4)), (1, 2, 1)]
)
def test_fold_schedule_against_many_rounds(window, ring, committed):
    steps = [committed] if isinstance(committed, int) else committed
    lengths = folded = 0
    histories = {True: [], False: []}
    rounds = 30000
    for commit in itertools.islice(itertools.cycle(steps), rounds):
        due = lengths - folded + 2 * window > ring
        histories[due].append(lengths - folded)
        if due:
            folded = lengths
        lengths += commit
        assert lengths - folded + window <= ring  # what the next round appends never overwrites the history
    schedule = bench.fold_schedule(window, ring, committed)

    def mean(values):
        return sum(values) / max(1, len(values))

    assert schedule.due == pytest.approx(len(histories[True]) / rounds, abs=1e-3)
    assert schedule.history == pytest.approx(mean(histories[False]), abs=1e-2)
    assert schedule.history_due == pytest.approx(mean(histories[True]), abs=1e-2)
    assert schedule.mean_history == pytest.approx(mean(histories[True] + histories[False]), abs=1e-2)


def test_fold_schedule_never_folds_what_is_never_committed():
    assert bench.fold_schedule(5, 10, 0) == bench.FoldSchedule(due=0.0, history=0.0, history_due=0.0)


def test_fold_schedule_names_both_numbers_of_a_short_ring():
    with pytest.raises(ValueError, match="ring of 9 slots, window of 5.*10"):
        bench.fold_schedule(5, 9, 3)
    with pytest.raises(ValueError, match="6.*between 0 and the window's 5"):
        bench.fold_schedule(5, 32, 6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_snapshot_baseline_against_a_float64_loop(dtype, tolerance):
    batch, tokens, heads, groups, headdim, d_state = 2, 3, 4, 2, 6, 16
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    states = normal(1 + batch * tokens, heads, headdim, d_state).to(dtype)
    slots = (1 + torch.randperm(batch * tokens, generator=generator)).int().view(batch, tokens).to(DEVICE)
    accepted = torch.tensor([1, 3], dtype=torch.int32, device=DEVICE)
    x, B = normal(batch, tokens, groups, headdim), normal(batch, tokens, groups, d_state)
    C, D, A = normal(batch, tokens, heads, d_state), normal(heads), -normal(heads).abs()
    dt = normal(batch, tokens, heads).abs()
    before = states.clone()
    y = snapshots.snapshot_verify(states, slots, accepted, x, dt, A, B, C, D, config={"BLOCK_P": 4, "num_warps": 1})

    kept = []
    for b in range(batch):
        state = before[slots[b, accepted[b] - 1].long()].double()
        for t in range(tokens):
            for h in range(heads):
                write = dt[b, t, h].double() * x[b, t, h // 2].double()[:, None] * B[b, t, h // 2].double()[None]
                state[h] = state[h] * torch.exp((dt[b, t, h] * A[h]).double()) + write
                wanted = state[h] @ C[b, t, h].double() + D[h].double() * x[b, t, h // 2].double()
                torch.testing.assert_close(y[b, t, h].double(), wanted, rtol=1e-4, atol=1e-4)
            kept.append((states[slots[b, t].long()], state.clone()))
    mine, wanted = (torch.stack(part) for part in zip(*kept, strict=True))
    assert compare([("states", mine, wanted)], tolerance)[0].within
    assert torch.equal(states[0], before[0])  # a slot of nobody


def fake_timer(calls):
    for call in calls:
        call()
    return bench.Timing(median_us=10.0, iqr_us=1.0, repeats=7)


def references(module, name):
    """The plain PyTorch twin in place of a kernel; it takes no launch parameters."""
    package = module.removesuffix(".kernel")
    twin = "ring_reference" if package in ("ssd", "causal_conv") else "reference"
    if name == "candidates":
        return lambda *shape: [{"BLOCK_N": 1}, {"BLOCK_N": 2}, {"BLOCK_N": 4}]
    function = getattr(importlib.import_module(f"kernels_ext.{package}.{twin}"), name)

    def run(*arguments, config=None, **options):
        if package == "linear":  # in float32 as the kernel; the reference rounds in between
            wide = (a.float() if isinstance(a, torch.Tensor) else a for a in arguments)
            return function(*wide, **options).to(arguments[0].dtype)
        return function(*arguments, **options)

    return run


MIXER = (4, 2, 8, 16)
TINY = [
    cases.ssd_update_case(2, torch.float32, MIXER),
    cases.ssd_update_case(2, torch.bfloat16, MIXER),
    cases.ssd_verify_case(2, 5, torch.float32, MIXER),
    cases.ssd_verify_case(1, 4, torch.bfloat16, MIXER),
    cases.selective_update_case(2, (4, 2, 8, 4)),
    cases.selective_verify_case(2, 3, (4, 2, 8, 4)),
    cases.conv_case(2, 3, MIXER),
    cases.gated_norm_case(2, 32, 8),
    cases.rms_norm_case(2, 48),
    cases.silu_mul_case(2, 48),
    cases.rope_case(2, 2, heads=4, groups=2, headdim=8, positions=1100),
    cases.attention_case(2, 2, 2, 8, keys=20, tokens=3, positions=32),
    cases.sample_case(40, 97, top_p=0.9),
    cases.sample_case(40, 97, 0.9, torch.float32),
    cases.greedy_case(3, 97),
    cases.linear_case("norm_linear", "in_proj", 2, 24, 16),
    cases.linear_case("linear_add", "out_proj", 2, 24, 16),
    cases.linear_case("norm_swiglu", "gate_up", 2, 24, 16),
]


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op}-{case.dtype}-{case.state_dtype}")
def test_every_row_runs_on_the_references(case):
    torch.manual_seed(0)
    setup = Setup(device=DEVICE, working_set=2e4, kernel=references)
    row, later = measure(case, setup, fake_timer, copy=4e12)
    assert (row.note, row.us, row.iqr_us) == ("", pytest.approx(10.0), pytest.approx(1.0))
    assert row.tb_s == pytest.approx(row.bytes / 10e-6 * 1e-12)
    assert row.copy_share == pytest.approx(row.tb_s / 4)
    assert later == []
    for baseline in row.baselines:
        assert "ratio" in baseline or "mamba-ssm" in baseline["name"], baseline
    assert all(deviation["value"] <= deviation["tolerance"] for deviation in row.deviations)

    swept = sweep(case, setup, fake_timer, None, in_time=lambda: True)
    assert swept.baselines == [] and all("us" in entry for entry in swept.sweep)


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op}-{case.dtype}-{case.state_dtype}")
def test_no_row_times_a_kernel_that_is_wrong(case):
    def broken(module, name):
        function = references(module, name)

        def run(*arguments, **options):
            out = function(*arguments, **options)
            first = out[0] if isinstance(out, tuple) else out
            first.copy_((first + 1) % 97 if first.dtype == torch.int32 else first * 1.02)
            return out

        return run

    def timer(calls):
        raise AssertionError("a wrong kernel is timed")

    setup = Setup(device=DEVICE, working_set=2e4, kernel=broken)
    row, _ = measure(case, setup, timer, copy=None)
    assert row.us is None and row.note.startswith("wrong: ") and ">" in row.note
    swept = sweep(case, setup, timer, None, in_time=lambda: True)
    assert swept.us is None and all(entry["note"].startswith("wrong: ") for entry in swept.sweep)


def workload(deviation=0.0, **options):
    """Work whose kernel deviates by what `deviation` gives for a configuration."""
    by_config = deviation if callable(deviation) else lambda config: deviation
    return Workload(
        phases=options.pop("phases", lambda config: [Phase([lambda: None])]),
        check=lambda config: [Deviation("y", by_config(config), 1e-3)],
        bytes=options.pop("bytes", 4e7),
        **options,
    )


def case(work, **options):
    return Case("op", "1×2", "bf16", lambda setup: work, **options)


def test_nan_is_wrong():
    row, _ = measure(case(workload(float("nan"))), Setup("cpu"), fake_timer, None)
    assert row.us is None and row.note.startswith("wrong: y nan")
    assert row.deviations == [{"what": "y", "value": None, "tolerance": 1e-3}]  # JSON knows no NaN


def test_a_missing_kernel_is_a_line():
    def prepare(setup):
        setup.kernel("ssd.kernel", "ssd_transmogrify")

    row, _ = measure(Case("op", "1", "bf16", prepare), Setup("cpu"), fake_timer, None)
    assert row.note.startswith("missing: kernels_ext.ssd.kernel.ssd_transmogrify")
    assert "missing:" in table.lines(row)


def test_a_kernel_that_fails_is_a_line():
    def timer(calls):
        raise RuntimeError("CUDA error\nout of something")

    row, _ = measure(case(workload()), Setup("cpu"), timer, None)
    assert row.note == "failed: RuntimeError: out of something"


def test_phases_are_averaged_by_weight():
    times = iter([8.0, 24.0])
    phases = [Phase([lambda: None], 0.75), Phase([lambda: None], 0.25)]
    row, _ = measure(
        case(workload(phases=lambda config: phases)),
        Setup("cpu"),
        lambda calls: bench.Timing(next(times), 2.0, 7),
        None,
    )
    assert (row.us, row.iqr_us) == (12.0, 2.0)
    assert [phase["median_us"] for phase in row.phases] == [8.0, 24.0]
    assert "8.00 µs in 75.0% of rounds, 24.00 µs in 25.0% of rounds" in table.lines(row)


def test_baselines_and_targets():
    def missing():
        raise UnavailableError("that-package is not installed")

    slow = [lambda: None] * 2
    baselines = [
        Baseline("fastest counts", lambda: [slow, [lambda: None]]),
        Baseline("absent", missing),
        Baseline("wrong", lambda: [slow], check=lambda: [Deviation("y", 1.0, 1e-3)]),
        Baseline("later", lambda: [slow], seconds=30.0),
    ]
    targets = [
        Target("tb_s", 3.6),
        Target("us", 8.0),
        Target("states_moved", 1.5),
        Target("ratio", 2.0, "fastest counts"),
        Target("ratio", 3.0, "later"),
    ]
    work = workload(baselines=baselines, states=1.2)
    row, later = measure(
        case(work, targets=targets), Setup("cpu"), lambda calls: bench.Timing(10.0 * len(calls), 1.0, 7), 8e12
    )
    assert [target["met"] for target in row.targets] == [True, False, True, False, None]
    assert row.baselines[0]["ratio"] == 1.0
    assert row.baselines[1]["note"] == "that-package is not installed"
    assert row.baselines[2] == {"name": "wrong", "note": "wrong: y 1.00e+00 > 1e-03"}
    text = table.lines(row)
    assert "4.00   50%   1.20" in text  # TB/s, share of the copy, states
    assert "than fastest counts: 10.00 µs (iqr 1.00), 1.00×" in text
    assert "target ≤ 8 µs: MISSED" in text and "target ≥ 3× later: not measured" in text
    ((seconds, add),) = later
    add()
    assert seconds == 30.0 and row.targets[-1] == {"target": "≥ 3× later", "met": False}


def test_sweep_prints_the_best_beside_the_default_and_refuses_what_is_wrong():
    configs = [{"BLOCK_P": 8}, {"BLOCK_P": 16}, {"BLOCK_P": 32}, {"BLOCK_P": 64}]
    left = iter([True, True, True, False])
    work = workload(
        deviation=lambda config: 1.0 if config == {"BLOCK_P": 32} else 0.0,
        phases=lambda config: [Phase([lambda: None] * (3 if config is None else config["BLOCK_P"] // 8))],
    )
    row = sweep(
        case(work, configs=configs),
        Setup("cpu"),
        lambda calls: bench.Timing(1.0 * len(calls), 0.1, 7),
        None,
        lambda: next(left),
    )
    assert [entry.get("us") for entry in row.sweep] == [1.0, 2.0, None, None]
    text = table.sweep_lines(row)
    assert "default 3.00 µs; best of 2 others 1.00 µs (3.00×): BLOCK_P=8" in text
    assert "wrong: y 1.00e+00 > 1e-03: BLOCK_P=32" in text and "skipped: out of time: BLOCK_P=64" in text


def test_default_rows_are_those_of_the_issue():
    found = cases.all_cases()
    named = {f"{case.op} {case.shape} {case.state_dtype}".strip() for case in found}
    assert len({(case.op, case.shape, case.dtype, case.state_dtype) for case in found}) == len(found)
    with_target = [bool(case.targets) for case in found]
    assert with_target == sorted(with_target, reverse=True), "targets come first"
    for batch in (1, 8, 64):
        for state in ("fp32", "bf16"):
            assert f"ssd_update {batch}×32(8)×128×128 {state}" in named
            assert f"ssd_verify {batch}×32(8)×128×128 T=5 L=32 {state}" in named
    assert {f"ssd_verify 1×32(8)×128×128 T={tokens} L=32 fp32" for tokens in range(4, 9)} <= named
    targets = {str(target) for case in found for target in case.targets}
    assert {"≥ 3.6 TB/s", "≥ 3.2 TB/s", "≤ 1.5 states", "≥ 4× 5 × ssd_update", "≥ 2.5× snapshots"} <= targets


def test_circumstances():
    found = circumstances(("torch", "no-such-package"), device="cpu")
    assert "CPU" in found["hardware"] and found["versions"] == {"torch": torch.__version__, "no-such-package": None}
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["commit"])
    assert first_line(["no-such-program"]) is first_line(["false"]) is None


def test_copy_bandwidth_is_that_of_the_faster_way(monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    zeros, times = torch.zeros, iter([50.0, 20.0])
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(timing, "time_graph", lambda calls: [c() for c in calls] and bench.Timing(next(times), 0.0, 7))
    assert bench.copy_bandwidth(1 << 10) == pytest.approx(2 * (1 << 10) / 20e-6)


def test_refuses_without_cuda_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1 and "needs an NVIDIA GPU" in streams.err


@pytest.mark.parametrize("wrong", [False, True])
def test_prints_a_table_and_one_json_line(monkeypatch, capsys, tmp_path, wrong):
    module = importlib.import_module("kernels_ext.bench.__main__")
    monkeypatch.setattr(module, "_missing", lambda: "")
    monkeypatch.setattr(module, "circumstances", lambda packages: {"hardware": "H200", "driver": "1"})
    monkeypatch.setattr(module, "copy_bandwidth", lambda: 4.28e12)
    monkeypatch.setattr(module, "time_graph", fake_timer)
    late = Baseline("late", lambda: [[lambda: None]], seconds=5.0)
    rows = [case(workload(1.0 if wrong else 0.0, baselines=[late]))]
    monkeypatch.setattr(module, "all_cases", lambda: rows)
    assert main(["--json", str(tmp_path / "bench.json")]) == (1 if wrong else 0)
    out = capsys.readouterr().out
    assert "H200" in out and "copy 4.28 TB/s" in out and table.head() in out
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert found["copy_bandwidth"] == 4.28e12
    assert found["rows"][0]["us"] == (None if wrong else 10.0)
    assert [b["name"] for b in found["rows"][0]["baselines"]] == ([] if wrong else ["late"])


def test_out_of_time_is_said_and_unknown_patterns_are_refused(monkeypatch, capsys):
    module = importlib.import_module("kernels_ext.bench.__main__")
    monkeypatch.setattr(module, "_missing", lambda: "")
    monkeypatch.setattr(module, "circumstances", lambda packages: {"hardware": "H200", "driver": "1"})
    monkeypatch.setattr(module, "copy_bandwidth", lambda: 4.28e12)
    assert main(["--only", "greedy", "--budget", "1e-9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("skipped: out of time" in line for line in lines[:-1]) == 2  # the last is JSON
    assert main(["--sweep", "--budget", "1e-9"]) == 0
    swept = capsys.readouterr().out
    assert "ssd_verify       64×" in swept and "ssd_verify       8×" not in swept
    assert main(["--only", "no such op"]) == 2
    assert "no such op" in capsys.readouterr().err


def test_numbers_in_the_table_line_up():
    row = Row("op", "shape", "bf16", "fp32", us=1234.5, iqr_us=None, bytes=1.5e6, tb_s=3.25)
    assert len(table.head().splitlines()[0]) == len(table.lines(row))


@pytest.mark.gpu
def test_time_graph_and_copy_bandwidth():
    a = torch.zeros(1 << 22, device="cuda")
    timing = bench.time_graph([lambda: a.add_(1.0)], repeats=5)
    assert 1 < timing.median_us < 1000 and timing.repeats == 5 and timing.iqr_us < timing.median_us
    assert 1e11 < bench.copy_bandwidth(1 << 28) < 1e13
