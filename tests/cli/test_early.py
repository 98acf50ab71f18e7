"""A typo is told before torch is imported, in the same words everywhere; settings are given the same way everywhere."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from tests.cli.test_contract import COMMANDS
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.cli.train.distill import ABLATION_NAMES
from tinyusfm_edge.cli.train.keys import ADAPT_KEYS, DISTILL_KEYS
from tinyusfm_edge.settings import to_json

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ("adapt", "distill", "bank", "qat", "coreset", "transfer-set")
GONE = "gone does not exist"
TYPOS = {
    "adapt --task segment --data gone --out x.safetensors": GONE,
    "adapt --task segmnt --data . --out x.safetensors": "--task segmnt: use segment, classify",
    "adapt --task segment --data . --out x.safetensors --init gone": "--init gone",
    "adapt --task segment --data . --out x.safetensors --config gone": "settings gone cannot be read",
    "adapt --task segment --data . --out x.safetensors --labels 200%": "at most 100 %",
    "evaluate fetal-head --data gone": GONE,
    "evaluate fetal-head --data . --split tset": "--split tset: use train, val, test",
    "evaluate gone --data .": "no student 'gone'",
    "distill --data gone --out r": GONE,
    "distill --data . --out r --ablation our": "--ablation our: use ours",
    "distill --data . --out r --set steps": "no key=value",
    "distill --data . --out r --set bogus=1": "there is no setting bogus",
    "distill --data . --out r --set view.bogus=1": "there is no setting view.bogus",
    "adapt --task segment --data . --out x.safetensors --set bogus=1": "there is no setting bogus",
    "adapt --task segment --data . --out x.safetensors --set augment.bogus=1": "there is no setting augment.bogus",
    "bank --data . --out b --set bogus=1": "there is no setting bogus",
    "bank --data gone --out b": GONE,
    "sensitivity gone": "no student 'gone'",
    "sensitivity --data gone": GONE,
    "qat --data gone": GONE,
    "qat --data . --set step=3": "there is no setting step",
    "transfer-set --data gone --out t": GONE,
    "transfer-set --data . --out t --method gan": "--method gan: use diffusion, warp",
    "transfer-set --data . --out t --set steps": "no key=value",
    "coreset gone": GONE,
    "coreset . --method foo": "--method foo: use dual",
    "calibrate fetal-head gone": GONE,
    "export --data gone": GONE,
    "export --method foo": "--method foo",
    "export --require-worth-it --no-compare": "leave --no-compare out",
    "select --teacher-weights gone --out s": GONE,
    "run gone.bundle gone": GONE,
    "live gone.bundle gone": GONE,
    "data check gone": GONE,
}
PROGRAM = """
import contextlib, io, json, shlex, sys
from tinyusfm_edge.cli.main import main
found = {}
for line in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(shlex.split(line))
    found[line] = [code, said.getvalue(), "torch" in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Line -> exit code, what was said, and whether torch had been imported by then; all in one fresh process."""
    roots = [str(ROOT / folder) for folder in (".", "export", "runtime", "calibration")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(list(TYPOS)), capture_output=True, text=True, env=env,
        cwd=tmp_path_factory.mktemp("typos"), timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("line", "words"), TYPOS.items(), ids=list(TYPOS))
def test_a_typo_costs_no_import_of_torch(line: str, words: str, told: dict[str, list[object]]) -> None:
    code, said, imported = told[line]
    assert code == 2 and words in str(said) and str(said).count("\n") == 1, said
    assert not imported, "torch was imported before the arguments were checked"


def test_every_training_command_has_the_same_settings_options() -> None:
    for name in TRAINING:
        options = {option for parameter in COMMANDS[(name,)].params for option in parameter.opts}
        assert {"--config", "--set", "--show-config"} <= options, name


def test_a_coreset_does_not_rank_gradients_unless_asked() -> None:
    """The gradient rank prefers ruined frames (benchmarks/bad_pool.py)."""
    (method,) = (parameter for parameter in COMMANDS[("coreset",)].params if parameter.name == "method")
    assert method.default == "distance"


def test_settings_are_shown_changed_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
    line = ["qat", "--data", str(tmp_path), "--out", str(tmp_path / "q.safetensors"), "--show-config"]
    assert main([*line, "--set", "steps=7", "--set", "warmup=3"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["steps"], shown["warmup"], shown["batch"]) == (7, 3, 4)
    (tmp_path / "settings.json").write_text(json.dumps(shown), encoding="utf-8")
    assert main([*line, "--config", str(tmp_path / "settings.json"), "--set", "batch=2", "--steps", "9"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["steps"], again["warmup"], again["batch"]) == (9, 3, 2), (
        "options win over --set, and that over the file"
    )


def _dotted(data: Mapping[str, object], where: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{where}{key}.")
        else:
            yield where + key


def test_names_known_before_torch_are_the_real_ones() -> None:
    pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
    from tinyusfm_edge.models.student import StudentConfig
    from tinyusfm_edge.training.adapt.augment import AugmentConfig
    from tinyusfm_edge.training.adapt.config import AdaptConfig
    from tinyusfm_edge.training.pretrain.config import ABLATIONS, DistillConfig

    assert tuple(ABLATIONS) == ABLATION_NAMES
    assert set(DISTILL_KEYS.split()) == set(_dotted(to_json(DistillConfig())))
    adapt = {field.name: None for field in fields(AdaptConfig)}
    parts = {"student": asdict(StudentConfig()), "augment": asdict(AugmentConfig())}
    assert set(ADAPT_KEYS.split()) == set(_dotted({**adapt, **parts}))
    assert all(shlex.split(line)[0] in {words[0] for words in COMMANDS} for line in TYPOS)
