"""How the commands are presented.

Panels of commands and of options, metavars, an example per command, exit codes.

The overview lists commands in four panels, a command its options in panels. Every ``--help`` ends with an example. Help
is plain text that fits COLUMNS, so that it reads the same in a terminal, a pager and a log.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

PANELS: dict[str, tuple[str, ...]] = {
    "Deploy": ("export", "build", "run", "live", "replay", "sector", "bundle", "doctor", "new", "demo"),
    "Quantize": ("calibrate", "sensitivity", "qat"),
    "Train": ("data", "coreset", "select", "distill", "bank", "transfer-set", "adapt"),
    "Evidence": ("verify", "profile", "tune", "evaluate", "compare", "gate", "audit"),
}
"""Panel of the overview -> its commands, in the order in which they are used."""

EXAMPLES: dict[str, str] = {
    "export": "export --target openvino --int8 --out fetal-head.bundle",
    "build": "build gpu.bundle",
    "run": "run fetal-head.bundle clip.dcm --overlay out.mp4",
    "live": "live fetal-head.bundle clip.mp4 --loop --budget-ms 100",
    "replay": "replay phantom:0-29 --as igtl --fps 30 --loop",
    "sector": "sector clip.mp4 --out sector.json --image sector.png",
    "doctor": "doctor",
    "new": "new my_project",
    "demo": "demo",
    "calibrate": "calibrate my_student.safetensors my_frames/ --out set.json",
    "sensitivity": "sensitivity fetal-head --data my_frames/ --out sensitivity.json",
    "qat": "qat fetal-head --data my_frames/ --weight-bits 4 --out qat.safetensors",
    "coreset": "coreset pool/ --budget 10% --out coreset.json",
    "select": "select --teacher-weights teacher.safetensors --out start.safetensors",
    "distill": "distill --teacher dinov2_vits14 --teacher-weights teacher.safetensors --data pool/ --out runs/a",
    "bank": "bank --data coreset.json --out bank/",
    "transfer-set": "transfer-set --data my_frames/ --teacher dinov2_vits14 --teacher-weights t.safetensors --out made",
    "adapt": "adapt --task segment --data my_frames/ --init runs/a --out mine.safetensors",
    "verify": "verify fetal-head.bundle --data my_frames/",
    "profile": "profile fetal-head.bundle --json profile.json",
    "tune": "tune fetal-head.bundle fast.bundle --budget-ms 10",
    "compare": "compare before.json after.json --fail-if 'p50>+10%'",
    "evaluate": "evaluate mine.safetensors --data my_frames/ --split test --json scores.json",
}
"""Command -> an example of it, without the program's name."""

OPTION_PANELS: dict[str, tuple[str, ...]] = {
    "Artefact": (
        "target", "precision", "int8", "w4", "w6", "bf16", "fp16", "fp32", "threads", "full_depth", "allow_unverified",
        "sector", "sector_only", "recipe", "compute_capability", "timing_cache", "weight_bits", "mixed",
        "no_second_pass", "hardware_compatible", "dla", "cold",
    ),
    "INT8 and calibration": (
        "calibration", "method", "ranges", "given_file", "range_method", "range_rate", "drift", "false_alarms", "count",
        "crop",
    ),
    "Gate": (
        "gate", "no_gate", "require_verified", "require_worth_it", "require_better", "compare", "require_signed",
        "device_class",
    ),
    "What the weights file does not say": ("task", "labels", "num_classes", "postprocess", "container", "name"),
    "Input": ("spacing", "window", "allow_no_crc", "connect_timeout", "frame_stride", "splits", "allow_decode_errors"),
    "Live": ("budget_ms", "policy", "fallback", "isolate", "smooth", "sink", "host", "port", "fps", "loop",
             "once", "record"),
    "Training": (
        "steps", "batch", "seed", "learning_rate", "layer_decay", "evaluate_every", "image_size", "labels_seed",
        "exits", "epochs", "device", "minutes", "short", "ablation", "masks",
    ),
    "Teacher": (
        "teacher", "teacher_weights", "kd", "lora", "lora_rank", "against", "teacher_only", "teacher_run",
        "transfer_share",
    ),
    "Settings": ("config", "change", "show_config"),
}  # fmt: skip
"""Panel of a command's help -> names of its options; options without a panel stand first, under Options."""

METAVARS: dict[str, str] = {
    "out": "PATH", "data": "FOLDER", "overlay": "FILE.mp4", "jsonl": "FILE.jsonl", "limit": "N", "threads": "N",
    "target": "NAME,...", "precision": "NAME", "rounds": "N", "frames": "N", "steps": "N", "batch": "N", "seed": "N",
    "budget_ms": "MS", "fps": "FPS", "port": "PORT", "host": "ADDRESS", "sink": "NAME:WHERE", "crop": "R,C,H,W|region",
    "spacing": "ROW,COL", "connect_timeout": "SECONDS", "minutes": "MINUTES", "gate": "FILE.toml",
    "config": "FILE.json",
    "change": "KEY=VALUE", "calibration": "SET.json", "mixed": "FILE.json", "ranges": "FILE.json",
    "given_file": "FILE.json", "recipe": "NAME|FILE.toml", "compute_capability": "X.Y,...", "weight_bits": "4..8",
    "timing_cache": "FILE.cache,...",
    "num_classes": "N", "labels": "NAME,...", "labels_seed": "N", "name": "NAME", "container": "NAME", "task": "TASK",
    "postprocess": "NAME", "student": "NAME|FILE", "teacher": "NAME", "teacher_weights": "FILE", "device": "DEVICE",
    "count": "N", "method": "NAME", "false_alarms": "RATE", "report": "FILE.html", "learning_rate": "RATE",
    "range_rate": "RATE", "range_method": "NAME", "layer_decay": "FACTOR", "evaluate_every": "N", "lora_rank": "N",
    "image_size": "SIDE|RxC", "kd": "NAME,...", "against": "FILE", "teacher_run": "FOLDER", "transfer_share": "SHARE",
    "negatives": "FOLDER,...", "negative_share": "SHARE", "unlabelled": "FOLDER,...", "masks": "file|ellipse",
    "exits": "BLOCK,...", "budget": "N|N%", "epochs": "N", "proxy_share": "SHARE", "alpha": "SHARE", "gamma": "POWER",
    "oscillation": "WEIGHT", "clusters": "N", "algorithm": "NAME", "splits": "NAME,...", "work": "FOLDER",
    "frame_stride": "N", "allow_decode_errors": "N", "cache": "FOLDER", "ablation": "NAME", "init": "START",
    "images": "FOLDER,...", "coreset": "FILE.json", "start": "FILE",
    "heads": "N", "source": "SOURCE", "split": "SPLIT", "thresholds": "P,...", "every": "N", "shown": "N",
    "trust": "FOLDER", "require_signed": "FOLDER", "device_class": "NAME", "key": "FILE.pem", "prefix": "FOLDER",
    "security_version": "N", "head": "HEAD", "policy": "newest|lossless", "faults": "NAME,...", "listen": "HOST:PORT",
    "header": "1|2", "record": "FOLDER", "window": "LO,HI", "kind": "igtl|shm|camera",
    "image": "FILE.png", "sector": "auto|FILE|ROW,COL,NEAR,FAR,LEFT,RIGHT",
}  # fmt: skip
"""Name of an option -> its value in help, where the command does not say itself."""

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a check said no: gate, regression, verdict",
    2: "bad input or usage",
    3: "cannot run here: package, hardware, engine",
    4: "done with incomplete or doubtful input, results kept",
    5: "nothing to compare with: other machine, power mode or tools",
    6: "no source within --connect-timeout",
    70: "an unexpected failure: a bug",
    130: "stopped by Ctrl-C",
    141: "the reader of the output went away",
    143: "stopped by SIGTERM",
}
"""Exit code -> what it means."""


def example(name: str) -> str | None:
    """Last line of a command's help, or None where it has no example.

    Args:
        name: of the command.
    """
    return f"Example: tinyusfm-edge {EXAMPLES[name]}" if name in EXAMPLES else None


def show_help_alone(context: typer.Context) -> None:
    """Prints a group's help on stdout where no command was given.

    Args:
        context: of the group.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


class PanelCommand(TyperCommand):
    """A command whose help shows its options in panels.

    Its metavars say what to type.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                name = (parameter.metavar or parameter.name or "").upper()
                parameter.metavar = name if parameter.required else f"[{name}]"
            flag = getattr(parameter, "is_flag", False) or getattr(parameter, "count", False)
            if parameter.param_type_name == "option" and not flag and parameter.metavar is None:
                parameter.metavar = METAVARS.get(parameter.name or "", (parameter.name or "").upper())

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the example on one line, so that it can be copied."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"  {self.epilog}\n")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes one section per panel.

        Arguments, options without a panel, then the others.
        """
        panel_of = {name: panel for panel, names in OPTION_PANELS.items() for name in names}
        found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                panel, record = "Arguments", ((parameter.metavar or "").strip("[]").upper(), record[1])
            else:
                own = getattr(parameter, "rich_help_panel", None)
                panel = own or panel_of.get(parameter.name or "", "Options")
            found.setdefault(panel, []).append(record)
        order = ["Arguments", "Options", *OPTION_PANELS, *(name for name in found if name not in OPTION_PANELS)]
        for panel in dict.fromkeys(order):
            if found.get(panel):
                with formatter.section(panel):
                    formatter.write_dl(found[panel])


def present(app: typer.Typer) -> None:
    """Gives every command of an app and of its groups that help.

    Args:
        app: with all of its commands registered.
    """
    for command in app.registered_commands:
        command.cls = PanelCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            present(group.typer_instance)


class PanelGroup(TyperGroup):
    """The overview: commands by panel, then the exit codes."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes one section per panel; a command without a panel goes to the last one."""
        known = {name for names in PANELS.values() for name in names}
        rest = tuple(name for name in self.list_commands(ctx) if name not in known)
        for panel, names in {**PANELS, **({"Other": rest} if rest else {})}.items():
            rows = [(name, self.commands[name].get_short_help_str(100)) for name in names if name in self.commands]
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


__all__ = [
    "EXAMPLES",
    "EXIT_CODES",
    "METAVARS",
    "OPTION_PANELS",
    "PANELS",
    "PanelCommand",
    "PanelGroup",
    "example",
    "present",
    "show_help_alone",
]
