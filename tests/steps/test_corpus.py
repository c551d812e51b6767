from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from corpora import chat, preferences, sources
from corpora.conversations import ConversationError
from corpora.shards import Shard
from steps import corpus
from steps.config import CorpusConfig, FreeTextConfig, SelfChatConfig
from steps.stage import StageContext
from tests.corpora import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def build(teacher, tmp_path):
    def run(name="out", seed=0, progress=None, **settings):
        out = tmp_path / name
        out.mkdir()
        extra = {"progress": progress} if progress else {}
        context = StageContext("cpu", "float32", seed, tmp_path, **extra)
        return out, corpus.run(CorpusConfig(**settings), {"teacher": teacher}, out, context)

    return run


@pytest.fixture
def source(tmp_path):
    return f"file:{tiny.write_jsonl(tmp_path / 'data.jsonl', [tiny.conversation(i, turns=2) for i in range(40)])}"


def texts(shard, tokenizer):
    return {tokenizer.decode(shard.document(i)) for i in range(len(shard))}


def test_splits_are_disjoint_and_hold_the_conversations(build, source, teacher):
    out, summary = build(sources=[source], held_out_conversations=8)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    train, held = Shard.load(out / "train.npz"), Shard.load(out / "held_out.npz")
    assert (len(train), len(held)) == (32, 8)
    everything = {chat.conversation_text(tokenizer, tiny.conversation(i, turns=2)) for i in range(40)}
    assert texts(train, tokenizer) | texts(held, tokenizer) == everything
    assert not texts(train, tokenizer) & texts(held, tokenizer)
    assert 0 < train.assistant.mean() < 1
    assert summary["splits"]["train"] == {
        "conversations": 32,
        "documents": 0,
        "tokens": len(train.tokens),
        "assistant_tokens": int(train.assistant.sum()),
    }


def test_manifest_names_every_file_by_hash_and_the_result_is_reproducible(build, source):
    (out, _), (again, _) = (build(name, sources=[source], held_out_conversations=8) for name in ("one", "two"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"] == {n: sources.sha256_of(out / n) for n in ("train.npz", "held_out.npz")}
    assert manifest["seed"] == 0 and len(manifest["tokenizer"]) == 64
    assert manifest["sources"][source]["conversations"] == 40
    assert (out / "manifest.json").read_bytes() == (again / "manifest.json").read_bytes()
    other, _ = build("other", seed=1, sources=[source], held_out_conversations=8)
    assert set(Shard.load(other / "held_out.npz").ids) != set(Shard.load(out / "held_out.npz").ids)


def test_the_same_text_twice_is_one_conversation(build, tmp_path):
    records = [tiny.conversation(i) for i in range(6)]
    copies = [{**r, "id": f"copy {r['id']}"} for r in records]
    copies[0]["messages"] = [{**m, "content": m["content"] + "  "} for m in copies[0]["messages"]]
    path = tiny.write_jsonl(tmp_path / "twice.jsonl", records + copies)
    out, summary = build(sources=[f"file:{path}"], held_out_conversations=2)
    assert summary["duplicates"] == 6
    ids = [*Shard.load(out / "train.npz").ids, *Shard.load(out / "held_out.npz").ids]
    assert sorted(ids) == [r["id"] for r in records]


def test_reading_stops_after_max_tokens(build, source):
    _, full = build(sources=[source], held_out_conversations=2)
    total = full["sources"][source]["tokens"]
    both = [source, source.replace("data", "never read")]
    _, summary = build("short", sources=both, held_out_conversations=2, max_tokens=total // 2)
    counts = list(summary["sources"].values())
    assert total // 2 <= counts[0]["tokens"] < total // 2 + total // 20
    assert counts[1] == {"conversations": 0, "tokens": 0}


def test_self_chat_is_added_to_the_sources_and_seeded(build, source, monkeypatch):
    import hybrid.generate

    tokenizer, seeds, shown = tiny.tokenizer(), [], []

    def generate(model, prompts, max_new_tokens, *, seed, **_):
        seeds.append(seed)
        said = "say {} of {}<|im_end|>\n<|im_start|>assistant\nso be it"
        return [tokenizer(said.format(i, seed), add_special_tokens=False)["input_ids"] for i in range(len(prompts))]

    monkeypatch.setattr(hybrid.generate, "Generator", lambda: generate)
    settings = SelfChatConfig(conversations=5, max_tokens=90, batch_size=3)
    out, summary = build(sources=[source], self_chat=settings, held_out_conversations=4, progress=shown.append)
    assert summary["sources"]["self_chat"]["conversations"] == 5
    ids = [*Shard.load(out / "train.npz").ids, *Shard.load(out / "held_out.npz").ids]
    assert len(ids) == 45 and sum(i.startswith("selfchat-0-") for i in ids) == 5
    assert len(set(seeds)) == 2
    assert shown[-1].done == shown[-1].total == 5
    monkeypatch.setattr(hybrid.generate, "Generator", lambda: lambda *a, seed, **k: generate(*a, seed=seed, **k))
    build("again", seed=1, self_chat=settings, held_out_conversations=2)
    assert not set(seeds[2:]) & set(seeds[:2])


def test_a_random_model_really_generates_and_is_refused_for_not_conversing(build):
    settings = SelfChatConfig(conversations=2, max_tokens=60, batch_size=2)
    with pytest.raises(chat.ChatTemplateError, match="none of 20 sampled texts is a conversation"):
        build(self_chat=settings, held_out_conversations=1)


def test_free_text_is_trained_on_as_drawn_and_some_of_it_is_held_out(build, source):
    """A real model of random weights says different things from the start token on: no stand-in is needed."""
    settings = FreeTextConfig(
        documents=9, held_out_documents=2, max_tokens=12, batch_size=4, start_token="<|endoftext|>"
    )
    shown = []
    out, summary = build(sources=[source], held_out_conversations=4, free_text=settings, progress=shown.append)
    train, held, own = (Shard.load(out / f"{name}.npz") for name in ("train", "held_out", "held_out_text"))
    assert (len(train), len(held), len(own)) == (36 + 7, 4, 2)
    assert not any(name.startswith("freetext") for name in held.ids)
    assert all(name.startswith("freetext-0-") for name in [*train.ids[36:], *own.ids])
    drawn = [train.document(i).tolist() for i in range(36, 43)] + [own.document(i).tolist() for i in range(2)]
    assert all(tokens[0] == 0 and 2 <= len(tokens) <= 12 for tokens in drawn)
    assert len({tuple(tokens) for tokens in drawn}) == 9
    assert not train.assistant[train.starts[36] :].any() and not own.assistant.any()
    counts = summary["splits"]["train"]
    assert (counts["conversations"], counts["documents"]) == (36, 7)
    assert summary["splits"]["held_out_text"]["documents"] == 2
    assert summary["sources"]["free_text"]["documents"] == 9
    assert summary["sources"]["free_text"]["tokens"] == sum(map(len, drawn))
    assert summary["sources"]["free_text"]["start_token"] == 0
    assert shown[-1].done == shown[-1].total == 9
    again, _ = build("again", sources=[source], held_out_conversations=4, free_text=settings)
    assert (again / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()
    other, _ = build("other", seed=1, sources=[source], held_out_conversations=4, free_text=settings)
    others = Shard.load(other / "train.npz")
    assert {tuple(others.document(i)) for i in range(36, 43)} != {tuple(tokens) for tokens in drawn[:7]}


def test_conversations_are_the_same_with_and_without_plain_documents(build, source, tmp_path):
    (tmp_path / "a.txt").write_text("hello there " * 9)
    out, _ = build(sources=[source], held_out_conversations=4)
    more, _ = build("more", sources=[source], held_out_conversations=4, texts=[f"file:{tmp_path}/a.txt"])
    assert (out / "held_out.npz").read_bytes() == (more / "held_out.npz").read_bytes()
    train, plain = Shard.load(out / "train.npz"), Shard.load(more / "train.npz")
    assert plain.ids.tolist() == [*train.ids, "a.txt@0"]
    assert plain.tokens.tolist() == [*train.tokens, *tiny.tokenizer()("hello there " * 9)["input_ids"]]
    spoken = plain.with_replies()
    assert spoken.ids.tolist() == train.ids.tolist()
    assert (spoken.tokens == train.tokens).all() and (spoken.assistant == train.assistant).all()


def test_texts_are_cut_into_documents_each_text_once(build, source, tmp_path):
    long, short = "hello there, the answer is " * 20, "how are you today?"
    path = tiny.write_jsonl(tmp_path / "t.jsonl", [{"text": long}, {"text": short}, {"text": f" {long}"}])
    (tmp_path / "more.txt").write_text("be kind " * 30)
    texts = [f"file:{path}", f"file:{tmp_path}/more.txt"]
    out, summary = build(sources=[source], held_out_conversations=4, texts=texts, text_tokens=50)
    train = Shard.load(out / "train.npz")
    wanted = tiny.tokenizer()(long)["input_ids"]
    pieces = [i for i, name in enumerate(train.ids) if name.startswith("t.jsonl:1@")]
    assert [train.document(i).tolist() for i in pieces] == [wanted[a : a + 50] for a in range(0, len(wanted), 50)]
    assert not train.assistant[train.starts[36] :].any()
    tokens = [len(tiny.tokenizer()(text)["input_ids"]) for text in (long, short)]
    assert summary["sources"][texts[0]] == {"documents": len(pieces) + 1, "tokens": sum(tokens)}
    _, summary = build("less", sources=[source], held_out_conversations=4, texts=texts, texts_max_tokens=tokens[0] + 2)
    assert summary["sources"][texts[0]] == {"documents": 2, "tokens": tokens[0] + 2}
    assert summary["sources"][texts[1]] == {"documents": 0, "tokens": 0}


def test_text_that_is_measured_on_is_not_trained_on(build, source, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} is the answer")
    (tmp_path / "copy.md").write_text("a  is the answer\n")
    natural = f"file:{tmp_path}/*.txt"
    with pytest.raises(corpus.CorpusError, match=r"copy\.md of file:.* is the same text as a\.txt of .*\*\.txt"):
        build(sources=[source], held_out_conversations=4, texts=[f"file:{tmp_path}/copy.md"], natural_text=natural)
    with pytest.raises(ValueError, match=r"texts and natural_text both name file:.*\*\.txt"):
        CorpusConfig(sources=[source], texts=[natural], natural_text=natural)


def test_more_held_out_documents_than_documents_are_refused():
    with pytest.raises(ValueError, match="held_out_documents 5 must be fewer than documents 5"):
        FreeTextConfig(documents=5, held_out_documents=5)


def test_natural_text_is_tokenised_up_to_the_cap(build, source, tmp_path, monkeypatch):
    (tmp_path / "essays").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "essays" / f"{name}.txt").write_text(f"hello there, {name} is the answer " * 5)
    monkeypatch.setattr(corpus, "NATURAL_TOKENS", 150)
    out, summary = build(sources=[source], held_out_conversations=2, natural_text=f"file:{tmp_path}/essays/*.txt")
    natural = Shard.load(out / "natural.npz")
    assert len(natural.tokens) == 150 == summary["splits"]["natural"]["tokens"]
    assert natural.ids.tolist()[0] == "a.txt" and not natural.assistant.any()
    expected = tiny.tokenizer()((tmp_path / "essays" / "a.txt").read_text())["input_ids"]
    assert natural.document(0).tolist() == expected[:150]


def test_preferences_are_checked_and_copied(build, source, tmp_path):
    reply = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "good"}]
    worse = [reply[0], {"role": "assistant", "content": "bad"}]
    path = tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": reply, "rejected": worse, "score": 3}])
    out, summary = build(sources=[source], held_out_conversations=2, preferences=f"file:{path}")
    assert summary["splits"]["preferences"] == {"pairs": 1}
    (pair,) = preferences.load(out / "preferences.jsonl", tiny.tokenizer())
    assert pair.informative and pair.id == "pairs.jsonl:1"


def test_bad_data_and_too_little_data_are_named(build, tmp_path):
    path = tiny.write_jsonl(tmp_path / "few.jsonl", [tiny.conversation(i) for i in range(3)])
    with pytest.raises(corpus.CorpusError, match="held_out_conversations is 3, but the sources give only 3 different"):
        build(sources=[f"file:{path}"], held_out_conversations=3)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ConversationError, match=r"few\.jsonl:4: not valid JSON"):
        build("again", sources=[f"file:{path}"], held_out_conversations=1)
    with pytest.raises(sources.SourceError, match="there is no file or folder"):
        build("missing", sources=["file:no such.jsonl"], held_out_conversations=1)
