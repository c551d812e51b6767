import json
import math
import sys
from pathlib import Path

import pytest
import torch
from endpoint import Endpoint, good

from evals.judge import backends
from evals.judge.backends import EndpointJudge, FakeJudge, JudgeError, LocalJudge, LogprobsUnavailable, RequestRefused
from evals.judge.judgments import better, letter, rating
from steps.config import JudgeConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import BYTE_VOCAB, byte_tokenizer

QUESTION = [{"role": "user", "content": "Is it good?"}]


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Seconds that were waited between attempts; nothing waits."""
    waited: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waited.append)
    return waited


def _judge(endpoint: Endpoint, **settings) -> EndpointJudge:
    return EndpointJudge(endpoint.url, "judge-1", **{"retries": 3, "timeout": 5.0, **settings})


def test_a_request_says_who_what_and_how(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    with Endpoint(lambda n, body: good("Rating: [[7]]")) as endpoint:
        config = JudgeConfig(
            backend="openai",
            base_url=f"{endpoint.url}/",
            model="judge-1",
            api_key_env="A_KEY",
            parameters={"seed": 3},
        )
        judge = backends.make(config, torch.device("cpu"), torch.float32)
        assert judge.complete(QUESTION, 50) == "Rating: [[7]]"
    headers, body = endpoint.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "path": "/v1/chat/completions",
        "model": "judge-1",
        "messages": QUESTION,
        "max_tokens": 50,
        "temperature": 0,
        "seed": 3,
    }


def test_a_key_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    config = JudgeConfig(backend="openai", base_url="http://127.0.0.1:1/v1", model="m", api_key_env="A_KEY")
    with pytest.raises(JudgeError, match="names A_KEY, which is not set"):
        backends.make(config, torch.device("cpu"), torch.float32)


def test_what_passes_is_waited_out(pauses):
    """Too many requests, an inner error, a cut connection, half an answer, no JSON, JSON of another kind."""
    troubles = [
        (429, {"Retry-After": "7"}, b"slow down"),
        (500, {}, b"oops"),
        "reset",
        "half",
        (200, {"Content-Type": "text/html"}, b"<html>busy</html>"),
        (200, {}, b'{"choices": []}'),
    ]
    with Endpoint(lambda n, body: troubles[n] if n < len(troubles) else good("[[A]]")) as endpoint:
        assert _judge(endpoint, retries=4).complete(QUESTION, 50) == "[[A]]"
    assert len(endpoint.requests) == len(troubles) + 1
    assert pauses[0] == 7.0, "what Retry-After asked for"
    assert pauses[1:4] == [2.0, 4.0, 8.0], "then pauses that double"
    assert pauses[4:] == [2.0, 4.0], "and so for answers that are no chat completions"


def test_a_silent_endpoint_is_asked_again(pauses):
    with Endpoint(lambda n, body: "silence" if n == 0 else good("[[B]]")) as endpoint:
        assert _judge(endpoint, timeout=0.2).complete(QUESTION, 50) == "[[B]]"
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((503, {}, b"overloaded " * 100), r"status 503: 'overloaded .*…'; benchmark.judge has .*retries"),
        ((401, {}, b"wrong key"), "status 401: 'wrong key'; benchmark.judge has .*api_key_env"),
        ((307, {"Location": "/elsewhere"}, b""), "status 307"),
        ((200, {}, b"[1, 2"), r"answers, 3 times, with what is no chat completion: '\[1, 2'; .*base_url"),
        ("reset", "no answer after 3 attempts.*timeout_seconds and retries"),
    ],
)
def test_what_does_not_pass_ends_with_a_reason(pauses, reply, message):
    with Endpoint(lambda n, body: reply) as endpoint, pytest.raises(JudgeError, match=message) as caught:
        _judge(endpoint, retries=2).complete(QUESTION, 50)
    assert not isinstance(caught.value, RequestRefused)
    tried = 1 if isinstance(reply, tuple) and reply[0] in (401, 307) else 3
    assert len(endpoint.requests) == tried


def test_an_endpoint_that_is_down_says_so(pauses):
    judge = EndpointJudge("http://127.0.0.1:1/v1", "m", retries=1)
    with pytest.raises(JudgeError, match="is the endpoint up"):
        judge.complete(QUESTION, 5)


def test_a_refused_request_is_told_apart(pauses):
    reply = (400, {}, b'{"error": "content filter"}')
    with Endpoint(lambda n, body: reply) as endpoint, pytest.raises(RequestRefused, match="content filter"):
        _judge(endpoint).complete(QUESTION, 50)
    assert len(endpoint.requests) == 1


def test_an_answer_without_words_is_empty():
    with Endpoint(lambda n, body: good(None)) as endpoint:
        assert _judge(endpoint).complete(QUESTION, 5) == ""


def test_log_probabilities_of_the_choices():
    top = {"M": -0.1, " m": -3.0, "Both": -4.0}
    with Endpoint(lambda n, body: good("M", top if n == 0 else {"The": -0.2})) as endpoint:
        judge = _judge(endpoint)
        assert judge.choice_logprobs(QUESTION, ["m", "M"]) == {"m": -3.0, "M": -0.1}
        assert judge.choice_logprobs(QUESTION, ["m", "M"]) == {"m": -math.inf, "M": -math.inf}
    assert endpoint.requests[0][1]["max_tokens"] == 1
    assert endpoint.requests[0][1]["logprobs"] is True


@pytest.mark.parametrize("logprobs", [None, {"content": []}, {"tokens": ["M"], "token_logprobs": [-0.1]}])
def test_an_endpoint_without_log_probabilities_says_so(logprobs):
    choice = {"message": {"content": "M"}, "logprobs": logprobs}
    reply = (200, {}, json.dumps({"choices": [choice]}).encode())
    with Endpoint(lambda n, body: reply) as endpoint, pytest.raises(LogprobsUnavailable, match="judge-1"):
        _judge(endpoint).choice_logprobs(QUESTION, ["m", "M"])


def test_the_hash_is_of_all_that_makes_a_judge():
    plain = ("http://a/v1", "m", {})
    others = [("http://b/v1", "m", {}), ("http://a/v1", "n", {}), ("http://a/v1", "m", {"seed": 1})]
    hashes = {EndpointJudge(url, model, parameters=p).hash for url, model, p in (plain, *others)}
    assert len(hashes) == 4
    patient = EndpointJudge("http://a/v1", "m", timeout=1.0, retries=9, concurrency=1, api_key="k")
    assert patient.hash in hashes, "how patiently it is asked does not count"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=BYTE_VOCAB, max_position_embeddings=256, eos_token_id=2, **sizes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_model_in_this_process_answers_greedily_with_its_own_template(folder):
    from transformers import AutoModelForCausalLM

    judge = LocalJudge(f"file:{folder}", "cpu", torch.float32)
    tokenizer = byte_tokenizer()
    text = "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = list(ids)
    for _ in range(6):
        expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert judge.complete(QUESTION, 6) == tokenizer.decode(expected[len(ids) :], skip_special_tokens=True)

    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        after_m = model(torch.tensor([[*ids, *tokenizer("m")["input_ids"]]])).logits[0, -1].log_softmax(-1)
    m, capital, y = (tokenizer(letter)["input_ids"][0] for letter in "mMy")
    found = judge.choice_logprobs(QUESTION, ["m", "M", "my"])
    assert found["m"] == pytest.approx(float(log_p[m]), abs=1e-5)
    assert found["M"] == pytest.approx(float(log_p[capital]), abs=1e-5)
    assert found["my"] == pytest.approx(float(log_p[m] + after_m[y]), abs=1e-5)


def test_a_question_beyond_the_context_is_refused(folder):
    judge = LocalJudge(f"file:{folder}", "cpu", torch.float32)
    with pytest.raises(RequestRefused, match="context of 256; lower benchmark.judge.answer_tokens"):
        judge.complete([{"role": "user", "content": "x" * 200}], 50)


def test_another_model_is_another_judge(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    same, exact = (LocalJudge(f"file:{path}", "cpu", torch.float32).hash for path in (folder, tmp_path))
    assert same == exact
    assert LocalJudge(f"file:{folder}", "cpu", torch.bfloat16).hash != same
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert LocalJudge(f"file:{tmp_path}", "cpu", torch.float32).hash != same


def test_the_fake_answers_in_the_form_that_is_asked_for():
    judge = FakeJudge()
    asks = {"rating": 'rate by "[[rating]]"', "pair": 'say "[[A]]" or "[[B]]"', "letter": "m or M."}
    texts = {k: judge.complete([{"role": "user", "content": v}], 9) for k, v in asks.items()}
    assert rating(texts["rating"]) is not None
    assert better(texts["pair"]) is not None
    assert letter(texts["letter"]) is not None
    p = judge.choice_logprobs(QUESTION, ["m", "M"])
    assert sum(map(math.exp, p.values())) == pytest.approx(1.0)
    assert p == FakeJudge().choice_logprobs(QUESTION, ["m", "M"])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[7.5]] and then [[2]]", 7.5),
        ("Rating: [8]", 8.0),
        ("like [1], but: [[9]]", 9.0),
        ("[[11]]", None),
        ("[[0]]", None),
        ("Seven of ten.", None),
        ("", None),
        (None, None),
        ("<think>[[3]]?</think>[[6]]", 6.0),
    ],
)
def test_scores_are_found_or_missing(text, score):
    assert rating(text) == score


def test_verdicts_are_found_or_missing():
    assert [better(t) for t in ("[[A]]", "so: [[B]].", "[[C]]", "A", None)] == [1.0, 0.0, 0.5, None, None]
    assert [letter(t) for t in ("m", " M\n", '"M"', "model m", "Mm", None)] == ["m", "M", "M", None, None, None]
