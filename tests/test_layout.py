"""The shape of the code: who may import whom, no circle, and how much there is to read."""

import ast
import graphlib
import io
import sys
import tokenize
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
SIX = ("envs", "model", "rollout", "ppo", "sft", "train")

# Each file or folder of the map: what it may import of the others, and what from outside.
MAP = {
    "games": "numpy PIL",
    "envs": "games numpy",
    "kernels": "torch triton",
    "llama": "kernels torch numpy PIL safetensors tokenizers",
    "model": "llama kernels torch",
    "rollout": "envs games llama torch",
    "ppo": "rollout llama kernels torch",
    "sft": "rollout games llama torch",
    "variants": "ppo sft rollout model llama envs games torch",
    "distributed": "model llama torch safetensors",
    "harness": "variants distributed ppo sft rollout model llama envs games torch tokenizers numpy",
    "train": "harness variants distributed ppo sft rollout llama games torch",
    "study": "train harness variants distributed ppo sft rollout model llama kernels envs games torch numpy "
             "matplotlib",
    "benchmarks": "train harness model llama kernels torch transformers",
}
# They need the standard library alone, and all may import them.
LEAVES = {"games.seeds", "harness.files", "harness.ranges", "harness.terminal"}


def modules():
    """Return {name: file} of all source without tests."""
    files = [HERE / f"{name}.py" for name in SIX]
    files += [file for folder in MAP if folder not in SIX for file in (HERE / folder).glob("*.py")]
    return {".".join(file.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__"): file
            for file in files}


def imports(file, known):
    """Return the modules that a file imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            found |= inner or {node.module}
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("name", modules())
def test_imports_follow_the_map(name):
    known = modules()
    found, part = imports(known[name], known), name.split(".")[0]
    if name in LEAVES:
        assert found <= LEAVES
    may = {part, *MAP[part].split()}
    assert {other for other in found - LEAVES if other.split(".")[0] not in may} == set()


def test_no_import_circle():
    """Each module can be loaded first."""
    known = modules()
    graph = {name: imports(file, known) & set(known) for name, file in known.items()}
    list(graphlib.TopologicalSorter(graph).static_order())
    assert {name for name in graph["model"] if name.startswith("llama")} == {"llama.config", "llama.folders"}


# ------------------------------------------------------------------------------------------------------------
# How much there is to read, in Python's tokens without comments, docstrings, line breaks and indents: packing
# more into a line changes nothing.

BUDGETS = {"envs": 3500, "model": 5000, "rollout": 1800, "ppo": 3000, "sft": 900, "train": 2800}
SOURCE, TESTS = 80_000, 85_000         # of all source without tests, of the tests: they may only fall
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}


def size(file):
    source = file.read_text(encoding="utf-8")
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    firsts = [node.body[0] for node in ast.walk(ast.parse(source)) if isinstance(node, owners) and node.body]
    docstrings = {(first.lineno, first.col_offset) for first in firsts
                  if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)}
    return sum(token.type not in SILENT and token.start not in docstrings
               for token in tokenize.generate_tokens(io.StringIO(source).readline))


@pytest.mark.parametrize("name, budget", BUDGETS.items())
def test_the_six_files_keep_their_budgets(name, budget):
    file = HERE / f"{name}.py"
    assert size(file) <= budget and len(file.read_text(encoding="utf-8").splitlines()) <= 600


def test_all_keep_theirs():
    source = sum(map(size, modules().values()))
    tests = [*(HERE / "tests").glob("*.py")]
    assert source <= SOURCE and sum(map(size, tests)) <= TESTS
    for file in [*modules().values(), *tests]:
        assert max(map(len, file.read_text(encoding="utf-8").splitlines()), default=0) <= 110, file.name


def test_packing_changes_no_size(tmp_path):
    loose, packed = tmp_path / "loose.py", tmp_path / "packed.py"
    loose.write_text('"""Say."""\n\nx = [\n    1,      # one\n    2]\ny = 3\n', encoding="utf-8")
    packed.write_text("x=[1,2]\ny=3\n", encoding="utf-8")
    assert size(loose) == size(packed) == 10
