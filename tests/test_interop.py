"""Files of others, the authors' and diffusers': every hyper-parameter inferred, round trips, each way to be wrong."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_help import randomised
from safetensors.torch import save_file
from torch import Tensor

from vadit.commands import convert
from vadit.commands.common import load_tokenizer
from vadit.config import AutoencoderSpec, DiTSpec
from vadit.models import interop
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT, mlp_width
from vadit.models.interop_diffusers import published_scale
from vadit.runtime.errors import RunError, UsageError
from vadit.train.checkpoint.export import load_network

LIGHTNING = DiTSpec(input_size=4, patch_size=1, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=6)
PLAIN = dataclasses.replace(LIGHTNING, patch_size=2, swiglu=False, rope=False, rmsnorm=False)
DIT_SPECS = {
    "lightning_patch1": LIGHTNING,
    "qk_norm_patch2": dataclasses.replace(LIGHTNING, patch_size=2, qk_norm=True, num_heads=2),
    "plain": PLAIN,
    "plain_sigma": dataclasses.replace(PLAIN, learn_sigma=True, depth=3),
    "shift_free": dataclasses.replace(LIGHTNING, shift_free=True, num_classes=1000),
    "qk_norm_alone": dataclasses.replace(PLAIN, qk_norm=True, in_channels=5, mlp_ratio=2.5),
    "rmsnorm_alone": dataclasses.replace(PLAIN, rmsnorm=True),
    "swiglu_alone": dataclasses.replace(PLAIN, swiglu=True, mlp_ratio=3.0),
}
AUTOENCODER = AutoencoderSpec(
    image_size=256, latent_channels=4, base_channels=32, channel_multipliers=(1, 2, 1, 1, 2), num_res_blocks=1
)
UNATTENDING = dataclasses.replace(AUTOENCODER, channel_multipliers=(1, 2), attention_resolutions=())


def dit(spec: DiTSpec = LIGHTNING) -> LightningDiT:
    return randomised(LightningDiT(spec))


def predict(model: LightningDiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, model.spec.in_channels, 4, 4, generator=generator)
    with torch.no_grad():
        return model.forward_with_variance(x, torch.tensor([0.1, 0.8]), torch.tensor([0, model.num_classes]))


def autoencoder_checkpoint(spec: AutoencoderSpec = AUTOENCODER) -> tuple[Autoencoder, dict[str, Any]]:
    """A model, and what the authors' trainer would have saved of it."""
    model = randomised(Autoencoder(spec))
    extra = {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
        "foundation_model.model.cls_token": torch.zeros(1, 1, 8),
        "linear_proj.weight": torch.zeros(8, 4, 1, 1),
    }
    return model, {"state_dict": {**model.state_dict(), **extra}, "global_step": 7}


@pytest.mark.parametrize("name", DIT_SPECS)
def test_every_hyper_parameter_is_inferred(name: str) -> None:
    spec = DIT_SPECS[name]
    model = dit(spec)
    needed = None if spec.rope or spec.qk_norm else spec.num_heads
    loaded = interop.load_reference_dit({"ema": model.state_dict()}, num_heads=needed)
    assert loaded.spec == spec
    assert not loaded.training
    assert torch.equal(predict(loaded), predict(model))


@pytest.mark.parametrize("swiglu", [True, False])
def test_any_mlp_width_is_reproduced(swiglu: bool) -> None:
    spec = DiTSpec(hidden_size=44, num_heads=1, swiglu=swiglu)
    for width in range(1, 400):
        ratio = interop._infer_mlp_ratio(spec, width)
        assert mlp_width(dataclasses.replace(spec, mlp_ratio=ratio)) == width


def test_wrappers_precedence_and_copies(capsys) -> None:
    model, other = dit(), dit()
    with torch.no_grad():
        other.final_layer.linear.bias.add_(1.0)
    own, second = model.state_dict(), other.state_dict()
    prefixed = {f"module.{name}": tensor for name, tensor in own.items()}
    compiled = {f"_orig_mod.module.{name}": tensor for name, tensor in own.items()}
    for source in (
        {"model": second, "ema": own, "opt": {"state": {}}, "config": {"train": {"lr": 2e-4}}},
        {"model": prefixed},
        prefixed,
        compiled,
        {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in own.items()},
        {"module": {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in own.items()}, "epoch": 3},
        {"optimizer_states": {"state": {}}, "state_dict": {f"model.{name}": tensor for name, tensor in own.items()}},
        {name: tensor.double() for name, tensor in own.items()},
    ):
        assert torch.equal(predict(interop.load_reference_dit(source)), predict(model))
    assert "left out" not in capsys.readouterr().err
    raw = {f"online_model.{name}": tensor for name, tensor in second.items()} | {"initted": torch.tensor(True)}
    averaged = {f"ema_model.module.{name}": tensor for name, tensor in own.items()}
    projectors = {"projectors.0.0.weight": torch.zeros(2, 2), "projectors.0.0.bias": torch.zeros(2)}
    repa = {"ema": {f"net.{name}": tensor for name, tensor in (own | projectors).items()}}
    for source, said in ((raw | averaged, "39 of online_model, 1 of initted"), (repa, "2 of projectors")):
        assert torch.equal(predict(interop.load_reference_dit(source)), predict(model))
        assert said in capsys.readouterr().err
    state = dit().state_dict()
    loaded = interop.load_reference_dit(state)
    before = predict(loaded)
    state["final_layer.linear.bias"].add_(1.0)
    assert torch.equal(predict(loaded), before)


def test_number_of_heads() -> None:
    state = dit(PLAIN).state_dict()
    pytest.raises(UsageError, interop.load_reference_dit, state).match(r"neither RoPE nor QK-norm.*give --num-heads")
    with pytest.raises(UsageError, match=r"hidden_size 32 is not divisible by model\.num_heads 5"):
        interop.load_reference_dit(state, num_heads=5)
    with pytest.raises(UsageError, match=r"--num-heads is 2, but feat_rope\.freqs_cos .* says 4"):
        interop.load_reference_dit(dit().state_dict(), num_heads=2)


def without(name: str) -> Callable[[dict], None]:
    return lambda state: state.pop(name)


def replaced(name: str, *shape: int) -> Callable[[dict], None]:
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("x_embedder.proj.weight"), r"tensor x_embedder\.proj\.weight is missing"),
        (without("blocks.1.attn.qkv.bias"), r"tensor blocks\.1\.attn\.qkv\.bias of shape \(96,\) is missing"),
        (replaced("extra.weight", 3), r"unexpected tensor extra\.weight of shape \(3,\)"),
        (replaced("blocks.3.norm1.weight", 32), r"blocks\.2\.\.\.\. are missing"),
        (replaced("blocks.1.norm2.weight", 31), r"norm2\.weight has shape \(31,\), the model needs \(32,\)"),
        (replaced("final_layer.linear.weight", 4, 32), r"final_layer\.linear\.weight has 4 rows, needed are 3"),
        (replaced("pos_embed", 1, 15, 32), "pos_embed has 15 positions, needed is a square number"),
    ],
)
def test_the_first_bad_tensor_is_named(damage: Callable[[dict], None], message: str) -> None:
    state = dict(dit().state_dict())
    damage(state)
    with pytest.raises(UsageError, match=message) as error:
        interop.load_reference_dit({"ema": state})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        AUTOENCODER,
        dataclasses.replace(AUTOENCODER, attention_resolutions=(32, 16)),
        dataclasses.replace(UNATTENDING, num_res_blocks=2, in_channels=1),
    ],
    ids=["f16", "two_levels", "no_attention"],
)
def test_autoencoder_is_inferred(spec: AutoencoderSpec) -> None:
    model, checkpoint = autoencoder_checkpoint(spec)
    loaded = interop.load_reference_autoencoder(checkpoint)
    assert loaded.spec == spec
    x = torch.rand(1, spec.in_channels, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded.encode(x).mean, model.encode(x).mean)
        z = model.encode(x).mode()
        assert torch.equal(loaded.decode(z), model.decode(z))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("encoder.conv_in.weight"), r"tensor encoder\.conv_in\.weight is missing"),
        (replaced("encoder.down.1.block.0.conv1.weight", 40, 32, 3, 3), "is 40 wide, needed is a multiple of 32"),
        (replaced("quant_conv.weight", 4, 8, 1, 1), r"quant_conv\.weight has shape \(4, 8, 1, 1\), the model needs"),
    ],
)
def test_bad_autoencoder_is_named(damage: Callable[[dict], None], message: str) -> None:
    _, checkpoint = autoencoder_checkpoint()
    damage(checkpoint["state_dict"])
    pytest.raises(UsageError, interop.load_reference_autoencoder, checkpoint).match(message)


def test_import_and_export(tmp_path: Path) -> None:
    model = dit(DIT_SPECS["plain"])
    tokenizer, checkpoint = autoencoder_checkpoint()
    torch.save({"model": model.state_dict(), "ema": model.state_dict(), "config": {"a": [1, "b"]}}, tmp_path / "dit.pt")
    torch.save(checkpoint, tmp_path / "vae.pt")
    for name in ("dit", "vae"):
        interop.load_foreign(tmp_path / f"{name}.pt", num_heads=4).save_pretrained(tmp_path / name)
    assert torch.equal(predict(LightningDiT.from_pretrained(tmp_path / "dit")), predict(model))
    assert Autoencoder.from_pretrained(tmp_path / "vae").spec == tokenizer.spec

    for name in ("dit", "vae"):
        interop.save_reference(load_network(tmp_path / name), tmp_path / "back" / f"{name}.pt")
    back = torch.load(tmp_path / "back" / "dit.pt", weights_only=True)
    assert list(back) == ["ema"]
    assert back["ema"].keys() == model.state_dict().keys()
    assert all(torch.equal(back["ema"][name], tensor) for name, tensor in model.state_dict().items())
    for lost, words in (
        (Autoencoder(dataclasses.replace(AUTOENCODER, norm_groups=16)), r"autoencoder\.norm_groups is 16 .*means 32"),
        (
            LightningDiT(dataclasses.replace(LIGHTNING, value_residual=True)),
            r"model\.value_residual is True .*means False",
        ),
    ):
        with pytest.raises(UsageError, match=rf"cannot say that {words}\); set --format vadit"):
            interop.save_reference(lost, tmp_path / "back" / "lost.pt")
    for spec in DIT_SPECS.values():  # what training alone needs and the MLP's ratio are no loss
        own = dataclasses.replace(spec, class_dropout=0.0, label_init_std=1.0, mlp_ratio=2.3)
        interop.save_reference(LightningDiT(own), tmp_path / "back" / "dit.pt")
    again = interop.load_reference_autoencoder(tmp_path / "back" / "vae.pt")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tokenizer.state_dict().items())
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"dit.pt", "vae.pt"}


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    model = dit()
    torch.save({"ema": model.state_dict()}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-3000])
    with pytest.raises(RunError, match=r"cut\.pt cannot be read as a torch checkpoint; it is truncated or damaged"):
        interop.load_reference_dit(tmp_path / "cut.pt")
    torch.save({"ema": model.state_dict(), "config": Path("x")}, tmp_path / "object.pt")
    with pytest.raises(UsageError, match=r"object\.pt was refused: it wants to run code .*\(pathlib"):
        interop.load_reference_dit(tmp_path / "object.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    pytest.raises(UsageError, interop.load_foreign, tmp_path / "other.pt").match(r"other\.pt is neither a generator")
    assert not (tmp_path / "out").exists()


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
    folder = write(tmp_path / "vae", state_of(model, names))
    autoencoder = interop.load_diffusers_autoencoder(folder)
    assert autoencoder.spec == model.spec and not autoencoder.training
    assert "--data.multiplier 0.18215" in published_scale(folder)
    check(autoencoder, model)


def test_attention_as_convolutions_and_half_precision(tmp_path: Path) -> None:
    model = network().half().float()
    state = {
        name: (tensor[:, :, None, None] if ".query.weight" in name else tensor).half()
        for name, tensor in state_of(model, OLD_NAMES).items()
    }
    folder = write(tmp_path / "vae", state, name="diffusion_pytorch_model.fp16.safetensors")
    autoencoder = interop.load_diffusers_autoencoder(folder)
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
    autoencoder = interop.load_diffusers_autoencoder(folder)
    check(autoencoder, model)
    assert "(z - 0.0609) * 1.5305" in published_scale(folder)


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
        ({"_class_name": "VQModel"}, "describes a .VQModel. of diffusers"),
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
