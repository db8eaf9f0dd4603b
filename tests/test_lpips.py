"""LPIPS against the lpips package with the same (random) VGG weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vadit.models.lpips import LPIPS, vgg_features
from vadit.runtime.errors import RunError, UsageError


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


def test_numbering_is_torchvisions() -> None:
    from torchvision.models import vgg16

    with torch.device("meta"):
        theirs = {name: tensor.shape for name, tensor in vgg16().features.state_dict().items()}
        ours = {name: tensor.shape for name, tensor in vgg_features().state_dict().items()}
    assert ours == theirs


def test_is_frozen_and_lets_gradients_through(ours: LPIPS) -> None:
    ours.train()
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    ours(x, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    same = torch.rand(1, 3, 32, 32, requires_grad=True)
    distance = ours(same, same.detach().clone())
    distance.sum().backward()
    assert distance.item() == 0
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


def test_errors(vgg_file: Path, tmp_path: Path) -> None:
    published = r"vgg16-397923af\.pth from https://download\.pytorch\.org/models/"
    with pytest.raises(UsageError, match=rf"loss\.vgg_weights is not set; download {published}"):
        LPIPS(None)
    with pytest.raises(UsageError, match=rf"missing\.pth does not exist; download {published}"):
        LPIPS(str(tmp_path / "missing.pth"))
    torch.save({"features.0.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"no tensor features\.0\.weight of shape \(64, 3, 3, 3\)"):
        LPIPS(str(tmp_path / "other.pth"))
    (tmp_path / "cut.pth").write_bytes(vgg_file.read_bytes()[:100_000])
    with pytest.raises(RunError, match=r"cut\.pth cannot be read"):
        LPIPS(str(tmp_path / "cut.pth"))
