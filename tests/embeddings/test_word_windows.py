"""The sliding window: what it gives, worked out by hand on paper."""

from __future__ import annotations

import pytest

from featherweight.embeddings import windows
from featherweight.errors import DataError

CAT = "The fat cat sat on the mat".split()  # noqa: SIM905  # reads as the sentence it is

# Window 3: each centre with the words up to three places to its left, then to its right.
CAT_CONTEXTS = {
    "The": "fat cat sat",
    "fat": "The cat sat on",
    "cat": "The fat sat on the",
    "sat": "The fat cat on the mat",
    "on": "fat cat sat the mat",
    "the": "cat sat on mat",
    "mat": "sat on the",
}


def test_every_word_takes_its_turn_as_the_centre() -> None:
    positions = windows.slide(7, 3)
    assert [p.at for p in positions] == [0, 1, 2, 3, 4, 5, 6]
    assert [p.context for p in positions] == [
        (1, 2, 3),
        (0, 2, 3, 4),
        (0, 1, 3, 4, 5),
        (0, 1, 2, 4, 5, 6),
        (1, 2, 3, 5, 6),
        (2, 3, 4, 6),
        (3, 4, 5),
    ]


def test_skip_gram_pairs_are_those_of_the_sentence() -> None:
    pairs = windows.skip_gram(CAT, windows.slide(7, 3))
    assert pairs == [(centre, word) for centre, words in CAT_CONTEXTS.items() for word in words.split()]
    assert len(pairs) == 3 + 4 + 5 + 6 + 5 + 4 + 3 == 30


def test_cbow_examples_are_those_of_the_sentence() -> None:
    examples = windows.cbow(CAT, windows.slide(7, 3))
    assert examples == [(tuple(words.split()), centre) for centre, words in CAT_CONTEXTS.items()]


def test_window_one_pairs_neighbours_both_ways() -> None:
    assert windows.skip_gram("a b c".split(), windows.slide(3, 1)) == [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]  # noqa: SIM905


def test_window_longer_than_the_sentence_pairs_all_with_all() -> None:
    pairs = windows.skip_gram("a b c".split(), windows.slide(3, 99))  # noqa: SIM905
    assert pairs == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]


def test_one_word_alone_teaches_nothing() -> None:
    found = windows.lesson(["alone"], 2, iter(()))
    assert (len(found.positions), found.pairs, found.examples) == (1, (), ())


def test_korean_words_slide_as_any_others() -> None:
    words = "나는 오늘 학교에 갔다".split()  # noqa: SIM905
    assert windows.cbow(words, windows.slide(4, 1)) == [
        (("오늘",), "나는"),
        (("나는", "학교에"), "오늘"),
        (("오늘", "갔다"), "학교에"),
        (("학교에",), "갔다"),
    ]


def test_dynamic_window_draws_every_reach_alike() -> None:
    assert [windows.dynamic_reach(3, d) for d in (0.0, 0.33, 0.34, 0.66, 0.67, 0.99)] == [1, 1, 2, 2, 3, 3]
    # A word 1 away is in every window, 2 away in those of 2 and 3, 3 away in those of 3 alone.
    assert windows.reach_chances(3) == pytest.approx([1, 2 / 3, 1 / 3])
    found = windows.lesson(["a", "b", "c"], 2, iter([0.9, 0.0, 0.4]), dynamic=True)
    assert [(p.reach, p.context) for p in found.positions] == [(2, (1, 2)), (1, (0, 2)), (1, (1,))]


def test_subsampling_keeps_with_word2vecs_chance() -> None:
    # f = 4/100, t = 0.01: sqrt(1/4) + 1/4 = 0.75.
    assert windows.keep_chance(4, 100, 0.01) == pytest.approx(0.75)
    assert windows.keep_chance(1, 100, 0.01) == 1.0
    counts = {"the": 4, "cat": 1, "rest": 95}
    draws = iter([0.74, 0.99, 0.75])
    assert windows.subsample(["the", "cat", "the"], counts, 0.01, draws) == (0, 1)


def test_windows_reach_over_the_gap_of_a_dropped_word() -> None:
    counts = {"a": 1, "the": 4, "b": 95}
    found = windows.lesson(["a", "the", "a"], 1, iter([0.5, 0.9, 0.5]), threshold=0.01, counts=counts)
    assert found.words == ("a", "a")
    assert found.pairs == (("a", "a"), ("a", "a"))
    assert found.keep_chances == {"a": 1.0, "the": pytest.approx(0.75)}


def test_negatives_come_from_counts_to_the_three_quarters() -> None:
    # 16^0.75 = 8 and 1^0.75 = 1: shares 8/9 and 1/9.
    shares = windows.noise_shares({"the": 16, "cat": 1})
    assert shares == {"the": pytest.approx(8 / 9), "cat": pytest.approx(1 / 9)}
    assert windows.negatives("cat", shares, 3, iter([0.0, 0.88, 0.9])) == ("the", "the")


def test_lesson_gives_negatives_for_each_pair() -> None:
    found = windows.lesson(["a", "b"], 1, iter([0.1, 0.6, 0.7, 0.2]), negative=2)
    assert found.pairs == (("a", "b"), ("b", "a"))
    assert found.negatives == (("a",), ("b",))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: windows.slide(3, 0), "the window must be from 1 to 1000 words to each side, but got 0"),
        (lambda: windows.lesson([], 2, iter(())), "must have at least one word"),
        (lambda: windows.lesson(["a"], 2, iter(()), negative=-1), "at least 0, but got -1"),
        (lambda: windows.lesson(["a"], 2, iter(()), threshold=0.0), "must be above 0"),
        (lambda: windows.slide(2, 2, [1, 3]), "2 numbers from 1 to 2"),
    ],
)
def test_wrong_numbers_are_refused_with_the_law(call, text) -> None:
    with pytest.raises(DataError, match=text):
        call()
