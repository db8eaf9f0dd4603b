"""A tiny AutoencoderKL in diffusers' form: our network, which test_autoencoder.py holds to its formulas, renamed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vadit.config import AutoencoderSpec
from vadit.models.autoencoder import Autoencoder

SPEC = AutoencoderSpec(
    image_size=64,
    latent_channels=3,
    base_channels=8,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(),
    norm_groups=4,
)
CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
NEW_NAMES = ("to_q", "to_k", "to_v", "to_out.0")
OLD_NAMES = ("query", "key", "value", "proj_attn")
State = dict[str, Tensor]


def network(*, attention_resolutions: tuple[int, ...] = (), quant: bool = True) -> Autoencoder:
    """With random biases and norms; without quantisation convolutions these change nothing."""
    torch.manual_seed(5)
    model = Autoencoder(dataclasses.replace(SPEC, attention_resolutions=attention_resolutions))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for conv in () if quant else (model.quant_conv, model.post_quant_conv):
            torch.nn.init.dirac_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
    return model.eval()


def state_of(model: Autoencoder, attention: tuple[str, ...] = NEW_NAMES) -> State:
    """The tensors by diffusers' names: decoder levels from the smallest on, attention as linear layers."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"\.up\.(\d)", lambda found: f".up_blocks.{2 - int(found[1])}", name)
        name = re.sub(r"\.down\.(\d)", r".down_blocks.\1", name)
        name = re.sub(r"\.mid\.block_(\d)", lambda found: f".mid_block.resnets.{int(found[1]) - 1}", name)
        name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
        name = name.replace(".block.", ".resnets.").replace(".attn.", ".attentions.").replace("sample.", "samplers.0.")
        name = name.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
        if ".attentions." in name:
            for ours, theirs in zip(("norm", "q", "k", "v", "proj_out"), ("group_norm", *attention), strict=True):
                name = name.replace(f".{ours}.", f".{theirs}.")
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        state[name] = tensor.clone()
    return state


def write(folder: Path, state: State, *, name: str = "diffusion_pytorch_model.safetensors", **changes: Any) -> Path:
    """A folder as diffusers' save_pretrained leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder
