"""Profiles: what this machine can do, and profile files of strangers."""

from __future__ import annotations

import dataclasses
import json

import pytest

from featherweight.core import Profile
from featherweight.device import Kernel, Source
from featherweight.errors import DataError
from featherweight.runtime.targets import (
    THIS,
    has_int8_dot,
    is_this_machine,
    load_profile,
    parse_cpuinfo,
    parse_sysctl,
    profile_from_json,
    profile_names,
    shipped_profiles,
    this_machine,
    to_json,
)

GOOD = Profile("pi5", "arm64", 4, 8 << 30, True, ("asimddp",), measured=False)
FULL = Profile(
    "full", "arm64", 4, 8 << 30, True, ("asimddp",), "CPUExecutionProvider", True, "a board", "Cortex", 4, 1 << 34,
    {"float32": 30.5, "int8": 100.0}, 9.25, 25.0, 0.0, 60 << 20, False, 3.5, 11.0, 80.0, "EUR", "2023-12-24",
    "2026-11-28", ((1, 1.0), (4, 3.5)),
    (Kernel("matmul", "float32", (1, 2, 3), 0.5), Kernel("add", "int8", (64,), 1.0)),
    (Source("rates", "measured", "2026-11-28"),),
)  # fmt: skip


def test_this_machine_is_described():
    me = this_machine()
    assert me == load_profile(THIS)
    assert me.threads >= 1
    assert me.memory_bytes > 1 << 28
    assert me.measured


@pytest.mark.parametrize(
    ("arch", "flags", "dot"),
    [
        ("x86_64", ("avx2",), False),
        ("x86_64", ("avx2", "avx512f", "avx512bw"), False),
        ("x86_64", ("avx2", "avx_vnni"), True),
        ("x86_64", ("avx512_vnni",), True),
        ("arm64", ("asimd",), False),
        ("arm64", ("asimd", "asimddp"), True),
        ("x86_64", ("asimddp",), False),
        ("riscv64", ("avx_vnni",), False),
    ],
)
def test_int8_dot_follows_the_flags(arch, flags, dot):
    assert has_int8_dot(arch, flags) is dot


def test_a_flag_counts_only_if_every_core_has_it():
    text = "processor: 0\nFeatures\t: fp asimd asimddp\n\nprocessor: 1\nFeatures\t: fp asimd\n"
    assert parse_cpuinfo(text) == ("asimd", "fp")
    assert parse_cpuinfo("flags\t\t: fpu avx2 avx_vnni\nflags : fpu avx2 avx_vnni\n") == ("avx2", "avx_vnni", "fpu")
    assert parse_cpuinfo("") == ()


def test_macos_lines_become_linux_flags():
    assert parse_sysctl("hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n") == ("asimddp",)
    assert "avx512_vnni" in parse_sysctl("machdep.cpu.leaf7_features: AVX2 AVX512F AVX512VNNI\n")
    assert parse_sysctl("hw.optional.arm.FEAT_DotProd: 0\n") == ()


def test_the_portable_profile_is_safe_everywhere():
    assert "portable" in profile_names()
    assert load_profile("portable").int8_dot is False


def test_a_profile_survives_json(tmp_path):
    (tmp_path / "p.json").write_text(to_json(GOOD))
    assert load_profile(tmp_path / "p.json") == GOOD
    assert load_profile(str(tmp_path / "p.json")) == GOOD
    assert profile_from_json(to_json(FULL)) == FULL
    assert to_json(profile_from_json(to_json(FULL))) == to_json(FULL)


def test_what_is_not_known_is_not_written():
    assert set(json.loads(to_json(GOOD))) == {
        "schema", "name", "arch", "threads", "memory_bytes", "int8_dot", "cpu_flags", "provider", "measured",
        "onnxruntime",
    }  # fmt: skip
    assert json.loads(to_json(FULL))["node_us"] == 0.0  # zero is known


def test_a_file_of_the_first_schema_is_read():
    raw = {
        "schema": 1, "name": "old", "arch": "arm64", "threads": 4, "memory_bytes": 1 << 30, "int8_dot": False,
        "cpu_flags": [], "provider": "CPUExecutionProvider", "measured": False,
    }  # fmt: skip
    assert profile_from_json(json.dumps(raw)) == Profile("old", "arm64", 4, 1 << 30, False, measured=False)
    with pytest.raises(DataError, match=r"unknown=\['rates'\]"):
        profile_from_json(json.dumps(raw | {"rates": {"float32": 1.0}}))


def test_every_shipped_device_says_where_its_figures_are_from():
    devices = shipped_profiles()
    assert [p.memory_bytes for p in devices] == sorted(p.memory_bytes for p in devices)
    assert {"stm32h7", "raspberry-pi-4", "raspberry-pi-5", "phone", "jetson-orin-nano", "laptop", "server-gpu-t4"} <= {
        p.name for p in devices
    }
    for p in devices:
        assert p.predicts, p.name
        assert p.date, p.name
        assert p.description, p.name
        told = {word for s in p.sources for word in s.fields.replace(",", " ").split()}
        told |= {word.split(".")[0] for word in told}
        figures = {f for f in ("rates", "memory_gb_per_s", "call_us", "node_us", "idle_w", "busy_w", "price")
                   if getattr(p, f) not in (None, {})}  # fmt: skip
        assert p.measured or figures <= told, (p.name, figures - told)
        assert all(s.where.startswith(("https://", "assumed:", "measured")) for s in p.sources), p.name
    assert not any(p.onnxruntime for p in devices if p.memory_bytes < 1 << 26)


def test_this_machine_is_known_again():
    me = this_machine()
    assert is_this_machine(me)
    assert not is_this_machine(GOOD)
    assert not is_this_machine(dataclasses.replace(me, memory_bytes=me.memory_bytes * 2))
    assert not is_this_machine(dataclasses.replace(me, measured=False))


def test_an_address_is_no_profile():
    with pytest.raises(DataError, match="is an agent's address, and here a profile is needed"):
        load_profile("http://127.0.0.1:8000")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": 3}, "schema must be 1 to 2, but got 3"),
        ({"threads": 0}, "threads must be a whole number >= 1, but got 0"),
        ({"threads": True}, "threads must be a whole number"),
        ({"threads": 2.5}, "threads must be a whole number"),
        ({"memory_bytes": "8GB"}, "memory_bytes must be a whole number >= 1, but got '8GB'"),
        ({"int8_dot": 1}, "int8_dot must be true or false, but got 1"),
        ({"cpu_flags": "avx2"}, "cpu_flags must be a list of texts"),
        ({"cpu_flags": [1]}, "cpu_flags must be a list of texts"),
        ({"colour": "red"}, r"unknown=\['colour'\]"),
        ({"name": None}, "name must be a text, but got None"),
        ({"arch": 5}, "arch must be a text, but got 5"),
        ({"provider": []}, "provider must be a text"),
        ({"description": 1}, "description must be a text"),
        ({"cpu": 1}, "cpu must be a text"),
        ({"currency": 1}, "currency must be a text"),
        ({"measured": "yes"}, "measured must be true or false"),
        ({"onnxruntime": 0}, "onnxruntime must be true or false"),
        ({"cores": 0}, "cores must be a whole number >= 1, but got 0"),
        ({"cores": None}, "cores must be a whole number >= 1, but got None"),
        ({"storage_bytes": -1}, "storage_bytes must be a whole number"),
        ({"storage_bytes": 10**30}, "storage_bytes must be a whole number"),
        ({"runtime_bytes": 1.5}, "runtime_bytes must be a whole number"),
        ({"rates": [1]}, r"rates must be an object of numbers > 0 \(GMAC/s\) for float32, float16, int8, int4"),
        ({"rates": {"float32": 0}}, "rates must be"),
        ({"rates": {"float32": "fast"}}, "rates must be"),
        ({"rates": {"float12": 1.0}}, "rates must be"),
        ({"rates": {"int8": True}}, "rates must be"),
        ({"memory_gb_per_s": 0}, "memory_gb_per_s must be a number > 0, but got 0"),
        ({"memory_gb_per_s": float("inf")}, "memory_gb_per_s must be a number > 0, but got inf"),
        ({"memory_gb_per_s": float("nan")}, "memory_gb_per_s must be a number > 0, but got nan"),
        ({"call_us": -1}, "call_us must be a number >= 0, but got -1"),
        ({"node_us": "1"}, "node_us must be a number >= 0"),
        ({"idle_w": True}, "idle_w must be a number >= 0"),
        ({"busy_w": -0.1}, "busy_w must be a number >= 0"),
        ({"price": "80 EUR"}, "price must be a number >= 0"),
        ({"price_date": "24.12.2023"}, "price_date must be a date YYYY-MM-DD"),
        ({"date": "2026-13-01"}, "date must be a date YYYY-MM-DD"),
        ({"date": 20261128}, "date must be a date YYYY-MM-DD"),
        ({"thread_scaling": [[1, 1.0, 2]]}, "thread_scaling must be a list of pairs"),
        ({"thread_scaling": [[0, 1.0]]}, "thread_scaling must be a list of pairs"),
        ({"thread_scaling": {"1": 1.0}}, "thread_scaling must be a list of pairs"),
        ({"kernels": [["matmul", "float32", [1, 2, 3]]]}, "kernels must be a list of at most 20000 rows"),
        ({"kernels": [["matmul", "float32", [], 1.0]]}, "kernels must be"),
        ({"kernels": [["matmul", "float32", [0, 2, 3], 1.0]]}, "kernels must be"),
        ({"kernels": [["matmul", "float32", [1, 2, 3], 0]]}, "kernels must be"),
        ({"kernels": [[1, "float32", [1], 1.0]]}, "kernels must be"),
        ({"kernels": [["add", 8, [1], 1.0]]}, "kernels must be"),
        ({"kernels": [["matmul", "float32", [1, 2], 1.0]]}, "a kernel of kind matmul has 3 dims"),
        ({"kernels": [["add", "float32", [1, 2], 1.0]]}, "a kernel of kind add has 1 dims"),
        ({"kernels": "none"}, "kernels must be"),
        ({"sources": [["rates", "somewhere"]]}, "sources must be a list of rows"),
        ({"sources": [["rates", "somewhere", "today"]]}, "sources must be a list of rows"),
        ({"schema": True}, "schema must be 1 to 2, but got True"),
    ],
)
def test_wrong_fields_are_named(change, text):
    raw = json.loads(to_json(FULL)) | change
    with pytest.raises(DataError, match=text):
        profile_from_json(json.dumps(raw), where="p.json")


def test_hostile_profile_files_are_refused(tmp_path):
    raw = json.loads(to_json(GOOD))
    del raw["int8_dot"]
    with pytest.raises(DataError, match=r"missing=\['int8_dot'\]"):
        profile_from_json(json.dumps(raw))
    with pytest.raises(DataError, match="must be JSON"):
        profile_from_json("[" * 100_000)
    with pytest.raises(DataError, match="must be a JSON object, but is a list"):
        profile_from_json("[]")
    with pytest.raises(
        DataError, match=r"must be one of \['this', 'jetson.*'stm32h7'\] or a JSON file, but got 'ghost'"
    ):
        load_profile("ghost")
    (tmp_path / "big.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(DataError, match="at most 4194304 B"):
        load_profile(tmp_path / "big.json")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load_profile(tmp_path / "latin.json")
