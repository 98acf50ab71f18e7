"""Arrays in .safetensors form come back as they were; hostile ones are refused before they are allocated."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tinyusfm_runtime.bundle.arrays import ArrayLimits, pack_arrays, unpack_arrays, unpack_metadata
from tinyusfm_runtime.errors import BundleError


def test_arrays_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float16),
        "b": np.asfortranarray(rng.normal(size=(3, 4))),
        "c": np.array(7, np.int64),
        "d": np.zeros((0, 5), np.uint8),
        "e": np.array([True, False]),
    }
    raw = pack_arrays(arrays, {"about": "five arrays"})
    assert raw == pack_arrays(dict(reversed(arrays.items())), {"about": "five arrays"}), "equal arrays give equal bytes"
    assert unpack_metadata(raw, "x") == {"about": "five arrays"} and unpack_metadata(pack_arrays(arrays), "x") == {}
    found = unpack_arrays(raw, "x")
    assert set(found) == set(arrays)
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype and array.shape == arrays[name].shape
        assert not array.flags.writeable and array.flags.aligned


def test_the_format_is_that_of_the_library() -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.array([1, 2, 3], np.uint8)}
    for name, array in library.load(pack_arrays(arrays, {"k": "v"})).items():
        np.testing.assert_array_equal(array, arrays[name])
    for name, array in unpack_arrays(library.save(arrays), "x").items():
        np.testing.assert_array_equal(array, arrays[name])


def packed(header: Any, content: bytes = b"") -> bytes:
    """A file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """What a header says about one array."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "short": b"PK",
    "header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": packed(b"no json at all"),
    "deep JSON": packed(b"[" * 200_000),
    "no object": packed([1]),
    "twice the same": packed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"1"),
    "more than there is": packed({"a": entry("U8", [10**12], 0, 10**12)}),
    "a product beyond bounds": packed({"a": entry("U8", [10**9] * 7, 0, 1)}, b"1"),
    "too many axes": packed({"a": entry("U8", [1] * 9, 0, 1)}, b"1"),
    "text as a side": packed({"a": entry("U8", [3_000_000_000, "a"], 0, 1)}, b"1"),
    "negative side": packed({"a": entry("U8", [-1], 0, 1)}, b"1"),
    "true as a side": packed({"a": entry("U8", [True], 0, 1)}, b"1"),
    "shorter than promised": packed({"a": entry("U8", [2], 0, 2)}, b"1"),
    "longer than promised": packed({"a": entry("U8", [1], 0, 1)}, b"12"),
    "a gap": packed({"a": entry("U8", [1], 1, 2)}, b"12"),
    "overlap": packed({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
    "negative place": packed({"a": entry("U8", [1], -1, 0)}, b"1"),
    "another length": packed({"a": entry("U8", [1], 0, 2)}, b"1"),
    "unknown type": packed({"a": entry("O", [1], 0, 8)}, b"12345678"),
    "type of another kind": packed({"a": entry(["F32"], [1], 0, 4)}, b"1234"),
    "no offsets": packed({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "cut": pack_arrays({"a": np.arange(9)})[:-3],
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_arrays_are_refused_without_being_allocated(raw: bytes) -> None:
    with pytest.raises(BundleError):
        unpack_arrays(raw, "golden/frames.safetensors")


def test_more_than_the_cap_is_refused() -> None:
    with pytest.raises(BundleError, match="more than"):
        unpack_arrays(
            pack_arrays({"a": np.zeros(2048, np.uint8)}),
            "golden/frames.safetensors",
            limits=ArrayLimits(total_bytes=1024),
        )
