from pathlib import Path

import pytest

from steps import config
from steps.config import ConfigError, InitStageConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

BASE = """
[teacher]
source = "file:teacher"
[corpus]
sources = ["file:conversations.jsonl"]
[variants.half]
"""


def parse(extra=""):
    return config.parse_text(BASE + extra, "a.toml")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("[dpo]\nbta = 1", "a.toml: dpo.bta: unknown key (given 1); did you mean 'beta'?"),
        ("[dpoo]\nbeta = 1", "a.toml: dpoo: unknown key"),
        ('[dpo]\nbeta = "x"', "a.toml: dpo.beta: given 'x'; input should be a valid number"),
        ("[dpo]\nbeta = 11", "a.toml: dpo.beta: given 11; input should be less than or equal to 10"),
        ("[dpo]\nbeta = nan", "a.toml: dpo.beta: given nan; input should be a finite number"),
        ("[align]\nrest_lr = 0.1", "a.toml: align.rest_lr: given 0.1; input should be less than or equal to 0"),
        (
            "[align]\nbatch_size = 3\naccumulation = 2",
            "a.toml: align: batch_size 3 is not a multiple of accumulation 2",
        ),
        (
            "[corpus.self_chat]\nfoo = 1",
            "a.toml: corpus.self_chat.foo: unknown key (given 1). Allowed here: batch_size,",
        ),
        (
            '[variants.other]\nattention = "1/3"',
            "a.toml: variants.other.attention: given '1/3'; input should be one of 1,",
        ),
        ("[variants.other]\nattenton = 1", "did you mean 'attention'?"),
        ("[variants.teacher]", "'teacher': a variant's name is letters, digits, - and _"),
        ('[variants."a/b"]', "'a/b': a variant's name is"),
        ('[variants.b]\nfrom = "haf"', "a.toml: variants: b.from: given 'haf'; expected one of half, b"),
        ('[variants.b]\nfrom = "b"', "b.from: goes in a circle: b from b"),
        ('[variants.b]\nfrom = "c"\n[variants.c]\nfrom = "b"', "b.from: goes in a circle: b from c from b"),
        (
            '[variants.b]\nattention = "3/4"\nfrom = "half"',
            "b.attention: 3/4 keeps attention that 'half' with 1/2, from which it continues, has not",
        ),
        (
            '[variants.b]\nattention = [1, 2]\n[variants.c]\nattention = [2, 3]\nfrom = "b"',
            "c.attention: [2, 3] keeps attention that 'b' with [1, 2]",
        ),
        ('[variants.b]\nprevious = "half"', "Allowed here: attention, checkpoint, from, from_stage, set"),
        ('[variants.b]\nfrom = "half"\nfrom_stage = "draft"', "variants.b.from_stage: given 'draft'"),
        ('[kl_distill]\nfrozen = ["mlps"]', "a.toml: kl_distill.frozen.0: given 'mlps'; input should be 'attention',"),
        ("[kl_distill]\nkl_weight = 0", "kl_distill.kl_weight: given 0; input should be greater than 0"),
        ('[variants.b]\nset = { "dpo.bta" = 1 }', "variants.b.set: dpo.bta: unknown key"),
        ('[variants.b]\nset = { "corpus.max_tokens" = 1 }', "variants.b.set: corpus.max_tokens: is shared by all"),
        ('[benchmark]\ntasks = ["arc"]', "a.toml: benchmark.tasks.0: given 'arc'; input should be 'mmlu_dev'"),
        (
            "[corpus.free_text]\ndocuments = 4\nheld_out_documents = 4",
            "a.toml: corpus.free_text: held_out_documents 4 must be fewer than documents 4",
        ),
        ('[kl_distill]\nteacher = "large"', "a.toml: kl_distill.teacher: given 'large'; string should match pattern"),
        (
            '[kl_distill]\nteacher_cache = "top_k"',
            "a.toml: kl_distill: teacher_cache: given 'top_k'; expected none, top_k:64 or samples:64",
        ),
        (
            '[kl_distill]\nteacher_cache = "samples:8"\nloss = "jsd"',
            "teacher_cache 'samples:8' keeps what the forward divergence needs, loss is 'jsd': set loss to 'forward'",
        ),
        (
            '[draft]\nkind = "eagle"',
            "a.toml: draft.kind: given 'eagle'; expected ngram, layers:[0, 29], features:[29] or checkpoint:",
        ),
        ('[draft]\nkind = "layers:[]"', "given 'layers:[]'; expected at least one layer number"),
        ('[draft]\nkind = "layers:[0, 0]"', "each larger than the one before"),
        ('[draft]\nkind = "layers:[2, 1]"', "each larger than the one before"),
        (
            '[draft]\nkind = "layers:[-1]"',
            "given 'layers:[-1]'; expected ngram, layers:[0, 29], features:[29] or checkpoint:SOURCE",
        ),
        ('[draft]\nkind = "checkpoint:gone"', "given 'checkpoint:gone'; expected ngram"),
        (
            '[draft]\nkind = "checkpoint:file:x"\nvocabulary = 8192',
            "vocabulary is 8192, but kind 'checkpoint:file:x' learns from no answers whose tokens could be counted",
        ),
        ("[draft]\nvocabulary = -1", "draft.vocabulary: given -1; input should be greater than or equal to 0"),
        ("[speculative_profile]\nbatches = [1, 1]", "speculative_profile.batches: given [1, 1]; expected each batch"),
        ("[speculative_profile]\nbatches = []", "speculative_profile.batches: given []; list should have at least 1"),
        ("[speculative_profile]\nngram = 2", "speculative_profile.ngram: unknown key"),
        ("[dpo", "a.toml: not valid TOML"),
    ],
)
def test_a_fault_names_key_value_and_what_is_allowed_in_one_line(extra, said):
    with pytest.raises(ConfigError) as caught:
        parse(extra)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_fault_is_reported():
    with pytest.raises(ConfigError) as caught:
        parse("[dpo]\nbeta = 11\nsteps = -1")
    assert str(caught.value).count("\n") == 1


def test_missing_section_and_missing_data():
    with pytest.raises(ConfigError, match="teacher: missing"):
        config.parse_text('[corpus]\nsources = ["file:x"]\n[variants.a]', "a.toml")
    with pytest.raises(ConfigError, match="corpus.sources is empty and corpus.self_chat.conversations is 0"):
        config.parse_text('[teacher]\nsource = "file:t"\n[corpus]\n[variants.a]', "a.toml")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("dpo.beta=0.05", 0.05),
        ("dpo.reference=policy", "policy"),
        ('dpo.reference="policy"', "policy"),
        ("variants.half.attention=1/4", "1/4"),
        ("variants.half.attention=[1, 3]", [1, 3]),
        ("variants.fresh.attention=0", "0"),
    ],
)
def test_an_override_sets_one_leaf(override, value):
    changed = config.override(parse(), [override]).model_dump(mode="json")
    for part in override.partition("=")[0].split("."):
        changed = changed[part]
    assert changed == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dpo.bta=1", "--set: dpo.bta: unknown key (given 1); did you mean 'beta'?"),
        ("dpo=1", "--set: dpo: given 1; expected a section"),
        ("dpo.beta.x=1", "dpo.beta.x: 'beta' is a value, not a section"),
        ("dpo.beta", "--set 'dpo.beta': expected leaf=value, for example dpo.beta=0.05"),
        ("kl_distill.steps=1.5", "--set: kl_distill.steps: given 1.5; input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override, said):
    with pytest.raises(ConfigError) as caught:
        config.override(parse(), [override])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read: No such file"):
        config.load(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b'title = "\xe9"')
    with pytest.raises(ConfigError, match="latin.toml: not a UTF-8 text"):
        config.load(tmp_path / "latin.toml")


def test_what_metaflow_passes_on_parses_to_the_same():
    first = parse('[variants.b]\nset = { "dpo.beta" = 0.2 }')
    assert config.parse_text(first.model_dump_json()) == first


def test_a_variant_sets_its_own_leaves_only():
    both = parse('[variants.b]\nset = { "dpo.beta" = 0.2, "seed" = 3 }')
    assert both.for_variant("half") == both
    assert (both.for_variant("b").dpo.beta, both.for_variant("b").seed) == (0.2, 3)
    assert (both.dpo.beta, both.seed) == (0.1, 0)


def test_variants_that_continue_from_one_another():
    four = parse(
        '[variants.none]\nattention = 0\nfrom = "quarter"\n'
        '[variants.quarter]\nattention = "1/4"\nfrom = "half"\nfrom_stage = "sft"\n'
        '[variants.some]\nattention = [3]\nfrom = "half"'
    )
    assert four.chain("none") == ["half", "quarter", "none"]
    assert four.chain("half") == ["half"]
    assert config.parse_text(four.model_dump_json()) == four
    assert four.model_dump(mode="json")["variants"]["quarter"] == {
        "attention": "1/4",
        "from": "half",
        "from_stage": "sft",
        "checkpoint": "",
        "set": {},
    }
    assert config.override(four, ["variants.some.from=quarter"]).chain("some") == ["half", "quarter", "some"]


@pytest.mark.parametrize(
    ("kind", "layers", "source", "runs"),
    [
        ("ngram", (), "", False),
        ("layers:[0, 14,29]", (0, 14, 29), "", True),
        ("checkpoint:file:a folder", (), "file:a folder", True),
    ],
)
def test_kinds_of_draft(kind, layers, source, runs):
    draft = parse(f'[draft]\nkind = "{kind}"').draft
    assert (draft.layers, draft.source, draft.runs) == (layers, source, runs)
    assert not draft.model_copy(update={"enabled": False}).runs
    assert draft.model_copy(update={"steps": 0}).runs == bool(source)


def test_init_stage_config_carries_what_the_variant_says_of_its_student():
    assert InitStageConfig(attention=[1, 3]).model_dump().keys() == config.InitConfig().model_dump().keys() | {
        "attention",
        "checkpoint",
    }


def test_store_url_prefers_the_environment_and_counts_from_the_root(tmp_path, monkeypatch):
    monkeypatch.delenv("MAMBALLAMA_STORE", raising=False)
    assert config.store_url(parse(), tmp_path) == str(tmp_path / ".mamballama" / "store")
    assert config.store_url(parse('[store]\nurl = "s3://b/p"'), tmp_path) == "s3://b/p"
    monkeypatch.setenv("MAMBALLAMA_STORE", "elsewhere")
    assert config.store_url(parse(), tmp_path) == str(tmp_path / "elsewhere")


def test_the_ratios_find_the_stages_of_the_gpu_recipe():
    """Half of the attention is one student in both files, up to the end of its distillation."""
    files = [CONFIGS / f"smollm2_{name}.toml" for name in ("gpu", "ratios")]
    recipes = [config.load(file).for_variant("half") for file in files]
    for section in (
        "seed",
        "compute",
        "teacher",
        "corpus",
        "layer_scores",
        "init_from_attention",
        "align",
        "kl_distill",
    ):
        ours, theirs = (getattr(recipe, section) for recipe in recipes)
        assert ours == theirs, section
