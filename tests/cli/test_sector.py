"""``tinyusfm-edge sector``: a fan of known geometry is found again, words beside it are not kept, files come back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.needs import needs
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.sector import choose_sector, fan_pixels, find_sector, read_sector, sector_bytes
from tinyusfm_runtime.errors import InputError, SectorError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.numerics.sector import EVERY, FIRST_FRAMES, SectorWatch
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.reading_rules import ProbeGeometry, TokenSector
from tinyusfm_runtime.spec import PreprocessSpec

FAN = ProbeGeometry(name="fan", kind="sector", apex=(-0.1, 0.5), radii=(0.2, 1.05), angles_deg=(-35.0, 35.0))
WIDE = ProbeGeometry(name="wide", kind="sector", apex=(-0.1, 0.5), radii=(0.2, 1.05), angles_deg=(-60.0, 60.0))
SIZE = (224, 224)


def frames_of(probe: ProbeGeometry, count: int = 4, words: bool = True) -> list[Frame]:
    """Speckle in a fan, and a bright box in a corner that stands for words."""
    inside, random = fan_pixels(probe, SIZE), np.random.default_rng(5)
    made = []
    for seq in range(count):
        pixels = np.where(inside, random.integers(10, 200, SIZE), 0).astype(np.uint8)
        if words:
            pixels[4:12, 4:24] = 250
        made.append(Frame(pixels=pixels, seq=seq))
    return made


def tensor_of(frame: Frame) -> np.ndarray:
    """The model's input."""
    return preprocess(frame, PreprocessSpec())[0]


def test_a_fan_of_known_geometry_is_found_and_words_are_left_out() -> None:
    found = find_sector(frames_of(FAN), PreprocessSpec(), name="fan")
    assert found.probe is not None and found.probe.kind == "sector" and found.sector is not None
    assert found.probe.angles_deg == pytest.approx(FAN.angles_deg, abs=1.5)
    assert found.probe.apex == pytest.approx(FAN.apex, abs=0.03)
    assert found.fit > 0.95 and found.outside == 0.0
    filled = fan_pixels(FAN, SIZE).reshape(14, 16, 14, 16).sum(axis=(1, 3))
    kept = np.array([[digit == "1" for digit in row] for row in found.sector.kept])
    assert kept[filled >= 32].all() and not kept[filled == 0].any()
    assert found.sector.kept[0][0] == "0", "the words are no field of view"


def test_upright_sides_have_no_fan() -> None:
    pixels = np.zeros(SIZE, np.uint8)
    pixels[10:200, 60:170] = np.random.default_rng(1).integers(10, 200, (190, 110))
    found = find_sector([Frame(pixels=pixels)], PreprocessSpec())
    assert found.probe is not None and found.probe.kind == "linear" and not found.fan_HW.any()
    assert found.sector is not None and found.sector.indices[0] == 3


def test_what_cannot_be_a_sector_is_said() -> None:
    with pytest.raises(InputError, match="no frames"):
        find_sector([], PreprocessSpec())
    with pytest.raises(InputError, match="black"):
        find_sector([Frame(pixels=np.zeros(SIZE, np.uint8))], PreprocessSpec())
    with pytest.raises(InputError, match="no grid"):
        find_sector(frames_of(FAN, 1), PreprocessSpec(height=100))
    full = find_sector([Frame(pixels=np.full(SIZE, 90, np.uint8))], PreprocessSpec())
    assert full.sector is None and full.kept == 196


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a b"},
        {"kept": ["10", "1"]},
        {"kept": ["11"]},
        {"kept": ["00"]},
        {"kept": ["12"]},
        {"kept": []},
        {"kept": [1]},
        {"kept": "10"},
        {"more": 1},
    ],
)
def test_a_sector_is_read_strictly(change: dict[str, object]) -> None:
    good = {"name": "fan", "kept": ["10", "11"]}
    assert TokenSector.from_json(good).to_json() == good
    assert TokenSector.from_json(good).indices == (0, 2, 3)
    with pytest.raises(InputError):
        TokenSector.from_json({**good, **change})


def test_the_watch_refuses_another_sector_at_once_and_later_every_so_often() -> None:
    sector = find_sector(frames_of(FAN), PreprocessSpec(), name="fan").sector
    assert sector is not None
    fits, differs = tensor_of(frames_of(FAN)[0]), tensor_of(frames_of(WIDE)[0])
    narrow = ProbeGeometry(name="n", kind="sector", apex=FAN.apex, radii=(0.2, 0.9), angles_deg=(-20.0, 20.0))
    watch = SectorWatch(sector, ": try the other one")
    with pytest.raises(SectorError, match=r"'fan'.*try the other one"):
        watch.look(differs)
    for _ in range(FIRST_FRAMES):
        watch.look(fits)
        watch.look(tensor_of(frames_of(narrow)[0]))
    refused = 0
    for _ in range(EVERY):
        try:
            watch.look(differs)
        except SectorError:
            refused += 1
    assert refused >= 1
    with pytest.raises(SectorError):
        watch.look(differs)  # after a frame that did not fit each one is checked
    assert not sector.masked(differs)[0, 0][~sector.pixels_HW].any()


def test_the_command_writes_a_table_a_file_and_a_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("PIL", "pip install tinyusfm-edge[images]")
    folder, out, image = tmp_path / "images", tmp_path / "s.json", tmp_path / "s.png"
    folder.mkdir()
    for frame in frames_of(FAN):
        (folder / f"{frame.seq}.png").write_bytes(encode_png(frame.pixels))
    line = ["sector", str(folder), "--name", "convex-1", "--out", str(out), "--image", str(image)]
    assert main([*line, "--json", str(tmp_path / "told.json")]) == 0
    said = capsys.readouterr().out
    assert "patches" in said and "degrees" in said and "#" in said
    sector, probe = read_sector(out)
    told = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert sector.name == "convex-1" and list(sector.kept) == told["kept"] and probe is not None
    assert told["patches"] == [len(sector.indices), 196] and told["kind"] == "tinyusfm-edge sector"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert read_sector(_mask(tmp_path, sector))[0].kept == sector.kept
    assert main([*line, "--image-size", "100"]) == 2
    assert main(["sector", str(tmp_path / "gone")]) == 2


def test_files_that_are_no_sector_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "s.json"
    with pytest.raises(InputError, match="no sector file"):
        read_sector(place)
    place.write_text("{}", encoding="ascii")
    with pytest.raises(InputError, match="no sector file"):
        read_sector(place)
    place.write_text("{", encoding="ascii")
    with pytest.raises(InputError, match="cannot be read"):
        read_sector(place)
    place.write_bytes(sector_bytes(find_sector([Frame(pixels=np.full(SIZE, 90, np.uint8))], PreprocessSpec())))
    with pytest.raises(InputError, match="every patch is in view"):
        read_sector(place)
    with pytest.raises(InputError, match="linear"):
        fan_pixels(ProbeGeometry(name="l", kind="linear", apex=(0, 0.5), radii=(0, 1), angles_deg=(0, 0)), SIZE)


def test_an_export_takes_auto_a_fan_or_a_file_of_its_own_input_size(tmp_path: Path) -> None:
    spec, frames = PreprocessSpec(), frames_of(FAN)
    found = choose_sector("auto", frames, spec)
    assert found.sector is not None and "found in 4 frames" in found.note
    fan = choose_sector("-0.1,0.5,0.2,1.05,-35,35", [], spec)
    assert fan.sector is not None and fan.probe is not None and fan.probe.angles_deg == FAN.angles_deg
    differing = set(fan.sector.indices) ^ set(found.sector.indices)
    assert len(differing) <= 6, "the fan that was drawn is the one that was found, but for patches at its edge"
    assert choose_sector("auto", [Frame(pixels=np.full(SIZE, 90, np.uint8))], spec).sector is None
    place = tmp_path / "s.json"
    place.write_bytes(sector_bytes(find_sector(frames, spec)))
    assert choose_sector(str(place), [], spec).sector is not None
    for text, match in (
        ("auto", "in frames"),
        ("0,0.5,0,9,-89,89", "covers every patch|no patch"),
        ("1,2,3", "no sector file"),
    ):
        with pytest.raises(InputError, match=match):
            choose_sector(text, [], spec)
    with pytest.raises(InputError, match="an input of 224x224, the student's is 224x320"):
        choose_sector(str(place), [], PreprocessSpec(width=320))


def _mask(folder: Path, sector: TokenSector) -> Path:
    place = folder / "mask 1.png"
    place.write_bytes(encode_png(sector.pixels_HW.astype(np.uint8) * np.uint8(255)))
    return place
