"""Golden vectors: phantom frames and the answers to them.

The reference's answers, and each artefact's own with its tolerance.

They let a device check an artefact without PyTorch and without any patient's image. Frames are phantoms of seeds
0..31, drawn smaller than usual to keep a bundle small; training phantoms have seeds from 1,000,000.

Arrays (S frames): ``frames.safetensors`` has ``pixels`` uint8 SHW, ``spacing_mm`` float64 S2, ``seeds`` int64 S.
``reference.safetensors`` has ``logits`` float32 SKHW (or SK, or SDhw), unrounded, and ``readings`` float64, what the
runtime reads of them by the manifest's spec (tinyusfm_runtime.bundle.golden), with the digest of that spec. With
early exits ``logits`` are SEK, of all exits, and ``exit_index`` int64 S, ``exit_blocks`` int64, ``exit_entropy``
float64 and ``exit_patience`` int64 tell where the reference stopped, by which rule. An artefact's own file has
``logits`` float16 (float32 where the engine is exact): rounding keeps the sign, so a mask at threshold 0.5 is the
same, and what it changes at other thresholds is in the tolerance; its readings are those of the rounded logits. Equal
arrays give equal bytes.

It does not know how outputs were computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tinyusfm_export.verify.parity import Output
from tinyusfm_runtime.bundle.arrays import pack_arrays
from tinyusfm_runtime.bundle.golden import Prepared, golden_check, pack_golden
from tinyusfm_runtime.errors import BundleError, EngineError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec

GOLDEN_SEEDS = range(32)
"""Seeds of the golden phantoms."""

GOLDEN_SIZE = (270, 400)
"""Rows and columns of a golden phantom, the phantom's own default."""

NOISE_MARGIN = 4.0
"""How many times the noise measured between runs a later run may differ."""

DRIFT_SHARE = 0.5
"""How far a later run may move, as a share of the artefact's own distance from the reference."""

FLOORS = {"logit_abs": 1e-3, "differing_pixels": 1e-4, "hc_mm": 0.05}
"""Least tolerance: about 5 of 50,176 pixels, and a twentieth of the millimetre the gate allows."""

CEILINGS = {"logit_abs": float("inf"), "differing_pixels": 0.005, "hc_mm": 1.0}
"""A tolerance never grows beyond what the default gate allows against the reference."""


def golden_frames(seeds: Sequence[int] | range = GOLDEN_SEEDS) -> list[Frame]:
    """The golden phantoms, in order.

    Args:
        seeds: phantom seeds.
    """
    return [make_phantom(seed, height=GOLDEN_SIZE[0], width=GOLDEN_SIZE[1]).frame for seed in seeds]


def pack_frames(frames: Sequence[Frame]) -> bytes:
    """``golden/frames.safetensors``.

    Args:
        frames: grey frames of one size with a spacing; ``seq`` is the phantom's seed.
    """
    return pack_arrays(
        {
            "pixels": np.stack([frame.pixels for frame in frames]),
            "spacing_mm": np.array([frame.spacing_mm for frame in frames], np.float64),
            "seeds": np.array([frame.seq for frame in frames], np.int64),
        }
    )


def pack_reference(
    outputs: Sequence[Output], spec: ModelSpec, prepared: Prepared, exits: ExitPolicy | None = None
) -> bytes:
    """``golden/reference.safetensors``.

    Args:
        outputs: the reference's answers to the golden frames, in order.
        spec: the model, as the manifest will hold it.
        prepared: the golden frames' inputs.
        exits: the rule by which the reference stopped early, or None.
    """
    arrays: dict[str, np.ndarray] = {}
    if exits is not None:
        arrays["exit_index"] = np.array([output.exit_index for output in outputs], np.int64)
        arrays["exit_blocks"] = np.array(exits.blocks, np.int64)
        arrays["exit_entropy"] = np.array(exits.entropy, np.float64)
        arrays["exit_patience"] = np.array([exits.patience], np.int64)
    return pack_golden(stack_logits(outputs), spec, prepared, arrays)


def unpack_policy(arrays: Mapping[str, np.ndarray]) -> ExitPolicy:
    """The rule by which the reference stopped early.

    Args:
        arrays: of ``golden/reference.safetensors``.

    Raises:
        BundleError: they hold none.
    """
    try:
        return ExitPolicy(
            blocks=tuple(arrays["exit_blocks"].tolist()),
            entropy=tuple(arrays["exit_entropy"].tolist()),
            patience=int(arrays["exit_patience"][0]),
        )
    except (KeyError, IndexError, InputError) as error:
        raise BundleError(
            "golden/ does not say by which rule the reference stopped: export the bundle again"
        ) from error


def pack_own(outputs: Sequence[Output], spec: ModelSpec, prepared: Prepared, *, exact: bool = False) -> bytes:
    """``golden/<target>-<precision>.safetensors``.

    Args:
        outputs: the artefact's answers to the golden frames, in order.
        spec: the model, as the manifest will hold it.
        prepared: the golden frames' inputs.
        exact: later runs have to be equal, so nothing is rounded.
    """
    return pack_golden(stack_logits(outputs) if exact else round_logits(outputs), spec, prepared)


def check_identical(own: Sequence[Output], reruns: Sequence[Sequence[Output]]) -> None:
    """Checks that an engine which promises the same bytes gives them here.

    It promises the same bytes everywhere.

    Args:
        own: the answers that are stored.
        reruns: other runs' answers to as many of the same frames as each likes, the first ones.

    Raises:
        EngineError: a bit differs.
    """
    for rerun in reruns:
        for frame, (want, got) in enumerate(zip(own, rerun, strict=False)):
            if want.logits.tobytes() != got.logits.tobytes():
                raise EngineError(
                    f"the engine promises equal bytes, but golden frame {frame} differs between two runs: "
                    "report this machine's CPU; do not use the artefact on it"
                )


def stack_logits(outputs: Sequence[Output]) -> np.ndarray:
    """float32 logits of all frames, the leading 1 of each dropped."""
    return np.stack([output.logits[0] for output in outputs]).astype(np.float32)


def round_logits(outputs: Sequence[Output]) -> np.ndarray:
    """The same in float16, larger magnitudes cut to its largest number."""
    largest = float(np.finfo(np.float16).max)
    return np.clip(stack_logits(outputs), -largest, largest).astype(np.float16)


def find_tolerance(
    own: Sequence[Output],
    reruns: Sequence[Sequence[Output]],
    reference: Sequence[Output],
    spec: ModelSpec,
    placements: Sequence[Placement],
) -> dict[str, float]:
    """How far a later run of this artefact may lie from its stored answers.

    Each number is its floor plus the larger of NOISE_MARGIN times the noise measured here (other runs, other thread
    counts, rounding to float16 included) and DRIFT_SHARE times the distance from the reference, at most its ceiling.
    So an engine that computes in another precision, or a damaged kernel, is seen, since that moves an artefact as
    far as its quantization did or further; another order of summation is not.

    Args:
        own: the answers that are stored.
        reruns: answers of further runs, at least one.
        reference: the reference's answers.
        spec: the model.
        placements: where each golden frame lies in the input.

    Returns:
        ``logit_abs``, and for a segmentation ``differing_pixels`` and ``hc_mm``.

    Raises:
        EngineError: the artefact does not repeat its own answers.
    """
    stored = round_logits(own)
    noises = [golden_check(stack_logits(rerun), stored, spec, placements, {}).numbers for rerun in reruns]
    drift = golden_check(stack_logits(own), stack_logits(reference), spec, placements, {}).numbers
    return {name: _tolerance(name, [noise[name] for noise in noises], drift[name]) for name in drift}


def _tolerance(name: str, noises: Sequence[float], drift: float) -> float:
    floor, ceiling = FLOORS[name], CEILINGS[name]
    # written so that NaN is refused
    if not all(np.isfinite(noise) and noise <= ceiling for noise in noises):
        raise EngineError(f"the artefact does not repeat itself: {name} differs by {max(noises):.4g} between two runs")
    # a distance that is not finite comes of an artefact that missed its gate: it widens nothing
    moved = DRIFT_SHARE * drift if np.isfinite(drift) else 0.0
    return float(floor + min(ceiling, max(NOISE_MARGIN * max(noises), moved)))


__all__ = [
    "CEILINGS",
    "DRIFT_SHARE",
    "FLOORS",
    "GOLDEN_SEEDS",
    "GOLDEN_SIZE",
    "NOISE_MARGIN",
    "check_identical",
    "find_tolerance",
    "golden_frames",
    "pack_frames",
    "pack_own",
    "pack_reference",
    "round_logits",
    "stack_logits",
    "unpack_policy",
]
