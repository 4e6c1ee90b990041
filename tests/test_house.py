"""The house: a folder is a chapter with a table of contents, imports go downwards only, no file says two things."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

import hcvision

PACKAGE = Path(hcvision.__file__).parent
CHAPTERS = ("connections", "models", "data", "diffusion", "training", "studies", "deploy", "cli")  # from the lowest
BESIDE = {"studies", "deploy"}  # neither imports the other
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
MODULES = {"hcvision." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): file for file in FILES}
MODULES["hcvision"] = MODULES.pop("hcvision.__init__")
USERS = [path for folder in ("benchmarks", "docs") for path in (PACKAGE.parent / folder).glob("*.py")]
ENTRIES = 10  # that a reader meets at the top
LINES = 500


def imports(path):
    """Every (module, name) that a file imports, anywhere in it; the name is "" for ``import module``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports by a relative name"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def own_imports(file):
    """The files of the package that one of its files imports."""
    targets = set()
    for module, name in imports(PACKAGE / file):
        if module.split(".")[0] == "hcvision":
            targets.add(MODULES[f"{module}.{name}" if f"{module}.{name}" in MODULES else module])
    return targets


def contents(folder):
    """The names in the table of contents of a folder."""
    tree = ast.parse((folder / "__init__.py").read_text())
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return ast.literal_eval(values["__all__"])


def chapter(file):
    return file.split("/")[0] if "/" in file else ""


def test_the_top():
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert entries == sorted(("__init__.py", "py.typed", *CHAPTERS))
    assert len(entries) <= ENTRIES


@pytest.mark.parametrize("file", FILES)
def test_floors(file):
    """A chapter imports lower chapters only; the package itself is imported by nobody in it."""
    for target in own_imports(file):
        mine, theirs = chapter(file), chapter(target)
        if not mine:
            assert theirs in ("connections", "models"), f"{file} imports {target}"
        elif mine != theirs:
            lower = CHAPTERS[: CHAPTERS.index(mine)]
            assert theirs in lower, f"{file} imports {target}, which is above it"
            assert {mine, theirs} != BESIDE, f"{file} imports {target}, which is beside it"


def test_no_circles():
    """Files can be put in a row in which each imports earlier ones only."""
    waiting, done = {file: own_imports(file) - {file} for file in FILES}, set()
    while waiting:
        ready = [file for file, needs in waiting.items() if needs <= done]
        assert ready, f"these import each other in a circle: {', '.join(sorted(waiting))}"
        done.update(ready)
        waiting = {file: needs for file, needs in waiting.items() if file not in done}


@pytest.mark.parametrize("file", [*FILES, *map(str, USERS)])
def test_tables_of_contents(file):
    """From outside a folder only what its __init__ names is imported, and by that name."""
    path = PACKAGE / file
    for module, name in imports(path):
        if module.split(".")[0] != "hcvision" or path.name == "__init__.py":
            continue
        target = PACKAGE / MODULES[module]
        inside = target.parent == path.parent or target.parent in path.parents
        if not inside:
            assert target.name == "__init__.py", f"{file} imports {module}, a file of another folder"
        is_file_beside = inside and f"{module}.{name}" in MODULES
        if target.name == "__init__.py" and target.parent != PACKAGE and not is_file_beside:
            assert name in contents(target.parent), f"{name} is not in the table of contents of {module}"


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith("/__init__.py")])
def test_what_a_table_of_contents_names_is_used(file):
    """By another folder, a benchmark, or a user whom the documentation tells of it."""
    folder = (PACKAGE / file).parent
    module = ".".join(folder.relative_to(PACKAGE.parent).parts)
    users = [*(PACKAGE / other for other in FILES), *USERS, PACKAGE.parent / "hcvision_command.py"]
    others = [path for path in users if folder not in path.parents]
    used = {name for path in others for source, name in imports(path) if source == module}
    text = "".join(page.read_text() for page in (PACKAGE.parent / "docs").glob("*.md"))
    documented = {
        name for name in contents(folder) if f"{module}.{name}" in text or f"from {module} import {name}" in text
    }
    assert sorted(set(contents(folder)) - used - documented) == []


@pytest.mark.parametrize("file", FILES)
def test_length(file):
    """A longer file says two things."""
    assert len((PACKAGE / file).read_text().splitlines()) <= LINES


def test_connections_need_torch_alone():
    """The chapter of connections imports the standard library and torch, with its Triton if it is there."""
    modules = {module for file in FILES if chapter(file) == "connections" for module, _ in imports(PACKAGE / file)}
    assert {module for module in modules if module.startswith("hcvision")} <= {
        module for module, file in MODULES.items() if chapter(file) == "connections"
    }
    roots = {module.split(".")[0] for module in modules} - {"hcvision"}
    assert roots - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_one_file_of_the_command_line_imports_nothing():
    """``hcvision_command`` runs it by itself."""
    assert {module for module, _ in imports(PACKAGE / "cli" / "options.py")} <= set(sys.stdlib_module_names)


def test_tests_mirror_the_house():
    """A folder of tests for each chapter, and none for what is none."""
    folders = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders == set(CHAPTERS)


def test_the_map_of_the_house():
    """CONTRIBUTING.md has it as ``python docs/draw_house.py`` draws it."""
    spec = importlib.util.spec_from_file_location("draw_house", PACKAGE.parent / "docs" / "draw_house.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    assert drawing.draw() in (PACKAGE.parent / "CONTRIBUTING.md").read_text()
