"""Tokenizers of the diffusers library (AutoencoderKL): their files, and LDM's names for their tensors.

Stable Diffusion's VAE (f8d4, which DiT, SiT, REPA and others train on) is published in this form. The network is LDM's
autoencoder under other names; nothing of diffusers is imported. Facts of the format: diffusers' documentation and its
released files. https://huggingface.co/docs/diffusers/api/models/autoencoderkl
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from vadit.models.pretrained import bare_state, read_mapping
from vadit.runtime.console import note_once
from vadit.runtime.errors import UsageError, short
from vadit.runtime.json_files import Limits, checked, read_json

CLASS_NAME = "AutoencoderKL"
CONFIG_NAME = "config.json"
_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(\.(?P<first>\w+))?(?P<kind>\.safetensors|\.bin)(?P<index>\.index(\.(?P<second>\w+))?\.json)?"
)
"""Names of the weights, or of the index of several files of them; a variant stands in one of two places."""
_VARIANTS = (None, "fp32", "fp16", "bf16", "non_ema")  # whole precision first, weights that are not averaged last
MARK = "encoder.down_blocks.0.resnets.0.conv1.weight"  # a tensor that every AutoencoderKL has

_ATTENTION_NAMES = {
    # those of today's diffusers, then those of its older files, which it still reads
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_ATTENTION = re.compile(rf"attentions\.(\d+)\.({'|'.join(map(re.escape, _ATTENTION_NAMES))})\.(weight|bias)$")


_Side = Annotated[int, Limits(strict=True, ge=1, le=1 << 16)]
_Number = Annotated[float, Limits(allow_inf_nan=False)]


@dataclass(frozen=True)
class DiffusersSettings:
    """What config.json says that the tensors do not; names and defaults are those of diffusers and of released VAEs."""

    norm_num_groups: _Side = 32  # groups of GroupNorm
    sample_size: _Side | Annotated[list[_Side], Limits(min_length=1)] | None = None  # of the training images, in pixels
    scaling_factor: _Number | None = None  # what a generator's latents are multiplied with (0.18215 for SD 1)
    shift_factor: _Number | None = None  # what is subtracted from latents before that (Stable Diffusion 3, FLUX)

    @property
    def image_size(self) -> int:
        """`sample_size` as one number; 256 where it is not said."""
        return self.sample_size[0] if isinstance(self.sample_size, list) else self.sample_size or 256


def find(path: str | Path) -> Path | None:
    """The weights of an AutoencoderKL where `path` is its folder, a pipeline's with vae/, or the file; else None.

    UsageError: a folder whose config.json is diffusers', but of another class or without weights.
    """
    path = Path(path)
    if path.is_file():
        return path if _WEIGHTS.fullmatch(path.name) else None
    if (path / "model_index.json").is_file() and (path / "vae" / CONFIG_NAME).is_file():
        path = path / "vae"
    config = _read_config(path / CONFIG_NAME)
    name = None if config is None else config.get("_class_name")
    if name not in (None, CLASS_NAME):
        raise UsageError(
            f"{path / CONFIG_NAME} describes a {short(name)} of diffusers; only its {CLASS_NAME} is a tokenizer"
        )
    there = sorted(file.name for file in path.glob("[!.]*"))
    known = [found for file in there if (found := _WEIGHTS.fullmatch(file))]
    if known:
        return path / min(known, key=_preference).string
    if name is None:
        return None
    raise UsageError(
        f"{path} is diffusers' folder and holds {', '.join(there[:9])}; needed is diffusion_pytorch_model.safetensors "
        "or .bin (or .fp16, .bf16, .non_ema before that), or its .index.json with all files that it names"
    )


def _preference(found: re.Match[str]) -> tuple[float, bool, bool]:
    variant = found["first"] or found["second"]
    rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS) - 1.5
    return rank, found["kind"] == ".bin", found["index"] is not None


def read(path: Path) -> tuple[dict[str, Tensor], DiffusersSettings]:
    """Tensors by LDM's names out of a file of weights, and the settings of the config.json beside it, if any.

    UsageError: no AutoencoderKL, or one that LDM's autoencoder cannot express. RunError: the file is damaged.
    """
    content: dict[str, Any] = {}
    for file in _files(path) if path.suffix == ".json" else [path]:
        content |= read_mapping(file)
    if (found := _WEIGHTS.fullmatch(path.name)) and (variant := found["first"] or found["second"]):
        note_once(f"{path} is read: weights of the kind {variant}")
    return to_ldm_names(bare_state(content, MARK)[0], str(path)), _settings(path.parent / CONFIG_NAME)


def _files(index: Path) -> list[Path]:
    """The files that an index names, which lie beside it."""
    names = sorted(set(read_json(index, _Index, remedy="fetch it anew").weight_map.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UsageError(
                f"{index} names {name}, which does not lie beside it; needed are all of its {len(names)} files"
            )
    return [index.parent / name for name in names]


def published_scale(path: str | Path) -> str:
    """How a generator's run on latents of the AutoencoderKL at `path` gets their scale; empty where it is not known."""
    file = find(path) or Path(path)
    settings = _settings(file.parent / CONFIG_NAME) if file.is_file() else DiffusersSettings()
    shift, scale = settings.shift_factor, settings.scaling_factor
    if scale is None:
        return ""
    if shift:
        return (
            f"its latents are published as (z - {shift:g}) * {scale:g}; data.normalize (the default) does that per "
            "channel, from the latents' own statistics"
        )
    return (
        f"scaling_factor {scale:g}: its latents are published with data.normalize off and --data.multiplier {scale:g} "
        "(the recipes on SD-VAE have 0.18215)"
    )


def to_ldm_names(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The tensors of an AutoencoderKL under LDM's names, attention as 1x1 convolutions.

    Without quantisation convolutions (Stable Diffusion 3, FLUX) the identity takes their place, which changes no bit.
    """
    if MARK not in state:
        first = next(iter(state), "none")
        raise UsageError(f"{origin}: tensor {MARK} is missing (its first tensor is {first}); name an {CLASS_NAME}")
    if not any(".mid_block.attentions." in name for name in state):
        raise UsageError(f"{origin} has no attention in the middle (mid_block_add_attention false), which is needed")
    levels = [int(found[1]) for name in state if (found := re.match(r"decoder\.up_blocks\.(\d{1,3})\.", name))]
    if not levels:
        raise UsageError(f"{origin} has no tensors decoder.up_blocks.0; name an {CLASS_NAME} that is whole")
    renamed = {}
    for name, tensor in state.items():
        is_linear = ".attentions." in name and name.endswith(".weight") and tensor.dim() == 2
        renamed[_ldm_name(name, 1 + max(levels))] = tensor[:, :, None, None] if is_linear else tensor
    latent_channels = (*renamed.get("decoder.conv_in.weight", torch.empty(0)).shape, 0, 0)[1]
    for name, channels in (("quant_conv", 2 * latent_channels), ("post_quant_conv", latent_channels)):
        if f"{name}.weight" not in renamed:
            renamed[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
            renamed[f"{name}.bias"] = torch.zeros(channels)
    return renamed


def _ldm_name(name: str, num_levels: int) -> str:
    """LDM's name of a tensor; one that neither knows stays as it is, and is refused where the model is filled."""
    name = _ATTENTION.sub(lambda found: f"attentions.{found[1]}.{_ATTENTION_NAMES[found[2]]}.{found[3]}", name)
    name = re.sub(r"mid_block\.resnets\.(\d{1,3})", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    # diffusers counts the decoder's levels as they come, LDM from the image's resolution
    name = re.sub(r"up_blocks\.(\d{1,3})", lambda found: f"up.{num_levels - 1 - int(found[1])}", name)
    for theirs, ours in (
        (".resnets.", ".block."),
        (".attentions.", ".attn."),
        (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."),
        (".conv_shortcut.", ".nin_shortcut."),
        (".conv_norm_out.", ".norm_out."),
    ):
        name = name.replace(theirs, ours)
    return name


@dataclass(frozen=True)
class _Index:
    """What is read of an .index.json."""

    weight_map: dict[str, str]


def _read_config(path: Path) -> dict[str, Any] | None:
    """The content of a config.json; None where there is none."""
    return read_json(path, dict[str, Any], remedy="fetch it anew") if path.is_file() else None


def _settings(path: Path) -> DiffusersSettings:
    """The settings that matter, checked; a config.json that is missing, or not diffusers', says nothing."""
    config = _read_config(path) or {}
    if "_class_name" not in config and "block_out_channels" not in config:
        return DiffusersSettings()
    for name, needed in (("act_fn", "silu"), ("mid_block_add_attention", True)):
        if config.get(name, needed) != needed:
            raise UsageError(f"{path}: {name} is {config[name]!r}; LDM's autoencoder has {needed!r} and no other")
    return checked(DiffusersSettings, config, str(path), error=UsageError)
