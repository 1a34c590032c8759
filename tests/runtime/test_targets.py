"""Profiles: what this machine can do, and profile files of strangers."""

from __future__ import annotations

import json

import pytest

from featherweight.core import Profile
from featherweight.errors import DataError
from featherweight.runtime.targets import (
    THIS,
    has_int8_dot,
    load_profile,
    parse_cpuinfo,
    parse_sysctl,
    profile_from_json,
    profile_names,
    this_machine,
    to_json,
)

GOOD = Profile("pi5", "arm64", 4, 8 << 30, True, ("asimddp",), measured=False)


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
    ],
)
def test_wrong_fields_are_named(change, text):
    raw = json.loads(to_json(GOOD)) | change
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
    with pytest.raises(DataError, match=r"must be one of \['this', 'portable'\] or a JSON file, but got 'ghost'"):
        load_profile("ghost")
    (tmp_path / "big.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(DataError, match="at most 4194304 B"):
        load_profile(tmp_path / "big.json")
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load_profile(tmp_path / "latin.json")
