"""What is kept of the teacher: how close to all of it, and the same after a crash."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from corpora.packing import PackedBlocks
from corpora.shards import Shard
from hybrid import load_pretrained
from stage_store import Checkpoints, Store
from steps import init_from_attention, kl_distill, teacher_cache
from steps.config import InitStageConfig, KLConfig
from steps.losses import kl_loss
from steps.teacher_cache import CachedBatch, TeacherCache, TeacherCacheError, cached_divergence_, draws, likeliest
from tests.steps import tiny_stages

V, T = 23, 9
KL = KLConfig(steps=6, batch_size=2, seq_len=61, mixer_lr=3e-3, rest_lr=1e-3, checkpoint_every=2)


def logits(seed, scale=2.0, dtype=torch.float64):
    return torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def divergence_of(student, ids, log_p, kind, weights=None, **options):
    """Losses (T,) and the gradient of their weighted sum."""
    gradient = student.clone()
    weights = torch.ones(T, dtype=student.dtype) if weights is None else weights
    losses = cached_divergence_(gradient, ids, log_p, weights, kind, **options)
    return losses, gradient


def full_kl(student, teacher, temperature=1.0):
    student = student.clone().requires_grad_()
    log_p, log_q = log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)
    losses = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    return losses.detach(), torch.autograd.grad(losses.sum(), student)[0]


# Estimators


def test_all_classes_are_the_full_divergence():
    student, teacher = logits(0), logits(1)
    ids, log_p = likeliest(teacher, V)
    losses, gradient = divergence_of(student, ids, log_p, "top_k")
    wanted, wanted_gradient = full_kl(student, teacher)
    assert torch.allclose(losses, wanted) and torch.allclose(gradient, wanted_gradient)


def test_likeliest_with_the_mass_of_all_others():
    student, teacher = logits(0), logits(1)
    ids, log_p = likeliest(teacher, 5)
    assert torch.equal(ids, teacher.topk(5).indices)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(T, dtype=torch.float64))
    student.requires_grad_()
    q, p = student.softmax(-1), teacher.softmax(-1)
    coarse_q, coarse_p = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1) for x in (q, p))
    wanted = (coarse_p * (coarse_p.log() - coarse_q.log())).sum(-1)
    losses, gradient = divergence_of(student.detach(), ids, log_p, "top_k")
    assert torch.allclose(losses, wanted.detach())
    assert torch.allclose(gradient, torch.autograd.grad(wanted.sum(), student)[0])
    assert (losses < full_kl(student.detach(), teacher)[0]).all(), "what the others share among them is not seen"


@pytest.mark.parametrize("k", [1, 4])
def test_draws_are_unbiased_in_value_and_gradient(k):
    """Averaged over the uniform number: on a fine grid, not by chance."""
    student, teacher = logits(0), logits(1)
    grid = 400
    value, gradient = torch.zeros(T, dtype=torch.float64), torch.zeros(T, V, dtype=torch.float64)
    for step in range(grid):
        drawn = draws(teacher, k, torch.full((T,), (step + 0.5) / grid, dtype=torch.float64))
        losses, one = divergence_of(student, *drawn, "samples")
        value += losses / grid
        gradient += one / grid
    wanted, wanted_gradient = full_kl(student, teacher)
    assert torch.allclose(gradient, wanted_gradient, atol=2 / grid)
    assert torch.allclose(value, wanted, atol=0.05)
    assert not torch.allclose(one, wanted_gradient, atol=0.05), "a single draw is far from the mean"


def test_draws_come_as_often_as_they_are_likely():
    teacher = logits(1)
    ids, log_p = draws(teacher, 40, torch.rand(T, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    counts = torch.zeros(T, V).scatter_add_(1, ids, torch.ones(T, 40))
    expected = 40 * teacher.softmax(-1)
    assert ((counts >= expected.floor()) & (counts <= expected.ceil())).all()
    assert torch.allclose(log_p, log_softmax(teacher, -1).gather(1, ids))


@pytest.mark.parametrize("kind", ["top_k", "samples"])
def test_temperature_cross_entropy_and_weights(kind):
    student, teacher, labels = logits(0), logits(1), torch.arange(T)
    ids, log_p = likeliest(teacher / 2, V) if kind == "top_k" else draws(teacher / 2, 7, torch.full((T,), 0.3))
    weights = torch.rand(T, dtype=torch.float64)
    weights[2] = 0.0
    student[2] = float("nan")
    losses, gradient = divergence_of(student, ids, log_p, kind, weights, temperature=2.0, labels=labels, ce_weight=0.5)
    given = student.nan_to_num(0.0).requires_grad_()
    log_q = log_softmax(given / 2, -1).gather(1, ids)
    p = log_p[:, :-1].exp() if kind == "top_k" else torch.full_like(log_p, 1 / 7)
    own = 4 * (p * (log_p[:, : p.shape[1]] - log_q)).sum(-1) + 0.5 * cross_entropy(given, labels, reduction="none")
    own = own.masked_fill(weights == 0, 0.0)
    assert torch.allclose(losses, own.detach())
    assert torch.allclose(gradient, torch.autograd.grad((weights * own).sum(), given)[0])
    untouched = student.clone()
    assert torch.equal(
        cached_divergence_(untouched, ids, log_p, weights, kind, 2.0, labels, 0.5, gradient=False), losses
    )
    assert torch.equal(untouched.nan_to_num(7.0), student.nan_to_num(7.0))


# The stage


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    found = tiny_stages.upstream(tmp_path_factory.mktemp("upstream"))
    out = tmp_path_factory.mktemp("student")
    config = InitStageConfig(attention=[1], tokens=256, batch_size=2, seq_len=64, measure_paper=False)
    init_from_attention.run(config, found, out, tiny_stages.context(out))
    return {**found, "student": out}


@pytest.fixture
def run(inputs, tmp_path):
    def runs(name, config, **more):
        out = tmp_path / name
        out.mkdir()
        summary = kl_distill.run(config, inputs, out, tiny_stages.context(tmp_path / name, **more))
        return summary, dict(load_pretrained(out).named_parameters())

    return runs


def test_all_classes_train_as_the_teacher_itself(run):
    """The first epoch has the same blocks; what is kept is rounded to half precision."""
    with_all, plain = (run(name, replaced(cache))[0] for name, cache in (("all", "top_k:320"), ("plain", "none")))
    assert [step for step, _ in with_all["curve"]] == [step for step, _ in plain["curve"]]
    for (_, cached), (_, own) in zip(with_all["curve"], plain["curve"], strict=True):
        assert cached == pytest.approx(own, rel=2e-3)
    assert with_all["held_out"]["kl"] == pytest.approx(plain["held_out"]["kl"], rel=0.02)
    assert with_all["teacher_cache"]["kept"] == "top_k:320" and "teacher_cache" not in plain


def replaced(cache, **changes):
    return KL.model_copy(update={"teacher_cache": cache, **changes})


@pytest.mark.parametrize("cache", ["top_k:8", "samples:8"])
def test_a_part_of_the_teacher_teaches(run, cache):
    before, _ = run("before", replaced(cache, steps=1, mixer_lr=1e-9, rest_lr=0.0))
    after, _ = run("after", replaced(cache, steps=20))
    assert after["held_out"]["kl"] < before["held_out"]["kl"]
    blocks = after["teacher_cache"]["blocks"]
    assert 1 < blocks < 40, "more than one epoch"
    assert after["teacher_cache"]["bytes"] == blocks * 61 * (2 * 8 + 2 * (8 + (cache == "top_k:8")))


@pytest.fixture
def cache(inputs, tmp_path):
    """A function that opens the cache of a folder."""
    shard = Shard.load(inputs["corpus"] / "train.npz")

    def opens(folder, config):
        (tmp_path / folder).mkdir(exist_ok=True)
        return TeacherCache(tmp_path / folder, PackedBlocks(shard, 61, 3, cut_once=True), 320, config, seed=3)

    return opens


def test_batches_carry_what_the_teacher_says_of_their_own_tokens(inputs, cache, tmp_path):
    """In the second epoch, where blocks come in another order."""
    config = replaced("top_k:320", steps=40)
    teacher = load_pretrained(inputs["teacher"])
    opened = cache("own", config)
    opened.fill(teacher, tiny_stages.context(tmp_path))
    batch = opened.batches(config)(opened.count // 2 + 1).data
    assert isinstance(batch, CachedBatch)
    with torch.no_grad():
        log_p = log_softmax(teacher(batch.tokens, batch.seq_idx), -1)
    assert torch.allclose(batch.log_p[..., :-1].float(), log_p.gather(2, batch.ids.long()), atol=1e-2)
    hidden = torch.randn(*batch.tokens.shape, 32, generator=torch.Generator().manual_seed(0))
    head = teacher.lm_head_weight
    own = teacher_cache.cached_kl_loss(hidden, head, batch, "top_k")
    with torch.no_grad():
        whole = kl_loss(hidden, head, teacher.hidden(batch.tokens, batch.seq_idx), head, batch.mask)
    assert own.item() == pytest.approx(whole.item(), rel=1e-3)


class Killed(Exception):
    pass


def dies_after(teacher, passes):
    """The teacher, which fails when it is read once more."""
    real, left = teacher.hidden, iter(range(passes))

    def hidden(*arguments):
        if next(left, None) is None:
            raise Killed
        return real(*arguments)

    teacher.hidden = hidden
    return teacher


@pytest.mark.parametrize("kept", ["top_k:8", "samples:8"])
def test_a_fill_that_was_killed_goes_on_to_the_same_bytes(inputs, cache, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(teacher_cache, "PASS_TOKENS", 3 * 61)
    config, context = replaced(kept, steps=4), tiny_stages.context(tmp_path)
    whole = cache("whole", config)
    whole.fill(load_pretrained(inputs["teacher"]), context)
    with pytest.raises(Killed):
        cache("part", config).fill(dies_after(load_pretrained(inputs["teacher"]), 2), context)
    again = cache("part", config)
    assert (again.filled, again.count) == (6, 8)
    with (tmp_path / "part" / teacher_cache.IDS).open("ab") as file:
        file.write(b"what a pass left that did not end")
    again.fill(dies_after(load_pretrained(inputs["teacher"]), 1), context)
    for name in (teacher_cache.IDS, teacher_cache.LOG_P):
        whole_bytes = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "part" / name).read_bytes()[: len(whole_bytes)] == whole_bytes


def test_a_stage_that_was_killed_goes_on_to_the_same_weights_with_what_it_kept(run, tmp_path, monkeypatch):
    config = replaced("samples:8")
    _, undisturbed = run("undisturbed", config)
    checkpoints = Checkpoints(Store(tmp_path / "store"), "kl_distill", "0" * 64)
    batches = TeacherCache.batches

    def stops(self, config):
        made = batches(self, config)

        def batch(number):
            if number == 5:
                raise Killed
            return made(number)

        return batch

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(TeacherCache, "batches", stops)
        run("killed", config, checkpoints=checkpoints)
    assert checkpoints.latest()[0] in (2, 4)
    monkeypatch.setattr(TeacherCache, "fill", None)  # nothing is computed again
    _, continued = run("continued", config, checkpoints=checkpoints)
    assert all(torch.equal(continued[name], weight) for name, weight in undisturbed.items())
    checkpoints.clear()
    assert not list((tmp_path / "store").rglob(teacher_cache.IDS))


def test_what_does_not_fit_is_refused(cache, tmp_path, monkeypatch, inputs):
    with pytest.raises(TeacherCacheError, match="teacher_cache is top_k:321, but the vocabulary has 320 tokens"):
        cache("large", replaced("top_k:321"))
    usage = teacher_cache.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TeacherCacheError, match=r"needs 0\.0 GB more in .*keep fewer classes than 8"):
        cache("full", replaced("top_k:8")).fill(load_pretrained(inputs["teacher"]), tiny_stages.context(tmp_path))
