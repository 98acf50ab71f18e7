"""The model card of a shipped student, written from its ``card.json``.

No number is typed here.

It does not measure anything and does not read weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinyusfm_edge.evaluation.bootstrap import Estimate
from tinyusfm_edge.release.texts import StudentText, text_of

CARD_VERSION = 1
"""Version of ``card.json``."""
UNSEEN = "The test split has not been looked at."
"""Said where only validation was scored."""


def render_card(card: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        card: content of ``card.json``.

    Returns:
        Text for people; every number in it comes from the card.
    """
    spec = card["spec"]
    text = text_of(card["name"])
    parts = [
        f"# {card['name']}",
        _demo_only(text),
        _provisional(card),
        _opt_in(text),
        _summary(spec),
        _section("Use", _use(spec)),
        _section("The network", _net(card)),
        _section("Input and output", _input(spec)),
        _section("How sure a reading is", _readings(spec)),
        _section("Data", _data(card)),
        _section("Training", _training(card)),
        _section("Accuracy of the PyTorch float32 reference", _metrics(card)),
        _section("Accuracy with the second pass", _as_read(card)),
        _section("Images without a head", _negatives(card["metrics"].get("negatives", ()))),
        _section("What the mask's threshold does", _thresholds(card)),
        _section("Early exits", _exits(spec)),
        _section("What a precision costs, per target, on patients", _gates(card["gates"]) + _wide(card.get("wide"))),
        _section("Activation ranges", _ranges(card["ranges"], text)),
        _section("Drift", _drift(card.get("drift"))),
        _section("Limits", "\n".join(f"* {limit}" for limit in text.limits)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _provisional(card: Mapping[str, Any]) -> str:
    if not card["provisional"]:
        return ""
    return "**Provisional: training is not finished. These weights stand in for the final ones; do not report them.**"


def _demo_only(text: StudentText) -> str:
    return f"**Demo only: {text.demo_only}.**" if text.demo_only else ""


def _opt_in(text: StudentText) -> str:
    return f"**Opt-in: {text.opt_in}.**" if text.opt_in else ""


def _summary(spec: Mapping[str, Any]) -> str:
    names = ", ".join(spec["labels"]).replace("_", " ")
    if spec["task"] == "classify":
        return f"Classification of grey B-mode ultrasound into {names}."
    return f"Binary segmentation of {names} in grey B-mode ultrasound, and the head circumference of the mask."


def _exits(spec: Mapping[str, Any]) -> str:
    policy = spec.get("exits")
    if policy is None:
        return ""
    blocks, levels = (", ".join(f"{value:g}" for value in policy[key]) for key in ("blocks", "entropy"))
    patience = f", or where {policy['patience']} in a row agree" if policy["patience"] else ""
    return (
        f"After blocks {blocks} an answer is taken where its normalised entropy is below {levels}{patience}. "
        "Calibrated on the validation split, so what it saves there is an optimistic estimate."
    )


def _use(spec: Mapping[str, Any]) -> str:
    return (
        f"{_sentence(spec['intended_use'])} It is **not a medical device** and has not been cleared for any clinical "
        f"decision.\n\nLicence of the weights: {spec['licence']}. Origin: {spec['origin']}."
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _net(card: Mapping[str, Any]) -> str:
    net, weights = card["architecture"], card["weights"]
    rows = [
        ("parameters", f"{net['parameters']:,}"),
        ("MACs a frame", f"{net['macs'] / 1e9:.3f} G, of it attention products {net['macs_attention'] / 1e9:.3f} G"),
        ("attention heads", net["heads"]),
        ("stored as", f"{weights['dtype']}, {weights['bytes']:,} bytes"),
        ("sha256", f"`{weights['sha256']}`"),
    ]
    mask = card["spec"]["task"] == "segment"
    head = "its published segmentation head" if mask else "mean pooling of patch tokens and a linear head"
    return f"TinyUSFM with {head}, re-implemented.\n\n" + _table(("", ""), rows)


def _input(spec: Mapping[str, Any]) -> str:
    pre = spec["preprocess"]
    crop = "no crop" if pre["crop"] is None else f"crop {pre['crop']}"
    frame = (
        f"One grey frame of any size: {crop}, aspect policy `{pre['aspect']}`, antialiased bilinear resize in 8-bit "
        f"fixed point to {pre['height']}x{pre['width']}; mean {_numbers(pre['mean'])} and standard deviation "
        f"{_numbers(pre['std'])} of three equal channels are inside the graph. "
    )
    if spec["task"] == "classify":
        return frame + f"The answer is one probability a class (softmax): {', '.join(spec['labels'])}."
    return frame + (
        f"The mask is cut at probability "
        f"{spec['threshold']:g}. Post-processing `{spec['postprocess']}`: largest 8-connected component without its "
        "holes, the ellipse that holds the most of the clipped logits, scaled by the frame's own row and column "
        "spacing, circumference by Ramanujan's second formula. Without a spacing there are no millimetres. A mask that "
        "touches the edge of the frame or of the field of view is flagged: its circumference is too small. "
        f"{_AGAIN[spec['second_pass']]}"
    )


_AGAIN = {
    "never": "There is no second pass.",
    "small": "A mask below a fifth of the frame is looked at again, on a crop around it.",
    "always": "Every mask is looked at again, on a crop around it.",
}


def _readings(spec: Mapping[str, Any]) -> str:
    rules = spec["reading"]
    if rules is None:
        return "No thresholds are calibrated: every reading is `unchecked`."
    rates = rules["rates"]
    rows = [
        (rule["label"], _number(rule["confidence"], 4), _number(rule["agreement"], 4)) for rule in rules["thresholds"]
    ]
    return (
        "A reading is `good` from these thresholds on, if nothing else speaks against it, else `doubtful`. Calibrated "
        f"on {rates['frames']} validation frames of {rates['groups']} patients: {rates['good']} good, "
        f"{rates['doubtful']} doubtful ({rates['doubtful_but_right']} of them right), {rates['none']} without a "
        f"finding. Wrong means: {rates['wrong_means']}. {rates['wrong']} were wrong, {rates['good_but_wrong']} of them "
        f"called good (upper end of the 95 % interval: {rates['good_but_wrong_limit']:.1%} of the frames).\n\n"
        + _table(("label", "confidence", "agreement"), rows)
    )


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _data(card: Mapping[str, Any]) -> str:
    data = card["data"]
    rows = [(name, str(count["frames"]), str(count["groups"])) for name, count in data["splits"].items()]
    text = text_of(card["name"])
    return (
        f"{data['name']}: {data['title']} ({data['licence']}, doi:{data['doi']}). {data['citation']}.\n\n"
        f"{text.grouping} The test split is looked at once, for the report.{_looks(card)}\n\n"
        + _table(("split", "frames", "patients" if text.task == "segment" else "groups"), rows)
        + (f"\n\n{data['others']}" if "others" in data else "")
    )


def _looks(card: Mapping[str, Any]) -> str:
    looks = card.get("earlier_looks", ())
    earlier = [
        f"weights `{look['weights_sha256'][:12]}` (Dice {_estimate(look['scores'].get('dice'), 4)})" for look in looks
    ]
    if not earlier:
        return ""
    return (
        f" For a predecessor it had been looked at before: {', '.join(earlier)}. These weights were chosen by the "
        "validation split alone."
    )


def _training(card: Mapping[str, Any]) -> str:
    start = f" Start weights: {card['start']}." if card["start"] else ""
    recipe = card["recipe"]
    if recipe is None:
        return "The run left no configuration." + start
    if "adapt" in recipe:
        return _adaptation(recipe) + start
    share = 100 * recipe["phantom_share"]
    since = recipe.get("polish_from")
    polish = f" From step {since} on the ranges of the augmentation are halved." if since is not None else ""
    note = f" {recipe['note'][:1].upper()}{recipe['note'][1:]}." if recipe.get("note") else ""
    return (
        f"Supervised, AdamW, {recipe['steps']} steps of {recipe['batch']} frames, peak learning rate "
        f"{recipe['learning_rate']:g}, BCE and soft Dice, moving average of the weights {recipe['ema']:g}, seed "
        f"{recipe['seed']}. The weights kept are those of the best validation Dice. {share:g} % of a batch are "
        f"synthetic phantoms ({recipe['num_phantoms']} drawn), so that self-tests and demonstrations need no patient "
        "image; phantoms say nothing about accuracy on patients." + start + polish + note
    )


def _adaptation(run: Mapping[str, Any]) -> str:
    """A run of the common recipe."""
    recipe = run["adapt"]
    mask = recipe["student"]["task"] == "segment"
    parts = [
        f"Adaptation, AdamW, {recipe['steps']} steps of {recipe['batch']} frames, peak learning rate "
        f"{recipe['learning_rate']:g}, layer-wise decay {recipe['layer_decay']:g}, "
        f"{'BCE and soft Dice' if mask else 'class-weighted cross-entropy'}, moving average of the weights "
        f"{recipe['ema']:g}, seed {recipe['seed']}, {recipe['precision']}. The weights kept are those of the best "
        f"validation {'Dice' if mask else 'balanced accuracy'}.",
        "Start: random weights." if run.get("init") is None else f"Start: weights `{run['init']['sha256'][:12]}`.",
    ]
    if recipe["kd"]:
        parts.append(f"Distilled from {run['teacher']['name']}, adapted to the task: {', '.join(recipe['kd'])}.")
    if recipe["phantom_share"]:
        parts.append(
            f"{100 * recipe['phantom_share']:g} % of a batch are synthetic phantoms ({recipe['num_phantoms']} drawn); "
            "phantoms say nothing about accuracy on patients."
        )
    if recipe.get("negative_share"):
        parts.append(
            f"{100 * recipe['negative_share']:g} % of a batch hold nothing to segment: {run['data']['negatives']} "
            f"training frames of {' and '.join(run['negatives'])}."
        )
    return " ".join(parts)


def _class_metrics(reports: Sequence[Mapping[str, Any]]) -> str:
    names = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auc": "AUC", "f1": "F1", "ece": "ECE"}
    rows = [
        (f"{report['split']} ({report['metrics']['accuracy']['num_values']})",)
        + tuple(_estimate(report["metrics"][name], 4) for name in names)
        for report in reports
    ]
    labels = reports[-1]["labels"]
    confusion = [
        (f"true {name}", *map(str, counts)) for name, counts in zip(labels, reports[-1]["confusion"], strict=True)
    ]
    return (
        "Mean and 95 % interval (bootstrap over groups).\n\n"
        + _table(("split", *names.values()), rows)
        + f"\n\nAnswers on {reports[-1]['split']}:\n\n"
        + _table(("", *labels), confusion)
    )


def _metrics(card: Mapping[str, Any]) -> str:
    reports = [report for report in (card["metrics"]["val"], card["metrics"]["test"]) if report is not None]
    if "metrics" in reports[0]:
        return _class_metrics(reports) + ("" if card["metrics"]["test"] else "\n\n" + UNSEEN)
    missing = "" if card["metrics"]["test"] else f"\n\n{UNSEEN}"
    label = reports[-1]["label_bias_mm"]
    note = ""
    if label:
        note = (
            "\n\nErrors are against the stated circumference. The label masks' own ellipses differ from it by "
            f"{_estimate(label, 2, sign=True)} mm on {reports[-1]['split']}: what the network learns is the masks."
        )
    once = "" if card["spec"]["second_pass"] == "never" else " One pass a frame."
    return (
        f"Mean and 95 % interval (bootstrap over patients), in the model's input geometry.{once}\n\n"
        + _metric_table(reports)
        + note
        + missing
    )


def _as_read(card: Mapping[str, Any]) -> str:
    """The scores of what a user sees, where that is not the first pass alone."""
    found = card["metrics"].get("as_read")
    if not found:
        return ""
    reports = [report for report in (found["val"], found["test"]) if report is not None]
    looked = ", ".join(f"{r['looked_twice']} of {r['dice']['num_values']} on {r['split']}" for r in reports)
    once = " The test split was scored this way after its first look, with the same weights." if found["test"] else ""
    return (
        f"The same frames as a user's are read. {_AGAIN[card['spec']['second_pass']]} Looked at twice: {looked}.{once}"
        "\n\n" + _metric_table(reports)
    )


def _metric_table(reports: Sequence[Mapping[str, Any]]) -> str:
    head: tuple[str, ...] = (
        "split",
        "Dice",
        "worst",
        "IoU",
        "HC absolute error, mm",
        "HC error, mm",
        "p95, mm",
        "at the border",
        "no mask",
    )
    shapes = [report.get("ellipse_dice") for report in reports]
    rows = [_metric_row(report) for report in reports]
    if any(shapes):
        head = (*head, "Dice of the reported ellipse")
        rows = [(*row, _estimate(shape, 4)) for row, shape in zip(rows, shapes, strict=True)]
    return _table(head, rows)


def _metric_row(report: Mapping[str, Any]) -> tuple[str, ...]:
    p95 = report["hc_p95_mm"]
    return (
        f"{report['split']} ({report['dice']['num_values']})",
        _estimate(report["dice"], 4),
        f"{report['worst_dice']:.3f}",
        _estimate(report["iou"], 4),
        _estimate(report["hc_mae_mm"], 2),
        _estimate(report["hc_bias_mm"], 2, sign=True),
        "-" if p95 is None else f"{p95:.2f}",
        f"{report['border']:.1%}",
        str(report["not_found"]),
    )


def _estimate(value: Mapping[str, Any] | None, digits: int, *, sign: bool = False) -> str:
    return "-" if value is None else Estimate(**value).text(digits, sign=sign)


def _negatives(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    rows = [
        (entry["name"], str(entry["frames"]), str(entry["groups"]), str(entry["empty"]), f"{entry['largest']:.1%}")
        for entry in found
    ]
    return "Test splits of other organs; an answer without a marked pixel is right.\n\n" + _table(
        ("set", "frames", "groups", "nothing marked", "largest marked share of an image"), rows
    )


def _thresholds(card: Mapping[str, Any]) -> str:
    reports = card["thresholds"]
    if not reports:
        return ""
    rows = [
        (
            f"{r['threshold']:g}",
            _estimate(r["dice"], 4),
            _estimate(r["hc_mae_mm"], 2),
            _estimate(r["hc_bias_mm"], 2, sign=True),
        )
        for r in sorted([card["metrics"]["val"], *reports], key=lambda r: float(r["threshold"]))
    ]
    used = card["spec"]["threshold"]
    return f"Validation split; {used:g} is used.\n\n" + _table(
        ("cut", "Dice", "HC absolute error, mm", "HC error, mm"), rows
    )


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    if not gates:
        return "Not measured yet for these weights."
    classes = "top1" in gates[0]["summary"]["statistics"]
    columns = _CLASS_GATE if classes else _MASK_GATE
    rows = []
    for gate in gates:
        found = gate["summary"]
        numbers = (_number(found["statistics"].get(key), digits) for key, _, digits in columns)
        verdict = "passed" if found["passed"] else "; ".join(found["failures"])
        rows.append((gate["target"], gate["precision"], *numbers, verdict))
    head = ("target", "precision", *(title for _, title, _ in columns), "gate")
    return "Each artefact in its own engine against the PyTorch float32 reference.\n\n" + _table(head, rows)


def _wide(found: Mapping[str, Any] | None) -> str:
    """Which layers keep more than 8 bits, and the worst frame without and with."""
    if not found:
        return ""
    layers = ", ".join(f"`{layer}`" for layer in found["layers"])
    what = "One layer keeps" if len(found["layers"]) == 1 else "Some layers keep"
    without, *_, with_all = found["worst_dice"]
    return (
        f"\n\n{what} more than 8 bits in every int8 artefact: {layers} (`wide.json`). With 8 bits everywhere the worst "
        f"of {found['frames']} validation frames would have Dice {without:.4f} against float32 in the integer "
        f"artefact; so the worst has {with_all:.4f}."
    )


_MASK_GATE = (
    ("dice_mean", "Dice, mean", 4),
    ("dice_worst", "Dice, worst", 4),
    ("hc_p95_mm", "HC difference p95, mm", 2),
)
_CLASS_GATE = (
    ("top1", "same answer", 4),
    ("drift_mean", "change of a probability, mean", 4),
    ("drift_worst", "worst", 4),
)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ranges(ranges: Mapping[str, Any], text: StudentText) -> str:
    strata = ", ".join(f"{name}: {count}" for name, count in ranges["strata"].items())
    even = f"even over classes ({strata})"
    if text.task == "segment":
        even = f"even over head sizes ({strata}; quartiles of the head's share of the image)"
    return (
        f"{ranges['tensors']} tensors, method `{ranges['method']}`, from {ranges['frames']} frames of the training "
        f"split, one per patient while patients last, {even}. `ranges.json` names the frames' hashes; set "
        f"`{ranges['set_id'][:16]}`."
    )


def _drift(drift: Mapping[str, Any] | None) -> str:
    if drift is None:
        return ""
    return (
        f"`drift.safetensors` knows what the {drift['frames']} training frames look like to the network and by their "
        "grey levels; "
        f"its threshold was set on one frame of each of {drift['held_out']} validation patients. Of windows of frames "
        f"like these at most {drift['false_alarms']:.0%} alarm; that other organs, probes or Doppler alarm was looked "
        "at with the clips named in the log, and is no proof for those not looked at."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


__all__ = ["CARD_VERSION", "UNSEEN", "render_card"]
