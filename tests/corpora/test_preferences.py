from __future__ import annotations

import json

import numpy as np
import pytest

from corpora import chat, preferences
from corpora.conversations import ConversationError
from corpora.preferences import PreferenceError, PreferencePair
from corpora.shards import Shard
from tests.corpora import tiny


def record(chosen="good", rejected="bad", prompt="hello"):
    return {
        name: [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        for name, text in (("chosen", chosen), ("rejected", rejected))
    }


def test_collate_pads_right_and_masks_the_reply_only():
    batch = preferences.collate(
        [PreferencePair((7, 8), (1, 2, 3), (4,), "p"), PreferencePair((9,), (5,), (6, 6), "q")], 99
    )
    assert batch.tokens.tolist() == [[7, 8, 1, 2, 3], [9, 5, 99, 99, 99], [7, 8, 4, 99, 99], [9, 6, 6, 99, 99]]
    assert batch.seq_idx.tolist() == [[0] * 5, [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [[0, 1, 2, 3, 0], [5, 0, 0, 0, 0], [0, 4, 0, 0, 0], [6, 6, 0, 0, 0]]
    assert batch.seq_idx.dtype == np.int32 and batch.ids == ("p", "q")


def test_collate_refuses_what_has_no_reply():
    with pytest.raises(PreferenceError, match=r"without prompt or reply: \['p'\]"):
        preferences.collate([PreferencePair((1,), (2,), (), "p")], 0)


def test_pairs_that_teach_nothing_are_told_apart():
    assert PreferencePair((1,), (2,), (3,)).informative
    assert not PreferencePair((1,), (2,), (2,)).informative
    assert not PreferencePair((1,), (2,), ()).informative


def test_prompts_end_where_the_first_reply_begins():
    tokenizer = tiny.tokenizer()
    records = [tiny.conversation(1, turns=2), tiny.conversation(2)]
    done = list(chat.tokenize(tokenizer, records))
    shard = Shard.of([d.tokens for d in done], ["c1", "c2"], [d.assistant for d in done])
    found = preferences.prompts(shard, 500)
    expected = tokenizer.apply_chat_template(records[0]["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert [name for name, _ in found] == ["c1", "c2"] and list(found[0][1]) == expected
    assert preferences.prompts(shard, len(expected) - 1) == []


def test_read_then_load_splits_prompt_and_reply(tmp_path):
    tiny.write_jsonl(tmp_path / "pairs.jsonl", [record(), record("yes, yes", "no", "how are you?")])
    rows = list(preferences.read("file:pairs.jsonl", tmp_path))
    tiny.write_jsonl(tmp_path / "preferences.jsonl", rows)
    tokenizer = tiny.tokenizer()
    pairs = preferences.load(tmp_path / "preferences.jsonl", tokenizer)
    assert [p.id for p in pairs] == ["pairs.jsonl:1", "pairs.jsonl:2"]
    assert tokenizer.decode(pairs[1].prompt_tokens).endswith("how are you?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(pairs[1].chosen_tokens) == "yes, yes<|im_end|>"
    assert tokenizer.decode(pairs[1].rejected_tokens) == "no<|im_end|>"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"rejected": None}, ConversationError, "rejected: messages is None"),
        ({"rejected": record(prompt="other")["rejected"]}, PreferenceError, "answer different prompts"),
        ({"chosen": record()["chosen"][:1]}, PreferenceError, "chosen ends with the user"),
    ],
)
def test_bad_pairs_are_named(tmp_path, change, error, said):
    (tmp_path / "p.jsonl").write_text(json.dumps(record()) + "\n" + json.dumps({**record(), **change}) + "\n")
    with pytest.raises(error, match=f"p.jsonl:2: .*{said}"):
        list(preferences.read("file:p.jsonl", tmp_path))


def test_missing_column_is_named(tmp_path):
    tiny.write_jsonl(tmp_path / "p.jsonl", [{"chosen": record()["chosen"]}])
    with pytest.raises(PreferenceError, match=r"p\.jsonl:1: has no 'rejected' \(it has chosen\)"):
        list(preferences.read("file:p.jsonl", tmp_path))
