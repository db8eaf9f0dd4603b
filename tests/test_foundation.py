"""Frozen networks: foundation models through timm, tiny and random, and LPIPS against its package."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vadit.config import FoundationSpec
from vadit.models import foundation, lpips
from vadit.models.foundation import TIMM_NAMES, FoundationModel
from vadit.models.lpips import LPIPS, vgg_features
from vadit.runtime.errors import RunError, UsageError

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
DINO = "vit_small_patch14_dinov2"
VIT = "vit_tiny_patch16_224"


def build(name: str = DINO, latent_size: int = 3, **settings: Any) -> FoundationModel:
    torch.manual_seed(0)
    return FoundationModel(FoundationSpec(name, **{"weights": "random", "model_args": TINY, **settings}), latent_size)


def images(size: int = 48) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("input_range", ["normalized", "minus_one_one"])
def test_features_are_the_last_block_after_the_norm_without_class_token(input_range: Any) -> None:
    model = build(input_range=input_range)
    assert (model.feature_dim, model.input_size) == (24, 42)
    found = model(images())
    x = F.interpolate(images(), size=(42, 42), mode="bilinear", align_corners=False)
    if input_range == "normalized":
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        x = ((x + 1) / 2 - mean) / std
    with torch.no_grad():
        expected = model.model.forward_features(x)[:, 1:].reshape(2, 3, 3, 24).permute(0, 3, 1, 2)
    assert found.shape == (2, 24, 3, 3)
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("name", "model_args", "latent_size", "feature_dim"),
    [
        ("vit_small_patch14_reg4_dinov2", TINY, 4, 24),
        ("vit_base_patch16_clip_224", TINY, 2, 24),
        ("samvit_base_patch16", TINY, 2, 256),
        ("resnet10t", {}, 2, 512),
    ],
)
def test_any_timm_model_on_the_latents_grid(name: str, model_args: dict, latent_size: int, feature_dim: int) -> None:
    model = build(name, latent_size, model_args=model_args)
    assert model.feature_dim == feature_dim
    assert model(images(40)).shape == (2, feature_dim, latent_size, latent_size)


def test_names_are_timms_and_torchvisions_and_all_is_frozen() -> None:
    assert list(TIMM_NAMES) == ["dinov2", "mae", "sam", "clip"]
    for name in TIMM_NAMES.values():
        assert name in timm.list_pretrained(name.split(".")[0] + ".*")
    from torchvision.models import vgg16

    with torch.device("meta"):
        theirs = {name: tensor.shape for name, tensor in vgg16().features.state_dict().items()}
        ours = {name: tensor.shape for name, tensor in vgg_features().state_dict().items()}
    assert ours == theirs
    model = build().train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(images().requires_grad_()).requires_grad


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(5)
    source = timm.create_model(VIT, num_classes=7, **TINY)
    path = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(source.state_dict(), path)
    model = build(VIT, weights=str(path), model_args={**TINY, "num_classes": 7})
    assert torch.equal(model.model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)

    with pytest.raises(UsageError, match=r"foundation\.weights \S+ do not fit vit_tiny_patch16_224: size mismatch"):
        build(VIT, weights=str(path), model_args={**TINY, "num_classes": 9})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RunError, match=rf"foundation\.weights \S+weights\.{suffix} cannot be read"):
        build(VIT, weights=str(path))


def test_what_cannot_be_built(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"foundation\.weights \S+ is no file.*vit_large_patch14_dinov2\.lvd142m"):
        build("dinov2", weights=str(tmp_path / "absent.pth"))
    with pytest.raises(UsageError, match=r"foundation\.name vit_tinny_patch16_224 .*did you mean vit_tiny_patch16_224"):
        build("vit_tinny_patch16_224")
    for wrong in ({"depth": 0}, {"num_heads": 0}, {"embed_dim": 33, "num_heads": 2}):
        with pytest.raises(UsageError, match=r"foundation\.model_args \{.*\} do not suit vit_tiny_patch16_224: "):
            build(VIT, model_args=wrong)
    with pytest.raises(UsageError, match=r"foundation\.model_args\.depth is -1; it must be at least 0"):
        build(VIT, model_args={"depth": -1})
    with pytest.raises(UsageError, match=r"foundation\.model_args \{'no_such': 1\} do not suit vit_tiny_patch16_224"):
        build(VIT, model_args={"no_such": 1})

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(foundation.timm, "create_model", refuse)
    with pytest.raises(RunError) as error:
        build("mae", weights="hub", model_args={})
    assert "timm/vit_large_patch16_224.mae" in str(error.value)
    assert "--foundation.weights" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of torchvision's, classifier included, with weights that keep the signal's size."""
    torch.manual_seed(0)
    features = vgg_features()
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.normal_(module.bias, std=0.1)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, path)
    return path


@pytest.fixture(scope="module")
def ours(vgg_file: Path) -> LPIPS:
    return LPIPS(str(vgg_file))


def test_equals_the_package(ours: LPIPS, vgg_file: Path) -> None:
    import lpips

    package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    state = torch.load(vgg_file, weights_only=True)
    with torch.no_grad():
        for stage in (1, 2, 3, 4, 5):
            for name, parameter in getattr(package.net, f"slice{stage}").named_parameters():
                parameter.copy_(state[f"features.{name}"])
        x, y = torch.rand(2, 2, 3, 40, 32) * 2 - 1
        expected = package(x, y)
        found = ours(x, y)
    assert found.shape == expected.shape == (2, 1, 1, 1)
    assert (expected > 1e-3).all()
    assert torch.allclose(found, expected, rtol=1e-5)


def test_is_frozen_and_lets_gradients_through(ours: LPIPS) -> None:
    ours.train()
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    ours(x, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with FlopCounterMode(display=False) as once:
        ours.features(x)
    with FlopCounterMode(display=False) as counter:
        ours(torch.zeros(1, 3, 32, 32), x).sum().backward()
    assert counter.get_total_flops() == 3 * once.get_total_flops(), "an image without a gradient was differentiated"
    same = torch.rand(1, 3, 32, 32, requires_grad=True)
    distance = ours(same, same.detach().clone())
    distance.sum().backward()
    assert distance.item() == 0
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


def test_a_file_that_is_not_the_published_one_is_said(vgg_file: Path, monkeypatch, capsys) -> None:
    LPIPS(str(vgg_file))
    (said,) = capsys.readouterr().err.splitlines()  # of the heads, which are the published ones, there is none
    assert f"{vgg_file} is not the published file" in said and "published is 397923af..." in said
    monkeypatch.setattr(lpips, "VGG_SHA256", hashlib.sha256(vgg_file.read_bytes()).hexdigest())
    LPIPS(str(vgg_file))
    assert not capsys.readouterr().err


def test_errors(vgg_file: Path, tmp_path: Path) -> None:
    published = r"vgg16-397923af\.pth from https://download\.pytorch\.org/models/"
    pytest.raises(UsageError, LPIPS, None).match(rf"loss\.vgg_weights is not set; download {published}")
    with pytest.raises(UsageError, match=rf"missing\.pth does not exist; download {published}"):
        LPIPS(str(tmp_path / "missing.pth"))
    torch.save({"features.0.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"no tensor features\.0\.weight of shape \(64, 3, 3, 3\)"):
        LPIPS(str(tmp_path / "other.pth"))
    (tmp_path / "cut.pth").write_bytes(vgg_file.read_bytes()[:100_000])
    pytest.raises(RunError, LPIPS, str(tmp_path / "cut.pth")).match(r"cut\.pth cannot be read")
