"""The server, asked by OpenAI's own client over HTTP; what that client cannot send goes through a socket."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from hybrid.generate import generate
from hybrid.serve.__main__ import main
from tests.corpora import tiny
from tests.hybrid import serving
from tests.hybrid.serving import EOS, NAME, Served, until

openai = pytest.importorskip("openai", reason="pip install -e '.[serve,test]'")
ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = tiny.tokenizer()
HELLO = [{"role": "user", "content": "hello there"}]
PROMPT = "the answer is"
DRAFTS = {"plain": {}, "n-gram": {"draft": "ngram", "k": 3}, "a model": {"draft": serving.model(5), "k": 2}}


@pytest.fixture(scope="module", params=DRAFTS)
def server(request) -> Iterator[Served]:
    with serving.serving(serving.loaded(**DRAFTS[request.param]), max_batch=3, max_queue=2) as served:
        yield served


@pytest.fixture(scope="module")
def plain() -> Iterator[Served]:
    with serving.serving(serving.loaded(), max_batch=3, max_queue=2) as served:
        yield served


def reply_to(prompt: list[int], count: int, eos: tuple[int, ...] = (EOS,)) -> str:
    (tokens,) = generate(serving.model(), [prompt], count, eos_token_ids=eos)
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def chat_reply(count: int) -> str:
    text = TOKENIZER.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    return reply_to(TOKENIZER(text)["input_ids"], count)


def chat(served: Served, count: int = 20, **options: Any) -> Any:
    asked = {"model": NAME, "messages": HELLO, "max_tokens": count, "temperature": 0.0, **options}
    return served.client.chat.completions.create(**asked)


def complete(served: Served, prompt: Any = PROMPT, count: int = 20, **options: Any) -> Any:
    asked = {"model": NAME, "prompt": prompt, "max_tokens": count, "temperature": 0.0, **options}
    return served.client.completions.create(**asked)


def post(served: Served, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    connection = HTTPConnection("127.0.0.1", served.port, timeout=serving.DEADLINE)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())["error"]


def test_the_model_is_listed(plain):
    assert [model.id for model in plain.client.models.list()] == [NAME]
    assert plain.client.models.retrieve(NAME).owned_by == "mamballama"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; it is 'tiny'"):
        plain.client.models.retrieve("other")


def test_chat_is_what_the_engine_says(server):
    made = chat(server)
    (choice,) = made.choices
    assert choice.message.content == chat_reply(20) and choice.message.role == "assistant"
    assert (made.model, made.object, choice.finish_reason) == (NAME, "chat.completion", "length")
    assert made.usage.completion_tokens == 20
    assert made.usage.prompt_tokens + 20 == made.usage.total_tokens > 30


def test_chat_streams_the_same(server):
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    *text, last, usage = chunks
    assert text[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in text) == chat_reply(20)
    assert len(text) > 4, "in pieces"
    assert {chunk.choices[0].finish_reason for chunk in text} == {None}
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert not usage.choices and usage.usage.completion_tokens == 20
    assert {(chunk.id, chunk.object) for chunk in chunks} == {(last.id, "chat.completion.chunk")}
    assert all(chunk.usage is None for chunk in chat(server, stream=True))


def test_completions_take_text_and_tokens(server):
    tokens = TOKENIZER(PROMPT)["input_ids"]
    wanted = reply_to(tokens, 20)
    for prompt in (PROMPT, [PROMPT], tokens, [tokens]):
        made = complete(server, prompt)
        assert (made.choices[0].text, made.choices[0].finish_reason) == (wanted, "length")
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(tokens), 20)
    assert "".join(chunk.choices[0].text for chunk in complete(server, stream=True)) == wanted


def test_limits_that_are_left_out(plain):
    assert complete(plain, count=openai.omit).usage.completion_tokens == 16
    made = chat(plain, count=openai.omit)
    assert made.usage.total_tokens == 256 and made.choices[0].finish_reason == "length"
    assert chat(plain, count=openai.omit, max_completion_tokens=7).usage.completion_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_reply_and_frees_its_row(server, stream):
    whole = chat_reply(100)
    stop = whole[20:23]
    wanted = whole[: whole.index(stop)]
    server.gate.forget()
    chat(server, 100)
    undisturbed = server.gate.rounds
    server.gate.forget()
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    made = chat(server, 100, stop=["never said", stop], **options)
    chunks = list(made) if stream else [made]
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) if stream else made.choices[0].message.content
    assert text == wanted
    assert (chunks[-2] if stream else made).choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens < 60
    until(lambda: server.worker.load == (0, 0))
    assert server.gate.rounds < undisturbed


def test_the_end_of_turn_is_counted_and_not_shown():
    tokens = TOKENIZER(PROMPT)["input_ids"]
    (reply,) = generate(serving.model(), [tokens], 20, eos_token_ids=())
    at = next(i for i, token in enumerate(reply) if i >= 3 and token not in reply[:i])
    given = serving.loaded(model=serving.model(eos_token_ids=(reply[at],)))
    with serving.serving(given) as served:
        made = complete(served)
    assert (made.choices[0].text, made.choices[0].finish_reason) == (TOKENIZER.decode(reply[:at]), "stop")
    assert made.usage.completion_tokens == at + 1


def test_a_seed_decides(server):
    def sampled(**options: Any) -> str:
        return complete(server, temperature=1.2, top_p=0.95, **options).choices[0].text

    first = sampled(seed=3)
    assert sampled(seed=3) == first != sampled(seed=4)
    assert len({sampled() for _ in range(3)}) > 1, "without a seed each is another"


def test_a_temperature_of_almost_nothing_is_greedy(plain):
    assert complete(plain, temperature=1e-300, top_p=0.5).choices[0].text == complete(plain).choices[0].text


def test_requests_take_rows_as_they_come_free(server):
    """Five come while one is decoded: those of one sampling beside it, a seeded one by itself, each as if alone."""
    greedy = [complete(server, f"{PROMPT} {n}", 10 + n).choices[0].text for n in range(3)]
    seeded = complete(server, temperature=1.0, seed=7).choices[0].text
    with serving.serving(serving.loaded(), max_batch=2, max_queue=5) as served, ThreadPoolExecutor(6) as threads:
        with served.gate.shut():
            jobs: list[Future] = [threads.submit(chat, served, 3)]
            until(lambda: served.worker.load == (0, 1))
            for n in range(3):
                jobs.append(threads.submit(complete, served, f"{PROMPT} {n}", 10 + n))
                until(lambda n=n: served.worker.load == (n + 1, 1))
            jobs.append(threads.submit(complete, served, temperature=1.0, seed=7))
            until(lambda: served.worker.load == (4, 1))
            jobs.append(threads.submit(complete, served, temperature=1.0))
            until(lambda: served.worker.load == (5, 1))
        texts = [job.result(serving.DEADLINE).choices[0] for job in jobs]
        assert [choice.text for choice in texts[1:4]] == greedy
        assert served.gate.admitted == [1] * 6 and served.gate.moves == [(1, 2), (2, 1)]
        assert served.gate.rounds < 3 + 10 + 11 + 12 + 2 * 20, "rows share rounds"
        if not server.worker.engines[0].k:
            assert texts[4].text == seeded


def test_who_comes_later_and_asks_for_less_is_answered_first(server):
    """The gate is shut again before the long reply can have ended; meanwhile the short ones have theirs."""
    server.gate.forget()
    with ThreadPoolExecutor(3) as threads:
        with server.gate.shut():
            long = threads.submit(chat, server, 200)
            until(lambda: server.worker.load == (0, 1))
            server.gate.let(3)
            until(lambda: server.gate.rounds == 3 and server.gate.held)
            short = [threads.submit(chat, server, count) for count in (5, 9)]
            until(lambda: server.worker.load == (2, 1))
            server.gate.let(20)
            assert [job.result(serving.DEADLINE).choices[0].message.content for job in short] == [
                chat_reply(5),
                chat_reply(9),
            ]
            until(lambda: server.worker.load == (0, 1))
            assert not long.done()
        assert long.result(serving.DEADLINE).choices[0].message.content == chat_reply(200)


def test_too_many_requests_are_refused_and_the_others_served(plain):
    with ThreadPoolExecutor(3) as threads:
        with plain.gate.shut():
            jobs = [threads.submit(chat, plain)]
            until(lambda: plain.worker.load == (0, 1))
            jobs += [threads.submit(chat, plain) for _ in range(2)]
            until(lambda: plain.worker.load == (2, 1))
            with pytest.raises(openai.RateLimitError, match="2 requests are waiting") as refused:
                chat(plain)
            assert refused.value.code == "queue_full" and refused.value.response.headers["retry-after"] == "1"
        assert [job.result(serving.DEADLINE).choices[0].message.content for job in jobs] == [chat_reply(20)] * 3


def call_without_reading(served: Served, stream: bool) -> socket.socket:
    body = json.dumps({"model": NAME, "messages": HELLO, "max_tokens": 200, "temperature": 0, "stream": stream})
    caller = socket.create_connection(("127.0.0.1", served.port), timeout=serving.DEADLINE)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    caller.sendall((head + body).encode())
    return caller


@pytest.fixture
def without_complaint(plain, caplog) -> Iterator[None]:
    """A client that goes away is no error of the server's."""
    yield
    assert chat(plain).choices[0].message.content == chat_reply(20)
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


@pytest.mark.usefixtures("without_complaint")
@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_while_decoding_frees_the_row(plain, stream):
    plain.gate.forget()
    with plain.gate.shut():
        caller = call_without_reading(plain, stream)
        until(lambda: plain.worker.load == (0, 1))
        (job,) = plain.worker._running.values()
        if stream:
            assert b"text/event-stream" in caller.recv(4096)
        caller.close()
        until(lambda: job.cancelled)
    until(lambda: plain.worker.load == (0, 0))
    assert plain.gate.rounds <= 2, "of 200"


@pytest.mark.usefixtures("without_complaint")
@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_while_waiting_frees_the_place(plain, stream):
    plain.gate.forget()
    with ThreadPoolExecutor(1) as threads:
        with plain.gate.shut():
            decoded = threads.submit(chat, plain)
            until(lambda: plain.worker.load == (0, 1))
            callers = [call_without_reading(plain, stream) for _ in range(2)]
            until(lambda: plain.worker.load == (2, 1))
            for caller in callers:
                caller.close()
            until(lambda: plain.worker.load == (0, 1))
        assert decoded.result(serving.DEADLINE).choices[0].message.content == chat_reply(20)
    until(lambda: plain.worker.load == (0, 0))
    assert plain.gate.admitted == [1]


@pytest.mark.usefixtures("without_complaint")
def test_who_hangs_up_while_asking_is_forgotten(plain):
    with socket.create_connection(("127.0.0.1", plain.port), timeout=serving.DEADLINE) as caller:
        caller.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert plain.worker.load == (0, 0)


@pytest.mark.usefixtures("without_complaint")
def test_one_row_hanging_up_leaves_the_others(plain):
    plain.gate.forget()
    with ThreadPoolExecutor(2) as threads:
        with plain.gate.shut():
            first = threads.submit(chat, plain)
            until(lambda: plain.worker.load == (0, 1))
            caller = call_without_reading(plain, True)
            until(lambda: plain.worker.load == (1, 1))
            second = threads.submit(chat, plain, 100)
            until(lambda: plain.worker.load == (2, 1))
            plain.gate.let(30)
            first.result(serving.DEADLINE)
            until(lambda: plain.gate.rounds == 30 and plain.gate.held)
            assert plain.worker.load == (0, 2)
            (gone,) = (job for job in plain.worker._running.values() if job.max_new_tokens == 200)
            caller.close()
            until(lambda: gone.cancelled)
        assert second.result(serving.DEADLINE).choices[0].message.content == chat_reply(100)
    assert plain.gate.admitted == [1, 2] and plain.gate.rounds < 110


REFUSED = [
    ("{", 400, "Invalid JSON", None),
    ("[]", 400, "should be an object", None),
    ({}, 400, "model: Field required", "model"),
    ({"model": NAME}, 400, "prompt: Field required", "prompt"),
    ({"model": "other", "prompt": "a"}, 404, "'other' is not served here; it is 'tiny'", "model"),
    ({"prompt": 5}, 400, "prompt: must be a string or a list of token numbers, got 5", "prompt"),
    ({"prompt": ["a", "b"]}, 400, "prompt: must be one prompt, got a list of 2", "prompt"),
    ({"prompt": ""}, 400, "no tokens", "prompt"),
    ({"prompt": [1, 300]}, 400, "token 300 does not exist; the model has 0 to 299", "prompt"),
    ({"prompt": [1, True]}, 400, "prompt: must be a string or a list of token", "prompt"),
    ({"temperature": "hot"}, 400, "temperature: .*number, got 'hot'", "temperature"),
    ({"temperature": 3}, 400, "temperature: .*less than or equal to 2, got 3", "temperature"),
    ('{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature: .*finite", "temperature"),
    ({"top_p": 0}, 400, "top_p: .*greater than 0, got 0", "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens: .*greater than or equal to 1, got 0", "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens: .*integer, got True", "max_tokens"),
    ({"max_tokens": 256}, 400, "1 tokens and max_tokens is 256, but .* at most 256", "max_tokens"),
    ({"prompt": [5] * 256, "max_tokens": None}, 400, "prompt has 256 tokens", "max_tokens"),
    ({"seed": 1.5}, 400, "seed: .*integer", "seed"),
    ({"stop": 5}, 400, "stop: must be a string or a list of at most 4", "stop"),
    ({"stop": [""]}, 400, "stop: .*none of them empty", "stop"),
    ({"stop": list("abcde")}, 400, "stop: .*at most 4", "stop"),
    ({"stream": "yes"}, 400, "stream: .*boolean", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options are for stream = true", "stream_options"),
    ({"n": 2}, 400, "n can only be 1 here, got 2", "n"),
    ({"logprobs": 5}, 400, "logprobs can only be False here, got 5", "logprobs"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty can only be 0 here", "frequency_penalty"),
    ({"min_p": 0.1}, 400, "min_p is not a setting of this server", "min_p"),
]


@pytest.mark.parametrize(("body", "status", "message", "param"), REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(plain, body, status, message, param):
    if isinstance(body, dict) and body.keys() - {"model"}:
        body = {"model": NAME, "prompt": "a", **body}
    given, error = post(plain, "/v1/completions", (body if isinstance(body, str) else json.dumps(body)).encode())
    assert given == status and re.search(message, error["message"]) and error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages: .*at least 1"),
        ({"messages": "hello"}, "messages: .*array, got 'hello'"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            r"messages.0.role: .*'system', 'user' or 'assistant', got 'bot'",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content: must be text"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: .*string, got None"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "the same setting: choose one"),
        ({"tools": [{"type": "function"}]}, r"tools can only be \[\] here"),
        ({"response_format": {"type": "json_object"}}, "response_format can only be"),
    ],
)
def test_chats_that_cannot_be_held_are_refused(plain, changes, message):
    body = {"model": NAME, "messages": HELLO, **changes}
    status, error = post(plain, "/v1/chat/completions", json.dumps(body).encode())
    assert status == 400 and re.search(message, error["message"])


def test_settings_that_ask_for_nothing_are_taken(plain):
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]}]
    made = chat(
        plain, messages=parts, n=1, logprobs=False, presence_penalty=0.0, user="me", stop=None, logit_bias={}, tools=[]
    )
    assert made.choices[0].message.content == chat_reply(20)


def test_unknown_addresses_and_long_bodies_have_error_bodies(plain, monkeypatch):
    assert post(plain, "/v1/embeddings", b"{}")[0] == 404
    assert post(plain, "/v1/models", b"{}")[0] == 405
    monkeypatch.setattr("hybrid.serve.app.BODY_BYTES", 100)
    status, error = post(plain, "/v1/completions", b" " * 101)
    assert status == 413 and "longer than the 100 bytes" in error["message"]


def test_templates_that_refuse_say_why():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}u"
    system = [{"role": "system", "content": "be kind"}]
    with serving.serving(serving.loaded(tokenizer=tiny.tokenizer(template))) as served:
        with pytest.raises(openai.BadRequestError, match="template refuses these messages: no system here"):
            chat(served, messages=system)
        assert chat(served).choices[0].finish_reason == "length"
    with serving.serving(serving.loaded(tokenizer=tiny.tokenizer(""))) as served:
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            chat(served)
        assert complete(served).choices[0].finish_reason == "length"


def test_an_engine_that_fails_fails_who_was_decoded(plain, monkeypatch):
    def broken() -> None:
        raise RuntimeError("out of memory")

    for engine in plain.worker.engines:
        monkeypatch.setattr(engine, "round", broken)
    with pytest.raises(openai.InternalServerError, match="RuntimeError: out of memory"):
        chat(plain)
    with pytest.raises(openai.APIError, match="RuntimeError: out of memory"):
        list(chat(plain, stream=True))
    monkeypatch.undo()
    assert chat(plain).choices[0].message.content == chat_reply(20)


@pytest.mark.gpu
def test_a_gpu_serves_what_its_engine_says():
    """The decoding thread captures its graphs anew where the sampling changes."""
    model, tokens = serving.model().to("cuda"), TOKENIZER(PROMPT)["input_ids"]
    (wanted,) = generate(model, [tokens], 20, eos_token_ids=())
    with serving.serving(serving.loaded(model=model, draft="ngram", k=3)) as served:
        sampled = [complete(served, temperature=1.0, seed=5).choices[0].text]
        assert complete(served).choices[0].text == TOKENIZER.decode(wanted, skip_special_tokens=True)
        sampled.append(complete(served, temperature=1.0, seed=5).choices[0].text)
    assert sampled[0] == sampled[1]


def test_shutting_down_ends_what_is_decoded():
    with ThreadPoolExecutor(1) as threads, serving.serving(serving.loaded(max_length=20_000), max_batch=1) as served:
        endless = threads.submit(lambda: list(chat(served, 19_000, stream=True)))
        until(lambda: served.gate.rounds > 3)
    with pytest.raises(openai.APIConnectionError):
        endless.result(serving.DEADLINE)
    assert served.gate.rounds < 19_000


def test_the_command_serves_a_folder(tmp_path):
    folder = serving.folder(tmp_path / "student")
    command = [sys.executable, "-m", "hybrid.serve", str(folder), "--port", "0", "--draft", "ngram", "--name", NAME]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            port = next(
                re.findall(r"running on http://127.0.0.1:(\d+)", line) for line in process.stderr if "on http" in line
            )
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port[0]}/v1", api_key="none", max_retries=0)
            made = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, temperature=0)
            assert made.choices[0].text == reply_to(TOKENIZER(PROMPT)["input_ids"], 20)
            process.send_signal(signal.SIGINT)
            assert process.wait(serving.DEADLINE) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{none}"], "config.json"),
        (["{folder}", "--k", "3"], "--k 3 is about a draft.*--draft ngram"),
        (["{folder}", "--draft", "{none}"], "config.json"),
        (["{folder}", "--draft", "{other}"], "vocabulary of 97 tokens and the model one of 300"),
    ],
)
def test_models_that_cannot_be_served_are_refused(tmp_path, capsys, options, message):
    from hybrid import save_pretrained
    from tests.hybrid import tiny_hybrid

    places = {"none": tmp_path / "none", "folder": serving.folder(tmp_path / "a"), "other": tmp_path / "b"}
    save_pretrained(tiny_hybrid.model(), places["other"])
    assert main([option.format(**places) for option in options] + ["--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hybrid.serve: ") and re.search(message, said)
