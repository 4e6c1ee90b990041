"""The Python of the README and of the guide runs, and their commands name files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_blocks_run(page, capsys, monkeypatch, tmp_path):
    """In order, and they print what the page says behind them."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in python_blocks(page):
        exec(block, namespace)
    told = re.findall(r"print\(\w+\.shape\)  # (\([\d, ]+\))", "".join(python_blocks(page)))
    assert capsys.readouterr().out.splitlines() == [f"torch.Size([{shape[1:-1]}])" for shape in told]


def test_the_guide_has_code():
    assert {"README.md", "docs/index.md", "docs/diffusion.md"} <= {page for page in PAGES if python_blocks(page)}


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"(?:configs|docs|hcvision|tests|benchmarks)/[\w./-]+\.\w+", text):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def cells_of(line):
    return tuple(cell.strip() for cell in line.strip("| ").split("|"))


@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "docs/studies.md", "docs/diffusion.md", "docs/results/README.md"]
)
def test_tables_of_studies_are_those_of_their_reports(page):
    """Every row of a table with paired differences stands in a report that the committed CSV files make."""
    reports = (ROOT / "docs" / "results").glob("*/report.md")
    known = {cells_of(line) for path in reports for line in path.read_text().splitlines() if line.startswith("|")}
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE)
    rows = [
        line
        for table in tables
        if "| minus " in table or "| at equal time " in table
        for line in table.splitlines()
        if not line.startswith("| -")
    ]
    assert rows
    assert [row for row in rows if cells_of(row) not in known] == []
