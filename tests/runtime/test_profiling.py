"""Percentiles with intervals and refusals, frames at a rate, energy, parsers on recorded output, operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Parts
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError, UnsupportedError
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.profiling.card import count_macs, make_card
from tinyusfm_runtime.profiling.energy import NOT_HERE, EnergyMeter
from tinyusfm_runtime.profiling.open_loop import run_open_loop
from tinyusfm_runtime.profiling.operators import operator_table, parse_ort_profile
from tinyusfm_runtime.profiling.quantiles import PERCENTS, quantile, quantiles, samples_needed
from tinyusfm_runtime.profiling.tegra import parse_jetson_clocks, parse_nvpmodel, parse_tegrastats, tegra_state
from tinyusfm_runtime.profiling.watch import look

ORIN_NANO = (
    "07-14-2025 10:29:36 RAM 2147/7620MB (lfb 2x4MB) SWAP 1476/3810MB (cached 1MB) CPU [0%@729,0%@729,0%@729,0%@729,"
    "0%@729,0%@729] GR3D_FREQ 0% cpu@47.687C soc2@46.718C soc0@47.468C gpu@48.625C tj@48.625C soc1@48.25C "
    "VDD_IN 4556mW/4556mW VDD_CPU_GPU_CV 483mW/483mW VDD_SOC 1451mW/1451mW"
)
"""JetPack 6, as ``tegrastats`` printed it."""
NANO = (
    "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB) CPU [5%@1224,4%@1224,3%@1224,"
    "6%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25 PLL@37C CPU@40C PMIC@50C GPU@40C AO@45C thermal@40C "
    "POM_5V_IN 1750/1628 POM_5V_GPU 0/0 POM_5V_CPU 366/406"
)
"""JetPack 4.6."""


class Clock:
    """A clock that moves when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += max(1, int(seconds * 1e9))


@pytest.mark.parametrize(("percent", "needed"), [(50, 6), (90, 36), (95, 72), (99, 368), (99.9, 3688)])
def test_a_percentile_that_the_sample_cannot_support_is_refused(percent: float, needed: int) -> None:
    assert samples_needed(percent) == needed
    samples = np.random.default_rng(0).exponential(size=needed).tolist()
    assert quantile(samples[:-1], percent).value is None
    assert f"needs {needed}" in quantile(samples[:-1], percent).text()
    found = quantile(samples, percent)
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0])
def test_the_interval_holds_the_true_percentile_as_often_as_it_says(percent: float) -> None:
    rng, held = np.random.default_rng(7), 0
    truth = -np.log(1 - percent / 100)
    for _ in range(400):
        found = quantile(rng.exponential(size=400).tolist(), percent)
        assert found.low is not None and found.high is not None
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 400 <= 1.0


def test_a_fast_answer_misses_nothing() -> None:
    clock = Clock()
    found = run_open_loop(lambda _: clock.sleep(0.01), [0], fps=30, duration_s=2, clock_ns=clock, sleep_s=clock.sleep)
    assert (found.arrived, found.dropped, found.misses, found.longest_streak) == (60, 0, 0, 0)
    assert max(found.ages_ms) < 11 and len(found.ages_ms) == 60


def test_a_slow_answer_drops_frames_and_ages() -> None:
    clock = Clock()
    found = run_open_loop(lambda _: clock.sleep(0.1), [0, 1], fps=30, duration_s=3, clock_ns=clock, sleep_s=clock.sleep)
    assert found.arrived == 90 and len(found.ages_ms) + found.dropped == 90
    assert 28 <= len(found.ages_ms) <= 32, "three frames arrive during one answer"
    assert found.misses == len(found.ages_ms) == found.longest_streak
    assert max(found.service_ms) == pytest.approx(100, abs=1)
    assert max(found.ages_ms) >= 100, "a closed loop would have said 100 ms at most, and that nothing was dropped"


def test_one_stall_is_one_streak() -> None:
    clock, calls = Clock(), iter(range(1000))
    found = run_open_loop(
        lambda _: clock.sleep(0.25 if next(calls) == 20 else 0.005),
        [0], fps=50, duration_s=2, clock_ns=clock, sleep_s=clock.sleep,
    )  # fmt: skip
    assert found.dropped == 11 and found.misses == found.longest_streak == 1
    with pytest.raises(InputError, match="at least 2"):
        run_open_loop(lambda _: None, [0], fps=1, duration_s=1)


def test_rapl_wraps_and_names_its_parts(tmp_path: Path) -> None:
    place = tmp_path / "sys/class/powercap/intel-rapl:0"
    (place).mkdir(parents=True)
    for name, text in (("name", "package-0\n"), ("max_energy_range_uj", "1000000\n"), ("energy_uj", "900000\n")):
        (place / name).write_text(text)
    seconds = iter([0.0, 0.0, 2.0])
    meter = EnergyMeter(tmp_path, clock_s=lambda: next(seconds))
    meter.start()
    (place / "energy_uj").write_text("100000\n")
    found = meter.stop()
    assert found.source == "rapl" and found.joules == {"package-0": pytest.approx(0.2)}
    assert found.to_json(4)["joules_per_frame"]["package-0"] == pytest.approx(0.05)
    assert found.to_json(4)["watts"]["package-0"] == pytest.approx(0.1)


def test_ina_rails_are_sampled(tmp_path: Path) -> None:
    place = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    place.mkdir(parents=True)
    for name, text in (("in1_label", "VDD_IN\n"), ("in1_input", "5000\n"), ("curr1_input", "900\n")):
        (place / name).write_text(text)
    meter = EnergyMeter(tmp_path, interval_s=0.001)
    meter.start()
    while meter._joules["VDD_IN"] == 0.0:
        pass
    found = meter.stop()
    assert found.source == "ina3221"
    assert 0 < found.joules["VDD_IN"] <= 4.5 * found.seconds + 1e-6, "4.5 W"


def test_where_nothing_measures_it_is_said(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path)
    meter.start()
    told = meter.stop().to_json(10)
    assert told["source"] == NOT_HERE and told["joules"] == {} and "no RAPL" in told["why"]


def test_a_jetson_without_its_programs_says_so_and_another_machine_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tegra_state(tmp_path) is None
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_bytes(b"nvidia,p3768-0000+p3767-0003\0nvidia,tegra234\0")
    (tmp_path / "nvpmodel").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "nvpmodel").chmod(0o755)
    assert tegra_state(tmp_path) == {
        "power_mode": None, "clocks_held": {}, "why": {"nvpmodel": "exit code 3", "jetson_clocks": "not found"},
    }  # fmt: skip
    meter = EnergyMeter(tmp_path)
    meter.start()
    assert "no tegrastats" in meter.stop().why


def test_recorded_lines_of_tegrastats() -> None:
    found = parse_tegrastats(ORIN_NANO)
    assert found["milliwatts"] == {"VDD_IN": 4556, "VDD_CPU_GPU_CV": 483, "VDD_SOC": 1451}
    assert found["celsius"]["tj"] == 48.625 and found["gpu_percent"] == 0
    found = parse_tegrastats(NANO)
    assert found["milliwatts"] == {"POM_5V_IN": 1750, "POM_5V_GPU": 0, "POM_5V_CPU": 366}
    assert found["celsius"]["cpu"] == 40.0
    assert parse_tegrastats("no such program") == {"milliwatts": {}, "celsius": {}, "gpu_percent": None}


def test_power_modes_and_clocks() -> None:
    verbose = "NV Fan Mode:quiet\nNVPM VERB: Current mode: NV Power Mode: MODE_15W_6CORE\n2\nNVPM VERB: PARAM"
    assert parse_nvpmodel(verbose) == "MODE_15W_6CORE (2)"
    assert parse_nvpmodel("NV Power Mode: MAXN\n0\n") == "MAXN (0)"
    assert parse_nvpmodel("") is None
    shown = (
        "cpu0: Online=1 Governor=schedutil MinFreq=1510400 MaxFreq=1510400 CurrentFreq=1510400 IdleStates: WFI=0\n"
        "GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000\n"
    )
    assert parse_jetson_clocks(shown) == {"cpu0": True, "GPU": False}


def test_the_machine_is_looked_at(tmp_path: Path) -> None:
    here = look()
    assert here.rss_mb is not None and here.peak_rss_mb is not None and here.peak_rss_mb >= here.rss_mb > 1
    cpu = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    cpu.mkdir(parents=True)
    (cpu / "scaling_governor").write_text("powersave\n")
    (cpu / "scaling_cur_freq").write_text("1800000\n")
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text("61500\n")
    there = look(tmp_path)
    assert (there.clocks_mhz, there.governors, there.hottest_celsius) == ((1800.0, 1800.0), ("powersave",), 61.5)
    assert there.load is None and ("slowed by heat", "not known here") in there.rows()


@pytest.mark.parametrize("engine", ["ort", "ov"])
def test_card_and_operators_of_a_real_engine(engine: str, engine_parts: Callable[[str], Parts], tmp_path: Path) -> None:
    bundle = Bundle.open(engine_parts(engine).publish(tmp_path / "b.bundle"))
    artefact = bundle.manifest.artefacts[0]
    card = make_card(bundle, artefact, seconds=0.01)
    assert card.macs == 64 * 64 * 7 * 7, "one convolution of 7x7"
    assert card.floor_ms is not None and card.floor_ms > 0
    tensor = preprocess(bundle.golden_frames()[0], bundle.manifest.spec.preprocess)[0]
    found = operator_table(bundle, artefact, tensor)
    assert sum(row.share for row in found) == pytest.approx(1.0)
    convolution = next(row for row in found if "conv" in row.kind.lower())
    assert convolution.precision == "f32" and convolution.count >= 1


def test_files_without_shapes_have_no_count(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    artefact = bundle.manifest.artefacts[0]
    assert count_macs("fake", bundle.artefact_files(artefact), bundle.manifest.spec) is None
    with pytest.raises(UnsupportedError, match="reports no operators"):
        operator_table(bundle, artefact, np.zeros((1, 1, 64, 64), np.uint8))


def test_the_first_run_of_a_profile_is_thrown_away_and_codes_are_int8() -> None:
    events = [
        {"cat": "Node", "name": "m_kernel_time", "dur": dur,
         "args": {"op_name": "MatMulInteger", "input_type_shape": [{"uint8": [1]}, {"int8": [1]}]}}
        for dur in (1000, 10, 30)
    ]  # fmt: skip
    events.append({"cat": "Session", "name": "model_run", "dur": 5})
    assert parse_ort_profile(events, 3) == [("m", "MatMulInteger", "int8", 20.0)]


def test_quantiles_come_in_their_order() -> None:
    assert [found.percent for found in quantiles([1.0] * 5000)] == list(PERCENTS)
    assert all(found.value == 1.0 for found in quantiles([1.0] * 5000))
