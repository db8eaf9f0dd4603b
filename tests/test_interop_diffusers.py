"""AutoencoderKL of diffusers: the same network under our names, every form of its files, refusals."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vadit.commands import convert
from vadit.commands.common import load_tokenizer
from vadit.config import AutoencoderSpec
from vadit.models import interop
from vadit.models.autoencoder import Autoencoder
from vadit.runtime.errors import RunError, UsageError

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


def check(found: Autoencoder, expected: Autoencoder) -> None:
    """The same network, to the bit."""
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        moments = expected.moments(x)
        assert torch.equal(found.moments(x), moments)
        z = moments.chunk(2, dim=1)[0]
        assert torch.equal(found.decode(z), expected.decode(z))


@pytest.mark.parametrize("resolutions", [(), (32, 16)], ids=["plain", "attending_levels"])
@pytest.mark.parametrize("names", [NEW_NAMES, OLD_NAMES], ids=["new", "old"])
def test_network_is_found_again(tmp_path: Path, names: tuple[str, ...], resolutions: tuple[int, ...]) -> None:
    model = network(attention_resolutions=resolutions)
    autoencoder, settings = interop.load_diffusers_autoencoder(write(tmp_path / "vae", state_of(model, names)))
    assert autoencoder.spec == model.spec and not autoencoder.training
    assert settings.scaling_factor == 0.18215 and "--data.multiplier 0.18215" in settings.advice()
    check(autoencoder, model)


def test_attention_as_convolutions_and_half_precision(tmp_path: Path) -> None:
    model = network().half().float()
    state = {
        name: (tensor[:, :, None, None] if ".query.weight" in name else tensor).half()
        for name, tensor in state_of(model, OLD_NAMES).items()
    }
    folder = write(tmp_path / "vae", state, name="diffusion_pytorch_model.fp16.safetensors")
    autoencoder, _ = interop.load_diffusers_autoencoder(folder)
    assert autoencoder.dtype == torch.float32
    check(autoencoder, model)


@pytest.mark.parametrize("name", ["bf16.safetensors", "non_ema.bin", "safetensors.index.json", "bin.index.fp16.json"])
def test_weights_of_other_kinds_and_in_several_files(tmp_path: Path, name: str, capsys) -> None:
    model, index = network().bfloat16().float(), "index" in name
    state, weights = (
        {key: value.bfloat16() for key, value in state_of(model).items()},
        f"diffusion_pytorch_model.{name}",
    )
    folder = write(tmp_path / "vae", {} if index else state, name=weights)
    if index:
        ending = "safetensors" if "safetensors" in name else "bin"
        places = {key: f"diffusion_pytorch_model-{1 + len(key) % 2:05}-of-00002.{ending}" for key in state}
        for place in set(places.values()):
            part = {key: value for key, value in state.items() if places[key] == place}
            save_file(part, folder / place) if ending == "safetensors" else torch.save(part, folder / place)
        (folder / weights).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    check(load_tokenizer(str(folder), torch.device("cpu")), model)
    said = capsys.readouterr().err
    assert ("weights of the kind" in said) == (name != "safetensors.index.json")
    if index:
        for bad in ("../other.bin", "gone.bin"):
            (folder / weights).write_text(json.dumps({"weight_map": places | {"extra": bad}}))
            with pytest.raises(UsageError, match=f"names {bad}, which does not lie beside it; needed are all of its 3"):
                interop.load_diffusers_autoencoder(folder)
    elif name == "non_ema.bin":  # once there are others, they are not taken
        write(tmp_path / "whole", state_of(network()))
        (folder / weights).rename(tmp_path / "whole" / weights)
        check(load_tokenizer(str(tmp_path / "whole"), torch.device("cpu")), network())


def test_without_quantisation_convolutions(tmp_path: Path) -> None:
    model = network(quant=False)
    state = {name: tensor for name, tensor in state_of(model).items() if "quant_conv" not in name}
    folder = write(tmp_path / "vae", state, shift_factor=0.0609, scaling_factor=1.5305)
    autoencoder, settings = interop.load_diffusers_autoencoder(folder)
    check(autoencoder, model)
    assert "(z - 0.0609) * 1.5305" in settings.advice()


@pytest.mark.parametrize("form", ["folder", "pipeline", "bin", "file", "renamed"])
def test_every_form_is_a_tokenizer(tmp_path: Path, form: str, capsys) -> None:
    model = network()
    state, path, folder = state_of(model), tmp_path / "download", tmp_path / "download"
    if form == "pipeline":
        write(folder / "vae", state)
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    elif form == "bin":
        write(folder, state, name="diffusion_pytorch_model.bin")
    elif form == "renamed":
        path = write(folder, {}) / "sd-vae.safetensors"
        save_file(state, path)
        (folder / "diffusion_pytorch_model.safetensors").unlink()
    else:
        write(folder, state)
        path = folder / "diffusion_pytorch_model.safetensors" if form == "file" else folder
    tokenizer = load_tokenizer(str(path), torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    check(tokenizer, model)
    convert.import_command(convert.ImportOptions(source=str(path), out=str(tmp_path / "ours")))
    printed = capsys.readouterr().out
    assert "a tokenizer" in printed and "data.normalize off and --data.multiplier 0.18215" in printed
    check(Autoencoder.from_pretrained(tmp_path / "ours"), model)


def test_the_authors_file_is_a_tokenizer_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = AutoencoderSpec(latent_channels=2, base_channels=32, channel_multipliers=(1, 1, 1), attention_resolutions=())
    tokenizer = Autoencoder(spec).eval()
    torch.save({"state_dict": tokenizer.state_dict()}, tmp_path / "vae.ckpt")
    check(load_tokenizer(str(tmp_path / "vae.ckpt"), torch.device("cpu")), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "VQModel"}, "describes a VQModel of diffusers"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; LDM's autoencoder has 'silu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"norm_num_groups": "4"}, "norm_num_groups: Input should be a valid integer \\(found '4'\\)"),
        ({"sample_size": 30}, "image_size 30 is not divisible by the downsample ratio 4"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        interop.load_diffusers_autoencoder(write(tmp_path / "vae", state_of(network()), **changes))


def test_bad_files_are_named(tmp_path: Path) -> None:
    state = state_of(network())
    folder = write(tmp_path / "vae", state)
    weights = folder / "diffusion_pytorch_model.safetensors"
    for content, message in (
        ({name: state[name] for name in state if "attentions" not in name}, "has no attention in the middle"),
        ({"weight": torch.zeros(1)}, r"conv1\.weight is missing \(its first tensor is weight\)"),
    ):
        save_file(content, weights)
        pytest.raises(UsageError, interop.load_diffusers_autoencoder, folder).match(message)
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"diffusion_pytorch_model\.safetensors cannot be read"):
        load_tokenizer(str(folder), torch.device("cpu"))
    weights.unlink()
    (folder / "diffusion_flax_model.msgpack").write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"holds config\.json, diffusion_flax_model\.msgpack; needed is .*\.safetensors"
    ):
        load_tokenizer(str(folder), torch.device("cpu"))
    (folder / "config.json").write_text("{")
    pytest.raises(RunError, load_tokenizer, str(folder), torch.device("cpu")).match(r"config\.json is not valid JSON")
