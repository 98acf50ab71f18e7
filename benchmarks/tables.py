"""What the benchmark prints: the static card, the engines, the accuracy-latency frontier, the stages of whole frames.

Figures come in ready; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rounds import Statistics
from tinyusfm_runtime.device.machine import machine_card
from workers import Measured

Agreement = Mapping[str, Mapping[str, float]]
"""Worker -> statistics of its masks and logits against the reference's (parity.py)."""


GATE_WORDS = {True: "holds", False: "MISSED", None: "-"}
"""Verdict -> cell; rivals have no gate."""


AIMS = (
    ("ours openvino-int8", "ort fp32", 2.3),
    ("ours openvino-int8", "eager", 4.5),
    ("ours openvino-bf16", "ort fp32", 1.7),
)
"""Worker, rival and the ratio to reach: published head, 12x16, 224x224, one thread, AVX512-VNNI and -BF16."""
FRAME_AIM = 1.4
"""Largest time of a whole 1080p frame over the network's own."""


def floors_ms(card: Mapping[str, Any], gops: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Precision -> time of all MACs at the measured peak, ms (one MAC is two operations)."""
    return {name: 2e-6 * card["macs"] / gops[name]["best"] for name in ("fp32", "bf16", "int8")}


def floor_of(name: str, floors: Mapping[str, float]) -> float:
    """The floor of the arithmetic a worker's name speaks of, ms."""
    return next((floors[precision] for precision in ("int8", "bf16") if precision in name), floors["fp32"])


def print_card(card: Mapping[str, Any], gops: Mapping[str, Mapping[str, float]], threads: int) -> None:
    """Prints what the architecture implies on this machine."""
    machine, size = machine_card(), card["image_size"]
    print(f"{machine.cpu}, {machine.usable_cpus} CPUs, {threads} thread(s): {' '.join(machine.features)}")
    parts = ", ".join(f"{kind} {card[f'macs_{kind}'] / 1e9:.3f}" for kind in ("linear", "convolution", "attention"))
    weights = ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in card["weight_bytes"].items())
    print(f"{card['task']} student, heads {card['heads']}, {size}x{size}, {card['parameters']:,} parameters: {weights}")
    print(f"{card['macs'] / 1e9:.3f} GMAC: {parts}")
    floors = floors_ms(card, gops)
    speeds = ", ".join(f"{name} {gops[name]['best']:.0f} GOP/s = {ms:.2f} ms" for name, ms in floors.items())
    print(f"floor, every MAC at the measured peak: {speeds}; eager's own fp32 peak {gops['fp32 (MKL)']['best']:.0f}")


def print_noise(measured: Measured, runs: int) -> None:
    """Prints how quiet the machine was."""
    noise = [("foreign CPU", measured.noise.foreign), ("steal", measured.noise.steal)]
    seen = ", ".join(f"{name} {'unknown' if value is None else f'{value:.4f}'}" for name, value in noise)
    slow = " ".join(f"{value:.2f}" for value in measured.slowdowns)
    print(f"\n{len(measured.slowdowns)} rounds of {runs}, {len(measured.quiet)} counted; {seen}; slowdowns {slow}")


def print_engines(
    measured: Measured, agreement: Agreement, floors: Mapping[str, float], gates: Mapping[str, bool]
) -> None:
    """Prints the engines, fastest first."""
    print(
        f"{'engine':24} {'quiet p50':>9} {'p50':>7} {'p90':>7} {'p99':>7}  {'x eager [p10 .. p90]':>22}"
        f"  {'x ort fp32 [p10 .. p90]':>23} {'x floor':>7} {'dice mean':>9} {'worst':>6} {'logit max':>9}"
        f" {'gate':>6} {'load ms':>7} {'RSS MB':>6}"
    )
    for name, row in _fastest_first(measured.statistics):
        found, card = agreement.get(name, {}), measured.cards[name]
        ratios = "  ".join("{:6.2f} [{:5.2f} .. {:5.2f}]".format(*ratio) for ratio in row.ratios.values())
        dice = " ".join(f"{found.get(key, float('nan')):.4f}" for key in ("dice_mean", "dice_worst"))
        print(
            f"{name:24} {row.quiet_p50_ms:9.2f} {row.p50_ms:7.2f} {row.p90_ms:7.2f} {row.p99_ms:7.2f}  {ratios}"
            f" {row.quiet_p50_ms / floor_of(name, floors):7.2f}    {dice} {found.get('logit_max_abs', 0):9.2e}"
            f" {GATE_WORDS[gates.get(name)]:>6} {card['load_ms']:7.0f} {card['peak_rss_mb']:6.0f}"
        )


def frontier(figures: Mapping[str, Statistics], agreement: Agreement) -> list[str]:
    """Workers that no faster one equals in worst Dice against the reference, fastest first."""
    kept: list[str] = []
    for name, _ in _fastest_first(figures):
        worst = agreement.get(name, {}).get("dice_worst", 0.0)
        if all(worst > agreement.get(other, {}).get("dice_worst", 0.0) for other in kept):
            kept.append(name)
    return kept


def print_frames(measured: Measured) -> None:
    """Prints whole frames with every stage."""
    print("\n1080p RGB frame to mask, quiet medians in ms")
    print(f"{'pipeline':24} {'pre':>7} {'net':>7} {'post':>7} {'all':>7} {'all/net':>7} {'x typical':>9}  torch")
    medians = measured.stage_medians()
    for name, row in _fastest_first(measured.statistics):
        pre, net, post, total = (medians[name][stage] for stage in ("preprocess", "infer", "postprocess", "total"))
        loaded = "loaded" if measured.cards[name]["torch"] else "no"
        ratio = row.ratios["typical"][0]
        print(f"{name:24} {pre:7.2f} {net:7.2f} {post:7.2f} {total:7.2f} {total / net:7.2f} {ratio:9.2f}  {loaded}")


def print_aims(tensors: Measured, frames: Measured, gates: Mapping[str, bool]) -> None:
    """Prints what was to be reached and what was."""
    print("\naims, medians over the counted rounds")
    for name, rival, aim in AIMS:
        if name in tensors.statistics:
            ratio = tensors.statistics[name].ratios[rival][0]
            verdict = f"{ratio:.2f}, {_reached(ratio >= aim)}; gate {GATE_WORDS[gates[name]]}"
            print(f"  {name} at least {aim} x {rival}: {verdict}")
    for name, stages in frames.stage_medians().items():
        if name in gates:
            share = stages["total"] / stages["infer"]
            print(
                f"  {name} whole frame at most {FRAME_AIM} x its network: {share:.2f}, {_reached(share <= FRAME_AIM)}"
            )


def _reached(held: bool) -> str:
    return "reached" if held else "NOT REACHED"


def _fastest_first(figures: Mapping[str, Statistics]) -> list[tuple[str, Statistics]]:
    return sorted(figures.items(), key=lambda item: item[1].quiet_p50_ms)


__all__ = [
    "AIMS",
    "FRAME_AIM",
    "GATE_WORDS",
    "Agreement",
    "floor_of",
    "floors_ms",
    "frontier",
    "print_aims",
    "print_card",
    "print_engines",
    "print_frames",
    "print_noise",
]
