"""The teacher: one clean folder with the same weights on every machine, whatever the source was."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from corpora import chat, sources
from steps.config import TeacherConfig
from steps.stage import StageContext

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from hybrid.families.gguf_file import GGUFFile

logger = logging.getLogger(__name__)

# What defines a model; everything else that a checkpoint's config carries is about how it was made or is run. The last
# six are of some families.
FIELDS = (
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
    "eos_token_id",
    "pad_token_id",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "no_rope_layers",
    "no_rope_layer_interval",
)
# llama.cpp's pre-tokenizers that split digits one by one before GPT-2's expression. transformers' conversion drops that
# step (5.23), and then "  12" and a line break before a digit give other tokens than those the model was trained on.
GGUF_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
# Pieces of "1234" by llama.cpp's pre-tokenizers, which tell whether transformers' conversion has one of them.
GGUF_PIECES = {
    **dict.fromkeys(GGUF_SINGLE_DIGITS, 4),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "tekken"), 4),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), 2),
    "gpt-2": 1,
}


class TeacherError(ValueError):
    """A teacher that cannot be used; the message names what was found and what is supported."""


def run(config: TeacherConfig, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Write config.json, model.safetensors (bf16), generation_config.json, tokenizer and chat template into `out`.

    Raises SourceError (not found, wrong hash, offline) and TeacherError (architecture, chat template, missing weights).
    """
    del inputs, context
    resolved = sources.resolve(config.source)
    folder, name = _checkpoint(resolved)
    gguf = None if name is None else _gguf_file(folder / name, config.source)
    clean = _clean_config(folder, gguf, config.source)
    tokenizer = _tokenizer(folder, name, gguf, config, clean)
    clean.eos_token_id = _eos_token_ids(folder, gguf, tokenizer)
    clean.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else clean.bos_token_id
    clean.pad_token_id = tokenizer.pad_token_id
    parameters = _write_model(folder, gguf, clean, out, config.source)
    tokenizer.save_pretrained(out)
    _drop_traces(out / "tokenizer_config.json", ("is_local", "local_files_only", "name_or_path"))
    return {
        "source": config.source,
        "fingerprint": resolved.fingerprint,
        "architecture": clean.model_type,
        "parameters": parameters,
        "layers": clean.num_hidden_layers,
        "vocab_size": clean.vocab_size,
        "eos_token_ids": clean.eos_token_id,
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
    if (path / "mamba_config.json").is_file():
        raise TeacherError(
            f"{resolved.source}: is a hybrid in the form of MambaInLlama or M1, not a Transformer; `python -m "
            "hybrid.imports FOLDER -o OUT` makes a model of this project of it, which a variant takes by `checkpoint`"
        )
    if (path / "config.json").is_file():
        return path, None
    gguf = sorted(p.name for p in path.glob("*.gguf"))
    if len(gguf) == 1:
        return path, gguf[0]
    raise TeacherError(f"{resolved.source}: holds neither config.json nor exactly one .gguf file (it has {len(gguf)})")


def _gguf_file(path: Path, source: str) -> GGUFFile:
    from hybrid.families import UnsupportedModel
    from hybrid.families.gguf_file import GGUFFile

    try:
        return GGUFFile(path)
    except UnsupportedModel as error:
        raise TeacherError(f"{source}: {error}") from None
    except (ValueError, IndexError, OSError) as error:
        raise TeacherError(f"{source}: cannot be read as a GGUF file: {sources.one_line(error)}") from None


def _clean_config(folder: Path, gguf: GGUFFile | None, source: str) -> PreTrainedConfig:
    """What defines the model alone; refuses what the student's blocks do not compute."""
    from transformers import AutoConfig

    from hybrid.families import UnsupportedModel, settings

    try:
        raw = gguf.config() if gguf is not None else _said(folder)
        settings(raw)
    except UnsupportedModel as error:
        raise TeacherError(f"{source}: {error}") from None
    except (ValueError, OSError, KeyError) as error:
        raise TeacherError(f"{source}: its configuration cannot be read: {sources.one_line(error)}") from None
    return AutoConfig.for_model(raw["model_type"], **{name: raw[name] for name in FIELDS if name in raw})


def _said(folder: Path) -> dict[str, Any]:
    """A folder's configuration with the defaults of its family filled in."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()


def _tokenizer(
    folder: Path, name: str | None, gguf: GGUFFile | None, config: TeacherConfig, clean: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = config.source
    try:
        if gguf is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, config=clean, local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=name, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise TeacherError(f"{source}: its tokenizer cannot be read: {sources.one_line(error)}") from None
    if not tokenizer.is_fast:
        raise TeacherError(f"{source}: its tokenizer has no tokenizer.json (fast) form, which character offsets need")
    if len(tokenizer) > clean.vocab_size:
        raise TeacherError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, its embedding only {clean.vocab_size} rows"
        )
    if config.chat_template:
        tokenizer.chat_template = sources.resolve(config.chat_template).path.read_text()
    if not tokenizer.chat_template:
        raise TeacherError(
            f"{source}: its tokenizer has no chat template; put a chat_template.jinja beside the weights of a folder, "
            "or name one by teacher.chat_template"
        )
    if "strftime_now" in tokenizer.chat_template:
        logger.warning(
            "%s: its chat template can put in the day's date, and texts then depend on the day that they are made; "
            "teacher.chat_template can name another template",
            source,
        )
    if gguf is not None and gguf.pre_tokenizer is not None:
        _split_as_trained(tokenizer, gguf.pre_tokenizer, source)
    tokenizer.model_max_length = clean.max_position_embeddings
    return tokenizer


def _split_as_trained(tokenizer: PreTrainedTokenizerBase, kind: str, source: str) -> None:
    """Make the tokenizer split text as llama.cpp's pre-tokenizer of that kind, or refuse it."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    backend = tokenizer.backend_tokenizer
    if kind in GGUF_SINGLE_DIGITS:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    if kind not in GGUF_PIECES:
        raise TeacherError(
            f"{source}: its pre-tokenizer is {kind!r}; supported: {', '.join(sorted(GGUF_PIECES))}. Name the "
            "checkpoint that the file was made of"
        )
    pieces = len(backend.pre_tokenizer.pre_tokenize_str("1234"))
    if pieces != GGUF_PIECES[kind]:
        raise TeacherError(
            f"{source}: transformers splits '1234' into {pieces} pieces, its pre-tokenizer {kind!r} into "
            f"{GGUF_PIECES[kind]}: install transformers 5.23 or later, or name the checkpoint that the file was made of"
        )


def _eos_token_ids(folder: Path, gguf: GGUFFile | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply: by config, generation config, tokenizer and the template's end of turn."""
    ids: set[int] = {i for i in (tokenizer.eos_token_id,) if i is not None}
    ids.update(chat.turn_end_ids(tokenizer))
    if gguf is None:
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                said = json.loads((folder / name).read_text()).get("eos_token_id")
                ids.update([said] if isinstance(said, int) else said or [])
    return sorted(ids)


def _write_model(folder: Path, gguf: GGUFFile | None, clean: PreTrainedConfig, out: Path, source: str) -> int:
    """Save the weights in bf16 as one file; returns the number of parameters (tied embeddings counted once)."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig

    logger.info("loading the teacher's weights from %s", source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(clean)
    try:
        weights = _transformers_weights(folder, clean) if gguf is None else dict(gguf.weights())
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise TeacherError(f"{source}: its weights cannot be read: {sources.one_line(error)}") from None
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    if clean.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    missing = sorted(name for name, shape in expected.items() if name not in weights or weights[name].shape != shape)
    if missing:
        raise TeacherError(f"{source}: {len(missing)} weights are missing or of another shape, first {missing[0]}")
    if surplus := sorted(weights.keys() - expected):
        raise TeacherError(
            f"{source}: has {len(surplus)} weights that a {clean.model_type} of its configuration has no place for, "
            f"first {surplus[0]}"
        )
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=clean.bos_token_id, eos_token_id=clean.eos_token_id, pad_token_id=clean.pad_token_id
    )
    model.save_pretrained(out, max_shard_size="1TB")
    return sum(p.numel() for p in model.parameters())


def _transformers_weights(folder: Path, clean: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The weights of a folder in any form that transformers reads: those that the model has and the folder has not are
    left out, and those that it has besides are there without values."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded, report = cast(Any, AutoModelForCausalLM).from_pretrained(
        folder,
        config=copy.deepcopy(clean),
        dtype=torch.bfloat16,
        local_files_only=True,
        output_loading_info=True,
    )
    weights = loaded.state_dict()
    for name in [*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])]:
        weights.pop(name, None)
    buffers = "rotary_emb.inv_freq"  # which checkpoints of old carry
    return weights | {name: torch.empty(0) for name in report["unexpected_keys"] if not name.endswith(buffers)}


def _drop_traces(path: Path, names: tuple[str, ...]) -> None:
    """Take out what says where a tokenizer was loaded from: it differs by machine, not by tokenizer."""
    settings = json.loads(path.read_text())
    kept = {k: v for k, v in settings.items() if k not in names}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
