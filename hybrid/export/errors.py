"""What an export refuses."""

from __future__ import annotations

from collections.abc import Sequence


class CannotExport(ValueError):
    """The target has no place for something that the model has; the message says what, and what to set instead."""


def refuse(target: str, reasons: Sequence[str]) -> None:
    """Raises CannotExport if there are reasons."""
    if reasons:
        raise CannotExport(f"{target} cannot express this model: {'; '.join(reasons)}")
