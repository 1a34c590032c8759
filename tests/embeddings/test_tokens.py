"""Text to words, by white space or by a function of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.embeddings.tokens import tokenizer
from featherweight.errors import DataError


def test_white_space_of_any_kind_splits() -> None:
    assert tokenizer(None)("a\u00a0b\tc\n d") == ["a", "b", "c", "d"]
    assert tokenizer(None, lower=True)("The CAT") == ["the", "cat"]


def test_a_function_of_the_users_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_split.py").write_text(
        "def chars(text):\n    return list(text)\ndef wrong(text):\n    return text\n"
    )
    monkeypatch.chdir(tmp_path)
    assert tokenizer("my_split:chars")("학교") == ["학", "교"]
    with pytest.raises(DataError, match="must return a list of texts, but returned 'ab'"):
        tokenizer("my_split:wrong")("ab")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing", "written module:function"),
        ("no_such_module:f", "cannot be imported"),
        ("json:nothing", "cannot be imported"),
        ("json:__name__", "must be a function"),
    ],
)
def test_what_is_no_function_is_refused(name: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        tokenizer(name)
