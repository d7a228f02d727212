"""`KEY=VALUE` as text becomes a key and a Python value."""

import pytest

from dsmoe_jax.config.overrides import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-1", -1),
        ("1e-3", 1e-3),
        ("2.0", 2.0),
        ("None", None),
        ("True", True),
        ("false", False),
        ("(0.5,0.75)", (0.5, 0.75)),
        ("0.5,0.75", (0.5, 0.75)),
        ("()", ()),
        ("((0,1),(0.5,0))", ((0, 1), (0.5, 0))),
        ("('a','b')", ("a", "b")),
        ("topk_softmax", "topk_softmax"),
        ("some/path", "some/path"),
        ("two words", "two words"),
        ("a=b", "a=b"),
        ("'2026'", "2026"),
        ('"None"', "None"),
        ("", ""),
        ("nan", "nan"),
        ("{[]: 1}", "{[]: 1}"),
        ("(1,", "(1,"),
        ("(" * 10_000, "(" * 10_000),
    ],
)
def test_values(text, value):
    key, found = parse(f"model.moe.key={text}")
    assert key == "model.moe.key"
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["train.steps", "=5", ""])
def test_what_is_no_override_is_refused(text):
    with pytest.raises(ValueError, match=r"must be KEY=VALUE, such as train.steps=100") as error:
        parse(text)
    assert str(error.value).startswith(f"{text}: ")
