"""Draws the map of the house in CONTRIBUTING.md from the imports and the first lines of docstrings.

python docs/draw_house.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hcvision"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- map: python docs/draw_house.py -->\n", "<!-- end of the map -->\n"


def imports(path: Path) -> set[Path]:
    """The files of the package that one of its files imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            for name in ("", *(alias.name for alias in node.names)):
                place = ROOT.joinpath(*f"{node.module}.{name}".rstrip(".").split("."))
                found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found - {path}


def first_line(path: Path) -> str:
    """What a file says it is."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def order(groups: dict[Path, set[Path]]) -> list[Path]:
    """Each behind those that it needs, else by name."""
    done: list[Path] = []
    while len(done) < len(groups):
        ready = sorted(one for one in groups if one not in done and groups[one] & set(groups) <= {*done, one})
        done.append(ready[0])
    return done


def rows(folder: Path, depth: int) -> list[tuple[str, str]]:
    """Name and meaning of a folder and of all in it, from the lowest."""
    needs: dict[Path, set[Path]] = {}
    for part in folder.iterdir():
        inside = [*part.rglob("*.py")] if part.is_dir() else [part]
        if (part.suffix == ".py" and part.name not in ("__init__.py", "__main__.py")) or (part.is_dir() and inside):
            files = set().union(*map(imports, inside))
            needs[part] = {one for file in files for one in (file, *file.parents) if one.parent == folder}
    lines = [("  " * depth + f"{folder.name}/", first_line(folder / "__init__.py"))]
    for part in order(needs):
        lines += rows(part, depth + 1) if part.is_dir() else [("  " * (depth + 1) + part.name, first_line(part))]
    return lines


def draw() -> str:
    """The map: every file below those that it may import, and what each chapter imports."""
    lines = rows(PACKAGE, 0)
    width = max(len(name) for name, _ in lines) + 2
    text = [f"    {name:<{width}}{meaning}" for name, meaning in lines]
    chapters = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    needs = {
        chapter: {
            PACKAGE / target.relative_to(PACKAGE).parts[0]
            for file in chapter.rglob("*.py")
            for target in imports(file)
            if chapter not in target.parents
        }
        for chapter in chapters
    }
    for chapter in order(needs):
        names = [one.name for one in order(needs) if one in needs[chapter]]
        text.append(
            f"    {chapter.name} imports {', '.join(names) or 'none of the others'}" if chapter in needs else ""
        )
        if chapter == order(needs)[0]:
            text.insert(-1, "")
    return "\n".join(text) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{draw()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
