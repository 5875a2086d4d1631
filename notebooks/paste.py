"""
paste.py: print pieces of vdm.py with all that they need, for an empty file.

    python notebooks/paste.py rollout VideoUNet > mine.py

Imports come first, then what the pieces use, in the order of vdm.py.
"""
import ast
import difflib
import dis
import sys
import types
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "vdm.py"

def used_names(code):
    """Yield the global names that compiled code looks up."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from used_names(inner)

@cache
def read():
    """Return the import lines of vdm.py, and the statements that define something, by name."""
    imports = {}
    defined = {}
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                node.names = [alias]
                imports[alias.asname or alias.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign):
            defined.update({target.id: node for target in node.targets})
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
    return imports, defined

def needs(*pieces):
    """Return the names of all that these pieces of vdm.py need, themselves included."""
    imports, defined = read()
    if not pieces:
        raise ValueError("name functions or classes of vdm.py, such as rollout")
    for name in sorted(set(pieces) - defined.keys()):
        near = "".join(f", but {word}" for word in difflib.get_close_matches(name, defined, 1))
        raise ValueError(f"vdm.py defines no {name}{near}")
    found = set()
    new = set(pieces)
    while new:
        found |= new
        code = compile(ast.Module([defined[name] for name in new & defined.keys()], []), "", "exec")
        new = set(used_names(code)) & (imports | defined).keys() - found
    return found

def paste(*pieces):
    """Return the text of these pieces of vdm.py and of all that they need."""
    imports, defined = read()
    names = needs(*pieces)
    lines = SOURCE.read_text().splitlines()
    text = [line for name, line in imports.items() if name in names]
    for node in dict.fromkeys(node for name, node in defined.items() if name in names):
        decorators = getattr(node, "decorator_list", [])
        start = min(part.lineno for part in [node, *decorators])
        text += ["", *lines[start - 1:node.end_lineno]]
    return "\n".join(text)

if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    try:
        print(paste(*sys.argv[1:]))
    except ValueError as e:
        sys.exit(f"error: {e}")
