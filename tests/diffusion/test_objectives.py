"""hcvision.diffusion: the published schedule, losses against a transcription, samplers against diffusers and theory."""

import itertools
import math

import diffusers
import pytest
import torch

from hcvision.diffusion.objectives import DDPM, ImagePath, LinearPath, discrete_log_likelihood, guide


def last(images):
    *_, image = images
    return image


class Linear(torch.nn.Module):
    """A model that is no network: fixed random maps of x, t and y to 2 C channels, or to C."""

    def __init__(self, channels=3, out=6, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(out, channels, generator=generator, dtype=torch.float64) / 2)
        self.rows = torch.randn(11, out, generator=generator, dtype=torch.float64) / 4

    def forward(self, x, t, y=None):
        out = torch.einsum("oc,bchw->bohw", self.weight, x) + t.view(-1, 1, 1, 1) / 1000
        return torch.tanh(out if y is None else out + self.rows[y][:, :, None, None])


def batch(count=5, channels=3):
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(count, channels, 4, 4, generator=generator, dtype=torch.float64) * 256).floor() / 255 * 2 - 1
    return x.clamp(-1, 1), torch.arange(count), torch.randn(x.shape, generator=generator, dtype=torch.float64)


# DDPM


def transcription(model, x, t, y, noise):
    """The hybrid loss of arXiv 2102.09672, image by image, from its equations."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    losses = []
    for i in range(len(x)):
        k, x0, e = int(t[i]), x[i], noise[i]
        before = kept[k - 1] if k else torch.tensor(1.0, dtype=torch.float64)
        x_t = kept[k].sqrt() * x0 + (1 - kept[k]).sqrt() * e
        out = model(x_t[None], t[i : i + 1], y[i : i + 1])[0]
        eps, v = out[:3], (out[3:] + 1) / 2
        simple = (eps - e).square().mean()

        def posterior(image, k=k, before=before, x_t=x_t):
            return (before.sqrt() * betas[k] * image + (1 - betas[k]).sqrt() * (1 - before) * x_t) / (1 - kept[k])

        variance = betas[max(k, 1)] * (1 - kept[max(k, 1) - 1]) / (1 - kept[max(k, 1)])
        log_variance = v * betas[k].log() + (1 - v) * variance.log()
        fixed = eps.detach()
        mean = posterior((x_t - (1 - kept[k]).sqrt() * fixed) / kept[k].sqrt())
        if k:
            p = torch.distributions.Normal(mean, (log_variance / 2).exp())
            q = torch.distributions.Normal(posterior(x0), variance.sqrt())
            bound = torch.distributions.kl_divergence(q, p)
        else:
            p = torch.distributions.Normal(mean, (log_variance / 2).exp())
            inside = p.cdf(x0 + 1 / 255) - p.cdf(x0 - 1 / 255)
            inside = torch.where(x0 < -0.999, p.cdf(x0 + 1 / 255), inside)
            inside = torch.where(x0 > 0.999, 1 - p.cdf(x0 - 1 / 255), inside)
            bound = -inside.clamp(min=1e-12).log()
        losses.append(simple + bound.mean() / math.log(2))
    return torch.stack(losses)


def test_ddpm_loss():
    """Squared error and bound at the ends and between, and the gradient: the bound moves the variance alone."""
    model, (x, y, noise) = Linear(), batch()
    t = torch.tensor([0, 1, 500, 998, 999])
    ours, theirs = DDPM().loss(model, x, y, t, noise), transcription(model, x, t, y, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    a, b = (torch.autograd.grad(loss.sum(), model.weight)[0] for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    plain = Linear(out=3)
    expected = (plain(DDPM().add_noise(x, t, noise), t, y) - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(DDPM().loss(plain, x, y, t, noise), expected)


def test_ddpm_true_noise_costs_nothing():
    """A model that knows the noise has no squared error, and the bound is that of the variance alone."""
    x, y, noise = batch()
    for v, low in ((-1.0, True), (1.0, False)):
        model = lambda x_t, t, y, v=v: torch.cat([noise, torch.full_like(noise, v)], dim=1)  # noqa: E731
        loss = DDPM().loss(model, x, y, torch.full((5,), 400), noise)
        assert (loss.abs().max() < 1e-9) == low


def test_ddpm_schedule():
    kept = DDPM().kept
    assert kept[0].item() == pytest.approx(1 - 1e-4)
    assert kept[999].item() == pytest.approx(4.0358e-5, rel=1e-3)
    assert DDPM().spaced(1000) == list(range(1000))
    assert DDPM().spaced(250)[:4] == [0, 4, 8, 12]
    assert DDPM().spaced(250)[-1] == 999
    assert DDPM().spaced(1) == [0]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("clip", [False, True])
def test_against_diffusers(sampler, clip):
    """Each step of the chain, respaced to 10 steps, gives diffusers' numbers."""
    diffusion, model, (x, _, _) = DDPM(clip=clip), Linear(), batch()
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": clip}
    if sampler == "ddpm":
        theirs = diffusers.DDPMScheduler(1000, variance_type="learned_range", **settings)
        theirs.set_timesteps(timesteps=diffusion.spaced(10)[::-1])
        times = theirs.timesteps
    else:
        theirs = diffusers.DDIMScheduler(1000, set_alpha_to_one=True, timestep_spacing="linspace", **settings)
        theirs.set_timesteps(10)
        times = theirs.timesteps
        assert times.tolist() == diffusion.spaced(10)[::-1]
    theirs.alphas_cumprod = diffusion.kept  # theirs are float32
    theirs.final_alpha_cumprod = theirs.one = torch.tensor(1.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    draws = []

    def draw(x):
        draws.append(torch.randn(x.shape, generator=generator, dtype=x.dtype))
        return draws[-1]

    chain = [x]
    images = list(diffusion.sample(lambda x, t: (chain.append(x), model(x, t))[1], x, 10, sampler, draw))
    assert len(images) == 10
    generator.manual_seed(5)
    for i, t in enumerate(times):
        now, then = chain[i + 1], [*chain[2:], images[-1]][i]
        prediction = model(now, torch.full((len(x),), int(t)))
        if sampler == "ddpm":
            step = theirs.step(prediction, t, now, generator=generator)
        elif i < 9:
            continue
        else:
            step = theirs.step(prediction[:, :3], t, now)
        torch.testing.assert_close(then, step.prev_sample, rtol=1e-9, atol=1e-9)


def test_ddim_by_hand():
    """x_(t-1) = sqrt(a') image + sqrt(1 - a') noise (arXiv 2010.02502, eq. 12 with sigma = 0)."""
    diffusion, model, (x, _, _) = DDPM(), Linear(), batch()
    kept, times, expected = diffusion.kept, diffusion.spaced(7), x
    for i in reversed(range(7)):
        eps = model(expected, torch.full((5,), times[i]))[:, :3]
        image = (expected - (1 - kept[times[i]]).sqrt() * eps) / kept[times[i]].sqrt()
        before = kept[times[i - 1]] if i else torch.tensor(1.0)
        expected = before.sqrt() * image + (1 - before).sqrt() * eps
    torch.testing.assert_close(last(diffusion.sample(model, x, 7, "ddim")), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 1000), ("ddpm", 200), ("ddim", 200)])
def test_ddpm_samples_a_gaussian(sampler, steps):
    """With the exact model of N(0.3, 0.5^2) the chain ends in it."""
    torch.manual_seed(0)
    diffusion = DDPM()

    def exact(x, t):
        kept = diffusion.kept[t][:, None, None, None]
        variance = kept * 0.25 + 1 - kept
        return (x - kept.sqrt() * 0.3) / variance * (1 - kept).sqrt()

    out = last(diffusion.sample(exact, torch.randn(400, 3, 4, 4, dtype=torch.float64), steps, sampler))
    assert out.mean().item() == pytest.approx(0.3, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_solvers_are_of_second_order(sampler):
    """In few steps they are nearer to the flow of a Gaussian's exact model than ddim, and twice the steps tell."""
    diffusion, x = DDPM(), batch()[2]

    def exact(x, t):  # images are N(0.3, 0.5^2)
        kept = diffusion.kept[t][:, None, None, None]
        return (x - kept.sqrt() * 0.3) / (kept * 0.25 + 1 - kept) * (1 - kept).sqrt()

    last_kept = diffusion.kept[-1]
    truth = 0.3 + 0.5 * (x - last_kept.sqrt() * 0.3) / (last_kept * 0.25 + 1 - last_kept).sqrt()
    errors, of_ddim = (
        [(last(diffusion.sample(exact, x, steps, name)) - truth).abs().max().item() for steps in (10, 20, 40)]
        for name in (sampler, "ddim")
    )
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert all(ours < ddim / 3 for ours, ddim in zip(errors[1:], of_ddim[1:], strict=True))
    assert len(list(diffusion.sample(exact, x, 1, sampler))) == 1


def solver_by_hand(diffusion, model, x, steps, clip):
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), first order in the first and the last step."""
    kept = torch.cat([diffusion.kept, torch.ones(1, dtype=torch.float64)])
    times = [round(999 * i / steps) for i in range(steps, 0, -1)] + [1000]
    half_log_snr = lambda t: (kept[t] / (1 - kept[t])).log() / 2  # noqa: E731
    before = None
    for i, (t, then) in enumerate(itertools.pairwise(times)):
        noise = model(x, torch.full((len(x),), t))[:, :3]
        image = (x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()
        image = image.clamp(-1, 1) if clip else image
        if then == 1000:
            return image
        step, guess = half_log_snr(then) - half_log_snr(t), image
        if i:
            ratio = (half_log_snr(t) - half_log_snr(times[i - 1])) / step
            guess = image + (image - before) / (2 * ratio)
        shrink = ((1 - kept[then]) / (1 - kept[t])).sqrt()
        x, before = shrink * x - kept[then].sqrt() * torch.expm1(-step) * guess, image


@pytest.mark.parametrize("clip", [False, True])
def test_dpm_solver_by_hand(clip):
    """diffusers' scheduler gets our schedule, our predicted noise without the variance, and our clipping."""
    model, x = Linear(), batch()[2]
    ours = list(DDPM(clip=clip).sample(model, x, 8, "dpm++"))
    expected = solver_by_hand(DDPM(), model, x, 8, clip)
    torch.testing.assert_close(ours[-1], expected, rtol=1e-4, atol=1e-4)  # of float32 schedules in diffusers
    first = (x - (1 - DDPM().kept[999]).sqrt() * model(x, torch.full((5,), 999))[:, :3]) / DDPM().kept[999].sqrt()
    torch.testing.assert_close(ours[0], first.clamp(-1, 1) if clip else first)
    assert not torch.allclose(ours[-1], last(DDPM(clip=clip).sample(model, x, 8, "unipc")), atol=1e-3)


def test_solvers_need_diffusers(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for sampler in ("dpm++", "unipc"):
        with pytest.raises(ValueError, match=r"needs diffusers: pip install 'hcvision\[latents\]'"):
            last(DDPM().sample(None, batch()[0], 4, sampler))


# the linear path


def test_velocity_loss():
    model, (x, y, noise) = Linear(), batch()
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    at = t[:, None, None, None]
    expected = (model(at * x + (1 - at) * noise, t, y)[:, :3] - (x - noise)).square().mean((1, 2, 3))
    torch.testing.assert_close(LinearPath().loss(model, x, y, t, noise), expected)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_velocity_order(sampler, order):
    """The error against the exact flow of a Gaussian falls with the order of the method."""
    x = batch()[2]

    def exact(x, t):  # images are N(0.3, 0.5^2)
        at = t[:, None, None, None].double()
        variance = at**2 * 0.25 + (1 - at) ** 2
        score = (x - at * 0.3) / variance
        return 0.3 + (at * 0.25 - (1 - at)) * score

    truth = 0.3 + 0.5 * x
    errors = [
        (last(LinearPath().sample(exact, x, steps, sampler)) - truth).abs().max().item() for steps in (20, 40, 80)
    ]
    for a, b in itertools.pairwise(errors):
        assert a / b == pytest.approx(2**order, rel=0.3)


def test_velocity_evaluations():
    """Euler and Euler-Maruyama evaluate once a step, Heun twice but in the last."""
    for sampler, count in (("euler", 5), ("heun", 9), ("sde", 5)):
        assert LinearPath().count_evaluations(5, sampler) == count
        calls = []
        last(LinearPath().sample(lambda x, t, calls=calls: (calls.append(t[0].item()), x)[1], batch()[2], 5, sampler))
        assert len(calls) == count
        assert calls[0] == 0


def gaussian_velocity(x, t):
    """The exact velocity where images are N(0.3, 0.5^2)."""
    at = t[:, None, None, None].double()
    return 0.3 + (at * 0.25 - (1 - at)) * (x - at * 0.3) / (at**2 * 0.25 + (1 - at) ** 2)


def moments(steps, coefficient, last_step, velocity=gaussian_velocity):
    """The exact mean and variance of what ``sde`` makes of noise: it is affine in the noise of the start and each step.

    Row 0 has no noise at all, row 1 a start of 1, row i + 2 a draw of 1 in step i.
    """
    start, step = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64), itertools.count(2)
    start[1] = 1

    def draw(x):
        noise = torch.zeros_like(x)
        noise[next(step)] = 1
        return noise

    ends = last(LinearPath().sample(velocity, start, steps, "sde", draw, coefficient, last_step)).flatten()
    assert next(step) == steps + 1  # every step but the last draws
    return ends[0].item(), (ends[1:] - ends[0]).square().sum().item()


@pytest.mark.parametrize(("coefficient", "order"), [("constant", 1), ("sigma", 1), ("path", 2)])
def test_sde_order(coefficient, order):
    """The variance of a Gaussian, to the order of Euler-Maruyama or better; its mean, which goes straight, exactly.

    Nothing is drawn at random.
    """
    found = [moments(steps, coefficient, 1 / steps) for steps in (100, 200, 400)]
    assert all(mean == pytest.approx(0.3, abs=1e-7) for mean, _ in found)  # times are float32
    errors = [abs(variance - 0.25) for _, variance in found]
    assert errors[0] < 0.004
    for a, b in itertools.pairwise(errors):
        assert a / b == pytest.approx(2**order, rel=0.1)


def test_sde_in_few_steps():
    """With the published last step, too, whatever the coefficient."""
    for steps in (20, 50, 250):
        for coefficient in ("constant", "sigma", "path"):
            assert moments(steps, coefficient, 0.04)[1] == pytest.approx(0.25, abs=max(0.4 / steps, 0.003))


@pytest.mark.parametrize("coefficient", ["constant", "sigma", "path"])
def test_sde_by_hand(coefficient):
    """Euler-Maruyama for dx = (v + D score) dt + sqrt(2 D) dW, image by image from the equations; a last step without
    noise to the predicted image."""
    model, x = Linear(), batch()[2]
    draws = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(4)]
    given, size, expected = iter(draws), 0.9 / 4, x
    ours = last(LinearPath().sample(model, x, 5, "sde", lambda x: next(given), coefficient, 0.1))
    for i in range(4):
        t = i * size
        v = model(expected, torch.full((5,), t))[:, :3]
        noise = expected - t * v  # the mean of the noise in x_t
        score = -noise / (1 - t)
        amount = {"constant": 1, "sigma": 1 - t, "path": (1 - t) / max(t, 2 * size)}[coefficient]
        expected = expected + size * (v + amount * score) + (2 * amount * size) ** 0.5 * draws[i]
    expected = expected + 0.1 * model(expected, torch.full((5,), 0.9))[:, :3]
    torch.testing.assert_close(ours, expected)
    alone = last(LinearPath().sample(model, x, 1, "sde"))
    torch.testing.assert_close(alone, x + model(x, torch.zeros(5))[:, :3])


def test_image_loss():
    """The velocity's loss, of the velocity that leads to the predicted image; its factor is 400 at most."""
    model, (x, y, noise) = Linear(), batch()
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
    at = t[:, None, None, None]
    predicted = model(at * x + (1 - at) * noise, t, y)[:, :3]
    found = ImagePath().loss(model, x, y, t, noise)
    expected = ((predicted - x) / (1 - at)).square().mean((1, 2, 3))
    torch.testing.assert_close(found[:4], expected[:4])
    slope = (predicted - (at * x + (1 - at) * noise)) / 0.05
    torch.testing.assert_close(found[4], (slope - (x - noise)).square().mean((1, 2, 3))[4])
    assert ImagePath().loss(lambda *_: x, x, y, t.clamp(max=0.9), noise).max() < 1e-20


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_image_sampler(sampler):
    """The exact image of a Gaussian leads where its exact velocity does, up to the last step's bound on 1 - t."""
    noise = batch()[2]

    def velocity(x, t):  # images are N(0.3, 0.5^2)
        at = t[:, None, None, None].double()
        return 0.3 + (at * 0.25 - (1 - at)) * (x - at * 0.3) / (at**2 * 0.25 + (1 - at) ** 2)

    def image(x, t):
        return x + (1 - t[:, None, None, None].double()) * velocity(x, t)

    ours = list(ImagePath().sample(image, noise, 20, sampler))
    theirs = list(LinearPath().sample(velocity, noise, 20, sampler))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    finer = last(ImagePath().sample(image, noise, 200, sampler))
    assert 0 < (finer - last(LinearPath().sample(velocity, noise, 200, sampler))).abs().max() < 0.05


# guidance


@pytest.mark.parametrize("channels", [1, 3, None])
def test_guidance(channels):
    """The first channels move away from no class; the others are the class's own."""
    model, (x, y, _), t = Linear(channels=4, out=8), batch(channels=4), torch.arange(5) * 100
    wanted, anything = model(x, t, y), model(x, t, torch.full_like(y, 10))
    found = guide(model, y, null=10, scale=1.7, channels=channels)(x, t)
    count = channels or 4
    torch.testing.assert_close(found[:, :count], anything[:, :count] + 1.7 * (wanted - anything)[:, :count])
    torch.testing.assert_close(found[:, count:], wanted[:, count:])
    assert torch.equal(guide(model, y, null=10, scale=1.0)(x, t), wanted)


def test_guidance_in_an_interval():
    """Inside it is guidance, outside the class alone, evaluated once; rows may be at different times."""
    model, (x, y, _) = Linear(), batch()
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])
    calls = []

    def counted(x, t, y):
        calls.append(len(x))
        return model(x, t, y)

    always, never = guide(model, y, 10, 1.7)(x, t), model(x, t, y)
    found = guide(counted, y, 10, 1.7, interval=(0.2, 0.8))(x, t)
    assert torch.equal(found[1:4], always[1:4])
    torch.testing.assert_close(found[[0, 4]], never[[0, 4]])
    assert (found[1:4] - never[1:4]).abs().max() > 0.1
    assert torch.equal(guide(counted, y, 10, 1.7, interval=(0.6, 0.7))(x, t), never)
    assert calls == [10, 5]
    steps = torch.tensor([999, 799, 500, 201, 0])  # of DDPM, which count the other way
    found = guide(model, y, 10, 1.7, interval=(0.2, 0.8), place=DDPM().place)(x, steps)
    same = [torch.allclose(row, wanted) for row, wanted in zip(found, model(x, steps, y), strict=True)]
    assert same == [True, False, False, False, True]


def test_likelihood():
    """256 values in all, whose probabilities add up to one."""
    values = torch.arange(256, dtype=torch.float64) / 255 * 2 - 1
    for mean, log_deviation in ((0.1, -1.0), (-1.0, -3.0), (0.7, 1.0)):
        mean, log_deviation = (torch.full((256,), v, dtype=torch.float64) for v in (mean, log_deviation))
        assert discrete_log_likelihood(values, mean, log_deviation).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_training_decreases_the_loss():
    """Draws its own times and noise when none are given."""
    torch.manual_seed(0)
    x, y, _ = batch()
    for diffusion in (DDPM(), LinearPath(), ImagePath()):
        model = Linear()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(150):
            loss = diffusion.loss(model, x, y).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-30:]) < sum(losses[:30])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDPM(1), "timesteps must be at least 2, got 1"),
        (lambda: last(DDPM().sample(None, batch()[0], 0)), "steps must be between 1 and 1000, got 0"),
        (lambda: last(DDPM().sample(None, batch()[0], 2000)), "steps must be between 1 and 1000, got 2000"),
        (lambda: last(DDPM().sample(None, batch()[0], 10, "heun")), "ddpm, ddim, dpm.* or unipc .*, got 'heun'"),
        (lambda: last(LinearPath().sample(None, batch()[0], 10, "ddim")), "sampler must be heun, euler or sde"),
        (lambda: last(LinearPath().sample(None, batch()[0], 9, "sde", None, "tau")), "of constant, sigma, path, got"),
        (lambda: last(LinearPath().sample(None, batch()[0], 9, "sde", None, "path", 1.0)), "last_step must be above 0"),
        (lambda: last(LinearPath().sample(None, batch()[0], 0)), "steps must be at least 1, got 0"),
        (lambda: guide(None, None, 0, -1.0), "guidance needs scale >= 0 and channels >= 1, got -1.0 and 3"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
