"""Words that the book avoids: prints each sentence that has one, with the words to take, and fails if there is any.

    python tests/book/prose.py [FILE ...]     notebooks, Markdown and docstrings; the whole project without any

A short list of expressions that have a plainer form in every sentence, so no judgement is needed. Part of `make lint`.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import notebooks

INSTEAD = {  # expression: what to write
    r"\b(?:anew|afresh)\b": "again, from scratch",
    r"\bthrice\b": "three times",
    r"\bseldom\b": "rarely",
    r"\bbeside\b": "next to, compared with, as well as",
    r"\bwhoever\b": "anyone who, you",
    r"\bfor ever\b": "forever, without end",
    r"\b(?:mend|mends|mended|mending)\b": "fix, repair, correct",
    r"\blearn(?:s|ed|t)? by heart\b|\bby heart\b": "memorise, overfit",
    r"\b(?:takes?|took|taken) up (?:a|the) run\b": "resume the run",
    r"\b(?:frames|FLOPs?|bytes|steps|samples|values|numbers) an? (?:second|frame|step|head|row|band|chunk)\b": "per",
    r"\b(?:multiply|multiplied|multiplies) with\b": "multiply by",
    r"\b(?:is|are) told (?:by|in|below|above)\b": "is described by, follows from",
    r"\b(?:is|are) no (?:folder|file|tensor|number|matrix|directory|audio file|checkpoint)\b": "is not a …",
    r"\bheard by (?:a|the) (?:layer|mixer|model|loss|metric)\b": "seen by",
}


def prose(path: Path) -> str:
    """The text of a file without code, formulas and links' addresses."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(notebooks.text(cell) for _, cell in notebooks.cells(json.loads(text), "markdown"))
    elif path.suffix == ".py":
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        text = "\n\n".join(ast.get_docstring(node) or "" for node in nodes)
    text = re.sub(r"```.*?```|\$\$.*?\$\$|`[^`]*`", " … ", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def complaints(path: Path) -> list[str]:
    """A line for every sentence with a word of the list."""
    sentences = re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n(?=\s*[-*|])", prose(path))
    return [
        f"{path}: {' '.join(sentence.split())[:140]}\n    {found.group()!r}: write {instead}"
        for expression, instead in INSTEAD.items()
        for sentence in sentences
        if (found := re.search(expression, sentence, re.IGNORECASE))
    ]


if __name__ == "__main__":
    listed = sys.argv[1:] or subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "*.ipynb", "bsmamba2/*.py"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    lines = [line for name in listed if Path(name).exists() for line in complaints(Path(name))]
    print("\n".join(lines))
    sys.exit(bool(lines))
