"""The tree drawn in the docstring of errors.py is the tree of its classes."""

from __future__ import annotations

import re

from tinyusfm_runtime import errors


def drawn_tree(docstring: str) -> dict[str, str | None]:
    """Class name -> parent's name (None for the root), from a bullet tree indented by two spaces a level."""
    tree: dict[str, str | None] = {}
    path: list[str] = []
    for line in docstring.splitlines():
        match = re.match(r"^( *)\* (\w+)", line)
        if match:
            level = len(match.group(1)) // 2
            path = [*path[:level], match.group(2)]
            tree[match.group(2)] = path[level - 1] if level else None
    return tree


def class_tree() -> dict[str, str | None]:
    """The same from the classes themselves."""
    found = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    own = {name: value for name, value in found.items() if value.__module__.startswith("tinyusfm_runtime")}
    return {name: None if value is errors.EdgeError else value.__bases__[0].__name__ for name, value in own.items()}


def test_drawing_equals_the_classes() -> None:
    assert drawn_tree(errors.__doc__ or "") == class_tree()
    assert sorted(class_tree()) == errors.__all__


def test_every_class_says_when_to_catch_it_and_carries_an_exit_code() -> None:
    for name in class_tree():
        kind = getattr(errors, name)
        assert kind.__doc__
        assert kind.exit_code in (1, 2, 3, 5, 6)


def test_a_class_that_is_not_drawn_is_caught() -> None:
    drawing = "* EdgeError   root\n  * InputError   wrong input\n    * FrameError   one frame\n  * Other   more"
    assert drawn_tree(drawing) == {
        "EdgeError": None,
        "InputError": "EdgeError",
        "FrameError": "InputError",
        "Other": "EdgeError",
    }
    assert drawn_tree(drawing) != class_tree()
