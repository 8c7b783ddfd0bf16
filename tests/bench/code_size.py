"""Count product code, documentation and comments, formatting apart.

    python tests/bench/code_size.py [FOLDER] [--json]

FOLDER is a checkout or its ``stabmon`` folder; this checkout if left out. Code lines are those of
``ast.unparse`` of each file without docstrings, so that neither line length nor blank lines count:
one statement is one line. Strings after an assignment (attribute docstrings) count as
documentation. Doc lines and comment lines are those of the files as they stand.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

OPENINGS = ("What", "Where", "How", "Whether", "Which")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Trees = dict[str, ast.Module]
"""Syntax trees by module name."""
Documented = ast.Module | ast.ClassDef | Function


@dataclass
class Counts:
    """Figures of a package; shares are of what is named before them."""

    files: int = 0
    code_lines: int = 0
    doc_lines: int = 0
    comment_lines: int = 0
    longest_file: tuple[int, str] = (0, "")
    """Lines of the longest file as it stands."""
    functions: int = 0
    """Functions and methods with a docstring."""
    questions: int = 0
    """Of these, how many open with What, Where, How, Whether or Which."""
    docstrings: int = 0
    """Docstrings of modules, classes, functions and methods."""
    with_args: int = 0
    long_lines: int = 0
    """Lines of more than 100 columns."""
    public: int = 0
    """Callables in ``__all__`` of a package, the callbacks, and public methods of these classes.

    Properties, exceptions and events of a framework (``on_...``) are left out; a method that takes
    its docstring from a base class counts as one without.
    """
    no_docstring: list[str] = field(default_factory=list)
    lack_args: list[str] = field(default_factory=list)
    lack_returns: list[str] = field(default_factory=list)
    lack_example: list[str] = field(default_factory=list)


def count(package: Path) -> Counts:
    """Count every file of a package."""
    counts = Counts()
    trees: Trees = {}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        lines = text.splitlines()
        tree = ast.parse(text)
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        trees[name.removesuffix(".__init__")] = tree
        counts.files += 1
        counts.longest_file = max(counts.longest_file, (len(lines), str(path.relative_to(package))))
        counts.long_lines += sum(len(line) > 100 for line in lines)
        counts.comment_lines += _comment_lines(text)
        for node in ast.walk(tree):
            if isinstance(node, Documented) and (words := ast.get_docstring(node)):
                counts.docstrings += 1
                counts.with_args += "\nArgs:" in words
                if isinstance(node, Function):
                    counts.functions += 1
                    counts.questions += words.split()[0] in OPENINGS
        counts.doc_lines += _doc_lines(tree)
        counts.code_lines += len(ast.unparse(_without_docs(ast.parse(text))).splitlines())
    _count_public(package.name, trees, counts)
    return counts


def _doc_strings(tree: ast.AST) -> Iterator[tuple[list[ast.stmt], ast.Expr]]:
    """Yield every string that stands as a statement, with the body in which it stands."""
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for each in body if isinstance(body, list) else ():
                value = each.value if isinstance(each, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield body, each


def _doc_lines(tree: ast.Module) -> int:
    return sum((each.end_lineno or 0) - each.lineno + 1 for _, each in _doc_strings(tree))


def _without_docs(tree: ast.Module) -> ast.Module:
    for body, each in list(_doc_strings(tree)):
        body.remove(each)
        if not body and body is not tree.body:
            body.append(ast.Pass())
    return tree


def _comment_lines(text: str) -> int:
    """Count comments that say something; instructions to tools do not."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [each.string for each in tokens if each.type == tokenize.COMMENT]
    return sum(not each.startswith(("# type:", "# noqa", "# fmt:", "#!")) for each in comments)


def _count_public(package: str, trees: Trees, counts: Counts) -> None:
    seen: set[str] = set()
    for module, tree in trees.items():
        for name in _exports(tree) if any(each.startswith(f"{module}.") for each in trees) else ():
            found = _definition(module, name, trees)
            if found is None or f"{found[0]}.{name}" in seen:
                continue
            where, node = found
            seen.add(f"{where}.{name}")
            if isinstance(node, Function):
                _judge(f"{where}.{name}", node, ast.get_docstring(node), counts)
            elif isinstance(node, ast.ClassDef) and not _is_exception(node):
                _judge_class(f"{where}.{name}", node, counts)
    for module, tree in trees.items():
        for node in tree.body if module.startswith(f"{package}.integrations.") else ():
            if isinstance(node, ast.ClassDef) and node.name == "StabilityCallback":
                _judge_class(f"{module}.{node.name}", node, counts)


def _literal(value: ast.expr, tree: ast.Module) -> list[str]:
    """Return a list of names that is written out, or ``sorted(NAME)`` of a table in the file."""
    if not isinstance(value, ast.Call):
        return list(ast.literal_eval(value))
    table = ast.unparse(value.args[0])
    return next(
        sorted(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table
    )


def _exports(tree: ast.Module) -> list[str]:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(each, ast.Name) and each.id == "__all__" for each in targets):
            value = _literal(node.value, tree) if isinstance(node, ast.Assign) else []
            return [str(each) for each in value]
    return []


def _definition(module: str, name: str, trees: Trees) -> tuple[str, ast.stmt] | None:
    """Follow imports from a package to the statement that defines a name."""
    for _ in range(10):
        for node in trees[module].body if module in trees else ():
            if isinstance(node, ast.ClassDef | Function) and node.name == name:
                return module, node
        step = _import_of(module, name, trees)
        if step is None:
            return None
        module, name = step
    return None


def _import_of(module: str, name: str, trees: Trees) -> tuple[str, str] | None:
    """Find where a module takes a name from: an import, or its lazy table of names."""
    for node in ast.walk(trees[module]) if module in trees else ():
        if isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                if (each.asname or each.name) == name:
                    return node.module, each.name
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value == name
                if named and isinstance(value, ast.Constant) and str(value.value) in trees:
                    return str(value.value), name
    return None


def _is_exception(node: ast.ClassDef) -> bool:
    return any(ast.unparse(each).endswith(("Error", "Exception")) for each in node.bases)


def _judge_class(path: str, node: ast.ClassDef, counts: Counts) -> None:
    """Judge a class by its constructor, whose arguments its docstring may describe, and methods."""
    methods = {each.name: each for each in node.body if isinstance(each, Function)}
    words = ast.get_docstring(node)
    made = methods.get("__init__")
    if made is not None:
        both = "\n".join(filter(None, (words, ast.get_docstring(made))))
        _judge(path, made, both or None, counts, returns=False)
    elif words is not None or not node.name.startswith("_"):
        counts.public += 1
        if words is None:
            counts.no_docstring.append(path)
        elif not any(word in words for word in (">>>", "Example:")):
            counts.lack_example.append(path)
    for name, method in methods.items():
        if not name.startswith(("_", "on_")) and not _is_accessor(method):
            _judge(f"{path}.{name}", method, ast.get_docstring(method), counts)


def _is_accessor(node: Function) -> bool:
    names = [ast.unparse(each) for each in node.decorator_list]
    return any("property" in each or each.endswith((".setter", "overload")) for each in names)


def _judge(
    path: str,
    node: Function,
    words: str | None,
    counts: Counts,
    returns: bool = True,
) -> None:
    counts.public += 1
    if words is None:
        counts.no_docstring.append(path)
        return
    given = node.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    names = {each.arg for each in named if each is not None} - {"self", "cls"}
    if names and "Args:" not in words:
        counts.lack_args.append(path)
    result = "None" if node.returns is None else ast.unparse(node.returns).strip("'\"")
    if returns and result != "None" and not any(each in words for each in ("Returns:", "Yields:")):
        counts.lack_returns.append(path)
    if not any(word in words for word in (">>>", "Example:")):
        counts.lack_example.append(path)


def report(counts: Counts) -> str:
    """Put the figures into lines."""

    def share(part: int, whole: int) -> str:
        return f"{part} of {whole} ({100 * part / max(1, whole):.1f} %)"

    long, name = counts.longest_file
    return "\n".join(
        [
            f"files                       {counts.files}, the longest {name} with {long} lines",
            f"code lines (ast.unparse)    {counts.code_lines}",
            f"doc lines                   {counts.doc_lines}",
            f"comment lines               {counts.comment_lines}, "
            f"{1000 * counts.comment_lines / max(1, counts.code_lines):.1f} per 1000 code lines",
            f"lines above 100 columns     {counts.long_lines}",
            f"functions that open with {'/'.join(OPENINGS)}",
            f"                            {share(counts.questions, counts.functions)}",
            f"docstrings with Args        {share(counts.with_args, counts.docstrings)}",
            f"public callables            {counts.public}",
            f"  without a docstring       {share(len(counts.no_docstring), counts.public)}",
            f"  lacking Args              {share(len(counts.lack_args), counts.public)}",
            f"  lacking Returns           {share(len(counts.lack_returns), counts.public)}",
            f"  lacking Example           {share(len(counts.lack_example), counts.public)}",
        ]
    )


def main() -> None:
    """Print the figures of a checkout."""
    parser = argparse.ArgumentParser(description="Count code, documentation and comments.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--json", action="store_true", help="print everything, names included")
    given = parser.parse_args()
    package = given.folder / "stabmon" if (given.folder / "stabmon").is_dir() else given.folder
    if not (package / "__init__.py").is_file():
        parser.error(f"{given.folder} holds no package: give a checkout or its stabmon folder")
    counts = count(package)
    print(json.dumps(asdict(counts)) if given.json else report(counts))


if __name__ == "__main__":
    main()
