"""A project of one's own.

A folder that trains, exports, verifies and runs at once, on phantoms.

The phantoms make room for real images: the table and the files are what ``data check`` and ``adapt`` read. It does not
know the command line.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.phantom import make_phantom

SPLITS: dict[str, range] = {"train": range(700, 732), "val": range(732, 768), "test": range(768, 776)}
"""Split -> seeds of its phantoms; the gate wants at least 32 validation frames with a mask."""
ROWS, COLUMNS = 120, 176
"""Of a phantom."""
SETTINGS = {"steps": 60, "batch": 16, "evaluate_every": 30, "warmup": 10, "ema": 0.98}
"""Of the training, small enough for a laptop; train.json holds them."""
RECIPE = """# tinyusfm-edge export --recipe recipe.toml: what is exported, for which device, within which time
version = 1
about = "my device"
targets = ["openvino"]
precisions = ["int8"]
threads = 1

[budget]
frame_ms = 33.0
measured = false
note = "one 30 fps frame period"
"""
MAKEFILE = """# From images to a verified bundle. `make` runs it whole on phantoms; then put your own images into data/.
TOOL ?= tinyusfm-edge
SIZE ?= 64

all: run
check:
	$(TOOL) data check data/
student.safetensors: data/split.csv train.json
	$(TOOL) adapt --task segment --data data/ --config train.json --image-size $(SIZE) --init fetal-head --out $@
evaluate: student.safetensors
	$(TOOL) evaluate student.safetensors --data data/ --split val --json scores.json
student.bundle: student.safetensors gate.toml recipe.toml
	$(TOOL) export student.safetensors --recipe recipe.toml --gate gate.toml --data data/ --out $@
verify: student.bundle
	$(TOOL) verify student.bundle --student student.safetensors --data data/ --gate gate.toml
run: student.bundle
	$(TOOL) run student.bundle data/images --jsonl results.jsonl
clean:
	rm -rf student.bundle student.run student.safetensors *.json.bak results.jsonl
.PHONY: all check evaluate verify run clean
"""
README = """# A project of tinyusfm-edge

Research software, not a medical device.

    make            # train, export, run: on phantoms, in minutes
    make check      # what the data folder holds and how it is understood
    make evaluate verify

| file | what it is |
|---|---|
| data/split.csv | one row per image: file, mask, split, group (patient), label, pixel_size_mm |
| data/images, data/masks | phantoms; replace them by your own images and masks |
| train.json | settings of the training; `tinyusfm-edge adapt ... --show-config` lists all of them |
| gate.toml | what an exported artefact must hold; `tinyusfm-edge gate show` explains every key |
| recipe.toml | targets, precisions and time per frame of your device |

With images of your own: keep patients together (`group`), set `SIZE=224` in the Makefile, raise `steps` in train.json.
"""


def make_project(folder: Path, *, gate: str) -> tuple[Path, ...]:
    """Writes a project.

    Args:
        folder: made if it is not there; must be empty.
        gate: text of gate.toml.

    Returns:
        The files, images left out.

    Raises:
        InputError: the folder holds something.
        OutputError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: give a new folder")
    try:
        for part in ("images", "masks"):
            (folder / "data" / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}") from error
    texts = {
        "data/split.csv": _write_images(folder / "data"),
        "train.json": json.dumps(SETTINGS, indent=1) + "\n",
        "gate.toml": gate,
        "recipe.toml": RECIPE,
        "Makefile": MAKEFILE,
        "README.md": README,
    }
    for name, text in texts.items():
        write_file(folder / name, text.encode(), "the project")
    return tuple(folder / name for name in texts)


def _write_images(data: Path) -> str:
    """Writes phantoms with their masks; returns the table."""
    rows = []
    for split, seeds in SPLITS.items():
        for seed in seeds:
            phantom = make_phantom(seed, height=ROWS, width=COLUMNS)
            name = f"{seed}.png"
            write_file(data / "images" / name, encode_png(phantom.frame.pixels), "an image")
            write_file(data / "masks" / name, encode_png(phantom.mask_HW * 255), "a mask")
            spacing = phantom.frame.spacing_mm
            assert spacing is not None
            rows.append(
                {
                    "file": f"images/{name}", "mask": f"masks/{name}", "split": split, "group": f"phantom{seed}",
                    "label": "head", "pixel_size_mm": f"{spacing[0]:.5f}",
                }
            )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


__all__ = ["COLUMNS", "MAKEFILE", "README", "RECIPE", "ROWS", "SETTINGS", "SPLITS", "make_project"]
