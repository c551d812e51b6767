"""Who judges: an OpenAI-compatible endpoint, a Hugging Face model in this process, or a fake to try plumbing out."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import torch
import urllib3
from urllib3.util.retry import Retry

from corpora import chat
from corpora.sources import resolve
from evals.head import EvaluationError
from evals.judge.data import Message, content_hash

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Answers of an endpoint that a later attempt may better."""
REFUSED = (400, 413, 422)
"""Answers that are about this one request: too long, filtered, a parameter that is unknown."""
TOP_LOGPROBS = 20
"""As many as endpoints give."""
LONGEST_PAUSE = 60.0
"""Seconds between attempts, unless the endpoint asks for more."""
QUOTED = 300
"""Characters of an endpoint's answer that an error quotes."""


class JudgeError(EvaluationError):
    """A judge that cannot be asked; the message says what it answered and which setting to change."""


class RequestRefused(JudgeError):
    """This request is not answered, by its content or its parameters; others may be."""


class LogprobsUnavailable(JudgeError):
    """The judge answers in text alone."""


class Judge(Protocol):
    """kind, model: for people. hash: of all that makes its judgments its own. concurrency: requests at once."""

    kind: str
    model: str
    hash: str
    concurrency: int

    def complete(self, messages: Sequence[Message], max_tokens: int) -> str:
        """The most probable answer."""
        ...

    def choice_logprobs(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """ln p of each choice as the beginning of the answer; −inf for one that is too improbable to be listed.

        Raises LogprobsUnavailable where the judge gives none; some endpoints then refuse the request instead.
        """
        ...


def make(config: Any, device: torch.device, dtype: torch.dtype) -> Judge:
    """The judge of a `steps.config.JudgeConfig`; a model in this process lies on `device` in `dtype`."""
    if config.backend == "openai":
        return EndpointJudge(
            config.base_url,
            config.model,
            api_key=_api_key(config.api_key_env),
            parameters=config.parameters,
            concurrency=config.concurrency,
            timeout=config.timeout_seconds,
            retries=config.retries,
        )
    return LocalJudge(config.source, device, dtype) if config.backend == "hf" else FakeJudge()


def _api_key(variable: str) -> str:
    if variable and not os.environ.get(variable):
        raise JudgeError(
            f"benchmark.judge.api_key_env names {variable}, which is not set: set it to the endpoint's key, or the "
            "leaf to an empty string for an endpoint that wants none"
        )
    return os.environ[variable] if variable else ""


class EndpointJudge:
    """Chat completions over HTTP at temperature 0.

    Lost connections, silence and the statuses of AGAIN are tried again by urllib3, after what Retry-After says or after
    pauses that double; so are answers that are no chat completion. `backoff`: seconds of the shortest pause.
    """

    kind = "openai"

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "",
        parameters: dict[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
    ) -> None:
        self.model, self.concurrency, self.retries = model, concurrency, retries
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self.parameters = {"model": model, "temperature": 0, **(parameters or {})}
        self.hash = content_hash(self.kind, self.url, self.parameters)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._retry = Retry(
            total=retries,
            redirect=0,
            status_forcelist=AGAIN,
            allowed_methods=None,
            backoff_factor=backoff,
            backoff_max=LONGEST_PAUSE,
            raise_on_status=False,
            raise_on_redirect=False,
        )
        options: dict[str, Any] = {"maxsize": concurrency, "block": True, "timeout": urllib3.Timeout(timeout)}
        target = urlsplit(base_url)
        proxy = "" if proxy_bypass(target.hostname or "") else getproxies().get(target.scheme, "")
        self._pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)

    def complete(self, messages: Sequence[Message], max_tokens: int) -> str:
        choice = self._choice({"messages": list(messages), "max_tokens": max_tokens})
        return choice["message"].get("content") or ""

    def choice_logprobs(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        asked = {"messages": list(messages), "max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            listed = self._choice(asked)["logprobs"]["content"][0]["top_logprobs"]
            found = [(str(entry["token"]), float(entry["logprob"])) for entry in listed]
        except (KeyError, IndexError, TypeError, ValueError):
            raise LogprobsUnavailable(f"{self.url}: {self.model} answers without log-probabilities") from None
        return {c: max((p for token, p in found if token.strip() == c), default=-math.inf) for c in choices}

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of a chat completion. Raises JudgeError when all attempts are spent."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(LONGEST_PAUSE, self._retry.backoff_factor * 2**attempt))
            text = self._post(self.parameters | body)
            try:
                choice = json.loads(text)["choices"][0]
                choice["message"].get("content")
                return choice
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                continue
        raise JudgeError(
            f"{self.url}: answers, {self.retries + 1} times, with what is no chat completion: {_quoted(text)}; "
            "benchmark.judge.base_url must be what precedes /chat/completions"
        )

    def _post(self, body: dict[str, Any]) -> bytes:
        try:
            response = self._pool.request("POST", self.url, json=body, headers=self._headers, retries=self._retry)
        except urllib3.exceptions.HTTPError as error:
            raise JudgeError(
                f"{self.url}: no answer after {self.retries + 1} attempts: {error}; is the endpoint up? "
                "benchmark.judge has base_url, timeout_seconds and retries"
            ) from None
        if response.status == 200:
            return response.data
        said = f"{self.url}: status {response.status}: {_quoted(response.data)}"
        if response.status in REFUSED:
            raise RequestRefused(said)
        raise JudgeError(f"{said}; benchmark.judge has base_url, model, api_key_env, concurrency and retries")


def _quoted(data: bytes) -> str:
    text = " ".join(data[: 4 * QUOTED].decode("utf-8", "replace").split())
    return repr(text[:QUOTED] + ("…" if len(text) > QUOTED else ""))


class LocalJudge:
    """A causal language model of Hugging Face in this process, greedy, one request at a time, with its own template."""

    kind = "hf"
    concurrency = 1

    def __init__(self, source: str, device: torch.device | str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        found = resolve(source)
        self.model = source
        self.hash = content_hash(self.kind, found.fingerprint, str(dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(found.path, local_files_only=True)
        loaded = AutoModelForCausalLM.from_pretrained(found.path, dtype=dtype, local_files_only=True)
        self._model: Any = loaded.eval()
        self._model.to(device)
        self._limit = getattr(loaded.config, "max_position_embeddings", None) or math.inf

    @torch.no_grad()
    def complete(self, messages: Sequence[Message], max_tokens: int) -> str:
        prompt = self._prompt(messages, max_tokens)
        ids = torch.tensor([prompt], device=self._model.device)
        reply = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        return str(self.tokenizer.decode(reply[0, len(prompt) :], skip_special_tokens=True))

    @torch.no_grad()
    def choice_logprobs(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        tails = {c: self.tokenizer(c, add_special_tokens=False)["input_ids"] for c in choices}
        prompt = self._prompt(messages, max(map(len, tails.values())))
        after: dict[tuple[int, ...], torch.Tensor] = {}
        found = {}
        for choice, tail in tails.items():
            read = tuple(tail[:-1])  # nothing for one-token choices, which then share one pass
            if read not in after:
                ids = torch.tensor([[*prompt, *read]], device=self._model.device)
                logits = self._model(ids, logits_to_keep=len(tail)).logits[0]  # (tail, V)
                after[read] = logits.float().log_softmax(-1)
            found[choice] = float(after[read][range(len(tail)), tail].double().sum())
        return found

    def _prompt(self, messages: Sequence[Message], new_tokens: int) -> list[int]:
        text = chat.render(self.tokenizer, messages, generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) + new_tokens > self._limit:
            raise RequestRefused(
                f"{self.model}: a question of {len(ids)} tokens and {new_tokens} for the answer exceed the judge's "
                f"context of {self._limit}; lower benchmark.judge.answer_tokens or judgment_tokens"
            )
        return ids


class FakeJudge:
    """Answers in whatever form is asked for, by a hash of the request: the same always, and without meaning."""

    kind = model = "fake"
    concurrency = 1

    def __init__(self) -> None:
        self.hash = content_hash(self.kind)

    def complete(self, messages: Sequence[Message], max_tokens: int) -> str:
        number = int(content_hash(list(messages))[:8], 16)
        asked = " ".join(m["content"] for m in messages)
        if "[[A]]" in asked:
            return f"[[{'ABC'[number % 3]}]]"
        return f"Rating: [[{1 + number % 10}]]" if "[[rating]]" in asked else "mM"[number % 2]

    def choice_logprobs(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        weights = [1 + int(content_hash(list(messages), choice)[:8], 16) for choice in choices]
        return {c: math.log(w / sum(weights)) for c, w in zip(choices, weights, strict=True)}
