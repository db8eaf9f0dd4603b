"""The frozen vision foundation model that the latent is aligned to: DINOv2, MAE, SAM, CLIP or any timm model.

The only file that imports timm. Shapes: B batch, H W image rows and columns, D feature width, h w the latent's grid.
"""

import difflib
import math
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from vadit.config import FoundationSpec
from vadit.runtime.errors import RunError, UsageError, first_line
from vadit.runtime.precision import computing
from vadit.runtime.torch_file import load_torch

TIMM_NAMES = {
    "dinov2": "vit_large_patch14_dinov2.lvd142m",
    "mae": "vit_large_patch16_224.mae",
    "sam": "samvit_large_patch16.sa1b",
    "clip": "vit_large_patch14_clip_224.openai",
}


class FoundationModel(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to features (B, D, h, w) on the latent's grid. Never trains, needs no gradient.

    The features are those of the last block after the final norm, without class and register tokens (as the authors').
    """

    image_scale: Tensor
    image_offset: Tensor

    def __init__(self, spec: FoundationSpec, latent_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.model = _create(spec)
        self.requires_grad_(False)
        self.eval()
        stride = _stride(self.model)
        self.input_size = stride * latent_size
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in _image_statistics(self.model, spec))
        # (x + 1) / 2 to [0, 1], then (. - mean) / std, as one multiplication and one addition
        self.register_buffer("image_scale", 0.5 / std)
        self.register_buffer("image_offset", (0.5 - mean) / std)
        _, self.feature_dim, *grid = self._probe()
        if grid != [latent_size, latent_size]:
            raise UsageError(
                f"foundation model {spec.name} gives a {'x'.join(map(str, grid))} grid for images of "
                f"{self.input_size} pixels, the latent is {latent_size}x{latent_size}; set another --foundation.name"
            )

    def train(self, mode: bool = True) -> "FoundationModel":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        size = (self.input_size, self.input_size)
        x = images_BCHW.to(self.image_scale.dtype)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        if self.spec.input_range == "normalized":
            x = x * self.image_scale + self.image_offset
        with computing("tf32", x.device):  # fp32 would take longer on a GPU than the step that it serves
            (features,) = self.model.forward_intermediates(
                x, indices=[-1], norm=True, output_fmt="NCHW", intermediates_only=True
            )
        return features

    def _probe(self) -> list[int]:
        """Shape of the features of one image, by a run on the meta device: shapes without arithmetic."""
        tensors = (*self.named_parameters(), *self.named_buffers())
        state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        image = torch.empty(1, 3, self.input_size, self.input_size, device="meta")
        try:
            return list(functional_call(self, state, (image,)).shape)
        except (RuntimeError, NotImplementedError):
            pass  # the model makes a tensor on the CPU as it goes: ask it in earnest
        try:
            return list(self(torch.zeros(1, 3, self.input_size, self.input_size)).shape)
        except (AssertionError, RuntimeError) as error:
            raise UsageError(
                f"foundation model {self.spec.name} does not take images of {self.input_size} pixels "
                f"({first_line(error)}); set another --foundation.name"
            ) from None


class ImageSummary(nn.Module):
    """uint8 images (B, 3, H, W) to one feature vector each, (B, D) fp32 on the CPU: the class token after the norm.

    For FD-DINOv2 (Stein et al. 2023): Pillow's bicubic to 224 pixels, then the model's own mean and deviation.
    """

    def __init__(self, spec: FoundationSpec, side: int = 224) -> None:
        super().__init__()
        self.model = _create(spec).eval().requires_grad_(False)
        self.side = side
        _fit_positions(self.model, side // _stride(self.model))
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in _image_statistics(self.model, spec))

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        size = (self.side, self.side)
        pixels = [
            np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC))
            for image in images_BCHW.cpu()
        ]
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        x = ((x - self.mean) / self.std).to(self.model.pos_embed.device)
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True).float().cpu()


def _fit_positions(model: Any, grid: int) -> None:
    """Bring a ViT's position embeddings to grid x grid tokens as DINOv2's own code does, for features like its own.

    Bicubic without antialias, by the factor (grid + 0.1) / M: the published FD-DINOv2 rest on that. timm's own
    interpolation is antialiased and gives other features.
    """
    old_1TD, prefix = model.pos_embed.data, 0 if model.no_embed_class else model.num_prefix_tokens
    side = math.isqrt(old_1TD.shape[1] - prefix)
    if side == grid:
        return
    table = old_1TD[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side  # DINOv2's `interpolate_offset`
    table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic").flatten(2).transpose(1, 2)
    model.pos_embed = nn.Parameter(torch.cat([old_1TD[:, :prefix], table.to(old_1TD)], dim=1), requires_grad=False)
    model.patch_embed.grid_size = (grid, grid)  # what timm compares with: it interpolates no more


def _create(spec: FoundationSpec) -> Any:
    """The timm model with its weights."""
    name = TIMM_NAMES.get(spec.name, spec.name)
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, [*TIMM_NAMES, *timm.list_models()], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"foundation.name {spec.name} is neither {', '.join(TIMM_NAMES)} nor a timm model{hint}")
    if spec.weights == "random" or spec.model_args:
        try:
            model = _create_sized(spec, name, pretrained=False)
            _stride(model)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            words = f"foundation.model_args {spec.model_args} do not suit {spec.name}: {first_line(error)}"
            raise UsageError(words) from None
        if spec.weights == "random":
            return model
    return _create_from_hub(spec, name) if spec.weights == "hub" else _create_from_file(spec, name)


def _create_sized(spec: FoundationSpec, name: str, **arguments: Any) -> Any:
    """With dynamic_img_size where the model knows it: other image sizes by interpolated position embeddings."""
    arguments = {**spec.model_args, **arguments}
    try:
        return timm.create_model(name, **{"dynamic_img_size": True, **arguments})
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
    return timm.create_model(name, **arguments)


def _create_from_file(spec: FoundationSpec, name: str) -> Any:
    if not Path(spec.weights).is_file():
        raise UsageError(
            f"foundation.weights {spec.weights} is no file; name a .safetensors, .pth or .bin file of {name}, or hub"
        )
    if not spec.weights.endswith(".safetensors"):
        try:
            load_torch(Path(spec.weights))  # timm's own words for what this refuses are torch's: how to run it
        except (UsageError, RunError) as error:
            raise type(error)(f"foundation.weights {error}") from None
    # custom_load would read .npz; the class count, where changed, would make timm load loosely
    overlay: dict[str, Any] = {"file": spec.weights, "source": "timm", "custom_load": False}
    if "num_classes" in spec.model_args:
        overlay["num_classes"] = spec.model_args["num_classes"]
    try:
        return _create_sized(spec, name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # safetensors, pickle, zip and torch each fail in their own way on damaged bytes
        if str(error).startswith("Error(s) in loading state_dict"):  # torch's words where names or shapes do not fit
            detail = str(error).splitlines()[-1].strip()
            raise UsageError(f"foundation.weights {spec.weights} do not fit {name}: {detail}") from None
        raise RunError(
            f"foundation.weights {spec.weights} cannot be read ({first_line(error)}); the file is truncated or damaged"
        ) from None


def _create_from_hub(spec: FoundationSpec, name: str) -> Any:
    try:
        return _create_sized(spec, name, pretrained=True)
    except Exception as error:  # the hub's client, its HTTP library and the socket each have their own kinds
        config = None if ":" in name else timm.get_pretrained_cfg(name, allow_unregistered=True)
        raise RunError(
            f"the weights of {(config and config.hf_hub_id) or name} could not be had from the hub "
            f"({first_line(error)}); check the network, or download them elsewhere and set --foundation.weights to the "
            "file"
        ) from None


def _stride(model: Any) -> int:
    """Pixels of the image per position of the last feature map: the patch side of a ViT."""
    return int(model.feature_info[-1]["reduction"])


def _image_statistics(model: Any, spec: FoundationSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation that the model was trained with, for images in [0, 1]."""
    config = timm.data.resolve_model_data_config(model)
    if len(config["mean"]) != 3:
        raise UsageError(f"foundation model {spec.name} takes {len(config['mean'])} channels; name one for RGB images")
    return tuple(config["mean"]), tuple(config["std"])
