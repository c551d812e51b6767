"""A language model as judge of answers: MT-Bench, student against teacher, AlpacaEval."""

from evals.judge.run import measure

__all__ = ["measure"]
