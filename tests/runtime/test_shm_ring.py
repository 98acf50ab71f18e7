"""The shared-memory ring: the C and the Python writer mean the same, and the source finds writers that come back."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fakes.live_rigs import image, until
from tinyusfm_runtime.errors import OutputError, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.sources import open_source
from tinyusfm_runtime.sources.shm import ShmSource
from tinyusfm_runtime.transport import shm_ring
from tinyusfm_runtime.transport.shm_writer import FOLDER, ShmWriter

CAPI = Path(__file__).parents[2] / "runtime" / "capi"
CC = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")

if not FOLDER.is_dir():
    pytest.skip("no /dev/shm here", allow_module_level=True)


@pytest.fixture
def name() -> Iterator[str]:
    text = f"tinyusfm-ring-{os.getpid()}-{time.monotonic_ns()}"
    yield text
    for path in FOLDER.glob(f"*{text}*"):
        path.unlink()


@pytest.fixture(scope="module")
def shm_probe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The example of runtime/capi, compiled with every warning an error and undefined behaviour trapped."""
    if CC is None:
        pytest.skip("no C compiler here")
    program = tmp_path_factory.mktemp("capi") / "shm_probe"
    sources = [str(CAPI / "examples" / "shm_probe.c"), str(CAPI / "shm_writer.c")]
    strict = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsanitize=undefined",
              "-fno-sanitize-recover"]  # fmt: skip
    subprocess.run([CC, *strict, f"-I{CAPI}", *sources, "-o", str(program)], check=True, capture_output=True)
    return str(program)


def ramp(rows: int, columns: int, index: int) -> np.ndarray:
    r, c = np.mgrid[:rows, :columns]
    return ((7 * r + 3 * c + 11 * index) % 251).astype(np.uint8)


def collect(source: ShmSource, count: int) -> list[Frame]:
    return [frame for _, frame in zip(range(count), source, strict=False)]


def test_the_c_writer_is_read_frame_by_frame(shm_probe: str, name: str) -> None:
    with open_source(f"shm:{name}") as source:
        process = subprocess.Popen([shm_probe, name, "37", "53", "40", "8000"], stdout=subprocess.PIPE)
        frames = []
        timer = threading.Timer(20, source.close)  # type: ignore[attr-defined]
        timer.start()
        for frame in source:
            frames.append(frame)
            if frame.seq >= 30:
                break
        timer.cancel()
        timer.join()
        process.communicate(timeout=20)
        counters = dict(source.counters)  # type: ignore[attr-defined]
    assert process.returncode == 0 and not (FOLDER / name).exists(), "it takes its ring away"
    assert len(frames) > 3 and set(counters) <= {"overtaken", "torn"}, counters
    for frame in frames:
        np.testing.assert_array_equal(frame.pixels, ramp(37, 53, frame.seq))
        assert (frame.spacing_mm, frame.t_source_ns, frame.orientation) == ((0.2, 0.3), 1000 * frame.seq, "MF")


def test_flat_out_nothing_is_torn(shm_probe: str, name: str) -> None:
    process = subprocess.Popen([shm_probe, name, "96", "128", "0", "0"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        with open_source(f"shm:{name}") as source:
            for frame in collect(source, 150):  # type: ignore[arg-type]
                np.testing.assert_array_equal(frame.pixels, ramp(96, 128, frame.seq))
            counters = source.counters  # type: ignore[attr-defined]
        assert counters["overtaken"] > 0 and not set(counters) - {"overtaken", "torn"}, counters
    finally:
        process.kill()
        process.communicate()


def test_the_header_and_python_agree_on_the_layout(tmp_path: Path) -> None:
    if CC is None:
        pytest.skip("no C compiler here")
    fields = (
        "generation seq t_source_ns rows row_stride flags pixels_crc32 spacing_row_mm crop orientation header_crc32"
    )
    lines = [f'printf("%zu ", offsetof(tue_shm_slot, {field}));' for field in fields.split()]
    lines += ['printf("%zu %zu ", offsetof(tue_shm_ring, header_crc32), offsetof(tue_shm_ring, published));']
    lines += ["uint64_t magic = TUE_SHM_MAGIC; fwrite(&magic, 8, 1, stdout);"]
    text = f'#include <stdio.h>\n#include "tue_shm_ring.h"\nint main(void) {{ {" ".join(lines)} return 0; }}\n'
    (tmp_path / "layout.c").write_text(text, encoding="ascii")
    subprocess.run([CC, f"-I{CAPI}", str(tmp_path / "layout.c"), "-o", str(tmp_path / "layout")], check=True)
    out = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True).stdout
    assert out.endswith(shm_ring.MAGIC)
    offsets = [int(part) for part in out[:-8].split()]
    assert offsets == [8, 16, 24, 40, 52, 56, 60, 64, 80, 96, 124, shm_ring.RING_CHECKED_BYTES, shm_ring.STATE_OFFSET]
    assert shm_ring.RING.size == shm_ring.SLOT.size == shm_ring.HEADER_BYTES
    header = (CAPI / "tue_shm_ring.h").read_text(encoding="utf-8")
    assert int(re.findall(r"TUE_SHM_VERSION (\d+)u", header)[0]) == shm_ring.VERSION


@pytest.mark.parametrize("pixel_format", list(PixelFormat))
def test_everything_a_frame_says_comes_through(name: str, pixel_format: PixelFormat) -> None:
    channels = {PixelFormat.GREY: 1, PixelFormat.RGBA: 4}.get(pixel_format, 3)
    pixels = np.stack([image(i) for i in range(channels)], axis=-1)
    sent = Frame(
        pixels=pixels[..., 0] if channels == 1 else pixels, pixel_format=pixel_format, seq=77, orientation="UN",
        video_range=VideoRange.LIMITED, spacing_mm=(0.1, 0.2), crop=(5, 6, 32, 48), t_source_ns=-5,
    )  # fmt: skip
    with ShmWriter(name, pixels.nbytes) as writer, open_source(writer.address) as source:
        writer.write(sent)
        got = next(iter(source))
    np.testing.assert_array_equal(got.pixels, sent.pixels)
    for field in ("pixel_format", "video_range", "spacing_mm", "seq", "orientation", "crop", "t_source_ns"):
        assert getattr(got, field) == getattr(sent, field), field


def test_options_overrule_what_the_writer_says(name: str) -> None:
    options = {"spacing_mm": (0.4, 0.5), "orientation": "MN", "crop": (4, 4, 16, 16)}
    with ShmWriter(name, 4096) as writer, open_source(f"shm:{name}", **options) as source:
        writer.write(Frame(pixels=image(1), spacing_mm=(0.1, 0.1), orientation="MF"))
        frame = next(iter(source))
    assert (frame.spacing_mm, frame.orientation, frame.crop) == ((0.4, 0.5), "MN", (4, 4, 16, 16))
    np.testing.assert_array_equal(frame.pixels, image(1)[4:20, 4:20])


def test_the_last_image_of_a_dead_writer_is_not_shown_and_its_successor_is_found(name: str) -> None:
    with ShmWriter(name, 4096) as dead:
        dead.write(Frame(pixels=image(1)))
        at = shm_ring.STATE_OFFSET + 8
        dead._memory[at : at + 8] = (time.monotonic_ns() - 3_000_000_000).to_bytes(8, "little")
        with open_source(f"shm:{name}") as source:
            shown: list[Frame] = []
            reader = threading.Thread(target=lambda: shown.append(next(iter(source))))
            reader.start()
            time.sleep(0.2)
            assert not shown
            with ShmWriter(name, 4096) as alive:
                # the successor's frame comes with the connection or after it, never the dead one's
                while reader.is_alive():
                    alive.write(Frame(pixels=image(2)))
                    reader.join(0.02)
            np.testing.assert_array_equal(shown[0].pixels, image(2))
            assert source.counters["reconnects"] == 1  # type: ignore[attr-defined]


def test_a_heartbeat_of_the_future_is_damage(name: str) -> None:
    with ShmWriter(name, 4096) as writer, open_source(f"shm:{name}") as source:
        writer.write(Frame(pixels=image(1)))
        next(iter(source))
        at = shm_ring.STATE_OFFSET + 8
        writer._memory[at : at + 8] = struct.pack("<Q", 1 << 62)
        thread = threading.Thread(target=lambda: list(source))
        thread.start()
        assert until(lambda: source.counters.get("heartbeat"))  # type: ignore[attr-defined]
        contact = source.last_contact_ns  # type: ignore[attr-defined]
        assert contact is not None and contact < time.monotonic_ns()
        source.close()  # type: ignore[attr-defined]
        thread.join()


def test_what_is_no_ring_is_counted_and_waited_out(name: str) -> None:
    (FOLDER / name).write_bytes(b"rubbish" * 100)
    with open_source(f"shm:{name}") as source:
        shown: list[Frame] = []
        reader = threading.Thread(target=lambda: shown.append(next(iter(source))))
        reader.start()
        assert until(lambda: source.counters.get("ring"))  # type: ignore[attr-defined]
        with ShmWriter(name, 4096) as writer:
            while reader.is_alive():
                writer.write(Frame(pixels=image(3)))
                reader.join(0.02)
    np.testing.assert_array_equal(shown[0].pixels, image(3))


def test_a_link_in_the_place_of_a_ring_is_not_followed(name: str, tmp_path: Path) -> None:
    with ShmWriter(f"{name}-real", 4096) as writer:
        writer.write(Frame(pixels=image(1)))
        (FOLDER / name).symlink_to(FOLDER / writer.name)
        with open_source(f"shm:{name}") as source:
            threading.Timer(0.2, source.close).start()  # type: ignore[attr-defined]
            assert list(source) == []


@pytest.mark.parametrize("bad", ["", "../etc", "a/b", ".hidden", "x" * 201, "a b"])
def test_names_that_leave_the_folder_are_refused(bad: str) -> None:
    with pytest.raises(SourceError):
        open_source(f"shm:{bad}")
    with pytest.raises(OutputError):
        ShmWriter(bad, 4096)


def test_a_frame_that_does_not_fit_is_refused(name: str) -> None:
    with ShmWriter(name, 64) as writer, pytest.raises(OutputError, match="does not fit"):
        writer.write(Frame(pixels=image(1)))
