"""Samples: which index gives what, whoever draws it, and the files that hold them."""

import copy
import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from model_help import SmallNet
from PIL import Image
from torch import nn

from vadit.config import SampleSpec
from vadit.images.pixels import channels_last, to_uint8
from vadit.models.pretrained import Origin
from vadit.runtime import launcher
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.owner import owned
from vadit.sampling import draw as drawing
from vadit.sampling.draw import draw, sample_labels, sampler_name
from vadit.sampling.info import SamplingInfo
from vadit.sampling.write import noted_precision, noted_sampler, write_samples


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    """Groups of 16, so that a few samples are several groups, the last one not full."""
    monkeypatch.setattr(drawing, "GROUP", 16)


class TinyDecoder(nn.Module):
    """Latent (n, 4, 2, 2) to pictures (n, 3, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def decode(self, z):
        return torch.tanh(self.scale * nn.functional.interpolate(z[:, :3], scale_factor=2))


def _draw(num_samples=37, **settings):
    spec = SampleSpec(**{"num_steps": 5, "cfg_scale": 2.0, **settings})
    return {
        index: (latent, int(label))
        for part in draw(SmallNet(), spec, num_samples=num_samples)
        for index, latent, label in zip(part.indices, part.latents, part.labels, strict=True)
    }


def _as_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(launcher, "_place", launcher.Place(rank, world_size))


@pytest.mark.parametrize("method", ["euler", "dopri5", "euler_maruyama"])
def test_samples_are_a_function_of_seed_and_index_bit_by_bit(method, monkeypatch):
    reference = _draw(method=method)
    assert sorted(reference) == list(range(37))
    shared = {}
    with monkeypatch.context() as patch:
        for rank in range(3):
            _as_process(patch, rank, 3)
            shared |= _draw(method=method)
    others = shared, _draw(method=method, num_samples=18)
    assert [len(other) for other in others] == [37, 18]
    for other in others:
        for index, (latent, label) in other.items():
            assert torch.equal(latent, reference[index][0]) and label == reference[index][1]
    assert not torch.equal(_draw(method=method, seed=1)[0][0], reference[0][0])


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("euler", [{"num_steps": 6}, {"timestep_shift": 0.3}, {"cfg_scale": 3.0}, {"cfg_interval": (0.3, 1.0)}]),
        ("euler", [{"cfg_channels": 3}, {"cfg_power": 4.0}, {"method": "heun"}]),
        ("dopri5", [{"atol": 0.1}, {"rtol": 1e-6}]),
        ("euler_maruyama", [{"timestep_shift": 0.3}, {"sde_diffusion": "sbdm"}, {"sde_last_step": "none"}]),
    ],
)
def test_every_setting_reaches_its_sampler(method, changes):
    start = _draw(num_samples=1, method=method)[0][0]
    for change in changes:
        other = _draw(num_samples=1, **{"method": method, **change})[0][0]
        assert not torch.allclose(other, start, rtol=1e-5, atol=1e-6), change


def test_labels_random_balanced_and_fixed():
    ids, classes = range(6000), torch.arange(10)
    random = sample_labels(ids, 0, classes, "random")
    counts = torch.bincount(random, minlength=10)
    assert len(counts) == 10 and (counts - 600).abs().max() < 5 * math.sqrt(600)
    assert (random != sample_labels(ids, 1, classes, "random")).any()
    assert torch.equal(random[100:], sample_labels(range(100, 6000), 0, classes, "random"))
    assert (torch.bincount(sample_labels(ids, 0, classes, "balanced")) == 600).all()
    assert sample_labels(range(1, 6), 0, classes, "random", [7, 3]).tolist() == [3, 7, 3, 7, 3]


def test_bad_requests_are_refused():
    def attempt(spec: SampleSpec = SampleSpec(), **settings) -> None:  # noqa: B008
        next(draw(SmallNet(), spec, **{"num_samples": 1, **settings}))

    pytest.raises(UsageError, attempt, labels=[0, 2]).match("label 2 is out of range: the generator has 2 classes")
    pytest.raises(UsageError, attempt, labels=[]).match("empty")
    attempt(labels=[0, 1])
    pytest.raises(UsageError, attempt, labels=[-1]).match("label -1")
    pytest.raises(UsageError, attempt, SampleSpec(cfg_channels=99)).match("--cfg-channels is 99")
    with pytest.raises(UsageError, match=r"--method ddpm does not fit this generator \(flow\.objective flow\)"):
        attempt(SampleSpec(method="ddpm"))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "euler249_random"),
        ({"method": "dopri5", "labels": "balanced"}, "dopri5_balanced"),
        ({"cfg_scale": 3.8, "cfg_power": 4.0, "num_steps": 4}, "euler3_cfg3.8_power4_random"),
        ({"cfg_scale": 2.0, "cfg_interval": (0.0, 0.5)}, "euler249_cfg2_to0.5_random"),
        ({"method": "ddpm"}, "ddpm250_random"),
        # an SDE's last step is one more, where it has one
        ({"method": "euler_maruyama"}, "euler_maruyama250_random"),
        ({"method": "euler_maruyama", "sde_last_step": "none"}, "euler_maruyama249_none_random"),
        ({"method": "euler_maruyama", "sde_diffusion": "sbdm"}, "euler_maruyama250_sbdm_random"),
        (
            {"timestep_shift": 0.3, "cfg_scale": 10.0, "cfg_interval": (0.11, 1.0), "cfg_channels": 3},
            "euler249_shift0.3_cfg10_from0.11_ch3_random",
        ),
    ],
)
def test_sampler_names_tell_settings_apart(settings, name):
    assert sampler_name(SampleSpec(**settings)) == name


def _write(out, num_samples=20, **settings):
    spec = settings.pop("spec", SampleSpec(num_steps=4, cfg_scale=2.0))
    model = settings.pop("model", None) or SmallNet()
    return write_samples(
        out,
        model,
        settings.pop("autoencoder", TinyDecoder()),
        spec,
        num_samples=num_samples,
        mean=settings.pop("mean", torch.full((1, 4, 1, 1), 0.1)),
        std=torch.full((1, 4, 1, 1), 2.0),
        **settings,
    )


def _bytes(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_files_hold_the_decoded_samples(tmp_path):
    seen = []
    files = _write(tmp_path / "out", multiplier=0.5, progress=seen.append)
    spec = SampleSpec(num_steps=4, cfg_scale=2.0)
    first, second = draw(SmallNet(), spec, num_samples=20)
    latents = torch.cat([first.latents, second.latents])
    expected = channels_last(to_uint8(TinyDecoder().decode(latents * 2.0 / 0.5 + 0.1))).numpy()
    archive = np.load(files.npz)
    assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_0"], expected)
    assert np.array_equal(archive["labels"], torch.cat([first.labels, second.labels]).numpy())
    assert [file.name for file in sorted(files.images.iterdir())] == [f"{index:06d}.png" for index in range(20)]
    for index in (0, 19):
        assert np.array_equal(np.asarray(Image.open(files.images / f"{index:06d}.png")), expected[index])
    grid = np.asarray(Image.open(files.grid))
    assert grid.shape == (22, 28, 3) and np.array_equal(grid[6:10, 12:16], expected[7])
    assert seen == [16, 20]


def test_files_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    _write(tmp_path / "one", num_samples=40)
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "settings.json").write_bytes((tmp_path / "one" / "settings.json").read_bytes())
    for rank in (2, 1, 0):
        _as_process(monkeypatch, rank, 3)
        _write(tmp_path / "three", num_samples=40)
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


@pytest.mark.parametrize("leftover", ["more", "000001.jpg", "old/000000.png", "settings"])
def test_a_folder_holds_the_samples_of_its_archive_and_no_others(tmp_path, leftover):
    _write(tmp_path, num_samples=4)
    if leftover == "settings":
        (tmp_path / "settings.json").unlink()
    elif leftover != "more":
        (tmp_path / "images" / leftover).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / leftover).write_bytes(b"")
    before = _bytes(tmp_path)
    found = {"more": "000002.png", "settings": "000000.png"}.get(leftover, leftover.split("/")[0])
    with pytest.raises(UsageError, match=f"images holds {found}, which is none .*--num-samples"):
        _write(tmp_path, num_samples=2 if leftover == "more" else 4)
    assert _bytes(tmp_path) == before


def test_an_archive_of_fewer_is_gone_while_more_are_drawn(tmp_path):
    _write(tmp_path, num_samples=2)
    with pytest.raises(RuntimeError, match="stop"):
        _write(tmp_path, num_samples=40, progress=lambda done: (_ for _ in ()).throw(RuntimeError("stop")))
    assert (tmp_path / "images" / "000015.png").exists() and not (tmp_path / "samples.npz").exists()


def test_other_settings_are_refused(tmp_path):
    out = tmp_path / "out"
    _write(out, num_samples=2)
    before = _bytes(out)
    with pytest.raises(UsageError, match=r"made with sampler\.cfg_scale 2\.0, this command says 3\.0"):
        _write(out, num_samples=2, spec=dataclasses.replace(SampleSpec(num_steps=4), cfg_scale=3.0))
    with pytest.raises(UsageError, match=r"made with mean \[0\.1.*says \[0\.0"):
        _write(out, num_samples=2, mean=torch.zeros(4))
    _write(out, num_samples=2, source={"generator": "the same, elsewhere"})
    assert _bytes(out) == before


def test_samples_of_a_later_checkpoint_do_not_mix_with_those_of_an_earlier(tmp_path):
    networks = {"model": SmallNet(), "autoencoder": TinyDecoder(), "guide": SmallNet()}
    _write(tmp_path, num_samples=2, **networks)
    before = _bytes(tmp_path)
    for name, told in (("model", "generator"), ("autoencoder", "tokenizer"), ("guide", "guide")):
        trained = copy.deepcopy(networks[name])
        with torch.no_grad():
            next(trained.parameters()).add_(1e-3)
        with pytest.raises(UsageError, match=f"holds samples of another {told} .weights"):
            _write(tmp_path, num_samples=4, **networks | {name: trained})
    assert _bytes(tmp_path) == before
    _write(tmp_path, num_samples=4, **networks)


def test_latents_that_are_not_finite_become_no_images(tmp_path):
    model = SmallNet()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    pytest.raises(RunError, _write, tmp_path, num_samples=2, model=model).match(r"samples 0 to \d+ are not finite")
    assert not (tmp_path / "images").exists()


def test_the_sampler_is_noted_beside_the_images(tmp_path):
    _write(tmp_path, num_samples=2, labels=[1], source={"generator": "run 7"})
    assert json.loads((tmp_path / "settings.json").read_text())["source"] == {"generator": "run 7"}
    assert np.load(tmp_path / "samples.npz")["labels"].tolist() == [1, 1]
    assert noted_sampler(tmp_path) == noted_sampler(tmp_path / "samples.npz") == "euler3_cfg2_listed"
    _write(tmp_path / "guided", num_samples=2, guide=SmallNet())
    assert noted_sampler(tmp_path / "guided") == "euler3_autoguided2_random"
    assert noted_sampler(tmp_path.parent) is None is noted_precision(tmp_path.parent)
    assert noted_precision(tmp_path / "samples.npz") == "fp32"
    (tmp_path / "settings.json").write_text("{")
    pytest.raises(RunError, _write, tmp_path, num_samples=2).match("damaged")
    assert noted_sampler(tmp_path / "images") is None is noted_precision(tmp_path)


def test_two_at_once_are_refused(tmp_path):
    with owned(tmp_path, ""), pytest.raises(UsageError, match=r"in use by .*; set --out to another folder"):
        _write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    pytest.raises(RunError, _write, tmp_path).match(r"000002\.png cannot be written \(No space left on device\)")
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
    pytest.raises(RunError, _write, tmp_path, num_samples=2).match(r"000001\.png does not decode")
    assert not list(tmp_path.glob("samples.npz*"))


@pytest.mark.parametrize(
    ("ranges", "labels"),
    [(None, [0, 1]), (((1, 1),), [1]), (((-5, 0), (0, 0)), [0]), (((7, 10**30),), [0, 1]), (((0, 10**30),), [0, 1])],
)
def test_only_trained_classes_are_drawn(ranges, labels):
    model = SmallNet()
    model.origin = Origin(classes=ranges)
    for law in ("random", "balanced"):
        drawn = [part.labels for part in draw(model, SampleSpec(num_steps=2, labels=law), num_samples=20)]
        assert torch.cat(drawn).unique().tolist() == labels


def test_guidance_by_a_null_label_that_was_never_trained_is_refused():
    model = SmallNet()
    model.spec = dataclasses.replace(model.spec, class_dropout=0.0)
    spec = SampleSpec(num_steps=2, cfg_scale=2.0)
    with pytest.raises(UsageError, match=r"--cfg-scale is 2, .* model\.class_dropout 0.*--model\.class-dropout 0\.1"):
        next(draw(model, spec, num_samples=1))
    next(draw(model, spec, num_samples=1, guide=SmallNet()))
    next(draw(model, dataclasses.replace(spec, cfg_scale=1.0), num_samples=1))


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        (["cat", "cat", "dog"], [0, 0, 1]),
        (["cat,dog", "dog, CAT ,"], [0, 1, 1, 0]),
        (["Gold fish, Carassius", "cat,gold_fish,  carassius,3"], [2, 0, 2, 5]),
        (["cafe\u0301", "7", "03"], [3, 7, 5]),
        (["Owl"], "'OWL' (label 4)|'owl' (label 6)"),
        (["owl"], [6]),
        (["cta"], "did you mean cat? it has 7 names"),
        (["zebra"], "known: cat, dog, Gold fish, Carassius, caf\u00e9, OWL, 3, owl; it has 7 names, or take a label"),
        (["9" * 5000], "no class of this generator"),
    ],
)
def test_classes_go_by_name_then_by_label(words, outcome, capsys):
    info = SamplingInfo(classes=["cat", "dog", "Gold fish, Carassius", "caf\u00e9", "OWL", "3", "owl"])
    if isinstance(outcome, list):
        assert info.labels(words) == outcome
        assert ("whose label is 5" in capsys.readouterr().err) == (5 in outcome)
    else:
        with pytest.raises(UsageError) as refused:
            info.labels(words)
        assert all(part in str(refused.value) for part in outcome.split("|"))
    thousand = SamplingInfo(classes=[f"n{number:08}" for number in range(1000)])
    with pytest.raises(UsageError, match=r"^.{0,200}$"):
        thousand.labels(["n0000100"])
