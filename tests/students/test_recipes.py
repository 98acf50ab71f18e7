"""Recipes of shipped students: every stage is a command that exists, stages resume, the better student is chosen."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner

from tests.needs import needs
from tinyusfm_edge import students
from tinyusfm_edge.cli.main import app
from tinyusfm_edge.data.frames import open_file
from tinyusfm_edge.data.table import read_table
from tinyusfm_edge.models.checkpoint import load_student_file, save_student
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.release.cines import Cine, write_cines
from tinyusfm_edge.release.make_student import (
    RECIPES,
    TOOL,
    Stage,
    choose,
    held,
    main,
    read_recipe,
    recipe_names,
    run_stage,
)
from tinyusfm_edge.release.mean import main as mean_main
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.run import student_spec
from tinyusfm_export.verify.gate_frames import clip_path
from tinyusfm_runtime.errors import InputError

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="recipes are TOML")
PLACES = {"data": "DATA", "teacher": "TEACHER", "state": "STATE"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_stage_is_a_command_with_options_that_exist(name: str) -> None:
    stages = read_recipe(name, PLACES)
    made = {str(stage.makes) for stage in stages}
    for stage in stages:
        if stage.among:
            assert set(stage.among) <= {one.name for one in stages} and stage.measure
            continue
        if stage.module != TOOL:
            assert importlib.util.find_spec(stage.module) is not None
            continue
        command = get_command(app).commands[stage.command[0]]  # type: ignore[attr-defined]
        piece = ["--minutes", "40"] if stage.in_pieces else []
        command.make_context(stage.command[0], [*stage.command[1:], *piece])
        for word in stage.command:
            if word.startswith("STATE/") and "/../" not in word and word.endswith(".safetensors") and word not in made:
                raise AssertionError(f"{stage.name} uses {word}, which no stage makes")
    assert {"fetal-head", "fetal-head-further", "fetal-head-fast"} <= set(recipe_names())


def test_the_distilled_start_has_a_control_of_labels_alone_among_the_choices() -> None:
    stages = {stage.name: stage for stage in read_recipe("fetal-head-further", PLACES)}
    assert set(stages["chosen"].among) == {"taught-3", "control-3", "distilled-3"}
    start = "STATE/distil-224/student.safetensors"
    for number, rate in ((1, None), (2, "4e-4"), (3, "2e-4")):
        own, control = (list(stages[f"{name}-{number}"].command) for name in ("distilled", "control"))
        assert own[own.index("--init") + 1] == start and "--kd" not in own
        assert (own[own.index("--learning-rate") + 1] if "--learning-rate" in own else None) == rate
        for words in (own, control):
            del words[words.index("--init") : words.index("--init") + 2]
        assert [word.replace("distilled", "control") for word in own] == control
        start = f"STATE/distilled-{number}.safetensors"
    for name in recipe_names():
        for stage in read_recipe(name, PLACES):
            if stage.command[:1] == ("adapt",):
                assert stage.command[stage.command.index("--precision") + 1] == "natural"


def test_the_recipe_of_fetal_head_is_what_its_card_says(tmp_path: Path) -> None:
    """The steps and peaks of its start, the last training, the shares of the mean."""
    stages = {stage.name: stage for stage in read_recipe("fetal-head", PLACES)}
    card = students.card("fetal-head")
    trained = [stage.command for stage in stages.values() if stage.command[:1] == ("adapt",)]
    steps = [int(words[words.index("--steps") + 1]) for words in trained]
    assert steps == [1000, 600, 600, 400, 600, 600] and f"then {sum(steps[:-1])} steps on heads" in card["start"]
    rates = [words[words.index("--learning-rate") + 1] for words in trained[1:]]
    said = " and ".join(", ".join(f"{float(rate):g}" for rate in ["6e-4", *rates[:-1]]).rsplit(", ", 1))
    assert f"(peaks {said})" in card["start"]
    words = stages["state-4"].command
    here = [word.replace("DATA", str(tmp_path)).replace("STATE", str(tmp_path)) for word in words]
    (tmp_path / "hc18").mkdir()
    (tmp_path / "hc18" / "split.csv").write_text("file,label,mask,split,group\na.png,fetal_head,a.png,train,1\n")
    (tmp_path / "state-3.safetensors").touch()
    found = CliRunner().invoke(app, [*here, "--show-config"])
    assert found.exit_code == 0, found.output
    settings, known = json.loads(found.stdout), card["recipe"]["adapt"]
    assert {key: settings[key] for key in known} == known
    assert [Path(name).name for name in words[words.index("--negatives") + 1].split(",")] == card["recipe"]["negatives"]
    for share, number in (("0.1", 1), ("0.4", 2), ("0.5", 4)):
        assert f"{share}=STATE/state-{number}.safetensors" in stages["mean"].command
        assert f"{share} " in card["start"] and f"after {sum(steps[: number + 2])}" in card["start"]


def test_a_mean_of_states_is_their_weighted_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = StudentConfig(image_size=32, width=48, heads=3)
    spec = student_spec(AdaptConfig(student=config), ("head",), name="head")
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file in files:
        save_student(file, build_student(config), spec, torch.float32)
    words = [f"{share}={file}" for share, file in zip((0.1, 0.4, 0.5), files, strict=True)]
    assert mean_main([str(tmp_path / "mean.safetensors"), *words]) == 0
    found, *parts = (load_file(path) for path in (tmp_path / "mean.safetensors", *files))
    for name, value in found.items():
        wanted = 0.1 * parts[0][name] + 0.4 * parts[1][name] + 0.5 * parts[2][name]
        assert torch.allclose(value, wanted, atol=1e-6), name
    assert load_student_file(tmp_path / "mean.safetensors").spec.name == "head"
    capsys.readouterr()
    save_student(files[0], build_student(replace(config, width=96)), spec, torch.float32)
    for wrong, said in (
        ([f"0.5={files[0]}", f"0.5={files[1]}"], "of different networks"),
        (["0.5=a", "0.4=b"], "add up to 0.9"),
        (["0.5=a", "0.5=a"], "stands twice"),
        (["half=a"], "is not SHARE=FILE"),
        (["0=a"], "with a share above 0"),
    ):
        assert mean_main([str(tmp_path / "out.safetensors"), *wrong]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda path: path.stem)
def test_settings_of_recipes_are_usable(path: Path) -> None:
    plan = AdaptConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
    assert plan.augment.shadow > 0 and plan.repeat_small == 3
    assert (plan.student.heads, plan.student.seg_head) == ((3, "lite") if "fast" in path.stem else (12, "fpn"))


def stage(tmp_path: Path, name: str, **changes: object) -> Stage:
    values: dict[str, object] = {
        "name": name,
        "about": "",
        "command": ("adapt",),
        "makes": tmp_path / f"{name}.json",
        "in_pieces": True,
        "among": (),
        "measure": "",
    }
    return Stage(**{**values, **changes})  # type: ignore[arg-type]


def test_a_stage_goes_on_until_its_file_is_there_and_is_not_run_again(tmp_path: Path) -> None:
    one, calls = stage(tmp_path, "one"), []

    def call(words: Sequence[str], module: str) -> None:
        assert module == TOOL
        calls.append(list(words))
        if len(calls) == 3:
            one.makes.write_text("{}")

    assert run_stage(one, [one], tmp_path, 60, command=call)
    assert len(calls) == 3 and calls[0][1:] == ["--minutes", "40.0"]
    assert run_stage(one, [one], tmp_path, 60, command=call) and len(calls) == 3
    assert len((tmp_path / "stages.jsonl").read_text().splitlines()) == 1
    assert not run_stage(stage(tmp_path, "two"), [], tmp_path, 0.0), "no time is left"


def test_the_better_on_validation_is_chosen_and_it_is_written_down(tmp_path: Path) -> None:
    pair = [stage(tmp_path, name, makes=tmp_path / f"{name}.safetensors") for name in ("taught", "control")]
    for one, score in zip(pair, (0.961, 0.968), strict=True):
        one.makes.write_bytes(one.name.encode())
        report = {"reports": [{"ellipse_dice": {"mean": score}}]}
        one.makes.with_suffix(".val.json").write_text(json.dumps(report))
    goal = tmp_path / "head.safetensors"
    last = stage(tmp_path, "chosen", makes=goal, among=("taught", "control"), measure="ellipse_dice.mean")
    choose(last, [*pair, last], tmp_path)
    assert last.makes.read_bytes() == b"control"
    assert json.loads((tmp_path / "chosen.json").read_text())["chosen"] == "control"
    (tmp_path / "control.val.json").unlink()
    with pytest.raises(InputError, match="no score"):
        choose(last, [*pair, last], tmp_path)


def test_one_training_at_a_time_by_its_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "lock"
    with held(lock), pytest.raises(InputError, match="held by another training"), held(lock):
        pass
    assert main(["--name", "nothing", "--state", str(tmp_path)]) == 2
    assert "there is no recipe" in capsys.readouterr().err
    assert main(["--state", str(tmp_path), "--list"]) == 0
    assert "open  select" in capsys.readouterr().out


def test_frames_of_cines_become_a_table_that_training_reads(tmp_path: Path) -> None:
    needs("pydicom", "pydicom is not installed: pip install 'tinyusfm-edge[dicom]'")
    clips = clip_path().parent
    taken = (Cine(clip_path().name, "train", 2, "MIT"), Cine("examples_rgb_color.dcm", "val", 1, "MIT"))
    assert write_cines(clips, tmp_path / "cines", taken) == 2 * 30 + 1
    samples = read_table(tmp_path / "cines", "train", need="label")
    assert len(samples) == 60 and len({sample.group for sample in samples}) == 1
    with open_file(clip_path()) as source:
        wanted = [frame.pixels.copy() for frame in source]
    found = {sample.frame.pixels.tobytes() for sample in samples}
    assert found == {pixels.tobytes() for pixels in wanted}
    with pytest.raises(InputError, match="has no nothing.mp4"):
        write_cines(clips, tmp_path / "other", (Cine("nothing.mp4", "train", 1, ""),))
