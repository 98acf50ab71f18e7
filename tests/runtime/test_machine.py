"""The machine's card: what engines choose kernels by, read from /proc/cpuinfo as other machines have it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tinyusfm_runtime.device.machine import (
    WATCHED_FEATURES,
    card_from_cpuinfo,
    default_threads,
    machine_card,
    same_class,
)

XEON = "".join(
    f"processor\t: {cpu}\nmodel name\t: Intel(R) Xeon(R) 8480\nphysical id\t: 0\ncore id\t\t: {cpu // 2}\n"
    "flags\t\t: fpu fma avx2 avx512f avx512bw avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16 rdpid\n\n"
    for cpu in range(8)
)
PI5 = (
    "".join(
        f"processor\t: {cpu}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\n"
        for cpu in range(4)
    )
    + "Revision\t: d04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
)
SERVER = "processor\t: 0\nFeatures\t: asimd asimdhp sve i8mm bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


def test_xeon() -> None:
    card = card_from_cpuinfo(XEON, "x86_64")
    assert (card.cpu, card.cores) == ("Intel(R) Xeon(R) 8480", 4)
    assert card.features[:2] == ("amx_bf16", "amx_int8") and "rdpid" not in card.features
    assert card.has_bf16 and card.cpu_class.startswith("x86_64:amx_bf16+")


def test_raspberry_pi() -> None:
    card = card_from_cpuinfo(PI5, "aarch64")
    assert (card.cpu, card.cores) == ("Raspberry Pi 5 Model B Rev 1.0", 4)
    assert card.features == ("asimd", "asimddp", "asimdhp") and not card.has_bf16


def test_arm_server_without_a_name() -> None:
    card = card_from_cpuinfo(SERVER, "aarch64")
    assert card.cpu == "Arm implementer 0x41 part 0xd40" and card.has_bf16


@pytest.mark.parametrize("text", ["", "nonsense", ":\n:::\n\n\n:", "flags : avx2", "processor\n\nprocessor : 0\n"])
def test_a_machine_that_says_nothing(text: str) -> None:
    card = card_from_cpuinfo(text, "arm64")
    assert card.cpu == "arm64" and card.cores >= 1 and card.features == ()
    assert card.cpu_class == "arm64:unknown" and not card.has_bf16


def test_this_machine() -> None:
    card = machine_card()
    assert card.cpu and card.cores >= 1 and card.usable_cpus >= 1
    assert set(card.features) <= set(WATCHED_FEATURES) and list(card.features) == sorted(card.features)
    assert json.loads(json.dumps(card.to_json()))["cpu_class"] == card.cpu_class


def test_classes_are_the_watched_features_and_nothing_else() -> None:
    xeon, pi = card_from_cpuinfo(XEON, "x86_64"), card_from_cpuinfo(PI5, "aarch64")
    assert same_class(list(xeon.features), xeon)
    assert same_class([*xeon.features, "rdpid", "some_new_flag"], xeon)
    assert not same_class(list(pi.features), xeon)
    assert not same_class(list(xeon.features[1:]), xeon), "one feature more may mean another kernel"
    assert not same_class([*xeon.features, "avx_vnni"], xeon)


@pytest.mark.parametrize("listed", [None, [], {}, "avx2", 3, [1, None]])
def test_what_says_nothing_is_no_class(listed: object) -> None:
    unknown = card_from_cpuinfo("", "x86_64")
    assert not same_class(listed, unknown), "two unknown machines are not alike"
    assert not same_class(listed, card_from_cpuinfo(XEON, "x86_64"))


@pytest.mark.parametrize(
    ("cores", "usable", "threads"), [(1, 1, 1), (2, 2, 1), (4, 8, 2), (8, 8, 4), (64, 128, 4), (8, 2, 1)]
)
def test_default_threads_leave_half_of_the_cores(cores: int, usable: int, threads: int) -> None:
    card = replace(card_from_cpuinfo(XEON, "x86_64"), cores=cores, usable_cpus=usable)
    assert default_threads(card) == threads
