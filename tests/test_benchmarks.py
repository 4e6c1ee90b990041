"""The benchmarks check values before they measure, and measure what they say."""

import importlib
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from hcvision.connections import eager, recomputation, steps
from hcvision.connections.kernels import native
from hcvision.connections.kernels import operators as kernels
from hcvision.connections.kernels import triton as gpu
from hcvision.connections.names import NAMES
from hcvision.connections.streams import StreamConnection
from hcvision.studies import measuring

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
benchmark, train_step, pairs = map(importlib.import_module, ("connections", "train_step", "pairs"))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels run in Triton's interpreter there
VIT = "vit_base_patch16_224"
TRACED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch.compile


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The scripts leave the number of threads to the tests."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    return chosen


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


# connections.py


@pytest.mark.parametrize(
    "name",
    [
        "dfc4",
        "dhc2",
        "dhc4",
        "shc2",
        "sfc2",
        "recompute-dhc4",
        "recompute-dfc2",
        "sihc3",
        "gr2",
        "oru",
        "laurel",
        "mhclite4",
        "krom4",
        "recompute-sihc2",
    ],
)
def test_values(name):
    """The library equals the textbook in float64."""
    assert benchmark.check_values(name, benchmark.SMALL) < benchmark.TOLERANCE


def write_too_much(streams, output, *rest):
    return PLAIN["depth_connection"](streams, (1 + 1e-8) * output, *rest)


def read_the_transpose(streams, alpha, output=None, beta=None):
    return PLAIN["mix"](streams, alpha if alpha.shape[-1] == 1 else alpha.mT, output, beta)


def carry_nan(*args):
    return PLAIN["depth_connection"](*args) * float("nan")


PLAIN = {"depth_connection": steps.depth_connection, "mix": eager.mix}
BREAKS = [("depth_connection", write_too_much), ("mix", read_the_transpose), ("depth_connection", carry_nan)]


@pytest.mark.parametrize(("name", "broken"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_connection_stops(name, broken, monkeypatch, capsys):
    """A wrong connection ends the script with a message, status 1 and no timing."""
    monkeypatch.setattr(eager if name == "mix" else steps, name, broken)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured a wrong connection"))
    with pytest.raises(SystemExit, match=r"dhc2 is wrong: .* from the textbook"):
        benchmark.main(["--variants", "textbook-dhc2"])
    assert capsys.readouterr().out == ""


def test_broken_native_kernel_stops(monkeypatch):
    """What is measured in float32 is checked in float32."""

    def broken(read, written, *rest, backward=native.backward):
        backward(read, written, *rest)
        if written[0] is not None:  # of the streams
            written[0].mul_(1.01)

    monkeypatch.setattr(native, "backward", broken)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured a wrong connection"))
    with pytest.raises(SystemExit, match=r"^dhc2 is wrong: in float32 \S+ times as far from float64 as is allowed$"):
        benchmark.main(["--variants", "torch-dhc2", "dhc2"])


def test_broken_recomputation_stops(monkeypatch):
    """The form that is measured is the one that is checked."""
    recipe = recomputation.Recipe
    call = recipe.__call__
    monkeypatch.setattr(recipe, "__call__", lambda self: 1.001 * call(self))
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured a wrong connection"))
    with pytest.raises(SystemExit, match=r"recompute-dhc2 is wrong"):
        benchmark.main(["--variants", "dhc2", "recompute-dhc2"])


def test_saved_bytes():
    """Bytes of the tensors kept for backward, each once and without parameters: here the input and two ReLUs."""
    trunk = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU())
    tokens = torch.randn(2, 3, 8, requires_grad=True)
    assert benchmark.saved_bytes(trunk, tokens) == 3 * 2 * 3 * 8 * 4


@pytest.mark.parametrize("variant", ["residual", "dhc2", "dfc4", "shc2", "textbook-dhc2"])
def test_saved_bytes_are_what_autograd_keeps(variant):
    """Where nothing is kept by other means the bytes are those of autograd's saved tensors."""
    trunk = benchmark.build_trunk(variant, benchmark.build_model(benchmark.SMALL))
    tokens = torch.randn(2, 5, 32, requires_grad=True)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in trunk.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trunk(tokens)
    hooks = sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)
    assert benchmark.saved_bytes(trunk, tokens) == hooks


def test_saved_bytes_cannot_be_hidden():
    """What is not in autograd's saved tensors counts as well."""

    class Hides(torch.nn.Module):
        def forward(self, x):
            self.hidden = x.detach() + 1
            return x * 2

    assert benchmark.saved_bytes(Hides(), torch.randn(2, 3, 8, requires_grad=True)) == 2 * 3 * 8 * 4


def test_recomputation_saves():
    """The form recompute recomputes: it keeps less, by the streams between its sub-layers."""
    size = benchmark.Size(96, 3, 6, 20, 2)
    model, tokens = benchmark.build_model(size), torch.randn(2, 20, 96, requires_grad=True)
    plain, less = (benchmark.saved_bytes(benchmark.build_trunk(v, model), tokens) for v in ("dhc4", "recompute-dhc4"))
    streams = 4 * tokens.nbytes
    weights = 4 * 2 * 20 * 4 * (1 + 4)  # alpha of a sub-layer, as recipes keep it; beta is kept anyway
    assert plain - less == 10 * (streams - weights)  # of 12, those before blocks 0 and 4 stay


def test_round(threads, monkeypatch, capsys, tmp_path):
    """A tiny run of the command line: a row per variant, with its ratios to the residual trunk."""
    kept = []
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(benchmark, "FULL", benchmark.SMALL)
    peers = ["peer-dhc2", "peer-dfc2"] if benchmark.peer else []
    variants = ["dhc2", "recompute-dhc2", "textbook-dhc2", "dfc2", *peers]
    path = tmp_path / "rows.json"
    benchmark.main(["--variants", *variants, "--rounds", "2", "--batch", "3", "--threads", "7", "--json", str(path)])
    printed = capsys.readouterr().out
    rows = {row.pop("variant"): row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["residual", *variants]
    assert all(f"\n| {variant} " in printed for variant in rows)
    assert rows["residual"] == {"ratio": 1, "ratio_q1": 1, "ratio_q3": 1, "saved": 1, "parameters": 0}
    for row in rows.values():
        assert 0 < row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
    dim, sublayers = benchmark.SMALL.dim, 2 * benchmark.SMALL.depth
    assert rows["dhc2"]["parameters"] == rows["textbook-dhc2"]["parameters"] == sublayers * (dim * 4 + 2 * 4 + 2)
    assert 1 < rows["dhc2"]["saved"] < rows["textbook-dhc2"]["saved"]
    assert (kept, threads) == ([True], [7])


def test_compiled(monkeypatch):
    """With a compiler: ratios to the compiled residual trunk and to the eager step of the same trunk."""
    times = {
        ("residual", False): [2.0, 4.0],
        ("dhc2", False): [3.0, 6.0],
        ("recompute-dhc2", False): [4.0, 8.0],
        ("residual", True): [1.0, 2.0],
        ("dhc2", True): [1.2, 2.4],
        ("recompute-dhc2", True): [1.1, 2.2],
    }

    def interleaved_times(steps, rounds, device, tick):
        assert list(steps) == list(times)
        for step in steps.values():
            step()
        return times

    compiled, kept = [], [100, 150, None]
    monkeypatch.setattr(benchmark, "interleaved_times", interleaved_times)
    monkeypatch.setattr(benchmark, "compiled_bytes", lambda run, trunk, tokens: kept.pop(0))
    monkeypatch.setattr(torch, "compile", lambda trunk, **kwargs: compiled.append(kwargs) or trunk)
    variants = ["dhc2", "recompute-dhc2"]
    rows = benchmark.measure(variants, 2, benchmark.SMALL, "cpu", torch.float32, "inductor")
    assert compiled == 3 * [{"dynamic": False, "backend": "inductor"}]
    residual, dhc2, recompute = rows
    assert (residual["compiled"]["ratio"], residual["compiled_to_eager"]["ratio"]) == (1, 0.5)
    assert (dhc2["ratio"], dhc2["compiled"]["ratio"], dhc2["compiled_to_eager"]["ratio"]) == (1.5, 1.2, 0.4)
    assert (recompute["ratio"], recompute["compiled"]["ratio"]) == (2, 1.1)
    assert (dhc2["compiled_saved"], recompute["compiled_saved"]) == (1.5, None)
    *_, line, last = benchmark.table(rows).splitlines()
    assert line.endswith("| 1.20 x (1.20 - 1.20) | 0.40 x (0.40 - 0.40) | 1.50 x          |")
    assert last.endswith("| 1.10 x (1.10 - 1.10) | 0.28 x (0.28 - 0.28) |                 |")


@TRACED
def test_compiled_bytes():
    """What one graph keeps: the input and the activations, no parameter; None where there are more graphs."""
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Tanh())
    tokens = torch.randn(2, 5, 3, requires_grad=True)
    one = torch.compile(layer, backend="aot_eager_decomp_partition")
    assert benchmark.compiled_bytes(one, layer, tokens) == tokens.nbytes  # and the output, which is there anyway
    assert benchmark.compiled_bytes(lambda x: one(one(x)), layer, tokens) is None


def test_table():
    """Bars stand beside what they are for."""
    row = {"ratio": 1.056, "ratio_q1": 1.04, "ratio_q3": 1.07, "saved": 1.274, "parameters": 23952}
    rows = [{"variant": name, **row} for name in ("dfc4", "recompute-dhc4", "shc2")]
    header, _, *lines = (line.split("|")[1:-1] for line in benchmark.table(rows).splitlines())
    columns = ["variant", "step time (quartiles)", "bar", "saved activations", "bar", "extra parameters"]
    assert [cell.strip() for cell in header] == columns
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells == [
        ["dfc4", "1.06 x (1.04 - 1.07)", "≤ 1.06", "1.27 x", "≤ 1.28", "23,952"],
        ["recompute-dhc4", "1.06 x (1.04 - 1.07)", "", "1.27 x", "≤ 1.25", "23,952"],
        ["shc2", "1.06 x (1.04 - 1.07)", "", "1.27 x", "", "23,952"],
    ]


def test_without_peer(monkeypatch, capsys):
    """Where hyper-connections is not installed, a line says so and the rest is measured."""
    measured = []
    monkeypatch.setattr(benchmark, "peer", None)
    monkeypatch.setattr(benchmark, "measure", lambda variants, *_: measured.extend(variants) or [])
    monkeypatch.setattr(benchmark, "table", lambda rows: "")
    benchmark.main(["--variants", "dhc2", "peer-dhc2"])
    assert measured == ["dhc2"]
    assert "hyper-connections is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["residual", "peer-shc2", "recompute-peer-dhc2", "dhc", "mine-dhc2"])
def test_unknown_variant(variant, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--variants", variant])
    assert f"invalid variant_name value: '{variant}'" in capsys.readouterr().err


def test_freed_memory_is_kept(monkeypatch):
    """glibc is told to, and nothing else is asked."""
    called = {}
    library = types.SimpleNamespace(mallopt=called.__setitem__)
    monkeypatch.setattr(measuring.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(measuring.platform, "system", lambda: "Darwin")
    measuring.keep_freed_memory()
    assert called == {}
    monkeypatch.setattr(measuring.platform, "system", lambda: "Linux")
    measuring.keep_freed_memory()
    assert called == {-4: 0, -1: 2**31 - 1, -2: 2**28}
    monkeypatch.setattr(measuring.ctypes, "CDLL", lambda name: object())
    measuring.keep_freed_memory()


# train_step.py: values


@pytest.mark.parametrize(("name", "dtype"), [("dhc2", torch.bfloat16), ("dfc4", torch.float32)])
def test_kernel_values(name, dtype):
    """Every result and every gradient of the kernels is as near to float64 as PyTorch's."""
    found = train_step.check_kernels(name, 32, 5, dtype, DEVICE)
    assert len(found) == 4 + 5
    assert max(found.values()) <= 1


@pytest.mark.parametrize("name", ["dhc2", "dhc4", "dfc4"])
def test_formula(name):
    """What the kernels are held against, in its own dtype: twice as wrong as itself is allowed, no more."""
    case = train_step.build_case(name, 32, 7, torch.float32, "cpu")
    exact = train_step.with_gradients(train_step.run_formula, case.to(torch.float64))
    theirs = train_step.with_gradients(train_step.run_formula, case.to(torch.bfloat16))
    assert [t.dtype for t in theirs[:3]] == 3 * [torch.bfloat16]
    for own, truth in zip(theirs, exact, strict=True):
        assert truth.dtype == torch.float64
        assert benchmark.excess(own, own, truth, 0.0) == pytest.approx(0.5)
        assert benchmark.excess(truth, own, truth, 0.0) == 0
        assert benchmark.excess(truth - 3 * (truth - own), own, truth, 0.0) == pytest.approx(1.5)


def test_worse():
    """NaN is worse than anything, whichever comes first."""
    nan = float("nan")
    assert benchmark.worse(1.0, 2.0) == benchmark.worse(2.0, 1.0) == 2
    assert not benchmark.worse(nan, 1.0) <= 1
    assert not benchmark.worse(1.0, nan) <= 1


def too_large(result):
    return 1.05 * result


def only_nan(results):
    return tuple(result * float("nan") for result in results)


def without_norm(results):
    streams, *rest = results
    return (0.9 * streams, *rest)


BROKEN = [("depth", too_large, "streams"), ("width", only_nan, "streams"), ("join_backward", without_norm, "gradient")]


@pytest.mark.parametrize(("name", "change", "what"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_broken_kernel_stops(name, change, what, monkeypatch, capsys):
    """A wrong kernel ends the script with one line and status 1, before anything is timed."""
    kernel = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args: change(kernel(*args)))
    for part in ("median_seconds", "fit_memory"):
        monkeypatch.setattr(train_step, part, lambda *_: pytest.fail("measured a wrong kernel"))
    with pytest.raises(SystemExit, match=rf"^the kernels are wrong: dhc2, {what}.* is allowed$"):
        train_step.main(["--device", DEVICE, "--small"])
    assert "right" not in capsys.readouterr().out


def test_broken_join_of_a_trunk_stops(monkeypatch):
    """Kernels that are right by themselves are also looked at where blocks use them."""
    join = steps.join_connections

    def swapped(streams, output, alpha, beta, link, rule, options):
        beta = beta.flip(-1) if options[-1] == "triton" else beta
        return join(streams, output, alpha, beta, link, rule, options)

    monkeypatch.setattr(steps, "join_connections", swapped)
    monkeypatch.setattr(train_step, "check_kernels", lambda *_: {})
    with pytest.raises(SystemExit, match="the kernels are wrong: dhc2, a trunk, float32: "):
        train_step.check(("dhc2",), 32, 5, benchmark.Size(32, 2, 1, 3, 1), DEVICE)


# train_step.py: kernels


def test_vectors():
    """Counted by hand: n streams and one view, m streams and m views."""
    names = ("width", "depth", "join", "width_backward", "depth_backward", "join_backward")
    counts = {(2, 1): (3, 5, 6, 7, 4, 9), (4, 1): (5, 9, 10, 13, 6, 15), (4, 4): (8, 12, 16, 16, 12, 24)}
    for (S, V), expected in counts.items():
        assert tuple(train_step.vectors(name, S, V) for name in names) == expected
    for n in (2, 4):
        assert train_step.vectors("width", n, 1) + train_step.vectors("depth", n, 1) == 3 * n + 2
        assert train_step.vectors("join", n, 1) == 2 * n + 2


@pytest.mark.parametrize(("name", "S", "V"), [("dhc2", 2, 1), ("dhc4", 4, 1), ("dfc4", 4, 4)])
def test_vectors_of_the_page(name, S, V):
    """docs/results/performance.md counts the same, in vectors of the model's width."""
    page = (ROOT / "docs/results/performance.md").read_text()
    count = {kernel: train_step.vectors(kernel, S, V) // V for kernel in ("width", "depth", "join")}
    back = {kernel: train_step.vectors(f"{kernel}_backward", S, V) // V for kernel in count}
    for row in (
        [number for part in (count, back) for number in (part["width"] + part["depth"], part["join"])],
        [number for part in (count, back) for number in (2 * (part["width"] + part["depth"]), sum(part.values()))],
    ):
        assert f"| {name} | {' | '.join(map(str, row))} |" in page


@pytest.mark.parametrize(("name", "S", "V", "E"), [("dhc4", 4, 1, 32), ("dfc2", 2, 2, 16)])
def test_vectors_are_those_of_the_tensors(name, S, V, E, monkeypatch):
    """As many as go into a kernel and come out of it, the link aside, which has no memory."""
    tokens, seen = 3, {}

    def spy(kernel, operator):
        def call(*args):
            results = operator(*args)
            tensors = [*args, *(results if isinstance(results, tuple) else [results])]
            large = [t for t in tensors if isinstance(t, torch.Tensor) and t.shape[:1] + t.shape[2:] == (tokens, E)]
            seen[kernel] = sum(t.shape[1] for t in large if t.untyped_storage().nbytes() == t.nbytes)
            return results

        return call

    case = train_step.build_case(name, 32, tokens, torch.bfloat16, DEVICE)
    for kernel in train_step.calls(case):
        monkeypatch.setattr(kernels, kernel, spy(kernel, getattr(kernels, kernel)))
    with torch.no_grad():
        for call in train_step.calls(case).values():
            call()
    assert seen == {kernel: train_step.vectors(kernel, S, V) for kernel in seen}
    assert len(seen) == 6


def test_kernel_rows(monkeypatch):
    """Bytes by hand, and what they make of a time and of a copy's bandwidth."""
    monkeypatch.setattr(train_step, "median_seconds", lambda call, device, repeats: 2e-6)
    rows = list(train_step.measure_kernels("dfc4", 32, 10, torch.bfloat16, DEVICE, 1, 4e9))
    assert [row["bytes"] for row in rows] == [10 * 8 * 2 * number for number in (8, 12, 16, 16, 12, 24)]
    assert rows[2] == {
        "connection": "dfc4",
        "dtype": "bfloat16",
        "kernel": "join",
        "vectors": 16,
        "bytes": 2560,
        "ms": 2e-3,
        "gb_per_s": pytest.approx(1.28),
        "of_copy": pytest.approx(0.32),
    }
    _, _, *lines = train_step.kernel_table(rows)
    cells = [cell.strip() for cell in lines[5].split("|")[1:-1]]
    assert cells == ["dfc4", "bfloat16", "join backward", "24", "0.0", "0.002", "2", "48%", "≥ 80%"]


def test_median(clock):
    """The median of calls, of which each is timed alone."""
    steps = iter([5.0, 1.0, 2.0])

    def call():
        clock[0] += next(steps)

    assert train_step.median_seconds(call, "cpu", 3) == 2


def test_copy_bandwidth(monkeypatch):
    monkeypatch.setattr(train_step, "median_seconds", lambda call, device, repeats: call() is None or 0.5)
    assert train_step.copy_bandwidth("cpu", 1000, 1) == 2 * 4000 / 0.5  # read and written


# train_step.py: training steps


def test_groups():
    """What takes turns, and in which order it is measured."""
    full = train_step.find_groups(128, 64, "bf16-mixed", has_kernels=True, has_peer=True)
    assert [str(group) for group in full] == [
        f"{VIT}: compiled, bf16-mixed, batches of 128",
        f"{VIT}: eager, bf16-mixed, batches of 128",
        "dit_xl_patch2_256: compiled, bf16-mixed, batches of 64",
        f"{VIT}: eager, bf16-mixed, batches of 128, the package hyper-connections",
        f"{VIT}: compiled, bf16-true, batches of 128",
        f"{VIT}: compiled, bf16-mixed, batches of 128, the package hyper-connections",
    ]
    forms = [f"{form}-{name}" for form in ("triton", "torch") for name in ("dhc2", "dhc4", "dfc4")]
    assert full[0].variants == ("residual", *forms, "recompute-dhc4")
    assert full[1].variants == ("residual", *forms, "recompute-dhc4")
    assert full[2].variants == ("residual", "triton-dhc4", "recompute-dhc4")
    few = train_step.find_groups(128, 64, "bf16-true", has_kernels=False, has_peer=False)
    assert [group.variants for group in few] == [
        ("residual", *forms[3:], "recompute-dhc4"),
        ("residual", *forms[3:], "recompute-dhc4"),
        ("residual", "torch-dhc4", "recompute-dhc4"),
    ]


def test_bars():
    """Bars are for kernels in a compiled model, that of memory for recomputation too."""
    compiled = train_step.Group(VIT, 8, "bf16-mixed", True, ())
    eager = train_step.Group(VIT, 8, "bf16-mixed", False, ())
    dit = train_step.Group("dit_xl_patch2_256", 8, "bf16-mixed", True, ())
    assert train_step.bars(compiled, "triton-dfc4") == {"bar": 1.02, "memory_bar": None}
    assert train_step.bars(compiled, "triton-dhc4") == {"bar": 1.10, "memory_bar": 1.25}
    assert train_step.bars(dit, "triton-dhc4") == {"bar": 1.07, "memory_bar": 1.25}
    assert train_step.bars(eager, "recompute-dhc4") == {"bar": None, "memory_bar": 1.25}
    for group, variant in ((eager, "triton-dhc4"), (compiled, "torch-dhc4"), (compiled, "residual")):
        assert train_step.bars(group, variant) == {"bar": None, "memory_bar": None}


SETUP = train_step.Setup(
    modes=["train"],
    rounds=1,
    batch_size=2,
    img_size=None,
    num_classes=1000,
    model_args=train_step.TINY[VIT],
    opt="adamw",
    device="cpu",
    precision="32",
    compile=False,
    grad_checkpointing=False,
)


@pytest.fixture
def models(monkeypatch):
    """The models of the training steps that are built."""
    built = []
    step = train_step.training_step
    monkeypatch.setattr(
        train_step, "training_step", lambda module, *rest: built.append(module.model) or step(module, *rest)
    )
    return built


def connections_of(model):
    return [module for module in model.modules() if isinstance(module, StreamConnection)]


@pytest.mark.parametrize("variant", ["triton-dhc2", "torch-dfc4", "residual"])
def test_forms(variant, models):
    """A variant has the connection and the backend that it says; no parameter is all zeros."""
    train_step.build_step(train_step.Group(VIT, 2, "32", False, ()), variant, SETUP, True, "eager", False)
    form, _, name = variant.rpartition("-")
    assert len(connections_of(models[0])) == (4 if form else 0)
    assert {connection.backend for connection in connections_of(models[0])} <= {form}
    assert getattr(models[0], "connection", "residual") == name
    assert all(parameter.any() for parameter in models[0].parameters())


@pytest.mark.parametrize(("has_kernels", "backend"), [(True, "triton"), (False, "torch")])
def test_recompute_form(has_kernels, backend, models):
    """Recomputation takes kernels where they run."""
    group = train_step.Group(VIT, 2, "32", False, ())
    train_step.build_step(group, "recompute-dhc4", SETUP, has_kernels, "eager", False)
    assert {connection.backend for connection in connections_of(models[0])} == {backend}
    assert [connection.recompute for connection in connections_of(models[0])] == [False, True, True, True]


@pytest.mark.parametrize(("whole", "compiled"), [(False, [False, True, True]), (True, [True, False, False])])
def test_compiled_parts(whole, compiled, models):
    """The blocks are compiled one by one, or the model as a whole."""
    train_step.build_step(train_step.Group(VIT, 2, "32", True, ()), "torch-dhc2", SETUP, False, "eager", whole)
    parts = [models[0], *models[0].blocks]
    assert [part._compiled_call_impl is not None for part in parts] == compiled


@TRACED
def test_compiled_recomputation(models, monkeypatch):
    """Blocks whose streams are computed again together are one graph, and give what they gave one by one."""
    monkeypatch.setattr(train_step, "RECOMPUTE", 2)
    deep = train_step.replace(SETUP, model_args={**train_step.TINY[VIT], "depth": 3})
    for compiled in (False, True):
        torch.manual_seed(0)
        train_step.build_step(
            train_step.Group(VIT, 2, "32", compiled, ()), "recompute-dhc2", deep, False, "eager", False
        )
    plain, runs = models
    assert [len(run) for run in runs.blocks] == [2, 1]
    assert all(run._compiled_call_impl is not None for run in runs.blocks)
    for one, other in zip(runs.parameters(), plain.parameters(), strict=True):
        one.data = other.data
    x = torch.randn(2, 3, *plain.patch_embed.img_size)
    torch.testing.assert_close(runs(x), plain(x))


@TRACED
def test_step_on_kernels(models):
    """A compiled training step has the gradients of the PyTorch form, whichever way it goes."""
    setup = train_step.replace(SETUP, model_args={**train_step.TINY[VIT], "depth": 1}, device=DEVICE)
    for form in ("triton", "torch"):
        group = train_step.Group(VIT, 1, "32", True, ())
        train_step.build_step(group, f"{form}-dhc2", setup, True, "eager", False)()
    ours, theirs = ({name: p.grad for name, p in model.named_parameters()} for model in models)
    assert any("dynamic_alpha_fn" in name for name in ours)
    for name, grad in theirs.items():
        assert grad.any(), name
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item(), msg=name)


def built_in(seconds, clock, takes):
    """A way to build steps that takes seconds, of steps that take others."""

    def build(group, variant):
        clock[0] += seconds

        def step():
            clock[0] += takes.get(variant, 1.0)

        return step

    return build


TRIO = train_step.Group(VIT, 8, "bf16-mixed", True, ("residual", "triton-dhc4", "torch-dhc4"))


@pytest.mark.parametrize(
    ("seconds", "rounds", "left_out"),
    [
        (200, 15, []),  # time enough
        (70, 6, []),  # fewer rounds: 34 s are left behind the building, 8 rounds of 4 s with those that warm up
        (57, None, [*TRIO.variants]),  # 21 s would do for too few of them
        (37, None, [*TRIO.variants]),  # no time for the last one to be built, and then none for rounds
    ],
)
def test_budget(seconds, rounds, left_out, clock, capsys):
    """What does not fit is left out, by name, and the end comes in time."""
    build = built_in(9.0, clock, {"triton-dhc4": 2.0})
    budget = train_step.Budget(seconds)
    rows, skipped = train_step.measure_group(TRIO, build, 15, "cpu", budget)
    assert [row["rounds"] for row in rows] == ([rounds] * 3 if rounds else [])
    assert skipped == left_out
    assert budget.left() >= 0
    if rows:
        assert [row["step_time"] for row in rows] == [1000, 2000, 1000]
        assert [row["ratio"] for row in rows] == [1, 2, 1]
        assert [row["samples_per_sec"] for row in rows] == [8, 4, 8]
        assert [row["bar"] for row in rows] == [None, 1.10, None]


def test_budget_of_a_part(clock, capsys):
    """What was built is measured, and what was not is named."""
    build = built_in(9.0, clock, {})
    rows, skipped = train_step.measure_group(TRIO, build, 1, "cpu", train_step.Budget(30))
    assert [row["variant"] for row in rows] == ["residual", "triton-dhc4"]
    assert skipped == ["torch-dhc4"]


def test_half_a_batch(monkeypatch, capsys):
    """Where a batch does not fit half of it is tried; any other error is one."""
    tried = []

    def measure_group(group, *rest):
        tried.append(group.batch)
        if group.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if group.precision == "32":
            raise RuntimeError("no")
        return [str(group)], []

    monkeypatch.setattr(train_step, "measure_group", measure_group)
    assert train_step.fit_memory(TRIO, None, 1, "cpu", None) == ([f"{VIT}: compiled, bf16-mixed, batches of 2"], [])
    assert tried == [8, 4, 2]
    assert "batches of 8 do not fit" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"^no$"):
        train_step.fit_memory(train_step.replace(TRIO, precision="32", batch=1), None, 1, "cpu", None)
    assert tried == [8, 4, 2, 1]


# train_step.py: the command


@pytest.fixture
def no_kernels(monkeypatch):
    """A machine on which nothing but PyTorch runs, and a short table."""
    monkeypatch.setattr(gpu, "find_obstacle", lambda streams, views: "not here")
    monkeypatch.setattr(train_step, "NAMES", ("dhc2",))
    monkeypatch.setattr(train_step, "peer", None)
    monkeypatch.setattr(train_step, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(train_step, "check", lambda *_: pytest.fail("checked kernels that do not run"))


@TRACED
@pytest.mark.usefixtures("no_kernels")
def test_small(tmp_path, capsys):
    """Every group runs, on tiny models: a page, the same as JSON, and what is missing by name."""
    out = tmp_path / "new" / "page.md"
    argv = ["--device", "cpu", "--small", "--compiler", "eager", "--rounds", "1", "--out", str(out)]
    train_step.main(argv)
    page = out.read_text()
    assert page in capsys.readouterr().out
    kept = json.loads(out.with_suffix(".json").read_text())
    assert kept["facts"]["command"] == f"`python benchmarks/train_step.py {' '.join(argv)}`"
    assert f"torch {torch.__version__}" in kept["facts"]["versions"]
    assert kept["kernels"] == kept["failed"] == []
    assert kept["skipped"] == ["kernels: not here", "the peer: hyper-connections is not installed"]
    found = {}
    for row in kept["steps"]:
        found.setdefault(row["group"], []).append(row["variant"])
        assert f"| {row['variant']} " in page
        assert row["ratio_q1"] > 0
        assert (row["memory_ratio"] is None) == row["compiled"]
    assert found == {
        f"{VIT}: compiled, bf16-mixed, batches of 2": ["residual", "torch-dhc2", "recompute-dhc4"],
        f"{VIT}: eager, bf16-mixed, batches of 2": ["residual", "torch-dhc2", "recompute-dhc4"],
        "dit_xl_patch2_256: compiled, bf16-mixed, batches of 2": ["residual", "torch-dhc4", "recompute-dhc4"],
        f"{VIT}: compiled, bf16-true, batches of 2": ["residual", "torch-dhc2"],
    }
    assert all(f"\n### {group}\n" in page for group in found)


@pytest.mark.usefixtures("no_kernels")
def test_no_time(monkeypatch, tmp_path):
    """With no time at all everything is skipped, and named."""
    monkeypatch.setattr(train_step, "fit_memory", lambda *_: pytest.fail("there was no time"))
    out = tmp_path / "page.md"
    train_step.main(["--device", "cpu", "--small", "--budget", "0", "--out", str(out)])
    skipped = out.read_text().partition("## Skipped\n\n")[2].splitlines()
    assert skipped[2:] == [
        f"- {VIT}: compiled, bf16-mixed, batches of 2: no time left",
        f"- {VIT}: eager, bf16-mixed, batches of 2: no time left",
        "- dit_xl_patch2_256: compiled, bf16-mixed, batches of 2: no time left",
        f"- {VIT}: compiled, bf16-true, batches of 2: no time left",
    ]


@pytest.mark.usefixtures("no_kernels")
def test_failure(monkeypatch, tmp_path):
    """A group that fails costs its own rows, and the status."""

    def fit_memory(group, build, rounds, device, budget):
        if group.compiled:
            raise RuntimeError("the compiler is unhappy\nfor many lines")
        row = {"group": str(group), "variant": "residual", "step_time": 1234.5, "samples_per_sec": 1000.4}
        row |= {"ratio": 1.0, "ratio_q1": 0.9, "ratio_q3": 1.1, "bar": 1.05, "memory_bar": None}
        return [{**row, "peak_memory_mb": 12345.6, "memory_ratio": 1.2}], ["torch-dhc2"]

    monkeypatch.setattr(train_step, "fit_memory", fit_memory)
    out = tmp_path / "page.md"
    with pytest.raises(SystemExit, match=r"^failed: 3 of the groups of training steps$"):
        train_step.main(["--device", "cpu", "--small", "--out", str(out)])
    page = out.read_text()
    cells = ["residual", "1,234.5", "1,000", "1.00 x (0.90 - 1.10)", "≤ 1.05", "12,346", "1.20 x", ""]
    assert cells in [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert f"- {VIT}: compiled, bf16-mixed, batches of 2: the compiler is unhappy\n" in page
    assert f"- {VIT}: eager, bf16-mixed, batches of 2, torch-dhc2: no time left\n" in page


@pytest.mark.skipif(DEVICE == "cuda", reason="for a machine without a GPU")
def test_without_a_gpu():
    """One line, and what runs all the same."""
    with pytest.raises(SystemExit, match=r"^no GPU here: --device cpu --small runs"):
        train_step.main([])


# pairs.py


def test_pairs(tmp_path, capsys):
    """Differences of 1, 2 and 3 points have a mean of 2 and an interval of 4.302653 / sqrt(3) = 2.484 around it."""
    rows = ["variant,seed,top1,val_loss"]
    for seed, points in enumerate((1, 2, 3)):
        rows += [f"a,{seed},0.5,1.0", f"a-b,{seed},{0.5 + points / 100},{1 - points / 100}"]
    (tmp_path / "results.csv").write_text("\n".join(rows) + "\n")
    pairs.main([str(tmp_path)])
    row = capsys.readouterr().out.splitlines()[2]
    assert [part.strip() for part in row.split("|")[1:-1]] == [
        "a-b - a", "3", "+2.00 [-0.48, +4.48]", "-0.0200 [-0.0448, +0.0048]"
    ]  # fmt: skip
    pairs.main([str(tmp_path), "a:a-b"])
    assert "| -2.00 [-4.48, +0.48] " in capsys.readouterr().out
    for wrong in (["a:c"], ["a"]):
        with pytest.raises(SystemExit):
            pairs.main([str(tmp_path), *wrong])
        assert f"pairs must be ONE:OTHER of a, a-b, got {wrong[0]}" in capsys.readouterr().err


# parameters.py


def test_parameters(capsys):
    """What each connection adds to a ViT-S/16; the table of docs/connections.md has the same numbers."""
    importlib.import_module("parameters").main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vit_small_patch16_224: 22,050,664 parameters"
    counts = dict(line.split(": ") for line in lines[1:])
    assert counts["shc4"] == "576 (0.00%)"
    page = (Path(__file__).parents[1] / "docs" / "connections.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| `")]
    shown = {row[1].strip("`"): row[4] for row in rows if row[1].strip("`") in counts}  # a name that ViTs have
    assert len(shown) >= 6
    assert shown == {name: counts[name] for name in shown}


# names.py


def test_names(capsys):
    """What importing registers, counted in a process of its own, and what it took."""
    importlib.import_module("names").main(["--rounds", "1"])
    vit, dit, entries, seconds = capsys.readouterr().out.splitlines()
    vits, dits = 4 * (len(NAMES) + 1), 18 * (1 + len(NAMES) + 1)  # mudd, and dar4
    assert vit == f"ViT: {vits} names, {5 * vits} pretrained tags of their bases"
    assert dit == f"DiT: {dits} names, 0 pretrained tags of their bases"
    more = vits + dits + 1  # hcvision_converted
    assert entries.endswith(f" names of timm's own, {more} more; {more + 5 * vits} entries with tags")
    assert 0 < float(seconds.split()[2]) < 60
