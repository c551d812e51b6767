"""What a run will do, said before it does anything: reuse, run or off for every stage and variant, and why."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage_store import Checkpoints, Store, stage_key
from stage_store.explain import nearest
from stage_store.maintenance import Item, items
from steps.config import Config, store_url
from steps.pipeline import label, one_line, payload_of, previous_student, walk

FORCED = "forced"
SHOWN_CHANGES = 3


@dataclass(frozen=True)
class Planned:
    """One line of the plan; `state` is "reuse", "run" or "off", `why` says what made it so."""

    stage: str
    variant: str
    state: str
    key: str
    why: str


def make_plan(config: Config, root: Path, force: str = "") -> list[Planned]:
    """What a run will do for every stage and variant, in the order of the flow; runs nothing.

    force: stage to run anew, together with all that depend on it. Raises StageFailed, for example on a missing source.
    """
    with one_line("plan"):
        return _plan(config, root, force)


def _plan(config: Config, root: Path, force: str) -> list[Planned]:
    store = Store(store_url(config, root))
    history = _History(store)
    refs: dict[str, dict[str, dict[str, str]]] = {variant: {} for variant in ("", *config.variants)}
    forced: set[str] = set()
    lines = []
    for stage, variant, own in walk(config):
        if not stage.enabled(own):
            lines.append(Planned(stage.name, variant, "off", "", "switched off in the configuration"))
            continue
        known = {**refs[""], **refs[variant]}
        if variant:
            known |= previous_student(config, variant, refs[config.variants[variant].previous])
        payload = payload_of(stage, variant, own, known, root)
        key = stage_key(payload)
        refs[variant][stage.name] = {"key": key}
        history.planned[key] = payload
        if stage.name == force or forced & set(payload["upstream"].values()):
            forced.add(key)
            lines.append(Planned(stage.name, variant, "run", key, FORCED))
        elif store.lookup(stage.name, key):
            lines.append(Planned(stage.name, variant, "reuse", key, ""))
        else:
            lines.append(Planned(stage.name, variant, "run", key, history.why(stage.name, key)))
    return lines


class _History:
    """What the store holds, to say why a stage is not in it; read at the first question only."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.planned: dict[str, Mapping[str, Any]] = {}

    @functools.cached_property
    def items(self) -> dict[str, Item]:
        return {item.key: item for item in items(self.store)}

    def payload(self, key: str) -> Mapping[str, Any] | None:
        if key not in self.planned and key in self.items:
            self.planned[key] = self.store.payload(self.items[key].stage, key) or {}
        return self.planned.get(key)

    def why(self, stage: str, key: str) -> str:
        if key in self.items and self.items[key].state == "checkpoint":
            return "continues from its checkpoint"
        finished = [i.key for i in self.items.values() if i.stage == stage and i.state == "ok" and i.key != key]
        others = {other: payload for other in finished if (payload := self.payload(other))}
        best = nearest(self.planned[key], others, self.payload)
        if best is None:
            return "not stored yet"
        more = f" and {len(best[1]) - SHOWN_CHANGES} more" if len(best[1]) > SHOWN_CHANGES else ""
        return f"changed: {'; '.join(best[1][:SHOWN_CHANGES])}{more}"


def set_aside_forced(lines: list[Planned], config: Config, root: Path) -> None:
    """Take the stored results and checkpoints of what the plan calls forced out of use."""
    store = Store(store_url(config, root))
    for line in lines:
        if line.why == FORCED:
            store.quarantine(line.stage, line.key, "to be run anew on request")
            Checkpoints(store, line.stage, line.key).clear()


def plan_table(lines: list[Planned]) -> str:
    """The plan as aligned text: stage, what happens, key, why."""
    rows = [(label(p.stage, p.variant), p.state, p.key[:12], p.why) for p in lines]
    width = max(len(row[0]) for row in rows)
    to_run = sum(p.state == "run" for p in lines)
    return "\n".join(
        [
            f"plan: {to_run} of {sum(p.state != 'off' for p in lines)} stages to run",
            *(f"{name:<{width}}  {state:<5}  {key:<12}  {why}".rstrip() for name, state, key, why in rows),
        ]
    )
