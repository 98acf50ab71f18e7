"""What the export graph gives to the drift statistic.

Which auxiliary outputs, and their values on a stream of frames.

Mean patch tokens after blocks 2, 4, 6 and 10 (counted from 0), as US-Metrics (arXiv:2604.19512) takes them from the
same backbone, and the largest absolute value behind the GELU of the same blocks, where activations leave their
calibrated range first. It does not know mixtures, thresholds or bundles.

Shapes: N frames, T drift features: the mean tokens of all tapped blocks side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tinyusfm_calibration.drift_fit import DriftSample, drift_sample
from tinyusfm_calibration.sets import NamedFrame
from tinyusfm_export.graph.build import AUXILIARY_PREFIX, PEAK_PREFIX, build_graph
from tinyusfm_export.quantize.fake_quant import float_net
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

DRIFT_BLOCKS: Final = (2, 4, 6, 10)
"""Blocks that are listened to, counted from 0; those that a shallower student lacks are left out."""


def drift_outputs(depth: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the auxiliary outputs.

    Args:
        depth: blocks of the student, with early exits those before the first.

    Returns:
        Mean tokens and peaks; the first block where the student is too shallow for any other.
    """
    blocks = [block for block in DRIFT_BLOCKS if block < depth] or [0]
    return tuple(f"{AUXILIARY_PREFIX}{b}" for b in blocks), tuple(f"{PEAK_PREFIX}{b}" for b in blocks)


def sampler(module: nn.Module, spec: ModelSpec) -> Callable[[NamedFrame], DriftSample]:
    """A function that takes from a frame what clusters and drift statistic need.

    Args:
        module: the student.
        spec: its spec.

    Raises:
        InputError: not a student that can be exported.
    """
    student: Any = module
    # what lies behind an early exit is often not computed
    depth = spec.exits.blocks[0] if spec.exits is not None else len(student.backbone.blocks)
    tokens, peaks = drift_outputs(depth)
    net = float_net(build_graph(module, spec, auxiliary=(*tokens, *peaks)))

    def sample(named: NamedFrame) -> DriftSample:
        found = net(preprocess(named.frame, spec.preprocess)[0])
        return drift_sample(named.frame, found, token_names=tokens, peak_names=peaks, group=named.group)

    return sample


def tokens_of(samples: Iterable[DriftSample]) -> np.ndarray:
    """Embeddings for clustering, float32 (N, T).

    The samples' tokens around their mean.

    All images of one organ point the same way (cosines near 1), so that without the mean every image would be
    everyone's near-duplicate.
    """
    tokens_NT = np.stack([sample.tokens_T for sample in samples])
    centred_NT: np.ndarray = tokens_NT - tokens_NT.mean(0)
    return centred_NT


__all__ = ["DRIFT_BLOCKS", "drift_outputs", "sampler", "tokens_of"]
