"""Nothing phones home: an export, a run and a profile are listened to, child processes included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tinyusfm_edge.cli.main import app

if TYPE_CHECKING:
    from conftest import Exported, QuietRoom


ELSEWHERE = {
    "export": "the first test", "run": "the second test", "profile": "the second test", "doctor": "a test below",
    "demo": "export, verify and run in a row", "build": "needs a GPU", "live": "tests/runtime/test_live_sockets.py",
    "replay": "tests/runtime/test_live_sockets.py: it listens, on the loopback device unless told otherwise",
    "sensitivity": "measures for minutes with what evaluate uses", "qat": "trains with what distill uses",
    "adapt": "trains with what distill uses", "select": "needs a large teacher", "bank": "needs a teacher",
    "transfer-set": "makes pairs with what data check and evaluate use", "tune": "profiles in processes",
}  # fmt: skip
"""Command -> why it is not run below."""
DRIVER = """
import json, os, sys
from pathlib import Path
from broken_runs import commands, make_inputs
from tinyusfm_edge.cli.main import main
here, bundle = Path.cwd(), sys.argv[1]
(here / "inputs").mkdir(); (here / "out").mkdir()
make_inputs(here / "inputs")
import shutil
shutil.copytree(bundle, here / "out" / "signed.bundle")
made = {command.name: list(command.words) for command in commands(here / "inputs", here / "out")}
(here / "seen").mkdir()
from PIL import Image
from tinyusfm_runtime.phantom import make_phantom
for seed in range(2):
    made_here = make_phantom(seed, height=80, width=96)
    Image.fromarray(made_here.frame.pixels).save(here / "seen" / f"{seed}.png")
    Image.fromarray(made_here.mask_HW.astype("uint8") * 255).save(here / "seen" / f"m{seed}.png")
table = "file,mask,split,group\\n0.png,m0.png,val,a\\n1.png,m1.png,val,b\\n"
(here / "seen" / "split.csv").write_text(table)
pool, tiny = str(here / "inputs" / "pool"), str(here / "inputs" / "tiny.safetensors")
lines = [
    ["new", "project"], ["gate"], ["data", "check", pool], made["calibrate"], made["distill"],
    ["coreset", pool, "--budget", "8", "--method", "random", "--out", "coreset"],
    ["evaluate", tiny, "--data", "seen", "--split", "val"], made["sign"],
    ["bundle", "trace", bundle], ["bundle", "dossier", bundle], ["bundle", "diff", bundle, bundle, "--rounds", "0"],
    ["verify", bundle, "--json", "v.json", "--target", "onnx"], ["compare", "v.json", "v.json"],
    ["run", bundle, "phantom:0-1", "--sink", "audit:a.jsonl"], ["audit", "verify", "a.jsonl"],
    ["sector", "phantom:0-7"],
]
print(json.dumps([[line[0], main(line)] for line in lines]))
"""
"""Runs every other command in one process; prints names and exit codes in the last line."""


@pytest.mark.slow
def test_every_other_command_calls_nobody(exported: Exported, quiet_room: QuietRoom) -> None:
    for library in ("cryptography", "lightning_fabric", "sklearn"):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install 'tinyusfm-edge[signed,train]'")
    (quiet_room.folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    for name in ("broken_runs.py", "broken_outcome.py"):
        shutil.copy(benchmarks / name, quiet_room.folder)
    done = quiet_room.run("driver.py", str(exported.bundle))
    assert done.returncode == 0, done.stderr[-2000:]
    ran = json.loads(done.stdout.splitlines()[-1])
    assert not [line for line in ran if line[1] not in (0, 1)], (ran, done.stderr[-3000:])
    assert not quiet_room.heard()
    registered = {str(found.name) for found in (*app.registered_commands, *app.registered_groups)}
    assert {name for name, _ in ran} | set(ELSEWHERE) == registered


@pytest.mark.slow
def test_export_calls_nobody_and_leaves_the_home_alone(exported: Exported) -> None:
    assert not exported.room.heard()
    assert not [path for path in exported.room.home.rglob("*") if {"intel", "Microsoft"} & set(path.parts)]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_run_and_profile_call_nobody(exported: Exported, target: str, tmp_path: Path) -> None:
    room, bundle = exported.room, str(exported.bundle)
    ran = room.run(
        "-m", "tinyusfm_edge", "run", bundle, "phantom:0-2", "--target", target, "--jsonl", str(tmp_path / "r.jsonl")
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    timed = room.run("-m", "tinyusfm_edge", "profile", bundle, "--target", target, "--rounds", "1")
    assert timed.returncode == 0, timed.stderr[-2000:]
    assert not room.heard()
    assert not list(room.home.rglob("*Microsoft*"))


def test_onnx_runtime_is_quiet_inside_too(quiet_room: QuietRoom) -> None:
    # its client is native code, which no audit hook hears; the id that it leaves in the home folder betrays it
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    quiet = "from tinyusfm_runtime.engines.ort import import_onnxruntime as get; get().get_available_providers()"
    assert quiet_room.run("-c", quiet).returncode == 0
    assert not list(quiet_room.home.rglob("*Microsoft*"))
    quiet_room.run("-c", "import onnxruntime; onnxruntime.get_available_providers()")
    if not list(quiet_room.home.rglob("*Microsoft*")):
        pytest.skip("this build of ONNX Runtime has no telemetry: nothing to keep quiet")


def test_doctor_calls_nobody(quiet_room: QuietRoom) -> None:
    done = quiet_room.run("-m", "tinyusfm_edge", "doctor")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not quiet_room.heard()
    assert not list(quiet_room.home.rglob("*intel*"))


def test_a_call_is_heard(quiet_room: QuietRoom) -> None:
    quiet_room.run("-c", "import socket; socket.getaddrinfo('nobody.invalid', 443)")
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    quiet_room.run("-c", child.format("import socket; socket.create_connection(('203.0.113.1', 9), timeout=1)"))
    assert any("nobody.invalid" in line for line in quiet_room.heard())
    assert any("203.0.113.1" in line for line in quiet_room.heard())
