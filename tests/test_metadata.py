"""Metadata of other people's files: each value of the kind asked for, or one line with the file and the key."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.model.metadata import Metadata, read_json

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def said(what) -> str:
    with pytest.raises(BadInput) as caught:
        what()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return str(caught.value)


def test_values_of_the_kind_asked_for():
    table = Metadata(
        {"n": 3, "x": 2, "t": "a", "f": False, "d": {"y": 0.5}, "l": [1, 2.5], "i": [0, 7], "s": ["a"], "no": None},
        "c.json",
    )
    assert (table.whole("n"), table.number("x"), table.text("t"), table.flag("f")) == (3, 2.0, "a", False)
    assert table.table("d").number("y") == 0.5 and list(table.table("no")) == []
    assert list(table.numbers("l")) == [1, 2.5] and list(table.wholes("i")) == [0, 7] and table.texts("s") == ["a"]
    assert table.whole("no", 5) == table.whole("other", 5) == 5 and table.number("no", None) is None
    assert "n" in table and "no" not in table and "other" not in table


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (None, "whole", "c.json lacks a.n"),
        ("2", "whole", "c.json: a.n must be a whole number from 1 to 2147483647, not '2'"),
        (True, "whole", "a whole number from 1 to 2147483647, not True"),
        (0, "whole", "from 1 to 2147483647, not 0"),
        (2.0, "whole", "not 2.0"),
        (2**31, "whole", "not 2147483648"),
        ([2], "whole", "not [2]"),
        (math.nan, "number", "a.n must be a finite number, not nan"),
        (math.inf, "number", "not inf"),
        (10**400, "number", "must be a finite number, not 1000"),
        (False, "number", "not False"),
        ("1e3", "number", "not '1e3'"),
        (1, "text", "must be a text, not 1"),
        (1, "flag", "must be true or false, not 1"),
        ([], "table", "must be a table of keys and values, not []"),
        ("abc", "numbers", "must be a list of finite numbers, not 'abc'"),
        ([1, None], "numbers", "a.n[1] must be one of finite numbers, not None"),
        ([1, -1], "wholes", "a.n[1] must be one of whole numbers from 0 to 2147483647, not -1"),
        ({"a": 1}, "texts", "must be a list of texts, not {'a': 1}"),
        ("x" * 10**6, "whole", "not 'xxx"),
    ],
)
def test_values_of_another_kind_are_one_line(value, kind, words):
    table = Metadata({"a": {"n": value}}, "c.json").table("a")
    assert words in said(lambda: getattr(table, kind)("n"))


def test_bounds():
    table = Metadata({"x": 0.0, "l": [1.0, 2.0], "n": 9}, "c.json")
    assert "above 0, not 0.0" in said(lambda: table.number("x", above=0))
    assert "of at least 1, not 0.0" in said(lambda: table.number("x", least=1))
    assert "l has 2 finite numbers, not 3" in said(lambda: table.numbers("l", count=3))
    assert "from 1 to 8, not 9" in said(lambda: table.whole("n", most=8))


@given(ANYTHING)
def test_no_value_leads_to_another_error(value):
    """Of each kind a value is what was asked for, or one line."""
    kinds = {
        "whole": int,
        "number": float,
        "text": str,
        "flag": bool,
        "table": Metadata,
        "numbers": list,
        "texts": list,
    }
    for kind, type_ in kinds.items():
        try:
            found = getattr(Metadata({"k": value}, "c.json"), kind)("k")
        except BadInput as error:
            assert "\n" not in str(error) and "c.json" in str(error) and "k" in str(error)
        else:
            assert isinstance(found, type_) and (kind == "flag") is isinstance(found, bool)
            assert kind != "number" or math.isfinite(found)
            assert kind != "whole" or 1 <= found < 2**31


@pytest.mark.parametrize(
    "content", ["[1]", '"a"', "3", "null", "NaN", "[" * 100_000, "{", "", '{"a": 1' + "0" * 5000 + "}"]
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    assert "c.json" in said(lambda: Metadata.read(tmp_path / "c.json"))


def test_files(tmp_path):
    assert "lacks c.json" in said(lambda: Metadata.read(tmp_path / "c.json"))
    assert list(Metadata.read(tmp_path / "c.json", optional=True)) == []
    assert read_json(tmp_path / "c.json", missing=None) is None
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"é": "ł"}, ensure_ascii=False).encode())
    assert Metadata.read(tmp_path / "c.json").text("é") == "ł"
    (tmp_path / "c.json").write_bytes(b'{"a": "\xff"}')
    assert "cannot read" in said(lambda: Metadata.read(tmp_path / "c.json"))
