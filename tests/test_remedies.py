"""What messages tell a user to do can be done: the flags, commands and scripts that they name are there."""

import ast
import dataclasses
import re

import pytest
from conftest import ROOT

from fastvid import config
from fastvid.cli import COMMANDS

# Of other programs: torchrun, pip, hf, docker.
OTHERS = {"config", "help", "local-dir", "nproc_per_node", "repo-type", "shm-size"}
FLAGS = {field.name for each in vars(config).values() if dataclasses.is_dataclass(each) and isinstance(each, type)
         for field in dataclasses.fields(each)}


def texts():
    """(file, text) of every string of the product that is no docstring."""
    for path in sorted((ROOT / "fastvid").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docs = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
                and isinstance(node.body[0], ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield path.relative_to(ROOT).as_posix(), node.value


@pytest.mark.parametrize("pattern, known", [
    (r"(?<![\w-])--([A-Za-z][\w-]*)", FLAGS | OTHERS),
    (r"[`(]fastvid ([a-z]+)", set(COMMANDS)),
    (r"(scripts/[\w/]+\.\w+)", {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*")}),
])
def test_what_is_named_is_there(pattern, known):
    named = {(file, word) for file, text in texts() for word in re.findall(pattern, text)}
    assert len(named) > 1
    assert {(file, word) for file, word in named if word not in known} == set()
