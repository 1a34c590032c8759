"""Compressed tables: what they decode to, that bytes and errors are as predicted, that zeros stay, budgets hold."""

from __future__ import annotations

import numpy as np
import pytest

import featherweight as fw
from featherweight.core import Budget
from featherweight.embeddings import answer, choices, cutting, encoder, output, quality
from featherweight.embeddings.build import build
from featherweight.embeddings.compressing import Search
from featherweight.embeddings.survey import survey
from featherweight.embeddings.table import from_arrays
from featherweight.errors import BudgetError, DataError, OutputError
from featherweight.graph import io
from featherweight.runtime import ort
from featherweight.search.solve import solve


def drawn(rows: int = 1500, dim: int = 40, seed: int = 0):
    """Words whose columns fall off in size, as principal axes of real tables do; two of them are zero."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((dim, dim)) * np.geomspace(1, 0.05, dim)[:, None]
    vectors = (rng.standard_normal((rows, dim)) @ mixed + 0.3).astype(np.float32)
    vectors *= rng.uniform(0.2, 3, (rows, 1)).astype(np.float32)
    vectors[[3, rows - 1]] = 0
    return [f"w{i}" for i in range(rows)], vectors


@pytest.fixture(scope="module")
def looked_at():
    words, vectors = drawn()
    table = from_arrays("memory", words, vectors)
    found = survey(table)
    return table, found, [choices.measured(found, s) for s in choices.spaces(found)]


def at_bytes(table, found, errors, size: int):
    solution = solve(errors.table(found.rows), {"size_bytes": size}, {"loss": 1.0})
    assert solution is not None
    return build(table, found, errors.space, [c.decision for c in solution.choices]), solution


def test_survey_is_the_plain_weighted_statistics(looked_at) -> None:
    _, found, _ = looked_at
    words, vectors = drawn()
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    weights = np.where(norms > 0, np.arange(1, 1501) ** -0.5, 0)
    weights /= weights.sum()
    unit = vectors / np.where(norms > 0, norms, 1)[:, None]
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-9)
    np.testing.assert_allclose(found.mean, weights @ unit, atol=1e-6)
    np.testing.assert_allclose(found.moment, (unit * weights[:, None]).T @ unit, atol=1e-6)
    assert (found.n_zero, found.words) == (2, words)
    assert found.sample_weights.sum() == pytest.approx(1)


def test_counts_set_the_weights() -> None:
    table = from_arrays("m", ["a", "b", "c"], np.array([[3, 4], [0, 2], [0, 0]], np.float32))
    by_count = survey(table, counts={"a": 4, "b": 8})  # and half an occurrence each
    np.testing.assert_allclose(by_count.weights[0] / by_count.weights[1], (4.5 / 8.5) ** 0.5)
    assert by_count.weights[2] == 0


@pytest.mark.parametrize("space", [0, 1])
@pytest.mark.parametrize("times", [3, 8, 20])
def test_bytes_and_errors_are_as_predicted(looked_at, space: int, times: int) -> None:
    table, found, spaces = looked_at
    vectors = drawn()[1]
    made, solution = at_bytes(table, found, spaces[space], vectors.nbytes // times)
    decoded = made.rows(np.arange(1500))
    sizes = np.linalg.norm(vectors, axis=1)
    used = sizes > 0
    relative = ((vectors - decoded)[used] ** 2).sum(axis=1) / sizes[used] ** 2
    assert float(found.weights[used] @ relative) == pytest.approx(solution.effect.loss, rel=0.35)
    beside = sum(a.nbytes for k, a in made.arrays().items() if k in ("mean", "place"))
    assert made.nbytes - beside <= solution.effect.size_bytes
    assert made.nbytes - beside >= solution.effect.size_bytes * 0.9
    assert not decoded[~used].any()


@pytest.mark.parametrize("space", [0, 1])
def test_onnx_and_mapped_file_give_the_same_vectors(looked_at, tmp_path, space: int) -> None:
    table, found, spaces = looked_at
    made, _ = at_bytes(table, found, spaces[space], 1500 * 12)
    everything = made.rows(np.arange(1500))
    output.save(tmp_path / "t.safetensors", made, found.words)
    assert (tmp_path / "t.safetensors").stat().st_size == output.sizer(tmp_path / "t.safetensors", 40)(
        found.words, made
    )
    loaded = fw.words.load(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(loaded.rows(range(1500)), everything)
    np.testing.assert_array_equal(loaded["w77"], everything[77])
    words, again = fw.words.open_table(tmp_path / "t.safetensors").read()
    assert words == found.words
    np.testing.assert_array_equal(again, everything)
    output.save(tmp_path / "t.onnx", made, found.words)
    size = output.sizer(tmp_path / "t.onnx", 40)
    assert (tmp_path / "t.onnx").stat().st_size == size(found.words, made)
    rng = np.random.default_rng(1)
    ids, mask = rng.integers(0, 1500, (5, 9)), (rng.random((5, 9)) < 0.6).astype(np.int64)
    ids[0], mask[4] = 3, 0
    feeds = {"input_ids": ids, "attention_mask": mask}
    expected = (everything[ids] * mask[..., None]).sum(axis=1) / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    got = ort.session(tmp_path / "t.onnx").run(feeds)["sentence_embedding"]
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert not got[[0, 4]].any()
    output.save(tmp_path / "u.onnx", made, found.words, normalise=True)
    lengths = np.linalg.norm(ort.session(tmp_path / "u.onnx").run(feeds)["sentence_embedding"], axis=1)
    np.testing.assert_allclose(lengths, [0, 1, 1, 1, 0], atol=1e-5)


def test_packing_by_pieces_gives_the_same_table(looked_at, monkeypatch) -> None:
    from featherweight.embeddings import build as module

    table, found, spaces = looked_at
    whole, _ = at_bytes(table, found, spaces[1], 1500 * 12)
    monkeypatch.setattr(module, "PACKED_ROWS", 400)
    pieces, _ = at_bytes(table, found, spaces[1], 1500 * 12)
    assert pieces.metadata() == whole.metadata()
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(pieces.arrays()[name], array)


def test_float_encoder_is_the_mean_and_its_size_is_known(tmp_path) -> None:
    vectors = np.array([[1, 2], [3, 4], [5, 0]], np.float32)
    model = encoder.encoder(vectors)
    feeds = {"input_ids": np.array([[0, 1, 2]]), "attention_mask": np.array([[1, 1, 0]])}
    np.testing.assert_allclose(ort.session(io.to_bytes(model)).run(feeds)["sentence_embedding"], [[2, 3]])
    sizes = output.sizer(tmp_path / "x.onnx", 2)
    assert abs(sizes(["a", "b", "c"], None) - len(io.to_bytes(model))) <= 8


def test_spaces_without_variance_and_tiny_tables_are_no_trouble(tmp_path) -> None:
    for rows in (np.ones((5, 3)), np.zeros((4, 3)), np.eye(1), np.array([[1.0, 2], [2, 4]])):
        words = [f"w{i}" for i in range(len(rows))]
        table = from_arrays("m", words, rows.astype(np.float32))
        search = Search(table, output.sizer(tmp_path / "t.safetensors", rows.shape[1]))
        search.budget = Budget(max_size_bytes=search.float_bytes + 4000)
        found = answer.compress(search)
        assert found.report.ok
        np.testing.assert_allclose(found.table.rows(np.arange(len(rows))), rows, rtol=0.02, atol=1e-6)


def test_words_that_share_a_row_take_the_nearest_kept(looked_at) -> None:
    table, found, spaces = looked_at
    vectors = drawn()[1]
    cuts = cutting.cuts(table, found)
    assert [len(c.rows) for c in cuts] == [751, 376, 181]  # and the last row, which is zero and could share none
    kept = cuts[1].rows
    row_of = cutting.row_of(table, found, kept)
    unit = quality.unit(vectors)
    for row in (4, 400, 900, 1400):
        expected = kept[int((unit[kept] @ unit[row]).argmax())] if row not in kept else row
        assert kept[row_of[row]] == expected
    solution = solve(spaces[1].table(len(kept)), {"size_bytes": 376 * 40}, {"loss": 1.0})
    decisions = [c.decision for c in solution.choices]
    made = build(table, found, spaces[1].space, decisions, row_of=row_of, kept_rows=kept)
    assert (made.n_rows, made.kept) == (1500, 376)
    decoded = made.rows(np.arange(1500))
    assert not decoded[[3, 1499]].any()
    np.testing.assert_array_equal(decoded[900], decoded[kept[row_of[900]]])
    used = found.norms > 0
    shape = np.square(unit[used] - quality.unit(decoded)[used]).sum(axis=1)
    assert float(found.weights[used] @ shape) == pytest.approx(
        cuts[1].error + solution.effect.loss * cuts[1].weight_left, rel=0.25
    )


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    words, vectors = drawn()
    return Search(from_arrays("memory", words, vectors), output.sizer(tmp_path_factory.mktemp("o") / "t.onnx", 40))


def test_a_size_is_kept_and_the_best_is_taken(search) -> None:
    search.budget = Budget(max_size_bytes=search.float_bytes // 8, minimize="drop")
    found = answer.compress(search)
    assert found.report.answer == "yes"
    assert found.report.result.size_bytes <= search.float_bytes // 8
    assert found.report.result.size_bytes == search.size_of(found.words, found.table)
    assert found.report.result.drop == pytest.approx(1 - found.report.result.metric)
    assert found.report.result.metric > 0.5


def test_a_drop_is_kept_and_larger_drops_give_smaller_tables(search) -> None:
    sizes = []
    for drop in (0.15, 0.4):
        search.budget = Budget(max_drop=drop)
        found = answer.compress(search)
        assert found.report.ok
        assert found.report.result.drop <= drop
        sizes.append(found.report.result.size_bytes)
    assert sizes[1] < sizes[0] < search.float_bytes / 4


def test_texts_are_judged_as_means_of_drawn_words(tmp_path) -> None:
    words, vectors = drawn()
    found = Search(from_arrays("memory", words, vectors), output.sizer(tmp_path / "t.onnx", 40), use="texts")
    assert found.texts.shape == (2000, 12)
    assert not {3, 1499} & set(found.texts.ravel().tolist())  # zero rows come in no text
    found.budget = Budget(max_size_bytes=found.float_bytes // 8)
    made = answer.compress(found)
    texts = [table[found.texts].mean(axis=1) for table in (vectors, made.table.rows(np.arange(1500)))]
    near = [quality.nearest(quality.unit(t), np.arange(256), 10) for t in texts]
    assert made.report.result.metric_name == "texts@10"
    assert made.report.result.metric == pytest.approx(quality.shared(*near))


def test_what_cannot_be_is_said_with_its_bound(search) -> None:
    search.budget = Budget(max_size_bytes=search.fixed + 100)
    found = answer.compress(search)
    assert (found.report.answer, found.table) == ("no, proved", None)
    assert found.report.plan.bound_bytes > search.fixed + 100
    search.budget = Budget(max_size_bytes=search.float_bytes // 16, max_drop=1e-6)
    assert answer.compress(search).report.answer == "not found"
    search.budget = Budget()
    with pytest.raises(BudgetError, match="needs a limit"):
        answer.compress(search)


def test_front_points_beat_one_another_in_size_or_drop(search) -> None:
    found = answer.frontier(search, 4)
    front = [(a.measured.size_bytes, a.measured.drop) for a in found.report.front]
    assert len(front) >= 3
    assert front == sorted(front)
    assert [d for _, d in front] == sorted((d for _, d in front), reverse=True)


def test_torn_codings_are_refused(looked_at, tmp_path) -> None:
    table, found, spaces = looked_at
    made, _ = at_bytes(table, found, spaces[0], 1500 * 12)
    output.save(tmp_path / "t.safetensors", made, found.words)
    data = (tmp_path / "t.safetensors").read_bytes()
    for old, new, words in (
        (b'\\"dim\\": 40', b'\\"dim\\": 41', "do not fit together"),
        (b'\\"inner\\": \\"product\\"', b'\\"inner\\": \\"produkt\\"', "malformed"),
        (b'\\"columns\\": ', b'\\"columns\\":9', "malformed"),
    ):
        assert old in data
        (tmp_path / "bad.safetensors").write_bytes(data.replace(old, new, 1))
        with pytest.raises(DataError, match=words):
            fw.words.load(tmp_path / "bad.safetensors")
    with pytest.raises(OutputError, match=r"saved as .safetensors or .onnx, but got 't.bin'"):
        output.save(tmp_path / "t.bin", made, found.words)
