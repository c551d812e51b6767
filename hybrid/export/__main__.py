"""`python -m hybrid.export MODEL --to bamba|gguf|hf -o OUT`: a student for other software.

The weights stream from file to file: no model is built, and memory holds one file of them at most (1 GiB).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybrid.checkpoint import (
    FLOAT32,
    Weights,
    copy_code,
    copy_tokenizer,
    save_weights,
    write_config,
    write_json,
)
from hybrid.config import HybridConfig, UnsupportedModel
from hybrid.export import bamba, gguf
from hybrid.export.errors import CannotExport
from hybrid.hf.card import lineage, model_card

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hybrid.export", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a student, as the stages save them")
    parser.add_argument(
        "--to",
        required=True,
        choices=("bamba", "gguf", "hf"),
        help="bamba: transformers, vLLM; gguf: llama.cpp; hf: the model's own code, with a model card",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="a new folder, or for gguf a new file")
    parser.add_argument("--dtype", choices=TYPES, help="of the weights; left out: the widest that the student has")
    parser.add_argument(
        "--compact",
        action="store_true",
        help="bamba, of students without SiLU after the convolution: "
        "keep the size of the state, for an error below bfloat16's rounding",
    )
    options = parser.parse_args(arguments)
    try:
        export(options.model, options.to, options.out, options.dtype, options.compact)
    except (CannotExport, UnsupportedModel, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out}")
    return 0


def export(model: Path, to: str, out: Path, dtype: str | None = None, compact: bool = False) -> None:
    """Raises CannotExport, UnsupportedModel, FileNotFoundError, or FileExistsError where `out` is not new."""
    config = HybridConfig.from_folder(model)
    weights = Weights(model)
    kind = TYPES[dtype] if dtype else widest(weights)
    {"bamba": bamba.check, "gguf": gguf.check, "hf": lambda config: None}[to](config)
    if out.exists() and not (to != "gguf" and out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists; name a new {'file' if to == 'gguf' else 'folder'}")
    if to == "gguf":
        out.parent.mkdir(parents=True, exist_ok=True)
        gguf.write(config, weights, model, out, kind)
        return
    out.mkdir(parents=True, exist_ok=True)
    tensors: Iterator[tuple[str, Tensor]]
    if to == "hf":
        tensors = ((name, weights[name]) for name in weights)
        write_config(out, config, kind)
        copy_code(out)
        notes = [HF_NOTE]
    else:
        tensors = bamba.bamba_weights(config, weights, compact)
        write_json(out / "config.json", bamba.bamba_config(config, kind, compact))
        notes = [BAMBA_NOTE] + ([SCALED_NOTE] if bamba.scales(config, compact).stream != 1.0 else [])
    save_weights(out, ((name, t.float() if name.endswith(FLOAT32) else t.to(kind)) for name, t in tensors))
    copy_tokenizer(model, out)
    (out / "README.md").write_text(model_card(config, out.name, lineage(model), notes))


def widest(weights: Weights) -> torch.dtype:
    """float32 if any tensor but the decays and steps has it, else what the others have."""
    types = {weights.dtype(name) for name in weights if not name.endswith(FLOAT32)}
    return torch.float32 if torch.float32 in types else sorted(types, key=str)[0]


HF_NOTE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```

The code in this folder is plain PyTorch. It pads batches on the left and decodes with a cache of its own; assisted
decoding is refused, as the state of a Mamba layer cannot be taken back."""

BAMBA_NOTE = f"""\
This is a plain `BambaForCausalLM`, with the numbers of the student that it was exported from:
`AutoModelForCausalLM.from_pretrained("<this folder>")` needs transformers {bamba.TRANSFORMERS} or later, whose Bamba
normalises by groups of channels."""

SCALED_NOTE = """\
**float32 or bfloat16 only.** The student has no SiLU after its convolutions and Bamba has, so the export uses the range
near zero in which SiLU is linear. Embeddings, residual stream and the norms' eps are smaller by the same power of two
on purpose; float16, and quantisation with float16 scales, cannot hold them."""


if __name__ == "__main__":
    sys.exit(main())
