"""The teacher: one clean folder with the same weights on every machine, whatever the source was."""

from __future__ import annotations

import copy
import json
import logging
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from corpora import chat, sources
from steps.config import TeacherConfig
from steps.stage import StageContext

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ARCHITECTURES = ("llama",)
# What defines a Llama; everything else that a checkpoint's config carries is about how it was made or is run.
LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
)
GGUF_STRING = 8  # type number of a string value
# llama.cpp's pre-tokenizers that split digits one by one before GPT-2's expression. transformers' conversion drops that
# step (5.23), and then "  12" and a line break before a digit give other tokens than those the model was trained on.
GGUF_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")


class TeacherError(ValueError):
    """A teacher that cannot be used; the message names what was found and what is supported."""


def run(config: TeacherConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Write config.json, model.safetensors (bf16), generation_config.json, tokenizer and chat template into `out`.

    Raises SourceError (not found, wrong hash, offline) and TeacherError (architecture, chat template, missing weights).
    """
    del inputs, context
    resolved = sources.resolve(config.source)
    folder, gguf = _checkpoint(resolved)
    llama = _clean_config(folder, gguf, config.source)
    tokenizer = _tokenizer(folder, gguf, config.source, llama)
    llama.eos_token_id = _eos_token_ids(folder, gguf, tokenizer)
    llama.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else llama.bos_token_id
    llama.pad_token_id = tokenizer.pad_token_id
    parameters = _write_model(folder, gguf, llama, out, config.source)
    tokenizer.save_pretrained(out)
    _drop_traces(out / "tokenizer_config.json", ("is_local", "local_files_only", "name_or_path"))
    return {
        "source": config.source,
        "fingerprint": resolved.fingerprint,
        "architecture": llama.model_type,
        "parameters": parameters,
        "layers": llama.num_hidden_layers,
        "vocab_size": llama.vocab_size,
        "eos_token_ids": llama.eos_token_id,
        "chat_template_opening": chat.opening(tokenizer),
        "model_sha256": sources.sha256_of(out / "model.safetensors"),
    }


def fetch(source: str, out: Path, context: StageContext) -> str:
    """Another checkpoint in this project's form in `out`, as `run` leaves a teacher; its source's fingerprint.

    A model of this project's own is one too. Raises as `run`.
    """
    from hybrid import load_pretrained, save_pretrained
    from hybrid.config import MODEL_TYPE

    found = sources.resolve(source)
    config = found.path / "config.json"
    if config.is_file() and MODEL_TYPE in config.read_text():
        save_pretrained(load_pretrained(found.path), out, tokenizer_from=found.path)
    else:
        run(TeacherConfig(source=source), {}, out, context)
    return found.fingerprint


def token_mismatch(folder: Path, student: Path) -> str:
    """Why the tokens of the model in `folder` are not the student's, or an empty string: the number of logits must be
    the same, and the meaning of each."""
    from transformers import AutoTokenizer

    from hybrid import HybridConfig

    sizes = [HybridConfig.from_folder(f).vocab_size for f in (folder, student)]
    if sizes[0] != sizes[1]:
        return f"its vocabulary has {sizes[0]} tokens, the student's {sizes[1]}"
    theirs, ours = (AutoTokenizer.from_pretrained(f, local_files_only=True).get_vocab() for f in (folder, student))
    if theirs == ours:
        return ""
    same = len(theirs.items() & ours.items())
    return f"its tokenizer has {len(theirs)} tokens, the student's {len(ours)}, and {same} are the same"


def _checkpoint(resolved: sources.Resolved) -> tuple[Path, str | None]:
    """The folder that transformers loads from, and the GGUF file's name in it if it is one."""
    path = resolved.path
    if path.is_file():
        if path.suffix != ".gguf":
            raise TeacherError(
                f"{resolved.source}: is a {path.suffix or 'nameless'} file; name a folder or a .gguf file"
            )
        return path.parent, path.name
    if (path / "config.json").is_file():
        return path, None
    gguf = sorted(p.name for p in path.glob("*.gguf"))
    if len(gguf) == 1:
        return path, gguf[0]
    raise TeacherError(f"{resolved.source}: holds neither config.json nor exactly one .gguf file (it has {len(gguf)})")


def _clean_config(folder: Path, gguf: str | None, source: str) -> LlamaConfig:
    """The Llama configuration alone; refuses what the student's blocks do not compute."""
    from transformers import AutoConfig, LlamaConfig

    from hybrid.config import ROPE_TYPES

    try:
        found = AutoConfig.from_pretrained(folder, **_gguf(gguf), local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise TeacherError(f"{source}: its configuration cannot be read: {sources.one_line(error)}") from None
    if found.model_type not in ARCHITECTURES:
        raise TeacherError(
            f"{source}: is of the architecture {found.model_type!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(found, name, False):
            raise TeacherError(f"{source}: has {name}=true; supported: Llama without biases ({name}=false)")
    rope = (found.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise TeacherError(f"{source}: has rope_type {rope!r}; supported: {', '.join(ROPE_TYPES)}")
    if found.hidden_act != "silu":
        raise TeacherError(f"{source}: has hidden_act {found.hidden_act!r}; supported: silu")
    return LlamaConfig(**{name: getattr(found, name) for name in LLAMA_FIELDS})


def _tokenizer(folder: Path, gguf: str | None, source: str, llama: LlamaConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_gguf(gguf), config=llama, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise TeacherError(f"{source}: its tokenizer cannot be read: {sources.one_line(error)}") from None
    if not tokenizer.is_fast:
        raise TeacherError(f"{source}: its tokenizer has no tokenizer.json (fast) form, which character offsets need")
    if len(tokenizer) > llama.vocab_size:
        raise TeacherError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, its embedding only {llama.vocab_size} rows"
        )
    if not tokenizer.chat_template:
        raise TeacherError(
            f"{source}: its tokenizer has no chat template; put a chat_template.jinja beside the weights of a folder"
        )
    if gguf and _gguf_pre_tokenizer(folder / gguf) in GGUF_SINGLE_DIGITS:
        _split_digits(tokenizer)
    tokenizer.model_max_length = llama.max_position_embeddings
    return tokenizer


def _gguf_pre_tokenizer(path: Path) -> str | None:
    """The name of the pre-tokenizer. Read directly, as GGUFReader takes seconds to parse a whole vocabulary first."""
    key = b"tokenizer.ggml.pre"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(struct.pack("<Q", len(key)) + key)
        if at < 0:
            return None
        kind, length = struct.unpack_from("<IQ", data, at + 8 + len(key))
        start = at + 8 + len(key) + 12
        return data[start : start + length].decode() if kind == GGUF_STRING else None


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])


def _eos_token_ids(folder: Path, gguf: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply: by config, generation config, tokenizer and the template's end of turn."""
    ids: set[int] = {i for i in (tokenizer.eos_token_id,) if i is not None}
    ids.update(chat.turn_end_ids(tokenizer))
    if not gguf:
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                said = json.loads((folder / name).read_text()).get("eos_token_id")
                ids.update([said] if isinstance(said, int) else said or [])
    return sorted(ids)


def _write_model(folder: Path, gguf: str | None, llama: LlamaConfig, out: Path, source: str) -> int:
    """Save the weights in bf16 as one file; returns the number of parameters (tied embeddings counted once)."""
    import torch
    from safetensors import SafetensorError
    from transformers import GenerationConfig, LlamaForCausalLM

    logger.info("loading the teacher's weights from %s", source)
    try:
        arguments = {"dtype": torch.bfloat16, "local_files_only": True, "output_loading_info": True}
        loaded, report = cast(Any, LlamaForCausalLM).from_pretrained(
            folder, config=copy.deepcopy(llama), **_dense(gguf), **arguments
        )
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise TeacherError(f"{source}: its weights cannot be read: {sources.one_line(error)}") from None
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise TeacherError(f"{source}: {len(missing)} weights are missing or of another shape, first {missing[0]}")
    # A model read from GGUF carries a quantizer that cannot be saved (transformers 5.23): only its weights go on.
    with torch.device("meta"):
        model = LlamaForCausalLM(llama)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=llama.bos_token_id, eos_token_id=llama.eos_token_id, pad_token_id=llama.pad_token_id
    )
    model.save_pretrained(out, max_shard_size="1TB")
    return sum(p.numel() for p in model.parameters())


def _gguf(name: str | None) -> dict[str, str]:
    return {"gguf_file": name} if name else {}


def _dense(name: str | None) -> dict[str, Any]:
    """Loading arguments that give plain weights: transformers that can keep GGUF weights packed must not."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {**_gguf(name), **({"quantization_config": config(dequantize=True)} if name and config else {})}


def _drop_traces(path: Path, names: tuple[str, ...]) -> None:
    """Take out what says where a tokenizer was loaded from: it differs by machine, not by tokenizer."""
    settings = json.loads(path.read_text())
    kept = {k: v for k, v in settings.items() if k not in names}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
