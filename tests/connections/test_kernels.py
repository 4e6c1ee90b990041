"""hcvision.connections.kernels: values and every gradient against float64, torch's transformations, the code.

Without a GPU the kernels in Triton run in its interpreter (conftest.py sees to it).
"""

import copy
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import hcvision
from hcvision.connections.base import expand_streams
from hcvision.connections.kernels import native
from hcvision.connections.kernels import operators as kernels
from hcvision.connections.kernels import triton as gpu
from hcvision.connections.names import build_connection, parse_connection
from hcvision.connections.streams import BACKENDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = {"triton": DEVICE, "native": "cpu"}
RUNS = {"triton": 5, "native": 15}  # the fewest whose median does not hang on chance, and as many as there is time for
SMALL = {FP32: 2**-21, BF16: 2**-10, FP16: 2**-13}


def compiled_code(name):
    """A case that has a C++ compiler at work for ten seconds."""
    return pytest.param(name, "inductor", marks=pytest.mark.slow)


@pytest.fixture(params=DEVICES)
def backend(request):
    """Both kinds of kernels."""
    return request.param


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Or the compiler gives up: the same lines of code were compiled for too many modules."""
    torch.compiler.reset()


def supported(backend, dtype):
    """Those in C take float32 alone."""
    return FP32 if backend == "native" else dtype


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody wrote to is full of NaN."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


class Two(nn.Module):
    """Two sub-layers as a block writes them: width-connection, branch, join, branch, depth-connection."""

    def __init__(self, name, dim, backend, dtype=torch.float64, joined=True, **options):
        super().__init__()
        self.joined = joined
        self.connections = nn.ModuleList(
            build_connection(name, dim, k, backend=backend, dtype=dtype, **options) for k in range(2)
        )
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        randomize(self, 0.5)

    def branch(self, view):
        return torch.sin(view * self.weight.to(view.dtype)) + view / 2

    def forward(self, x):
        first, second = self.connections
        view, carried = first.width_connection(x)
        if self.joined:
            view, carried = second.join(self.branch(view), carried)
        else:
            view, carried = second.width_connection(first.depth_connection(self.branch(view), carried))
        return second.depth_connection(self.branch(view), carried)


def values(module, x, seed):
    """The output, and the gradients of x and of every parameter, in float64."""
    x = x.detach().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], seed.to(out.dtype))
    return {k: v.double() for k, v in zip(["out", "x", *dict(module.named_parameters())], (out, *grads), strict=True)}


def with_scales(found):
    """The four scales as one value: each is a sum that may cancel by chance."""
    scales = [key for key in found if key.endswith("scale")]
    rest = {key: value for key, value in found.items() if key not in scales}
    return rest | ({"scales": torch.cat([found[key] for key in scales])} if scales else {})


def error(wrong, truth):
    """Root mean square, relative to that of the truth of all runs; the median of the runs: one of them may be lucky.

    The truth of one run may be small by cancellation, where rounding errors are not.
    """
    size = torch.stack(truth).square().mean().sqrt()
    return statistics.median((one.square().mean().sqrt() / size).item() for one in wrong)


def check(backend, name, dim, shape, dtype, joined=True, layout=lambda x: x, size=1.0, **options):
    """At most twice as wrong as the PyTorch form in the same dtype, and a small term, in the median of some runs."""
    dtype, device = supported(backend, dtype), DEVICES[backend]
    errors, truths = {"torch": [], backend: []}, []
    for run in range(RUNS[backend]):
        exact = randomize(Two(name, dim, "torch", **options), 0.5, run).to(device)
        for key, parameter in exact.named_parameters():
            parameter.data = (parameter.data * (size if key.endswith("fn") else 1)).to(dtype).double()
        torch.manual_seed(run)
        x = layout(torch.randn(*shape, exact.connections[0].width)).to(device, dtype)
        seed = torch.randn(x.shape).to(device, dtype)
        truths.append(with_scales(values(exact, x.double(), seed)))
        for form, found in errors.items():
            module = Two(name, dim, form, dtype, joined, **options).to(device)
            module.load_state_dict(exact.state_dict())
            got = with_scales(values(module, x, seed))
            found.append({key: value - truths[-1][key] for key, value in got.items()})
    for key in truths[0]:
        truth = [run[key] for run in truths]
        ours, theirs = (error([run[key] for run in errors[form]], truth) for form in (backend, "torch"))
        assert ours <= 2 * theirs + SMALL[dtype], f"{key}: wrong by {ours:.1e} of it, PyTorch by {theirs:.1e}"
        assert torch.cat([part.flatten() for part in truth]).abs().max() > 1e-3, f"{key} says nothing"


@pytest.mark.parametrize(
    ("name", "dim", "shape", "dtype", "options"),
    [
        ("dhc2", 64, (2, 3), FP32, {}),  # tokens that do not fill the last tile
        ("dhc4", 43, (3,), FP32, {}),  # three chunks of columns, the last one with 11 of 16
        ("dhc4", 60, (2, 4), BF16, {}),  # two chunks
        ("dhc3", 33, (3,), FP16, {}),  # a rate and a width that are odd
        ("dhc1", 40, (70,), FP32, {}),  # three tiles of tokens, for two programs
        ("dhc8", 16, (3,), FP32, {}),
        ("dfc2", 66, (5,), BF16, {}),
        ("dfc4", 132, (2, 3), FP32, {}),  # 33 columns
        ("dfc3", 15, (70,), FP16, {}),
        ("shc4", 70, (3,), FP32, {}),
        ("shc3", 33, (2, 3), BF16, {}),
        ("sfc4", 20, (3,), BF16, {}),
        ("dhc2", 40, (3,), FP32, {"tanh": False}),
        ("dhc2", 40, (3,), FP32, {"size": 0.01}),  # where tanh is a series
        ("dhc2", 40, (3,), FP32, {"size": 2.0}),  # where its slope is near 0
        ("dhc2", 40, (3,), FP32, {"norm": False}),
        ("dfc2", 40, (3,), FP32, {"norm": False, "tanh": False}),
        ("dhc2", 40, (1, 2, 1, 3), FP32, {"arrangement": "parallel"}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poison")
def test_numerics(backend, name, dim, shape, dtype, options):
    check(backend, name, dim, shape, dtype, **options)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:, :1].expand(-1, x.shape[1], -1),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
    ],
    ids=["transposed", "expanded", "every other"],
)
@pytest.mark.usefixtures("poison")
def test_layouts(backend, layout):
    check(backend, "dhc2", 40, (2, 3), FP32, layout=layout)
    check(backend, "dfc2", 40, (2, 3), FP32, layout=layout)


@pytest.mark.parametrize(("name", "dtype"), [("dhc2", FP32), ("dfc3", BF16), ("shc3", FP32)])
@pytest.mark.usefixtures("poison")
def test_join(backend, name, dtype):
    """Joined and one by one the kernels give the same bits; and again the same when they run again."""
    dtype = supported(backend, dtype)
    x = torch.randn(70, 33 * (parse_connection(name)[1] if "hc" in name else 1), device=DEVICES[backend]).to(dtype)
    runs = [values(Two(name, 33, backend, dtype, joined).to(DEVICES[backend]), x, x) for joined in (True, False, True)]
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key
        assert torch.equal(value, runs[2][key]), key


@pytest.mark.parametrize("name", ["dhc2", "dfc3", "shc3"])
def test_recompute(backend, name):
    """Streams that are computed again give the same bits."""
    module = Two(name, 33, backend, FP32).to(DEVICES[backend])
    x = torch.randn(5, module.connections[0].width, device=DEVICES[backend])
    plain = values(module, x, x)
    for connection in module.connections:
        connection.records = True
    module.connections[1].recompute = True
    for key, value in values(module, x, x).items():
        assert torch.equal(value, plain[key]), key


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU records graphs of its kernels")
@pytest.mark.parametrize("name", ["dhc2", "dfc2", "shc2"])
def test_cuda_graph(name):
    """Recorded once and replayed, forward and backward, the kernels give the same bits."""
    module = Two(name, 64, "triton", FP32).to(DEVICE)
    x = torch.randn(6, module.connections[0].width, device=DEVICE)
    plain = values(module, x, x)
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    for key, value in values(graphed, x, x).items():
        assert torch.equal(value, plain[key]), key


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile itself
@pytest.mark.parametrize(("name", "compiler"), [("dhc2", "aot_eager_decomp_partition"), compiled_code("shc3")])
def test_recompute_compiled(backend, name, compiler):
    """In a compiled module too, where the streams between the sub-layers are not kept for backward."""
    module = Two(name, 33, backend, FP32).to(DEVICES[backend])
    x = torch.randn(5, module.connections[0].width, device=DEVICES[backend])
    plain = values(module, x, x)
    module.connections[0].records = module.connections[1].recompute = True
    module.compile(fullgraph=True, backend=compiler)
    for key, value in values(module, x, x).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-4)
    out = module(x.requires_grad_())
    kept = [tensor.untyped_storage() for tensor in out.grad_fn.saved_tensors]
    assert {storage.data_ptr() for storage in kept if storage.nbytes() == x.nbytes} <= {x.data_ptr()}


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("name", ["dhc2", "dfc2", "shc2"])
def test_empty(backend, name, shape):
    """No token: empty outputs, and gradients of zero."""
    module = Two(name, 8, backend, FP32).to(DEVICES[backend])
    x = torch.randn(*shape, module.connections[0].width, device=DEVICES[backend], requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["shc2", "dhc2", "dhc4", "sfc2", "dfc2", "dfc4"])
def test_at_init(backend, name, dtype):
    """Under bf16 autocast connections at init are the residual add bit for bit, on every stream."""
    torch.manual_seed(0)
    dtype = supported(backend, dtype)
    copies = int(name[-1]) if "hc" in name else 1
    branch = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24)).to(DEVICES[backend])
    residual = torch.randn(2, 3, 24, device=DEVICES[backend]).to(dtype)
    x = expand_streams(residual, copies)
    with torch.autocast(DEVICES[backend], BF16):
        first, second = (build_connection(name, 24, k, backend=backend, device=DEVICES[backend]) for k in range(2))
        view, carried = first.width_connection(x)
        view, carried = second.join(branch(view), carried)
        x = second.depth_connection(branch(view), carried)
        for _ in range(2):
            residual = residual + branch(residual)
        assert x.dtype == dtype
        assert torch.equal(x, expand_streams(residual, copies))


@pytest.mark.parametrize("name", ["dhc2", "dfc2", "shc2"])
def test_other_gradients(backend, name):
    """Coefficients, the streams between two sub-layers and other carried streams have their gradients too."""

    def run(form):
        module = Two(name, 12, form, FP32).to(DEVICES[backend])
        torch.manual_seed(3)
        first, second = module.connections
        x = torch.randn(5, first.width, device=DEVICES[backend], requires_grad=True)
        view, carried = first.width_connection(x)
        alpha, beta = first.weights(x)
        carried = first.carry(x * module.weight.repeat(first.width // 12), carried)
        view, carried = second.join(module.branch(view), carried)
        loss = (alpha.sin() ** 2).sum() + (beta**3).sum() + (carried[0].sin() * 2).sum() + (carried[2] ** 2).sum()
        loss = loss + (second.depth_connection(module.branch(view), carried) ** 2).sum()
        return loss, *torch.autograd.grad(loss, [x, *module.parameters()])

    for a, b in zip(run(backend), run("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [True, False])
def test_operators(backend, dynamic):
    """torch.library's own checks: schema, fake tensors, gradients registered, traced by AOT dispatch."""

    def random(*shape):
        return torch.randn(*shape, device=DEVICES[backend], requires_grad=True)

    moving = [random(8, 3), random(8, 1), random(1), random(1), random(8)] if dynamic else [None] * 5
    native_code = backend == "native"
    rule = (random(2, 3), random(2), *moving, True, False, True, native_code)
    carried = (random(3, 2, 8), random(3, 1, 8), random(3, 2, 3).detach(), random(3, 2))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    carried = (carried[0], carried[0].detach(), *carried[1:])
    cases = {"width": (random(3, 2, 8), *rule), "depth": (*carried, native_code), "join": (*carried, *rule)}
    for step, inputs in cases.items():
        torch.library.opcheck(getattr(kernels, step).operator, inputs, test_utils=tests)


@pytest.mark.parametrize("name", ["dhc2", "shc2", "dfc2"])
def test_watched(backend, name):
    """Who watches operators sees them; unwatched the same bits come without them."""
    module = Two(name, 12, backend, FP32).to(DEVICES[backend])
    x = torch.randn(5, module.connections[0].width, device=DEVICES[backend])
    plain = values(module, x, x)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(str(function._overloadpacket))
            return function(*args, **(kwargs or {}))

    with Watch():
        watched = values(module, x, x)
    steps = {
        f"hcvision.{step}{back}_{kernels.KEY}" for step in ("width", "depth", "join") for back in ("", "_backward")
    }
    assert seen >= steps
    for key, value in plain.items():
        assert torch.equal(watched[key], value), key
    with FakeTensorMode() as mode:
        assert Two(name, 12, "auto", FP32)(mode.from_tensor(x.cpu())).shape == x.shape


def test_key_of_the_sources(tmp_path):
    """It changes with what is in a file of Python or C, with its name and its place, and with nothing else."""
    (tmp_path / "kernels").mkdir()
    files = [tmp_path / "steps.py", tmp_path / "kernels" / "native.c"]
    for file in files:
        file.write_text("a")
    keys = [kernels.hash_sources(tmp_path)]
    (tmp_path / "notes.txt").write_text("b")
    assert kernels.hash_sources(tmp_path) == keys[0]
    for file in files:
        file.write_text("b")
        keys.append(kernels.hash_sources(tmp_path))
    files[1].rename(tmp_path / "native.c")
    keys.append(kernels.hash_sources(tmp_path))
    assert len(set(keys)) == 4
    assert re.fullmatch(r"[0-9a-f]{8}", kernels.KEY)


SECOND_RELEASE = """
import torch
from hcvision import build_connection
torch.manual_seed(0)
connection = build_connection("dhc2", 8, backend="native")
x = torch.randn(3, 16, requires_grad=True)
torch.compile(lambda x: connection(x, torch.tanh).sum())(x).backward()
print(x.grad.abs().sum().item())
"""


@pytest.mark.slow
def test_another_release_runs_its_own_backward(tmp_path):
    """What torch.compile keeps on disk is of one release: with another gradient in the source, that one runs."""
    shutil.copytree(Path(hcvision.__file__).parent, tmp_path / "hcvision", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def run():
        command = [sys.executable, "-c", SECOND_RELEASE]
        done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
        return float(done.stdout)

    first = run()
    source = tmp_path / "hcvision" / "connections" / "kernels" / "operators.py"
    old = "return grad, None, *_back_to_output(grad, output, beta, ctx.native_code), None"
    assert old in source.read_text()
    source.write_text(source.read_text().replace(old, old.replace("return grad", "return 2 * grad")))
    assert run() > 1.2 * first


def test_flops():
    """Counted by hand: 3 tokens of two sub-layers, n = 2 and E = 8, so that K = 4 and V + S = 3."""

    def count(name):
        module, x = Two(name, 8, "native", FP32), torch.randn(3, 16, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            out = module(x)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops() // (2 * 3 * 2 * 8), backward.get_total_flops() // (2 * 3 * 2 * 8)

    assert count("shc2") == (2 * (1 + 3), 2 * (2 * 3 + 2))
    assert count("dhc2") == (2 * (1 + 4 + 3), 2 * (2 * 3 + 3 * 4 + 2))


@pytest.mark.parametrize(("name", "compiler"), [("dhc2", "aot_eager"), compiled_code("dfc2"), ("shc2", "aot_eager")])
def test_compile(backend, name, compiler, monkeypatch):
    """torch.compile in one graph, forward and backward, with the operators in it: as many kernels run."""
    launched = []
    for step in ("forward", "backward"):
        run = getattr(native if backend == "native" else gpu, step)
        monkeypatch.setattr(
            native if backend == "native" else gpu, step, lambda *args, run=run: launched.append(run) or run(*args)
        )
    module = Two(name, 8, backend, FP32).to(DEVICES[backend])
    x = torch.randn(2, 3, module.connections[0].width, device=DEVICES[backend])
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, backend=compiler)
    ours, number = values(compiled, x, x.cos()), len(launched)
    theirs = values(module, x, x.cos())
    assert len(launched) == 2 * number > 0
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["dhc2", "dfc2"])
def test_compile_scaled_streams(backend, name):
    """Compiled, streams that a block scales itself are carried with the gradients that they have in eager mode."""
    connection = randomize(build_connection(name, 8, backend=backend), 0.5).to(DEVICES[backend])

    def run(x, scale):
        view, carried = connection.width_connection(x)
        return connection.depth_connection(view.sin(), connection.carry(x * scale, carried))

    def gradients(function):
        x = torch.arange(6.0 * connection.width, device=DEVICES[backend]).sin().view(6, -1).requires_grad_()
        scale = torch.linspace(0.5, 2, connection.width, device=DEVICES[backend]).requires_grad_()
        out = function(x, scale)
        return torch.autograd.grad(out.cos().sum(), [x, scale, *connection.parameters()])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend, reentrant):
    """Gradient checkpointing computes the same."""
    module = Two("dhc2", 8, backend, FP32).to(DEVICES[backend])
    x = torch.randn(5, 16, device=DEVICES[backend])
    plain = values(module, x, x)
    module.forward = lambda x, inner=module.forward: checkpoint(inner, x, use_reentrant=reentrant)
    x = x.requires_grad_()
    module(x).backward(x.detach())
    assert torch.equal(x.grad.double(), plain["x"])
    for key, parameter in module.named_parameters():
        assert torch.equal(parameter.grad.double(), plain[key]), key


def test_training(backend, tiny):
    """Twenty steps of a ViT: the loss is that of the PyTorch form, all the way."""

    def train(form):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", **{**tiny, "depth": 1, "patch_size": 16, "num_classes": 4})
        model = hcvision.convert(model, "dhc2", backend=form).to(DEVICES[backend])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)).to(DEVICES[backend])
        losses = []
        for _ in range(20):
            loss = nn.functional.cross_entropy(model(images), torch.arange(3, device=DEVICES[backend]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses), model

    (ours, model), (theirs, _) = train(backend), train("torch")
    assert theirs[-1] < theirs[0] / 4
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (model.blocks[0].connection2.dynamic_alpha_fn.abs() > 1e-3).any()


# backend


def test_backend():
    """Checkpoints do not know it; who asks for kernels is told why they cannot run."""
    for name in ("dhc2", "sfc2"):
        auto, *others = (build_connection(name, 8, backend=backend).state_dict() for backend in BACKENDS)
        assert all(state.keys() == auto.keys() for state in others)
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, native, got 'cuda'"):
        build_connection("dhc2", 8, backend="cuda")


@pytest.mark.parametrize("name", ["dhc2", "ghc2x3"])
def test_what_kernels_do_not_take(backend, name):
    """One line says it, with what works."""

    def run(dtype, name=name):
        connection = build_connection(name, 24, backend=backend, dtype=dtype, device=DEVICES[backend])
        connection(torch.randn(2, connection.width, dtype=dtype, device=DEVICES[backend]), torch.sin)

    if name == "ghc2x3":
        with pytest.raises(ValueError, match=f"backend='{backend}' has no kernels for ghc2x3; backend='auto' takes"):
            run(FP32)
        return
    taken = "float32" if backend == "native" else "float32, bfloat16 and float16"
    with pytest.raises(
        ValueError, match=rf"='{backend}' cannot run the kernels: they take {taken}, got float64; backend='auto' takes"
    ):
        run(torch.float64)
    with pytest.raises(ValueError, match="they take rates up to 8, got 9"):
        run(FP32, "dhc9")


@pytest.mark.parametrize("strict", [True, False])
def test_export(backend, strict):
    """An exported model holds operations that run anywhere."""
    module = Two("dhc2", 8, backend, FP32).to(DEVICES[backend])
    x = torch.randn(3, 16, device=DEVICES[backend])
    exported = torch.export.export(module, (x,), strict=strict)
    assert "hcvision" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_outputs_of_another_type(backend):
    """Under autocast autograd keeps the branch output as it is, and sees when somebody changes it in place."""
    connection = randomize(build_connection("dhc2", 8, backend=backend), 0.5).to(DEVICES[backend])
    x = torch.randn(5, 16, device=DEVICES[backend], requires_grad=True)
    view, carried = connection.width_connection(x)
    output, kept = view.bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.dtype) or tensor, lambda kept: kept
    ):
        connection.depth_connection(output, carried)
    assert BF16 in kept
    out = connection.depth_connection(output, carried)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("form", "make", "expected"),
    [
        ("auto", lambda: torch.randn(2, 16), True),
        ("auto", lambda: torch.randn(16, 2).T, False),  # the layout of x is kept, as an add keeps it
        ("auto", lambda: torch.randn(2, 16).double(), False),
        ("auto", lambda: torch.randn(2, 16).bfloat16(), False),
        ("native", lambda: torch.randn(16, 2).T, True),
        ("torch", lambda: torch.randn(2, 16), False),
    ],
)
def test_auto(form, make, expected, monkeypatch):
    """On a CPU auto takes the kernels in C where they can run, never those in Triton; torch takes none."""
    monkeypatch.setattr(gpu, "forward", lambda *_: pytest.fail("ran"))
    called, run = [], native.forward
    monkeypatch.setattr(native, "forward", lambda *args: called.append(1) or run(*args))
    x = make()
    randomize(build_connection("dhc2", 8, backend=form, dtype=x.dtype), 0.5)(x, torch.sin)
    assert bool(called) == expected


def test_without_triton(monkeypatch):
    monkeypatch.setattr(gpu, "triton", None)
    with pytest.raises(ValueError, match="this PyTorch comes without Triton"):
        build_connection("dhc2", 8, backend="triton")(torch.randn(2, 16), torch.sin)
    build_connection("dhc2", 8)(torch.randn(2, 16), torch.sin)


# second derivatives


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", ["dhc2", "dfc3", "shc3"])
def test_second_derivatives(backend, name, joined):
    """The gradient of a gradient, for streams and every parameter: as good as that of PyTorch's operations."""

    def run(form, dtype, seed):
        module = randomize(Two(name, 24, form, dtype, joined), 0.3, seed).to(DEVICES[backend])
        x = torch.randn(5, module.connections[0].width, generator=torch.Generator().manual_seed(seed))
        x = x.to(DEVICES[backend], dtype).requires_grad_()
        inputs = [x, *module.parameters()]
        first = torch.autograd.grad(module(x).sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.sin().sum() for grad in first), inputs)
        names = ["x", *dict(module.named_parameters())]
        return with_scales(dict(zip(names, (grad.double() for grad in second), strict=True)))

    seeds = range(2 * RUNS[backend] - 1)  # rounding errors of second derivatives vary more
    found = [[run(form, FP32, seed) for seed in seeds] for form in (backend, "torch")]
    exact = [run("torch", torch.float64, seed) for seed in seeds]
    for key in exact[0]:
        truth = [gradients[key] for gradients in exact]
        ours, theirs = (error([one[key] - t for one, t in zip(runs, truth, strict=True)], truth) for runs in found)
        assert ours <= 2 * theirs + SMALL[FP32], f"{key}: wrong by {ours:.1e} of it, PyTorch by {theirs:.1e}"


# torch.func, forward-mode differentiation, batches of gradients


def gradient_of_duals(module, x):
    """Forward-mode differentiation of a backward whose forward was nothing special: J^T t for a tangent t = cos(x)."""
    x = x.requires_grad_()
    out = module(x)
    with forward_ad.dual_level():
        (grad,) = torch.autograd.grad(out, x, forward_ad.make_dual(x.detach(), x.detach().cos()))
        return forward_ad.unpack_dual(grad).tangent


def gradients_of_parameters(module, x):
    """A row for each number that comes out, for each parameter: one backward for all of them."""
    out = module(x).flatten()
    eye = torch.eye(len(out), dtype=x.dtype, device=x.device)
    rows = torch.autograd.grad(out, list(module.parameters()), eye, is_grads_batched=True)
    return torch.cat([part.flatten(1) for part in rows], dim=1)


jacobian = torch.autograd.functional.jacobian
EXACT = {  # what a transform has to give, from one backward after the other
    "jacobian": jacobian,
    "gradients_of_parameters": lambda module, x: torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(y, list(module.parameters()), retain_graph=True)])
         for y in module(x).flatten()]
    ),
    "vjp": lambda module, x: torch.autograd.functional.vjp(module, x, x.cos())[1],
    "hessian": lambda module, x: torch.autograd.functional.hessian(lambda x: module(x).sin().sum(), x),
    "rows": lambda module, x: torch.stack([module(row) for row in x]),
}  # fmt: skip
TRANSFORMS = {
    "jacfwd": ("jacobian", lambda module, x: torch.func.jacfwd(module)(x)),
    "jacrev": ("jacobian", lambda module, x: torch.func.jacrev(module)(x)),
    "vectorized": ("jacobian", lambda module, x: jacobian(module, x, vectorize=True)),
    "forward mode": ("jacobian", lambda module, x: jacobian(module, x, vectorize=True, strategy="forward-mode")),
    "gradients of parameters": ("gradients_of_parameters", gradients_of_parameters),
    "gradient of duals": ("vjp", gradient_of_duals),
    "hessian": ("hessian", lambda module, x: torch.func.hessian(lambda x: module(x).sin().sum())(x)),
    "vmap": ("rows", lambda module, x: torch.func.vmap(module)(x)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", TRANSFORMS)
@pytest.mark.parametrize("name", ["dhc2", "dfc2", "shc2", "mhc2"])
def test_transforms(backend, name, way):
    """Who asks for kernels gets PyTorch's operations under them, and in a backward of such gradients."""
    exact, transformed = TRANSFORMS[way]
    errors = {}
    for form in ("torch", backend):
        module = randomize(Two(name, 4, "torch"), 0.5)
        x = torch.randn(2, module.connections[0].width, generator=torch.Generator().manual_seed(0))
        truth = EXACT[exact](module, x.double())
        single = Two(name, 4, form, FP32).to(DEVICES[backend])
        single.load_state_dict(module.state_dict())
        found = transformed(single, x.to(DEVICES[backend])).detach().cpu().double()
        errors[form] = ((found - truth).square().mean() / truth.square().mean()).sqrt().item()
    assert errors[backend] <= 2 * errors["torch"] + SMALL[FP32]


# the code for a CPU


@pytest.fixture
def new_cache(tmp_path, monkeypatch):
    """Nothing compiled yet, as on a machine that never saw hcvision."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    for function in (native.load, native.compiler):
        function.cache_clear()
    yield tmp_path / "a cache" / "hcvision"
    for function in (native.load, native.compiler):
        function.cache_clear()


def run_dhc2(backend="auto"):
    connection = randomize(build_connection("dhc2", 16, backend=backend), 0.5)
    return connection(torch.arange(96.0).view(3, 32).sin(), torch.sin)


def test_compiled_once(new_cache, monkeypatch):
    """A file for a kind of connection, made at the first call, taken from the cache by the next process."""
    expected = run_dhc2("torch")
    assert not new_cache.exists()
    torch.testing.assert_close(run_dhc2("native"), expected)
    (made,) = new_cache.iterdir()
    assert made.name.startswith("2x1-")
    native.load.cache_clear()
    monkeypatch.setattr(native.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert torch.equal(run_dhc2("native"), run_dhc2("auto"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", r"there is no C compiler \(gcc, cc, clang or the one that CC names\)"),
        ("no-such-compiler -O", "no-such-compiler failed: .*No such file or directory: 'no-such-compiler'"),
        ("false", "false failed: no message"),
    ],
)
@pytest.mark.usefixtures("new_cache")
def test_without_a_compiler(command, message, monkeypatch):
    """PyTorch does the work, and who insists is told why."""
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    monkeypatch.setenv("CC", command)
    with pytest.raises(ValueError, match=f"backend='native' cannot run the kernels: {message}; backend='auto' takes"):
        run_dhc2("native")
    assert torch.equal(run_dhc2("auto"), run_dhc2("torch"))


def have_no_home(cache, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user who is in no list


def have_a_file_there(cache, monkeypatch):
    cache.parent.write_text("a file")


def have_a_broken_library_there(cache, monkeypatch):
    run_dhc2("native")
    (made,) = cache.iterdir()
    other = cache.parent.with_name("another cache")
    (other / "hcvision").mkdir(parents=True)
    (other / "hcvision" / made.name).write_text("no library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    native.load.cache_clear()


CACHES = {
    have_no_home: "there is no home folder",
    have_a_file_there: "Not a directory: .*a cache",
    have_a_broken_library_there: r"2x1-.*\.so: file too short|2x1-.*\.so: invalid ELF header",
}


@pytest.mark.parametrize("have", CACHES)
def test_without_a_cache_kernels_run_all_the_same(new_cache, monkeypatch, tmp_path, have):
    """Nothing is left of them, and it is said; where there is no folder for temporary files either, PyTorch does it."""
    have(new_cache, monkeypatch)
    temporary = tmp_path / "temporary files"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.warns(
        UserWarning, match=f"kernels cannot be kept, and every process compiles its own: .*({CACHES[have]})"
    ):
        torch.testing.assert_close(run_dhc2("native"), run_dhc2("torch"))
    assert not list(temporary.iterdir())
    native.load.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"backend=.native. cannot run the kernels: .*No such file or directory"):
        run_dhc2("native")
    assert torch.equal(run_dhc2("auto"), run_dhc2("torch"))


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT", "AVX512"])
@pytest.mark.parametrize("name", ["dhc4", "dfc3", "dhc8"])
def test_other_cpus(capability, name, monkeypatch):
    """With shorter vectors, or none that PyTorch knows of, the values are right, as far as this CPU can run them."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if order.index(capability) > (order.index(here) if here in order else 0):
        pytest.skip(f"this CPU has {here}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    check("native", name, 96, (2, 3), FP32)


@pytest.mark.parametrize(("name", "dim", "tokens"), [("dhc2", 384, 21), ("dhc4", 640, 9), ("dfc2", 64, 37)])
@pytest.mark.usefixtures("poison")
def test_tiles(name, dim, tokens):
    """Wide streams go in smaller tiles than there are lanes; the last one is not full."""
    check("native", name, dim, (tokens,), FP32)


def test_threads_do_not_matter():
    """As many programs share the tokens, whoever runs them: the same bits."""
    module, x = Two("dhc2", 32, "native", FP32), torch.randn(70, 64)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(values(module, x, x))
    torch.set_num_threads(threads)
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


# the code for a GPU, which needs none to be made

BUILD = """
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hcvision.connections.kernels import triton as gpu

class Driver:  # of a GPU that is not there: kernels ask what it can
    def get_current_target(self):
        return GPUTarget("cuda", arch, 32)

found = []
triton.runtime.driver.set_active(Driver())
for kernel, S, V, E, dtype, arch in json.loads(sys.argv[1]):
    kernel = getattr(gpu, kernel)
    constants = {"S": S, "V": V, "E": E, "DEPTH": True, "WIDTH": True, "DYNAMIC": True, "NORM": True,
                 "CENTER": V == 1, "TANH": True, "HAS_GRAD_ALPHA": True}
    constants |= gpu.tile_sizes(S, V, E, 2 if dtype == "bf16" else 4)
    warps = constants.pop("num_warps")
    numbers = ("T", "tiles")
    tokens = ("streams", "output", "following", "views", "grad_views", "grad_carried", "grad_streams", "grad_output")
    names = kernel.arg_names
    constants = {name: constants[name] for name in names if name in constants}
    types = {name: "constexpr" if name in constants else "i32" if name in numbers
             else "*" + (dtype if name in tokens else "fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    wide = "ld.global.v4" in built.asm["ptx"] and "st.global.v4" in built.asm["ptx"]
    code = built.asm["ttgir"]
    found.append([int(re.search(r"STACK:(\\d+)", usage)[1]), wide, "barrier" in code, "i64" in code])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_code_for_a_gpu():
    """Both kernels compile for an A100 and an H100, keep what they hold in registers, and load 16 bytes at a time."""
    cases = [
        ("_forward_kernel", 4, 1, 768, "bf16", 90),
        ("_backward_kernel", 4, 1, 768, "bf16", 90),
        ("_backward_kernel", 2, 1, 384, "fp32", 80),
        ("_forward_kernel", 4, 4, 192, "bf16", 90),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", BUILD, json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    for case, (spilled, wide, waits, long) in zip(cases, json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert spilled == 0, f"{case} spills {spilled} bytes a thread"
        assert wide, f"{case} moves few bytes at a time"
        assert waits, f"{case}: what one warp wrote another one reads without waiting"
        assert long, f"{case}: offsets of more than 2^31 numbers do not fit"
