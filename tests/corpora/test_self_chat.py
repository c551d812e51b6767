from __future__ import annotations

import gzip
import json
import random
import threading

import pytest

from corpora import chat, conversations, self_chat
from corpora.self_chat import Sampler, TurnParser
from tests.corpora import tiny

LLAMA3 = (
    "{{ '<|endoftext|>' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
TO_REPLY, TO_USER = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def parser(tokenizer):
    return TurnParser(tokenizer)


def said(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


@pytest.mark.parametrize(
    ("text", "messages", "complete"),
    [
        (f"u{TO_REPLY}a", said("u", "a"), False),
        (f"u{TO_REPLY}a<|im_end|>", said("u", "a"), True),
        (f"u{TO_REPLY}a<|im_end|>\n", said("u", "a"), True),
        (f"u{TO_REPLY}a<|im_end|>\n<|im_start|>us", said("u", "a"), True),
        (f"u{TO_REPLY}a{TO_USER}", said("u", "a"), True),
        (f"u{TO_REPLY}a{TO_USER}\n v ", said("u", "a", "\n v "), False),
        (f"u{TO_REPLY}{TO_USER}v{TO_REPLY}b", said("u", "", "v", "b"), False),
        (f"u{TO_REPLY}caf\ufffd", said("u", "caf"), False),
        (f"u{TO_REPLY}a<|im_end|>\n<|im_end|><|im_start|>system\n<|im_end|>", said("u", "a"), True),
        (f"u{TO_REPLY}a{TO_USER}v{TO_USER}w", said("u", "a"), True),
        (f"u{TO_REPLY}a{TO_USER}v<|im_end|>", said("u", "a", "v"), True),
    ],
)
def test_parse(parser, text, messages, complete):
    assert parser.parse(text) == (messages, complete)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "only a question",
        "u<|im_end|>",
        f"u{TO_USER}v",
        f"u{TO_REPLY}",
        f"u{TO_REPLY}a<|im_start|>b",
        f"u\ufffd{TO_REPLY}a",
    ],
)
def test_malformed_text_is_none(parser, text):
    assert parser.parse(text) is None


def test_parse_inverts_the_template_of_any_alternating_conversation():
    draw = random.Random(0)
    for template in (tiny.CHATML, LLAMA3):
        tokenizer = tiny.tokenizer(template)
        parser = TurnParser(tokenizer)
        for _ in range(40):
            contents = ["".join(draw.choices("ab\n é🙂<|_", k=draw.randint(1, 9))) for _ in range(draw.randint(2, 6))]
            record = {"messages": said(*contents), "complete": draw.random() < 0.5}
            text = chat.conversation_text(tokenizer, record).removeprefix(parser.opening)
            assert parser.parse(text) == (record["messages"], record["complete"])


def test_template_without_an_end_of_turn_is_refused():
    tokenizer = tiny.tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(chat.ChatTemplateError, match="without a common end"):
        TurnParser(tokenizer)


def scripted(tokenizer, texts):
    """A stand-in for `hybrid.generate.generate` that says the texts in turn and keeps what it was asked."""
    asked, queue = [], list(texts)

    def generate(model, prompts, max_new_tokens, **options):
        asked.append({"prompts": prompts, "max_new_tokens": max_new_tokens, **options})
        return [tokenizer(queue.pop(0), add_special_tokens=False)["input_ids"] for _ in prompts]

    return generate, asked


def test_sample_asks_for_seeded_batches_and_counts_what_it_drops(tokenizer):
    good = [f"hello {i}{TO_REPLY}hi{TO_USER}bye" for i in range(6)]
    generate, asked = scripted(tokenizer, [good[0], "no reply", *good[1:]])
    tally = self_chat.Tally()
    sampler = Sampler(max_tokens=64, temperature=0.7, top_p=0.9, top_k=5)
    records = list(self_chat.sample(generate, None, tokenizer, 5, sampler, seed=4, batch_size=3, tally=tally))
    assert [r["index"] for r in records] == [0, 2, 3, 4, 5] and {r["seed"] for r in records} == {4}
    assert [r["id"] for r in records[:2]] == ["selfchat-4-000000", "selfchat-4-000002"]
    assert records[0]["messages"] == said("hello 0", "hi", "bye") and records[0]["complete"] is False
    assert (tally.kept, tally.dropped) == (5, 1)
    assert tally.tokens == sum(len(t.tokens) for t in chat.tokenize(tokenizer, records))
    opening = tokenizer(chat.opening(tokenizer), add_special_tokens=False)["input_ids"]
    assert asked[0]["prompts"] == [opening] * 3 and asked[0]["max_new_tokens"] == 64 - len(opening)
    assert asked[0]["eos_token_ids"] == () and asked[0]["temperature"] == 0.7
    assert (asked[0]["top_p"], asked[0]["top_k"]) == (0.9, 5)
    assert len({a["seed"] for a in asked}) == len(asked) == 2


def test_a_model_that_never_converses_stops_with_a_clear_error(tokenizer):
    generate, _ = scripted(tokenizer, ["mumble"] * 20)
    with pytest.raises(chat.ChatTemplateError, match="none of 20 sampled texts is a conversation"):
        list(self_chat.sample(generate, None, tokenizer, 1, Sampler(), seed=0, batch_size=2))


def test_batches_are_read_in_order_while_the_next_is_drawn(tokenizer, monkeypatch):
    texts = [f"hello {i}{TO_REPLY}hi" if i % 3 else f"mumble {i}" for i in range(20)]
    generate, asked = scripted(tokenizer, texts)
    drawing, parse, readers = threading.Event(), TurnParser.parse, set()

    def ahead(*args, **options):
        if asked:
            drawing.set()
        return generate(*args, **options)

    def waiting(self, text):
        assert drawing.wait(30), "the second batch is not drawn before the first is read"
        readers.add(threading.current_thread())
        return parse(self, text)

    monkeypatch.setattr(TurnParser, "parse", waiting)
    tally = self_chat.Tally()
    drawn = self_chat.sample_tokenized(ahead, None, tokenizer, 12, Sampler(), seed=0, batch_size=4, tally=tally)
    found, seen = [], []
    for pair in drawn:
        found.append(pair)
        seen.append((tally.kept, tally.dropped))
    numbers = [i for i in range(20) if i % 3][:12]
    assert [record["index"] for record, _ in found] == numbers
    assert [record["messages"][0]["content"] for record, _ in found] == [f"hello {i}" for i in numbers]
    expected = chat.tokenize(tokenizer, [record for record, _ in found])
    assert [t.tokens.tolist() for _, t in found] == [t.tokens.tolist() for t in expected]
    assert seen == [(2, 2)] * 2 + [(5, 3)] * 3 + [(8, 4)] * 3 + [(10, 6)] * 2 + [(12, 6)] * 2
    assert len(asked) == 5 and threading.current_thread() not in readers


def test_what_fails_while_drawing_ahead_or_reading_surfaces_and_leaves_no_thread(tokenizer, monkeypatch):
    good = [f"hello {i}{TO_REPLY}hi" for i in range(4)]
    before = threading.enumerate()

    def drain(generate):
        list(self_chat.sample(generate, None, tokenizer, 4, Sampler(), seed=0, batch_size=2))

    generate, asked = scripted(tokenizer, good)

    def failing(*args, **options):
        if asked:
            raise RuntimeError("out of memory")
        return generate(*args, **options)

    with pytest.raises(RuntimeError, match="out of memory"):
        drain(failing)
    monkeypatch.setattr(TurnParser, "parse", lambda self, text: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        drain(scripted(tokenizer, good)[0])
    assert threading.enumerate() == before


def test_closed_early_no_thread_is_left_and_no_more_is_drawn(tokenizer):
    before = threading.enumerate()
    generate, asked = scripted(tokenizer, [f"hello {i}{TO_REPLY}hi" for i in range(8)])
    records = self_chat.sample(generate, None, tokenizer, 8, Sampler(), seed=0, batch_size=2)
    assert next(records)["index"] == 0 and threading.enumerate() == before
    records.close()
    assert threading.enumerate() == before and len(asked) == 2


def test_no_room_after_the_opening_is_an_error(tokenizer):
    generate, _ = scripted(tokenizer, [])
    with pytest.raises(ValueError, match="max_tokens 4 leaves nothing after the template's opening"):
        list(self_chat.sample(generate, None, tokenizer, 1, Sampler(max_tokens=4), seed=0, batch_size=2))


def test_write_is_deterministic_and_leaves_nothing_when_it_fails(tmp_path):
    records = [tiny.conversation(i) for i in range(3)]
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        self_chat.write(iter(records), tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert [c["messages"] for c in conversations.read(f"file:{tmp_path}/a.jsonl.gz")] == [
        r["messages"] for r in records
    ]

    def broken():
        yield records[0]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        self_chat.write(broken(), tmp_path / "c.jsonl.gz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz"]


def test_command_writes_corpus_and_manifest(tmp_path, monkeypatch):
    folder = tiny.save_llama(tmp_path / "teacher")
    tokenizer = tiny.tokenizer()
    import hybrid.generate

    stand_in = scripted(tokenizer, [f"hey {i}{TO_REPLY}ho" for i in range(4)])[0]
    monkeypatch.setattr(hybrid.generate, "Generator", lambda: stand_in)
    out = tmp_path / "corpus.jsonl.gz"
    self_chat.main([str(folder), str(out), "--conversations", "3", "--batch-size", "2", "--max-tokens", "80"])
    manifest = json.loads((tmp_path / "corpus.manifest.json").read_text())
    assert [json.loads(line)["index"] for line in gzip.decompress(out.read_bytes()).splitlines()] == [0, 1, 2]
    assert manifest["conversations"] == 3 and manifest["dropped"] == 0 and manifest["tokens"] > 0
    assert manifest["sampler"] == {"max_tokens": 80, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    assert manifest["command"].startswith(
        "python -m corpora.self_chat TEACHER_FOLDER corpus.jsonl.gz --conversations 3"
    )
    assert str(tmp_path) not in json.dumps(manifest)
    again = [*manifest["command"].split()[3:]]
    again[:2] = [str(folder), str(tmp_path / "again.jsonl.gz")]
    stand_in = scripted(tokenizer, [f"hey {i}{TO_REPLY}ho" for i in range(4)])[0]
    monkeypatch.setattr(hybrid.generate, "Generator", lambda: stand_in)
    self_chat.main(again)
    assert json.loads((tmp_path / "again.manifest.json").read_text())["sha256"] == manifest["sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-folder", "x.jsonl.gz", "--conversations", "1"], "holds no model.safetensors"),
        (["no-folder", "x.txt", "--conversations", "1"], "OUT must end in .jsonl.gz"),
    ],
)
def test_command_refuses_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        self_chat.main(arguments)
    assert message in capsys.readouterr().err
