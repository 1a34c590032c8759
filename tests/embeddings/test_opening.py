"""Every format is read to the same words and numbers; hostile files end in an error that names place and cause."""

from __future__ import annotations

import gzip
import json
import pickle  # to show that it is refused
import struct
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_vectors import VECTORS, WORDS, binary_of, text_of

from featherweight.embeddings.opening import open_table
from featherweight.errors import DataError


def vocabulary(words=WORDS) -> bytes:
    return "".join(f"{w}\n" for w in words).encode()


def npy(array, path: Path) -> bytes:
    np.save(path / "x.npy", array, allow_pickle=True)
    return (path / "x.npy").read_bytes()


def safetensors(vectors=VECTORS, **changes) -> bytes:
    entry = {"dtype": "F32", "shape": list(vectors.shape), "data_offsets": [0, vectors.nbytes], **changes}
    header = json.dumps({"emb": entry, "__metadata__": {"x": "y"}}).encode()
    return struct.pack("<Q", len(header)) + header + vectors.tobytes()


def gather_model(vectors=VECTORS) -> bytes:
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", vectors.shape[1]])
    table = numpy_helper.from_array(vectors, "table")
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["out"])], "g", [ids], [out], [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


GOOD = {
    "word2vec.txt": (text_of(), "word2vec text"),
    "fasttext.vec": (text_of().replace(b"\n", b" \n"), "word2vec text"),
    "windows.txt": (text_of().replace(b"\n", b"\r\n"), "word2vec text"),
    "glove.txt": (text_of(header=False), "GloVe text"),
    "tabs.txt": (text_of(header=False).replace(b" ", b"\t"), "GloVe text"),
    "packed.txt.gz": (gzip.compress(text_of()), "word2vec text"),
    "google.bin": (binary_of(), "word2vec binary"),
    "no-newlines.bin": (binary_of(newline=False), "word2vec binary"),
    "packed.bin.gz": (gzip.compress(binary_of()), "word2vec binary"),
    "wrong-ending.txt": (binary_of(), "word2vec binary"),
}


@pytest.mark.parametrize("name", GOOD)
def test_text_and_binary_are_read_bit_for_bit(put, name: str) -> None:
    data, kind = GOOD[name]
    table = open_table(put(name, data))
    words, vectors = table.read()
    assert (table.kind, table.dim, table.named, words) == (kind, 3, True, WORDS)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, VECTORS)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_read_with_the_words_beside_it(put, tmp_path: Path, dtype, order: str) -> None:
    small = np.array([[1, 2, 3], [4, 5, 6], [0, 0, 0], [-1, -2, 0.5]], dtype)
    path = put("emb.npy", npy(np.asfortranarray(small) if order == "F" else small, tmp_path))
    assert open_table(path).named is False
    assert open_table(path).read()[0] == ["0", "1", "2", "3"]
    put("emb.vocab.txt", vocabulary())
    words, vectors = open_table(path).read()
    assert words == WORDS
    np.testing.assert_array_equal(vectors, small.astype(np.float32))


def test_safetensors_and_onnx_take_a_tokenizers_words(put) -> None:
    tokenizer = {"model": {"vocab": {"the": 0, "cat": 1, "naïve": 3}}}
    put("tokenizer.json", json.dumps(tokenizer).encode())
    for name, data in (("m.safetensors", safetensors()), ("m.onnx", gather_model())):
        words, vectors = open_table(put(name, data)).read()
        assert words == ["the", "cat", "[2]", "naïve"]
        np.testing.assert_array_equal(vectors, VECTORS)


def test_a_unigram_tokenizer_lists_its_words_with_scores(put) -> None:
    put("tokenizer.json", json.dumps({"model": {"vocab": [[w, -1.5] for w in WORDS]}}).encode())
    assert open_table(put("m.safetensors", safetensors())).read()[0] == WORDS


def test_glove_words_may_hold_spaces(put) -> None:
    table = open_table(put("g.txt", b"cat 1 2 3\n. . 4 5 6\n"))
    assert table.read()[0] == ["cat", ". ."]


def test_blocks_come_in_order_and_again(put) -> None:
    table = open_table(put("v.txt", text_of()))
    for _ in range(2):
        blocks = list(table.blocks(3))
        assert [b.words for b in blocks] == [WORDS[:3], WORDS[3:]]
        assert [list(b.places) for b in blocks] == [[2, 3, 4], [5]]


HOSTILE_ROWS = {
    "missing column": (b"dog 1 2\n", "there must be 3 numbers after the word"),
    "extra column, no number": (b"dog 1 2 3 x\n", "this is not a number ('x' after"),
    "not a number": (b"dog 1 2,5 3\n", "this is not a number ('2,5' after 'dog')"),
    "NaN": (b"dog 1 nan 3\n", "a number is not finite (nan in column 2 of 'dog')"),
    "infinity": (b"dog 1 2 inf\n", "a number is not finite (inf in column 3 of 'dog')"),
    "too large for float32": (b"dog 1 2 1e99\n", "a number is not finite (inf in column 3 of 'dog')"),
    "word twice": (b"cat 1 2 3\n", "the word comes twice ('cat', first in line 2)"),
    "invalid UTF-8": (b"d\xffg 1 2 3\n", "the word is not UTF-8"),
    "empty line": (b"\n", "there must be 3 numbers after the word"),
    "hexadecimal": (b"dog 0x10 2 3\n", "this is not a number ('0x10'"),
}


@pytest.mark.parametrize("kind", HOSTILE_ROWS)
def test_a_bad_row_is_named_with_its_line_and_cause(put, kind: str) -> None:
    row, cause = HOSTILE_ROWS[kind]
    path = put("v.txt", b"3 3\ncat 1 2 3\n" + row + b"bird 4 5 6\n")
    with pytest.raises(DataError) as caught:
        open_table(path).read()
    assert f"{path} line 3: {cause}" in str(caught.value)
    assert "--skip-bad" in str(caught.value)


@pytest.mark.parametrize("kind", HOSTILE_ROWS)
def test_a_bad_row_is_skipped_and_counted_when_asked(put, kind: str) -> None:
    row, cause = HOSTILE_ROWS[kind]
    table = open_table(put("v.txt", b"3 3\ncat 1 2 3\n" + row + b"bird 4 5 6\n"), skip_bad=True)
    words, vectors = table.read()
    assert words == ["cat", "bird"]
    assert vectors.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert table.bad.counts == {cause.partition(" (")[0]: 1}
    assert table.bad.first == {cause.partition(" (")[0]: "line 3"}


def test_skipping_counts_each_cause(put) -> None:
    rows = b"".join(row for row, _ in HOSTILE_ROWS.values())
    table = open_table(put("v.txt", b"cat 1 2 3\n" + rows), skip_bad=True)
    assert table.read()[0] == ["cat"]
    assert table.bad.total == len(HOSTILE_ROWS)


@pytest.mark.parametrize("said", [b"2 3\n", b"4 3\n", b"999999 3\n"])
def test_a_header_with_the_wrong_count_is_named(put, said: bytes) -> None:
    path = put("v.txt", said + b"a 1 2 3\nb 1 2 3\nc 4 5 6\n")
    with pytest.raises(DataError, match=r"line 1: the first line is wrong \(it says \d+ rows, but 3 follow\)"):
        open_table(path).read()
    assert len(open_table(path, skip_bad=True).read()[0]) == 3


def test_a_header_with_the_wrong_width_names_the_first_row(put) -> None:
    with pytest.raises(DataError, match=r"line 2: there must be 4 numbers after the word \(3 after 'the'\)"):
        open_table(put("v.txt", text_of().replace(b"4 3", b"4 4", 1))).read()


def test_binary_that_ends_early_says_so(put) -> None:
    path = put("v.bin", binary_of()[:-5])
    with pytest.raises(DataError, match="row 4: the file ends early"):
        open_table(path).read()
    assert open_table(path, skip_bad=True).read()[0] == WORDS[:3]
    with pytest.raises(DataError, match="row 4: the file ends early"):
        open_table(put("v.bin.gz", gzip.compress(binary_of()[:-5]))).read()


def test_binary_that_says_more_than_fits_is_refused_at_once(put) -> None:
    path = put("v.bin", binary_of().replace(b"4 3", b"400000000 3", 1))
    with pytest.raises(DataError, match="says 400000000 rows of 3 numbers, which take at least 5600000012 bytes, but"):
        open_table(path)
    assert open_table(path, skip_bad=True).read()[0] == WORDS


def test_binary_with_a_wrong_width_is_noticed(put) -> None:
    data = binary_of().replace(b"4 3\n", b"4 2\n", 1)
    with pytest.raises(DataError, match="row"):
        open_table(put("v.bin", data)).read()


def test_binary_with_bad_words_and_numbers(put) -> None:
    vectors = VECTORS.copy()
    vectors[1, 0] = np.nan
    data = binary_of(vectors=vectors).replace("고".encode(), b"\xff\xfe\xfd")
    with pytest.raises(DataError, match="row 3: the word is not UTF-8"):
        open_table(put("v.bin", data)).read()
    table = open_table(put("w.bin", data), skip_bad=True)
    assert table.read()[0] == ["the", "naïve"]
    assert table.bad.total == 2


REFUSED = {
    "empty.txt": (b"", "the file is empty"),
    "prose.txt": (b"It was a dark night\nand so on\n", "must be 'rows dim' or a word with its numbers"),
    "one-word.txt": (b"cat\n", "must be 'rows dim'"),
    "kv.kv": (pickle.dumps({"a": 1}), "is a Python pickle"),
    "kv.bin": (pickle.dumps({"a": 1}, protocol=4), "save_word2vec_format"),
    "ft.bin": ((793712314).to_bytes(4, "little") + b"\0" * 40, "fastText model; give the .vec"),
    "huge.txt": (b"1 999999999\ncat 1\n", "must hold at least 1 row and 1 to 65536 columns"),
    "none.txt": (b"0 3\n", "at least 1 row"),
    "long.txt": (b"1 2\n" + b"x" * 10000, "line 2 is longer than"),
    "cut.safetensors": (safetensors()[:-3], "cut off or its header is wrong"),
    "overlong.safetensors": (b"\xff" * 64, "no safetensors file"),
    "type.safetensors": (safetensors(dtype="Q9"), "must be one of"),
    "ints.safetensors": (safetensors(dtype="I32"), "has no float tensor (rows, dim); it holds 'emb'"),
    "negative.safetensors": (safetensors(shape=[-4, -3]), "malformed"),
    "outside.safetensors": (safetensors(data_offsets=[48, 96]), "cut off"),
    "bad.onnx": (b"\x08\x07junk", "onnx"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_is_refused(put, name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(Exception, match=r".") as caught:
        open_table(put(name, data)).read()
    assert type(caught.value).__module__ == "featherweight.errors"
    assert words.lower() in str(caught.value).lower()


def test_pickled_arrays_are_refused(put, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pickled Python objects"):
        open_table(put("o.npy", npy(np.array([[1, "a"]], object), tmp_path)))
    with pytest.raises(DataError, match=r"floats of shape \(rows, dim\), but got int64 \(2, 2\)"):
        open_table(put("i.npy", npy(np.ones((2, 2), np.int64), tmp_path)))
    with pytest.raises(DataError, match="ends early"):
        open_table(put("c.npy", npy(np.ones((9, 9), np.float32), tmp_path)[:-4]))


def test_zip_archives_name_what_is_inside(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "glove.zip", "w") as made:
        made.writestr("glove.6B.50d.txt", "the 1 2\n")
    with pytest.raises(DataError, match=r"zip archive \(glove.6B.50d.txt\); unpack it"):
        open_table(tmp_path / "glove.zip")


def test_words_that_do_not_fit_are_refused(put, tmp_path: Path) -> None:
    path = put("emb.npy", npy(VECTORS, tmp_path))
    for data, words in (
        (vocabulary(WORDS[:3]), "a word for each of the 4 rows, but it has 3"),
        (b"a\nb\n\xff\nd\n", "line 3 is not UTF-8"),
    ):
        with pytest.raises(DataError, match=words):
            open_table(path, vocabulary=put("list.txt", data))
    with pytest.raises(DataError, match="ids up to 9, but the table has only 4 rows"):
        open_table(path, vocabulary=put("t.json", b'{"model": {"vocab": {"a": 9}}}'))
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        open_table(path, vocabulary=put("t.json", b"{}"))


def test_a_tensor_is_chosen_by_name(put) -> None:
    with pytest.raises(DataError, match="has no tensor 'w'; it holds 'emb'"):
        open_table(put("m.safetensors", safetensors()), tensor="w")
    with pytest.raises(DataError, match="has no gathered table 'w'; it has 'table'"):
        open_table(put("m.onnx", gather_model()), tensor="w")
    onnx.checker.check_model(onnx.load_from_string(gather_model()))
