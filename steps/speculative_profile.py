"""Stage: speculative decoding of the student, K from 0 (plain) upwards, with the output checked against plain
greedy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corpora import preferences
from corpora.shards import Shard
from evals.stats import bootstrap_means
from hybrid import HybridForCausalLM, load_pretrained
from hybrid.generate import generate
from hybrid.speculative import NGramDraft, SpeculationStats, generate_speculative
from steps.config import SpeculativeConfig
from steps.stage import Progress, StageContext

MAX_PROMPT_TOKENS = 256


class ProfileError(RuntimeError):
    """Nothing to measure; the message says why."""


def run(config: SpeculativeConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Batch one, greedy, in float32: with half-precision logits ties are frequent and greedy itself is not well
    defined.

    Writes profile.json: for every K acceptance (whole and by position), tokens per verification with 95 % interval
    (bootstrap over prompts), tokens per second, speed-up over K = 0 of the same engine, and whether all outputs equal
    plain greedy.
    """
    student = load_pretrained(inputs["student"], context.device, torch.float32)
    prompts = _prompts(inputs["corpus"], config.prompts, context.seed)
    plain = [generate(student, [prompt], config.new_tokens)[0] for prompt in prompts]
    if all(len(reply) < 2 for reply in plain):
        raise ProfileError(
            f"no reply to {len(prompts)} prompts has a second token "
            f"(speculative_profile.new_tokens is {config.new_tokens}), "
            "so nothing is decoded speculatively; switch the stage off or train the student longer"
        )
    rows: list[dict[str, Any]] = []
    for k in range(config.max_k + 1):
        outputs, stats = _decode(student, prompts, config, k)
        row = _figures(k, stats, outputs == plain)
        row["speedup"] = row["tokens_per_second"] / rows[0]["tokens_per_second"] if rows else 1.0
        rows.append(row)
        rate = len(rows) / sum(s.seconds for s in stats) if stats else 0.0
        context.progress(
            Progress(k + 1, config.max_k + 1, "K", rate, {"tokens/verification": row["tokens_per_verification"]})
        )
    best = max(rows, key=lambda r: r["tokens_per_second"] if r["identical_to_greedy"] else 0.0)
    profile = {
        "draft": config.draft,
        "ngram": config.ngram,
        "prompts": len(prompts),
        "new_tokens": config.new_tokens,
        "dtype": "float32",
        "best_k": best["k"],
        "rows": rows,
    }
    (out / "profile.json").write_text(json.dumps(profile, indent=1) + "\n")
    return {"best_k": best["k"], "speedup": best["speedup"], "identical": all(r["identical_to_greedy"] for r in rows)}


def _prompts(corpus: Path, count: int, seed: int) -> list[list[int]]:
    """Openings of held-out conversations up to the first reply."""
    found = preferences.prompts(Shard.load(corpus / "held_out.npz"), MAX_PROMPT_TOKENS)
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [list(found[i][1]) for i in order]


def _decode(
    student: HybridForCausalLM, prompts: Sequence[list[int]], config: SpeculativeConfig, k: int
) -> tuple[list[list[int]], list[SpeculationStats]]:
    outputs, stats = [], []
    for prompt in prompts:
        replies, counts = generate_speculative(student, [prompt], config.new_tokens, [NGramDraft(config.ngram)], k)
        outputs += replies
        stats += counts
    return outputs, stats


def _figures(k: int, stats: Sequence[SpeculationStats], identical: bool) -> dict[str, Any]:
    """One row of the profile. The first token of a reply comes from the prefill and is not counted."""
    stats = [s for s in stats if s.emitted]  # a reply that ended there says nothing, and has no ratio to resample
    emitted = np.array([sum(s.emitted) for s in stats], dtype=float)
    verifications = np.array([len(s.emitted) for s in stats], dtype=float)
    proposed = np.array([s.proposed for s in stats]).reshape(len(stats), k).sum(0)
    accepted = np.array([s.accepted for s in stats]).reshape(len(stats), k).sum(0)
    draws = bootstrap_means(emitted, verifications)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "k": k,
        "acceptance": float(accepted.sum() / proposed.sum()) if proposed.sum() else None,
        "acceptance_by_position": [float(a / p) if p else None for a, p in zip(accepted, proposed, strict=True)],
        "proposed": int(proposed.sum()),
        "verifications": int(verifications.sum()),
        "tokens_per_verification": float(emitted.sum() / verifications.sum()),
        "ci_low": float(low),
        "ci_high": float(high),
        "tokens_per_second": float(emitted.sum() / sum(s.seconds for s in stats)),
        "identical_to_greedy": identical,
    }
