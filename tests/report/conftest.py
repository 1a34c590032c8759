"""A hand-made report, like one of a small image network."""

from __future__ import annotations

import pytest

from featherweight.core import (
    Action,
    Attempt,
    Budget,
    Decision,
    Effect,
    Interval,
    Measurement,
    Note,
    Plan,
    Report,
)

HOST = "x86_64, AVX2, 2 cores"


def measured(size: int, metric: float, drop: float, ratio: float) -> Measurement:
    return Measurement(
        size_bytes=size,
        metric_name="accuracy",
        metric=metric,
        drop=drop,
        drop_interval=Interval(drop - 0.008, drop + 0.008),
        p_value=0.81,
        n_samples=350,
        latency_ms=12.1 * ratio,
        p95_ms=13.0 * ratio,
        latency_ratio=ratio,
        peak_bytes=int(44_100_000 * ratio),
        load_ms=31.0,
        runtime="onnxruntime 1.32.0, CPU, 1 thread",
        host=HOST,
    )


def plan(layers: int, bits: int) -> Plan:
    decisions = tuple(
        Decision(f"blocks.{i}.conv.weight", (Action.of("static_int8", weight_bits=bits),)) for i in range(layers)
    )
    return Plan((*decisions, Decision("classifier.weight")), Effect(-1000, -1.0, 0, 0.02), 0.004, 3_900_000, "ab" * 32)


def layer(i: int) -> dict[str, object]:
    keep = i % 9 == 4
    return {
        "layer": f"/features/blocks.{i}/depthwise_with_a_long_name/conv{i % 3}/Conv",
        "op": "Conv",
        "shape": [32 + i, 16, 3, 3],
        "decision": "keep" if keep else f"static_int8(weight_bits={8 if i % 2 else 6})",
        "before_bytes": (32 + i) * 16 * 9 * 4,
        "after_bytes": (32 + i) * 16 * 9 * (4 if keep else 1),
        "macs": 1_000_000 * i,
        "int8": not keep,
        "float_cost_ms": 0.31 if keep else 0.0,
        "why": "fragile: integer compute costs 9 dB here" if keep and i == 4 else "",
    }


@pytest.fixture
def report() -> Report:
    """A met report of 40 layers, with an error among its attempts and notes that repeat."""
    attempts = (
        Attempt(0, plan(40, 8), measured(4_740_000, 0.874, 0.002, 0.657), "", 21.4),
        Attempt(1, plan(40, 4), measured(2_900_000, 0.848, 0.028, 0.66), "", 24.0),
        Attempt(2, plan(39, 3), None, "the child process was killed (signal 9, out of memory?)", 3.0),
    )
    notes = (
        *(Note(f"/se/mul{i}", "both inputs are computed: no weight here") for i in range(9)),
        Note("/head/[odd]name", "custom operator com.example::Fused: left alone"),
        Note("", "calibration images are darker than the evaluation images"),
    )
    return Report(
        Budget(max_size_bytes=5_000_000, max_drop=0.01, max_latency_ratio=0.7),
        "yes",
        "met",
        "every limit holds on 350 samples the search never saw",
        plan(40, 8),
        Measurement(
            18_600_000,
            "accuracy",
            0.876,
            0.0,
            latency_ms=12.1,
            p95_ms=13.0,
            latency_ratio=1.0,
            peak_bytes=44_100_000,
            load_ms=42.0,
            n_samples=350,
        ),
        attempts[0].measured,
        attempts,
        attempts[:2],
        notes,
        tuple(layer(i) for i in range(40)),
        {"model": "efficientnet-lite0.onnx", "seconds": 48.4, "calibration_samples": 150, "floors": {"8": 1}},
    )
