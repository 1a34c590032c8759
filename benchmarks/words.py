"""Word vectors: tables compressed by featherweight and by other means, and training beside plain gensim.

    python -m benchmarks.words --data FOLDER --models FOLDER --wordllama FOLDER [--only tables|training] [--ours]

FOLDER holds sts/, banking77/ and text-corpus/. Writes benchmarks/results/words.json and words.md. Needs the extras
`words` and `text`, and the unpacked wheel of wordllama (--wordllama); rows of compress-fasttext appear where that is
installed. Nothing is tuned on what is reported: featherweight sees the tables alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.results import machine
from benchmarks.word_peers import peers
from featherweight.core import Budget
from featherweight.embeddings import answer, corpus, distil, output, quality, store, tasks, train
from featherweight.embeddings.compressing import Search
from featherweight.embeddings.opening import open_table
from featherweight.embeddings.table import F32, Table, from_arrays
from featherweight.runtime.sandbox import Worker

RESULTS = Path(__file__).parent / "results"
TIMES = (8, 16, 32, 64)
SEEDS = (1, 2, 3)
Rows = Callable[[npt.NDArray[np.int64]], F32]


@dataclass(frozen=True)
class TableRow:
    """One compressed table; `stored_bytes` of a file (featherweight) or of its arrays (others)."""

    table: str
    tool: str
    stored_bytes: int
    times_smaller: float
    sts: float
    sts_drop: float
    banking77: float
    banking77_drop: float
    neighbours: float
    seconds: float


@dataclass(frozen=True)
class Judge:
    """The tasks of one table."""

    name: str
    sts: tasks.Task
    banking: tasks.Task
    original: F32

    def row(self, tool: str, size: int, rows: Rows, seconds: float, base: TableRow | None) -> TableRow:
        """Judge one table; drops are against `base`, the float one."""
        sts, banking = self.sts.score(rows).value, self.banking.score(rows).value
        kept = quality.overlap(lambda r: self.original[r], rows, len(self.original)).value
        full = self.original.nbytes / size
        before = base or TableRow("", "", 0, 1, sts, 0, banking, 0, 1, 0)
        return TableRow(
            self.name, tool, size, full, sts, before.sts - sts, banking, before.banking77 - banking, kept, seconds
        )


def judge(name: str, table: Table, tokenizer: Path, data: Path) -> tuple[Judge, list[str]]:
    """Tasks over one table whose rows are the tokenizer's ids."""
    words, vectors = table.read()
    ids_of = tasks.ids_by_tokenizer(tokenizer, len(words))
    sts = tasks.load_task(data / "sts" / "stsb-en-test.tsv", ids_of)
    folder = data / "banking77"
    return Judge(name, sts, tasks.load_task(folder / "test.tsv", ids_of, train=folder / "train.tsv"), vectors), words


def compare_tables(
    name: str, table: Table, tokenizer: Path, data: Path, work: Path, kept: list[TableRow]
) -> Iterator[TableRow]:
    """Rows of one table: float, featherweight at each size, others (those in `kept` are not measured again)."""
    judged, words = judge(name, table, tokenizer, data)
    base = judged.row("float32", judged.original.nbytes, lambda r: judged.original[r], 0.0, None)
    yield base
    out = work / f"{name}.onnx"
    started = time.monotonic()
    search = Search(from_arrays(name, words, judged.original), output.sizer(out, judged.original.shape[1]), use="texts")
    looked = time.monotonic() - started
    for times in TIMES:
        started = time.monotonic()
        search.budget = Budget(max_size_bytes=judged.original.nbytes // times, minimize="drop")
        found = answer.compress(search)
        if found.table is None:
            continue
        output.save(out, found.table, words)
        seconds = looked + time.monotonic() - started
        yield judged.row(f"featherweight {times}x", out.stat().st_size, found.table.rows, seconds, base)
    others = [r for r in kept if r.table == name and r.tool != "float32" and not r.tool.startswith("featherweight")]
    yield from others
    for peer in peers(judged.original, TIMES) if not others else ():
        yield judged.row(peer.name, peer.nbytes, peer.rows, peer.seconds, base)


@dataclass(frozen=True)
class TrainingRow:
    """One trained table on the lists that gensim ships; `words_per_s` of the corpus, counting not included."""

    tool: str
    seed: int
    words_per_s: float
    wordsim353: float
    simlex999: float
    analogies: float


def compare_training(data: Path, work: Path) -> Iterator[TrainingRow]:
    """Plain gensim and featherweight at the same settings and seeds, all cores, one after another."""
    from gensim.models import Word2Vec
    from gensim.test.utils import datapath

    whole = work / "corpus.txt"
    if not whole.exists():
        parts = sorted((data / "text-corpus").glob("*.txt"))
        whole.write_bytes(b"".join(p.read_bytes() for p in parts))
    recipe = train.Recipe(dim=100, window=8, epochs=15)
    for seed in SEEDS:
        model = Word2Vec(vector_size=100, window=8, sg=1, min_count=5, seed=seed, workers=os.cpu_count() or 1)
        model.build_vocab(corpus_file=str(whole))
        counted = time.monotonic()
        model.train(
            corpus_file=str(whole), total_examples=model.corpus_count, total_words=model.corpus_total_words, epochs=15
        )
        speed = model.corpus_total_words * 15 / (time.monotonic() - counted)
        yield _judged("gensim", seed, speed, list(model.wv.index_to_key), model.wv.vectors, datapath)
        found = train.train(corpus.open_corpus(whole), train.Recipe(**{**asdict(recipe), "seed": seed}))
        yield _judged("featherweight", seed, found.words_per_s, found.words, found.vectors, datapath)


def _judged(tool: str, seed: int, speed: float, words: list[str], vectors: F32, datapath: Any) -> TrainingRow:
    table = store.from_arrays(words, vectors)
    lists = [quality.similarity(table, Path(datapath(n))).value for n in ("wordsim353.tsv", "simlex999.txt")]
    return TrainingRow(
        tool, seed, speed, lists[0], lists[1], quality.analogies(table, Path(datapath("questions-words.txt"))).value
    )


def static_minilm(models: Path, data: Path, work: Path) -> Table:
    """MiniLM distilled to a table of 256 columns, token frequencies from the text corpus."""
    path = work / "minilm-static.safetensors"
    if not path.exists():
        vocabulary, tool = distil.read_vocabulary(models / "minilm-tokenizer.json")
        texts = (line for p in sorted((data / "text-corpus").glob("*.txt")) for line in distil.lines_of(p))
        counts = distil.token_counts(tool, texts, len(vocabulary.tokens))
        with Worker() as worker:
            made = distil.distil(models / "minilm.onnx", vocabulary, worker=worker, dim=256, counts=counts)
        output.save_vectors(path, made.tokens, made.vectors)
    return open_table(path)


def wordllama(folder: Path) -> tuple[Table, Path]:
    """The 32,000 x 256 table of wordllama 0.4.0.post1 from its unpacked wheel, and its tokenizer."""
    tokenizer = next(folder.rglob("l2_supercat_tokenizer_config.json"))
    return open_table(next(folder.rglob("l2_supercat_256.safetensors")), vocabulary=tokenizer), tokenizer


def page(raw: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Word vectors",
        "",
        "Made by `python -m benchmarks.words`. Sizes: of the ONNX file (featherweight), of the arrays (others).",
        "",
    ]
    if raw.get("tables"):
        head = ["table", "tool", "MB", "times smaller", "STS-B test (drop)", "Banking77 (drop)", "neighbours@10", "s"]
        lines += ["## Compressed tables", "", _md(head), _md(["---"] * len(head))]
        for r in raw["tables"]:
            cells = [r["table"], r["tool"], f"{r['stored_bytes'] / 1e6:.2f}", f"{r['times_smaller']:.1f}x"]
            cells += [f"{r['sts']:.4f} ({r['sts_drop']:+.4f})", f"{r['banking77']:.4f} ({r['banking77_drop']:+.4f})"]
            lines.append(_md([*cells, f"{r['neighbours']:.3f}", f"{r['seconds']:.0f}"]))
        lines.append("")
    if raw.get("training"):
        head = ["tool", "seed", "words/s", "WordSim-353", "SimLex-999", "analogies"]
        lines += [
            "## Trained on the text corpus",
            "",
            "Skip-gram, 100 columns, window 8, 15 epochs.",
            "",
            _md(head),
            _md(["---"] * 6),
        ]
        for r in raw["training"]:
            cells = [r["tool"], str(r["seed"]), f"{r['words_per_s']:,.0f}"]
            lines.append(_md([*cells, *(f"{r[k]:.4f}" for k in ("wordsim353", "simlex999", "analogies"))]))
    return "\n".join(lines) + "\n"


def _md(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what is asked for and keep the rest of the results as they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / ".work" / "words")
    parser.add_argument("--models", type=Path, required=True, help="folder with minilm.onnx and minilm-tokenizer.json")
    parser.add_argument("--wordllama", type=Path, required=True, help="the unpacked wheel of wordllama")
    parser.add_argument("--only", choices=["tables", "training"])
    parser.add_argument("--ours", action="store_true", help="keep the rows of other tools as they are")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "words.json"
    raw: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    raw |= {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    if asked.only != "training":
        before = [TableRow(**r) for r in raw.get("tables", ())] if asked.ours else []
        keep(raw, "tables", all_tables(asked, before))
    if asked.only != "tables":
        keep(raw, "training", compare_training(asked.data, asked.work))


def all_tables(asked: argparse.Namespace, kept: list[TableRow]) -> Iterator[TableRow]:
    """Rows of both tables."""
    table, tokenizer = wordllama(asked.wordllama)
    yield from compare_tables("wordllama", table, tokenizer, asked.data, asked.work, kept)
    static = static_minilm(asked.models, asked.data, asked.work)
    yield from compare_tables(
        "minilm-static", static, asked.models / "minilm-tokenizer.json", asked.data, asked.work, kept
    )


def keep(raw: dict[str, Any], part: str, rows: Iterator[TableRow] | Iterator[TrainingRow]) -> None:
    """Write each row as it comes, so that an interrupted run leaves what it measured."""
    RESULTS.mkdir(exist_ok=True)
    raw[part] = []
    for row in rows:
        raw[part].append(asdict(row))
        print(row, flush=True)
        (RESULTS / "words.json").write_text(json.dumps(raw, indent=1) + "\n")
        (RESULTS / "words.md").write_text(page(raw))


if __name__ == "__main__":
    main()
