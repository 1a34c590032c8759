"""What is known of a device: frozen data only, read and written by `runtime.targets`, described in docs/formats.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Kernel(NamedTuple):
    """One measured operator: `us` microseconds inside the kernel on one thread.

    `kind` says what `dims` mean (docs/formats.md): "matmul" has (rows, depth, columns).
    """

    kind: str
    precision: str
    dims: tuple[int, ...]
    us: float


class Source(NamedTuple):
    """Where a figure is from: the `fields` it covers, an address (or "measured", "assumed: why"), when it was read."""

    fields: str
    where: str
    date: str


@dataclass(frozen=True, slots=True)
class Profile:
    """The target a model is compressed for. See docs/formats.md for the JSON form.

    `int8_dot`: the target's integer kernels accumulate u8 x s8 products without saturating pairs at
    16 bits (AVX-512 VNNI, AVX-VNNI, Arm dot product). Where False, weights must be pair-safe.
    `threads` is how many a call uses, `cores` how many the device has, `memory_bytes` what it has in all.

    Everything after `measured` is optional (schema 2); None, "" or empty is "not known". `rates` are GMAC/s that
    large products reach on `threads` threads, by precision (float32, float16, int8, int4: weights in 4 bits);
    `memory_gb_per_s` is 10^9 bytes/s read from main memory. `call_us` is spent once a call, `node_us` once a node,
    `runtime_bytes` is what the runtime takes before a model is loaded. `onnxruntime`: ONNX Runtime runs there at all.
    `thread_scaling` are pairs of a number of threads and the speed beside one thread. `price` is what the device costs
    to buy, in `currency` on `price_date`.
    """

    name: str
    arch: str
    threads: int
    memory_bytes: int
    int8_dot: bool
    cpu_flags: tuple[str, ...] = ()
    provider: str = "CPUExecutionProvider"
    measured: bool = True
    description: str = ""
    cpu: str = ""
    cores: int | None = None
    storage_bytes: int | None = None
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    memory_gb_per_s: float | None = None
    call_us: float | None = None
    node_us: float | None = None
    runtime_bytes: int | None = None
    onnxruntime: bool = True
    idle_w: float | None = None
    busy_w: float | None = None
    price: float | None = None
    currency: str = ""
    price_date: str = ""
    date: str = ""
    thread_scaling: tuple[tuple[int, float], ...] = ()
    kernels: tuple[Kernel, ...] = ()
    sources: tuple[Source, ...] = ()

    @property
    def predicts(self) -> bool:
        """True if there is enough to predict a latency: a float32 rate, or measured kernels."""
        return self.rates.get("float32", 0.0) > 0 or bool(self.kernels)
