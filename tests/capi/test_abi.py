"""The ABI: exported names, sizes, misuse that must come back as a status."""

from __future__ import annotations

import ctypes as c
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.capi import binding
from tests.capi.binding import Failed, Library, Session
from tests.capi.conftest import SOURCE, MakeStub, run

SIZES = {
    "frame": 96, "reading": 488, "measurement": 1216, "options": 144, "artefact": 272, "trust_options": 72, "info": 136,
    "counters": 88, "lease": 32, "swap_options": 32, "swap_report": 376,
}  # fmt: skip
"""Bytes of every struct. A new field goes to the end, and its struct's size is raised here."""
RING = {
    "tue_shm_open", "tue_shm_write", "tue_shm_beat", "tue_shm_close", "tue_shm_attach", "tue_shm_room",
    "tue_shm_newest", "tue_shm_guard", "tue_shm_wait", "tue_shm_detach", "tue_shm_borrow", "tue_shm_look",
    "tue_shm_holds",
    "tue_shm_expect",
    "tue_res_open", "tue_res_write", "tue_res_newest",
}  # fmt: skip


def test_exactly_the_header_is_exported(library: Library) -> None:
    listed = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library.path).splitlines()}
    declared = set(re.findall(r"\btusfm_[a-z_]+(?=\()", (SOURCE / "include/tinyusfm.h").read_text(encoding="utf-8")))
    assert listed == set(library.names) | RING
    assert declared <= listed


def test_the_library_is_small(library: Library, tmp_path: Path) -> None:
    """Without what only a debugger reads; the limit is that of the redistributable."""
    if shutil.which("strip") is None:
        pytest.skip("strip is not installed")
    run("strip", "-o", tmp_path / "stripped.so", library.path.resolve())
    assert (tmp_path / "stripped.so").stat().st_size <= 400_000


def test_structs_have_the_sizes_they_had(library: Library) -> None:
    assert {name: c.sizeof(struct) for name, struct in binding.STRUCTS.items()} == SIZES
    assert library.lib.tusfm_abi() == binding.ABI and re.fullmatch(rb"\d+\.\d+\.\d+", library.lib.tusfm_version())


def test_the_binding_and_the_header_agree_about_every_field(tmp_path: Path) -> None:
    lines = ["#include <stddef.h>", "#include <stdio.h>", '#include "tinyusfm.h"', "int main(void) {"]
    for name, struct in binding.STRUCTS.items():
        lines += [f'printf("%zu\\n", offsetof(tusfm_{name}, {field}));' for field, *_ in struct._fields_]  # type: ignore[misc]
    (tmp_path / "offsets.c").write_text("\n".join([*lines, "return 0; }"]), encoding="utf-8")
    run("cc", "-std=c11", "-I", SOURCE / "include", tmp_path / "offsets.c", "-o", tmp_path / "offsets")
    wanted = [
        getattr(struct, field).offset
        for struct in binding.STRUCTS.values()
        for field, *_ in struct._fields_  # type: ignore[misc]
    ]
    assert [int(word) for word in run(tmp_path / "offsets").split()] == wanted


def test_older_and_newer_structs_are_read_by_their_size(library: Library, make_stub: MakeStub) -> None:
    bundle, lib = make_stub(), library.lib
    longer = (c.c_uint8 * 4000)()
    lib.tusfm_options_init(longer, 4000)
    assert c.c_uint32.from_buffer(longer).value == 4000 and not any(longer[c.sizeof(binding.Options) :])
    session = c.c_void_p()
    library.check(lib.tusfm_open(str(bundle).encode(), longer, c.byref(session)))
    pixels = np.zeros((64, 64), np.uint8)
    shorter = library.frame(pixels)
    shorter.struct_size, shorter.seq = 64, 12345  # a header that knew nothing of seq
    reading = (c.c_uint8 * 200)(*([0xAB] * 200))
    lib.tusfm_reading_init(reading, 100)
    library.check(lib.tusfm_predict(session, c.byref(shorter), reading))
    assert c.c_uint32.from_buffer(reading).value == 100 and all(byte == 0xAB for byte in reading[100:])
    assert c.c_int32.from_buffer(reading, 4).value == 1 and c.c_int64.from_buffer(reading, 16).value == 0
    lib.tusfm_close(session)


def test_a_program_of_an_older_header_goes_on_measuring(library: Library, make_stub: MakeStub) -> None:
    """Readings had 464 bytes before they had a window of drift, which such a program cannot be given."""
    y, x = np.mgrid[:64, :64]
    frame = library.frame(np.where((y - 30) ** 2 + (x - 30) ** 2 < 300, 200, 10).astype(np.uint8))
    monitor = c.c_void_p()
    library.check(library.lib.tusfm_drift_monitor_new(3, c.byref(monitor)))
    with Session(library, make_stub()) as session:
        older, now = library.make("reading"), session.predict(frame)
        library.lib.tusfm_reading_init(c.byref(older), 464)
        library.check(library.lib.tusfm_predict(session.handle, c.byref(frame), c.byref(older)))
        assert older.struct_size == 464 and np.isnan(older.drift_share) and older.area_px == now.area_px > 0
        assert [m.area_px for m in session.measurements(older)] == [older.area_px]
        with pytest.raises(Failed, match=r"INPUT.*build it with this header"):
            library.check(library.lib.tusfm_drift_observe(monitor, c.byref(older)))
    library.lib.tusfm_drift_monitor_free(monitor)
    library.lib.tusfm_drift_monitor_free(None)


def test_another_interface_number_is_refused(library: Library, make_stub: MakeStub) -> None:
    for abi in (0, 2):
        with pytest.raises(Failed, match="INPUT.*build it again"):
            Session(library, make_stub(), abi=abi)


def test_misuse_comes_back_as_a_status_and_changes_nothing(library: Library, make_stub: MakeStub) -> None:
    lib, bundle = library.lib, str(make_stub()).encode()
    there, session = c.c_int32(99), c.c_void_p(0x55)
    frame, reading = library.frame(np.zeros((64, 64), np.uint8)), library.make("reading")
    for call in (
        lambda: lib.tusfm_open(None, None, c.byref(session)),
        lambda: lib.tusfm_open(bundle, None, None),
        lambda: lib.tusfm_open(b"/nonexistent", None, c.byref(session)),
        lambda: lib.tusfm_open(bundle, c.byref(binding.Options()), c.byref(session)),
        lambda: lib.tusfm_open(bundle, c.byref(library.make("options", threads=-1)), c.byref(session)),
        lambda: lib.tusfm_open(bundle, c.byref(library.make("options", budget_ms=float("nan"))), c.byref(session)),
        lambda: lib.tusfm_open_memory(None, 3, None, c.byref(session)),
        lambda: lib.tusfm_open_memory(None, 0, None, c.byref(session)),
        lambda: lib.tusfm_open_reader(c.byref(binding.Reader()), None, c.byref(session)),
        lambda: lib.tusfm_predict(None, c.byref(frame), c.byref(reading)),
        lambda: lib.tusfm_newest(None, 0.0, c.byref(reading), c.byref(there)),
        lambda: lib.tusfm_get_artefact(None, None, 0, c.byref(library.make("artefact"))),
        lambda: lib.tusfm_get_artefact(bundle, None, 1, c.byref(library.make("artefact"))),
        lambda: lib.tusfm_get_artefact(bundle, None, -1, c.byref(library.make("artefact"))),
        lambda: lib.tusfm_get_artefact(bundle, None, 0, None),
        lambda: lib.tusfm_get_info(None, None),
        lambda: lib.tusfm_get_counters(None, None),
        lambda: lib.tusfm_submit(None, c.byref(frame)),
        lambda: lib.tusfm_swap(None, bundle, None, None),
        lambda: lib.tusfm_mask_on_frame(c.byref(reading), None, 0),
        lambda: lib.tusfm_drift_monitor_new(-1, c.byref(session)),
        lambda: lib.tusfm_drift_monitor_new(1 << 30, c.byref(session)),
        lambda: lib.tusfm_drift_monitor_new(0, None),
        lambda: lib.tusfm_drift_observe(None, c.byref(reading)),
    ):
        with pytest.raises(Failed, match="INPUT|BUNDLE"):
            library.check(call())
        assert session.value == 0x55 and there.value == 99
    lib.tusfm_close(None)
    lib.tusfm_cancel(None)
    lib.tusfm_contact(None)
    lib.tusfm_status_free(None)
    assert lib.tusfm_status_code(None) == 0 and lib.tusfm_status_text(None) == b""
    assert lib.tusfm_label(None, 0) is None


def test_frames_that_cannot_be_used_are_refused_one_by_one(library: Library, make_stub: MakeStub) -> None:
    good = np.zeros((64, 64), np.uint8)
    wrong = [
        {"pixels": None}, {"rows": 7}, {"columns": 0}, {"rows": 20000}, {"format": 4}, {"format": -1},
        {"row_stride": 63}, {"row_stride": -63}, {"roi_rows": 65, "roi_columns": 8}, {"roi_rows": 8, "roi_columns": 7},
        {"roi_row": -1, "roi_rows": 8, "roi_columns": 8}, {"roi_row": 60, "roi_rows": 8, "roi_columns": 8},
        {"roi_rows": -8, "roi_columns": 8}, {"roi_column": 1 << 30, "roi_rows": 8, "roi_columns": 1 << 30},
        {"spacing_row_mm": 0.2}, {"spacing_row_mm": float("nan"), "spacing_column_mm": 0.2},
        {"spacing_row_mm": -1.0, "spacing_column_mm": 1.0}, {"spacing_row_mm": 1e3, "spacing_column_mm": 1.0},
        {"seq": -1}, {"struct_size": 3}, {"struct_size": 1 << 30},
    ]  # fmt: skip
    with Session(library, make_stub()) as session:
        for fields in wrong:
            frame = library.frame(good)
            for name, value in fields.items():
                setattr(frame, name, value)
            with pytest.raises(Failed, match="FRAME"):
                session.predict(frame)
        assert session.predict(library.frame(good)).valid
