"""Structs that are written down again in another language are those of the header: names, kinds, places, sizes."""

from __future__ import annotations

import ctypes as c
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.capi import binding
from tests.capi.conftest import SOURCE
from tests.capi.header import Field, by_compiler, layout, of_c_sharp, of_header, of_rust

EXAMPLES: dict[str, tuple[Callable[[Path], dict[str, list[Field]]], Path]] = {
    "C#": (of_c_sharp, SOURCE / "examples" / "Predict.cs"),
    "Rust": (of_rust, SOURCE / "examples" / "predict.rs"),
}


def test_the_header_is_read_as_the_compiler_reads_it(tmp_path: Path) -> None:
    """Every public struct; what the other tests compare with."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    structs = of_header()
    assert set(binding.STRUCTS) | {"file", "reader"} == set(structs)
    for name, fields in structs.items():
        assert [(place, size) for _, _, place, size in layout(fields)] == by_compiler(name, fields, tmp_path), name


@pytest.mark.parametrize("language", EXAMPLES)
def test_an_example_declares_the_beginning_of_each_struct(language: str) -> None:
    """It may end early: struct_size says so."""
    read, path = EXAMPLES[language]
    header, found = of_header(), read(path)
    assert {name.lower() for name in found} == {"frame", "options", "reading"}
    for name, fields in found.items():
        assert len(fields) >= 5
        assert layout(fields) == layout(header[name.lower()])[: len(fields)], f"{language}: {name}"


@pytest.mark.parametrize(
    ("language", "change"),
    [
        ("C#", ("public double hc_mm", "public long hc_mm")),
        ("C#", ("limited_range, phantom", "limited_range")),
        ("C#", ("SizeConst = 4", "SizeConst = 5")),
        ("Rust", ("age_ms: f64", "age_ms: i64")),
        ("Rust", ("measured: i32, found: i32", "found: i32, measured: i32")),
        ("Rust", ("mask: *const u8,", "")),
    ],
)
def test_an_example_that_differs_is_noticed(language: str, change: tuple[str, str], tmp_path: Path) -> None:
    read, path = EXAMPLES[language]
    text = path.read_text(encoding="utf-8")
    assert change[0] in text
    (tmp_path / path.name).write_text(text.replace(*change, 1), encoding="utf-8")
    header, found = of_header(), read(tmp_path / path.name)
    assert any(layout(fields) != layout(header[name.lower()])[: len(fields)] for name, fields in found.items())


def test_the_binding_of_the_tests_has_the_kinds_of_the_header() -> None:
    """Sizes alone would take a double for a long."""
    header = of_header()
    for name, struct in binding.STRUCTS.items():
        got = [(field, _kind(kind)) for field, kind, *_ in struct._fields_]  # type: ignore[misc]
        assert got == [(field.name, field.kind) for field in header[name]], name


def _kind(kind: type) -> str:
    kind = getattr(kind, "_type_", kind) if issubclass(kind, c.Array) else kind
    known = {c.c_uint32: "u4", c.c_int32: "i4", c.c_int64: "i8", c.c_uint64: "u8", c.c_double: "f8", c.c_char: "c1"}
    return known.get(kind, "p8")


def test_every_struct_begins_with_its_size_and_has_a_function_that_fills_it_in() -> None:
    text = (SOURCE / "include" / "tinyusfm.h").read_text(encoding="utf-8")
    filled = set(re.findall(r"void tusfm_(\w+)_init\(tusfm_\w+ \*\w+, size_t size\);", text))
    for name, fields in of_header().items():
        if name != "file":  # three plain words, which cannot grow
            assert fields[0] == Field("struct_size", "u4"), name
        assert (name in filled) == (name not in ("file", "reader")), name
