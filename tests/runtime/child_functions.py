"""What the tests run in child processes; importable there by name."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass

import numpy as np

from featherweight.errors import DataError
from featherweight.runtime import sandbox


def add_one(x):
    x += 1  # arrays that arrive must be writable
    return x


def segfault():
    ctypes.string_at(0)


def fill_memory(total_bytes):
    kept = []
    while sum(k.nbytes for k in kept) < total_bytes:
        kept.append(np.ones(16 << 20, np.uint8))
    return len(kept)


def data_error(text):
    raise DataError(text)


def value_error():
    raise ValueError("the law, the value")


class OddError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def odd_error():
    raise OddError(1, 2)


def count_to(n, progress=None):
    for i in range(n):
        progress(i + 1, n)
    return n


def report_directly():
    sandbox.report_progress(3, 4)
    return sandbox.in_child()


def sleep_forever(path):
    with open(path, "w") as f:
        f.write(str(os.getpid()))
    time.sleep(600)


def unpicklable():
    return lambda: 1


def noisy():
    print("to stdout")
    os.write(2, b"to stderr\n")
    return 1


def noisy_exit():
    os.write(2, b"the allocator is unhappy\n")
    os._exit(7)


@dataclass
class Batch:
    feeds: dict
    labels: object
    n: int


class Data:
    """Picklable data: three batches of `n` rows made from a seed."""

    n_batches = 3
    rows_per_sample = 1

    def __init__(self, n=4, labelled=True):
        self.n, self.labelled = n, labelled

    def batches(self):
        for i in range(self.n_batches):
            rng = np.random.default_rng(i)
            x = rng.standard_normal((self.n, 3)).astype(np.float32)
            yield Batch({"x": x}, rng.integers(0, 4, self.n) if self.labelled else None, self.n)


def hits(outputs, labels):
    return outputs["y"].argmax(1) == labels


def hit_rate(outputs, labels):
    return float(np.mean(outputs["y"].argmax(1) == labels))


def broken_metric(outputs, labels):
    raise KeyError("no such column")


def wrong_length(outputs, labels):
    return np.zeros(len(labels) + 1)


hits.per_batch = True
