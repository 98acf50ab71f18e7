"""``profile`` with a rate, a baseline, a second bundle, and on another machine over a real sshd of this test's own."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Parts
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.cli.timing.baseline import find_baseline
from tinyusfm_edge.cli.timing.turns import in_turns
from tinyusfm_runtime.session import Session

SSHD = Path("/usr/sbin/sshd")
QUICK = ["--rounds", "2", "--no-cold", "--source", "phantom:0-1"]


@pytest.fixture(scope="module")
def bundle(engine_parts: Callable[[str], Parts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in ONNX Runtime."""
    return engine_parts("ort").publish(tmp_path_factory.mktemp("profile") / "tiny.bundle")


@pytest.fixture(scope="module")
def old(engine_parts: Callable[[str], Parts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in an older bundle, with an id of its own."""
    place = tmp_path_factory.mktemp("older") / "tiny.bundle"
    return engine_parts("ort").publish(place, created_utc="2026-01-02T00:00:00Z")


def profiled(bundle: Path, out: Path, *words: str) -> dict[str, Any]:
    assert main(["profile", str(bundle), *QUICK, *words, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert isinstance(found, dict)
    return found


def test_everything_beside_the_stages_is_in_the_report(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = profiled(bundle, tmp_path / "p.json", "--fps", "50", "--duration", "0.4", "--compare", str(bundle))
    assert told["card"]["macs"] == 64 * 64 * 49 and told["ratio_to_floor"] > 0
    assert told["quantiles_ms"]["total_ms"][0]["value"] is None, "four samples support no median"
    assert told["open_loop"]["arrived"] == 20
    assert told["open_loop"]["answered"] + told["open_loop"]["dropped"] == 20
    assert told["golden_checked"] and told["energy"]["source"]
    assert any(row["precision"] == "f32" for row in told["operators"])
    assert told["beside"]["low"] <= told["beside"]["ratio"] <= told["beside"]["high"]
    assert [found["value"] for found in told["beside"]["quantiles_ms"]["other"]] == [None] * 5, "refused, not guessed"
    said = capsys.readouterr().out
    assert said.count("needs 368 samples") == 8, "four stages, the total, the open loop, both sides beside it"
    assert "needs 368 samples" in said and "open loop" in said
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    parts = ("Before it runs", "Every sample", "Stages", "Open loop", "Age over time", "Operators", "Machine, after")
    assert all(words in page for words in parts)
    assert page.count("<svg") == 3 and "one frame" in page


def test_a_regression_against_a_baseline_ends_with_1_and_another_machine_with_5(bundle: Path, tmp_path: Path) -> None:
    told = profiled(bundle, tmp_path / "now.json", "--no-operators")

    def baseline(factor: float, **machine: object) -> str:
        old = json.loads(json.dumps(told))
        old["samples_ms"] = {
            stage: [factor * value for value in values] for stage, values in told["samples_ms"].items()
        }
        old["stages"] = {s: {p: factor * value for p, value in found.items()} for s, found in told["stages"].items()}
        old["machine"] |= machine
        (tmp_path / "old.json").write_text(json.dumps(old))
        return str(tmp_path / "old.json")

    words = ["profile", str(bundle), *QUICK, "--no-operators", "--baseline"]
    assert main([*words, baseline(1e-3)]) == 1
    assert main([*words, baseline(1e3)]) == 0
    assert main([*words, baseline(1.0, cpu="another")]) == 5
    (tmp_path / "bad.json").write_text("{")
    assert main([*words, str(tmp_path / "bad.json")]) == 2


def test_a_jetsons_own_programs_are_asked_and_ended(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "RAM 2147/7620MB GR3D_FREQ 0% cpu@47.6C VDD_IN 4000mW/4556mW VDD_SOC 1000mW/1451mW"
    shown = "cpu0: MinFreq=9 MaxFreq=9 CurrentFreq=9\nGPU MinFreq=3 MaxFreq=9 CurrentFreq=3"
    programs = {
        "tegrastats": f'echo $$ > {tmp_path}/pid\nwhile :; do echo "{line}"; sleep 0.02; done',
        "nvpmodel": '[ "$1" = -q ] && printf "NV Power Mode: 15W\\n0\\n"',
        "jetson_clocks": f'[ "$1" = --show ] && printf "{shown}\\n"'.replace("\n", "\\n", 1),
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("tinyusfm_runtime.profiling.energy.SYSTEM", tmp_path)
    told = profiled(bundle, tmp_path / "p.json", "--no-operators", "--rounds", "200")
    assert told["energy"]["source"] == "tegrastats" and told["energy"]["watts"]["VDD_IN"] <= 4.0
    assert told["energy"]["joules"]["VDD_IN"] == pytest.approx(4 * told["energy"]["joules"]["VDD_SOC"])
    assert told["tegra"]["before"] == {"power_mode": "15W (0)", "clocks_held": {"cpu0": True, "GPU": False}, "why": {}}
    said = capsys.readouterr().out
    assert "15W (0)" in said and "1 of 2" in said and "mJ a frame (tegrastats" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    other = json.loads(json.dumps(told))
    other["tegra"]["before"]["power_mode"] = "MAXN (0)"
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert main(["compare", str(tmp_path / "p.json"), str(tmp_path / "other.json")]) == 5


class Taker:
    """Stands for a session: notes who was asked."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name, self.asked = name, asked

    def predict(self, frame: object) -> None:
        self.asked.append(f"{self.name}{frame}")


def test_two_sessions_are_asked_in_turns_and_every_sample_is_kept() -> None:
    asked: list[str] = []
    took = in_turns(Taker("a", asked), Taker("b", asked), [1, 2], 2)  # type: ignore[arg-type,list-item]
    assert asked == ["a1", "b1", "a1", "a2", "b1", "b2", "b1", "b2", "a1", "a2"]
    assert took.shape == (2, 2, 2) and (took > 0).all()


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 1)])
def test_a_baseline_that_is_at_hand_is_measured_in_turns(
    bundle: Path, old: Path, tmp_path: Path, factor: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = profiled(old, tmp_path / "old.json", "--no-operators")
    took = np.random.default_rng(0).normal(10.0, 0.1, (20, 20, 2)) * np.asarray([1.0, factor])
    names: list[str] = []

    def known(first: Session, second: Session, *_: object) -> np.ndarray:
        names[:] = [first.path.parent.name, second.path.parent.name]
        return took

    monkeypatch.setattr("tinyusfm_edge.cli.timing.baseline.in_turns", known)
    words = ["profile", str(bundle), *QUICK, "--no-operators", "--json", str(tmp_path / "new.json"), "--baseline"]
    for more in ([str(old)], [str(tmp_path / "old.json"), "--baseline-bundle", str(old)]):
        assert main([*words, *more]) == code
        judged = json.loads((tmp_path / "new.json").read_text())["baseline"]
        assert judged["how"] == "in turns" and len(judged["samples_ms"][0]) == 400
        assert [change["name"] for change in judged["changes"]] == ["total p50", "total p90", "total p99"]
        assert not any(change["refused"] for change in judged["changes"]), "400 samples support a p99"
        assert names == [old.parent.name, bundle.parent.name]
    told["setup"]["governor"] = "another"
    (tmp_path / "old.json").write_text(json.dumps(told))
    assert main([*words, str(tmp_path / "old.json"), "--baseline-bundle", str(old)]) == 5


def test_the_bundle_of_a_report_is_found_beside_it_by_name_and_id(bundle: Path, old: Path, tmp_path: Path) -> None:
    told = profiled(old, old.parent / "old.json", "--no-operators")
    found = find_baseline(old.parent / "old.json", None, bundle)
    assert found is not None and found.bundle == old
    told["subject"]["bundle_id"] = "other"
    (old.parent / "other.json").write_text(json.dumps(told))
    found = find_baseline(old.parent / "other.json", None, bundle)
    assert found is not None and found.bundle is None, "a folder of that name and another id is another bundle"
    told["subject"]["bundle"] = "../" + old.parent.name + "/" + old.name
    (old.parent / "other.json").write_text(json.dumps(told))
    found = find_baseline(old.parent / "other.json", None, bundle)
    assert found is not None and found.bundle is None, "a report names no path"
    words = ["profile", str(bundle), *QUICK]
    assert main([*words, "--baseline", str(old.parent / "old.json"), "--baseline-bundle", str(bundle)]) == 2
    assert main([*words, "--baseline-bundle", str(old)]) == 2
    assert main([*words, "--baseline", str(old), "--host", "a@b"]) == 2


def test_hosts_that_are_options_or_not_there_are_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("ssh") is None:
        pytest.skip("there is no ssh here: install openssh-client")
    assert main(["profile", str(bundle), "--host", "-oProxyCommand=touch /tmp/x"]) == 2
    ssh = "ssh -F /dev/null -o ConnectTimeout=2 -p 1"
    assert main(["profile", str(bundle), "--host", "nobody@127.0.0.1", "--ssh", ssh]) == 3
    assert "ssh failed" in capsys.readouterr().err
    assert main(["profile", str(bundle), "--host", "a@b", "--ssh", "/no/such/ssh"]) == 3


class Server:
    """An sshd on the loopback device."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder / "there"
        self.temporary.mkdir()
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = (
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile "
            f"{folder}/authorized_keys\nStrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\n"
            f"SetEnv TMPDIR={self.temporary}\n"
        )
        (folder / "sshd_config").write_text(settings, encoding="utf-8")
        wrapper = (
            f"#!/bin/sh\necho $$ > {folder}/pid\nexec ssh -F /dev/null -p {self.port} -i {folder}/user "
            '-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
        )
        (folder / "ssh").write_text(wrapper, encoding="utf-8")
        (folder / "ssh").chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.PIPE
        )

    def words(self, bundle: Path) -> list[str]:
        there = f"{getpass.getuser()}@127.0.0.1"
        return ["profile", str(bundle), *QUICK, "--host", there, "--ssh", str(self.folder / "ssh"), "--remote-python",
                sys.executable]  # fmt: skip

    def wait(self, holds: Callable[[], bool]) -> None:
        stop = time.monotonic() + 900
        while not holds():
            assert time.monotonic() < stop, sorted(map(str, self.temporary.rglob("*")))
            time.sleep(0.05)

    def running(self) -> list[str]:
        """Processes whose working directory lies in the device's folder."""
        found = []
        for place in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if str(place.readlink()).startswith(str(self.temporary)):
                    found.append(place.parent.name)
            except OSError:
                continue
        return found


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not SSHD.is_file() or os.geteuid() != 0 or shutil.which("ssh") is None:
        pytest.skip("an sshd of its own needs root and Debian's openssh-server and openssh-client")
    made = Server(tmp_path_factory.mktemp("sshd"))
    try:
        made.wait(lambda: answers(made.port))
        yield made
    finally:
        made.process.terminate()
        made.process.communicate()


def test_a_device_is_measured_from_here_and_left_clean(
    server: Server, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--json", str(tmp_path / "p.json"), "--fps", "50", "--duration", "0.2"]
    assert main([*server.words(bundle), *out]) == 0, capsys.readouterr().err
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["host"] == "127.0.0.1" and told["n"] == 4 and told["open_loop"]["arrived"] == 10
    assert "measured on  127.0.0.1" in capsys.readouterr().out
    assert not list(server.temporary.iterdir()) and not server.running()


def test_a_failure_there_is_a_line_here(server: Server, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*server.words(bundle), "--target", "coreml"]) == 3
    assert "no artefact 'coreml'" in capsys.readouterr().err
    words = [word if word != sys.executable else "/no/python" for word in server.words(bundle)]
    assert main(words) == 3
    assert not list(server.temporary.iterdir())


def test_a_broken_connection_leaves_no_process_and_no_file(server: Server, bundle: Path) -> None:
    words = [*server.words(bundle), "--fps", "5", "--duration", "200"]
    script = f"import sys; from tinyusfm_edge.cli.main import main; sys.exit(main({words!r}))"
    (server.folder / "pid").unlink(missing_ok=True)
    here = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    server.wait(lambda: bool(server.running()))
    os.kill(int((server.folder / "pid").read_text()), 9)
    _, errors = here.communicate(timeout=900)
    assert here.returncode == 3 and b"the connection ended" in errors
    server.wait(lambda: not server.running() and not list(server.temporary.iterdir()))


def test_a_wheel_is_copied_where_nothing_is_installed(server: Server, bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "this.whl", "w") as wheel:
        wheel.writestr("tinyusfm_edge/__init__.py", "")
        report = {"kind": "tinyusfm-edge profile", "from": "the wheel"}
        wheel.writestr("tinyusfm_edge/__main__.py", f"open('out.json', 'w').write({json.dumps(report)!r})\n")
    out = ["--json", str(tmp_path / "w.json"), "--wheel", str(tmp_path / "this.whl")]
    assert main([*server.words(bundle), *out]) == 0
    assert json.loads((tmp_path / "w.json").read_text())["from"] == "the wheel"
