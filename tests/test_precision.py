"""What fp32, TF32 and bf16 mean, and who computes in what: seen from inside the networks."""

import copy
import json
from pathlib import Path

import pytest
import torch
from latent_files import TOKENIZER, write_images
from model_help import randomised
from torch import nn
from torch._dynamo.testing import CompileCounter

from vadit.config import DiTSpec, FlowSpec, FoundationSpec, SampleSpec
from vadit.eval.tokenizer import evaluate_tokenizer
from vadit.latents.encode import encode
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT
from vadit.models.foundation import FoundationModel
from vadit.runtime import precision
from vadit.runtime.errors import UsageError
from vadit.runtime.precision import allow_tf32, computing, resolved
from vadit.sampling.draw import decode, draw, pays_to_compile
from vadit.sampling.write import write_samples

PIXELS = torch.arange(2 * 3 * 16 * 16, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(2, 3, 16, 16)


def _state() -> tuple[bool, bool]:
    """Whether matrix products and convolutions may be TF32, as torch's own code asks."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def _record(network: nn.Module) -> list[tuple[tuple[bool, bool], torch.dtype]]:
    """What each part of a network with weights of its own sees while it runs, and the type of its weights."""
    seen: list[tuple[tuple[bool, bool], torch.dtype]] = []
    for part in network.modules():
        if [*part.parameters(recurse=False)]:
            part.register_forward_hook(lambda part, *_: seen.append((_state(), next(part.parameters()).dtype)))
    return seen


@pytest.fixture
def _gpu(monkeypatch):
    """A device that has TF32, in the midst of a training that allows it to convolutions alone."""
    monkeypatch.setattr(precision, "_has_tf32", lambda device: True)
    allow_tf32("convolutions")
    yield
    allow_tf32("convolutions")  # torch's default


def test_a_block_computes_as_it_says_and_leaves_what_was(_gpu):
    wanted = {"fp32": (False, False), "tf32": (True, True), "bf16": (False, False)}
    for outer, inner in (("fp32", "tf32"), ("tf32", "bf16"), ("bf16", "fp32")):
        with computing(outer, "cuda"):
            assert _state() == wanted[outer]
            with pytest.raises(KeyError), computing(inner, "cuda"):
                assert _state() == wanted[inner]
                raise KeyError
            assert _state() == wanted[outer]
        assert _state() == (False, True)
    allow_tf32("none")
    assert _state() == (False, False) and resolved("auto", torch.device("cuda"), generator=True) == "tf32"


def test_a_cpu_has_no_tf32():
    cpu = torch.device("cpu")
    with computing("tf32", cpu):
        assert torch.get_float32_matmul_precision() == "highest"
    assert resolved("auto", cpu, generator=True) == "fp32" == resolved("auto", torch.device("cuda"))
    pytest.raises(UsageError, resolved, "tf32", cpu).match("--evaluation.precision. fp32, bf16 or auto")


@pytest.mark.parametrize("chosen", ["fp32", "tf32", "bf16"])
def test_each_network_computes_in_its_own_precision(chosen, tmp_path: Path, _gpu):
    autoencoder = Autoencoder(TOKENIZER).eval()
    foundation = FoundationModel(FoundationSpec(name="test_vit", weights="random"), 2)
    spec = DiTSpec(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=2)
    generator = randomised(LightningDiT(spec))
    allowed, dtype = chosen == "tf32", torch.bfloat16 if chosen == "bf16" else torch.float32
    own, fp32, tf32 = {((allowed, allowed), dtype)}, {((False, False), torch.float32)}, {((True, True), torch.float32)}
    networks = {"encoder": autoencoder.encoder, "decoder": autoencoder.decoder}
    networks |= {"generator": generator, "foundation": foundation.model}
    seen = {name: _record(network) for name, network in networks.items()}

    def found(name: str) -> set:
        values = set(seen[name])
        seen[name].clear()
        return values

    (part,) = draw(generator, SampleSpec(num_steps=2, cfg_scale=2.0), num_samples=2, precision=chosen)
    assert found("generator") == own and part.latents.dtype == torch.float32
    decode(autoencoder, torch.zeros(2, autoencoder.spec.latent_channels, 4, 4))
    assert found("decoder") == fp32
    images = write_images(tmp_path / "images")
    encode(autoencoder, images, tmp_path / "out", batch_size=4, num_workers=1, features=foundation, precision=chosen)
    assert found("encoder") == own and found("foundation") == tf32
    evaluate_tokenizer(autoencoder, [PIXELS], precision=chosen)
    assert found("encoder") == own == found("decoder")
    assert _state() == (False, True) and next(autoencoder.parameters()).dtype == torch.float32


class _Rounded(nn.Module):
    """A bf16 network whose output is fp32 before a solver sees it."""

    def __init__(self, network: LightningDiT) -> None:
        super().__init__()
        self.network, self.spec, self.num_classes = copy.deepcopy(network).bfloat16(), network.spec, 2

    def forward(self, x, t, labels, **options):
        assert x.dtype == t.dtype == torch.float32
        return self.network(x, t, labels, **options).float()

    def forward_with_variance(self, x, t, labels):
        return self(x, t, labels, with_variance=True)


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5", "euler_maruyama", "ddpm"])
@pytest.mark.parametrize("guided", ["null label", "network"])
def test_a_bf16_network_leaves_state_and_sums_in_fp32(method, guided):
    spec = DiTSpec(input_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=2, learn_sigma=True)
    network, flow = randomised(LightningDiT(spec)), FlowSpec(objective="ddpm" if method == "ddpm" else "flow")
    sampler = SampleSpec(method=method, num_steps=4, cfg_scale=2.0, cfg_interval=(0.5, 1.0), cfg_channels=3, rtol=0.1)
    drawn = []
    for model, chosen in ((network, "bf16"), (_Rounded(network), "fp32"), (network, "fp32")):
        guide = model if guided == "network" else None
        (part,) = draw(model, sampler, num_samples=2, flow=flow, guide=guide, precision=chosen)
        drawn.append(part.latents)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert (drawn[0] - drawn[2]).abs().max() < 0.1 * drawn[2].abs().max()


def test_a_folder_holds_samples_of_one_arithmetic(tmp_path: Path, monkeypatch):
    spec = DiTSpec(input_size=4, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=2)
    torch.manual_seed(0)
    model, autoencoder = randomised(LightningDiT(spec)), Autoencoder(TOKENIZER).eval()
    sampler = SampleSpec(num_steps=5, cfg_scale=2.0, cfg_interval=(0.5, 1.0))
    graphs = CompileCounter()
    as_it_is = torch.compile
    monkeypatch.setattr(torch, "compile", lambda part, **options: as_it_is(part, backend=graphs, **options))

    def write(out: Path, num_samples: int, chosen: str, compiled: bool | str = "auto") -> int:
        graphs.clear()
        torch._dynamo.reset()
        own, mean, std = copy.deepcopy(model), torch.zeros(3), torch.ones(3)
        arithmetic = {"precision": chosen, "compiled": compiled}
        with torch._dynamo.config.patch(recompile_limit=1):  # raised for what is compiled
            write_samples(out, own, autoencoder, sampler, num_samples=num_samples, mean=mean, std=std, **arithmetic)
        return graphs.frame_count

    def settings() -> dict:
        return json.loads((tmp_path / "old" / "settings.json").read_text())

    assert write(tmp_path / "old", 2, "fp32") == 0
    old = settings()
    assert (old.pop("precision"), old.pop("compile")) == ("fp32", False)
    (tmp_path / "old" / "settings.json").write_text(json.dumps(old))  # as it was before there were others
    assert write(tmp_path / "old", 3, "fp32") == 0
    refused = r"made with precision 'fp32', .* 'bf16'; set it as it was, set --out to another folder, or"
    pytest.raises(UsageError, write, tmp_path / "old", 4, "bf16").match(refused)
    pytest.raises(UsageError, write, tmp_path / "old", 4, "fp32", True).match("made with compile False")
    with monkeypatch.context() as patch:
        patch.setattr(precision, "_has_tf32", lambda device: True)
        pytest.raises(UsageError, write, tmp_path / "old", 4, "auto").match("precision 'fp32', auto takes here 'tf32'")

    # for each number of rows, with and without guidance, a graph of the first block, to which none leaves a branch to
    # close, and one of all others; auto goes on so
    assert write(tmp_path / "new", 2, "bf16", True) == 4 and write(tmp_path / "new", 70, "bf16") == 4
    pytest.raises(UsageError, write, tmp_path / "new", 70, "bf16", False).match("made with compile True")


def test_auto_compiles_where_it_pays(monkeypatch):
    euler = SampleSpec(method="euler", num_steps=250)
    ask = [(euler, 50_000, "bf16"), (euler, 50_000, "tf32"), (euler, 1_000, "bf16"), (euler, 50_000, "fp32"),
           (SampleSpec(method="dopri5"), 50_000, "bf16")]  # fmt: skip
    assert not any(pays_to_compile(None, *each) for each in ask)
    monkeypatch.setattr("vadit.sampling.draw.device_of", lambda model: torch.device("cuda"))
    assert [pays_to_compile(None, *each) for each in ask] == [True, True, False, False, False]
