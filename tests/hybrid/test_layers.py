import pytest

from hybrid import attention_layers


@pytest.mark.parametrize(
    ("policy", "layers", "kept"),
    [
        ("1", 4, (0, 1, 2, 3)),
        ("3/4", 9, (1, 2, 3, 5, 6, 7)),
        ("1/2", 32, tuple(range(1, 32, 2))),
        ("1/2", 30, tuple(range(1, 30, 2))),
        ("1/4", 32, (3, 7, 11, 15, 19, 23, 27, 31)),
        ("1/4", 30, (3, 7, 11, 15, 19, 23, 27)),
        ("1/8", 32, (7, 15, 23, 31)),
        ("1/8", 30, (7, 15, 23)),
        ("0", 30, ()),
        ([5, 2, 2], 8, (2, 5)),
        ((), 8, ()),
    ],
)
def test_layers_kept(policy, layers, kept):
    assert attention_layers(policy, layers) == kept


@pytest.mark.parametrize("layers", [2, 8, 28, 30, 32])
def test_each_ratio_keeps_a_part_of_what_the_next_keeps(layers):
    kept = [set(attention_layers(ratio, layers)) for ratio in ("1", "3/4", "1/2", "1/4", "1/8", "0")]
    assert all(less <= more for more, less in zip(kept, kept[1:], strict=False))


def test_unknown_ratio_is_refused_by_name():
    with pytest.raises(ValueError, match="'1/3'.*1/2"):
        attention_layers("1/3", 30)


def test_a_ranking_of_other_layers_is_refused():
    assert attention_layers("1/2", 4, [3, 0, 1, 2]) == (0, 3)
    with pytest.raises(ValueError, match=r"ranking \[3, 0, 1\]: expected each of the layers 0 to 3 once"):
        attention_layers("1/2", 4, [3, 0, 1])
