"""Other people's optimizers, float8 and attention: each runs where it is asked for, or one line says why it does not.

apex is played by a module that computes AdamW in torch ops; torchao is the real one, its kernels emulated or eager.
"""

import functools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_plain import BATCH, logged, tiny_dit, tiny_tokenizer

from vadit.config import DiTConfig, OptimizerSpec, vary
from vadit.models.dit import LightningDiT
from vadit.runtime.errors import UsageError
from vadit.train import dit, float8, optimizers, runs, tokenizer
from vadit.train.checkpoint import export

CPU = torch.device("cpu")


class FakeFusedAdam(torch.optim.Optimizer):
    """NVIDIA's as DeepSpeed and we see it: its signature, and a step count in the group instead of the state."""

    made: list["FakeFusedAdam"] = []  # noqa: RUF012
    scale = 1.0

    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: Any = (0.9, 0.999), eps: float = 1e-8,
        adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False, set_grad_none: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.made.append(self)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[weight]
                if not state:
                    state |= {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.addcdiv_(state["exp_avg"], root, value=-self.scale * group["lr"] / (1 - beta1**step))


@pytest.fixture
def apex(monkeypatch) -> type[FakeFusedAdam]:
    """An apex that is installed."""
    package, module = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    package.__path__ = []  # type: ignore[attr-defined]
    module.FusedAdam = FakeFusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(FakeFusedAdam, "made", [])
    return FakeFusedAdam


@pytest.fixture
def torchao() -> Iterator[Any]:
    """torchao, with its compiled step run eagerly: compiling takes half a minute."""
    module = pytest.importorskip("torchao", reason="torchao is not installed")
    torch.compiler.set_stance("force_eager")
    yield module
    torch.compiler.set_stance("default")


def with_kind(config: Any, kind: str) -> Any:
    return vary(config, optimizer={"kind": kind})


def chosen(folder: Path, setting: str) -> dict[str, str]:
    """What a run's folder says of a setting."""
    values: dict[str, str] = json.loads((folder / "backends.json").read_text())[setting]
    return values


def last_weights(folder: Path, ema: float | None = None) -> dict[str, torch.Tensor]:
    return runs.read_weights(folder, ema=ema)[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with nothing of other people's."""
    return dit.train(tiny_dit(tmp_path_factory.mktemp("plain"), precision="bf16"))


@pytest.mark.parametrize(
    ("setting", "wish", "instead"),
    [
        ("optimizer.kind", "apex_fused", "adamw"),
        ("engine.float8", "rowwise", "bf16"),
        ("engine.attention", "cudnn", "torch"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_changes_nothing(
    setting: str, wish: str, instead: str, plain: Path, tmp_path: Path, monkeypatch,
    capsys,
) -> None:  # fmt: skip
    for module in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    group, _, name = setting.partition(".")
    dit.train(vary(tiny_dit(tmp_path, precision="bf16"), **{group: {name: wish}}))
    (told,) = (line for line in capsys.readouterr().err.splitlines() if setting in line)
    assert told.startswith(f"{setting}: {wish} cannot be had here (") and told.endswith(f"using {instead} instead")
    assert chosen(tmp_path, setting)["name"] == instead
    assert logged(tmp_path) == logged(plain)


def test_attention_that_is_there_is_taken(plain: Path, tmp_path: Path, capsys) -> None:
    dit.train(tiny_dit(tmp_path, precision="bf16", attention="math"))
    assert "engine.attention" not in capsys.readouterr().err
    assert [chosen(run, "engine.attention")["name"] for run in (plain, tmp_path)] == ["torch", "math"]
    assert logged(tmp_path) == pytest.approx(logged(plain), rel=1e-2) and logged(tmp_path) != logged(plain)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_apex_is_really_called(zero_stage: int, tmp_path: Path, apex: type[FakeFusedAdam], capsys) -> None:
    dit.train(tiny_dit(tmp_path / "plain", zero_stage=zero_stage))
    assert not apex.made
    capsys.readouterr()
    dit.train(with_kind(tiny_dit(tmp_path / "apex", zero_stage=zero_stage), "apex_fused"))
    assert [adam.param_groups[0]["step"] for adam in apex.made] == [1, 4]  # the trial, and the run
    assert apex.made[1].param_groups[0]["weight_decay"] == 0.1
    assert "optimizer.kind" not in capsys.readouterr().err
    assert chosen(tmp_path / "apex", "optimizer.kind") == {
        "name": "apex_fused", "reason": "asked for", "refused": "", "left_out": ""
    }  # fmt: skip
    assert logged(tmp_path / "apex") == pytest.approx(logged(tmp_path / "plain"), rel=1e-5)


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path: Path, apex: type[FakeFusedAdam], monkeypatch) -> None:
    config = with_kind(tiny_dit(tmp_path), "apex_fused")
    dit.train(config)
    assert apex.made
    for module in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, module, None)
    told = r"step-\d+ holds the state of optimizer\.kind apex_fused, which adamw cannot go on from: apex_fused .*"
    with pytest.raises(UsageError, match=told + r"make apex_fused available, or .*--run\.init-from .*--run\.out"):
        dit.train(config)


def test_both_engines_have_apex_unless_it_steps_wrongly(tmp_path: Path, apex: type[FakeFusedAdam], monkeypatch) -> None:
    tokenizer.train(with_kind(tiny_tokenizer(tmp_path), "apex_fused"))
    assert [adam.param_groups[0]["step"] for adam in apex.made] == [1, 3, 1, 2]  # tried twice; the discriminator late
    assert chosen(tmp_path, "optimizer.kind")["name"] == "apex_fused"
    monkeypatch.setattr(apex, "scale", 0.5)
    weight = torch.nn.Parameter(torch.zeros(3))
    adam, choice = optimizers.build([weight], OptimizerSpec(kind="apex_fused"), device=CPU)
    assert isinstance(adam, optimizers.AdamW) and choice.name == "adamw"
    assert "its first step is 0.05 instead of 0.1" in choice.refused


def test_resume_goes_on_with_apex_and_refuses_without(tmp_path: Path, apex: type[FakeFusedAdam], monkeypatch) -> None:
    straight, resumed = (
        with_kind(tiny_dit(tmp_path / name, zero_stage=1), "apex_fused") for name in ("straight", "resumed")
    )
    dit.train(straight)
    dit.train(vary(resumed, run={"total_images": 2 * BATCH}))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "apex.optimizers", None)
        with pytest.raises(UsageError, match=r"kind apex_fused, which adamw cannot go on from: .*cannot be had"):
            dit.train(resumed)
    with pytest.raises(UsageError, match=r"optimizer\.kind 'apex_fused', this command says 'adamw'"):
        dit.train(with_kind(resumed, "adamw"))
    dit.train(resumed)
    assert apex.made[-1].param_groups[0]["step"] == 4  # it was restored, or the bias correction would start anew
    assert logged(tmp_path / "resumed") == logged(tmp_path / "straight")


def float8_dit(out: Path, recipe: str | None, *, mlp_ratio: float = 3.0, precision: str = "bf16") -> DiTConfig:
    """Hidden width 64, MLP 128: all multiples of 16 (with mlp_ratio 4 the MLP has 170)."""
    return vary(tiny_dit(out, precision=precision, float8=recipe), model={"mlp_ratio": mlp_ratio})


def converted(model: LightningDiT) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__.startswith("Float8")}


@pytest.mark.parametrize("recipe", ["fused", "rowwise", "tensorwise"])
def test_float8_changes_blocks_and_no_name(recipe: str, torchao: Any) -> None:
    model = LightningDiT(float8_dit(Path("unused"), None).model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: id(value) for name, value in model.named_parameters()}
    choice = float8.convert(model.blocks, recipe, rows=64, device=CPU, emulate=True)
    assert (choice.name, choice.refused, choice.left_out) == (recipe, "", "")
    layers = ("attn.qkv", "mlp") if recipe == "fused" else ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")
    assert converted(model) == {f"blocks.{index}.{layer}" for index in (0, 1) for layer in layers}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in model.named_parameters()} == parameters


def test_float8_names_what_it_leaves_out_or_refuses(torchao: Any, monkeypatch) -> None:
    model = LightningDiT(float8_dit(Path("unused"), None, mlp_ratio=4.0).model)
    choice = float8.convert(model.blocks, "rowwise", rows=64, device=CPU, emulate=True)
    assert converted(model) == {f"blocks.{index}.attn.{layer}" for index in (0, 1) for layer in ("qkv", "proj")}
    assert choice.left_out == "no multiples of 16, so in bf16: mlp.w12 (64 to 340), mlp.w3 (170 to 64)"
    monkeypatch.setattr(float8, "TOLERANCE", 0.01)
    model = LightningDiT(float8_dit(Path("unused"), None).model)
    choice = float8.convert(model.blocks, "rowwise", rows=64, device=CPU, emulate=True)
    assert choice.name == "bf16" and "of a small layer is off by" in choice.refused and not converted(model)


@pytest.mark.parametrize(
    ("recipe", "precision"), [("rowwise", "autocast"), ("tensorwise", "bf16"), ("fused", "autocast"), ("fused", "bf16")]
)
def test_float8_trains_near_bf16_and_exports_alike(
    recipe: str, precision: str, tmp_path: Path, torchao: Any, monkeypatch
) -> None:
    plain = float8_dit(tmp_path / "plain", None, precision=precision)
    dit.train(plain)
    monkeypatch.setattr(float8, "convert", functools.partial(float8.convert, emulate=True))
    dit.train(float8_dit(tmp_path / "float8", recipe, precision=precision))
    assert chosen(tmp_path / "float8", "engine.float8")["name"] == recipe
    assert logged(tmp_path / "float8") == pytest.approx(logged(tmp_path / "plain"), rel=0.01)
    assert logged(tmp_path / "float8") != logged(tmp_path / "plain")
    for ema in (None, 0.9):
        expected, found = last_weights(tmp_path / "plain", ema), last_weights(tmp_path / "float8", ema)
        assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
            key: (value.shape, value.dtype) for key, value in expected.items()
        }
    assert not converted(export.load_generator(tmp_path / "float8"))
    export.load_network(tmp_path / "float8").save_pretrained(tmp_path / "exported")
    LightningDiT.from_pretrained(tmp_path / "exported")


@pytest.mark.parametrize(
    ("capability", "rows", "told"), [((8, 0), 64, "needs a GPU of sm_89, this is sm_80"), ((9, 0), 72, "has 72 tokens")]
)
def test_float8_says_what_is_in_the_way(capability: tuple[int, int], rows: int, told: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = LightningDiT(float8_dit(Path("unused"), None).model)
    choice = float8.convert(model.blocks, "rowwise", rows=rows, device=torch.device("cuda", 0))
    assert choice.name == "bf16" and told in choice.refused and not converted(model)
