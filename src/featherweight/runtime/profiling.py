"""Time per node of a model, from the runtime's own profiler in a child process."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.runtime.outputs import Array
from featherweight.runtime.sandbox import Worker
from featherweight.runtime.targets import quiet_cpus

Feeds = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class NodeTimes:
    """`ms`: median per call by node name of the file; `kernels`: how many of each type ran; `op_types`: by name.

    A node that optimisation renamed or fused counts under the file's node it came from; one made by the runtime (layout
    changes) keeps the runtime's name.
    """

    ms: dict[str, float]
    kernels: Counter[str]
    op_types: dict[str, str]


def node_times(
    path: str | Path,
    feeds: Feeds,
    *,
    threads: int = 1,
    calls: int = 10,
    worker: Worker | None = None,
    timeout_s: float | None = None,
) -> NodeTimes:
    """Median time of each node over `calls` runs, from the runtime's profiler. Raises RunError, ChildCrashed."""
    doing = f"profiling '{Path(path).name}'"
    if worker is not None:
        return worker.call(_node_times, str(path), dict(feeds), threads, calls, timeout_s=timeout_s, doing=doing)
    with Worker(cpus=quiet_cpus(threads)) as own:
        return own.call(_node_times, str(path), dict(feeds), threads, calls, timeout_s=timeout_s, doing=doing)


def _node_times(path: str, feeds: dict[str, Array], threads: int, calls: int) -> NodeTimes:
    from featherweight.runtime import ort

    warm = 2
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        session = ort.session(path, threads=threads, profile_prefix=Path(folder) / "profile")
        for _ in range(warm + calls):
            session.run(feeds)
        events = ort.profile_events(session.end_profiling())
    sums: dict[str, list[float]] = defaultdict(list)
    types: dict[str, str] = {}
    for event in events:
        sums[event["name"]].append(event["us"] / 1000)
        types[event["name"]] = event["op"]
    origin = Origin(path)
    ms: dict[str, float] = defaultdict(float)
    op_types: dict[str, str] = {}
    for name, times in sums.items():
        each = max(1, len(times) // (warm + calls))  # a node inside a loop runs several times a call
        per_call = [sum(times[i : i + each]) for i in range(each * warm, len(times), each)]
        original = origin.of(name, types[name])
        ms[original] += statistics.median(per_call or [sum(times)])
        op_types.setdefault(original, types[name])
    return NodeTimes(dict(ms), Counter(types.values()), op_types)


class Origin:
    """Finds the file's node behind a name of the optimised graph."""

    def __init__(self, path: str) -> None:
        """`path`: the file as it was before optimisation."""
        import onnx

        self._producers: dict[str, Any] = {}
        self._names: set[str] = set()
        self._walk(onnx.load(path, load_external_data=False).graph)

    def _walk(self, graph: Any) -> None:
        for node in graph.node:
            self._names.add(node.name)
            self._producers.update({output: node for output in node.output if output})
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self._walk(attribute.g)

    def of(self, name: str, op_type: str) -> str:
        """Name in the file; `name` itself for a node the runtime made up.

        The runtime appends to a node's name or, for layout changes, to its output's: 'y_nchwc'. The suffix is cut at
        separators only, so that 'conv1' never takes the time of 'conv10'.
        """
        found = name
        while found:
            if found in self._names:
                return found
            if found in self._producers:
                return self._through(self._producers[found], op_type)
            cut = max(found.rfind(c) for c in "_/:")
            found = found[:cut] if cut > 0 else ""
        return name

    def _through(self, node: Any, op_type: str) -> str:
        """Walk back from an activation that was fused into the node which computes."""
        start = node
        for _ in range(4):
            if node.op_type == op_type.removeprefix("Fused"):
                break
            node = self._producers.get(node.input[0]) if node.input else None
            if node is None:
                node = start
                break
        else:
            node = start
        return str(node.name or node.output[0])
