"""Imports go downwards only, and the core needs torch alone."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

import hcvision

PACKAGE = Path(hcvision.__file__).parent

FLOORS = (
    {"plain", "gpu", "native"},
    {"kernels"},
    {"mixing"},
    {"recomputation"},
    {"connections"},
    {"successors"},
    {"families"},
    {"convert"},
    {"vit", "dit"},
    {"__init__"},  # the public names; who imports the package itself stands above them
    {"arguments"},
    {"diffusion", "images", "fashion"},
    {"streaming"},
    {"data"},
    {"runs"},
    {"display", "latents", "sampling", "sharding", "weights"},
    {"training"},
    {"evaluation", "prediction", "benchmark"},
    {"scoring"},
    {"report"},
    {"study", "insight", "export"},
    {"cli"},
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
FILES = sorted(path.stem for path in PACKAGE.glob("**/*.py"))


def imported(name):
    """Every module that a file of the package imports, anywhere in it, by its full name."""
    modules = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ("hcvision" if node.level else "", node.module or "")))
            if module == "hcvision":  # from hcvision import vit, or a public name
                modules |= {f"hcvision.{a.name}" if a.name in FLOOR else "hcvision" for a in node.names}
            else:
                modules.add(module)
    return modules


@pytest.mark.parametrize("name", FILES)
def test_floors(name):
    """A file imports files of lower floors only; a file without a floor has to be given one."""
    assert name in FLOOR, f"{name}.py is on no floor"
    for module in imported(name):
        if module.split(".")[0] == "hcvision":
            target = [*module.split("."), "__init__"][1]
            assert target in FLOOR, f"{name}.py imports {module}, which is on no floor"
            assert FLOOR[target] < FLOOR[name], f"{name}.py imports {module}"


def test_one_folder():
    """The package is flat: a file in a folder would escape the floors."""
    assert [path.name for path in PACKAGE.glob("**/*.py") if path.parent != PACKAGE] == []


def test_connections_need_torch_alone(monkeypatch):
    """connections.py and what it stands on import the standard library and torch, with its Triton if it is there."""
    core = ("connections", "recomputation", "mixing", "kernels", "plain", "gpu", "native")
    modules = set().union(*map(imported, core))
    assert {module for module in modules if module.startswith("hcvision")} <= {f"hcvision.{name}" for name in core}
    roots = {module.split(".")[0] for module in modules} - {"hcvision"}
    assert roots - set(sys.stdlib_module_names) == {"torch", "triton"}
    for missing in ("timm", "torchvision", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location("connections_alone", PACKAGE / "connections.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.build_connection("dhc2", 4).width == 8


def test_package_registers():
    """hcvision/__init__.py imports vit, whose import registers the names."""
    assert "hcvision.vit" in imported("__init__")
    assert "hcvision.convert" in imported("vit")
