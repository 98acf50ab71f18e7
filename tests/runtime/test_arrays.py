"""Arrays in .npz form come back as they were; hostile ones are refused before they are allocated."""

from __future__ import annotations

import zipfile
from io import BytesIO

import numpy as np
import pytest

from tinyusfm_runtime.arrays import pack_arrays, unpack_arrays
from tinyusfm_runtime.errors import BundleError


def test_arrays_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float16),
        "b": np.asfortranarray(rng.normal(size=(3, 4))),
        "c": np.array(7, np.int64),
        "d": np.zeros((0, 5), np.uint8),
    }
    raw = pack_arrays(arrays)
    assert raw == pack_arrays(arrays), "equal arrays give equal bytes"
    with np.load(BytesIO(raw), allow_pickle=False) as loaded:
        assert set(loaded) == set(arrays)
    for name, array in unpack_arrays(raw, "x").items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype and array.shape == arrays[name].shape
    saved = BytesIO()
    np.savez_compressed(saved, b=arrays["b"])
    np.testing.assert_array_equal(unpack_arrays(saved.getvalue(), "x")["b"], arrays["b"])


def zipped(**members: bytes) -> bytes:
    """A zip with these members."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def header(shape: str, dtype: str = "|u1") -> bytes:
    """The head of a .npy that promises a shape."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_hostile_arrays_are_refused_without_being_allocated() -> None:
    saved = BytesIO()
    np.savez(saved, a=np.array([{"x": 1}], dtype=object))
    hostile = [
        b"",
        b"PK",
        zipped(a=b""),
        zipped(a=b"no numpy"),
        zipped(a=header("(1000000000000,)")),
        zipped(a=header("(2,)") + b"1"),
        zipped(a=header("(1,)") + b"12"),
        zipped(a=header("(1,)", "|O") + b"12345678"),
        saved.getvalue(),
        pack_arrays({"a": np.arange(9)})[:-30],
    ]
    for raw in hostile:
        with pytest.raises(BundleError):
            unpack_arrays(raw, "golden/frames.npz")
    bomb = zipped(a=header("(50000000,)") + bytes(50_000_000))
    assert len(bomb) < 100_000
    with pytest.raises(BundleError, match="more than"):
        unpack_arrays(bomb, "golden/frames.npz", max_bytes=1 << 20)
