"""What an artefact is expected to answer.

Preprocessed frames with the reference's answers, live or as stored.

The live ones run PyTorch (reference.py); the stored ones come out of a bundle's ``golden/`` and need numpy only. It
does not know artefacts or gates.

Shapes: NCHW input; SKHW or SK logits of S frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.verify.confidence import Truth
from tinyusfm_export.verify.engine_run import preprocess_all
from tinyusfm_export.verify.gate_frames import KINDS, GateFrames
from tinyusfm_export.verify.golden import unpack_policy
from tinyusfm_export.verify.parity import Output, read_exits, read_output
from tinyusfm_runtime.bundle.reader import GOLDEN_REFERENCE, Bundle
from tinyusfm_runtime.early_exit import is_chain
from tinyusfm_runtime.errors import BundleError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.spec import LOGITS_NAME, ExitPolicy, ModelSpec

if TYPE_CHECKING:
    from torch import nn

STORED = "PyTorch float32 as stored in golden/, not recomputed"
"""What the reference is called where the student is not at hand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Preprocessed frames and the reference's answers to them.

    Attributes:
        ids: names of the frames.
        inputs: uint8 NCHW tensor and placement of each.
        outputs: the reference's answer to each.
        reference: what the reference is, in words.
        provenance: which frames these are.
        truths: what is right on each frame (see confidence.py), or nothing.
        exits: the rule by which the reference stopped early, or None.
        frames: the frames themselves, for the second pass; none of golden ones, which are read in one pass.
    """

    ids: tuple[str, ...]
    inputs: tuple[tuple[np.ndarray, Placement], ...]
    outputs: tuple[Output, ...]
    reference: str
    provenance: Mapping[str, Any]
    truths: tuple[Truth, ...] = ()
    exits: ExitPolicy | None = None
    frames: tuple[Frame, ...] = ()

    @property
    def golden(self) -> bool:
        """True if these are a bundle's golden phantoms and no frames chosen for the model."""
        return self.provenance.get("kind") == "golden"


def expect(module: nn.Module, spec: ModelSpec, gate_frames: GateFrames) -> Expected:
    """The live reference's answers to a gate's frames.

    Frames of a data set are named by their hash: file names may name patients and do not enter a bundle.

    Args:
        module: the student, float32.
        spec: its spec.
        gate_frames: the frames.

    Raises:
        MissingExtra: torch is not installed.
        InputError: the module cannot be a reference.
    """
    provenance = gate_frames.provenance()
    if gate_frames.kind in ("data", "calibration"):
        provenance["ids"] = [found[:16] for found in provenance["pixels_sha256"]]
    found = _live(module, spec, [named.frame for named in gate_frames.frames], provenance)
    return replace(found, truths=gate_frames.truths)


def expect_golden(module: nn.Module, spec: ModelSpec, frames: Sequence[Frame]) -> Expected:
    """The live reference's answers to golden frames.

    Args:
        module: the student, float32.
        spec: its spec.
        frames: golden phantoms; ``seq`` is the seed.

    Raises:
        MissingExtra: torch is not installed.
        InputError: the module cannot be a reference.
    """
    return _live(module, spec, frames, _golden_provenance(frames))


def stored_expectation(bundle: Bundle, path: str = GOLDEN_REFERENCE) -> Expected:
    """A bundle's golden frames with the reference's stored answers.

    Args:
        bundle: it.
        path: ``Artefact.reference`` of the artefact that is judged.

    Raises:
        BundleError: frames and answers do not fit together.
    """
    spec, frames = judged_spec(bundle), bundle.golden_frames()
    inputs = preprocess_all(frames, spec)
    stored = bundle.golden_reference(path)
    logits_SK = stored["logits"]
    if len(logits_SK) != len(inputs) or logits_SK.dtype != np.float32:
        raise BundleError("golden/ holds no float32 reference answer for each of its frames")
    spec = replace(spec, exits=unpack_policy(stored) if spec.exits is not None else None)
    if (logits_SK.ndim == 3) != (spec.exits is not None):
        raise BundleError("golden/ and the manifest disagree about early exits: export the bundle again")
    outputs = tuple(
        read_output({LOGITS_NAME: logits[None]}, spec, placement, tensor=tensor)
        if spec.exits is None
        else read_exits(logits[None], spec, placement)
        for logits, (tensor, placement) in zip(logits_SK, inputs, strict=True)
    )
    return replace(_expected(inputs, outputs, STORED, _golden_provenance(frames)), exits=spec.exits)


def judged_spec(bundle: Bundle) -> ModelSpec:
    """The bundle's model as its artefacts run it.

    Without early exits where none of them is a chain.
    """
    chained = any(is_chain(bundle.artefact_files(artefact)) for artefact in bundle.manifest.artefacts)
    return bundle.manifest.spec if chained else replace(bundle.manifest.spec, exits=None)


def _live(module: nn.Module, spec: ModelSpec, frames: Sequence[Frame], provenance: Mapping[str, Any]) -> Expected:
    from tinyusfm_export.verify.reference import reference_name, reference_outputs

    twice = provenance.get("kind") != "golden"
    outputs = reference_outputs(module, spec, frames, second_pass=twice)
    found = _expected(preprocess_all(frames, spec), outputs, reference_name(), provenance)
    return replace(found, exits=spec.exits, frames=tuple(frames) if twice else ())


def _expected(
    inputs: Sequence[tuple[np.ndarray, Placement]],
    outputs: Sequence[Output],
    reference: str,
    provenance: Mapping[str, Any],
) -> Expected:
    return Expected(
        ids=tuple(provenance["ids"]),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        reference=reference,
        provenance=provenance,
    )


def _golden_provenance(frames: Sequence[Frame]) -> dict[str, Any]:
    ids = [f"phantom:{frame.seq}" for frame in frames]
    return {"kind": "golden", "about": KINDS["golden"], "source": "", "count": len(ids), "ids": ids}


__all__ = ["STORED", "Expected", "expect", "expect_golden", "judged_spec", "stored_expectation"]
