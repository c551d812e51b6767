"""A stage's progress as a Metaflow card that fills while the stage runs."""

from __future__ import annotations

from typing import Any

from metaflow import current
from metaflow.cards import Markdown, ProgressBar, VegaChart

from steps.stage import Progress

MAX_POINTS = 500


class LiveCard:
    """Told of progress, shows it in the step's card "progress": a bar, the newest figures, and a curve for each figure.

    Filled at the first word of progress. A step without a card is left alone.
    """

    def __init__(self) -> None:
        self.bar: ProgressBar | None = None
        self.points: list[dict[str, float | str]] = []

    def __call__(self, progress: Progress) -> None:
        if not hasattr(current, "card"):
            return
        card = current.card["progress"]
        if self.bar is None:
            self.bar = ProgressBar(max=progress.total, label=progress.unit, unit=progress.unit)
            self.text, self.chart = Markdown(""), VegaChart(_curves(progress.unit, []))
            card.extend([self.bar, self.text, self.chart])
        self.points += [{"done": progress.done, "figure": k, "value": v} for k, v in progress.figures.items()]
        self.points = self.points[-MAX_POINTS:]
        self.bar.update(progress.done, metadata=f"{progress.rate:.3g} {progress.unit}/s")
        self.text.update(f"{progress}")
        self.chart.update(_curves(progress.unit, self.points))
        if progress.done < progress.total:  # the end of the task draws the card anyway, and would wait for this drawing
            card.refresh()


def leave_out_cards(step: Any) -> None:
    """Draw no card of this task: a reused stage has nothing to show, and an empty card costs two seconds."""

    class NoCards:
        def create(self, **_: Any) -> None:
            pass

    for decorator in step.decorators:
        if decorator.name == "card":
            decorator.card_creator = NoCards()


def _curves(unit: str, points: list[dict[str, float | str]]) -> dict[str, object]:
    """Vega-Lite: one panel a figure, over units done."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"values": points},
        "facet": {"row": {"field": "figure", "type": "nominal", "title": None}},
        "resolve": {"scale": {"y": "independent"}},
        "spec": {
            "width": 500,
            "height": 120,
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": {"field": "done", "type": "quantitative", "title": unit},
                "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            },
        },
    }
