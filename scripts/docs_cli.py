"""Hook of mkdocs: appends every command with its options to reference/cli.md.

The text comes from the command line's own definitions, so the page cannot differ from ``--help``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PAGE = "reference/cli.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page; changes the one of the commands.

    Args:
        markdown: the page's source.
        page: mkdocs' page, whose file has ``src_uri``.
    """
    return markdown + "\n" + "\n".join(sections()) if page.file.src_uri == PAGE else markdown


def sections() -> Iterator[str]:
    """Markdown of every command, groups first opened into their commands."""
    from typer.main import get_command

    from tinyusfm_edge.cli.main import app

    root: Any = get_command(app)
    for name, command in sorted(root.commands.items()):
        inner = getattr(command, "commands", None)
        for path, found in [(f"{name} {key}", value) for key, value in inner.items()] if inner else [(name, command)]:
            yield from section(path, found)


def section(path: str, command: Any) -> Iterator[str]:
    """Markdown of one command.

    Args:
        path: what is typed behind ``tinyusfm-edge``.
        command: the click command.
    """
    yield f"## {path}\n\n{' '.join((command.help or '').split())}\n"
    yield "| option | meaning |\n|---|---|"
    for parameter in command.params:
        if parameter.name == "help":
            continue
        shown = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            shown = f"`{(parameter.metavar or parameter.name or '').upper()}`"
        text = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
        yield f"| {shown} | {text} |"
    yield ""
