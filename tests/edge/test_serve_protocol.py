"""Tensors and messages of the protocol, and packed tensors: what is right comes back, what is wrong is refused."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

pytest.importorskip("zstandard")

from featherweight.edge import protocol, wire
from featherweight.edge.protocol import Given, ProtocolError

NUMERIC = [d for d in protocol.NUMPY_OF if d != "BYTES"]


def sent_and_read(value, *, binary):
    """A value through a whole message."""
    tensor = protocol.pack("t", value) if binary else protocol.json_tensor("t", value)
    body, length = protocol.write_message({"id": "7"}, "inputs", [tensor])
    header, raw = protocol.split_body(body, None if length is None else str(length))
    message = protocol.read_message(header, raw, "inputs")
    assert message.header["id"] == "7"
    return protocol.unpack(message.tensors[0])


@pytest.mark.parametrize("datatype", NUMERIC)
@pytest.mark.parametrize("binary", [True, False])
def test_every_number_comes_back(datatype, binary):
    kind = np.dtype(protocol.NUMPY_OF[datatype])
    if kind.kind in "iu":
        value = np.array([[np.iinfo(kind).min, 0, np.iinfo(kind).max]], kind)
    elif kind.kind == "b":
        value = np.array([[True, False, True]])
    else:
        value = np.array([[np.finfo(kind).min, np.finfo(kind).tiny, 0.1]], kind)
    back = sent_and_read(value, binary=binary)
    assert back.dtype == kind
    assert np.array_equal(back, value)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(st.sampled_from([np.float32, np.int16, np.bool_]), hnp.array_shapes(max_dims=4, max_side=4)))
def test_binary_tensors_come_back_bit_by_bit(value):
    back = sent_and_read(value, binary=True)
    assert back.shape == value.shape
    assert back.tobytes() == value.tobytes()


@pytest.mark.parametrize("binary", [True, False])
def test_texts_come_back(binary):
    value = np.array([["", "héllo", "x" * 300]], object)
    assert np.array_equal(sent_and_read(value, binary=binary), value)


def test_bytes_are_little_endian_and_lengths_come_first():
    assert protocol.pack("t", np.array([1], np.int32)).raw == b"\x01\x00\x00\x00"
    assert protocol.pack("t", np.array(["ab"], object)).raw == b"\x02\x00\x00\x00ab"


def test_nested_and_flat_lists_mean_the_same():
    nested = protocol.unpack(Given("t", "FP32", (2, 2), {}, [[1, 2], [3, 4.5]], None))
    flat = protocol.unpack(Given("t", "FP32", (2, 2), {}, [1, 2, 3, 4.5], None))
    assert np.array_equal(nested, flat)


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("INT32", (1,), [1.5]),
        ("INT32", (1,), [True]),
        ("UINT8", (1,), [300]),
        ("UINT8", (1,), [-1]),
        ("INT64", (1,), [2**63]),
        ("FP32", (1,), [1e300]),
        ("FP64", (1,), [float("inf")]),
        ("FP64", (1,), [10**400]),
        ("FP32", (1,), ["1"]),
        ("FP32", (1,), [None]),
        ("BOOL", (1,), [1]),
        ("BYTES", (1,), [1]),
        ("FP32", (2,), [1]),
        ("FP32", (2, 2), [[1, 2], [3]]),
        ("FP32", (2, 2), [[1, 2, 3, 4]]),
        ("FP32", (1, 2), [[[1, 2]]]),
        ("FP32", (1,), {"a": 1}),
        ("BYTES", (2,), ["x" * 1000, 5]),
    ],
)
def test_json_values_that_are_no_such_tensor_are_refused(datatype, shape, data):
    with pytest.raises(ProtocolError):
        protocol.unpack(Given("t", datatype, shape, {}, data, None))


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": [1.0]},
        {"shape": "1"},
        {"shape": [2**70]},
        {"shape": [1] * 17},
        {"datatype": "BF16"},
        {"datatype": []},
        {"name": 3},
        {"name": ""},
        {"parameters": []},
        {"data": None},
        {"parameters": {"binary_data_size": 4}},
        {"data": None, "parameters": {"binary_data_size": -1}},
        {"data": None, "parameters": {"binary_data_size": 99}},
        {"data": None, "parameters": {"binary_data_size": True}},
        {"data": None, "parameters": {"binary_data_size": 3}},
    ],
)
def test_entries_that_break_the_protocol_are_refused(entry):
    whole = {"name": "t", "datatype": "FP32", "shape": [1], "data": [1.0], **entry}
    with pytest.raises(ProtocolError):
        protocol.read_message({"inputs": [whole]}, memoryview(b"abcd"), "inputs")


def test_binary_sizes_must_match_the_shape_even_when_the_product_is_huge():
    with pytest.raises(ProtocolError, match="must have"):
        protocol.unpack(Given("t", "FP32", (2**40, 2**40), {}, None, memoryview(b"abcd")))
    with pytest.raises(ProtocolError, match="must have"):
        protocol.unpack(Given("t", "BYTES", (2**40,), {}, None, memoryview(b"abcd")))


@pytest.mark.parametrize("raw", [b"\x05\0\0\0ab", b"\x01\0\0\0ab", b"\xff\xff\xff\xff", b"\x01\0\0\0\xff"])
def test_texts_that_lie_about_their_length_are_refused(raw):
    with pytest.raises(ProtocolError):
        protocol.unpack(Given("t", "BYTES", (1,), {}, None, memoryview(raw)))


def test_other_bytes_than_0_and_1_become_true():
    back = protocol.unpack(Given("t", "BOOL", (3,), {}, None, memoryview(b"\x00\x02\xff")))
    assert back.view(np.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize("length", ["-1", "5x", "99", "", "1e3", "٣"])
def test_json_length_must_be_a_number_of_bytes_that_are_there(length):
    with pytest.raises((ProtocolError, json.JSONDecodeError)):
        protocol.split_body(b"{}", length)


def test_nan_cannot_be_json():
    with pytest.raises(ProtocolError, match="NaN"):
        protocol.json_tensor("t", np.array([np.nan], np.float32))


# Packed tensors


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 50, 32), (400,), (64, 64), (1, 300)])
@pytest.mark.parametrize("encoding", ["int8", "int8+zstd"])
def test_packed_values_are_off_by_half_a_step_at_most(shape, encoding):
    value = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 7 - 2
    back = wire.decode(wire.encode(value, encoding), shape)
    axis = wire.channel_axis(shape)
    others = None if axis is None else tuple(a for a in range(len(shape)) if a != axis)
    span = value.max(axis=others, keepdims=True) - value.min(axis=others, keepdims=True)
    assert back.dtype == np.float32
    assert (np.abs(back - value) <= span / 255 / 2 * 1.0001 + 1e-6).all()


def test_zstd_alone_loses_nothing():
    value = np.maximum(np.random.default_rng(1).standard_normal((1, 8, 16, 16)).astype(np.float32), 0)
    packet = wire.encode(value, "zstd")
    assert np.array_equal(wire.decode(packet, value.shape), value)
    assert len(packet) < value.nbytes


def test_constant_channels_come_back_exactly():
    value = np.full((1, 4, 16, 16), 3.25, np.float32)
    assert np.array_equal(wire.decode(wire.encode(value, "int8+zstd"), value.shape), value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_codes_is_left_plain(bad):
    value = np.ones((1, 4, 16, 16), np.float32)
    value[0, 0, 0, 0] = bad
    assert wire.encode(value, "int8") is None
    assert wire.encode(np.ones(10, np.float32), "int8") is None


def hostile_packets():
    value = np.ones((1, 4, 16, 16), np.float32)
    good = wire.encode(value, "int8+zstd")
    plain = wire.encode(value, "int8")
    bomb = good[:8] + struct.pack("<4I", 1, 4, 16, 16) + __import__("zstandard").compress(bytes(100_000_000))
    return {
        "empty": b"",
        "cut": good[:-3],
        "no frame": good[:30],
        "longer": plain + b"x",
        "other magic": b"XXXX" + good[4:],
        "axis": good[:6] + b"\x09" + good[7:],
        "rank": good[:7] + b"\xff" + good[8:],
        "bomb": bomb,
        "nan scale": plain[:24] + b"\xff" * 16 + plain[40:],
        "two frames": good + good[24:],
    }


@pytest.mark.parametrize("name", list(hostile_packets()))
def test_wrong_packets_are_refused(name):
    with pytest.raises(ProtocolError):
        wire.decode(hostile_packets()[name], (1, 4, 16, 16))


def test_a_packet_of_another_shape_is_refused():
    value = np.ones((1, 4, 16, 16), np.float32)
    with pytest.raises(ProtocolError, match="declared shape"):
        wire.decode(wire.encode(value, "int8"), (1, 4, 16, 17))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 3))
def test_random_bytes_never_do_more_than_be_refused(noise, kind):
    packet = struct.pack("<4sBBBB2I", b"FWT1", kind & 1, kind >> 1, 255, 2, 4, 8) + noise
    try:
        assert wire.decode(packet, (4, 8)).shape == (4, 8)
        assert len(noise) >= math.prod((4, 8))
    except ProtocolError:
        pass
