"""Several processes on one machine, over gloo: runs that go on with another number of them, and sharded weights."""

import csv
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import TINY, randomize
from timm.optim import create_optimizer_v2
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hcvision
from hcvision.training.checkpoints import read_checkpoint
from hcvision.training.connections import choose_backend
from hcvision.training.loading import load_module
from hcvision.training.sharding import shard
from hcvision_command import main

STRATEGIES = {
    "one": (),
    "ddp": ("--trainer.strategy=ddp",),
    "sharded": (
        "--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1", "--trainer.strategy.save_distributed_checkpoint=false",
        "--data.eval_batch_size=19",  # of 39 images: two batches for one process, one for the other
    ),
}  # fmt: skip

AVERAGED = ("--model.ema_decay=0.8", "--model.opt=sgd", "--model.lr=0.1")  # AdamW would enlarge what is rounding alone


def fit(run, strategy, epochs, *more):
    """Train with the same images per update, in this process or in two of their own."""
    number = 1 if strategy == "one" else 2
    arguments = [
        "fit", f"--run={run}", "--resume=auto", f"--data.batch_size={8 // number}", "--data.num_workers=0",
        "--model.model=vit_tiny_patch16_224", "--model.connection=dhc2", f"--model.model_args={TINY}",
        "--model.sched=constant", "--trainer.accelerator=cpu", f"--trainer.devices={number}",
        f"--trainer.max_epochs={epochs}", "--trainer.enable_progress_bar=false", *more,
    ]  # fmt: skip
    if number == 1:
        main(arguments)
        return
    processes.run_twice(*arguments, *STRATEGIES[strategy])


def losses(run):
    """Of the validations, by epoch."""
    rows = [row for path in run.glob("metrics*.csv") for row in csv.DictReader(path.read_text().splitlines())]
    return {int(row["epoch"]): float(row["val_loss"]) for row in rows if row["val_loss"]}


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """Losses of a run of one process that nothing stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(run, "one", 2, f"--data.root={image_folder}")
    return losses(run)


@pytest.mark.parametrize(("before", "after"), [("ddp", "one"), ("one", "sharded"), ("sharded", "one")])
def test_a_run_goes_on_with_other_processes(whole, image_folder, tmp_path, before, after):
    for strategy, epochs in ((before, 1), (after, 2)):
        fit(tmp_path / "run", strategy, epochs, f"--data.root={image_folder}")
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)
    assert len(whole) == 2


@pytest.fixture(scope="module")
def averaged(image_folder, tmp_path_factory):
    """Losses and the last checkpoint of a run of one process with averaged weights."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    fit(run, "one", 2, f"--data.root={image_folder}", *AVERAGED)
    return losses(run), read_checkpoint(run / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(("before", "after"), [("one", "sharded"), ("sharded", "one")])
def test_averaged_weights_in_parts(averaged, image_folder, tmp_path, before, after):
    """FSDP2 evaluates with the average, and keeps it, as one process does; each goes on with what the other wrote."""
    expected, last = averaged
    for strategy, epochs in ((before, 1), (after, 2)):
        fit(tmp_path / "run", strategy, epochs, f"--data.root={image_folder}", *AVERAGED)
    found = losses(tmp_path / "run")
    assert found == pytest.approx(expected, rel=1e-5)
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["averaging_state"] == last["averaging_state"] == {"n_averaged": 18}
    for name in ("state_dict", "current_model_state"):
        assert state[name].keys() == last[name].keys()
        for key, value in last[name].items():
            torch.testing.assert_close(
                state[name][key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
    moved = [(last["state_dict"][key] - value).abs().max() for key, value in last["current_model_state"].items()]
    assert max(moved) > 1e-3  # the two are not the same
    module, _ = load_module(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert torch.equal(module.model.norm.weight, state["state_dict"]["model.norm.weight"])


@pytest.mark.parametrize(
    ("tensor", "several_files", "message"),
    [
        (2, False, "data_parallel_size must be 4 and tensor_parallel_size 1, got 2 and 2"),
        (1, True, "save_distributed_checkpoint must be false"),
    ],
)
def test_what_does_not_work_with_sharded_weights(tensor, several_files, message):
    sizes = {"data_parallel": 2, "tensor_parallel": tensor}
    module = SimpleNamespace(
        device_mesh={name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()},
        trainer=SimpleNamespace(strategy=SimpleNamespace(_save_distributed_checkpoint=several_files)),
    )
    with pytest.raises(ValueError, match=message):
        shard(module, nn.Identity())


def build(connection):
    """The same model every time, in float64: what AdamW makes of gradients that are zero but for rounding is large."""
    torch.manual_seed(0)
    model = hcvision.create_model("vit_tiny_patch16_224", connection=connection, num_classes=5, **TINY)
    return randomize(model.double())


def train(model, rank=0, world=1):
    """Losses, norms of the gradient and weights of 5 updates with 8 images."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    generator, history = torch.Generator().manual_seed(1), []
    for _ in range(5):
        images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
        targets = torch.randint(5, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[rank::world]), targets[rank::world])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.detach(), whole_tensor(norm)))
    return history, {name: whole_tensor(parameter.detach()) for name, parameter in model.named_parameters()}


def whole_tensor(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_sharded(rank, connection, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model, mesh = build(connection), init_device_mesh("cpu", (2,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    torch.save(train(model, rank, 2), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*returned a view tensor")  # nothing is changed in place
@pytest.mark.parametrize(
    "connection",
    [
        "dhc2",
        "dfc2",
        "shc2",
        "mhc2",
        "ihc2",
        "ghc2x3",
        "sihc2",
        "gr2",
        "oru",
        "laurel",
        "mhclite2",
        "krom2",
        "dense",
        "attnres",
    ],
)
def test_sharded_weights_learn_what_whole_ones_learn(connection, tmp_path):
    """FSDP2: a block's weights are there in whole only while it is computed, our own backward passes included."""
    processes.wait_for_all(processes.Started(train_sharded, rank, connection, tmp_path) for rank in range(2))
    history, weights = train(build(connection))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for step, (loss, norm) in enumerate(history):
        torch.testing.assert_close(sum(part[0][step][0] for part in parts) / 2, loss, rtol=0, atol=1e-12)
        for part in parts:
            torch.testing.assert_close(part[0][step][1], norm, rtol=0, atol=1e-12)
    for part in parts:
        for name, weight in weights.items():
            torch.testing.assert_close(part[1][name], weight, rtol=0, atol=1e-9)


def build_small(connection, backend):
    torch.manual_seed(0)
    sizes = {**TINY, "img_size": 16, "depth": 1}
    model = randomize(hcvision.create_model("vit_tiny_patch16_224", connection=connection, num_classes=5, **sizes))
    choose_backend(model, backend)
    return model


def gradients(model, net, rank=0, world=1):
    """Of the mean over 4 images."""
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(5, (4,), generator=generator)
    nn.functional.cross_entropy(net(images[rank::world]), targets[rank::world]).backward()
    return {name: whole_tensor(parameter.grad) for name, parameter in model.named_parameters()}


def learn_with_kernels(rank, connection, strategy, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model = net = build_small(connection, "auto" if connection.startswith("ghc") else "triton")
    if strategy == "ddp":
        net = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    torch.save(gradients(model, net, rank, 2), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*returned a view tensor")
@pytest.mark.parametrize(
    ("connection", "strategy"), [("dhc2", "ddp"), ("mhc2", "ddp"), ("ghc2x3", "ddp"), ("dfc2", "sharded")]
)
def test_kernels_in_two_processes(connection, strategy, tmp_path):
    """The kernels, in Triton's interpreter, under DDP and FSDP2: the gradients of one process without them."""
    processes.wait_for_all(
        processes.Started(learn_with_kernels, rank, connection, strategy, tmp_path) for rank in range(2)
    )
    model = build_small(connection, "torch")
    expected = gradients(model, model)
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            assert expected[name].abs().max() > 0 or name.endswith("_res")
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
