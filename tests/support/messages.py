"""All error messages of the package in one table: `python -m tests.support.messages` prints it."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ASKING = {"require": 1, "one_of": 0}  # that raise for their caller → the argument at which the words begin
GAP = "…"  # where a message has a value


class Message(NamedTuple):
    """One place where an error is raised."""

    module: str  # path below fsl_sage/
    line: int
    function: str
    how: str  # require, one_of, or the error's name
    words: tuple[str, ...]  # what is written there, piece by piece, without values

    @property
    def text(self) -> str:
        """Its words, with a gap for each value."""
        return GAP.join(self.words)

    @property
    def long(self) -> bool:
        """Whether it has three words in a row to look for; else it is a value's range, or another's message."""
        return any(len(plain(piece).split()) >= 3 for piece in self.words)


def plain(text: str) -> str:
    """Words without what stands between them."""
    return re.sub(r"\W+", " ", text).strip().lower()


def strings(node: ast.AST, known: dict[str, list[str]]) -> Iterator[str]:
    """The texts of an expression; a variable stands for those that the function has given it."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value
        elif isinstance(inner, ast.Name):
            yield from known.get(inner.id, ())


def in_function(module: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Message]:
    """The messages of one function."""
    known: dict[str, list[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            known.setdefault(node.targets[0].id, []).extend(strings(node.value, {}))
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKING:
            how, said = node.func.id, node.args[ASKING[node.func.id] :][: 1 if node.func.id == "one_of" else None]
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            how, said = ast.unparse(node.exc.func), node.exc.args
        else:
            continue
        yield Message(
            module, node.lineno, function.name, how, tuple(one for each in said for one in strings(each, known))
        )


def messages() -> list[Message]:
    """All of the package, in the order of modules and lines."""
    found = {}
    for path in sorted((ROOT / "fsl_sage").rglob("*.py")):
        module = path.relative_to(ROOT / "fsl_sage").as_posix()
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and path.name != "_modidx.py":
                found |= {(own.module, own.line): own for own in in_function(module, function)}
    return [found[key] for key in sorted(found)]


def shown() -> str:
    """The words of all tests, and of what notebooks demonstrate and print."""
    texts = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py")]
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and not re.search(r"^#\|\s*export", source, re.M):
                texts += [source, *("".join(output.get("text", "")) for output in cell["outputs"])]
    return plain("\n".join(texts))


def is_shown(message: Message, corpus: str) -> bool:
    """Whether three of its words in a row stand in a test or in a notebook's output."""
    pieces = [plain(piece).split() for piece in message.words]
    return any(" ".join(words[k : k + 3]) in corpus for words in pieces for k in range(len(words) - 2))


def table() -> str:
    """All messages as Markdown."""
    rows = [f"| {own.module}:{own.line} | {own.how} | {own.text} |".replace("\n", " ") for own in messages()]
    return "\n".join(["| where | how | words |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
