"""Why a stage was not found: which leaf of which input differs from the nearest finished key of that stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Payload = Mapping[str, Any]
_HASH = re.compile(r"[0-9a-f]{40,64}")


def changes(old: Payload, new: Payload, payload_of: Callable[[str], Payload | None]) -> list[str]:
    """Lines such as `kl_distill.steps: 40 -> 60`, `code changed: steps.loop`, `data natural: 1a2b… -> 3c4d…`.

    An upstream key that differs is followed to the leaf that made it differ, if `payload_of` knows both keys.
    """
    stage = new.get("stage", "stage")
    lines: list[str] = []
    for part in sorted(old.keys() | new.keys(), key=_order):
        before, after = _leaves(old.get(part)), _leaves(new.get(part))
        for leaf in sorted(before.keys() | after.keys()):
            if leaf in before and leaf in after and before[leaf] == after[leaf]:
                continue
            if part == "code":
                lines.append(_code_line(leaf, before, after))
            elif part == "upstream":
                lines += _upstream_lines(leaf, before.get(leaf), after.get(leaf), payload_of)
            else:
                name = f"{stage}.{leaf}" if part == "config" else " ".join(filter(None, (stage, part, leaf)))
                lines.append(f"{name}: {_show(before, leaf)} -> {_show(after, leaf)}")
    return list(dict.fromkeys(lines))


def nearest(
    new: Payload, others: Mapping[str, Payload], payload_of: Callable[[str], Payload | None]
) -> tuple[str, list[str]] | None:
    """The key of `others` (newest first) that differs in the fewest leaves, and those leaves; None if there is none."""
    compared = [(key, changes(old, new, payload_of)) for key, old in others.items()]
    return min(compared, key=lambda pair: len(pair[1]), default=None)


def _order(part: str) -> tuple[int, str]:
    parts = ("config", "code", "data", "upstream")
    return (parts.index(part) if part in parts else len(parts), part)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path → value; lists are leaves, an absent value has none."""
    if value is None and not path:
        return {}
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for name, part in value.items():
        found.update(_leaves(part, f"{path}.{name}" if path else str(name)))
    return found


def _code_line(module: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    verb = "changed" if module in before and module in after else "added" if module in after else "removed"
    return f"code {verb}: {module}" if module else f"code {verb}"


def _upstream_lines(role: str, old: Any, new: Any, payload_of: Callable[[str], Payload | None]) -> list[str]:
    before, after = (payload_of(key) if isinstance(key, str) else None for key in (old, new))
    if before and after and (lines := changes(before, after, payload_of)):
        return lines
    return [f"upstream {role}: {_short(old)} -> {_short(new)}"]


def _show(leaves: Mapping[str, Any], leaf: str) -> str:
    return _short(leaves[leaf]) if leaf in leaves else "absent"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value[:12]}…" if isinstance(value, str) and _HASH.fullmatch(value) else str(value)
