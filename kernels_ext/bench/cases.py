"""The rows of the bench: shapes of MambaInLlama-8B (2408.15237) and SmolLM2 where decoding spends its time.

Every kernel works on one of several copies of its data in turn, so that it finds them as cold as the real workload
does: between two calls of one layer's kernel lie all the other layers. The copies are different slots of one cache.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import scaled_dot_product_attention

from kernels_ext.bench.measure import (
    BF16,
    BF16_STATE,
    Baseline,
    Call,
    Case,
    Config,
    Deviation,
    Phase,
    Setup,
    Target,
    UnavailableError,
    Workload,
    compare,
    load,
)
from kernels_ext.bench.traffic import (
    FoldSchedule,
    append_bytes,
    fold_schedule,
    mamba1_shape,
    mamba2_shape,
    states_moved,
    update_bytes,
    verify_bytes,
)

ACTIVATION = torch.bfloat16
HEADS, GROUPS, HEADDIM, D_STATE = 32, 8, 128, 128
"""Mamba-2 mixer of the 8B shape: d_inner = 4096, convolution over 6144 channels."""
COMMITTED = 3
"""Tokens that a round of five commits on average in the project's target."""
RING = 32
START = 1000
"""Committed tokens of the first row; the rows differ, so that their rings wrap at different places."""
CHUNK_SCAN_SECONDS = 45.0
"""What mamba-ssm's chunk scan may take to tune itself."""

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def all_cases() -> list[Case]:
    """Every row of a default run: first those with a target, then others that launch parameters are chosen by, then
    those alike."""
    fp32, bf16 = torch.float32, torch.bfloat16
    cases = [ssd_update_case(batch, state) for batch in (64, 1) for state in (fp32, bf16)]
    cases += [ssd_verify_case(batch, 5, state) for batch in (64, 1) for state in (fp32, bf16)]
    cases += [
        attention_case(2048, 3, 3, 64, keys=300, tokens=1, positions=512),
        attention_case(64, 3, 3, 64, keys=400, tokens=5, positions=512),
        attention_case(1, 8, 4, 128, keys=4096, tokens=1, positions=4352),
        sample_case(2048, 49152, 0.95, bf16),
        sample_case(2048, 49152, 0.95, fp32),
        greedy_case(1, 128256),
        *linear_cases(rows=1),
        selective_update_case(64),
        selective_verify_case(64, 5),
        selective_verify_case(1, 5),
        conv_case(64, 5),
        conv_case(1, 1),
        gated_norm_case(64),
        rms_norm_case(1),
        silu_mul_case(64),
        rope_case(64, 1),
    ]
    alike = [ssd_update_case(8, state) for state in (fp32, bf16)]
    alike += [ssd_verify_case(8, 5, state) for state in (fp32, bf16)]
    alike += [ssd_verify_case(1, tokens, fp32) for tokens in (4, 6, 7, 8)]
    alike += [
        attention_case(1, 8, 4, 128, keys=4096, tokens=5, positions=4352),
        greedy_case(64, 49152),
        *linear_cases(rows=4),
        selective_update_case(1),
        conv_case(64, 1),
        conv_case(1, 5),
        gated_norm_case(1),
        rms_norm_case(64),
        silu_mul_case(1),
        rope_case(64, 5),
        rope_case(1, 1),
        rope_case(1, 5),
    ]
    cases += [replace(case, swept=False) for case in alike]
    return sorted(cases, key=lambda case: not case.targets)


def linear_cases(rows: int) -> list[Case]:
    """The linear layers of the 8B shape."""
    return [
        linear_case("norm_linear", "in_proj", rows, 10272, 4096),
        linear_case("linear_add", "out_proj", rows, 4096, 4096),
        linear_case("norm_swiglu", "gate_up", rows, 14336, 4096),
        linear_case("linear_add", "down_proj", rows, 4096, 14336),
        linear_case("norm_linear", "lm_head", rows, 128256, 4096),
    ]


def ssd_update_case(
    batch: int, state_dtype: torch.dtype, sizes: Sequence[int] = (HEADS, GROUPS, HEADDIM, D_STATE)
) -> Case:
    """One token of Mamba-2, in place."""
    heads, groups, headdim, d_state = sizes
    shape = mamba2_shape(*sizes)
    state_bytes = state_dtype.itemsize

    def prepare(setup: Setup) -> Workload:
        op, reference = setup.kernel("ssd.kernel", "ssd_update"), load("ssd.ring_reference", "ssd_update")
        copies = setup.copies(batch * shape.state * state_bytes)
        state = _normal(setup, copies * batch, heads, headdim, d_state, dtype=state_dtype)
        slots = _slots(setup, copies, batch)
        x, B, C = _inputs(setup, sizes, batch)
        dt, A, D = _steps(setup, batch, heads), _decays(setup, heads), _normal(setup, heads, dtype=torch.float32)

        def check(config: Config | None) -> list[Deviation]:
            mine, expected = state[:batch].clone(), state[:batch].float()
            y = op(mine, x, dt, A, B, C, D, slots[0], **_override(config))
            y_expected = reference(expected, *_float(x, dt, A, B, C, D), slots[0])
            return _deviations(("y", y, y_expected), ("state", mine, expected), state_dtype=state_dtype)

        def phases(config: Config | None) -> list[Phase]:
            return [Phase([lambda s=s: op(state, x, dt, A, B, C, D, s, **_override(config)) for s in slots])]

        def mamba_ssm() -> list[list[Call]]:
            update = _mamba_ssm("ops.triton.selective_state_update", "selective_state_update")
            inputs = _repeated(x, dt, A, B, C, D)
            return [[lambda part=part: update(part, *inputs[:5], **inputs[5]) for part in state.split(batch)]]

        def check_mamba_ssm() -> list[Deviation]:
            update = _mamba_ssm("ops.triton.selective_state_update", "selective_state_update")
            inputs = _repeated(x, dt, A, B, C, D)
            y_expected = reference(state[:batch].float(), *_float(x, dt, A, B, C, D), slots[0])
            return compare([("y", update(state[:batch].clone(), *inputs[:5], **inputs[5]), y_expected)], BF16)

        moved = update_bytes(shape, batch, state_bytes)
        return Workload(
            phases,
            check,
            moved,
            states_moved(moved, shape, batch, state_bytes),
            [Baseline("mamba-ssm selective_state_update", mamba_ssm, check_mamba_ssm)],
        )

    targets = [Target("tb_s", 3.6 if state_dtype == torch.float32 else 3.2)] if batch == 64 else []
    configs = [
        {"BLOCK_P": block, "num_warps": warps}
        for block, warps in ((4, 1), (8, 2), (8, 4), (16, 4), (32, 4), (32, 8), (64, 8))
    ]
    return Case("ssd_update", _mixer(batch, sizes), "bf16", prepare, NAMES[state_dtype], targets, configs)


def ssd_verify_case(
    batch: int,
    tokens: int,
    state_dtype: torch.dtype,
    sizes: Sequence[int] = (HEADS, GROUPS, HEADDIM, D_STATE),
    ring: int = RING,
) -> Case:
    """A window of T tokens of Mamba-2, averaged over rounds that fold and rounds that do not."""
    heads, groups, headdim, d_state = sizes
    shape = mamba2_shape(*sizes)
    state_bytes = state_dtype.itemsize
    schedule = fold_schedule(tokens, ring, COMMITTED)

    def prepare(setup: Setup) -> Workload:
        op, reference = setup.kernel("ssd.kernel", "ssd_verify"), load("ssd.ring_reference", "ssd_verify")
        copies = setup.copies(batch * shape.state * state_bytes)
        n_slots = copies * batch
        state = _normal(setup, n_slots, heads, headdim, d_state, dtype=state_dtype)
        ring_x = _normal(setup, n_slots, ring, groups, headdim)
        ring_B = _normal(setup, n_slots, ring, groups, d_state)
        ring_dt = _steps(setup, n_slots, heads, ring)
        C = _normal(setup, batch, tokens, heads, d_state)
        A, D = _decays(setup, heads), _normal(setup, heads, dtype=torch.float32)
        slots, lengths, folded, weights = _cursors(setup, copies, batch, schedule)

        def check(config: Config | None) -> list[Deviation]:
            found = []
            for before, cursors in zip(("", "due "), folded, strict=True):
                mine, expected = state[:batch].clone(), state[:batch].float()
                rings = [r[:batch] for r in (ring_x, ring_B, ring_dt)]
                rest = (A, D, lengths[:batch], cursors[:batch], slots[0], tokens)
                y = op(mine, *rings, C, *rest, **_override(config))
                y_expected = reference(expected, *_float(*rings, C), *rest)
                pairs = ((f"{before}y", y, y_expected), (f"{before}state", mine, expected))
                found += _deviations(*pairs, state_dtype=state_dtype)
            return found

        def phases(config: Config | None) -> list[Phase]:
            def call(cursors: Tensor, s: Tensor) -> Call:
                rest = (C, A, D, lengths, cursors, s, tokens)
                return lambda: op(state, ring_x, ring_B, ring_dt, *rest, **_override(config))

            both = zip(folded, weights, strict=True)
            return [Phase([call(cursors, s) for s in slots], weight) for cursors, weight in both if weight]

        def window() -> tuple[Tensor, Tensor, Tensor]:
            return (
                _normal(setup, batch, tokens, groups, headdim),
                _steps(setup, batch, tokens, heads),
                _normal(setup, batch, tokens, groups, d_state),
            )

        def updates() -> list[list[Call]]:
            update = setup.kernel("ssd.kernel", "ssd_update")
            each = [[t[:, i].contiguous() for t in (*window(), C)] for i in range(tokens)]

            def call(s: Tensor) -> Call:
                return lambda: [update(state, x, dt, A, B, c, D, s) for x, dt, B, c in each]

            return [[call(s) for s in slots]]

        def snapshots() -> list[list[Call]]:
            module = importlib.import_module("kernels_ext.bench.snapshots")
            x, dt, B = window()
            pool, places, accepted = snapshot_pool(setup, batch, tokens, state)

            def calls(config: Config) -> list[Call]:
                run = module.snapshot_verify
                return [lambda p=p: run(pool, p, accepted, x, dt, A, B, C, D, config=config) for p in places]

            return [calls(config) for config in module.CONFIGS]

        def check_snapshots() -> list[Deviation]:
            module = importlib.import_module("kernels_ext.bench.snapshots")
            pool, places, accepted = snapshot_pool(setup, batch, tokens, state)
            x, dt, B = window()
            expected = pool[places[0][:, COMMITTED - 1].long()].float()
            y = module.snapshot_verify(pool, places[0], accepted, x, dt, A, B, C, D)
            update = load("ssd.ring_reference", "ssd_update")
            slots_ = _slots(setup, 1, batch)[0]
            wanted = [
                update(expected, *_float(x[:, i], dt[:, i], A, B[:, i], C[:, i], D), slots_) for i in range(tokens)
            ]
            last = pool[places[0][:, -1].long()]
            pairs = (("y", y, torch.stack(wanted, 1)), ("state", last, expected))
            return _deviations(*pairs, state_dtype=state_dtype)

        def chunk_scan() -> list[list[Call]]:
            scan = _mamba_ssm("ops.triton.ssd_combined", "mamba_chunk_scan_combined")
            x, dt, B = window()
            x, B = (t.repeat_interleave(heads // groups, dim=2) for t in (x, B))
            parts = state[: 8 * batch].float().split(batch)
            options = {"chunk_size": 64, "D": D, "return_final_states": True}
            return [[lambda h=h: scan(x, dt, A, B, C, initial_states=h, **options) for h in parts]]

        share = schedule.due
        moved = verify_bytes(shape, batch, tokens, schedule.mean_history, share, state_bytes)
        all_moved = moved + append_bytes(shape, batch, tokens)
        baselines = [Baseline(f"{tokens} × ssd_update", updates)]
        if tokens == 5:
            baselines.append(Baseline("snapshots", snapshots, check_snapshots))
        if tokens == 5 and batch == 1 and state_dtype == torch.float32:
            baselines.append(Baseline("mamba-ssm chunk scan", chunk_scan, seconds=CHUNK_SCAN_SECONDS))
        return Workload(phases, check, moved, states_moved(all_moved, shape, batch, state_bytes), baselines)

    targets = []
    if batch == 64:
        targets = [
            Target("states_moved", 1.5),
            Target("ratio", 4.0, f"{tokens} × ssd_update"),
            Target("ratio", 2.5, "snapshots"),
        ]
    if batch == 1:
        targets = [Target("us", 8.0)]
    configs = [
        {"BLOCK_P": block, "num_warps": warps, "num_stages": 1}
        for block, warps in ((16, 1), (16, 2), (16, 4), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8))
    ]
    name = f"{_mixer(batch, sizes)} T={tokens} L={ring}"
    return Case("ssd_verify", name, "bf16", prepare, NAMES[state_dtype], targets, configs)


def snapshot_pool(setup: Setup, batch: int, tokens: int, state: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """State slots of the snapshot scheme, T of each row: their states, the slots of each call, and how many tokens of
    the round before were accepted."""
    one = batch * tokens * state[0].numel() * state.element_size()
    copies = setup.copies(one)
    pool = _normal(setup, copies * batch * tokens, *state.shape[1:], dtype=state.dtype)
    places = [s.view(batch, tokens) for s in _slots(setup, copies, batch * tokens)]
    return pool, places, torch.full((batch,), COMMITTED, dtype=torch.int32, device=setup.device)


def selective_update_case(batch: int, sizes: Sequence[int] = (HEADS, GROUPS, HEADDIM, 16)) -> Case:
    """One token of Mamba-1, in place, fp32 state."""
    heads, groups, headdim, d_state = sizes
    shape = mamba1_shape(*sizes)

    def prepare(setup: Setup) -> Workload:
        op = setup.kernel("selective_scan.kernel", "selective_update")
        reference = load("selective_scan.reference", "selective_update")
        copies = setup.copies(batch * shape.state * 4)
        state = _normal(setup, copies * batch, heads * headdim, d_state, dtype=torch.float32)
        slots = _slots(setup, copies, batch)
        x = _normal(setup, batch, groups, headdim)
        B = _normal(setup, batch, groups, headdim // d_state, d_state)
        C = _normal(setup, batch, heads, headdim // d_state, d_state)
        dt = _steps(setup, batch, heads * headdim)
        A, D = _decays(setup, heads * headdim, d_state), _normal(setup, heads * headdim, dtype=torch.float32)

        def check(config: Config | None) -> list[Deviation]:
            mine, expected = state[:batch].clone(), state[:batch].clone()
            y = op(mine, x, dt, A, B, C, D, slots[0], **_override(config))
            y_expected = reference(expected, *_float(x, dt, A, B, C, D), slots[0])
            return compare([("y", y, y_expected), ("state", mine, expected)], BF16)

        def phases(config: Config | None) -> list[Phase]:
            return [Phase([lambda s=s: op(state, x, dt, A, B, C, D, s, **_override(config)) for s in slots])]

        moved = update_bytes(shape, batch)
        return Workload(phases, check, moved, states_moved(moved, shape, batch))

    return Case("selective_update", _mixer(batch, sizes), "bf16", prepare, "fp32", configs=_mamba1_configs())


def selective_verify_case(batch: int, tokens: int, sizes: Sequence[int] = (HEADS, GROUPS, HEADDIM, 16)) -> Case:
    """A window of T tokens of Mamba-1 with a ring of two windows: every round folds. The window is in the rings."""
    heads, groups, headdim, d_state = sizes
    shape = mamba1_shape(*sizes)
    ring = 2 * tokens
    schedule = fold_schedule(tokens, ring, COMMITTED)

    def prepare(setup: Setup) -> Workload:
        op = setup.kernel("selective_scan.kernel", "selective_verify")
        reference = load("selective_scan.reference", "selective_verify")
        copies = setup.copies(batch * shape.state * 4)
        n_slots = copies * batch
        state = _normal(setup, n_slots, heads * headdim, d_state, dtype=torch.float32)
        ring_x = _normal(setup, n_slots, ring, groups, headdim)
        ring_B = _normal(setup, n_slots, ring, groups, headdim)
        ring_dt = _steps(setup, n_slots, ring, heads * headdim)
        C = _normal(setup, batch, tokens, heads, headdim // d_state, d_state)
        A, D = _decays(setup, heads * headdim, d_state), _normal(setup, heads * headdim, dtype=torch.float32)
        slots, lengths, (_, folded), _ = _cursors(setup, copies, batch, schedule)

        def check(config: Config | None) -> list[Deviation]:
            mine, expected = state[:batch].clone(), state[:batch].clone()
            rings = [r[:batch] for r in (ring_x, ring_B, ring_dt)]
            rest = (A, D, lengths[:batch], folded[:batch], slots[0], tokens)
            y = op(mine, *rings, C, *rest, **_override(config))
            y_expected = reference(expected, *_float(*rings, C), *rest)
            return compare([("y", y, y_expected), ("state", mine, expected)], BF16)

        def phases(config: Config | None) -> list[Phase]:
            def call(s: Tensor) -> Call:
                rest = (C, A, D, lengths, folded, s, tokens)
                return lambda: op(state, ring_x, ring_B, ring_dt, *rest, **_override(config))

            return [Phase([call(s) for s in slots])]

        def updates() -> list[list[Call]]:
            update = setup.kernel("selective_scan.kernel", "selective_update")
            shared = (batch, tokens, groups, headdim)
            x, B = _normal(setup, *shared), _normal(setup, *shared).unflatten(3, (-1, d_state))
            dt = _steps(setup, batch, tokens, heads * headdim)
            each = [[t[:, i].contiguous() for t in (x, dt, B, C)] for i in range(tokens)]

            def call(s: Tensor) -> Call:
                return lambda: [update(state, x, dt, A, B, c, D, s) for x, dt, B, c in each]

            return [[call(s) for s in slots]]

        moved = verify_bytes(shape, batch, tokens, schedule.mean_history, schedule.due)
        all_moved = moved + append_bytes(shape, batch, tokens)
        baselines = [Baseline(f"{tokens} × selective_update", updates)]
        return Workload(phases, check, moved, states_moved(all_moved, shape, batch), baselines)

    name = f"{_mixer(batch, sizes)} T={tokens} L={ring}"
    return Case("selective_verify", name, "bf16", prepare, "fp32", configs=_mamba1_configs())


def conv_case(
    batch: int, tokens: int, sizes: Sequence[int] = (HEADS, GROUPS, HEADDIM, D_STATE), d_conv: int = 4
) -> Case:
    """The convolution of a Mamba-2 layer with dt's softplus and the writes to all rings."""
    heads, groups, headdim, d_state = sizes
    d_inner = heads * headdim
    channels = groups * (headdim + d_state) + heads * d_state

    def prepare(setup: Setup) -> Workload:
        op = setup.kernel("causal_conv.kernel", "conv_ring_update")
        reference = load("causal_conv.ring_reference", "conv_ring_update")
        conv_ring = d_conv - 1 + max(tokens, 5)
        token = 2 * groups * (headdim + d_state) + 4 * heads
        copies = setup.copies(batch * (conv_ring * channels * 2 + RING * token))
        n_slots = copies * batch
        projected = _normal(setup, batch, tokens, d_inner + channels + heads)  # z | x | B | C | dt
        x, dt = projected[..., d_inner : d_inner + channels], projected[..., d_inner + channels :]
        weight, bias = _normal(setup, channels, d_conv), _normal(setup, channels)
        dt_bias = _normal(setup, heads, dtype=torch.float32)
        rings = [
            _normal(setup, n_slots, conv_ring, channels),
            _normal(setup, n_slots, RING, groups, headdim),
            _normal(setup, n_slots, RING, groups, d_state),
            _steps(setup, n_slots, heads, RING),
        ]
        slots, lengths = _slots(setup, copies, batch), _lengths(setup, n_slots)

        def run(function: Callable, inputs: Sequence[Tensor], rings: Sequence[Tensor], slot: Tensor, **options: Any):
            x, dt, weight, bias = inputs
            caches = dict(zip(("ring_x", "ring_B", "ring_dt"), rings[1:], strict=True))
            at = (lengths, slot, True)
            return function(x, rings[0], weight, bias, *at, dt=dt, dt_bias=dt_bias, **caches, **options)

        inputs = (x, dt, weight, bias)

        def check(config: Config | None) -> list[Deviation]:
            mine, expected = [r[:batch].clone() for r in rings], [r[:batch].float() for r in rings]
            y, steps = run(op, inputs, mine, slots[0], **_override(config))
            y_expected, steps_expected = run(reference, _float(*inputs), expected, slots[0])
            names = ("ring", "ring_x", "ring_B", "ring_dt")
            pairs = [("y", y, y_expected), ("dt", steps, steps_expected), *zip(names, mine, expected, strict=True)]
            return compare(pairs, BF16)

        def phases(config: Config | None) -> list[Phase]:
            return [Phase([lambda s=s: run(op, inputs, rings, s, **_override(config)) for s in slots])]

        rows = tokens * (3 * channels + heads) * 2 + (d_conv - 1) * channels * 2  # x, y, ring; dt; the ring's past
        moved = batch * (rows + tokens * (token + 4 * heads)) + (weight.numel() + bias.numel()) * 2
        return Workload(phases, check, moved)

    configs = [{"BLOCK_C": block, "num_warps": warps} for block, warps in ((64, 2), (128, 2), (128, 4), (512, 4))]
    return Case("conv_ring_update", f"{batch}×{tokens}×{channels} W={d_conv}", "bf16", prepare, configs=configs)


def gated_norm_case(rows: int, channels: int = HEADS * HEADDIM, group_size: int = HEADDIM) -> Case:
    """Gated RMSNorm over the channels of each head; z is a slice of in_proj's output."""

    def prepare(setup: Setup) -> Workload:
        op = setup.kernel("gated_norm.kernel", "gated_rms_norm")
        reference = load("gated_norm.reference", "gated_rms_norm")
        y, weight = _normal(setup, rows, channels), _normal(setup, channels)
        z = _normal(setup, rows, 2 * channels)[:, :channels]
        arguments = (y, z, weight)
        return _stateless(op, reference, arguments, (group_size, 1e-5), (3 * rows + 1) * channels * 2)

    configs = [{"BLOCK_M": block, "num_warps": warps} for block, warps in ((1, 1), (4, 2), (8, 4), (16, 4))]
    return Case("gated_rms_norm", f"{rows}×{channels}/{group_size}", "bf16", prepare, configs=configs)


def rms_norm_case(rows: int, d: int = 4096) -> Case:
    """RMSNorm of the residual stream."""

    def prepare(setup: Setup) -> Workload:
        op, reference = setup.kernel("rms_norm.kernel", "rms_norm"), load("rms_norm.reference", "rms_norm")
        arguments = (_normal(setup, rows, d), _normal(setup, d))
        return _stateless(op, reference, arguments, (1e-5,), (2 * rows + 1) * d * 2)

    return Case("rms_norm", f"{rows}×{d}", "bf16", prepare, configs=[{"num_warps": warps} for warps in (4, 16)])


def silu_mul_case(rows: int, d: int = 14336) -> Case:
    """The MLP's gate."""

    def prepare(setup: Setup) -> Workload:
        op, reference = setup.kernel("swiglu.kernel", "silu_mul"), load("swiglu.reference", "silu_mul")
        return _stateless(op, reference, (_normal(setup, rows, 2 * d),), (), 3 * rows * d * 2)

    configs = [{"BLOCK_F": block, "num_warps": warps} for block, warps in ((256, 1), (1024, 4), (2048, 8))]
    return Case("silu_mul", f"{rows}×{d}", "bf16", prepare, configs=configs)


def rope_case(
    batch: int, tokens: int, heads: int = 32, groups: int = 8, headdim: int = 128, positions: int = 2048
) -> Case:
    """Rotation of queries and keys, and the append to the cache."""

    def prepare(setup: Setup) -> Workload:
        op, reference = setup.kernel("attention.kernel", "rope_append"), load("attention.reference", "rope_append")
        copies = setup.copies(batch * groups * positions * headdim * 4, most=16)
        qkv = _normal(setup, batch, tokens, (heads + 2 * groups) * headdim)
        k, v = (_normal(setup, copies * batch, groups, positions, headdim) for _ in range(2))
        angles = torch.rand(positions, headdim // 2, device=setup.device) * 6
        cos, sin = angles.cos(), angles.sin()
        slots, lengths = _slots(setup, copies, batch), _lengths(setup, copies * batch)

        def check(config: Config | None) -> list[Deviation]:
            mine, expected = [c[:batch].clone() for c in (k, v)], [c[:batch].float() for c in (k, v)]
            rest = (cos, sin, lengths, slots[0], heads)
            q = op(qkv, *mine, *rest, **_override(config))
            q_expected = reference(qkv.float(), *expected, *rest)
            return compare([("q", q, q_expected), *zip(("k", "v"), mine, expected, strict=True)], BF16)

        def phases(config: Config | None) -> list[Phase]:
            def call(s: Tensor) -> Call:
                return lambda: op(qkv, k, v, cos, sin, lengths, s, heads, **_override(config))

            return [Phase([call(s) for s in slots])]

        return Workload(phases, check, 2 * qkv.numel() * 2 + batch * tokens * headdim * 4)

    shape = f"{batch}×{tokens} {heads}/{groups}×{headdim}"
    return Case("rope_append", shape, "bf16", prepare, configs=[{"BLOCK_HEADS": 4}, {"BLOCK_HEADS": 8}])


def attention_case(batch: int, groups: int, ratio: int, headdim: int, keys: int, tokens: int, positions: int) -> Case:
    """Attention of T new tokens to `keys` positions, themselves among them, in a cache of `positions`."""
    heads = groups * ratio

    def prepare(setup: Setup) -> Workload:
        op = setup.kernel("attention.kernel", "decode_attention")
        reference = load("attention.reference", "decode_attention")
        copies = setup.copies(batch * groups * keys * headdim * 4)
        q = _normal(setup, batch, tokens, heads, headdim)
        k, v = (_normal(setup, copies * batch, groups, positions, headdim) for _ in range(2))
        lengths = torch.full((copies * batch,), keys - tokens, dtype=torch.int32, device=setup.device)
        slots = _slots(setup, copies, batch)

        def options(config: Config | None) -> dict[str, Any]:
            if config is not None and "splits" in config:
                return {"splits": config["splits"]}
            return _override(config)

        def check(config: Config | None) -> list[Deviation]:
            rest = (lengths[:batch], slots[0])
            out = op(q, k[:batch], v[:batch], *rest, **options(config))
            return compare([("out", out, reference(*_float(q, k[:batch], v[:batch]), *rest))], BF16)

        def phases(config: Config | None) -> list[Phase]:
            return [Phase([lambda s=s: op(q, k, v, lengths, s, **options(config)) for s in slots])]

        def sdpa() -> list[list[Call]]:
            last = torch.arange(keys - tokens, keys, device=setup.device)
            mask = (torch.arange(keys, device=setup.device) <= last[:, None]).expand(batch, 1, tokens, keys)
            queries = q.transpose(1, 2).contiguous()
            parts = [[t[s.long(), :, :keys].contiguous() for t in (k, v)] for s in slots]

            def call(k: Tensor, v: Tensor) -> Call:
                return lambda: scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=True)

            return [[call(*part) for part in parts]]

        moved = 2 * 2 * batch * groups * keys * headdim + 2 * 2 * q.numel()
        return Workload(phases, check, moved, baselines=[Baseline("torch SDPA", sdpa)])

    configs: list[Config] = [{"splits": n} for n in (8, 16, 32)] if batch == 1 else []
    configs += [
        {"BLOCK_K": block, "num_warps": warps, "num_stages": stages}
        for block, warps, stages in ((32, 1, 4), (32, 2, 4), (64, 1, 3), (64, 4, 3), (128, 2, 2), (128, 4, 2))
    ]
    shape = f"{batch}×{tokens} {heads}/{groups}×{headdim} keys={keys}"
    return Case("decode_attention", shape, "bf16", prepare, configs=configs)


def sample_case(rows: int, vocabulary: int, top_p: float, dtype: torch.dtype = ACTIVATION) -> Case:
    """Nucleus sampling. Wrong is a row whose uniform number lies off its token's interval of the cumulative
    distribution by more than 1e-4; rounding at a nucleus' edge may move a row in five hundred."""

    def prepare(setup: Setup) -> Workload:
        op, reference = setup.kernel("sampling.kernel", "sample"), load("sampling.reference", "sample")
        probabilities = load("sampling.reference", "filtered_probabilities")
        settings = (1.0, 0, top_p)
        size = rows * vocabulary * dtype.itemsize
        logits = [4 * _normal(setup, rows, vocabulary, dtype=dtype) for _ in range(setup.copies(size, most=8))]
        uniforms = torch.rand(rows, device=setup.device)

        def check(config: Config | None) -> list[Deviation]:
            tokens = op(logits[0], uniforms, *settings, **_override(config)).long()[:, None]
            strays = 0
            for part, u, token in zip(logits[0].split(256), uniforms.split(256), tokens.split(256), strict=True):
                p = probabilities(part, *settings).double()
                above = p.cumsum(-1).gather(1, token)[:, 0]
                mass = p.gather(1, token)[:, 0]
                inside = (u < above + 1e-4) & (u > above - mass - 1e-4) & (mass > 0)
                strays += len(u) - int(inside.sum())
            return [Deviation("share of stray rows", strays / rows, 2e-3)]

        def phases(config: Config | None) -> list[Phase]:
            return [Phase([lambda part=part: op(part, uniforms, *settings, **_override(config)) for part in logits])]

        def by_sorting() -> list[list[Call]]:
            return [[lambda part=part: reference(part, uniforms, *settings) for part in logits[:1]]]

        return Workload(phases, check, size, baselines=[Baseline("sorting, plain PyTorch", by_sorting)])

    targets = [Target("us", 300.0 if dtype == torch.bfloat16 else 800.0)] if (rows, vocabulary) == (2048, 49152) else []
    configs = [
        {"BLOCK": block, "PIVOTS": pivots, "STAGES": stages, "SAMPLE": 2048, "num_warps": warps}
        for block, pivots, stages, warps in (
            (1024, 4, 1, 4),
            (1024, 4, 4, 4),
            (1024, 8, 3, 4),
            (2048, 4, 1, 8),
            (2048, 4, 2, 8),
            (2048, 8, 3, 8),
            (4096, 4, 1, 8),
            (4096, 4, 3, 16),
            (4096, 8, 3, 16),
        )
    ]
    return Case("sample", f"{rows}×{vocabulary} top_p={top_p:g}", NAMES[dtype], prepare, "", targets, configs)


def greedy_case(rows: int, vocabulary: int) -> Case:
    """The first maximum of each row."""

    def prepare(setup: Setup) -> Workload:
        op = setup.kernel("sampling.kernel", "greedy")
        copies = setup.copies(rows * vocabulary * 2)
        logits = [4 * _normal(setup, rows, vocabulary) for _ in range(copies)]

        def check(config: Config | None) -> list[Deviation]:
            top = logits[0].max(-1, keepdim=True).values
            index = torch.arange(vocabulary, device=setup.device)
            first = torch.where(logits[0] == top, index, vocabulary).min(-1).values
            other = op(logits[0], **_override(config)) != first
            return [Deviation("share of other tokens", other.double().mean().item(), 0.0)]

        def phases(config: Config | None) -> list[Phase]:
            return [Phase([lambda part=part: op(part, **_override(config)) for part in logits])]

        def argmax() -> list[list[Call]]:
            return [[lambda part=part: part.argmax(-1) for part in logits]]

        return Workload(phases, check, rows * vocabulary * 2, baselines=[Baseline("torch.argmax", argmax)])

    targets = [Target("us", 8.0)] if (rows, vocabulary) == (1, 128256) else []
    configs = [
        {"BLOCK": block, "splits": splits, "num_warps": 4}
        for block, splits in ((1024, 64), (1024, 128), (2048, 32), (2048, 64))
    ]
    return Case("greedy", f"{rows}×{vocabulary}", "bf16", prepare, targets=targets, configs=configs)


def linear_case(op_name: str, layer: str, rows: int, n_out: int, n_in: int) -> Case:
    """A linear layer of few rows: the weights are read once. The baseline is the product alone, without the norm, the
    residual or the gate that the kernel adds."""
    gated = op_name == "norm_swiglu"

    def prepare(setup: Setup) -> Workload:
        op, reference = setup.kernel("linear.kernel", op_name), load("linear.reference", op_name)
        copies = setup.copies(n_out * n_in * (4 if gated else 2))
        scale = n_in**-0.5
        weights = [scale * _normal(setup, 2 * n_out if gated else n_out, n_in) for _ in range(copies)]
        x, norm_weight, residual = _normal(setup, rows, n_in), _normal(setup, n_in), _normal(setup, rows, n_out)

        def run(function: Callable, weight: Tensor, cast: Callable = lambda t: t, **options: Any) -> Tensor:
            if op_name == "linear_add":
                return function(cast(x), weight, cast(residual), **options)
            return function(cast(x), cast(norm_weight), 1e-5, weight, **options)

        def check(config: Config | None) -> list[Deviation]:
            expected = run(reference, weights[0].float(), torch.Tensor.float)
            return compare([("y", run(op, weights[0], **_override(config)), expected)], BF16)

        def phases(config: Config | None) -> list[Phase]:
            return [Phase([lambda w=w: run(op, w, **_override(config)) for w in weights])]

        def product() -> list[list[Call]]:
            return [[lambda w=w: torch_linear(x, w) for w in weights]]

        moved = 2 * (weights[0].numel() + x.numel() + rows * n_out * (2 if op_name == "linear_add" else 1))
        return Workload(phases, check, moved, baselines=[Baseline("F.linear alone", product)])

    def configs(setup: Setup) -> list[Mapping[str, Any]]:
        found = setup.kernel("linear.kernel", "candidates")(rows, n_out, n_in, gated)
        return found[1 :: max(1, math.ceil(len(found) / 6))]

    return Case(op_name, f"{rows}×{n_in}→{n_out} {layer}", "bf16", prepare, configs=configs)


def _stateless(op: Callable, reference: Callable, tensors: tuple, settings: tuple, moved: float) -> Workload:
    """A function of activations, which the kernel before it has left in the L2 cache: always the same ones."""

    def check(config: Config | None) -> list[Deviation]:
        expected = reference(*_float(*tensors), *settings)
        return compare([("y", op(*tensors, *settings, **_override(config)), expected)], BF16)

    def phases(config: Config | None) -> list[Phase]:
        return [Phase([lambda: op(*tensors, *settings, **_override(config))])]

    return Workload(phases, check, moved)


def _mamba_ssm(module: str, name: str) -> Callable[..., Any]:
    """A function of mamba-ssm's Triton kernels. Releases up to 2.3.2 import their CUDA extension without need."""
    if importlib.util.find_spec("mamba_ssm") is None:
        raise UnavailableError("mamba-ssm is not installed")
    if "selective_scan_cuda" not in sys.modules and importlib.util.find_spec("selective_scan_cuda") is None:
        sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    try:
        return getattr(importlib.import_module(f"mamba_ssm.{module}"), name)
    except Exception as error:
        raise UnavailableError(f"mamba-ssm does not import: {error}") from error


def _repeated(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple:
    """Arguments of mamba-ssm's update after the state: x and B repeated for each head, scalars with stride 0, by which
    it tells Mamba-2 from Mamba-1."""
    heads, headdim = C.shape[1], x.shape[2]
    x, B = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (x, B))
    dt, D, bias = (t[..., None].expand(*t.shape, headdim) for t in (dt, D, torch.zeros_like(D)))
    return x, dt, A[:, None, None].expand(heads, headdim, B.shape[-1]), B, C, {"D": D, "dt_bias": bias}


def _cursors(setup: Setup, copies: int, batch: int, schedule: FoldSchedule) -> tuple:
    """Slots of each copy, committed lengths, cursors of the rounds that do not fold and of those that do, and the
    shares of the two."""
    lengths = _lengths(setup, copies * batch)
    folded = [lengths - round(history) for history in (schedule.history, schedule.history_due)]
    return _slots(setup, copies, batch), lengths, folded, (1 - schedule.due, schedule.due)


def _lengths(setup: Setup, n_slots: int) -> Tensor:
    return START + (7 * torch.arange(n_slots, device=setup.device) % 64).int()


def _slots(setup: Setup, copies: int, batch: int) -> list[Tensor]:
    """Each copy's slots in a tensor of its own: all are aligned alike, so one compiled kernel serves them."""
    return [torch.arange(c * batch, (c + 1) * batch, device=setup.device, dtype=torch.int32) for c in range(copies)]


def _normal(setup: Setup, *shape: int, dtype: torch.dtype = ACTIVATION) -> Tensor:
    return torch.randn(*shape, device=setup.device, dtype=dtype)


def _steps(setup: Setup, *shape: int) -> Tensor:
    """dt after softplus, log-uniform in [1e-3, 1e-1] as Mamba initialises it."""
    return torch.exp(torch.empty(*shape, device=setup.device).uniform_(math.log(1e-3), math.log(1e-1)))


def _decays(setup: Setup, *shape: int) -> Tensor:
    """A, uniform in [−16, −1]."""
    return -torch.empty(*shape, device=setup.device).uniform_(1, 16)


def _inputs(setup: Setup, sizes: Sequence[int], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, B, C of one token as the views that the convolution leaves."""
    heads, groups, headdim, d_state = sizes
    row = _normal(setup, batch, groups * (headdim + d_state) + heads * d_state)
    x, B, C = row.split((groups * headdim, groups * d_state, heads * d_state), dim=1)
    return x.unflatten(1, (groups, headdim)), B.unflatten(1, (groups, d_state)), C.unflatten(1, (heads, d_state))


def _float(*tensors: Tensor) -> list[Tensor]:
    return [t.float() for t in tensors]


def _override(config: Config | None) -> dict[str, Any]:
    return {} if config is None else {"config": dict(config)}


def _deviations(*pairs: tuple[str, Tensor, Tensor], state_dtype: torch.dtype) -> list[Deviation]:
    """Outputs within bfloat16's tolerance, states within that of the type they are stored in."""
    state = BF16_STATE if state_dtype == torch.bfloat16 else BF16
    return [d for pair in pairs for d in compare([pair], state if "state" in pair[0] else BF16)]


def _mamba1_configs() -> list[Config]:
    return [{"BLOCK_D": block, "num_warps": warps} for block, warps in ((32, 1), (64, 2), (128, 4), (256, 4))]


def _mixer(batch: int, sizes: Sequence[int]) -> str:
    heads, groups, headdim, d_state = sizes
    return f"{batch}×{heads}({groups})×{headdim}×{d_state}"
