"""A tiny AutoencoderKL in diffusers' form, and what it computes, written down layer by layer and without classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

WIDTHS, LAYERS, LATENT, GROUPS = (8, 16, 16), 2, 3, 4
CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": list(WIDTHS),
    "down_block_types": ["DownEncoderBlock2D"] * len(WIDTHS),
    "in_channels": 3,
    "latent_channels": LATENT,
    "layers_per_block": LAYERS,
    "norm_num_groups": GROUPS,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * len(WIDTHS),
}
NEW_NAMES = ("to_q", "to_k", "to_v", "to_out.0")
OLD_NAMES = ("query", "key", "value", "proj_attn")
State = dict[str, Tensor]


def make_state(
    attention: tuple[str, ...] = NEW_NAMES, *, attending: tuple[int, ...] = (), quant: bool = True, bias: float = 0.3
) -> State:
    """Random tensors; `attending`: levels, counted from the image's resolution, with attention of their own."""
    generator = torch.Generator().manual_seed(5)
    state: State = {}

    def add(name: str, *shape: int) -> None:
        fan_in = max(int(torch.tensor(shape[1:]).prod()), 1)
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * bias

    def add_norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def add_resnet(name: str, before: int, after: int) -> None:
        add_norm(f"{name}.norm1", before)
        add(f"{name}.conv1", after, before, 3, 3)
        add_norm(f"{name}.norm2", after)
        add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            add(f"{name}.conv_shortcut", after, before, 1, 1)

    def add_attention(name: str, width: int) -> None:
        add_norm(f"{name}.group_norm", width)
        for part in attention:
            add(f"{name}.{part}", width, width)

    def add_middle(name: str) -> None:
        add_resnet(f"{name}.resnets.0", WIDTHS[-1], WIDTHS[-1])
        add_attention(f"{name}.attentions.0", WIDTHS[-1])
        add_resnet(f"{name}.resnets.1", WIDTHS[-1], WIDTHS[-1])

    last = len(WIDTHS) - 1
    add("encoder.conv_in", WIDTHS[0], 3, 3, 3)
    for level, width in enumerate(WIDTHS):
        block = f"encoder.down_blocks.{level}"
        for layer in range(LAYERS):
            add_resnet(f"{block}.resnets.{layer}", WIDTHS[max(level - 1, 0)] if layer == 0 else width, width)
            if level in attending:
                add_attention(f"{block}.attentions.{layer}", width)
        if level < last:
            add(f"{block}.downsamplers.0.conv", width, width, 3, 3)
    add_middle("encoder.mid_block")
    add_norm("encoder.conv_norm_out", WIDTHS[-1])
    add("encoder.conv_out", 2 * LATENT, WIDTHS[-1], 3, 3)
    add("decoder.conv_in", WIDTHS[-1], LATENT, 3, 3)
    add_middle("decoder.mid_block")
    for number, level in enumerate(range(last, -1, -1)):
        block, width = f"decoder.up_blocks.{number}", WIDTHS[level]
        for layer in range(LAYERS + 1):
            add_resnet(f"{block}.resnets.{layer}", WIDTHS[min(level + 1, last)] if layer == 0 else width, width)
            if level in attending:
                add_attention(f"{block}.attentions.{layer}", width)
        if level > 0:
            add(f"{block}.upsamplers.0.conv", width, width, 3, 3)
    add_norm("decoder.conv_norm_out", WIDTHS[0])
    add("decoder.conv_out", 3, WIDTHS[0], 3, 3)
    if quant:
        add("quant_conv", 2 * LATENT, 2 * LATENT, 1, 1)
        add("post_quant_conv", LATENT, LATENT, 1, 1)
    return state


def write(folder: Path, state: State, *, name: str = "diffusion_pytorch_model.safetensors", **changes: Any) -> Path:
    """A folder as diffusers' save_pretrained leaves it; a change of None leaves that setting out."""
    folder.mkdir(parents=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder


# ------------------------------------------------------------------------------------------------ what it computes


def moments(state: State, x: Tensor) -> Tensor:
    """Mean and log-variance of images (B, 3, H, W), in the dtype of both: (B, 2 LATENT, H/4, W/4)."""
    h = _conv(state, "encoder.conv_in", x, padding=1)
    for level in range(len(WIDTHS)):
        block = f"encoder.down_blocks.{level}"
        for layer in range(LAYERS):
            h = _resnet(state, f"{block}.resnets.{layer}", h)
            h = _attend(state, f"{block}.attentions.{layer}", h)
        if level < len(WIDTHS) - 1:
            padded = torch.zeros(*h.shape[:2], h.shape[2] + 1, h.shape[3] + 1, dtype=h.dtype)
            padded[:, :, :-1, :-1] = h
            h = _conv(state, f"{block}.downsamplers.0.conv", padded, stride=2)
    h = _middle(state, "encoder.mid_block", h)
    h = _conv(state, "encoder.conv_out", F.silu(_norm(state, "encoder.conv_norm_out", h)), padding=1)
    return _conv(state, "quant_conv", h) if "quant_conv.weight" in state else h


def decode(state: State, z: Tensor) -> Tensor:
    """Images (B, 3, 4h, 4w) of latents (B, LATENT, h, w)."""
    z = _conv(state, "post_quant_conv", z) if "post_quant_conv.weight" in state else z
    h = _middle(state, "decoder.mid_block", _conv(state, "decoder.conv_in", z, padding=1))
    for number in range(len(WIDTHS)):
        block = f"decoder.up_blocks.{number}"
        for layer in range(LAYERS + 1):
            h = _resnet(state, f"{block}.resnets.{layer}", h)
            h = _attend(state, f"{block}.attentions.{layer}", h)
        if number < len(WIDTHS) - 1:
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = _conv(state, f"{block}.upsamplers.0.conv", h, padding=1)
    return _conv(state, "decoder.conv_out", F.silu(_norm(state, "decoder.conv_norm_out", h)), padding=1)


def _middle(state: State, name: str, h: Tensor) -> Tensor:
    h = _resnet(state, f"{name}.resnets.0", h)
    return _resnet(state, f"{name}.resnets.1", _attend(state, f"{name}.attentions.0", h))


def _conv(state: State, name: str, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"].to(x), state[f"{name}.bias"].to(x), **options)


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    grouped = x.reshape(len(x), GROUPS, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    x = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    weight, bias = (state[f"{name}.{part}"].to(x)[:, None, None] for part in ("weight", "bias"))
    return x * weight + bias


def _resnet(state: State, name: str, x: Tensor) -> Tensor:
    h = _conv(state, f"{name}.conv1", F.silu(_norm(state, f"{name}.norm1", x)), padding=1)
    h = _conv(state, f"{name}.conv2", F.silu(_norm(state, f"{name}.norm2", h)), padding=1)
    return h + (_conv(state, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in state else x)


def _attend(state: State, name: str, x: Tensor) -> Tensor:
    """x plus attention over all positions, one head; x itself where there is none of this name."""
    if f"{name}.group_norm.weight" not in state:
        return x
    names = NEW_NAMES if f"{name}.to_q.weight" in state else OLD_NAMES
    tokens = _norm(state, f"{name}.group_norm", x).flatten(2).transpose(1, 2)
    q, k, v = (
        F.linear(tokens, state[f"{name}.{part}.weight"].to(x).flatten(1), state[f"{name}.{part}.bias"].to(x))
        for part in names[:3]
    )
    mixed = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    out = F.linear(mixed, state[f"{name}.{names[3]}.weight"].to(x).flatten(1), state[f"{name}.{names[3]}.bias"].to(x))
    return x + out.transpose(1, 2).reshape(x.shape)
