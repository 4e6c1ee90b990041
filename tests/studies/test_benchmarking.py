import csv
import statistics
import weakref

import pytest
import torch

from hcvision.studies import benchmarking as module
from hcvision.studies import measuring
from hcvision.studies.benchmarking import Setup, benchmark, describe_step, find_twins, table
from hcvision.studies.measuring import (
    OperationCount,
    TensorMemory,
    inference_step,
    interleaved_times,
    measure,
    peak_memory,
    quartiles,
    ratios,
    training_step,
)
from hcvision.training.classification import ImageClassifier
from hcvision.training.generation import ImageGenerator

VIT = "vit_tiny_patch16_224"
CUT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}  # a small ViT, without its img_size
DIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def fake_times(monkeypatch):
    """Four rounds: 10, 20, 40 and 30 ms for the first, 1.5 times that for the second, 1 to 4 times for the third."""
    first = [0.01, 0.02, 0.04, 0.03]
    factors = [(1, 1, 1, 1), (1.5, 1.5, 1.5, 1.5), (1, 2, 3, 4)]

    def interleaved_times(steps, rounds, device, tick):
        for step in steps.values():
            step()
        return {name: [a * b for a, b in zip(first, factors[k], strict=True)] for k, name in enumerate(steps)}

    monkeypatch.setattr(measuring, "interleaved_times", interleaved_times)


def small(*models, say=lambda _: None, **kwargs):
    arguments = {"batch_size": 2, "img_size": 32, "num_classes": 5, "model_args": CUT, "device": "cpu", "rounds": 1}
    return benchmark(list(models), **{**arguments, **kwargs}, say=say)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ratios_are_of_the_same_round(clock):
    """Where everything slows down all the time, a step has the ratio 1 to itself and 1.5 to one two thirds as long."""
    speed = [1.0]

    def step(cost):
        def run():
            clock[0] += cost * speed[0]
            speed[0] *= 1.01

        return run

    times = interleaved_times({"residual": step(1.0), "again": step(1.0), "dhc2": step(1.5)}, 20, "cpu")
    assert times["residual"][-1] > 1.5 * times["residual"][0]
    assert ratios(times["residual"], times["residual"]) == [1.0] * 20
    assert statistics.median(ratios(times["again"], times["residual"])) == pytest.approx(1.0, rel=0.02)
    assert statistics.median(ratios(times["dhc2"], times["residual"])) == pytest.approx(1.5, rel=0.02)


def test_steps_take_turns_in_an_order_that_changes(clock):
    """Two rounds warm up and do not count; a tick follows every step."""
    order, ticks = [], []

    def step(name):
        def run():
            order.append(name)
            clock[0] += 100.0 if len(order) <= 6 else ord(name)

        return run

    times = interleaved_times({name: step(name) for name in "abc"}, 3, "cpu", lambda: ticks.append(len(order)))
    assert "".join(order) == "cba" + "abc" + "cba" + "abc" + "cba"
    assert ticks == list(range(1, 16))
    assert times == {name: [ord(name)] * 3 for name in "abc"}


def test_quartiles():
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.5]) == (1.5, 1.5, 1.5)


def test_units():
    assert describe_step([0.1, 0.3, 0.2], 2_500_000, 4) == {
        "samples_per_sec": 20.0,
        "step_time": 200.0,
        "peak_memory_mb": 2.5,
    }


def test_memory_counts_storages_once_and_while_they_live():
    with TensorMemory() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1  # and 4000 more; the view is free
        del b
        c = torch.zeros(500)
        del c
    assert memory.peak == 8000
    assert memory.now == 4000


def test_memory_of_a_known_step():
    """x of 100 floats, its double and the sum of both: 1200 bytes at the most, of which x was there before."""
    x = torch.ones(100)

    def step():
        y = 2 * x
        z = x + y
        del y
        z += 1
        torch.ones(100)

    assert peak_memory(step, "cpu") == 1200


def test_memory_on_a_gpu_is_the_models_own(monkeypatch):
    """Neither the models built before nor what libraries allocate once and for all belong to a model."""
    now, peak, opened, found = [1000], [0], [], []

    def allocate(number):
        now[0] += number
        peak[0] = max(peak[0], now[0])

    class Step:
        def __init__(self, name):
            self.itself = self  # as Lightning's modules do
            found.append(now[0])
            allocate(100 if name == "a" else 200)
            weakref.finalize(self, allocate, -100 if name == "a" else -200)

        def __call__(self):
            if not opened:  # a workspace
                opened.append(allocate(30))
            allocate(50)
            allocate(-50)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: now[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.__setitem__(0, now[0]))
    synchronized = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    times, peaks = measure(["a", "b"], Step, 3, "cuda:1")
    assert peaks == {"a": 150, "b": 250}
    assert found == [1000, 1030, 1130]
    assert list(map(len, times.values())) == [3, 3]
    assert synchronized == ["cuda:1"] * 10


def test_measure_on_a_cpu_builds_each_once():
    built, steps = [], []

    def build(name):
        built.append(name)
        return lambda: steps.append(torch.zeros(10 * len(name)).sum().item())

    times, peaks = measure(["a", "bb"], build, 4, "cpu")
    assert built == ["a", "bb"]
    assert peaks == {"a": 44, "bb": 84}
    assert len(steps) == 2 * (2 + 2 + 4)
    assert all(len(of) == 4 and min(of) > 0 for of in times.values())


def test_operations_of_a_known_model():
    """timm's published activations; multiply-adds by hand: patches, qkv, attention twice, projection, MLP, head."""
    setup = {"modes": ["infer"], "rounds": 1, "batch_size": 8, "img_size": None, "num_classes": 1000, "model_args": {}}
    setup |= {"device": "cpu", "precision": "32", "compile": False, "grad_checkpointing": False, "opt": "adamw"}
    facts = Setup(**setup).look(VIT, None)
    n, d = 197, 192
    block = n * d * 3 * d + 2 * n * n * d + n * d * d + 2 * n * d * 4 * d
    assert facts["infer_gmacs"] == round((196 * 768 * d + 12 * block + d * 1000) / 1e9, 2)
    assert (facts["infer_macts"], facts["param_count"]) == (5.97, 5.72)
    with OperationCount() as count, torch.no_grad():
        torch.nn.Linear(7, 5)(torch.zeros(2, 3, 7)).exp()
    assert (count.macs, count.activations) == (2 * 3 * 7 * 5, 2 * 3 * 5)


@pytest.mark.parametrize(
    ("precision", "parameters", "inside"),
    [
        ("32", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("something of Lightning's", torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("name", [VIT, "dit_tiny_patch4_pixel"])
def test_precision(name, precision, parameters, inside, tiny, tiny_dit):
    """Of the parameters, and of what a matmul in the middle of the model computes, in both steps."""
    kind, args = (ImageGenerator, tiny_dit) if name.startswith("dit") else (ImageClassifier, tiny)
    image = torch.randn(2, *kind(name, model_args=args).data_config["input_size"])
    steps = [training_step] if precision not in measuring.PRECISIONS else [training_step, inference_step]
    for make in steps:
        model = kind(name, model_args=args)
        seen = []
        model.model.blocks[0].attn.qkv.register_forward_hook(lambda m, _, y, seen=seen: seen.append((m, y)))
        make(model, (image, torch.tensor([1, 2])), precision)()
        ((qkv, y),) = seen
        assert {p.dtype for p in model.model.parameters()} == {parameters}
        assert y.dtype == inside
        training = make is training_step
        assert (qkv.training, y.requires_grad) == (training, training)


def test_a_diffusion_model_is_asked_with_time_and_class(tiny_dit):
    generator = ImageGenerator("dit_tiny_patch4_pixel", model_args=tiny_dit)
    generator.diffusion.draw_time = lambda number, device: torch.tensor([7.0, 8.0])
    seen = []
    generator.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    images, classes = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    inference_step(generator, (images, classes), "32")()
    assert all(map(torch.equal, seen, (images, torch.tensor([7.0, 8.0]), classes)))
    assert len(seen) == 3


def test_a_training_step_is_forward_backward_adamw(tiny):
    """Bit for bit the plain loop, gradients of one step only."""
    batch = (torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    ours, plain = (ImageClassifier(VIT, connection="dhc2", num_classes=5, model_args=tiny) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    step = training_step(ours, batch, "32")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    for _ in range(2):
        step()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(batch[0]), batch[1]).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


def test_twins():
    """Models of one twin are together, whatever their rate; --connection is for those that have none."""
    found = find_twins([f"{VIT}_dhc2", "resnet18", f"{VIT}_dfc3", VIT, f"{VIT}_dhc2", "dit_s_patch8_256_shc5"])
    assert found == {
        VIT: {VIT: None, f"{VIT}_dhc2": "dhc2", f"{VIT}_dfc3": "dfc3"},
        "resnet18": {"resnet18": None},
        "dit_s_patch8_256": {"dit_s_patch8_256": None, "dit_s_patch8_256_shc5": "shc5"},
    }
    assert find_twins(["convnext_atto"], "dhc3") == {
        "convnext_atto": {"convnext_atto": None, "convnext_atto_dhc3": "dhc3"}
    }
    assert find_twins([VIT], "residual") == {VIT: {VIT: None}}


def test_rows_table_and_file(fake_times, tmp_path):
    """The columns of timm's benchmark.py, then ours; what is printed and what is written is what was measured."""
    out, said = tmp_path / "new" / "results.csv", []
    rows = small(f"{VIT}_dhc2", f"{VIT}_dfc4", rounds=4, out=str(out), say=said.append)
    compared = [f"{{}}_{name}" for name in ("ratio", "ratio_q1", "ratio_q3", "peak_memory_mb", "memory_ratio")]
    columns = [
        "model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs",
        "infer_macts", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count",
        *(name.format(mode) for mode in ("infer", "train") for name in compared),
        "twin", "device", "precision", "torch",
    ]  # fmt: skip
    assert [list(row) for row in rows] == [columns] * 3
    assert [row["model"] for row in rows] == [VIT, f"{VIT}_dhc2", f"{VIT}_dfc4"]
    assert [row["twin"] for row in rows] == [None, VIT, VIT]
    residual, dhc2, _ = rows
    for mode in ("infer", "train"):
        assert [row[f"{mode}_step_time"] for row in rows] == [25.0, 37.5, 80.0]
        assert [row[f"{mode}_samples_per_sec"] for row in rows] == [80.0, 53.33, 25.0]
        assert [row[f"{mode}_ratio_q1"] for row in rows] == [None, 1.5, 1.75]
        assert [row[f"{mode}_ratio"] for row in rows] == [None, 1.5, 2.5]
        assert [row[f"{mode}_ratio_q3"] for row in rows] == [None, 1.5, 3.25]
        assert {(row[f"{mode}_batch_size"], row[f"{mode}_img_size"]) for row in rows} == {(2, 32)}
        assert residual[f"{mode}_memory_ratio"] is None
    assert 1 < dhc2["infer_memory_ratio"] < 2
    assert dhc2["train_memory_ratio"] > 1
    assert residual["train_peak_memory_mb"] > residual["infer_peak_memory_mb"] > 0

    assert read(out) == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    conditions, inference, training = said
    assert "CPU" in conditions.splitlines()[0]
    assert f"torch {torch.__version__}" in conditions
    assert "eager, precision 32, batches of 2, adamw, median of 4 rounds" in conditions
    assert "read the ratios" in conditions.splitlines()[1]
    lines = inference.splitlines()[1:]
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["inference", "images/s", "ms", "time (quartiles)", "memory, MB", "memory"]
    assert cells[2] == [VIT, "80.0", "25.0", "", f"{residual['infer_peak_memory_mb']:.1f}", ""]
    assert cells[3][:4] == [f"{VIT}_dhc2", "53.3", "37.5", "1.50 x (1.50 - 1.50)"]
    assert cells[4][3] == "2.50 x (1.75 - 3.25)"
    assert cells[3][5] == f"{dhc2['infer_memory_ratio']:.2f} x"
    assert training.splitlines()[1].startswith("| training ")


def test_quartiles_are_shown():
    values = {"samples_per_sec": 1234.56, "step_time": 7.26, "ratio": 1.234, "ratio_q1": 1.1, "ratio_q3": 1.4}
    values |= {"peak_memory_mb": 2000.0, "memory_ratio": 1.5}
    (line,) = table([{"model": "m", **{f"train_{name}": value for name, value in values.items()}}], "train")[2:]
    assert line == "| m        | 1,234.6  | 7.3 | 1.23 x (1.10 - 1.40) | 2,000.0    | 1.50 x |"


def test_connections_and_their_options(fake_times):
    """An unregistered rate, in one block: E(n+2) + n(n+2) + 2 parameters per sub-layer. The trunk is the twin's."""
    built = {}
    build = module.Setup.build

    def remember(self, base, connection, training):
        built[connection] = build(self, base, connection, training)
        return built[connection]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Setup, "build", remember)
        rows = small(VIT, connection="dhc3", model_args={**CUT, "connection_blocks": "1:"}, train=False)
    assert [row["model"] for row in rows] == [VIT, f"{VIT}_dhc3"]
    twin, model = (built[kind].model for kind in (None, "dhc3"))
    trunk = {name: value for name, value in model.state_dict().items() if "connection" not in name}
    assert trunk.keys() == twin.state_dict().keys()
    assert all(torch.equal(trunk[name], value) for name, value in twin.state_dict().items())
    extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in twin.parameters())
    assert extra == 2 * (48 * 5 + 3 * 5 + 2)
    assert model.patch_embed.img_size == twin.patch_embed.img_size == (32, 32)


def test_models_that_take_any_size_and_models_of_noise():
    """Measured for real: a residual model alone has no ratio; a DiT gets times and classes beside its images."""
    (resnet,) = small("resnet10t", model_args={}, train=False)
    assert "train_step_time" not in resnet
    assert (resnet["infer_img_size"], resnet["infer_ratio"], resnet["twin"]) == (32, None, None)
    dit, dhc2 = small("dit_tiny_patch4_pixel_dhc2", img_size=16, model_args=DIT, grad_checkpointing=True)
    assert dhc2["twin"] == dit["model"] == "dit_tiny_patch4_pixel"
    for mode in ("infer", "train"):
        assert dhc2[f"{mode}_img_size"] == 16
        assert dhc2[f"{mode}_ratio_q1"] == dhc2[f"{mode}_ratio"] > 0
        assert dhc2[f"{mode}_samples_per_sec"] == pytest.approx(2e3 / dhc2[f"{mode}_step_time"], rel=0.01)


def test_gradient_checkpointing_is_for_training(fake_times, monkeypatch):
    """It needs less memory, of a model that keeps much for backward, and inference goes without."""
    asked = []

    def remember(*args, **kwargs):
        asked.append(kwargs["grad_checkpointing"])
        return ImageClassifier(*args, **kwargs)

    monkeypatch.setattr(module, "ImageClassifier", remember)
    plain, saving = (small(VIT, batch_size=32, img_size=64, grad_checkpointing=on)[0] for on in (False, True))
    assert saving["train_peak_memory_mb"] < 0.8 * plain["train_peak_memory_mb"]
    assert asked == [False] * 3 + [True, False, True]  # a look at the model, inference, training


def test_compiled_models(fake_times, monkeypatch):
    """Each is compiled for itself; on a CPU its memory is not known, since it is counted in eager mode."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compiled.append(kwargs))
    said = []
    rows = small(f"{VIT}_dhc2", compile=True, say=said.append)
    assert compiled == [{"dynamic": False}] * 4
    assert "compiled, precision 32" in said[0]
    names = [f"{mode}_{name}" for mode in ("infer", "train") for name in ("peak_memory_mb", "memory_ratio")]
    assert {row[name] for row in rows for name in names} == {None}
    assert [row["train_ratio"] for row in rows] == [None, 1.5]
    assert said[2].splitlines()[-1].endswith("| 1.50 x (1.50 - 1.50) |            |        |")


def test_what_fits_is_kept(fake_times, monkeypatch, tmp_path):
    """Where the second group does not fit, the first is printed and in the file; another RuntimeError stays one."""
    out, said, real = tmp_path / "results.csv", [], module.measure
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]

    def run_out(names, *args):
        if names[0] == VIT:
            return real(names, *args)
        raise errors[0]

    monkeypatch.setattr(module, "measure", run_out)
    for _ in range(2):
        with pytest.raises(MemoryError, match=r"memory on cpu for inference of vit_small_patch16_224, .*_dfc2 side by"):
            small(f"{VIT}_dhc2", "vit_small_patch16_224_dfc2", out=str(out), overwrite=True, say=said.append)
        assert [row["model"] for row in read(out)] == [VIT, f"{VIT}_dhc2"]
        assert [f"{VIT}_dhc2" in text for text in said] == [False, True, True]
        said.clear()
        errors.pop(0)
    errors.append(RuntimeError("a kernel is wrong"))
    with pytest.raises(RuntimeError, match="a kernel is wrong"):
        small("vit_small_patch16_224", infer=False)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("models", "arguments", "message"),
    [
        ([], {}, "models must be one or more names, got none"),
        (
            [VIT, "vit_tinny_patch16_224"],
            {},
            "unknown model 'vit_tinny_patch16_224'; did you mean vit_tiny_patch16_224",
        ),
        ([f"{VIT}_dhc0"], {}, f"unknown model '{VIT}_dhc0'; did you mean {VIT}_"),
        (["vit_tiny_patch16_223_dhc2"], {}, "unknown model 'vit_tiny_patch16_223_dhc2'; did you mean"),
        ([f"{VIT}.augreg_in21k"], {}, f"names weights, and none are loaded to measure it; give {VIT}"),
        ([f"{VIT}_dhc2"], {"connection": "dfc2"}, f"{VIT}_dhc2 has a connection already; give {VIT}, or no --conn"),
        ([VIT], {"connection": "dhc"}, "connection must be 'residual', "),
        ([VIT, "resnet18"], {"connection": "dhc2", "model_args": {}}, "cannot convert a ResNet"),
        ([f"{VIT}_dfc5"], {}, "dim must be divisible by the frac rate, got dim=48 and rate=5"),
        ([VIT], {"model_args": {"dept": 2}}, "vit_tiny_patch16_224 does not take these model_args: .*'dept'"),
        (["convnext_atto"], {"img_size": 8, "model_args": {}}, "atto does not take images of 3 x 8 x 8: .* input size"),
        ([VIT], {"model_args": {"img_size": 64}}, r"give img_size or model_args.img_size, got both \(32 and 64\)"),
        ([VIT], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([VIT], {"rounds": 0}, "rounds must be at least 1, got 0"),
        ([VIT], {"img_size": -1}, "img_size must be at least 1, got -1"),
        ([VIT], {"opt": "adamx"}, "unknown opt 'adamx'; did you mean"),
        ([VIT], {"precision": "bf16"}, "unknown precision 'bf16'; did you mean bf16-"),
        ([VIT], {"device": "cuda:99"}, "device must be one that works here, such as auto, cpu.*, got 'cuda:99'"),
        ([VIT], {"device": "gpu"}, "device must be one that works here, such as auto, cpu.*, got 'gpu'"),
        ([VIT], {"infer": False, "train": False}, "nothing to measure: infer and train are both false"),
        ([VIT], {"out": "."}, r"\. exists; --overwrite true writes over a file, --out names another one"),
        ([VIT], {"out": ".", "overwrite": True}, r"\. exists; --overwrite true writes over a file"),
        ([VIT], {"out": __file__}, "test_benchmarking.py exists; --overwrite true writes"),
    ],
)
def test_wrong_arguments(models, arguments, message, monkeypatch):
    """One line, before anything is measured."""
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message) as error:
        small(*models, **arguments)
    assert "\n" not in str(error.value)


def test_a_file_is_written_over_only_when_asked(fake_times, tmp_path):
    out = tmp_path / "results.csv"
    out.write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        small(VIT, out=str(out))
    assert out.read_text() == "precious"
    small(VIT, out=str(out), overwrite=True, infer=False)
    (row,) = read(out)
    assert row["model"] == VIT
    assert not any(name.startswith("infer") for name in row)
