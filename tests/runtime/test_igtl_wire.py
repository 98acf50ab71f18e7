"""OpenIGTLink on the wire: what is packed comes back, for pyigtl too; what is damaged is refused by its reason."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_runtime.numerics import native
from tinyusfm_runtime.transport import igtl_wire as wire
from tinyusfm_runtime.transport.crc64 import POLYNOMIAL, crc64, crc64_numpy

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)
MOMENT_NS = 1_700_000_000_123_456_789


def make_image(rows: int = 12, columns: int = 20, channels: int = 1, dtype: str = "u1") -> np.ndarray:
    shape = (rows, columns) if channels == 1 else (rows, columns, channels)
    return np.random.default_rng(rows * columns).integers(0, 127, shape).astype(dtype)


def envelope(version: int = 1, **more: Any) -> wire.IgtlEnvelope:
    return wire.IgtlEnvelope(device="Image_Probe", t_unix_ns=MOMENT_NS, header_version=version, **more)


def read(data: bytes) -> wire.IgtlMessage:
    header = wire.unpack_header(data[: wire.HEADER_BYTES])
    return wire.unpack_body(header, data[wire.HEADER_BYTES :])


def bit_by_bit(data: bytes) -> int:
    """The definition of the checksum."""
    crc = 0
    for byte in data:
        crc ^= byte << 56
        for _ in range(8):
            crc = ((crc << 1) ^ (POLYNOMIAL if crc >> 63 else 0)) & (1 << 64) - 1
    return crc


# the checksum


@EXAMPLES
@given(st.binary(max_size=3000))
def test_every_way_to_the_checksum_gives_its_definition(data: bytes) -> None:
    want = bit_by_bit(data)
    assert crc64_numpy(np.frombuffer(data, np.uint8)) == want and crc64(data) == want
    assert crc64(b"\0" * 9 + data) == want, "zeros in front change nothing: the length is guarded elsewhere"


@pytest.mark.parametrize("size", [1023, 1024, 1025, 65_537, 307_200])
def test_checksum_of_long_data(size: int) -> None:
    octets = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    crcmod = pytest.importorskip("crcmod", reason="comes with pyigtl")
    want = crcmod.mkCrcFun(0x142F0E1EBA9EA3693, rev=False, initCrc=0, xorOut=0)(octets.tobytes())
    assert crc64_numpy(octets) == want
    if native.available():
        assert native.crc64(octets) == want


def test_a_checksum_of_another_polynomial_is_noticed() -> None:
    crcmod = pytest.importorskip("crcmod", reason="comes with pyigtl")
    wrong = crcmod.mkCrcFun(0x1000000000000001B, rev=False, initCrc=0, xorOut=0)
    assert wrong(b"any image") != crc64(b"any image")


# there and back


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "i2", ">u2", "f4", "f8"])
def test_an_image_comes_back(version: int, channels: int, dtype: str) -> None:
    sent = make_image(channels=channels, dtype=dtype)
    message = read(wire.pack_image(sent, envelope(version, message_id=7), spacing_mm=(0.21, 0.3)))
    image = wire.unpack_image(message)
    np.testing.assert_array_equal(image.pixels, sent)
    assert image.pixels.dtype == sent.dtype.newbyteorder("=")
    assert image.spacing_mm == (0.21, 0.3) and not image.ras
    np.testing.assert_allclose(image.matrix[:, 3], [9.5 * 0.3, 5.5 * 0.21, 0], rtol=1e-6)
    assert message.header.kind == "IMAGE" and message.header.device == "Image_Probe"
    assert message.header.t_unix_ns == pytest.approx(MOMENT_NS, abs=1)
    assert message.message_id == (7 if version == 2 else None)


@EXAMPLES
@given(
    t_ns=st.integers(0, wire.MAX_TIME_S * 10**9),
    metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=30), max_size=5),
    text=st.text(max_size=60),
    number=st.integers(0, 2**32 - 1),
)
def test_texts_times_and_metadata_come_back(t_ns: int, metadata: dict[str, str], text: str, number: int) -> None:
    around = wire.IgtlEnvelope(device="x", t_unix_ns=t_ns, header_version=2, message_id=number, metadata=metadata)
    message = read(wire.pack_string(text, around))
    assert wire.unpack_string(message) == text
    assert message.metadata == metadata and message.message_id == number
    assert abs(message.header.t_unix_ns - t_ns) <= 1


def test_a_status_comes_back() -> None:
    assert wire.unpack_status(read(wire.pack_status(envelope(), text="alive"))) == (wire.STATUS_OK, "alive")
    assert wire.unpack_status(read(wire.pack_status(envelope(2), code=13))) == (13, "")


def test_a_content_of_unknown_type_is_left_alone() -> None:
    message = read(wire.pack("TRANSFORM", b"\x01" * 48, envelope()))
    assert bytes(message.content) == b"\x01" * 48
    with pytest.raises(wire.WireError) as caught:
        wire.unpack_image(message)
    assert caught.value.reason == "content"


# pyigtl, an independent implementation


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_pyigtl_reads_what_is_packed_and_packs_the_same_bytes(version: int, channels: int) -> None:
    pyigtl = pytest.importorskip("pyigtl", reason="install tinyusfm-edge[test]")
    sent = make_image(channels=channels)
    around = wire.IgtlEnvelope(
        device="Image_Probe", t_unix_ns=MOMENT_NS, header_version=version, metadata={"a": "b"} if version == 2 else {}
    )
    ours = wire.pack_image(sent, around, spacing_mm=(0.5, 0.25))
    base = pyigtl.messages.MessageBase
    theirs = base.create_message("IMAGE")
    theirs.unpack(base.parse_header(ours[:58]), ours[58:])
    np.testing.assert_array_equal(theirs.image.reshape(sent.shape), sent)
    assert theirs.metadata == around.metadata

    matrix = np.diag([0.25, 0.5, 1.0, 1.0])
    volume = sent.reshape(1, *sent.shape) if channels == 3 else sent.reshape(1, *sent.shape, 1)
    back = pyigtl.ImageMessage(volume, ijk_to_world_matrix=matrix, device_name="Image_Probe")
    back.timestamp, back.header_version = MOMENT_NS / 1e9, version
    back.metadata = dict(around.metadata)
    packed = back.pack()
    assert packed[58:] == ours[58:], "everything behind the header, to the byte"
    assert packed[:34] == ours[:34] and packed[42:] == ours[42:], "the header, but for rounding of the time"
    image = wire.unpack_image(read(packed))
    np.testing.assert_array_equal(image.pixels, sent)
    assert image.spacing_mm == (0.5, 0.25)


def test_pyigtl_text_and_its_flat_image_are_read() -> None:
    pyigtl = pytest.importorskip("pyigtl", reason="install tinyusfm-edge[test]")
    text = pyigtl.StringMessage("head 312 mm", device_name="HC")
    assert wire.unpack_string(read(text.pack())) == "head 312 mm"
    sent = make_image(9, 33)
    flat = pyigtl.ImageMessage(sent, ijk_to_world_matrix=np.diag([1, 0.25, 0.5, 1]), device_name="flat")
    image = wire.unpack_image(read(flat.pack()))
    np.testing.assert_array_equal(image.pixels, sent)
    assert image.spacing_mm == (0.5, 0.25)


# damage


def sealed(content: bytes, version: int = 1, kind: str = "IMAGE") -> bytes:
    return wire.pack(kind, content, envelope(version))


def image_content(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "version": 1, "channels": 1, "scalar": 3, "endian": 2, "coordinates": 2, "size": (20, 12, 1),
        "matrix": (1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0), "offset": (0, 0, 0), "part": (20, 12, 1), "data": bytes(240),
    }  # fmt: skip
    fields.update(changes)
    data = fields.pop("data")
    flat: list[Any] = []
    for value in fields.values():
        flat += value if isinstance(value, tuple) else (value,)
    return struct.pack(">HBBBB3H12f3H3H", *flat) + data


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"\x00\x00", "header"),
        (0, b"\x00\x09", "header"),
        (2, b"\xff", "header"),
        (2, b"\x00", "header"),
        (16, b"\n", "header"),
        (34, b"\xff\xff\xff\xff", "time"),
        (42, b"\x00\x00\x01\x00\x00\x00\x00\x00", "size"),
    ],
)
def test_a_header_out_of_range_is_refused(at: int, value: bytes, reason: str) -> None:
    data = bytearray(wire.pack_status(envelope()))
    data[at : at + len(value)] = value
    with pytest.raises(wire.WireError) as caught:
        read(bytes(data))
    assert caught.value.reason == reason and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "content"),
        ({"channels": 0}, "content"),
        ({"channels": 5}, "content"),
        ({"channels": 3}, "size"),
        ({"scalar": 9}, "content"),
        ({"scalar": 5}, "size"),
        ({"endian": 0}, "content"),
        ({"coordinates": 3}, "content"),
        ({"size": (20, 13, 1), "part": (20, 13, 1)}, "size"),
        ({"size": (20, 6, 2), "part": (20, 6, 2)}, "content"),
        ({"size": (0, 12, 1), "part": (0, 12, 1), "data": b""}, "content"),
        ({"part": (20, 11, 1)}, "content"),
        ({"offset": (0, 1, 0)}, "content"),
        ({"matrix": (float("nan"), *[0.0] * 11)}, "geometry"),
        ({"matrix": (0.0,) * 12}, "geometry"),
        ({"matrix": (1e6, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)}, "geometry"),
        ({"data": bytes(239)}, "size"),
        ({"data": bytes(241)}, "size"),
    ],
)
def test_an_image_that_contradicts_itself_is_refused(changes: dict[str, Any], reason: str) -> None:
    wire.unpack_image(read(sealed(image_content())))
    with pytest.raises(wire.WireError) as caught:
        wire.unpack_image(read(sealed(image_content(**changes))))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "body",
    [
        b"\x00\x0c",
        struct.pack(">HHII", 11, 0, 0, 0),
        struct.pack(">HHII", 12, 2, 0, 0),
        struct.pack(">HHII", 12, 2, 0, 0) + b"\x00\x01",
        struct.pack(">HHII", 12, 0, 3, 0) + b"abc",
        struct.pack(">HHII", 12, 10, 2, 0) + struct.pack(">HHHI", 1, 1, 3, 2) + b"ab",
        struct.pack(">HHII", 12, 10, 2, 0) + struct.pack(">HHHI", 1, 1, 3, 0) + b"ab",
        struct.pack(">HHII", 12, 10, 2, 0) + struct.pack(">HHHI", 1, 1, 77, 1) + b"ab",
        struct.pack(">HHII", 12, 0xFFFF, 0xFFFFFFFF, 0),
    ],
)
def test_an_extended_header_that_does_not_fit_is_refused(body: bytes) -> None:
    plain = sealed(body)
    with pytest.raises(wire.WireError):
        read(b"\x00\x02" + plain[2:])


@EXAMPLES
@given(st.data())
def test_any_flipped_bit_behind_the_header_is_refused(data: st.DataObject) -> None:
    whole = bytearray(wire.pack_image(make_image(8, 8), envelope(data.draw(st.sampled_from([1, 2])))))
    bit = data.draw(st.integers(58 * 8, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(wire.WireError) as caught:
        read(bytes(whole))
    assert caught.value.reason == "crc"


@pytest.mark.parametrize(
    "make",
    [
        lambda: wire.pack("lower", b"", envelope()),
        lambda: wire.pack("IMAGE", b"", wire.IgtlEnvelope(device="x" * 21)),
        lambda: wire.pack("IMAGE", b"", wire.IgtlEnvelope(t_unix_ns=-1)),
        lambda: wire.pack("IMAGE", b"", wire.IgtlEnvelope(header_version=3)),
        lambda: wire.pack_string("x" * 65_536, envelope()),
        lambda: wire.pack_status(envelope(), code=-1),
        lambda: wire.pack_image(np.zeros((2, 2), np.complex64), envelope()),
        lambda: wire.pack_image(np.zeros((2, 2, 5), np.uint8), envelope()),
        lambda: wire.pack_image(np.zeros((2, 2), np.uint8), envelope(), spacing_mm=(0.0, 1.0)),
    ],
)
def test_what_cannot_be_said_is_not_packed(make: Any) -> None:
    with pytest.raises(wire.WireError):
        make()
