"""`featherweight words train`, `compress` and `compare`: from a corpus to a small table, judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import featherweight as fw
from featherweight.embeddings.table import from_arrays
from featherweight.runtime import ort


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """A word2vec file of 600 words whose columns fall off in size."""
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((600, 24)) * np.geomspace(2, 0.1, 24)).astype(np.float32)
    words = [f"w{i}" for i in range(600)]
    fw.words.write_vectors(tmp_path / "v.bin", from_arrays("m", words, table).blocks(), 24)
    return tmp_path / "v.bin"


def test_a_table_is_compressed_saved_and_reported(run, vectors: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "small.safetensors", tmp_path / "plain.txt"
    shown = run("words", "compress", str(vectors), "--max-size", "30%", "-o", str(out), "--plain", str(plain))
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("MET  ")
    assert "Decided" in shown.output
    report = json.loads((tmp_path / "small.report.json").read_text())
    assert report["result"]["size_bytes"] == out.stat().st_size
    assert out.stat().st_size <= 0.3 * report["baseline"]["size_bytes"]
    assert (tmp_path / "small.report.html").stat().st_size > 1000
    words, decoded = fw.words.open_table(plain).read()
    np.testing.assert_array_equal(decoded, fw.words.load(out).vectors(words))


def test_a_task_is_the_metric_and_onnx_starts_from_ids(run, vectors: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines = [
        f"w{a} w{b}\tw{c}\t{s:.2f}" for a, b, c, s in zip(*rng.integers(0, 600, (3, 40)), rng.random(40), strict=True)
    ]
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "\n".join(lines) + "\n")
    out = tmp_path / "e.onnx"
    shown = run(
        "words",
        "compress",
        str(vectors),
        "--task",
        str(tmp_path / "pairs.tsv"),
        "--max-drop",
        "0.5",
        "-o",
        str(out),
        "--json",
    )
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.output)
    assert (report["kind"], report["result"]["metric_name"]) == ("report", "spearman")
    feeds = {"input_ids": np.array([[1, 2]]), "attention_mask": np.array([[1, 1]])}
    assert ort.session(out).run(feeds)["sentence_embedding"].shape == (1, 24)


def test_a_budget_that_cannot_be_met_exits_with_3(run, vectors: Path, tmp_path: Path) -> None:
    shown = run("words", "compress", str(vectors), "--max-size", "2kB", "-o", str(tmp_path / "x.safetensors"))
    assert shown.exit_code == 3
    assert "PROVED IMPOSSIBLE" in shown.output
    assert not (tmp_path / "x.safetensors").exists()


def test_the_frontier_is_plotted(run, vectors: Path, tmp_path: Path) -> None:
    shown = run("words", "compress", str(vectors), "--frontier", "3", "-o", str(tmp_path / "f.safetensors"))
    assert shown.exit_code == 0, shown.output
    assert "Size against drop" in shown.output
    assert "times smaller" in shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-size", "10%", "-o", "x.bin"], "saved as .safetensors or .onnx"),
        (["-o", "x.onnx"], "needs a limit"),
        (["--max-size", "10%", "-o", "x.onnx", "--counts", "absent.txt"], "absent.txt"),
    ],
)
def test_wrong_requests_are_refused(run, vectors: Path, arguments: list[str], words: str) -> None:
    shown = run("words", "compress", str(vectors), *arguments)
    assert shown.exit_code == 1
    assert words in shown.output


def test_skipped_rows_are_in_the_report(run, tmp_path: Path) -> None:
    lines = [f"w{i} " + " ".join(str((i * j) % 7 - 3) for j in range(1, 9)) for i in range(1, 400)]
    (tmp_path / "v.txt").write_text("\n".join([*lines, "w5 1 2 3 4 5 6 7 8", "bad 1 nan 3 4 5 6 7 8"]) + "\n")
    arguments = [
        "words",
        "compress",
        str(tmp_path / "v.txt"),
        "--max-size",
        "60%",
        "-o",
        str(tmp_path / "o.safetensors"),
    ]
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "line 400: the word comes twice ('w5', first in line 5)" in refused.output
    shown = run(*arguments, "--skip-bad")
    assert shown.exit_code == 0, shown.output
    assert "1 rows left out: the word comes twice  (line 400)" in shown.output
    assert "1 rows left out: a number is not finite  (line 401)" in shown.output


def test_training_writes_vectors_counts_and_speed(run, tmp_path: Path) -> None:
    pytest.importorskip("gensim")
    rng = np.random.default_rng(0)
    (tmp_path / "c.txt").write_text("\n".join(" ".join(f"w{i}" for i in rng.integers(0, 20, 10)) for _ in range(200)))
    for ending in (".safetensors", ".bin", ".txt", ".onnx"):
        out = tmp_path / f"t{ending}"
        shown = run(
            "words", "train", str(tmp_path / "c.txt"), "--dim", "8", "--epochs", "2", "--threads", "1", "-o", str(out)
        )
        assert shown.exit_code == 0, shown.output
        assert "words/s" in shown.output
        assert out.exists()
    counts = dict(line.split("\t") for line in (tmp_path / "t.counts.txt").read_text().splitlines())
    assert sum(map(int, counts.values())) == 2000
    assert set(fw.words.load(tmp_path / "t.bin")) == set(counts)
    assert not list(tmp_path.glob("*.state.npz"))
    raw = json.loads(
        run("words", "train", str(tmp_path / "c.txt"), "--epochs", "1", "-o", str(tmp_path / "j.vec"), "--json").output
    )
    assert (raw["kind"], raw["words"], raw["corpus_words"], len(raw["loss"])) == ("word_training", 20, 2000, 1)


def test_two_tables_are_judged_side_by_side(run, vectors: Path, tmp_path: Path) -> None:
    (tmp_path / "sim.tsv").write_text("w1\tw2\t3\nw3\tw4\t1\nw5\tw6\t2\nw7\tnone\t2\n")
    shown = run("words", "compare", str(vectors), str(vectors), "--similarity", str(tmp_path / "sim.tsv"), "--json")
    scores = {s["name"]: s for s in json.loads(shown.output)["scores"]}
    assert scores["cosine"]["other"] == pytest.approx(1)
    assert scores["neighbours@10"]["other"] == 1
    assert scores["sim"]["value"] == scores["sim"]["other"]
    assert (scores["sim"]["n"], scores["sim"]["left_out"]) == (3, 1)
    assert "neighbours@10" in run("words", "compare", str(vectors), str(vectors)).output
    alone = run("words", "compare", str(vectors))
    assert alone.exit_code == 1
    assert "nothing to judge by" in alone.output
