"""Solvers against closed forms, guidance by what the network sees, and samples as files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vadit.sample as sampling
from vadit.config import DiTSpec, FlowSpec, SampleSpec
from vadit.errors import RunError, UsageError
from vadit.objectives import flow
from vadit.sample import draw, sample_labels, sample_ode, sample_sde, sampler_name, to_uint8, write_samples
from vadit.solvers import time_grid

MEAN, STD = 1.5, 0.5


class GaussianVelocity(nn.Module):
    """The exact output for data N(MEAN * (label + 1), STD^2), for any path and prediction; null label 2: mean 0.

    Records rows and time of each call.
    """

    def __init__(self, path: str = "linear", prediction: str = "velocity") -> None:
        super().__init__()
        self.num_classes, self.path, self.prediction = 2, path, prediction
        self.means = torch.tensor([MEAN, 2 * MEAN, 0.0])
        self.calls: list[tuple[float, int]] = []

    def forward(self, x, t, labels):
        self.calls.append((float(t[0]), len(x)))
        point = flow.path_point(self.path, t, like=x)
        centred = x - point.alpha * self.means[labels].reshape(-1, 1, 1, 1)
        variance = point.alpha**2 * STD**2 + point.sigma**2
        noise = point.sigma / variance * centred
        data = self.means[labels].reshape(-1, 1, 1, 1) + point.alpha * STD**2 / variance * centred
        if self.prediction == "velocity":
            return point.d_alpha * data + point.d_sigma * noise
        return noise if self.prediction == "noise" else -noise / point.sigma


class SmallNet(nn.Module):
    """A smooth nonlinear network with two classes, whose dropout would show a forgotten eval mode."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.num_classes, self.spec = 2, DiTSpec(input_size=2, in_channels=channels, num_classes=2)
        self.weight = nn.Parameter(torch.randn(channels, channels, generator=generator) * 0.5)
        self.table = nn.Parameter(torch.randn(3, channels, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[float, int]] = []

    def forward(self, x, t, labels):
        self.calls.append((float(t[0]), len(x)))
        hidden = torch.einsum("bchw,cd->bdhw", x, self.weight) + self.table[labels][:, :, None, None]
        return self.dropout(torch.sin(hidden + 3 * t.reshape(-1, 1, 1, 1)))


class TinyDecoder(nn.Module):
    """Latent (n, 4, 2, 2) to pictures (n, 3, 4, 4)."""

    def decode(self, z):
        return torch.tanh(nn.functional.interpolate(z[:, :3], scale_factor=2))


def _batch(size: int = 6, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(size, channels, 2, 2, generator=torch.Generator().manual_seed(0))
    return noise, torch.arange(size) % 2


def _exact_transport(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The ODE of a Gaussian moves each point with its quantile: linear path, exactly mean + std * noise at t = 1."""
    return MEAN * (labels + 1).reshape(-1, 1, 1, 1) + STD * noise


# ------------------------------------------------------------------------------------------------ solvers


def test_time_grid_and_shift():
    times = time_grid(250, shift=0.3)
    assert len(times) == 250 and times.dtype == torch.float32
    for number in (0, 1, 100, 249):
        t = number / 249
        assert float(times[number]) == pytest.approx(0.3 * t / (1 - 0.7 * t), rel=1e-6)
    torch.testing.assert_close(time_grid(5), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    with pytest.raises(UsageError, match="num_steps is 1"):
        time_grid(1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_solver_converges_at_its_order(method, order):
    noise, labels = (part.double() if part.is_floating_point() else part for part in _batch())
    exact = _exact_transport(noise, labels)

    def error(num_steps: int) -> float:
        samples = sample_ode(GaussianVelocity(), noise, labels, method=method, num_steps=num_steps)
        return float((samples - exact).abs().max())

    assert math.log2(error(41) / error(81)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_dopri5_reaches_the_data_on_every_path(path, prediction):
    noise, labels = _batch(64)
    model = GaussianVelocity(path, prediction)
    spec = FlowSpec(path=path, prediction=prediction)
    samples = sample_ode(model, noise, labels, method="dopri5", rtol=1e-5, flow=spec)
    low, high = flow.sampling_interval(spec)
    ends = [flow.path_point(path, torch.tensor(t)) for t in (low, high)]
    spread = [torch.sqrt(point.alpha**2 * STD**2 + point.sigma**2) for point in ends]
    means = (MEAN * (labels + 1)).reshape(-1, 1, 1, 1)
    expected = ends[1].alpha * means + spread[1] / spread[0] * (noise - ends[0].alpha * means)
    torch.testing.assert_close(samples, expected, rtol=0, atol=2e-3)


def test_evaluations_per_solver():
    noise, labels = _batch()
    for method, evaluations in (("euler", 9), ("heun", 18)):
        model = GaussianVelocity()
        sample_ode(model, noise, labels, method=method, num_steps=10)
        assert len(model.calls) == evaluations


def test_unconditional_pass_runs_only_where_guidance_acts():
    noise, labels = _batch()
    for scale, interval, expected in (
        (1.0, (0.0, 1.0), [6] * 10),
        (4.0, (0.0, 1.0), [12] * 10),
        (4.0, (0.25, 1.0), [6] * 3 + [12] * 7),
        (4.0, (0.25, 0.55), [6] * 3 + [12] * 3 + [6] * 4),
    ):
        model = SmallNet()
        sample_ode(model, noise, labels, num_steps=11, cfg_scale=scale, cfg_interval=interval)
        assert [rows for _, rows in model.calls] == expected
        adaptive = SmallNet()
        sample_ode(adaptive, noise, labels, method="dopri5", cfg_scale=scale, cfg_interval=interval)
        for t, rows in adaptive.calls:
            acts = scale != 1 and interval[0] <= t and (t <= interval[1] or interval[1] == 1)
            assert rows == (12 if acts else 6), f"{rows} rows at t {t}"


def test_interval_ends_are_inside_in_fp32():
    noise, labels = _batch()
    model = SmallNet()
    # the points are k / 10 in fp32, not equal to the doubles 0.3 and 0.7
    sample_ode(model, noise, labels, num_steps=11, cfg_scale=2.0, cfg_interval=(0.3, 0.7))
    assert [rows for _, rows in model.calls] == [6] * 3 + [12] * 5 + [6] * 2


def _guided_by_hand(model, noise, labels, scale, channels):
    x, times = noise, torch.linspace(0, 1, 11)
    for t, t_next in itertools.pairwise(times):
        strong = model(x, t.expand(len(x)), labels)
        weak = model(x, t.expand(len(x)), torch.full_like(labels, 2))
        output = strong.clone()
        output[:, :channels] = weak[:, :channels] + scale * (strong[:, :channels] - weak[:, :channels])
        x = x + (t_next - t) * output
    return x.detach()


@pytest.mark.parametrize("channels", [1, 3, 4, None])
def test_guidance_formula_and_channels(channels):
    noise, labels = _batch()
    expected = _guided_by_hand(SmallNet().eval(), noise, labels, 3.0, channels)
    samples = sample_ode(SmallNet(), noise, labels, num_steps=11, cfg_scale=3.0, cfg_channels=channels)
    torch.testing.assert_close(samples, expected)


def test_dopri5_controls_its_steps_on_both_halves():
    """The doubled state changes which steps are taken, not what is integrated: tight tolerances agree with Euler."""
    noise, labels = _batch()
    settings = {"cfg_scale": 3.0, "cfg_channels": 3}
    fine = sample_ode(SmallNet().double(), noise.double(), labels, method="heun", num_steps=400, **settings)
    model = SmallNet().double()
    samples = sample_ode(model, noise.double(), labels, method="dopri5", atol=1e-8, rtol=1e-8, **settings)
    torch.testing.assert_close(samples, fine, rtol=1e-4, atol=1e-4)
    assert {rows for _, rows in model.calls} == {12} and samples.shape == noise.shape


def test_autoguidance_asks_the_weaker_network_for_the_same_class():
    noise, labels = _batch()
    strong, weak = GaussianVelocity(), SmallNet()
    samples = sample_ode(strong, noise, labels, num_steps=11, cfg_scale=2.0, cfg_interval=(0.45, 1), guide=weak)
    assert [rows for _, rows in strong.calls] == [6] * 10 and [rows for _, rows in weak.calls] == [6] * 5
    t, x = torch.full((6,), 0.9), noise
    by_hand = weak.eval()(x, t, labels) + 2.0 * (strong(x, t, labels) - weak(x, t, labels))
    last = sample_ode(
        strong, noise, labels, num_steps=2, cfg_scale=2.0, guide=lambda x, t, labels: weak(x, t + 0.9, labels)
    )
    start = torch.zeros(6)
    expected = noise + weak(x, t, labels) + 2.0 * (strong(x, start, labels) - weak(x, t, labels))
    torch.testing.assert_close(last, expected.detach())
    assert not torch.allclose(samples, by_hand)


def test_sampling_turns_dropout_off_and_restores_the_mode():
    noise, labels = _batch()
    model = SmallNet()
    first = sample_ode(model, noise, labels, num_steps=5)
    assert model.training and model.dropout.training and not first.requires_grad
    torch.testing.assert_close(sample_ode(model, noise, labels, num_steps=5), first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rk4"}, "'rk4'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cfg_channels": 5}, "cfg_channels is 5"),
        ({"cfg_interval": (0.5, 0.2)}, "cfg_interval"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    noise, labels = _batch()
    with pytest.raises(UsageError, match=message):
        sample_ode(SmallNet(), noise, labels, **settings)
    with pytest.raises(UsageError, match="labels"):
        sample_ode(SmallNet(), noise, labels[:2])


def test_dopri5_reports_an_explosion_as_a_run_error():
    model = GaussianVelocity()
    model.forward = lambda x, t, labels: x * x * 1e3
    with pytest.raises(RunError, match="dopri5"):
        sample_ode(model, *_batch(), method="dopri5")


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler", "none"])
@pytest.mark.parametrize("form", ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"])
def test_sde_has_the_marginals_of_the_data(form, last_step):
    noise = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(60, dtype=torch.long)
    samples = sample_sde(
        GaussianVelocity(), noise, labels, num_steps=100, diffusion_form=form, last_step=last_step, seed=1
    )
    # standard error of the mean 0.008; the bias of the last step, which adds no noise, is up to 17% of the spread
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(samples.std()) == pytest.approx(STD, abs=0.09 if last_step == "mean" else 0.04)


def test_sde_noise_is_a_function_of_seed_index_and_step():
    noise, labels = _batch(6, channels=1)
    whole = sample_sde(GaussianVelocity(), noise, labels, num_steps=10, seed=5)
    part = sample_sde(GaussianVelocity(), noise[3:], labels[3:], num_steps=10, seed=5, indices=[3, 4, 5])
    torch.testing.assert_close(whole[3:], part)
    assert not torch.allclose(whole, sample_sde(GaussianVelocity(), noise, labels, num_steps=10, seed=6))


# ------------------------------------------------------------------------------------------------ draw


def _draw(num_samples=37, batch_size=8, world_size=1, **settings):
    spec = SampleSpec(**{"num_steps": 5, "cfg_scale": 2.0, **settings})
    parts = [
        part
        for rank in range(world_size)
        for part in draw(
            SmallNet(), spec, num_samples=num_samples, batch_size=batch_size, rank=rank, world_size=world_size
        )
    ]
    assert all(len(part.indices) <= batch_size for part in parts)
    return {
        index: (latent, int(label))
        for part in parts
        for index, latent, label in zip(part.indices, part.latents, part.labels, strict=True)
    }


@pytest.mark.parametrize("method", ["euler", "dopri5", "euler_maruyama"])
def test_samples_are_a_function_of_seed_and_index_bit_by_bit(method):
    reference = _draw(method=method)
    assert sorted(reference) == list(range(37))
    for other in (
        _draw(method=method, batch_size=100),
        _draw(method=method, batch_size=1, world_size=3),
        _draw(method=method, num_samples=18),
    ):
        for index, (latent, label) in other.items():
            assert torch.equal(latent, reference[index][0]) and label == reference[index][1]
    assert not torch.equal(_draw(method=method, seed=1)[0][0], reference[0][0])


def test_processes_share_the_samples():
    spec = SampleSpec(num_steps=2)
    shares = [
        [i for part in draw(SmallNet(), spec, num_samples=50, batch_size=9, rank=r, world_size=3) for i in part.indices]
        for r in range(3)
    ]
    assert sorted(itertools.chain(*shares)) == list(range(50)) and all(shares)


def test_labels_random_balanced_and_fixed():
    ids = range(6000)
    random = sample_labels(ids, 0, 10, "random")
    counts = torch.bincount(random, minlength=10)
    assert len(counts) == 10 and (counts - 600).abs().max() < 5 * math.sqrt(600)
    assert (random != sample_labels(ids, 1, 10, "random")).any()
    assert torch.equal(random[100:], sample_labels(range(100, 6000), 0, 10, "random"))
    assert (torch.bincount(sample_labels(ids, 0, 10, "balanced")) == 600).all()
    assert sample_labels(range(1, 6), 0, 10, "random", [7, 3]).tolist() == [3, 7, 3, 7, 3]


def test_bad_requests_are_refused():
    def attempt(spec: SampleSpec = SampleSpec(), **settings) -> None:  # noqa: B008
        next(draw(SmallNet(), spec, **{"num_samples": 1, "batch_size": 1, **settings}))

    with pytest.raises(UsageError, match="label 2 is out of range: the generator has 2 classes"):
        attempt(labels=[0, 2])
    with pytest.raises(UsageError, match="empty"):
        attempt(labels=[])
    with pytest.raises(UsageError, match="number of samples is 0"):
        attempt(num_samples=0)
    with pytest.raises(UsageError, match=r"ddpm does not fit a generator of flow\.objective flow"):
        attempt(SampleSpec(method="ddpm"))


def test_sampler_names_tell_settings_apart():
    assert sampler_name(SampleSpec()) == "euler250_random"
    assert sampler_name(SampleSpec(method="dopri5", labels="balanced")) == "dopri5_balanced"
    headline = SampleSpec(timestep_shift=0.3, cfg_scale=10.0, cfg_interval=(0.11, 1.0), cfg_channels=3)
    assert sampler_name(headline) == "euler250_shift0.3_cfg10_from0.11_ch3_random"


# ------------------------------------------------------------------------------------------------ files


def _write(out, num_samples=20, **settings):
    spec = settings.pop("spec", SampleSpec(num_steps=4, cfg_scale=2.0))
    model = settings.pop("model", None) or SmallNet()
    return write_samples(
        out,
        model,
        settings.pop("autoencoder", TinyDecoder()),
        spec,
        num_samples=num_samples,
        mean=torch.full((1, 4, 1, 1), 0.1),
        std=torch.full((1, 4, 1, 1), 2.0),
        **settings,
    )


def _bytes(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_uint8_rule():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.99, 1.0, 3.0]).reshape(1, 1, 1, 8).expand(1, 3, 1, 8)
    assert to_uint8(values)[0, 0, :, 1].tolist() == [0, 0, 64, 128, 191, 254, 255, 255]


def test_files_hold_the_decoded_samples(tmp_path):
    seen = []
    files = _write(tmp_path / "out", multiplier=0.5, progress=seen.append)
    spec = SampleSpec(num_steps=4, cfg_scale=2.0)
    (drawn,) = draw(SmallNet(), spec, num_samples=20, batch_size=20)
    expected = to_uint8(TinyDecoder().decode(drawn.latents * 2.0 / 0.5 + 0.1)).numpy()
    archive = np.load(files.npz)
    assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_0"], expected)
    assert np.array_equal(archive["labels"], drawn.labels.numpy())
    assert [file.name for file in sorted(files.images.iterdir())] == [f"{index:06d}.png" for index in range(20)]
    for index in (0, 19):
        assert np.array_equal(np.asarray(Image.open(files.images / f"{index:06d}.png")), expected[index])
    grid = np.asarray(Image.open(files.grid))
    assert grid.shape == (16, 20, 3) and np.array_equal(grid[4:8, 8:12], expected[7])
    assert seen == [16, 20]


def test_files_do_not_depend_on_the_number_of_processes(tmp_path):
    _write(tmp_path / "one", num_samples=40)
    for rank in (2, 1, 0):
        _write(tmp_path / "three", num_samples=40, rank=rank, world_size=3)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "three")


def test_resume_draws_only_what_is_missing(tmp_path):
    out = tmp_path / "out"
    _write(out, num_samples=40)
    whole = _bytes(out)
    (out / "images" / "000003.png").unlink()
    cut = out / "images" / "000005.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    kept = (out / "images" / "000004.png").stat().st_mtime_ns
    model = SmallNet()
    _write(out, num_samples=40, model=model)
    assert len(model.calls) == 3, "one group of the three was drawn, in three Euler steps"
    assert _bytes(out) == whole and (out / "images" / "000004.png").stat().st_mtime_ns == kept


def test_more_samples_continue_a_folder(tmp_path):
    _write(tmp_path / "grown", num_samples=18)
    _write(tmp_path / "grown", num_samples=40)
    _write(tmp_path / "fresh", num_samples=40)
    assert _bytes(tmp_path / "grown") == _bytes(tmp_path / "fresh")


def test_other_settings_are_refused(tmp_path):
    out = tmp_path / "out"
    _write(out, num_samples=2)
    before = _bytes(out)
    with pytest.raises(UsageError, match=r"sampler\.cfg_scale 2\.0, now it is 3\.0"):
        _write(out, num_samples=2, spec=dataclasses.replace(SampleSpec(num_steps=4), cfg_scale=3.0))
    with pytest.raises(UsageError, match="source"):
        _write(out, num_samples=2, source="another checkpoint")
    assert _bytes(out) == before
    (out / "settings.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        _write(out, num_samples=2)


def test_settings_are_saved(tmp_path):
    _write(tmp_path, num_samples=2, labels=[1], source="run 7")
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["sampler"]["cfg_scale"] == 2.0 and settings["label_list"] == [1] and settings["source"] == "run 7"
    assert np.load(tmp_path / "samples.npz")["labels"].tolist() == [1, 1]


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(source, target)

    real = sampling.os.replace
    monkeypatch.setattr(sampling.os, "replace", replace)
    with pytest.raises(RunError, match=r"000002\.png could not be written \(No space left on device\)"):
        _write(tmp_path)
    monkeypatch.undo()
    assert sorted(_bytes(tmp_path)) == ["images/000000.png", "images/000001.png", "settings.json"]
    files = _write(tmp_path)
    assert len(np.load(files.npz)["arr_0"]) == 20


def test_a_damaged_image_stops_the_archive_whole(tmp_path):
    _write(tmp_path, num_samples=2)
    png = tmp_path / "images" / "000001.png"
    content = png.read_bytes()
    png.write_bytes(content[:20] + b"\0" * (len(content) - 32) + content[-12:])
    (tmp_path / "samples.npz").unlink()
    with pytest.raises(RunError, match=r"000001\.png is missing or damaged"):
        _write(tmp_path, num_samples=2)
    assert not list(tmp_path.glob("samples.npz*"))


def test_grey_pictures_become_rgb(tmp_path):
    class Grey(nn.Module):
        def decode(self, z):
            return z[:, :1]

    files = _write(tmp_path, num_samples=3, autoencoder=Grey())
    pixels = np.load(files.npz)["arr_0"]
    assert pixels.shape == (3, 2, 2, 3) and (pixels[..., :1] == pixels).all()
