"""Messages between a parent and its own child: one packed head, then the raw buffers of its arrays.

`multiprocessing` packs the head as it does for any connection; arrays travel beside it as they are, so a batch is
copied once by the kernel and never re-encoded. Both ends are our own processes on a private socket pair: no
byte of it ever comes from a file or a stranger.
"""

from __future__ import annotations

import io
from multiprocessing.reduction import ForkingPickler
from typing import Any

_CHUNK = 1 << 30  # Windows pipes and 32-bit lengths end near 2 GiB


def send(conn: Any, message: object) -> None:
    """Send any picklable object; raises what packing raises before anything is sent."""
    buffers: list[Any] = []
    packed = io.BytesIO()
    ForkingPickler(packed, 5, True, buffers.append).dump(message)
    raws = [b.raw() for b in buffers]
    head = io.BytesIO()
    ForkingPickler(head, 5).dump(([r.nbytes for r in raws], packed.getvalue()))
    conn.send_bytes(head.getvalue())
    for raw in raws:
        for start in range(0, raw.nbytes, _CHUNK):
            conn.send_bytes(raw[start : start + _CHUNK])


def receive(conn: Any) -> Any:
    """Receive what `send` sent; arrays are writable. Raises EOFError if the other end is gone."""
    sizes, packed = ForkingPickler.loads(conn.recv_bytes())
    buffers = []
    for size in sizes:
        buffer = bytearray(size)
        for start in range(0, size, _CHUNK):
            conn.recv_bytes_into(buffer, start)
        buffers.append(buffer)
    return ForkingPickler.loads(packed, buffers=buffers)
