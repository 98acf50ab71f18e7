"""Recipes: every shipped one is whole and honest, and a wrong file is refused with the reason."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Parts
from tinyusfm_export.recipe import FOLDER, Recipe, load_recipe, recipe_names, recipe_text
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import InputError

if sys.version_info < (3, 11):
    pytest.skip("recipes are .toml files, which need Python 3.11", allow_module_level=True)

NAMES = (
    "cart_x86", "handheld_android_cpu", "handheld_ios", "jetson_agx_orin", "jetson_orin_nano", "laptop_cpu",
)  # fmt: skip
GOOD = """
version = 1
about = "a device"
targets = ["onnx"]
precisions = ["int8"]
threads = 2
[budget]
frame_ms = 20.0
measured = false
note = "n"
[gate]
dice_mean = 0.98
"""


def test_the_promised_recipes_are_there() -> None:
    assert tuple(recipe_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_opens_with_its_command_and_says_what_was_measured(name: str) -> None:
    first = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# tinyusfm-edge export --recipe {name}"
    recipe = load_recipe(name)
    text = "\n".join(recipe.describe())
    assert name in text and ("measured by us" in text) == recipe.measured
    assert recipe.measured == (name == "cart_x86"), "numbers that nobody measured are marked as such"


@pytest.mark.parametrize("name", NAMES)
def test_each_names_targets_and_precisions_that_exist(name: str) -> None:
    recipe = load_recipe(name)
    for target in recipe.targets:
        # what a target can write is known without its library
        writes = plugins.load("targets", target).Target().precisions
        assert recipe.precisions and set(recipe.precisions) <= set(writes), target
    with pytest.raises(InputError, match="no target named"):
        plugins.load("targets", "none_such")


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert isinstance(recipe, Recipe) and recipe.name == "mine" and recipe.threads == 2
    assert recipe.gate.dice_mean == 0.98 and recipe.gate.dice_worst == 0.95


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version = 1", "version = 2", "has version 2"),
        ("threads = 2", "threads = 0", "threads = 0"),
        ("threads = 2", "threads = true", "threads = True"),
        ("threads = 2", "", "must have exactly"),
        ('["onnx"]', "[]", "needs targets"),
        ('["onnx"]', '"onnx"', "lists of names"),
        ('["int8"]', '["int4"]', "precisions among"),
        ("20.0", "-1", "frame_ms above 0"),
        ("20.0", '"fast"', "is not a number"),
        ("measured = false", 'measured = "no"', "measured = true or false"),
        ("measured = false", "", "must have exactly"),
        ("dice_mean = 0.98", "dice_mena = 0.98", "unknown keys dice_mena"),
        ("[budget]", "[budget", "is not readable"),
        ('about = "a device"', 'about = "a device"\nspeed = 3', "must have exactly"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_recipe(write(tmp_path, GOOD.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cart_x86, handheld_android_cpu"):
        load_recipe("cart_arm")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(InputError, match="there is no recipe"):
        load_recipe("../recipes/cart_x86")


def test_a_recipe_that_was_tuned_reads_back_as_toml_and_as_json(tmp_path: Path) -> None:
    data = {
        "version": 1, "about": "a \"cart\", \u00b5s \x7f", "targets": ["onnx"], "precisions": ["int8"], "threads": 2,
        "budget": {"frame_ms": 10.5, "measured": True, "note": "p90 \\ 8 ms"},
        "run": {"variant": "mine", "cpus": [0, 3]},
    }  # fmt: skip
    for suffix in (".toml", ".json"):
        path = tmp_path / f"tuned{suffix}"
        path.write_text(recipe_text(data, suffix), encoding="utf-8")
        found = load_recipe(str(path))
        assert (found.about, found.note, found.budget_ms) == (data["about"], "p90 \\ 8 ms", 10.5)
        assert (found.variant, found.cpus, found.threads, found.measured) == ("mine", (0, 3), 2, True)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("cpus = [-1]", "numbers of CPUs"),
        ("cpus = [true]", "numbers of CPUs"),
        ("cpus = 3", "a list of numbers"),
        ("variant = 3", "a name"),
        ("sector = 1", "true or false"),
        ("cores = [0]", "may be left out"),
    ],
)
def test_a_wrong_table_run_is_refused(tmp_path: Path, run: str, message: str) -> None:
    assert load_recipe(write(tmp_path, f"{GOOD}\n[run]\ncpus = [1]\n")).cpus == (1,)
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, f"{GOOD}\n[run]\n{run}\n"))


def test_the_artefact_is_the_first_target_that_a_bundle_holds(
    tmp_path: Path, engine_parts: Callable[[str], Parts]
) -> None:
    made = [replace(engine_parts("ort").artefacts[0], precision=precision) for precision in ("fp32", "int8")]
    assert load_recipe(write(tmp_path, GOOD)).artefact_of(made) is made[1]
    both = GOOD.replace('["onnx"]', '["openvino", "onnxruntime"]').replace('["int8"]', '["int8", "fp32"]')
    assert load_recipe(write(tmp_path, both)).artefact_of(made) is made[1], "an alias names the same target"
    pruned = replace(made[1], requirements={**made[1].requirements, "sector": "fan"})
    assert load_recipe(write(tmp_path, GOOD)).artefact_of([pruned, *made]) is made[1], "measured on whole frames"
    assert load_recipe(write(tmp_path, GOOD)).artefact_of([pruned]) is pruned
    wants = load_recipe(write(tmp_path, f"{GOOD}\n[run]\nsector = true\n"))
    assert wants.artefact_of([*made, pruned]) is pruned
    with pytest.raises(InputError, match="export it with --sector"):
        wants.artefact_of(made)
    with pytest.raises(InputError, match="asks for onnx-int8; the bundle holds onnx-fp32"):
        load_recipe(write(tmp_path, GOOD)).artefact_of(made[:1])
