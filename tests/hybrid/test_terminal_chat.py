from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hybrid.chat import Conversation, Speaker, main
from hybrid.engine import Sampling
from hybrid.generate import generate
from tests.corpora import tiny
from tests.hybrid import serving

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = tiny.tokenizer()
COUNT = 12


@pytest.fixture(scope="module")
def speakers() -> list[Speaker]:
    other = serving.model(1, attention_layers=(0, 1, 2, 3))
    return [Speaker(serving.loaded()), Speaker(serving.loaded(name="teacher", model=other))]


def hold(speakers: list[Speaker], *lines: str, width: int = 100, count: int = COUNT) -> str:
    """What a console of this width shows; the conversation begins anew."""
    for speaker in speakers:
        speaker.clear()
    console = Console(file=io.StringIO(), width=width)
    Conversation(speakers, console, Sampling(), count, 0).hold(iter(lines))
    return console.file.getvalue()


def reply(speaker: Speaker, *questions: str) -> str:
    """The reply to the last question, the whole conversation read anew."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        (tokens,) = generate(speaker.loaded.model, [TOKENIZER(text)["input_ids"]], COUNT, eos_token_ids=(serving.EOS,))
        messages.append({"role": "assistant", "content": printable(TOKENIZER.decode(tokens, skip_special_tokens=True))})
    return messages[-1]["content"]


def printable(text: str) -> str:
    """Random tokens are control characters as well, of ASCII and of the block after it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_a_reply_and_its_speed(speakers):
    said = hold(speakers[:1], "hello there")
    assert said.startswith(reply(speakers[0], "hello there"))
    assert re.search(r"\n\[12 tokens, cut, \d+\.\d tokens/s\]\n", said)


def test_the_conversation_is_remembered_until_cleared(speakers):
    first, second = (reply(speakers[0], *questions) for questions in (["hello"], ["hello", "how are you"]))
    alone = reply(speakers[0], "how are you")
    assert second != alone
    said = hold(speakers[:1], "hello", "", "how are you", "/clear", "how are you", "/quit", "hello")
    assert [part.strip() for part in re.split(r"\n\[12 tokens.*\]\n", said)] == [
        *(text.strip() for text in (first, second, alone)),
        "",
    ]


def test_unknown_commands_name_the_known_ones(speakers):
    assert hold(speakers[:1], "/help") == "/help: there are /clear and /quit\n"


def test_two_stand_side_by_side(speakers):
    said = hold(speakers, "hello there", width=100)
    lines = said.splitlines()
    middle = lines[0].index("teacher, attention in 4 of 4 layers")
    assert lines[0][:middle].rstrip() == "tiny, attention in 2 of 4 layers" and 48 <= middle <= 52
    notes = next(i for i, line in enumerate(lines) if "tokens/s" in line)
    assert lines[notes].count("tokens/s]") == 2
    for column, speaker in zip((slice(0, middle), slice(middle, 100)), speakers, strict=True):
        assert squeezed("".join(line[column] for line in lines[1:notes])) == squeezed(reply(speaker, "hello there"))


def test_two_stand_below_each_other_in_a_narrow_terminal(speakers):
    said = hold(speakers, "hello there", width=60)
    (_, first), (_, second) = (re.split(f"{speaker.name}\n", said, maxsplit=1) for speaker in speakers)
    assert first.startswith(reply(speakers[0], "hello there")) and said.count("tokens/s]") == 2
    assert second.startswith(reply(speakers[1], "hello there"))


def test_control_characters_do_not_reach_the_terminal():
    """A model whose every token is an escape."""
    escape = TOKENIZER("\x1b")["input_ids"][0]
    model = serving.model()
    model.model.embed_tokens.weight[:] = 0.0
    model.model.embed_tokens.weight[escape] = 1.0
    model.model.norm.weight[:] = 1.0
    speaker = Speaker(serving.loaded(model=model))
    assert generate(model, [[escape] * 3], 4) == [[escape] * 4]
    assert hold([speaker], "hello").startswith("\n[12 tokens, cut")
    assert speaker.messages[-1] == {"role": "assistant", "content": ""}


def test_an_interrupt_ends_the_reply_and_no_more(speakers):
    shown: list[str] = []

    def interrupt(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    speaker = speakers[0]
    speaker.clear()
    spoken = speaker.answer("hello there", Sampling(), COUNT, 0, interrupt)
    assert 3 <= spoken.tokens < COUNT and not spoken.ended
    assert reply(speaker, "hello there").startswith(spoken.text) and spoken.text
    assert speaker.messages[-1]["content"] == spoken.text
    assert hold([speaker], "hello there").startswith(reply(speaker, "hello there"))


def test_a_conversation_that_is_too_long_says_what_to_do(speakers):
    short = Speaker(serving.loaded(max_length=70))
    said = hold([short], "hello there", "hello there", "/clear", "hello there")
    assert len(re.findall(r"\[\d+ tokens", said)) == 2
    (error,) = re.findall(r"tiny.*: the conversation has (\d+) tokens, and at most 70 fit", said)
    assert int(error) > 70


def test_lines_are_read_from_a_pipe(tmp_path):
    student = serving.folder(tmp_path / "student")
    teacher = serving.folder(tmp_path / "teacher", seed=1, attention_layers=(0, 1, 2, 3))
    command = [sys.executable, "-m", "hybrid.chat", str(student), "--against", str(teacher)]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(COUNT), "--device", "cpu", "--draft", "ngram"],
        cwd=ROOT,
        input="hello there\n/quit\nhow are you\n",
        capture_output=True,
        text=True,
        timeout=serving.DEADLINE,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s]") == 2
    middle = done.stdout.index("teacher, attention in 4 of 4 layers")
    left = squeezed("".join(line[:middle] for line in done.stdout.splitlines()))
    assert squeezed(reply(Speaker(serving.loaded()), "hello there")) in left


@pytest.mark.parametrize(
    ("options", "message"), [(["--temperature", "-1"], "temperature"), (["--against", "nowhere"], "config.json")]
)
def test_what_cannot_be_loaded_is_refused(tmp_path, capsys, options, message):
    folder = serving.folder(tmp_path / "student")
    assert main([str(folder), "--device", "cpu", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hybrid.chat: ") and message in said
