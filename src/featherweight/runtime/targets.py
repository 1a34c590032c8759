"""What a model is compressed for: this machine, a shipped profile, or a profile file.

The fact that matters most is `int8_dot`: whether u8 x s8 products are summed without saturating pairs at 16 bits.
What cannot be found out counts as False, which is safe on every CPU and costs little on those that have it.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from featherweight.core import Profile
from featherweight.errors import DataError
from featherweight.runtime.profile_files import PROFILE_SCHEMA, profile_from_json, to_json

__all__ = [
    "MAX_PROFILE_BYTES",
    "PROFILE_SCHEMA",
    "THIS",
    "cpu_flags",
    "has_int8_dot",
    "is_this_machine",
    "load_profile",
    "parse_cpuinfo",
    "parse_sysctl",
    "profile_from_json",
    "profile_names",
    "quiet_cpus",
    "shipped_profiles",
    "this_machine",
    "to_json",
]

THIS = "this"
MAX_PROFILE_BYTES = 4 << 20
# Linux names of the instructions that multiply int8 and accumulate in 32 bits without saturating in between.
_DOT_FLAGS = {
    "x86_64": ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"),
    "arm64": ("asimddp", "i8mm", "svei8mm"),
}
_ARM_DOT_SYSCTL = "hw.optional.arm.FEAT_DotProd"
_WINDOWS_ARM_DOT = 43  # PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE


@functools.cache
def this_machine() -> Profile:
    """The machine this runs on; `threads` is the number of cores this process may use."""
    arch = _arch(platform.machine())
    flags = cpu_flags()
    return Profile(
        name=platform.node() or "this machine",
        arch=arch,
        threads=_cores(),
        memory_bytes=_memory_bytes(),
        int8_dot=has_int8_dot(arch, flags),
        cpu_flags=tuple(
            f for f in flags if f.startswith(("avx", "amx", "fma", "asimd", "i8mm", "sve", "bf16", "f16c"))
        ),
    )


def has_int8_dot(arch: str, flags: tuple[str, ...]) -> bool:
    """True if a CPU with these Linux-style flags multiplies int8 without saturating 16-bit pairs."""
    return any(f in flags for f in _DOT_FLAGS.get(arch, ()))


def cpu_flags() -> tuple[str, ...]:
    """Instruction set flags in Linux's spelling, sorted; as far as this system tells them."""
    if sys.platform == "linux":
        try:
            return parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
        except OSError:
            return ()
    if sys.platform == "darwin":
        return parse_sysctl(_sysctl("hw.optional", "machdep.cpu.features", "machdep.cpu.leaf7_features"))
    if sys.platform == "win32":
        import ctypes

        if _arch(platform.machine()) == "arm64" and ctypes.windll.kernel32.IsProcessorFeaturePresent(_WINDOWS_ARM_DOT):
            return ("asimddp",)
    return ()


def parse_cpuinfo(text: str) -> tuple[str, ...]:
    """Flags that *every* core of /proc/cpuinfo has (big.LITTLE chips differ), sorted."""
    cores = [
        set(value.split())
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return tuple(sorted(set.intersection(*cores))) if cores else ()


def parse_sysctl(text: str) -> tuple[str, ...]:
    """Lines of macOS `sysctl` as Linux flags: Arm features, and the lists of Intel Macs in lower case."""
    flags: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        key, value = key.strip(), value.strip()
        if key == _ARM_DOT_SYSCTL and value == "1":
            flags.add("asimddp")
        elif key == "hw.optional.arm.FEAT_I8MM" and value == "1":
            flags.add("i8mm")
        elif key == "hw.optional.avx512vnni" and value == "1":
            flags.add("avx512_vnni")
        elif key.startswith("machdep.cpu."):
            flags.update(value.lower().replace("avx512vnni", "avx512_vnni").split())
    return tuple(sorted(flags))


def quiet_cpus(count: int) -> tuple[int, ...]:
    """The `count` least busy of the cores this process may use (watched for 0.1 s); () where pinning is impossible."""
    if sys.platform != "linux":
        return ()
    import psutil

    allowed = sorted(os.sched_getaffinity(0))
    if count >= len(allowed):
        return tuple(allowed)
    busy = psutil.cpu_percent(interval=0.1, percpu=True)
    load = {cpu: busy[cpu] if cpu < len(busy) else 100.0 for cpu in allowed}
    return tuple(sorted(sorted(allowed, key=lambda c: (load[c], -c))[:count]))


def profile_names() -> tuple[str, ...]:
    """Names `load_profile` knows besides files."""
    shipped = (p.name[:-5] for p in _shipped().iterdir() if p.name.endswith(".json"))
    return (THIS, *sorted(shipped))


def shipped_profiles() -> tuple[Profile, ...]:
    """All shipped devices by memory, the smallest first; `portable` is none."""
    found = (load_profile(name) for name in profile_names() if name != THIS)
    return tuple(sorted((p for p in found if p.arch != "any"), key=lambda p: (p.memory_bytes, p.name)))


def is_this_machine(profile: Profile) -> bool:
    """True if a profile was measured on a machine like this one: the same processor features and memory."""
    here = this_machine()
    same = profile.measured and profile.arch == here.arch and profile.cpu_flags == here.cpu_flags
    return same and abs(profile.memory_bytes - here.memory_bytes) <= here.memory_bytes // 50


def load_profile(source: str | Path) -> Profile:
    """Profile by name (`this`: the machine itself; `portable` and others shipped) or path of a profile file.

    Raises:
        DataError: no such profile, or the file is not a profile of this version; the text says which field. An address
            of an agent is none: who can measure there asks it first.
    """
    if source == THIS:
        return this_machine()
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        raise DataError(f"'{source}' is an agent's address, and here a profile is needed: a name, or a JSON file")
    path = Path(source)
    if isinstance(source, str) and source in profile_names():
        return profile_from_json((_shipped() / f"{source}.json").read_text(), where=source)
    if not path.is_file():
        raise DataError(f"a profile must be one of {list(profile_names())} or a JSON file, but got '{source}'")
    if path.stat().st_size > MAX_PROFILE_BYTES:
        raise DataError(f"a profile must be at most {MAX_PROFILE_BYTES} B, but '{path}' has {path.stat().st_size} B")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"the profile '{path}' cannot be read: {e}") from e
    return profile_from_json(text, where=str(path))


def _shipped() -> Any:
    return resources.files("featherweight.runtime") / "profiles"


def _arch(machine: str) -> str:
    low = machine.lower()
    return {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}.get(low, low or "unknown")


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _sysctl(*names: str) -> str:
    try:
        done = subprocess.run(["sysctl", *names], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
