"""Hosts on one machine: a network namespace each, joined by links with a rate, a delay, loss, and a switch.

The links are made here, packet by packet, between TUN devices (what `tc netem` does in kernels that have it): the
hosts' own TCP meets real delay, queues and silence. Needs root and /dev/net/tun on Linux.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NEWNET = 0x40000000
_STDIN = 0
_MOST_QUEUED_S = 0.25  # as in a home router; a packet that would wait longer is dropped


@dataclass(frozen=True)
class Cable:
    """A link between two hosts: megabits a second each way (a to b, b to a), milliseconds there and back, loss."""

    a: str
    b: str
    up_mbit_s: float
    down_mbit_s: float
    rtt_ms: float
    loss: float = 0.0


def address(hosts: list[str], host: str) -> str:
    """The address of a host."""
    return f"10.77.0.{hosts.index(host) + 1}"


@contextmanager
def network(hosts: list[str], cables: list[Cable]) -> Iterator[subprocess.Popen[str]]:
    """Namespaces named fw-HOST; write 'cut A B' or 'join A B' and a newline to the process's stdin."""
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        raise SystemExit("several hosts on one machine need root and /dev/net/tun")
    try:
        for host in hosts:
            _ip("netns", "add", f"fw-{host}")
            _ip("netns", "exec", f"fw-{host}", "ip", "tuntap", "add", "dev", "net0", "mode", "tun")
            _ip("netns", "exec", f"fw-{host}", "ip", "addr", "add", f"{address(hosts, host)}/24", "dev", "net0")
            for device in ("lo", "net0"):
                _ip("netns", "exec", f"fw-{host}", "ip", "link", "set", device, "up")
        spec = [f"{c.a},{c.b},{c.up_mbit_s},{c.down_mbit_s},{c.rtt_ms},{c.loss}" for c in cables]
        command = [sys.executable, "-m", "benchmarks.netlab", ",".join(hosts), *spec]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError("the links could not be made")
            yield process
        finally:
            process.terminate()
            process.wait()
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", f"fw-{host}"], check=False, capture_output=True)


def enter(host: str) -> None:
    """Let this thread, and those it starts from now on, be on `host`."""
    with open(f"/var/run/netns/fw-{host}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter fw-{host}")


def inside(host: str, command: list[str]) -> list[str]:
    """The command that runs `command` on `host`."""
    return ["ip", "netns", "exec", f"fw-{host}", *command]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Way:
    """One direction of a cable while packets pass."""

    out: int
    bytes_s: float
    delay_s: float
    loss: float
    free_at: float = 0.0
    up: bool = True


def forward(hosts: list[str], cables: list[Cable]) -> None:
    """Carry packets until killed; commands come on stdin."""
    tuns = {host: _tun(host) for host in hosts}
    ways: dict[tuple[str, str], Way] = {}
    for c in cables:
        ways[c.a, c.b] = Way(tuns[c.b], c.up_mbit_s * 125_000, c.rtt_ms / 2e3, c.loss)
        ways[c.b, c.a] = Way(tuns[c.a], c.down_mbit_s * 125_000, c.rtt_ms / 2e3, c.loss)
    by_address = {bytes(map(int, address(hosts, h).split("."))): h for h in hosts}
    by_fd = {fd: host for host, fd in tuns.items()}
    flying: list[tuple[float, int, bytes, Way]] = []
    rng, count = random.Random(0), 0
    print("ready", flush=True)
    while True:
        wait = max(flying[0][0] - time.monotonic(), 0.0) if flying else 1.0
        readable, _, _ = select.select([*by_fd, _STDIN], [], [], wait)
        now = time.monotonic()
        for source in readable:
            if source == _STDIN:
                _commands(os.read(_STDIN, 4096).decode(), ways)
                continue
            packet = os.read(source, 65536)
            way = ways.get((by_fd[source], by_address.get(packet[16:20], "")))
            if packet[0] >> 4 != 4 or way is None or not way.up or rng.random() < way.loss:
                continue
            start = max(now, way.free_at)
            if start - now > _MOST_QUEUED_S:
                continue
            way.free_at = start + len(packet) / way.bytes_s
            count += 1
            heapq.heappush(flying, (way.free_at + way.delay_s, count, packet, way))
        now = time.monotonic()
        while flying and flying[0][0] <= now:
            _, _, packet, way = heapq.heappop(flying)
            if way.up:
                os.write(way.out, packet)


def _commands(text: str, ways: dict[tuple[str, str], Way]) -> None:
    if not text:
        raise SystemExit
    for line in text.splitlines():
        word, a, b = line.split()
        for pair in ((a, b), (b, a)):
            ways[pair].up = word == "join"


def _tun(host: str) -> int:
    """The TUN device of a host's namespace, opened from here."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as here:
        enter(host)
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"net0", _IFF_TUN | _IFF_NO_PI))
        finally:
            libc.setns(here.fileno(), _NEWNET)
    return fd


if __name__ == "__main__":
    told = [c.split(",") for c in sys.argv[2:]]
    forward(sys.argv[1].split(","), [Cable(c[0], c[1], *map(float, c[2:])) for c in told])
