"""The smallest file and the fastest model at a drop of one point: each technique alone, two and all together.

`python -m benchmarks.joint --data FOLDER [--tasks lite0,...] [--only "all size,..."] [--write]`. Rows that were
measured before are kept; `--again` times their files once more, `--fresh` makes them again.
"""

from __future__ import annotations

from benchmarks import structure
from benchmarks.structure import Entry
from benchmarks.tasks import TASKS, Task

KIND = "joint-"
GOALS = ("size", "latency")
ALONE = {
    "int8": "static_int8,dynamic_int8",
    "n-bit": "weight_nbit,palette",
    "channels": "channel_prune",
    "factors": structure.FACTORS,
    "sparse": "sparse",
    "channels + int8": "channel_prune,static_int8,dynamic_int8",
}


def entries(task: Task) -> list[Entry]:
    """For each goal one row a technique, one for two, one for all; a drop of a point of top-1, or .01 of Spearman."""
    drop = "0.01" if task.kind == "pairs" else "1%"
    rows = []
    for goal in GOALS:
        asked = ("--minimize", goal, "--max-drop", drop)
        rows += [Entry(f"{name} {goal}", (*asked, "--techniques", only)) for name, only in ALONE.items()]
        rows.append(Entry(f"all {goal}", asked))
    return rows


if __name__ == "__main__":
    structure.work_through(__doc__, KIND, TASKS, entries)
