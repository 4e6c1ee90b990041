"""set_stream_dtype: streams that are stored in bfloat16, mixed in float32 and rounded once, in every kind of model."""

import copy

import pytest
import timm
import torch
from conftest import TINY, randomize

import hcvision
from hcvision.connections.names import build_connection
from hcvision.models.conversion import convert, set_stream_dtype
from hcvision.studies.insight.unfolding import unfolded_matrix, watch

BF16 = torch.bfloat16
KINDS = ("shc2", "dhc2", "dhc4", "dfc2", "mhc2", "ihc4", "ghc2x3", "sihc4", "gr2", "oru", "laurel", "mhclite3", "krom2")


def random_connection(name, dim=12):
    connection = randomize(build_connection(name, dim))
    connection.stream_dtype = BF16
    return connection


@pytest.mark.parametrize("name", KINDS)
def test_a_sublayer_by_hand(name):
    """In float64: streams rounded on entry, the view and the next streams once more each, coefficients not at all."""
    connection = random_connection(name)
    x = torch.randn(3, 5, connection.width)
    entered = x.to(BF16)
    seen = []

    def branch(view):
        seen.append(view)
        return torch.tanh(view)

    following = connection(x, branch)
    exact = copy.deepcopy(connection).double()
    exact.stream_dtype = None
    view, carried = exact.width_connection(entered.double())
    expected = exact.depth_connection(torch.tanh(seen[0].double()), carried)
    assert seen[0].dtype == torch.float32
    assert following.dtype == BF16
    for ours, theirs in ((seen[0], view), (following, expected)):
        rounded = theirs.detach().float().to(BF16).float()
        # float32 may fall on the other side of half a step, for few numbers, and then by one step
        assert (ours.float() != rounded).float().mean() < 0.01
        torch.testing.assert_close(ours.float(), rounded, rtol=2**-7, atol=1e-6)
    if name == "oru":  # whose weights depend on the branch output
        return
    weights = connection.weights(x)
    assert {part.dtype for part in weights} == {torch.float32}
    for ours, theirs in zip(weights, exact.weights(entered.double()), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_gradients(name):
    """Those of a connection in float32 at the same x, but for the roundings: of one number at worst a quarter."""
    connection = random_connection(name)

    def gradients(dtype):
        connection.stream_dtype = dtype
        x = torch.randn(3, 5, connection.width, generator=torch.Generator().manual_seed(0)).to(BF16).float()
        x.requires_grad_()
        following = connection(x, torch.tanh)
        weights = torch.randn(following.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
        return torch.autograd.grad((following.float() * weights).sum(), [x, *connection.parameters()])

    ours, theirs = gradients(BF16), gradients(None)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2**-2 * b.norm()
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (ours, theirs))
    assert (a - b).norm() <= 2**-6 * b.norm()


def twin(name, connection, arguments, **options):
    torch.manual_seed(0)
    return convert(timm.create_model(name, **arguments), connection, **options)


SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
MODELS = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "eva": ("eva02_tiny_patch14_224", {**TINY, "pretrained": False}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


@pytest.mark.parametrize("connection", ["dhc2", "dfc2", "mhc2", "ghc2x3"])
@pytest.mark.parametrize("family", MODELS)
def test_models(family, connection):
    """Between blocks that go on streams are bfloat16; what is behind them, and the output, is of the model's type."""
    name, arguments = MODELS[family]
    model = randomize(twin(name, connection, arguments), std=0.05)
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    set_stream_dtype(model, torch.float32)
    assert torch.equal(model(x), before)
    set_stream_dtype(model, "bfloat16")
    seen, blocks = [], [module for module in model.modules() if hasattr(module, "restores_dtype")]
    for block in blocks:
        block.register_forward_hook(lambda block, _, out: seen.append((block.restores_dtype, out.dtype)))
    after = model(x)
    assert after.dtype == torch.float32
    assert set(seen) == {(False, BF16), (True, torch.float32)}
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max().clamp(min=1)
    set_stream_dtype(model, None)
    assert torch.equal(model(x), before)


def test_some_blocks():
    """Blocks without connections get what they always got."""
    model = twin("vit_tiny_patch16_224", "dfc2", {**TINY, "depth": 4}, blocks=[1, 2], stream_dtype="bfloat16")
    dtypes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, out: dtypes.append((inputs[0].dtype, out.dtype)))
    model(torch.randn(1, 3, 32, 32))
    fp32 = torch.float32
    assert dtypes == [(fp32, fp32), (fp32, BF16), (BF16, fp32), (fp32, fp32)]


@pytest.mark.parametrize("connection", ["dhc2", "dfc2", "ihc4"])
def test_ways(connection):
    """TorchScript, recomputation, autocast and a copy: the same streams."""
    model = randomize(twin("vit_tiny_patch16_224", connection, TINY, stream_dtype=BF16), std=0.05)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    hcvision.recompute_streams(model, 1)
    again = model(x)
    assert torch.equal(again, expected)
    again.sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.jit.script(model.eval())(x), expected, rtol=1e-2, atol=1e-3)
    dtypes = []
    model.blocks[0].register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert dtypes == [BF16]


@pytest.mark.parametrize("connection", ["dhc2", "dfc2"])
def test_a_model_is_looked_into(connection):
    """Who reads whom, and the streams, as they are stored."""
    model = randomize(twin("vit_tiny_patch16_224", connection, TINY), std=0.05)
    x, seen = torch.randn(2, 3, 32, 32), []
    before = unfolded_matrix(model, x)
    set_stream_dtype(model, BF16)
    torch.testing.assert_close(unfolded_matrix(model, x), before, rtol=0.02, atol=0.02)
    with watch(model.blocks, seen.append):
        model(x)
    assert {(passage.streams.dtype, passage.after.dtype) for passage in seen} == {(BF16, BF16)}


def test_saved_bytes():
    """Half of what float32 streams take is kept for backward, in each sub-layer."""

    def saved(dtype):
        connection = build_connection("dhc4", 64, backend="torch")
        connection.stream_dtype = dtype
        x = torch.randn(8, 16, 256).to(dtype).requires_grad_()
        sizes = {}

        def pack(tensor):
            if tensor.dim() == 4 and tensor.shape[-2:] == (4, 64):  # (B, N, S, E)
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            connection(x, torch.tanh)
        return sum(sizes.values())

    assert saved(torch.float32) == 2 * saved(BF16) == 8 * 16 * 256 * 4


def test_wrong_types():
    with pytest.raises(ValueError, match=r"stream_dtype must be one of bfloat16, float16, float32, got torch\.float64"):
        convert(timm.create_model("vit_tiny_patch16_224", **TINY), "dhc2", stream_dtype=torch.float64)
    with pytest.raises(ValueError, match="connections that carry streams, not this VisionTransformer"):
        set_stream_dtype(timm.create_model("vit_tiny_patch16_224", **TINY), "bfloat16")
