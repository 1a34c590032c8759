"""Tables in use, and what is written for others to read."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from small_vectors import VECTORS, WORDS

import featherweight as fw
from featherweight.embeddings import vocabulary
from featherweight.embeddings.table import from_arrays
from featherweight.errors import DataError, OutputError

ENDINGS = [".txt", ".vec", ".bin", ".npy", ".safetensors"]


def written(path: Path, words=WORDS, vectors=VECTORS) -> Path:
    assert fw.words.write_vectors(path, from_arrays("memory", words, vectors).blocks(2), vectors.shape[1]) == len(words)
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"v{ending}")
    table = fw.words.load(path)
    assert list(table) == WORDS
    np.testing.assert_array_equal(table.vectors(WORDS), VECTORS)
    assert fw.words.open_table(path).read()[0] == WORDS


def test_others_read_our_safetensors(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    tensors = library.load_file(written(tmp_path / "v.safetensors"))
    np.testing.assert_array_equal(tensors["vectors"], VECTORS)
    text, offsets = tensors["words.text"].tobytes(), tensors["words.offsets"]
    assert [text[a:b].decode() for a, b in itertools.pairwise(offsets)] == WORDS


def test_gensim_reads_our_word2vec_files(tmp_path: Path) -> None:
    gensim = pytest.importorskip("gensim.models.keyedvectors")
    for ending, binary in ((".txt", False), (".bin", True)):
        vectors = gensim.KeyedVectors.load_word2vec_format(written(tmp_path / f"v{ending}"), binary=binary)
        assert vectors.index_to_key == WORDS
        np.testing.assert_array_equal(vectors.vectors, VECTORS)


def test_a_word_is_found_by_bisection() -> None:
    rng = np.random.default_rng(0)
    words = list(dict.fromkeys("".join(rng.choice(list("abé고"), rng.integers(1, 5))) for _ in range(300)))
    packed = vocabulary.pack(words)
    assert [packed.find(w) for w in words] == list(range(len(words)))
    assert [packed.word(i) for i in range(len(words))] == words
    assert all(packed.find(w) is None for w in ("", "A", "zz", "고고고고고고", "a b"))
    assert vocabulary.pack([]).find("a") is None


def test_first_lookup_reads_little(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = written(
        tmp_path / "v.safetensors", [f"w{i}" for i in range(3000)], rng.standard_normal((3000, 50), np.float32)
    )
    table = fw.words.load(path)
    mapped = table._packed
    assert all(isinstance(a, np.memmap) for a in (mapped.text, mapped.offsets, mapped.order))
    assert table["w2999"].shape == (50,)


def test_most_similar_is_the_cosine_of_all_pairs() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((300, 8)).astype(np.float32)
    vectors[7] = 0
    table = fw.words.from_arrays([f"w{i}" for i in range(300)], vectors)
    sizes = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors[5] / np.where(sizes == 0, 1, sizes * sizes[5])
    order = [i for i in np.argsort(-cosines, kind="stable") if i != 5][:4]
    found = table.most_similar("w5", 4)
    assert [w for w, _ in found] == [f"w{i}" for i in order]
    assert [c for _, c in found] == pytest.approx(cosines[order], abs=1e-6)
    assert table.most_similar(vectors[5], 1)[0][0] == "w5"
    assert table.similarity("w5", "w7") == 0.0
    assert len(table.most_similar("w5", 1000)) == 299


def test_unknown_words_are_a_key_error_with_near_ones() -> None:
    table = fw.words.from_arrays(WORDS, VECTORS)
    with pytest.raises(KeyError, match="did you mean 'cat'"):
        table["catt"]
    assert "cat" in table
    assert 3 not in table
    np.testing.assert_array_equal(table.mean(["cat", "the", "unknown"]), VECTORS[:2].mean(axis=0))
    np.testing.assert_array_equal(table.mean(["unknown"]), np.zeros(3))


def test_another_version_or_torn_index_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path / "v.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])

    def changed(name: str, change) -> Path:
        copy = json.loads(json.dumps(header))
        change(copy)
        (tmp_path / name).write_bytes(data[:8] + json.dumps(copy).encode().ljust(size) + data[8 + size :])
        return tmp_path / name

    newer = changed("n.safetensors", lambda h: h["__metadata__"].update(format="featherweight words 9"))
    with pytest.raises(DataError, match="has the format 'featherweight words 9', but this version reads"):
        fw.words.load(newer)
    torn = changed("t.safetensors", lambda h: h["words.order"].update(shape=[2], data_offsets=[0, 8]))
    with pytest.raises(DataError, match="words"):
        fw.words.load(torn)
    less = changed("l.safetensors", lambda h: h.pop("words.order"))
    with pytest.raises(DataError, match=r"words\.order is missing"):
        fw.words.load(less)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"must be one of .txt, .vec, .bin, .npy, .safetensors, but got 'v.kv'"):
        written(tmp_path / "v.kv")
    (tmp_path / "d.bin").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        written(tmp_path / "d.bin")

    def broken():
        yield from from_arrays("m", WORDS, VECTORS).blocks(2)
        raise DataError("line 7")

    with pytest.raises(DataError, match="line 7"):
        fw.words.write_vectors(tmp_path / "v.txt", broken(), 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin"]


def test_words_with_spaces_stay_one_token_in_word2vec(tmp_path: Path) -> None:
    path = written(tmp_path / "v.txt", ["New York", "b"], VECTORS[:2])
    assert fw.words.open_table(path).read()[0] == ["New_York", "b"]
