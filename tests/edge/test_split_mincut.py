"""The minimum cut against brute force: every head, every place of every cheap block, on random graphs."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.edge import mincut
from featherweight.edge.cuts import Block, CutGraph, Tensor
from featherweight.edge.mincut import CutCosts
from featherweight.errors import ModelError

COST = st.one_of(st.just(0.0), st.integers(1, 20).map(float), st.floats(0.01, 1e4))


def tensor(name: str, *, is_input: bool = False, is_output: bool = False) -> Tensor:
    return Tensor(name, None, None, 0, 0, is_input, is_output, is_input)


def block(name: str, reads: tuple[int, ...], writes: tuple[int, ...], cheap: bool = False) -> Block:
    return Block(name, (name,), ("Op",), 0, 0, 0, reads, writes, cheap)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[CutGraph, CutCosts]:
    n_inputs, n_blocks = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    made: list[int] = list(range(n_inputs))
    blocks, unread, readers = [], set(made), set()
    for i in range(n_blocks):
        reads = tuple(sorted(draw(st.sets(st.sampled_from(made), min_size=1, max_size=3))))
        cheap = draw(st.booleans()) and draw(st.booleans())
        count = draw(st.integers(1, 2))
        writes = tuple(range(len(made), len(made) + count))
        made += writes
        unread |= set(writes)
        readers |= set(reads)
        blocks.append(block(f"b{i}", reads, writes, cheap))
    outputs = {t for t in made if t not in readers and t >= n_inputs} | draw(st.sets(st.sampled_from(made), max_size=2))
    tensors = tuple(tensor(f"t{t}", is_input=t < n_inputs, is_output=t in outputs) for t in made)
    costs = CutCosts(
        device={i: draw(COST) for i in range(n_blocks)},
        server={i: draw(COST) for i in range(n_blocks)},
        send={t: draw(st.one_of(COST, st.just(math.inf))) if t < n_inputs else draw(COST) for t in made},
        back={t: draw(COST) for t in outputs},
    )
    return CutGraph(tuple(blocks), tensors), costs


def brute_force(graph: CutGraph, costs: CutCosts, *, proper: bool = False) -> float:
    """Every block here, there or (cheap ones) both; what the server lacks is sent; impossible places are skipped."""
    best = math.inf
    choices = [((1, 0), (0, 1), (1, 1)) if b.cheap else ((1, 0), (0, 1)) for b in graph.blocks]
    for places in itertools.product(*choices):
        here = {i for i, p in enumerate(places) if p[0]}
        there = {i for i, p in enumerate(places) if p[1]}
        if proper and not (here & set(graph.proper) and there & set(graph.proper)):
            continue
        known = {t for t, v in enumerate(graph.tensors) if v.is_input} | {
            t for i in here for t in graph.blocks[i].writes
        }
        if any(t not in known for i in here for t in graph.blocks[i].reads):
            continue
        made = {t for i in there for t in graph.blocks[i].writes}
        sent = {t for i in there for t in graph.blocks[i].reads} - made
        if not sent <= known:
            continue
        total = sum(costs.device[i] for i in here) + sum(costs.server[i] for i in there)
        total += sum(costs.send[t] for t in sent)
        total += sum(costs.back[t] for t, v in enumerate(graph.tensors) if v.is_output and t in made - known)
        best = min(best, total)
    return best


@given(graphs())
@settings(max_examples=80, deadline=None)
def test_no_place_of_any_block_is_cheaper(drawn: tuple[CutGraph, CutCosts]) -> None:
    graph, costs = drawn
    cut = mincut.best(graph, costs)
    expected = brute_force(graph, costs)
    assert cut.total == pytest.approx(expected, rel=2e-5, abs=1e-9)
    assert cut.total == pytest.approx(mincut.cost_of(graph, costs, cut))


@given(graphs())
@settings(max_examples=80, deadline=None)
def test_the_best_cut_with_work_on_both_sides(drawn: tuple[CutGraph, CutCosts]) -> None:
    graph, costs = drawn
    cut, expected = mincut.best_proper(graph, costs), brute_force(graph, costs, proper=True)
    if math.isinf(expected):
        assert cut is None
    else:
        assert cut is not None
        assert 0 < len(cut.head) < len(graph.proper)
        assert cut.total == pytest.approx(expected, rel=2e-5, abs=1e-9)


@pytest.mark.slow
@given(graphs())
@settings(max_examples=1000, deadline=None)
def test_no_place_of_any_block_is_cheaper_on_many_graphs(drawn: tuple[CutGraph, CutCosts]) -> None:
    graph, costs = drawn
    assert mincut.best(graph, costs).total == pytest.approx(brute_force(graph, costs), rel=2e-5, abs=1e-9)


def test_a_tensor_with_many_readers_is_paid_once() -> None:
    # input -> a -> (x, y, z on the server): without the vertex of its own, a's tensor would be paid three times.
    blocks = (block("a", (0,), (1,)), block("x", (1,), (2,)), block("y", (1,), (3,)), block("z", (1,), (4,)))
    tensors = (tensor("in", is_input=True), tensor("t"), *(tensor(n, is_output=True) for n in "xyz"))
    graph = CutGraph(blocks, tensors)
    costs = CutCosts(
        device={0: 1.0, 1: 100.0, 2: 100.0, 3: 100.0},
        server={0: 100.0, 1: 1.0, 2: 1.0, 3: 1.0},
        send={0: 500.0, 1: 10.0},
    )
    cut = mincut.best(graph, costs)
    assert (cut.head, cut.wire, cut.total) == (frozenset({0}), (1,), 1 + 10 + 3)


def test_nothing_returns_from_server_to_device() -> None:
    # b is cheap on the server and a, c on the device; but c reads b, so a head {a, c} does not exist.
    graph = CutGraph(
        (block("a", (0,), (1,)), block("b", (1,), (2,)), block("c", (2,), (3,))),
        (tensor("in", is_input=True), tensor("t1"), tensor("t2"), tensor("out", is_output=True)),
    )
    costs = CutCosts(device={0: 1, 1: 50, 2: 1}, server={0: 60, 1: 1, 2: 60}, send={0: 60, 1: 1, 2: 1})
    cut = mincut.best(graph, costs)
    assert cut.head == frozenset({0, 1, 2})
    assert cut.total == 52.0


def test_what_is_forbidden_is_never_sent() -> None:
    graph = CutGraph(
        (block("a", (0,), (1,)), block("b", (1,), (2,))),
        (tensor("in", is_input=True), tensor("t1"), tensor("out", is_output=True)),
    )
    costs = CutCosts(device={0: 1000.0, 1: 1000.0}, server={0: 1.0, 1: 1.0}, send={0: math.inf, 1: 5.0})
    assert mincut.best(graph, costs).wire == (1,)
    never = CutCosts(device={0: math.inf, 1: 1.0}, server={0: math.inf, 1: 1.0})
    with pytest.raises(ModelError, match="forbidden"):
        mincut.best(graph, never)


def random_graph(n: int, seed: int) -> tuple[CutGraph, CutCosts]:
    """A deep graph of `n` blocks with skip connections, costs over five orders of magnitude."""
    rng = random.Random(seed)
    blocks, last = [], 0
    for i in range(n):
        reads = {last, *(max(0, last - rng.randrange(1, 200)) for _ in range(rng.randrange(0, 3)))}
        last = i + 1
        blocks.append(block(f"b{i}", tuple(sorted(reads)), (last,), cheap=rng.random() < 0.05))
    tensors = tuple(tensor(f"t{t}", is_input=t == 0, is_output=t == n) for t in range(n + 1))
    costs = CutCosts(
        device={i: 10 ** rng.uniform(-3, 2) for i in range(n)},
        server={i: 10 ** rng.uniform(-4, 1.9) for i in range(n)},
        send={t: 10 ** (5 - 7 * min(1, 3 * t / n) + rng.uniform(0, 2)) for t in range(n + 1)},
        back={n: 1.0},
    )
    return CutGraph(tuple(blocks), tensors), costs


def test_a_thousand_blocks_against_the_cuts_of_the_stored_order() -> None:
    graph, costs = random_graph(1000, 1)
    cut = mincut.best(graph, costs)
    assert all(graph.parents[i] <= cut.head for i in cut.head)
    for head in list(graph.linear())[::50]:
        wire = mincut.wire_of(graph, head, costs.send)
        assert mincut.cost_of(graph, costs, wire) >= cut.total * (1 - 1e-5)


@pytest.mark.slow
def test_ten_thousand_blocks(record_property) -> None:
    for seed in range(3):
        graph, costs = random_graph(10_000, seed)
        begun = time.perf_counter()
        cut = mincut.best(graph, costs)
        took = time.perf_counter() - begun
        record_property(f"seconds_{seed}", took)
        print(f"10,000 blocks, seed {seed}: {took:.2f} s, {len(cut.head)} in the head, {len(cut.wire)} tensors cross")
        assert all(graph.parents[i] <= cut.head for i in cut.head)
