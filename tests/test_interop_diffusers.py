"""AutoencoderKL of diffusers: equal to a straightforward implementation, every form of its files, refusals."""

from __future__ import annotations

from pathlib import Path

import diffusers_files
import pytest
import torch
from diffusers_files import GROUPS, LATENT, NEW_NAMES, OLD_NAMES, make_state, write
from safetensors.torch import save_file
from torch import Tensor

from vadit.commands import convert
from vadit.commands.common import load_tokenizer
from vadit.config import AutoencoderSpec
from vadit.models import interop
from vadit.models.autoencoder import Autoencoder
from vadit.runtime.errors import RunError, UsageError


def images(size: int = 16) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def check(autoencoder: Autoencoder, state: dict[str, Tensor]) -> None:
    """Moments and reconstruction are those of the straightforward implementation in float64."""
    x = images()
    with torch.no_grad():
        found = autoencoder.moments(x)
        expected = diffusers_files.moments(state, x.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        z = expected[:, :LATENT].float()
        torch.testing.assert_close(
            autoencoder.decode(z).double(), diffusers_files.decode(state, z.double()), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("attending", [(), (1, 2)], ids=["plain", "attending_levels"])
@pytest.mark.parametrize("names", [NEW_NAMES, OLD_NAMES], ids=["new", "old"])
def test_moments_and_pictures_are_equal(tmp_path: Path, names: tuple[str, ...], attending: tuple[int, ...]) -> None:
    state = make_state(names, attending=attending)
    autoencoder, settings = interop.load_diffusers_autoencoder(write(tmp_path / "vae", state))
    spec = autoencoder.spec
    assert (spec.image_size, spec.latent_channels, spec.norm_groups, spec.num_res_blocks) == (64, LATENT, GROUPS, 2)
    assert (spec.base_channels, spec.channel_multipliers) == (8, (1, 2, 2))
    assert spec.attention_resolutions == tuple(64 >> level for level in attending)
    assert settings.scaling_factor == 0.18215 and "--data.multiplier 0.18215" in settings.advice()
    assert not autoencoder.training
    check(autoencoder, state)


def test_attention_as_convolutions_and_half_precision(tmp_path: Path) -> None:
    state = {
        name: (tensor[:, :, None, None] if ".query.weight" in name else tensor).half()
        for name, tensor in make_state(OLD_NAMES).items()
    }
    folder = write(tmp_path / "vae", state, name="diffusion_pytorch_model.fp16.safetensors")
    autoencoder, _ = interop.load_diffusers_autoencoder(folder)
    assert autoencoder.dtype == torch.float32
    check(autoencoder, state)


def test_without_quantisation_convolutions(tmp_path: Path) -> None:
    state = make_state(quant=False)
    folder = write(tmp_path / "vae", state, shift_factor=0.0609, scaling_factor=1.5305)
    autoencoder, settings = interop.load_diffusers_autoencoder(folder)
    check(autoencoder, state)
    assert "(z - 0.0609) * 1.5305" in settings.advice()


@pytest.mark.parametrize("form", ["folder", "pipeline", "bin", "file", "renamed"])
def test_every_form_is_a_tokenizer(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state()
    path = folder = tmp_path / "download"
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
    check(tokenizer, state)
    convert.import_command(convert.ImportOptions(source=str(path), out=str(tmp_path / "ours")))
    printed = capsys.readouterr().out
    assert "a tokenizer" in printed and "data.normalize off and --data.multiplier 0.18215" in printed
    check(Autoencoder.from_pretrained(tmp_path / "ours"), state)


def test_the_authors_file_is_a_tokenizer_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = AutoencoderSpec(latent_channels=2, base_channels=32, channel_multipliers=(1, 1), attention_resolutions=())
    tokenizer = Autoencoder(spec).eval()
    torch.save({"state_dict": tokenizer.state_dict()}, tmp_path / "vae.ckpt")
    loaded = load_tokenizer(str(tmp_path / "vae.ckpt"), torch.device("cpu"))
    assert loaded.spec == spec
    with torch.no_grad():
        assert torch.equal(loaded.moments(images()), tokenizer.moments(images()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "VQModel"}, "describes a VQModel of diffusers"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; LDM's autoencoder has 'silu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"norm_num_groups": "4"}, "norm_num_groups is '4'; needed is a whole number"),
        ({"norm_num_groups": 3}, "norm_groups 3 does not divide"),
        ({"scaling_factor": "large"}, "scaling_factor is 'large'; needed is a number"),
        ({"sample_size": 30}, "image_size 30 is not divisible by the downsample ratio 4"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        interop.load_diffusers_autoencoder(write(tmp_path / "vae", make_state(), **changes))


def test_bad_files_are_named(tmp_path: Path) -> None:
    state = make_state()
    folder = write(tmp_path / "vae", state)
    weights = folder / "diffusion_pytorch_model.safetensors"
    without = {name: tensor for name, tensor in state.items() if name != "decoder.up_blocks.1.resnets.0.conv1.bias"}
    save_file(without, weights)
    with pytest.raises(UsageError, match=r"tensor decoder\.up\.1\.block\.0\.conv1\.bias .* is missing"):
        interop.load_diffusers_autoencoder(folder)
    save_file({**state, "encoder.extra.weight": torch.zeros(2)}, weights)
    with pytest.raises(UsageError, match=r"unexpected tensor encoder\.extra\.weight"):
        interop.load_diffusers_autoencoder(folder)
    save_file({name: tensor for name, tensor in state.items() if "attentions" not in name}, weights)
    with pytest.raises(UsageError, match=r"has no attention in the middle"):
        interop.load_diffusers_autoencoder(folder)
    save_file({"weight": torch.zeros(1)}, weights)
    with pytest.raises(UsageError, match=r"conv1\.weight is missing \(its first tensor is weight\)"):
        interop.load_diffusers_autoencoder(folder)
    save_file(state, weights)
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"diffusion_pytorch_model\.safetensors cannot be read"):
        load_tokenizer(str(folder), torch.device("cpu"))
    weights.unlink()
    with pytest.raises(UsageError, match=r"holds no diffusion_pytorch_model\.safetensors or"):
        load_tokenizer(str(folder), torch.device("cpu"))
    (folder / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is not valid JSON"):
        load_tokenizer(str(folder), torch.device("cpu"))
    with pytest.raises(UsageError, match=r"is no run folder"):
        load_tokenizer(str(tmp_path / "absent"), torch.device("cpu"))
