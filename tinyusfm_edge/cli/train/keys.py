"""Names of every setting of ``adapt`` and ``distill``, known without torch.

A misspelt ``--set`` then costs no seconds of imports. A test holds them against the dataclasses that own them; they are
names alone: values and defaults stay there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyusfm_edge.settings import parse_change, read_settings
from tinyusfm_runtime.errors import InputError

ADAPT_KEYS = """
steps batch learning_rate layer_decay weight_decay warmup ema clip evaluate_every seed labels labels_seed balance
smoothing precision phantom_share num_phantoms held_phantoms masks repeat_small small_mm deep border drop_tokens
negative_share reading student.task student.num_classes student.image_size student.width student.depth student.heads
student.seg_head student.drop_path student.exits student.image_width augment.geometry augment.rotate_deg
augment.scale augment.aspect augment.shift augment.gamma augment.contrast augment.gain augment.ramp augment.noise
augment.blur augment.erase augment.shadow augment.sides augment.doppler augment.bars augment.screen polish_from kd
temperature kd_logits kd_features kd_csf lora_rank teacher_steps teacher_learning_rate teacher_margin transfer_share
num_synthetic exits_kl
"""
"""Of ``AdaptConfig``, with a dot into a part."""
DISTILL_KEYS = """
method views targets standardise layers weights weight_place weight_floor dynamic_scale reconstruct balance keep
masks lambda_relation lambda_kd beta lambda_spatial lambda_frequency teacher_size variants inactive_below
view.image_size view.crop_area view.crop_aspect view.flip view.gamma view.mask.cell view.mask.spatial_ratio
view.mask.centre view.mask.first view.mask.growth view.mask.widest view.mask.frequency_ratio student.task
student.num_classes student.image_size student.width student.depth student.heads student.seg_head student.drop_path
student.exits student.image_width mae.ratio mae.width mae.depth mae.heads mae.norm_pixels dino.local_crops
dino.local_size dino.global_area dino.local_area dino.hidden dino.bottleneck dino.outputs dino.student_temperature
dino.teacher_temperature dino.last_teacher_temperature dino.temperature_warmup dino.momentum dino.centre_momentum
dino.freeze_last dino.saved dino.collapsed_below epochs least_steps steps batch base_learning_rate learning_rate
final_learning_rate warmup weight_decay betas clip accumulate precision seed view_seed checkpoint_every log_every
"""
"""Of ``DistillConfig``, likewise."""


def check_keys(known: str, config: Path | None, changes: Sequence[str] | None) -> None:
    """Refuses settings that there are not.

    Args:
        known: every key, with blanks between; a dot goes into a part.
        config: JSON file, or None.
        changes: ``key=value``.

    Raises:
        InputError: an unknown key, a file that cannot be read, or what is no ``key=value``.
    """
    names = known.split()
    _check(names, read_settings(config), "")
    for change in changes or ():
        _check(names, parse_change(change), "")


def _check(names: Sequence[str], given: Mapping[str, Any], where: str) -> None:
    here = list(dict.fromkeys(name.removeprefix(where).split(".")[0] for name in names if name.startswith(where)))
    for key, value in given.items():
        if key not in here:
            raise InputError(f"there is no setting {where}{key}; there is: {', '.join(here)}")
        if isinstance(value, Mapping) and any(name.startswith(f"{where}{key}.") for name in names):
            _check(names, value, f"{where}{key}.")


__all__ = ["ADAPT_KEYS", "DISTILL_KEYS", "check_keys"]
