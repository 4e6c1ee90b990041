"""The benchmark checks values before it measures, and measures what it says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import hcvision.connections

PATH = Path(__file__).parent.parent / "benchmarks" / "connections.py"
SPEC = importlib.util.spec_from_file_location("benchmark_connections", PATH)
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)


@pytest.mark.parametrize("name", ["dfc4", "dhc2", "dhc4", "shc2", "sfc2"])
def test_values(name):
    """The library equals the textbook in float64."""
    assert benchmark.check_values(name, benchmark.SMALL) < benchmark.TOLERANCE


def write_too_much(streams, output, alpha, beta):
    return PLAIN["depth_connection"](streams, (1 + 1e-8) * output, alpha, beta)


def read_the_transpose(streams, alpha, output, beta):
    return PLAIN["_mix"](streams, alpha if alpha.shape[-1] == 1 else alpha.mT, output, beta)


def carry_nan(streams, output, alpha, beta):
    return PLAIN["depth_connection"](streams, output, alpha, beta) * float("nan")


PLAIN = {name: getattr(hcvision.connections, name) for name in ("depth_connection", "_mix")}
BREAKS = [("depth_connection", write_too_much), ("_mix", read_the_transpose), ("depth_connection", carry_nan)]


@pytest.mark.parametrize(("name", "broken"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_connection_stops(name, broken, monkeypatch, capsys):
    """A wrong connection ends the script with a message, status 1 and no timing."""
    monkeypatch.setattr(hcvision.connections, name, broken)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured a wrong connection"))
    with pytest.raises(SystemExit, match=r"dhc2 is wrong: .* from the textbook"):
        benchmark.main(["--variants", "textbook-dhc2"])
    assert capsys.readouterr().out == ""


def test_saved_bytes():
    """Bytes of the tensors kept for backward, each once and without parameters: here the input and two ReLUs."""
    trunk = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU())
    tokens = torch.randn(2, 3, 8, requires_grad=True)
    assert benchmark.saved_bytes(trunk, tokens) == 3 * 2 * 3 * 8 * 4


def test_round(monkeypatch, capsys, tmp_path):
    """A tiny run of the command line: a row per variant, with its ratios to the residual trunk."""
    monkeypatch.setattr(benchmark, "FULL", benchmark.SMALL)
    peers = ["peer-dhc2", "peer-dfc2"] if benchmark.peer else []
    variants = ["dhc2", "textbook-dhc2", "dfc2", *peers]
    path = tmp_path / "rows.json"
    threads = ["--threads", str(torch.get_num_threads())]
    benchmark.main(["--variants", *variants, "--rounds", "2", "--batch", "3", *threads, "--json", str(path)])
    printed = capsys.readouterr().out
    rows = {row.pop("variant"): row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["residual", *variants]
    assert all(f"\n{variant} " in printed for variant in rows)
    assert rows["residual"] == {"time": 1, "low": 1, "high": 1, "saved": 1, "parameters": 0}
    for row in rows.values():
        assert 0 < row["low"] <= row["time"] <= row["high"]
    dim, sublayers = benchmark.SMALL.dim, 2 * benchmark.SMALL.depth
    assert rows["dhc2"]["parameters"] == rows["textbook-dhc2"]["parameters"] == sublayers * (dim * 4 + 2 * 4 + 2)
    assert 1 < rows["dhc2"]["saved"] < rows["textbook-dhc2"]["saved"]


def test_without_peer(monkeypatch, capsys):
    """Where hyper-connections is not installed, a line says so and the rest is measured."""
    measured = []
    monkeypatch.setattr(benchmark, "peer", None)
    monkeypatch.setattr(benchmark, "measure", lambda variants, *_: measured.extend(variants) or [])
    monkeypatch.setattr(benchmark, "table", lambda rows: "")
    benchmark.main(["--variants", "dhc2", "peer-dhc2"])
    assert measured == ["dhc2"]
    assert "hyper-connections is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["residual", "peer-shc2", "dhc", "mine-dhc2"])
def test_unknown_variant(variant, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--variants", variant])
    assert f"invalid variant_name value: '{variant}'" in capsys.readouterr().err
