import re

import pytest
from store_helpers import compute, damage, payload

from stage_store import Store, stage_key
from stage_store.__main__ import main


@pytest.fixture
def url(tmp_path) -> str:
    """A folder: what the commands do is tested on S3 too, in test_maintenance."""
    return str(tmp_path / "store")


@pytest.fixture
def run(url, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["--store", url, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_ls_is_a_table(store, run):
    assert run("ls") == (0, f"no stages in {store.url}\n", "")
    ref, _ = compute(store)
    code, out, _ = run("ls")
    header, row = out.splitlines()
    assert code == 0
    assert header.split() == ["stage", "key", "age", "size", "state"]
    assert re.fullmatch(rf"align +{ref.key[:12]} +\d+ s +10\d\.\d KB  ok", row)


def test_store_in_s3_is_listed_alike(s3_url, capsys):
    ref, _ = compute(Store(s3_url))
    assert main(["--store", s3_url, "ls"]) == 0
    assert re.search(rf"align +{ref.key[:12]} .* ok\n", capsys.readouterr().out)


def test_explain_key_names_the_leaf_against_the_nearest_key(store, run):
    compute(store, payload(steps=1, version=7))
    old, _ = compute(store, payload(steps=40, code={"steps.loop": "a"}))
    new, _ = compute(store, payload(steps=60, code={"steps.loop": "b"}))
    code, out, _ = run("explain", new.key[:10])
    assert code == 0
    assert out.splitlines() == [
        f"align {new.key[:12]}  ok",
        f"  nearest finished key: {old.key[:12]}",
        "  align.steps: 40 -> 60",
        "  code changed: steps.loop",
    ]


def test_explain_follows_upstream_and_works_for_a_stage_that_failed(store, run):
    keys = []
    for steps in (40, 60):
        align, _ = compute(store, payload(steps=steps))
        keys.append(payload(stage="sft", upstream={"student": align.key}))
    compute(store, keys[0])
    with pytest.raises(ZeroDivisionError):
        compute(store, keys[1], work=lambda out, _: 1 / 0)
    _, out, _ = run("explain", stage_key(keys[1]))
    assert "unfinished" in out
    assert out.splitlines()[-1] == "  align.steps: 40 -> 60"


def test_explain_run_goes_through_what_it_reaches(store, run):
    first, _ = compute(store, payload(steps=40))
    second, _ = compute(store, payload(steps=60))
    teacher, _ = compute(store, payload(stage="teacher"))
    store.pin("DistillFlow/7", [teacher, second])
    store.quarantine("teacher", teacher.key, "test")
    code, out, _ = run("explain", "DistillFlow/7")
    assert code == 0
    assert out.splitlines() == [
        f"teacher {teacher.key[:12]}  corrupt",
        "  no other finished key of this stage to compare with",
        f"align {second.key[:12]}  ok",
        f"  nearest finished key: {first.key[:12]}",
        "  align.steps: 40 -> 60",
    ]


def test_verify_ends_with_1_if_something_is_corrupt(store, run):
    ref, _ = compute(store)
    assert run("verify") == (0, f"align {ref.key[:12]}  ok\n1 checked, 0 corrupt\n", "")
    damage(store, f"{store.manifest(ref).prefix}/model.safetensors", b"x" * 100_000)
    code, out, _ = run("verify")
    assert code == 1
    assert "corrupt: sha256 differs: model.safetensors" in out


def test_gc_tells_what_goes_and_dry_run_removes_nothing(store, run):
    kept, _ = compute(store)
    stray, _ = compute(store, payload(steps=1))
    store.pin("run/1", [kept])
    code, out, _ = run("gc", "--young-days", "-1", "--dry-run")
    assert code == 0
    assert re.match(rf"would remove align/{stray.key}  10\d\.\d KB  \(no run reaches it\)\n", out)
    assert store.lookup("align", stray.key) is not None
    _, out, _ = run("gc", "--young-days", "-1", "--keep-run", "run/1")
    assert out.splitlines()[-1].startswith("removed 1 items, 10")
    assert store.lookup("align", stray.key) is None
    assert run("gc", "--keep-run", "run/9")[0] == 2


def test_gc_without_pins_says_so(store, run):
    compute(store)
    assert run("gc", "--young-days", "-1")[1].splitlines()[0] == "no run is pinned: finished stages are kept"


def test_unknown_key_is_one_line_and_code_2(store, run):
    code, out, err = run("explain", "abcdef")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("stage_store: 'abcdef': no key or pinned run of that name")


def test_absent_store_is_refused_and_not_made(tmp_path, capsys):
    assert main(["--store", str(tmp_path / "none"), "ls"]) == 2
    assert capsys.readouterr().err == f"stage_store: {tmp_path / 'none'}: there is no store\n"
    assert not (tmp_path / "none").exists()


def test_store_comes_from_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAMBALLAMA_STORE", str(tmp_path / "store"))
    Store(tmp_path / "store")
    assert main(["ls"]) == 0
    assert "no stages" in capsys.readouterr().out
