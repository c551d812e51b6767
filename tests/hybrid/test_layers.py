import pytest

from hybrid import attention_layers


@pytest.mark.parametrize(
    ("policy", "layers", "kept"),
    [
        ("1", 4, (0, 1, 2, 3)),
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


def test_unknown_ratio_is_refused_by_name():
    with pytest.raises(ValueError, match="'1/3'.*1/2"):
        attention_layers("1/3", 30)
