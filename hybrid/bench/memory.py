"""`python -m hybrid.bench.memory [--shape 1b]`: host memory of conversion and export, as parts of the weights made.

Each step runs in a process of its own on random bfloat16 weights. Its memory is the most that was resident, file pages
among it, less what was resident once the modules were imported; it is compared with the bytes of the weights written.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hybrid import attention_layers, load_pretrained, save_pretrained
from hybrid.export.__main__ import export
from hybrid.init_map import from_attention
from hybrid.shapes import SHAPES, random_model, shape

STEPS = ("convert", "load_and_save", "bamba", "hf", "gguf")
"""convert: a teacher with half of its attention replaced. The others start from its student."""
LIMIT = 1.3


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a step held more than `LIMIT` times the weights."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="of the random teacher")
    parser.add_argument("--step", choices=("teacher", *STEPS), help=argparse.SUPPRESS)
    parser.add_argument(
        "--folder", type=Path, help="for the files, several times the weights; left out: a temporary one"
    )
    options = parser.parse_args(arguments)
    if options.step:
        sys.stdout.write(json.dumps(_measured(options.step, options.shape, options.folder)) + "\n")
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _in_own_process("teacher", options.shape, folder)
        sys.stdout.write(f"{'step':14} {'weights, GB':>12} {'memory, GB':>11} {'ratio':>6}\n")
        worst = 0.0
        for step in STEPS:
            found = _in_own_process(step, options.shape, folder)
            ratio = found["peak"] / found["written"]
            worst = max(worst, ratio)
            sys.stdout.write(f"{step:14} {found['written'] / 1e9:12.2f} {found['peak'] / 1e9:11.2f} {ratio:6.2f}\n")
            sys.stdout.flush()
    return int(worst > LIMIT)


def _in_own_process(step: str, shape_name: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "hybrid.bench.memory", "--step", step, "--shape", shape_name, "--folder", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measured(step: str, shape_name: str, folder: Path) -> dict[str, int]:
    """peak and written, bytes."""
    before = _resident("VmRSS")
    teacher, student, out = folder / "teacher", folder / "student", folder / step
    if step == "teacher":
        config = shape(shape_name)  # llama.cpp's Bamba has no table for scaled frequencies
        config = replace(config, rope={"rope_type": "default", "rope_theta": config.rope["rope_theta"]})
        save_pretrained(random_model(config, "cpu", torch.bfloat16), out)
    elif step == "convert":
        out = student
        base = load_pretrained(teacher)
        kept = attention_layers("1/2", base.config.n_layers)
        save_pretrained(from_attention(base, kept, "paper", share=True), out)
        _write_tokenizer(out)
    elif step == "load_and_save":
        save_pretrained(load_pretrained(student), out)
    else:
        export(student, step, out / "model.gguf" if step == "gguf" else out, dtype="bfloat16")
    files = [*out.glob("*.safetensors"), *out.glob("*.gguf")]
    return {"peak": _resident("VmHWM") - before, "written": sum(path.stat().st_size for path in files)}


def _resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _write_tokenizer(folder: Path) -> None:
    """The least that a GGUF file needs."""
    steps = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]
    words = {"type": "BPE", "vocab": {"a": 0}, "merges": list[str]()}
    tokenizer: dict[str, Any] = {
        "pre_tokenizer": {"pretokenizers": steps},
        "normalizer": None,
        "model": words,
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


if __name__ == "__main__":
    sys.exit(main())
