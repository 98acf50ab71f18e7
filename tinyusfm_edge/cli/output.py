"""What a command does with its result.

``--json``, ``--page`` and the next command to type, the same for all of them.

A command declares ``output: ReportOutput`` and is wrapped by ``reports``; typer then shows ``--json`` (and ``--page``)
in its place. With ``--json -`` standard output holds JSON alone; what people read goes to standard error. The JSON says
in ``kind`` what it is, which ``compare`` goes by. It does not know any command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_edge.report.page import Page

PANEL = "Output"
STANDARD_OUTPUT = "-"
_JSON = Annotated[
    str | None,
    typer.Option(
        "--json", rich_help_panel=PANEL, metavar="FILE", help="Write the result as JSON; - is standard output."
    ),
]
_PAGE = Annotated[
    Path | None,
    typer.Option(
        "--page",
        rich_help_panel=PANEL,
        metavar="FILE.html",
        help="Write a page to look at. Default: beside --json FILE.",
    ),
]


@dataclass(slots=True)
class ReportOutput:
    """Where the result of one command goes.

    Attributes:
        command: such as ``export`` or ``bundle sign``.
        json_place: path, ``-`` or None.
        page_place: path or None.
        has_page: the command can make a page.
        written: files that were written so far.
    """

    command: str = ""
    json_place: str | None = None
    page_place: Path | None = None
    has_page: bool = False
    written: list[str] = field(default_factory=list)

    @property
    def wants_page(self) -> bool:
        """Whether a page was asked for, by name or beside the JSON."""
        return self.page_place is not None

    def check(self) -> None:
        """Refuses places that cannot be written, before any work.

        Raises:
            OutputError: a place cannot be written.
            InputError: both are the same file.
        """
        if self.json_place not in (None, STANDARD_OUTPUT):
            console.check_writable(Path(str(self.json_place)), "the JSON")
            if self.page_place is None and self.has_page:
                self.page_place = Path(str(self.json_place)).with_suffix(".html")
        if self.page_place is not None:
            console.check_writable(self.page_place, "the page")
            if self.json_place is not None and Path(self.json_place).resolve() == self.page_place.resolve():
                raise InputError("--page and --json must be different files")

    def result(self, data: Mapping[str, Any]) -> None:
        """Writes the result where ``--json`` says, if it does.

        Args:
            data: plain data; ``kind`` is put in front where it has none.

        Raises:
            OutputError: it cannot be written.
        """
        if self.json_place is not None:
            kind = {"kind": f"tinyusfm-edge {self.command}", "version": 1}
            console.write_json(self.json_place, {**kind, **data}, "the JSON")
            if self.json_place != STANDARD_OUTPUT:
                self.written.append(self.json_place)

    def page(self, make: Callable[[], Page], place: Path | None = None) -> None:
        """Writes a page, where one was asked for.

        Args:
            make: makes it.
            place: where it goes if nobody said; None writes none then.

        Raises:
            OutputError: it cannot be written.
        """
        from tinyusfm_edge.report.page import render

        where = self.page_place or place
        if where is not None:
            console.write_file(where, render(make()).encode(), "the page")
            self.written.append(str(where))

    def end(self, *words: object, indent: int = 13) -> None:
        """Says which files were written, and the command to type next.

        Args:
            *words: behind ``tinyusfm-edge``; none where nothing follows.
            indent: width of the labels above it.
        """
        if self.written and not console.voice.quiet:
            console.say(f"{'written':<{indent}}{', '.join(self.written)}")
        if words:
            console.next_step(*words, indent=indent)


SILENT = ReportOutput()
"""Of a command that is called without its options."""


def reports(command: str, *, page: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Puts ``--json`` and ``--page`` in the place of the parameter ``output``.

    Args:
        command: its name, such as ``bundle sign``.
        page: whether it can make a page.

    Returns:
        A decorator.
    """
    added = {"json_file": _JSON, **({"page_file": _PAGE} if page else {})}

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        kept = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name != "output"
        ]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in added.items()
        ]

        @functools.wraps(function)
        def wrapped(**given: Any) -> Any:
            json_place, page_place = given.pop("json_file", None), given.pop("page_file", None)
            output = ReportOutput(command=command, json_place=json_place, page_place=page_place, has_page=page)
            output.check()
            console.voice.results_aside = json_place == STANDARD_OUTPUT
            return function(**given, output=output)

        wrapped.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {**{p.name: p.annotation for p in kept}, **added, "return": Any}
        return wrapped

    return wrap


__all__ = ["PANEL", "SILENT", "STANDARD_OUTPUT", "ReportOutput", "reports"]
