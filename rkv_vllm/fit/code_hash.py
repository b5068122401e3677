"""A hash of what a function does: the same whatever its comments, docstrings, types and layout.

And the same under each Python that vLLM runs on, whose parsers differ in fields that are empty.
"""

import ast
import hashlib
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Types, what Python derives from the place of a name, and fields that only some versions have.
_LEFT_OUT = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind"}
_DIGITS = 16


def code_hash(node: ast.stmt) -> str:
    """Hashes the code of a function, or of a class with all its functions.

    Args:
        node: its definition.
    """
    return hashlib.sha256(_spell(node).encode()).hexdigest()[:_DIGITS]


def _spell(value: Any, in_class: bool = False) -> str:
    """Spells a node, a list of nodes or a value; nothing for a statement that does nothing."""
    if isinstance(value, list):
        return f"[{','.join(filter(None, (_spell(each, in_class) for each in value)))}]"
    if not isinstance(value, ast.AST):
        # Not repr(): what Python thinks printable changes with its version.
        return ascii(value)
    # In a class it makes a field of a dataclass, elsewhere it is a type for a plain name.
    if isinstance(value, ast.AnnAssign) and not in_class:
        if value.value is None:
            return ""
        value = ast.Assign([value.target], value.value)
    is_class = isinstance(value, ast.ClassDef)
    spelled = []
    if isinstance(value, ast.JoinedStr):
        # Python 3.12 puts an empty text behind the last value of a format.
        value = ast.JoinedStr([each for each in value.values if not _is_text(each, "")])
    for name, child in ast.iter_fields(value):
        if name == "body" and isinstance(value, (ast.ClassDef, *FUNCTIONS)):
            child = child[_has_docstring(child) :]
        if name not in _LEFT_OUT and child is not None and child != []:
            spelled.append(f"{name}={_spell(child, is_class)}")
    return f"{type(value).__name__}({','.join(spelled)})"


def _has_docstring(body: list[ast.stmt]) -> bool:
    return isinstance(body[0], ast.Expr) and _is_text(body[0].value)


def _is_text(node: ast.expr, text: str | None = None) -> bool:
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return False
    return text is None or node.value == text
