"""Words of messages."""

import pytest

from utils import words


@pytest.mark.parametrize(
    ("n", "noun", "expected"), [(0, "spot", "0 spots"), (1, "spot", "1 spot"), (2, "spot", "2 spots")]
)
def test_numbers_have_their_noun(n, noun, expected):
    assert words.count_of(n, noun) == expected
    assert words.count_of(2, "index", "indices") == "2 indices"


def test_a_long_text_ends_with_a_whole_word():
    text = "a first line\n of " + "words " * 60
    assert words.cut("two\n words") == "two words"
    assert len(words.cut(text)) <= 160 and words.cut(text).endswith("words ...")
    assert words.cut("x" * 300) == "x" * 160


def test_near_names_are_found_whatever_their_case():
    assert words.nearest("--epoch", ["--Epoch", "--data"]) == ["--Epoch"]
    assert words.nearest("testvit", ["test_vit", "test_vit2", "vgg"], most=2) == ["test_vit", "test_vit2"]
    assert words.nearest("zzz", ["--Epoch"]) == []
