"""lm-eval's checkers of IFEval (2311.07911) without what they download, and with the same verdict every time.

Three things are put in place of lm-eval's own. NLTK's sentence model is fetched from the network at import: sentences
are counted by the regular expression that lm-eval's module has beside it (52 of 541 prompts ask for a number of
sentences), and words in capitals are counted without splitting sentences first, which decides about full stops alone.
Languages are detected by a sampler: it gets a seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache, partial
from io import StringIO
from types import SimpleNamespace
from typing import Any

from evals.head import EvaluationError

MODULE = "lm_eval.tasks.ifeval"


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """prompt_level_*: are all instructions followed? inst_level_*: which ones, one bool each. loose: also tries the
    reply without mark-up, first and last line."""
    return dict(_checkers()(doc, results))


@cache
def _checkers() -> Callable[..., Mapping[str, Any]]:
    try:
        import langdetect
        import nltk

        util = _without_download(nltk)
    except ImportError as error:
        raise EvaluationError(
            f"ifeval: {error}; `pip install 'lm-eval[ifeval]'`, or drop ifeval from benchmark.tasks"
        ) from None
    langdetect.DetectorFactory.seed = 0
    util.count_sentences = lambda text: len(util.split_into_sentences(text))
    util.nltk = SimpleNamespace(
        tokenize=nltk.tokenize, word_tokenize=partial(nltk.tokenize.word_tokenize, preserve_line=True)
    )
    checkers: Callable[..., Mapping[str, Any]] = importlib.import_module(f"{MODULE}.utils").process_results
    return checkers


def _without_download(nltk: Any) -> Any:
    """lm-eval's module of helpers, which asks for NLTK's data when it is first imported and says so on stdout."""
    download = nltk.download
    nltk.download = lambda *_, **__: True
    try:
        with redirect_stdout(StringIO()):
            return importlib.import_module(f"{MODULE}.instructions_util")
    finally:
        nltk.download = download
