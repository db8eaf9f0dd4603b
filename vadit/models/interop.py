"""Exchange with the authors' code: their released checkpoints in, and our models back into their format.

Tokenizers of the diffusers library come in, too (`vadit.models.interop_diffusers`).

Hyper-parameters are read off names and shapes of tensors, because their files carry none that can be relied on.
Tensor names are the same on both sides, so nothing is renamed on the way.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadit.config import AutoencoderSpec, DiTSpec
from vadit.models import interop_diffusers
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT, mlp_width
from vadit.models.masked import MaskedDiT
from vadit.models.pretrained import bare_state, build_model, read_mapping
from vadit.runtime.console import note_once
from vadit.runtime.errors import UsageError, naming
from vadit.runtime.files import saved_file

Source = str | Path | Mapping[str, Any]
State = dict[str, Tensor]
Model = LightningDiT | Autoencoder

DIT_MARK = "x_embedder.proj.weight"
AUTOENCODER_MARK = "encoder.conv_in.weight"


def load_reference_dit(source: Source, *, num_heads: int | None = None) -> LightningDiT:
    """A generator from the authors' file (or what it holds): {"ema": ...} before {"model": ...} before bare tensors.

    `num_heads` is needed only where neither RoPE buffers nor QK-norm give the head width. The label table's last row
    counts as the null class. Float32, on the CPU, in evaluation mode. Raises UsageError where tensors are missing,
    left over or misshapen, RunError where the file is damaged.
    """
    state, origin = _read(source, DIT_MARK)
    with naming(origin):
        spec = infer_dit_spec(state, num_heads)
    return build_model(lambda: LightningDiT(spec), state, origin)


def load_reference_autoencoder(source: Source) -> Autoencoder:
    """A tokenizer from the authors' file (or what it holds): {"state_dict": ...}; loss and foundation model dropped.

    Its image size is given as 256, at which the authors count. Float32, on the CPU, in evaluation mode.
    """
    state, origin = _read(source, AUTOENCODER_MARK)
    with naming(origin):
        spec = infer_autoencoder_spec(state)
    return build_model(lambda: Autoencoder(spec), state, origin)


def load_diffusers_autoencoder(path: str | Path) -> Autoencoder:
    """A tokenizer from diffusers' AutoencoderKL: its folder, a pipeline's, or the file of its weights.

    Float32, on the CPU, in evaluation mode. UsageError where it is no AutoencoderKL or tensors are missing, left over
    or misshapen, RunError where a file is damaged.
    """
    file = interop_diffusers.find(path) or Path(path)
    state, settings = interop_diffusers.read(file)
    with naming(file):
        spec = infer_autoencoder_spec(state, norm_groups=settings.norm_num_groups, image_size=settings.image_size)
    return build_model(lambda: Autoencoder(spec), state, str(file))


def load_foreign(source: str | Path, *, num_heads: int | None = None) -> Model:
    """The network in a file of the authors or in diffusers' AutoencoderKL, whichever is there."""
    if interop_diffusers.find(source) is None:
        state, _ = bare_state(read_mapping(source), DIT_MARK, AUTOENCODER_MARK, interop_diffusers.MARK)
        if DIT_MARK in state:
            return load_reference_dit(source, num_heads=num_heads)
        if AUTOENCODER_MARK not in state:
            raise UsageError(
                f"{source} is neither a generator (it has no tensor {DIT_MARK}) nor a tokenizer (no "
                f"{AUTOENCODER_MARK}); name a checkpoint of the authors, or an AutoencoderKL of diffusers"
            )
        if interop_diffusers.MARK not in state:
            return load_reference_autoencoder(source)
    return load_diffusers_autoencoder(source)


def save_reference(model: Model, path: str | Path) -> None:
    """Write a model as a file that the authors' code loads: {"ema": ...} or {"state_dict": ...}."""
    if isinstance(model, MaskedDiT):
        raise UsageError("the authors' format holds a LightningDiT, this is a masked generator; set --format vadit")
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    if lost := _lost(model.spec, state):
        raise UsageError(f"the authors' format cannot say that {', '.join(lost)}; set --format vadit")
    with saved_file(Path(path)) as partial:
        torch.save({"ema" if isinstance(model, LightningDiT) else "state_dict": state}, partial)


def _lost(spec: DiTSpec | AutoencoderSpec, state: State) -> list[str]:
    """Settings that are not what a reader of the tensors alone takes them for.

    Left out are those that training alone needs, what names the same network in other numbers, and what its reader is
    to know beside the file: image_size, and num_heads where no tensor shows it.
    """
    if isinstance(spec, DiTSpec):
        group, read = "model", vars(infer_dit_spec(state, spec.num_heads))
    else:
        groups, size = spec.norm_groups, spec.image_size
        group, read = "autoencoder", vars(infer_autoencoder_spec(state, norm_groups=groups, image_size=size))
        read = read | {"norm_groups": AutoencoderSpec.norm_groups}
    equal = ("class_dropout", "label_init_std", "mlp_ratio", "attention_resolutions")
    return [
        f"{group}.{name} is {value} (it means {read[name]})"
        for name, value in vars(spec).items()
        if name not in equal and value != read[name]
    ]


def _read(source: Source, mark: str) -> tuple[State, str]:
    """The state dict of the network with this tensor, and where it is from."""
    origin = "checkpoint" if isinstance(source, Mapping) else str(source)
    state, left_out = bare_state(source if isinstance(source, Mapping) else read_mapping(source), mark)
    if mark not in state:
        found = f"its first tensor is {next(iter(state))}" if state else "it holds no tensor"
        raise UsageError(f"{origin}: tensor {mark} is missing ({found}); name a checkpoint of the right kind")
    if left_out:
        note_once(f"{origin}: tensors left out, as they are of training or of another network: {left_out}")
    return state, origin


def _shape(state: State, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise UsageError(f"tensor {name} is missing; use a checkpoint of a matching model")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions:
        raise UsageError(f"tensor {name} has shape {shape}, needed are {dimensions} dimensions")
    return shape


def _count(state: State, pattern: str) -> int:
    """How many different numbers stand where `pattern` has its group; they have to be 0, 1, 2, ..."""
    numbers = {int(found.group(1)[:6]) for name in state if (found := re.match(pattern, name))}
    missing = next(index for index in range(len(numbers) + 1) if index not in numbers)
    if not numbers or missing < len(numbers):
        where = pattern.replace("\\", "").replace("(d+)", str(missing))
        raise UsageError(f"tensors {where}... are missing; use a checkpoint of a matching model")
    return len(numbers)


def infer_dit_spec(state: State, num_heads: int | None = None) -> DiTSpec:
    """Every hyper-parameter of a generator from its tensors (class dropout leaves no trace and keeps its default)."""
    hidden, channels, patch, _ = _shape(state, DIT_MARK, 4)
    num_tokens = _shape(state, "pos_embed", 3)[1]
    grid = math.isqrt(num_tokens)
    if grid * grid != num_tokens:
        raise UsageError(f"tensor pos_embed has {num_tokens} positions, needed is a square number")
    outputs = _shape(state, "final_layer.linear.weight", 2)[0]
    if outputs not in (patch**2 * channels, 2 * patch**2 * channels):
        raise UsageError(
            f"tensor final_layer.linear.weight has {outputs} rows, needed are {patch**2 * channels} "
            f"(or {2 * patch**2 * channels} with learned variance)"
        )
    modulation = _shape(state, "blocks.0.adaLN_modulation.1.weight", 2)[0]
    swiglu = "blocks.0.mlp.w12.weight" in state
    mlp_hidden = _shape(state, "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight", 2)[1]
    spec = DiTSpec(
        input_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=_count(state, r"blocks\.(\d+)\."),
        num_heads=_infer_heads(state, hidden, num_heads),
        num_classes=_shape(state, "y_embedder.embedding_table.weight", 2)[0] - 1,
        learn_sigma=outputs == 2 * patch**2 * channels,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        swiglu=swiglu,
        rope="feat_rope.freqs_cos" in state,
        rmsnorm="blocks.0.norm1.weight" in state,
        shift_free=modulation == 4 * hidden,
    )
    return dataclasses.replace(spec, mlp_ratio=_infer_mlp_ratio(spec, mlp_hidden))


def _infer_mlp_ratio(spec: DiTSpec, mlp_hidden: int) -> float:
    """A ratio whose MLP has exactly `mlp_hidden` units: the shortest decimal first, the two roundings by trial."""
    units = mlp_hidden * 1.5 if spec.swiglu else float(mlp_hidden)
    exact = [(units + slack) / spec.hidden_size for slack in (0.0, 0.5, 1.0, 1.5)]
    for ratio in (round(exact[0], 1), round(exact[0], 2), *exact):
        if ratio > 0 and mlp_width(dataclasses.replace(spec, mlp_ratio=ratio)) == mlp_hidden:
            return ratio
    raise UsageError(f"its MLP has {mlp_hidden} units, which no ratio to its width {spec.hidden_size} gives")


def _infer_heads(state: State, hidden: int, num_heads: int | None) -> int:
    known = (("feat_rope.freqs_cos", 2), ("blocks.0.attn.q_norm.weight", 1))
    source, dimensions = next((each for each in known if each[0] in state), ("", 0))
    if not source:
        if num_heads is None:
            raise UsageError(
                "it has neither RoPE nor QK-norm, so its tensors do not give the number of heads; give --num-heads "
                "(the paper: B 12, L 16, XL 16)"
            )
        return num_heads
    head_dim = _shape(state, source, dimensions)[-1]
    if head_dim == 0 or hidden % head_dim:
        raise UsageError(f"tensor {source} is {head_dim} wide, which does not divide the width {hidden}")
    if num_heads not in (None, hidden // head_dim):
        raise UsageError(f"--num-heads is {num_heads}, but {source} in it says {hidden // head_dim}; leave it out")
    return hidden // head_dim


def infer_autoencoder_spec(
    state: State, *, norm_groups: int = AutoencoderSpec.norm_groups, image_size: int = 256
) -> AutoencoderSpec:
    """Every hyper-parameter of a tokenizer from its tensors, but for the number of groups of its GroupNorms."""
    base, in_channels, _, _ = _shape(state, AUTOENCODER_MARK, 4)
    num_levels = _count(state, r"encoder\.down\.(\d+)\.")
    multipliers = []
    for level in range(num_levels):
        name = f"encoder.down.{level}.block.0.conv1.weight"
        width = _shape(state, name, 4)[0]
        if base == 0 or width % base:
            raise UsageError(f"tensor {name} is {width} wide, needed is a multiple of {base}")
        multipliers.append(width // base)
    attending = [level for level in range(num_levels) if f"encoder.down.{level}.attn.0.q.weight" in state]
    return AutoencoderSpec(
        image_size=image_size,
        in_channels=in_channels,
        latent_channels=_shape(state, "post_quant_conv.weight", 4)[0],
        base_channels=base,
        channel_multipliers=tuple(multipliers),
        num_res_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        attention_resolutions=tuple(image_size >> level for level in attending),
        norm_groups=norm_groups,
    )
