import datetime

import numpy as np
import pyarrow as pa
import pytest

from msae.base.errors import ConfigError
from msae.use.filters import Filter

TABLE = pa.table(
    {
        "id": ["a", "b", "c", "d", "e"],
        "split": ["test", "train", None, "test", "it's"],
        "size": [1, 2, 3, None, -5],
        "score": [0.5, 1.5, 2.5, 3.5, None],
        "hat": [True, False, None, True, False],
        "day": [datetime.date(2020, 1, d) for d in (1, 2, 3, 4, 5)],
        "ein Wort": ["x", "y", "x", "y", "x"],
        "größe": pa.array(["k", "g", "k", "g", "k"]).dictionary_encode(),
    }
)


def kept(text):
    return "".join(np.array(TABLE["id"])[Filter.parse(text).mask(TABLE)])


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("split == 'test'", "ad"),
        ("split != 'test'", "be"),
        ('split == "it\'s"', "e"),
        ("size < 2", "ae"),
        ("size <= 2", "abe"),
        ("2 < size", "c"),
        ("size >= -5 and size < 0", "e"),
        ("1 <= size <= 2", "ab"),
        ("size == 2.0", "b"),
        ("size < 1.5", "ae"),
        ("score > size", ""),
        ("score < size", "abc"),
        ("split in ('test', 'train')", "abd"),
        ("split not in ['test']", "be"),
        ("size in {1, 3}", "ac"),
        ("size in ()", ""),
        ("split is null", "c"),
        ("split is None", "c"),
        ("size is not null", "abce"),
        ("hat", "ad"),
        ("not hat", "be"),
        ("hat == False", "be"),
        ("split == 'test' or size == 3", "acd"),
        ("not (split == 'test' or size == 3)", "be"),
        ("split == 'test' and size is null", "d"),
        ("day >= '2020-01-04'", "de"),
        ("column('ein Wort') == 'x'", "ace"),
        ("größe == 'g'", "bd"),
        ("  id > 'c'  ", "de"),
    ],
)
def test_a_filter_keeps_the_rows_it_says(text, ids):
    assert kept(text) == ids


@pytest.mark.parametrize("text", ["split == 'test'", "size in (1, 2)", "score > 1", "hat", "size <= 2 and hat"])
def test_a_filter_and_its_negation_part_the_rows_with_values(text):
    both = kept(text) + kept(f"not ({text})")
    nulls = set(kept(" or ".join(f"{name} is null" for name in Filter.parse(text).columns)))
    assert len(set(both)) == len(both) and set("abcde") - set(both) <= nulls


def test_double_negation_changes_nothing():
    for text in ("size < 2", "split in ('test',)", "hat"):
        assert kept(f"not not ({text})") == kept(text)


def test_a_filter_names_its_columns():
    assert Filter.parse("a == 1 and (b in (1,) or not c) and column('d e') is null").columns == ("a", "b", "c", "d e")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split = 'test'", "= is written =="),
        ("", "cannot be read at its end"),
        ("split ==", "cannot be read"),
        ("split == 'test", "cannot be read"),
        ("__import__('os').system('x')", 'at character 1, before "__import__'),
        ("split == open('x')", "at character 10, before \"open('x')\""),
        ("größe == größe.x", "at character 10, before 'größe.x'"),
        ("split == f'{x}'", "at character 10"),
        ("(lambda: 1)()", "wanted a comparison"),
        ("[x for x in y]", "wanted a comparison"),
        ("size + 1 == 2", "at character 1"),
        ("size == 1j", "at character 9"),
        ("size == b'x'", "at character 9"),
        ("1 == 1", "no column is compared"),
        ("'a' in split", "wanted a column before in"),
        ("size in split", "wanted a list of values after in"),
        ("size in (1, None)", "wanted a list of values after in"),
        ("size is 3", "is compares with null alone"),
        ("size == None", "wanted a column, a number"),
        ("column(split) == 1", "at character 1"),
        ("x := 3", "cannot be read"),
        ("split == 'a'\x00", "cannot be read"),
        ("(" * 400 + "hat" + ")" * 400, "cannot be read"),
        ("a " * 10_000, "19,999 characters"),
    ],
)
def test_anything_else_is_refused_with_its_place(text, message):
    with pytest.raises(ConfigError) as caught:
        Filter.parse(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("splitt == 'test'", "no column 'splitt' to filter by; did you mean 'split'"),
        ("zzz == 1", "there are id, split"),
        ("split == 3", "at character 10, before '3': column 'split' holds string"),
        ("size == 'x'", "column 'size' holds int64"),
        ("size in (1, 'x')", "column 'size' holds int64"),
        ("day > 'tomorrow'", "column 'day' holds date32"),
        ("size == 99999999999999999999999", "column 'size' holds int64"),
        ("split", "at character 1, before 'split': this column holds string"),
        ("hat and size", "at character 9, before 'size': this column holds int64"),
    ],
)
def test_a_filter_that_does_not_fit_the_table_is_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        Filter.parse(text).mask(TABLE)
    assert message in str(caught.value) and "\n" not in str(caught.value)
