"""Distillation: the teacher's own vectors, principal axes, weights by frequency."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import featherweight as fw
from featherweight.embeddings import distil
from featherweight.errors import DataError, ModelError
from featherweight.runtime.sandbox import Worker

VOCAB = ["[PAD]", "[unused0]", "[CLS]", "[SEP]", "sea", "sky", "the", "lake"]
TABLE = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    library = pytest.importorskip("tokenizers")
    model = library.models.WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="[unused0]")
    made = library.Tokenizer(model)
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    made.post_processor = library.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def teacher(path: Path, *, pooled: bool, extra: str = "") -> Path:
    """States are rows of TABLE; pooled, their mean over the places."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["states"])]
    out, shape = "states", ["b", "s", 5]
    stored = [numpy_helper.from_array(TABLE, "table")]
    if pooled:
        nodes.append(helper.make_node("ReduceMean", ["states", "axis"], ["sentence_embedding"], keepdims=0))
        stored.append(numpy_helper.from_array(np.array([1]), "axis"))
        out, shape = "sentence_embedding", ["b", 5]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ["input_ids", extra] if n]
    if extra:
        nodes.append(helper.make_node("Identity", [extra], ["unused"]))
    graph = helper.make_graph(
        nodes, "t", inputs, [helper.make_tensor_value_info(out, TensorProto.FLOAT, shape)], stored
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_a_vocabulary_knows_its_special_tokens_and_frame(tokenizer: Path) -> None:
    found, tool = distil.read_vocabulary(tokenizer)
    assert found.tokens == VOCAB
    assert found.special == {0, 1, 2, 3}
    assert (found.before, found.after) == ((2,), (3,))
    assert distil.token_counts(tool, ["the sea the sky", "the"], 8).tolist() == [0, 0, 0, 0, 1, 1, 3, 0]


@pytest.mark.parametrize("pooled", [False, True])
def test_each_token_gets_the_teachers_vector(tokenizer: Path, tmp_path: Path, pooled: bool) -> None:
    vocabulary, _ = distil.read_vocabulary(tokenizer)
    with Worker() as worker:
        made = distil.teacher_vectors(teacher(tmp_path / "t.onnx", pooled=pooled), vocabulary, worker=worker)
    assert not made[:4].any()
    for i in range(4, 8):
        expected = TABLE[[2, i, 3]].mean(axis=0) if pooled else TABLE[i]
        np.testing.assert_allclose(made[i], expected, rtol=1e-5)


def test_axes_keep_distances_and_weights_are_sif(tokenizer: Path, tmp_path: Path) -> None:
    vocabulary, _ = distil.read_vocabulary(tokenizer)
    counts = np.array([9, 9, 9, 9, 1, 2, 30, 0])
    with Worker() as worker:
        found = distil.distil(
            teacher(tmp_path / "t.onnx", pooled=False), vocabulary, worker=worker, dim=5, counts=counts, sif=0.1
        )
    often = np.array([1.5, 2.5, 30.5, 0.5])
    weights = 0.1 / (0.1 + often / often.sum())
    unweighted = found.vectors[4:] / weights[:, None]
    centred = TABLE[4:] - TABLE[4:].mean(axis=0)
    np.testing.assert_allclose(unweighted @ unweighted.T, centred @ centred.T, atol=1e-5)
    assert not found.vectors[:4].any()
    assert found.kept == pytest.approx(1)


def test_fewer_axes_keep_the_most_variance() -> None:
    rng = np.random.default_rng(1)
    states = (rng.standard_normal((200, 6)) * [5, 4, 3, 0.1, 0.1, 0.1]).astype(np.float32)
    vectors, kept = distil.projected(states, np.ones(200, bool), 3)
    assert vectors.shape == (200, 3)
    assert kept > 0.995
    np.testing.assert_allclose(np.var(vectors, axis=0).sum() / np.var(states, axis=0).sum(), kept, rtol=1e-4)


def test_models_of_another_kind_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    vocabulary, _ = distil.read_vocabulary(tokenizer)
    with Worker() as worker, pytest.raises(ModelError, match="also has 'pixels'"):
        distil.teacher_vectors(teacher(tmp_path / "t.onnx", pooled=True, extra="pixels"), vocabulary, worker=worker)
    with pytest.raises(ModelError, match=r"must have an output \(batch, width\)"):
        distil.sentence_vectors({"x": np.zeros((3,))}, 3, 1)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        distil.read_vocabulary(tmp_path / "bad.json")


def test_the_command_writes_a_table(tokenizer: Path, tmp_path: Path, run) -> None:
    model, out = teacher(tmp_path / "t.onnx", pooled=True), tmp_path / "static.safetensors"
    (tmp_path / "c.txt").write_text("the sea\nthe sky\n")
    arguments = ["--tokenizer", str(tokenizer), "--dim", "3", "--corpus", str(tmp_path / "c.txt"), "-o", str(out)]
    shown = run("words", "distil", str(model), *arguments)
    assert shown.exit_code == 0, shown.output
    assert "8 tokens of 3 numbers" in shown.output
    assert list(fw.words.load(out)) == VOCAB
    raw = json.loads(run("words", "distil", str(model), *arguments, "--json").output)
    assert (raw["kind"], raw["tokens"], raw["columns"]) == ("word_distillation", 8, 3)
