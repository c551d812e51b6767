from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from kernels_ext.speculation import reference
from tests.kernels_ext.interpreted import interpreted

kernel = interpreted("kernels_ext.speculation.kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = pytest.mark.parametrize("ops", [reference, kernel], ids=["reference", "kernel"])
DRAWS = 100_000


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is not a token."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(-7))


def integers(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_distributions(*shape: int, seed: int, peaked: float = 1.5) -> torch.Tensor:
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * peaked
    return logits.softmax(-1).to(DEVICE)


def random_uniforms(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def drawn_from(q: torch.Tensor, seed: int) -> torch.Tensor:
    """One token of each distribution (…, V)."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.multinomial(q.flatten(0, -2), 1, generator=generator).view(q.shape[:-1]).int()


def prefix(agrees: list[bool]) -> int:
    return next((i for i, agree in enumerate(agrees) if not agree), len(agrees))


# Acceptance.


@IMPLEMENTATIONS
@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_greedy_and_injected_acceptance_are_prefixes(ops, k):
    rng = np.random.default_rng(k)
    chosen, draft = rng.integers(0, 2, (11, k + 1)), rng.integers(0, 2, (11, k))
    n_draft = rng.integers(0, k + 1, 11)
    n_draft[0], n_draft[1] = k, 0
    draft[0] = chosen[0, :k]
    uniforms, rate = rng.random((11, k + 1), dtype=np.float32), np.linspace(0.9, 0.4, k, dtype=np.float32)
    on_device = integers(chosen), integers(draft), integers(n_draft)
    greedy = ops.accept_greedy(*on_device)
    injected = ops.accept_injected(*on_device, torch.tensor(uniforms, device=DEVICE), torch.tensor(rate, device=DEVICE))
    for n_accepted, following in (greedy, injected):
        assert n_accepted.dtype == following.dtype == torch.int32
    for b, real in enumerate(n_draft):
        n = prefix([bool(draft[b, i] == chosen[b, i]) for i in range(real)])
        assert (int(greedy[0][b]), int(greedy[1][b])) == (n, chosen[b, n])
        n = prefix([bool(uniforms[b, i] < rate[i]) for i in range(real)])
        assert (int(injected[0][b]), int(injected[1][b])) == (n, chosen[b, n])


def accept_by_the_paper(p, q, draft, n_draft, uniforms) -> tuple[int, int]:
    """2211.17192, Algorithm 1, for one row; q None is the one-hot of the draft."""
    vocabulary = p.shape[1]
    q = np.eye(vocabulary, dtype=np.float32)[draft] if q is None else q
    n = prefix([q[i, draft[i]] > 0 and uniforms[i] * q[i, draft[i]] < p[i, draft[i]] for i in range(n_draft)])
    weights = p[n].astype(np.float64)
    if n < n_draft:
        residual = np.maximum(p[n] - q[n], 0).astype(np.float64)
        weights = residual if residual.sum() > 0 else weights
    cumulative = np.cumsum(weights)
    return n, next(t for t in range(vocabulary) if cumulative[t] > uniforms[-1] * cumulative[-1])


@IMPLEMENTATIONS
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize(("k", "with_q"), [(0, False), (1, True), (3, True), (4, False)])
def test_sampled_acceptance_is_the_algorithm(ops, block, k, with_q):
    config = {} if ops is reference else {"config": {"BLOCK": block, "num_warps": 1}}
    rows, vocabulary = 24, 97
    p = random_distributions(rows, k + 1, vocabulary, seed=k)
    q = random_distributions(rows, k, vocabulary, seed=k + 10) if with_q else None
    if with_q:  # close enough for both outcomes, with exact zeros
        q = 0.5 * q + 0.5 * p[:, :k]
        q[..., 5::7] = 0.0
        q = q / q.sum(-1, keepdim=True)
        p[..., 3::5] = 0.0
        p = p / p.sum(-1, keepdim=True)
    draft = drawn_from(q if with_q else p[:, :k], seed=k) if k else integers(np.zeros((rows, 0)))
    n_draft = integers([b % (k + 1) for b in range(rows)])
    uniforms = random_uniforms(rows, k + 1, seed=k + 20)
    n_accepted, following = ops.accept_sampled(p, q, draft, n_draft, uniforms, **config)
    assert n_accepted.dtype == following.dtype == torch.int32
    wanted = [
        accept_by_the_paper(
            p[b].cpu().numpy(),
            None if q is None else q[b].cpu().numpy(),
            draft[b].cpu().numpy(),
            int(n_draft[b]),
            uniforms[b].cpu().numpy(),
        )
        for b in range(rows)
    ]
    assert list(zip(n_accepted.tolist(), following.tolist(), strict=True)) == wanted


@IMPLEMENTATIONS
def test_the_same_distribution_always_accepts_and_a_disjoint_one_never(ops):
    p = random_distributions(8, 3, 11, seed=0)
    draft = drawn_from(p[:, :2], seed=1)
    uniforms = torch.full((8, 3), 1 - 2.0**-24, device=DEVICE)
    assert ops.accept_sampled(p, p[:, :2].clone(), draft, integers([2] * 8), uniforms)[0].tolist() == [2] * 8
    q = p[:, :2].clone()
    p, q = p.clone(), q
    p[..., :6], q[..., 6:] = 0.0, 0.0
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    uniforms = random_uniforms(8, 3, seed=2)
    uniforms[:, :2] = 0.0
    n_accepted, following = ops.accept_sampled(p, q, drawn_from(q, seed=3), integers([2] * 8), uniforms)
    assert n_accepted.tolist() == [0] * 8
    assert min(following.tolist()) >= 6


@IMPLEMENTATIONS
def test_nothing_left_over_falls_back_to_the_target(ops):
    """p equals q, but the proposal is a token that neither can produce."""
    p = torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]] * 3, device=DEVICE)
    uniforms = torch.tensor([[0.0, 0.1], [0.0, 0.3], [0.0, 0.99]], device=DEVICE)
    got = ops.accept_sampled(p, p[:, :1].clone(), integers([[0]] * 3), integers([1] * 3), uniforms)
    assert got[0].tolist() == [0, 0, 0]
    assert got[1].tolist() == [1, 2, 2]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_first_token_follows_the_target(k, deterministic):
    p = random_distributions(1, k + 1, 8, seed=k).expand(DRAWS, -1, -1)
    q = random_distributions(1, k, 8, seed=k + 5).expand(DRAWS, -1, -1)
    draft = integers([[2, 0, 1][:k]]).expand(DRAWS, -1) if deterministic else drawn_from(q, seed=k)
    n_draft = integers([k]).expand(DRAWS)
    uniforms = random_uniforms(DRAWS, k + 1, seed=k)
    n_accepted, following = reference.accept_sampled(p, None if deterministic else q, draft, n_draft, uniforms)
    first = torch.where(n_accepted > 0, draft[:, 0], following)
    seen = np.bincount(first.cpu().numpy(), minlength=8)
    assert 0 < int((n_accepted > 0).sum()) < DRAWS
    assert chisquare(seen, p[0, 0].cpu().double().numpy() / float(p[0, 0].double().sum()) * DRAWS).pvalue > 1e-3


def test_the_whole_sequence_follows_a_markov_target():
    """Three tokens out of rounds of two proposals; position i's distribution is given by the token before it."""
    target, draft_model = random_distributions(3, 3, seed=1), random_distributions(3, 3, seed=2)
    start = torch.zeros(DRAWS, dtype=torch.long, device=DEVICE)
    sequence, known, last = torch.full((DRAWS, 6), -1, device=DEVICE), torch.zeros_like(start), start
    rows = torch.arange(DRAWS, device=DEVICE)
    for r in range(3):
        proposals, q, previous = [], [], last
        for i in range(2):
            q.append(draft_model[previous])
            previous = drawn_from(q[-1], seed=10 * r + i).long()
            proposals.append(previous)
        draft, q = torch.stack(proposals, 1), torch.stack(q, 1)
        p = target[torch.cat([last[:, None], draft], 1)]
        n_draft = torch.full_like(last, 2).int()
        uniforms = random_uniforms(DRAWS, 3, seed=r + 30)
        n_accepted, following = reference.accept_sampled(p, q, draft.int(), n_draft, uniforms)
        for i in range(3):
            token = draft[:, i].where(i < n_accepted, following) if i < 2 else following.long()
            at = (known + i).clamp(max=5)
            write = (i <= n_accepted) & (known + i < 6)
            sequence[rows, at] = token.where(write, sequence[rows, at])
        known, last = known + n_accepted + 1, following.long()
    code = (sequence[:, 0] * 9 + sequence[:, 1] * 3 + sequence[:, 2]).cpu().numpy()
    law = target.cpu().double().numpy()
    wanted = [law[0, a] * law[a, b] * law[b, c] for a, b, c in itertools.product(range(3), repeat=3)]
    seen = np.bincount(code, minlength=27)
    assert chisquare(seen, np.array(wanted) / sum(wanted) * DRAWS).pvalue > 1e-3


# The end of a round.

CAPACITY, MAXIMUM = 7, 40


def new_round(k: int, seed: int, batch: int = 5) -> dict:
    """Arguments of `advance` with slots in any order, one row that takes no part, and junk after the known text."""
    rng = np.random.default_rng(seed)
    n_draft = rng.integers(0, k + 1, batch)
    lengths = rng.integers(0, 20, CAPACITY)
    slots = rng.permutation(CAPACITY)[:batch]
    slots[rng.integers(batch)] = -1
    return {
        "n_accepted": integers([rng.integers(0, n + 1) for n in n_draft]),
        "next": integers(rng.integers(0, 6, batch)),
        "draft": integers(rng.integers(0, 6, (batch, k))),
        "text": integers(rng.integers(-9, 9, (CAPACITY, MAXIMUM))),
        "lengths": integers(lengths),
        "folded": integers(lengths - np.minimum(lengths, rng.integers(0, 2 * k + 3, CAPACITY))),
        "slots": integers(slots),
        "ends": integers(lengths + rng.integers(2, 6, CAPACITY)),
        "stop": integers(rng.integers(0, 6, seed % 4)),
        "window": k + 1,
        "ring": 2 * (k + 1) + seed % 3,
        "emitted": integers(np.full((batch, k + 1), -7)),
        "counts": integers(np.full(batch, -7)),
        "n_draft": integers(n_draft),
        "proposed": integers(rng.integers(0, 9, (batch, k))),
        "accepted": integers(rng.integers(0, 9, (batch, k))),
        "rounds": integers(rng.integers(0, 6, batch)),
    }


def advance_row_by_row(state: dict) -> dict:
    """What `advance` is to leave behind, as lists."""
    s = {name: value.tolist() if torch.is_tensor(value) else value for name, value in state.items()}
    k = state["draft"].shape[1]
    for b, slot in enumerate(s["slots"]):
        s["emitted"][b] = [-1] * (k + 1)
        s["counts"][b] = 0
        if slot < 0:
            continue
        tokens = s["draft"][b][: s["n_accepted"][b]] + [s["next"][b]]
        length, end = s["lengths"][slot], s["ends"][slot]
        stopped = [i for i, token in enumerate(tokens) if token in s["stop"]]
        tokens = tokens[: stopped[0] + 1] if stopped else tokens
        tokens = tokens[: end - length - 1]
        s["text"][slot][length + 1 : length + 1 + len(tokens)] = tokens
        s["emitted"][b][: len(tokens)] = tokens
        s["counts"][b] = len(tokens)
        if length - s["folded"][slot] + 2 * s["window"] > s["ring"]:
            s["folded"][slot] = length
        s["lengths"][slot] += len(tokens)
        if tokens[-1] in s["stop"] or length + 1 + len(tokens) == end:
            s["slots"][b] = -1
        s["rounds"][b] += 1
        for i in range(k):
            s["proposed"][b][i] += i < s["n_draft"][b]
            s["accepted"][b][i] += i < s["n_accepted"][b]
    return s


@IMPLEMENTATIONS
@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_advance_is_the_rule_row_by_row(ops, k):
    seen = set()
    for seed in range(12):
        state = new_round(k, seed)
        wanted = advance_row_by_row(state)
        closed = [s for s, after in zip(state["slots"].tolist(), wanted["slots"], strict=True) if s >= 0 > after]
        seen |= {"closed"} if closed else set()
        seen |= {"folded"} if state["folded"].tolist() != wanted["folded"] else set()
        cut = [n for n, kept in zip(wanted["counts"], wanted["n_accepted"], strict=True) if 0 < n <= kept]
        seen |= {"cut"} if cut else set()
        assert ops.advance(**state) is None
        for name, value in state.items():
            assert (value.tolist() if torch.is_tensor(value) else value) == wanted[name], (seed, name)
    assert seen >= ({"closed", "folded", "cut"} if k else {"closed", "folded"})


@IMPLEMENTATIONS
def test_a_stop_inside_the_window_ends_the_row_there(ops):
    state = new_round(3, 0, batch=1) | {
        "slots": integers([4]),
        "n_accepted": integers([3]),
        "n_draft": integers([3]),
        "draft": integers([[5, 6, 7]]),
        "next": integers([6]),
        "stop": integers([99, 6]),
        "ends": integers([MAXIMUM] * CAPACITY),
    }
    length = int(state["lengths"][4])
    ops.advance(**state)
    assert state["emitted"].tolist() == [[5, 6, -1, -1]]
    assert state["counts"].tolist() == [2]
    assert state["slots"].tolist() == [-1]
    assert int(state["lengths"][4]) == length + 2


@IMPLEMENTATIONS
def test_rows_that_take_no_part_touch_nothing(ops):
    """In a batch of nothing else, and although the cursors they must not read say that everything is due and full."""
    state = new_round(2, 1) | {"slots": integers([-1] * 5)}
    state |= {"folded": state["folded"] * 0 - 100, "ends": state["ends"] * 0}
    before = {name: value.clone() for name, value in state.items() if torch.is_tensor(value)}
    ops.advance(**state)
    assert state["emitted"].tolist() == [[-1] * 3] * 5
    assert state["counts"].tolist() == [0] * 5
    for name in before.keys() - {"emitted", "counts"}:
        assert torch.equal(state[name], before[name]), name


# Prompt look-up.


def look_up(text: list[int], longest: int, k: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest suffix that occurred before."""
    for n in range(min(longest, len(text)), 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                return text[end : end + k]
    return []


@IMPLEMENTATIONS
@pytest.mark.parametrize(("longest", "k"), [(1, 1), (3, 4), (4, 0), (2, 7)])
def test_look_up_is_the_definition(ops, longest, k):
    configs = [{}] if ops is reference else [{"config": {"BLOCK": 16, "num_warps": 1}}, {}]
    rng = np.random.default_rng(longest)
    text = rng.integers(0, 4, (9, 53))
    text[3] = np.arange(53)  # nothing occurs twice
    text[4] = 2  # everything does
    text[5, :-1] = np.arange(52)
    text[5, 50], text[5, 51] = 7, 8  # an occurrence far back
    lengths = rng.integers(0, 52, 9)
    lengths[:3] = 0, 1, 52
    lengths[3:6] = 51, 40, 51
    slots = [8, 5, -1, 0, 1, 2, 3, 4, 7]
    wanted = [look_up(text[s, : lengths[s] + 1].tolist() if s >= 0 else [], longest, k) for s in slots]
    assert not k or (any(wanted) and not all(wanted))
    for config in configs:
        draft, n_draft = ops.ngram_propose(integers(text), integers(lengths), integers(slots), longest, k, **config)
        assert draft.dtype == n_draft.dtype == torch.int32
        assert n_draft.tolist() == [len(tokens) for tokens in wanted]
        assert draft.tolist() == [tokens + [0] * (k - len(tokens)) for tokens in wanted]


def test_a_text_too_long_to_look_up_is_refused():
    lengths = integers([0])
    with pytest.raises(ValueError, match="at most 31 tokens .* got 32 in 4"):
        kernel.ngram_propose(integers([[0] * 4]), lengths, lengths, 32, 2)
