"""LPIPS (Zhang et al. 2018), version 0.1 with VGG16: the perceptual distance of the tokenizer's loss.

    sum over 5 layers of mean over positions of w . (f(x)/|f(x)| - f(y)/|f(y)|)^2

The linear heads w come with the `lpips` package (or torchmetrics); the VGG16 backbone is torchvision's file, by path.
Shapes: B batch, H W image rows and columns, E features of a layer.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from vadit.models.pretrained import compare_published, read_weights
from vadit.runtime.errors import UsageError
from vadit.runtime.torch_file import is_plain

VGG_FILE = "vgg16-397923af.pth"
VGG_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
HEADS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
"""Of the heads' file in lpips, torchmetrics and taming-transformers (there MD5 d507d7349b931f0638a25a48a722f98a)."""
VGG_WIDTHS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(width, convolutions) of the five stages; a 2x2 max-pool stands between two stages."""
HEAD_FILES = (("lpips", "weights/v0.1/vgg.pth"), ("torchmetrics", "functional/image/lpips_models/vgg.pth"))
IMAGE_SHIFT = (-0.030, -0.088, -0.188)
IMAGE_SCALE = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10


class LPIPS(nn.Module):
    """Distance of two batches of images (B, 3, H, W) in [-1, 1]: (B, 1, 1, 1). Frozen; gradients reach the images."""

    image_shift: Tensor
    image_scale: Tensor

    def __init__(self, vgg_weights: str | None) -> None:
        super().__init__()
        self.features = vgg_features()
        self.heads = nn.ParameterList(nn.Parameter(torch.empty(1, width, 1, 1)) for width, _ in VGG_WIDTHS)
        self.register_buffer("image_shift", torch.tensor(IMAGE_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("image_scale", torch.tensor(IMAGE_SCALE).view(1, 3, 1, 1))
        self._load_backbone(vgg_weights)
        self._load_heads()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode: the network is a fixed measure."""
        return super().train(False)

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        # side by side, not as one batch: images that need no gradient are then not differentiated
        x, y = ((images - self.image_shift) / self.image_scale for images in (x_BCHW, y_BCHW))
        total = torch.zeros((), device=y.device)
        stage = 0
        for module in self.features:
            if isinstance(module, nn.MaxPool2d):
                total = total + self._distance(x, y, stage)
                stage += 1
            x, y = module(x), module(y)
        return total + self._distance(x, y, stage)

    def _distance(self, x_BEhw: Tensor, y_BEhw: Tensor, stage: int) -> Tensor:
        difference = _normalised(x_BEhw) - _normalised(y_BEhw)
        return (difference.square() * self.heads[stage]).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)

    def _load_backbone(self, path: str | None) -> None:
        where = f"{VGG_FILE} from https://download.pytorch.org/models/"
        remedy = f"download {where} and set --vgg-weights to its path (vadit train: --loss.vgg-weights)"
        if path is None:
            raise UsageError(f"LPIPS needs torchvision's VGG16 weights and loss.vgg_weights is not set; {remedy}")
        if not Path(path).is_file():
            raise UsageError(f"vgg_weights {path} does not exist; {remedy}")
        state = read_weights(path)
        compare_published(path, VGG_SHA256)
        for name, parameter in self.features.named_parameters():
            found = state.get(f"features.{name}") if isinstance(state, dict) else None
            if not is_plain(found) or found.shape != parameter.shape:
                raise UsageError(
                    f"vgg_weights {path} has no tensor features.{name} of shape {tuple(parameter.shape)}; {remedy}"
                )
            parameter.data.copy_(found)

    def _load_heads(self) -> None:
        state = read_weights(path := _head_file())
        compare_published(path, HEADS_SHA256)
        for stage, head in enumerate(self.heads):
            head.data.copy_(state[f"lin{stage}.model.1.weight"])


def _normalised(features: Tensor) -> Tensor:
    """Of length 1 over the channels, in fp32."""
    features = features.float()
    # the root of the plain sum, with eps outside: the package's form, whose values are the published ones;
    # vector_norm has a gradient of 0 where all features are 0
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + NORM_EPS)


def vgg_features() -> nn.Sequential:
    """torchvision's vgg16().features up to relu5_3, with its numbering."""
    modules: list[nn.Module] = []
    width_before = 3
    for stage, (width, convolutions) in enumerate(VGG_WIDTHS):
        if stage:
            modules.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            modules += [nn.Conv2d(width_before, width, 3, padding=1), nn.ReLU()]
            width_before = width
    return nn.Sequential(*modules)


def _head_file() -> Path:
    """The linear heads inside an installed package, found without importing it."""
    for package, inside in HEAD_FILES:
        found = importlib.util.find_spec(package)
        for location in (found.submodule_search_locations or []) if found else []:
            if (path := Path(location) / inside).is_file():
                return path
    raise UsageError("the linear heads of LPIPS are in neither lpips nor torchmetrics; run pip install lpips")
