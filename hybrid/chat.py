"""`python -m hybrid.chat MODEL [--against TEACHER]`: talk to a model in a terminal, beside another one if wanted.

/clear forgets the conversation, /quit or the end of the input ends it, Ctrl-C ends a reply. Questions may be piped in,
one a line. Each model sees its own replies only.
"""

from __future__ import annotations

import argparse
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hybrid.engine import Sampling
from hybrid.serve.loading import Loaded, add_options, load, positive
from hybrid.serve.text import ReplyText

COLUMN = 36
"""Characters that a reply's column needs; in a narrower terminal replies come one after another."""
REFRESH_SECONDS = 0.1


@dataclass(frozen=True)
class Spoken:
    """text: without control characters. tokens: with the end-of-turn token. seconds: of decoding, without prefill and
    display. ended: by the model itself, not by a limit."""

    text: str
    tokens: int
    seconds: float
    ended: bool

    def __str__(self) -> str:
        cut = "" if self.ended else ", cut"
        rate = f", {self.tokens / self.seconds:.1f} tokens/s" if self.tokens and self.seconds > 0 else ""
        return f"{self.tokens} tokens{cut}{rate}"


class Speaker:
    """A model and the conversation as it knows it."""

    def __init__(self, loaded: Loaded, system: str | None = None) -> None:
        config = loaded.model.config
        self.name = f"{loaded.name}, attention in {len(config.attention_layers)} of {config.n_layers} layers"
        self.loaded, self.system = loaded, system
        self.engine = loaded.engine(1)
        self.clear()

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(
        self, question: str, sampling: Sampling, max_new_tokens: int, seed: int, show: Callable[[str], None]
    ) -> Spoken:
        """The reply, of which `show` gets every piece as it comes; Ctrl-C ends it with what it has.

        Raises ValueError, and forgets the question, if the conversation has become too long.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = self.loaded.chat_prompt(asked)
        room = self.loaded.max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"{self.name}: the conversation has {len(prompt)} tokens, and at most {self.loaded.max_length} fit "
                "with a reply: /clear it or raise --max-length"
            )
        text, pieces, eos, shown = ReplyText(self.loaded.tokenizer), [""], self.loaded.eos_token_ids, 0.0
        tokens: list[int] = []

        def give(piece: str) -> None:
            if piece := _printable(piece):
                pieces.append(piece)
                show(piece)

        def look(emitted: Tensor) -> None:
            nonlocal shown
            new = [token for token in emitted[0].tolist() if token >= 0]
            began = time.perf_counter()
            tokens.extend(new)
            give("".join(text.add(token) for token in new if token not in eos))
            shown += time.perf_counter() - began

        began = time.perf_counter()
        try:
            made = self.engine.generate(
                [prompt], min(room, max_new_tokens), sampling=sampling, seed=seed, callback=look
            )
            seconds = made.decode_seconds - shown
        except KeyboardInterrupt:
            seconds = time.perf_counter() - began - shown
        give(text.end())
        reply = "".join(pieces)
        self.messages = [*asked, {"role": "assistant", "content": reply}]
        return Spoken(reply, len(tokens), seconds, bool(tokens) and tokens[-1] in eos)


class Conversation:
    """Questions to one or two speakers, and their replies on the console."""

    def __init__(
        self, speakers: Sequence[Speaker], console: Console, sampling: Sampling, max_new_tokens: int, seed: int
    ) -> None:
        self.speakers, self.console = speakers, console
        self.sampling, self.max_new_tokens, self.seed = sampling, max_new_tokens, seed

    def hold(self, lines: Iterator[str]) -> None:
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            if line == "/clear":
                for speaker in self.speakers:
                    speaker.clear()
            elif line.startswith("/"):
                self.console.print(f"{line}: there are /clear and /quit", style="red", markup=False)
            elif line:
                try:
                    self._reply(line)
                except ValueError as error:
                    self.console.print(str(error), style="red", markup=False)

    def _reply(self, question: str) -> None:
        if len(self.speakers) == 1 or self.console.width < COLUMN * len(self.speakers):
            for speaker in self.speakers:
                if len(self.speakers) > 1:
                    self.console.print(speaker.name, style="bold", markup=False)
                spoken = self._ask(speaker, question, lambda piece: self.console.out(piece, end="", highlight=False))
                self.console.print(f"\n[{spoken}]\n", style="dim", markup=False, highlight=False)
            return
        texts, notes = ([Text() for _ in self.speakers] for _ in range(2))
        with Live(_columns(self.speakers, texts, notes), console=self.console, auto_refresh=False) as live:
            last = 0.0
            for speaker, text, note in zip(self.speakers, texts, notes, strict=True):

                def show(piece: str, text: Text = text) -> None:
                    nonlocal last
                    text.append(piece)
                    if time.perf_counter() - last > REFRESH_SECONDS:
                        live.update(_columns(self.speakers, texts, notes), refresh=True)
                        last = time.perf_counter()

                note.append(f"[{self._ask(speaker, question, show)}]", "dim")
            live.update(_columns(self.speakers, texts, notes), refresh=True)
        self.console.print()

    def _ask(self, speaker: Speaker, question: str, show: Callable[[str], None]) -> Spoken:
        return speaker.answer(question, self.sampling, self.max_new_tokens, self.seed + len(speaker.messages), show)


def _columns(speakers: Sequence[Speaker], texts: Sequence[Text], notes: Sequence[Text]) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    for _ in speakers:
        grid.add_column(ratio=1, overflow="fold")
    grid.add_row(*(Text(speaker.name, "bold") for speaker in speakers))
    grid.add_row(*texts)
    grid.add_row(*notes)
    return grid


def _printable(text: str) -> str:
    """Without control characters, which could steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _lines() -> Iterator[str]:
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives `input` a history)

        prompt = "> "
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 if a model cannot be loaded."""
    options = _parser().parse_args(arguments)
    folders: list[Path] = [options.model, *([options.against] if options.against else [])]
    try:
        sampling = Sampling(options.temperature, 0, options.top_p)
        loaded = [load(folder, options) for folder in folders]
        speakers = [Speaker(one, options.system) for one in loaded]
    except (OSError, ValueError) as error:
        sys.stderr.write(f"hybrid.chat: {error}\n")
        return 2
    Conversation(speakers, Console(), sampling, options.max_new_tokens, options.seed).hold(_lines())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hybrid.chat", description=__doc__.split("\n\n")[1])
    add_options(parser)
    add = parser.add_argument
    add("--against", metavar="FOLDER", type=Path, help="another model, answering the same questions beside it")
    add("--system", metavar="TEXT", help="system message (what the chat template says without one)")
    add("--max-new-tokens", type=positive, default=512, help="of a reply (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--top-p", type=float, default=1.0, help="%(default)s")
    add("--seed", type=int, default=0, help="%(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
