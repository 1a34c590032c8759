"""`featherweight words windows`: the whole output, worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

CAT = """
Windows  7 words, window 3
  Every word takes its turn as the [centre]; the words around it, as far as the
  window reaches, are its context. At the edges of the sentence the window is
  cut off.

  1  [The]  fat   cat   sat   .    .     .     3 pairs
  2   The  [fat]  cat   sat   on   .     .     4 pairs
  3   The   fat  [cat]  sat   on   the   .     5 pairs
  4   The   fat   cat  [sat]  on   the   mat   6 pairs
  5   .     fat   cat   sat  [on]  the   mat   5 pairs
  6   .     .     cat   sat   on  [the]  mat   4 pairs
  7   .     .     .     sat   on   the  [mat]  3 pairs

Skip-gram  30 pairs (centre, context): predict each context word alone
  (The, fat)  (The, cat)  (The, sat)
  (fat, The)  (fat, cat)  (fat, sat)  (fat, on)
  (cat, The)  (cat, fat)  (cat, sat)  (cat, on)  (cat, the)
  (sat, The)  (sat, fat)  (sat, cat)  (sat, on)  (sat, the)  (sat, mat)
  (on, fat)  (on, cat)  (on, sat)  (on, the)  (on, mat)
  (the, cat)  (the, sat)  (the, on)  (the, mat)
  (mat, sat)  (mat, on)  (mat, the)

CBOW  7 examples (contexts -> centre): predict the centre from their mean
  fat cat sat -> The
  The cat sat on -> fat
  The fat sat on the -> cat
  The fat cat on the mat -> sat
  fat cat sat the mat -> on
  cat sat on mat -> the
  sat on the -> mat
"""

KOREAN = """
  1  [나는]  오늘   .        .      1 pair
  2   나는  [오늘]  학교에   .      2 pairs
  3   .      오늘  [학교에]  갔다   2 pairs
  4   .      .      학교에  [갔다]  1 pair
"""


def test_the_cat_is_shown_as_worked_out(run) -> None:
    shown = run("words", "windows", "The fat cat sat on the mat", "--window", "3")
    assert shown.exit_code == 0
    assert shown.output == CAT


def test_korean_words_keep_their_columns(run) -> None:
    shown = run("words", "windows", "나는 오늘 학교에 갔다", "--window", "1")
    assert KOREAN in shown.output


def test_a_long_sentence_shows_the_window_alone(run) -> None:
    words = " ".join(f"word{i}" for i in range(30))
    shown = run("words", "windows", words, "--window", "1")
    assert "\n  15  word13 [word14] word15  2 pairs\n" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80


def test_json_says_the_same(run) -> None:
    shown = json.loads(run("words", "windows", "a b a", "--window", "1", "--json").output)
    assert (shown["schema"], shown["kind"]) == (1, "word_windows")
    assert shown["positions"][1] == {"at": 1, "centre": "b", "window": 1, "context": ["a", "a"], "context_at": [0, 2]}
    assert shown["skip_gram"] == {"count": 4, "pairs": [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]}
    assert shown["cbow"]["examples"][1] == {"contexts": ["a", "a"], "centre": "b"}
    assert "negative" not in shown


def test_what_training_adds_is_shown_on_request(run) -> None:
    options = ["--dynamic", "--subsample", "0.05", "--negative", "2", "--lower", "--seed", "3"]
    shown = run("words", "windows", "The fat cat sat on the mat", *options).output
    for words in ("Dynamic window", "Subsampling", "Negative samples", "not: "):
        assert words in shown
    # "the" is 2 of 7 words: sqrt(0.05 * 3.5) + 0.05 * 3.5; the others 1 of 7. 2^0.75 / (2^0.75 + 5) is its share.
    assert re.search(r"the +2 +59\.3%", shown)
    assert re.search(r"fat +1 +94\.2%", shown)
    assert re.search(r"the +2 +25\.2%", shown)
    assert run("words", "windows", "The fat cat sat on the mat", *options).output == shown


def test_counts_of_a_corpus_set_the_chances(run, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the the the the\n" + "x " * 96, encoding="utf-8")
    shown = run("words", "windows", "the x", "--subsample", "0.01", "--counts", str(tmp_path / "corpus.txt")).output
    assert re.search(r"the +4 +75\.0%", shown)


def test_page_is_one_file_that_escapes_its_words(run, tmp_path: Path) -> None:
    page = tmp_path / "windows.html"
    shown = run("words", "windows", "a </script><b> $c", "--html", str(page))
    assert shown.exit_code == 0, shown.output
    text = page.read_text(encoding="utf-8")
    assert "</script><b>" not in text
    assert "&lt;/script&gt;&lt;b&gt;" in text
    assert not re.search(r"https?://", text)
    data = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    assert data["words"] == ["a", "</script><b>", "$c"]
    assert text.count('<tr data-at="') == 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([" "], 1, "at least one word"),
        (["a b", "--window", "0"], 2, "0 is not in the range"),
        (["a b", "--tokenizer", "nothing"], 1, "module:function"),
        (["a b", "--counts", "absent.txt"], 1, "absent.txt cannot be read"),
    ],
)
def test_what_cannot_be_shown_is_refused(run, arguments: list[str], code: int, words: str) -> None:
    shown = run("words", "windows", *arguments)
    assert shown.exit_code == code
    assert words in shown.output
