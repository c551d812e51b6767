"""Import a published hybrid: `python -m hybrid.imports FOLDER -o OUT [--base FOLDER] [--dtype bfloat16]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from hybrid.imports import convert


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hybrid.imports",
        description="Turn a checkpoint of MambaInLlama or M1 into a folder of this project's own form.",
    )
    parser.add_argument("folder", help="with mamba_config.json and the weights (*.safetensors or pytorch_model*.bin)")
    parser.add_argument("-o", "--out", required=True, help="a new folder")
    parser.add_argument("--base", help="folder with the base model's config.json and tokenizer, where FOLDER has none")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; the files' own if left out"
    )
    given = parser.parse_args(arguments)
    try:
        config = convert(given.folder, given.out, given.base, getattr(torch, given.dtype) if given.dtype else None)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{given.out}: {config.n_layers} layers, {len(config.mamba_layers)} of them {config.mixer} mixers")
    if not any((Path(given.out) / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        print("without a tokenizer: the folder has none; its base's comes along with --base")
    return 0


if __name__ == "__main__":
    sys.exit(main())
