"""`StageRef`: the one noun that travels between stages and through Metaflow artifacts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StageRef:
    """Where a finished stage lies and what it is.

    stage:   stage name, e.g. ``"align"``.
    key:     sha256 of everything the stage's result depends on (hex).
    digest:  sha256 over the paths and hashes of its files (hex): what was really written.
    url:     store root the files lie under; folder or ``s3://``.
    """

    stage: str
    key: str
    digest: str
    url: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> StageRef:
        return cls(**value)
