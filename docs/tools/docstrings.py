# SPDX-License-Identifier: Apache-2.0
"""Extension of Griffe: what a static reading of the sources cannot see.

- The names of ``fastvit`` that are imported when they are first used, from ``_EXPORTS``.
- Docstrings that a layer takes from its reference module (``fastvit/layers/documentation.py``).
- Roles such as ``:func:`fastvit.restore```, as links.
- Attributes that share a line, ``swapped, skipped: tuples``, whose second name would be a type.
"""

from __future__ import annotations

import ast
import inspect
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[2]
_LAYERS = ("GPSA", "MHSA", "ConvStem", "PatchEmbed")
_ROLE = re.compile(r":(?:attr|class|func|meth|mod):`([\w.]+)`")
# Two or more names at the beginning of an item of "Attributes:", and the item.
_SHARED = re.compile(r"(?<=\n)( +)(\w+(?:, \w+)+): (.*(?:\n\1 .*)*)")


def _apart(match: re.Match[str]) -> str:
    before = match.string[: match.start()]
    sections = re.findall(r"^\w+:$", before, flags=re.MULTILINE)
    if not sections or sections[-1] != "Attributes:":
        return match[0]
    return "\n".join(f"{match[1]}{name}: {match[3]}" for name in match[2].split(", "))


class Docstrings(griffe.Extension):
    """See the module."""

    def __init__(self) -> None:
        documentation = ROOT / "fastvit" / "layers" / "documentation.py"
        self.with_backend = runpy.run_path(str(documentation))["with_backend"]

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Add the exported names."""
        exports = ast.literal_eval(str(pkg["_EXPORTS"].value))
        for name, module in exports.items():
            pkg.set_member(name, griffe.Alias(name, f"{module}.{name}", parent=pkg))
        _walk(pkg, self)

    def complete(self, found: griffe.Object) -> None:
        """Give an object of the package its docstring as it shall be read."""
        if found.is_class and "__doc__" in found.members:
            found.docstring = griffe.Docstring(self._made(found), parent=found)
        if found.docstring is not None:
            text = _SHARED.sub(_apart, found.docstring.value)
            found.docstring.value = _ROLE.sub(
                lambda match: f"[`{match[1]}`][{_full_name(found, match[1])}]", text
            )

    def _made(self, found: griffe.Object) -> str:
        """The docstring that a class assigns, of what ``with_backend`` makes of its reference."""
        tree = ast.parse(Path(str(found.filepath)).read_text(encoding="utf-8"))
        (made,) = (
            assignment.value
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name == found.name
            for assignment in node.body
            if isinstance(assignment, ast.Assign)
            and ast.unparse(assignment.targets[0]) == "__doc__"
        )
        originals = found.package["reference"]
        names = {
            "with_backend": self.with_backend,
            "reference": SimpleNamespace(
                **{name: SimpleNamespace(__doc__=_text(originals[name])) for name in _LAYERS}
            ),
        }
        return inspect.cleandoc(eval(ast.unparse(made), names))


def _text(found: griffe.Object | griffe.Alias) -> str:
    return found.docstring.value if found.docstring is not None else ""


def _walk(found: griffe.Object, extension: Docstrings) -> None:
    for member in list(found.members.values()):
        if not member.is_alias:
            _walk(member, extension)
    extension.complete(found)


def _full_name(found: griffe.Object, name: str) -> str:
    """What a name in a docstring stands for: of this package, else of the class or the module."""
    if name.startswith("fastvit"):
        return name
    scope: griffe.Object | None = found
    while scope is not None:
        members = scope.all_members
        if name in members:
            # Of a class an inherited member is shown as its own.
            return f"{scope.path}.{name}" if scope.is_class else members[name].canonical_path
        scope = scope.parent
    return name
