"""AutoencoderKL of diffusers: the same network under our names, every form of its files, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers_files import NEW_NAMES, OLD_NAMES, network, state_of, write
from safetensors.torch import save_file

from vadit.commands import convert
from vadit.commands.common import load_tokenizer
from vadit.config import AutoencoderSpec
from vadit.models import interop
from vadit.models.autoencoder import Autoencoder
from vadit.runtime.errors import RunError, UsageError


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


def test_without_quantisation_convolutions(tmp_path: Path) -> None:
    model = network(quant=False)
    state = {name: tensor for name, tensor in state_of(model).items() if "quant_conv" not in name}
    folder = write(tmp_path / "vae", state, shift_factor=0.0609, scaling_factor=1.5305)
    autoencoder, settings = interop.load_diffusers_autoencoder(folder)
    check(autoencoder, model)
    assert "(z - 0.0609) * 1.5305" in settings.advice()


@pytest.mark.parametrize("form", ["folder", "pipeline", "bin", "file", "renamed"])
def test_every_form_is_a_tokenizer(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
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
        ({"norm_num_groups": "4"}, "norm_num_groups is '4'; needed is a whole number"),
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
        with pytest.raises(UsageError, match=message):
            interop.load_diffusers_autoencoder(folder)
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"diffusion_pytorch_model\.safetensors cannot be read"):
        load_tokenizer(str(folder), torch.device("cpu"))
    weights.unlink()
    with pytest.raises(UsageError, match=r"holds no diffusion_pytorch_model\.safetensors or"):
        load_tokenizer(str(folder), torch.device("cpu"))
    (folder / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is not valid JSON"):
        load_tokenizer(str(folder), torch.device("cpu"))
