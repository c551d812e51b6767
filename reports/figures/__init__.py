"""The report's charts, drawn from the JSON twin: one module a section. What has nothing to draw is None or empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reports.figures import comparison, efficiency, fidelity, judge, long_context, speculation, training
from reports.figures.models import models
from reports.figures.training import LOSS_UNITS, STAGE_LABELS
from reports.svg import key_shapes, shade_scale

__all__ = ["LOSS_UNITS", "STAGE_LABELS", "draw"]


def draw(twin: Mapping[str, Any]) -> dict[str, Any]:
    """Every chart of the page by name, lists where a section has several, and what the tables beside them need."""
    return {
        "models": models(twin),
        "key_shapes": key_shapes(),
        "strips": comparison.strips(twin),
        "forests": comparison.forests(twin),
        "fidelity_layers": fidelity.by_layer(twin),
        "fidelity_positions": fidelity.by_position(twin),
        "calibration": fidelity.calibration(twin),
        "length": long_context.by_position(twin),
        "last": long_context.last_tokens(twin),
        "needles": long_context.needles(twin),
        "shades": shade_scale(),
        "frontier": efficiency.frontier(twin),
        "costs": efficiency.frontier_table(twin),
        "throughput": efficiency.throughput(twin),
        "against": efficiency.against(twin),
        "state": efficiency.state(twin),
        "speculation": speculation.sweep(twin),
        "pairwise": judge.pairwise(twin),
        "categories": judge.categories(twin),
        "mt_bench": judge.by_category(twin),
        "quality": training.quality(twin),
        "layer_scores": training.layer_scores(twin),
        "layers": training.layer_errors(twin),
        "curves": training.curves(twin),
    }
