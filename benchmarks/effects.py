"""How long it takes to estimate every decision at every place of a network, in closed form, and to solve for a plan.

    python -m benchmarks.effects --data FOLDER           # as in benchmarks/README.md
    python -m benchmarks.effects --data FOLDER --tasks minilm --all

Reading the calibration statistics comes before and is timed apart. `--all` asks each technique for all its options,
also for those that another nearly always does better.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import feeds, quantize, tasks
from benchmarks.tasks import TASKS, Task
from featherweight.core import Silent
from featherweight.graph.weights import weights
from featherweight.runtime.sandbox import Worker
from featherweight.search import joint, options, prepare, problem, space
from featherweight.search.request import Request

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What a call returns and the seconds it took on the wall."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def request(task: Task, data: Path) -> Request:
    """The task's model and calibration data as a request that asks nothing else."""
    read: dict[str, Any] = dict(zip(task.reading[::2], task.reading[1::2], strict=True))
    tokenizer = read.get("--tokenizer")
    return Request(
        quantize.original(task),
        str(data / task.table),
        preprocess=read.get("--preprocess"),
        tokenizer=None if tokenizer is None else quantize.original(task).parent / tokenizer,
        batch_size=feeds.TEXT_BATCH // 2 if tokenizer else 1,
    )


def measure(task: Task, data: Path, *, thorough: bool) -> None:
    """Print counts and seconds for one network."""
    with tempfile.TemporaryDirectory() as folder, Worker() as worker:
        opened = problem.open_problem(request(task, data), Path(folder) / "run", worker, Silent(), resume=False)
        stats, reading = timed(lambda: prepare.statistics(opened))
        ctx = dataclasses.replace(prepare.context(opened, stats), thorough=thorough)
        gains = {w.name: 1.0 for w in weights(opened.model)}
        processor = time.process_time()
        ground, numeric_s = timed(lambda: prepare.survey(opened, ctx, with_gains=False, gains=gains))
        techniques = list(opened.of_stage(structure=True).values())
        shape, structure_s = timed(
            lambda: options.structure_options(opened.model, techniques, ctx, gains, opened.progress)
        )
        table = ground.effects.table
        decided, chains_s = timed(lambda: space.decision_space(opened, ground, table, shape, gains))
        processor = time.process_time() - processor
        plan, solve_s = timed(lambda: joint.propose(decided, {"loss": 0.05}, {"size_bytes": 1e-6, "latency_ms": 0.1}))
        opened.journal.close()
    numeric = sum(map(len, table.values()))
    chains = sum(len(factors) * len(table.get(name, [0])) for name, factors in shape.factors.items())
    widths = sum(map(len, shape.groups.values()))
    useful = sum(map(len, decided.weights.values()))
    print(f"{task.title}: {len(table)} weights, {len(shape.groups)} groups of channels (statistics {reading:.1f} s)")
    print(f"  {numeric:6d} numeric decisions      {numeric_s:6.1f} s")
    print(f"  {widths:6d} widths of groups, {sum(map(len, shape.factors.values()))} factors {structure_s:6.1f} s")
    print(f"  {chains:6d} chains, {useful} useful     {chains_s:6.1f} s")
    print(f"  one program solved{'' if plan else ' (nothing fits)'}         {solve_s:6.1f} s")
    print(
        f"  in all                      {numeric_s + structure_s + chains_s:6.1f} s ({processor:.1f} s of processor)",
        flush=True,
    )


def main() -> None:
    """Parse the command line and measure each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled data (see benchmarks/README.md)")
    parser.add_argument("--tasks", default="lite0,minilm", help="default: %(default)s")
    parser.add_argument("--all", action="store_true", help="all options of every technique")
    args = parser.parse_args()
    for task in (t for t in TASKS if t.name in args.tasks.split(",")):
        tasks.prepare(task, args.data, quantize.WORK)
        measure(task, quantize.WORK / "data", thorough=args.all)


if __name__ == "__main__":
    main()
