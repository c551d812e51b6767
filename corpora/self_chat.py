"""The teacher's own conversations: sampled from the chat template's opening, over user and assistant turns alike.

    python -m corpora.self_chat TEACHER_FOLDER OUT.jsonl.gz --conversations N

writes OUT.jsonl.gz and OUT.manifest.json, which says all that is needed to make it again. The text that comes out is
taken apart again by what the tokenizer's own template puts between turns; no template is known by name.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from corpora import chat, sources

logger = logging.getLogger(__name__)

Generate = Callable[..., list[list[int]]]
BARREN_BATCHES = 10
_USER, _REPLY, _NEXT = "zqxjkuser", "zqxjkreply", "zqxjknext"


@dataclass(frozen=True)
class Sampler:
    """How conversations are drawn. max_tokens counts the template's opening too; top_k 0 keeps the whole vocabulary."""

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0


@dataclass
class Tally:
    """What sampling has given so far; `tokens` counts the kept conversations as the template renders them."""

    kept: int = 0
    dropped: int = 0
    tokens: int = 0


class TurnParser:
    """Takes text in the template's form apart into messages; the inverse of the template for alternating turns."""

    def __init__(self, tokenizer: Any):
        roles = ("user", "assistant", "user")
        contents = (_USER, _REPLY, _NEXT)
        text = chat.render(tokenizer, [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])
        opening, rest = text.split(_USER)
        to_reply, rest = rest.split(_REPLY)
        to_user, _ = rest.split(_NEXT)
        self.template = chat.Template(tokenizer)
        self.opening, self.end = opening, self.template.end
        self.separators = {"user": to_reply, "assistant": to_user}
        if not self.end or not all(s.startswith(self.end) for s in self.separators.values()):
            raise chat.ChatTemplateError(
                f"turns end by {to_reply!r} and {to_user!r}: without a common end, sampled text cannot be parsed"
            )
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special = [s for s in special if s] or [self.end]

    def parse(self, text: str) -> tuple[list[dict[str, str]], bool] | None:
        """(messages, complete) of what follows the opening, or None if it is malformed.

        `complete` is False if the last message was cut by the length limit. Where a turn ends but another than the next
        role follows (a model that was trained on packed rows starts a new conversation there), the text is cut after
        the last reply. Malformed: no reply, a special token inside a message, bytes that are no text.
        """
        messages: list[dict[str, str]] = []
        role, complete = "user", False
        while True:
            end = min((at for s in (*self.special, self.end) if (at := text.find(s)) >= 0), default=-1)
            if end < 0:
                content = text.rstrip("\ufffd")  # a character of several bytes, cut by the length limit
                complete = not content
                messages += [{"role": role, "content": content}] if content else []
                break
            if not text.startswith(self.end, end):
                return None
            messages.append({"role": role, "content": text[:end]})
            separator = self.separators[role]
            if not text.startswith(separator, end):
                complete = True
                if role == "user" and not separator.startswith(text[end:]):
                    messages.pop()
                break
            text = text[end + len(separator) :]
            role = "assistant" if role == "user" else "user"
        if len(messages) < 2 or any("\ufffd" in m["content"] for m in messages):
            return None
        return messages, complete


def sample(
    generate: Generate,
    model: Any,
    tokenizer: Any,
    conversations: int,
    sampler: Sampler,
    *,
    seed: int,
    batch_size: int,
    tally: Tally | None = None,
) -> Iterator[dict[str, Any]]:
    """The records of `sample_tokenized`, which see."""
    drawn = sample_tokenized(
        generate, model, tokenizer, conversations, sampler, seed=seed, batch_size=batch_size, tally=tally
    )
    for record, _ in drawn:
        yield record


def sample_tokenized(
    generate: Generate,
    model: Any,
    tokenizer: Any,
    conversations: int,
    sampler: Sampler,
    *,
    seed: int,
    batch_size: int,
    tally: Tally | None = None,
) -> Iterator[tuple[dict[str, Any], chat.TokenizedConversation]]:
    """Conversation records, with `seed` and `index` (number of the draw), and their tokens as `chat.tokenize` gives
    them; malformed draws are dropped and counted.

    generate: `hybrid.generate.generate`, or a `Generator`, which does not start anew for each batch. Draws go on until
    `conversations` are kept; ten barren batches stop it. Each batch has a seed of its own from (seed, number of the
    batch), so the result depends on the batch size too. While `generate` draws a batch, in the caller's thread, another
    thread reads the one before; between records nothing runs. What either raises comes out of the iterator.
    """
    tally = tally or Tally()
    parser = TurnParser(tokenizer)
    prompt = tokenizer(parser.opening, add_special_tokens=False)["input_ids"]
    if len(prompt) >= sampler.max_tokens:
        raise ValueError(
            f"max_tokens {sampler.max_tokens} leaves nothing after the template's opening of {len(prompt)} tokens"
        )

    def draw(batch: int) -> list[list[int]]:
        return generate(
            model,
            [prompt] * batch_size,
            sampler.max_tokens - len(prompt),
            temperature=sampler.temperature,
            top_k=sampler.top_k,
            top_p=sampler.top_p,
            seed=int(np.random.SeedSequence([seed, batch]).generate_state(1)[0]),
            eos_token_ids=(),
        )

    batch, barren, ahead = 0, 0, None
    while tally.kept < conversations:
        replies, wanted = ahead or draw(batch), conversations - tally.kept
        with ThreadPoolExecutor(max_workers=1) as reader:
            reading = reader.submit(_read, parser, replies, wanted, seed, batch * batch_size)
            # Another batch is drawn only where this one cannot be the last, whatever it holds.
            ahead = draw(batch + 1) if batch_size < wanted and barren + 1 < BARREN_BATCHES else None
        found, dropped = reading.result()
        tally.kept += len(found)
        tally.dropped += dropped
        tally.tokens += sum(len(tokenized.tokens) for _, tokenized in found)
        yield from found  # after the whole batch, so that the tally is right for whoever shows progress
        batch += 1
        barren = 0 if found else barren + 1
        if barren == BARREN_BATCHES:
            raise chat.ChatTemplateError(
                f"none of {BARREN_BATCHES * batch_size} sampled texts is a conversation: the model does not speak its "
                "chat template"
            )


def _read(
    parser: TurnParser, replies: list[list[int]], wanted: int, seed: int, first: int
) -> tuple[list[tuple[dict[str, Any], chat.TokenizedConversation]], int]:
    """The first `wanted` conversations of a batch, each with its tokens, and how many malformed draws were passed on
    the way. first: number of the batch's first draw."""
    records: list[dict[str, Any]] = []
    rendered: list[chat.Rendered] = []
    dropped = 0
    # The tokenizer's own decode_batch uses all cores and lets the thread that samples run meanwhile.
    texts = parser.template.tokenizer.backend_tokenizer.decode_batch(replies, skip_special_tokens=False)
    for index, text in enumerate(texts, first):
        if len(records) == wanted:
            break
        if parsed := parser.parse(text):
            record = {"id": f"selfchat-{seed}-{index:06d}", "messages": parsed[0], "complete": parsed[1]}
            made = parser.template.rendered(record)
            if _same_start(made.text, parser.opening + text):
                records.append({**record, "seed": seed, "index": index})
                rendered.append(made)
                continue
        dropped += 1
    return list(zip(records, parser.template.tokenized(rendered) if rendered else [], strict=True)), dropped


def _same_start(rendered: str, sampled: str) -> bool:
    """Whether the template makes of the messages what was sampled; one that trims contents, for example, does not."""
    shorter = min(len(rendered), len(sampled))
    return rendered[:shorter] == sampled[:shorter]


def write(records: Iterator[dict[str, Any]], path: Path) -> None:
    """JSONL under gzip whose bytes depend on the records alone; `path` appears when all are written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as raw, _gzip(raw) as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _gzip(raw: BinaryIO) -> gzip.GzipFile:
    return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=9)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m corpora.self_chat", description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path, help="folder of the teacher (Hugging Face layout)")
    parser.add_argument("out", type=Path, help="file to write, OUT.jsonl.gz")
    parser.add_argument("--conversations", type=int, required=True)
    parser.add_argument(
        "--max-tokens", type=int, default=Sampler.max_tokens, help="in a conversation, opening included"
    )
    parser.add_argument("--temperature", type=float, default=Sampler.temperature)
    parser.add_argument("--top-p", type=float, default=Sampler.top_p)
    parser.add_argument("--top-k", type=int, default=Sampler.top_k, help="0 keeps the whole vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if not options.out.name.endswith(".jsonl.gz"):
        parser.error(f"OUT must end in .jsonl.gz, not {options.out.name!r}")
    if not (options.teacher / "model.safetensors").is_file():
        parser.error(f"{options.teacher} holds no model.safetensors; name the folder that the teacher stage wrote")
    if min(options.conversations, options.batch_size) < 1:
        parser.error("--conversations and --batch-size must be at least 1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    _command(options)


def _command(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    from hybrid import load_pretrained
    from hybrid.generate import Generator

    tokenizer = AutoTokenizer.from_pretrained(options.teacher, local_files_only=True)
    model = load_pretrained(options.teacher, device=options.device, dtype=torch.bfloat16).eval()
    sampler = Sampler(options.max_tokens, options.temperature, options.top_p, options.top_k)
    tally, started = Tally(), time.monotonic()
    records = sample(
        Generator(),
        model,
        tokenizer,
        options.conversations,
        sampler,
        seed=options.seed,
        batch_size=options.batch_size,
        tally=tally,
    )
    write(_logged(records, options.conversations, tally), options.out)
    manifest = {
        "file": options.out.name,
        "sha256": sources.sha256_of(options.out),
        "conversations": tally.kept,
        "dropped": tally.dropped,
        "tokens": tally.tokens,
        "teacher_sha256": sources.sha256_of(options.teacher / "model.safetensors"),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "sampler": asdict(sampler),
        "command": _command_line(options),
        "seconds": round(time.monotonic() - started, 1),
        "hardware": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "versions": _versions(),
    }
    path = options.out.with_name(options.out.name.removesuffix(".jsonl.gz") + ".manifest.json")
    path.write_text(json.dumps(manifest, indent=2) + "\n")


def _logged(records: Iterator[dict[str, Any]], total: int, tally: Tally) -> Iterator[dict[str, Any]]:
    """Pass records on; about every five seconds say how far it is."""
    started = shown = time.monotonic()
    for record in records:
        yield record
        now = time.monotonic()
        if now - shown > 5 or tally.kept == total:
            shown, rate = now, tally.tokens / (now - started)
            logger.info(
                "%d/%d conversations, %d dropped, %.0f tokens/s, %.0f s left",
                tally.kept,
                total,
                tally.dropped,
                rate,
                (total - tally.kept) * (now - started) / tally.kept,
            )


def _command_line(options: argparse.Namespace) -> str:
    return (
        f"python -m corpora.self_chat TEACHER_FOLDER {options.out.name} --conversations {options.conversations}"
        f" --max-tokens {options.max_tokens} --temperature {options.temperature} --top-p {options.top_p}"
        f" --top-k {options.top_k} --seed {options.seed} --batch-size {options.batch_size} --device {options.device}"
    )


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
