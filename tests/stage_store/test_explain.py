import pytest
from store_helpers import payload

from stage_store import stage_key
from stage_store.explain import changes, nearest


def nothing_known(key: str) -> None:
    return None


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {}, []),
        ({}, {"steps": 60}, ["align.steps: 40 -> 60"]),
        ({"config": {"lr": {"mixer": 1e-3}}}, {"config": {"lr": {"mixer": 2e-3}}}, ["align.lr.mixer: 0.001 -> 0.002"]),
        (
            {"config": {"betas": [0.9, 0.95]}},
            {"config": {"betas": [0.9, 0.99]}},
            ["align.betas: [0.9, 0.95] -> [0.9, 0.99]"],
        ),
        ({"config": {}}, {"config": {"gate": None}}, ["align.gate: absent -> none"]),
        ({"code": {"steps.loop": "a"}}, {"code": {"steps.loop": "b"}}, ["code changed: steps.loop"]),
        ({"code": {"a": "1", "b": "1"}}, {"code": {"b": "1", "c": "1"}}, ["code removed: a", "code added: c"]),
        ({"code": "a"}, {"code": "b"}, ["code changed"]),
        ({"version": 1}, {"version": 2}, ["align version: 1 -> 2"]),
        ({}, {"hardware": {"device": "H200"}}, ["align hardware device: absent -> H200"]),
        ({"data": {"x": "a" * 64}}, {"data": {"x": "b" * 64}}, ["align data x: aaaaaaaaaaaa… -> bbbbbbbbbbbb…"]),
        ({"upstream": {"r": "a" * 64}}, {"upstream": {"r": "b" * 64}}, ["upstream r: aaaaaaaaaaaa… -> bbbbbbbbbbbb…"]),
    ],
    ids=[
        "same",
        "leaf",
        "nested",
        "list",
        "new leaf",
        "module",
        "modules",
        "whole",
        "version",
        "hardware",
        "data",
        "role",
    ],
)
def test_changes_name_the_leaf(old, new, expected):
    assert changes(payload(**old), payload(**new), nothing_known) == expected


def test_upstream_is_followed_to_the_leaf_and_each_leaf_is_told_once():
    known = {}

    def keyed(**more):
        made = payload(**more)
        known[stage_key(made)] = made
        return stage_key(made)

    def chain(steps):
        align = keyed(stage="align", steps=steps)
        distill = keyed(stage="kl_distill", upstream={"student": align})
        return payload(stage="sft", upstream={"student": distill, "aligned": align})

    assert changes(chain(40), chain(60), known.get) == ["align.steps: 40 -> 60"]


def test_nearest_has_the_fewest_changes():
    others = {"far": payload(steps=1, version=2), "near": payload(steps=2)}
    assert nearest(payload(steps=3), others, nothing_known) == ("near", ["align.steps: 2 -> 3"])
    assert nearest(payload(), {}, nothing_known) is None
