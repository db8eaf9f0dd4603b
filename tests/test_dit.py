"""LightningDiT against a second, naive form of its formulae: float64, complex-number RoPE, attention by einsum."""

import dataclasses
import math

import pytest
import torch
from model_help import assert_recomputing_changes_nothing, randomised
from torch import Tensor

from vadit.config import DiTSpec
from vadit.models.dit import LightningDiT
from vadit.runtime.errors import UsageError

BASE = DiTSpec(
    input_size=6, patch_size=1, in_channels=3, hidden_size=48, depth=2, num_heads=4, num_classes=5, class_dropout=0.1
)
SPECS = {
    "lightning_patch1": BASE,
    "qk_norm_patch2": dataclasses.replace(BASE, patch_size=2, qk_norm=True),
    "plain": dataclasses.replace(BASE, patch_size=2, swiglu=False, rope=False, rmsnorm=False),
    "plain_learned_sigma": dataclasses.replace(BASE, swiglu=False, rope=False, rmsnorm=False, learn_sigma=True),
    "shift_free": dataclasses.replace(BASE, shift_free=True),
    "layer_norm_qk_norm_rope": dataclasses.replace(BASE, rmsnorm=False, qk_norm=True),
    "qk_norm_without_rope": dataclasses.replace(BASE, rope=False, qk_norm=True),
}


def inputs(spec: DiTSpec, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, spec.in_channels, spec.input_size, spec.input_size, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.tensor([0, 4, 5])[:batch]


def naive_forward(spec: DiTSpec, state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    w = {name: tensor.double() for name, tensor in state.items()}
    x, t = x.double(), t.double()
    p, grid, width = spec.patch_size, spec.input_size // spec.patch_size, spec.hidden_size

    def linear(name: str, value: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", value, w[name + ".weight"]) + w[name + ".bias"]

    def silu(value: Tensor) -> Tensor:
        return value / (1 + torch.exp(-value))

    def normalise(value: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        if spec.rmsnorm:
            return value / (value.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]
        value = value - value.mean(-1, keepdim=True)
        value = value / (value.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return value * w[name + ".weight"] + w[name + ".bias"] if name + ".weight" in w else value

    tokens = []
    for row in range(grid):
        for column in range(grid):
            patch = x[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append(torch.einsum("bcij,dcij->bd", patch, w["x_embedder.proj.weight"]) + w["x_embedder.proj.bias"])
    h = torch.stack(tokens, 1) + naive_positions(grid, width)

    angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = time + w["y_embedder.embedding_table.weight"][y]

    for index in range(spec.depth):
        b = f"blocks.{index}"
        chunks = list(linear(b + ".adaLN_modulation.1", silu(c))[:, None].chunk(4 if spec.shift_free else 6, -1))
        if spec.shift_free:
            chunks = [torch.zeros_like(chunks[0]), *chunks[:2], torch.zeros_like(chunks[0]), *chunks[2:]]
        normed = normalise(h, b + ".norm1") * (1 + chunks[1]) + chunks[0]
        q, k, v = linear(b + ".attn.qkv", normed).unflatten(-1, (3, spec.num_heads, -1)).unbind(2)
        if spec.qk_norm:
            eps = 1e-6 if spec.rmsnorm else 1e-5
            q, k = normalise(q, b + ".attn.q_norm", eps), normalise(k, b + ".attn.k_norm", eps)
        if spec.rope:
            q, k = naive_rope(q, grid), naive_rope(k, grid)
        weights = torch.softmax(torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(q.shape[-1]), -1)
        h = h + chunks[2] * linear(b + ".attn.proj", torch.einsum("bhnm,bmhk->bnhk", weights, v).flatten(2))
        normed = normalise(h, b + ".norm2") * (1 + chunks[4]) + chunks[3]
        if spec.swiglu:
            first, second = linear(b + ".mlp.w12", normed).chunk(2, -1)
            out = linear(b + ".mlp.w3", silu(first) * second)
        else:
            u = linear(b + ".mlp.fc1", normed)
            out = linear(b + ".mlp.fc2", u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))))
        h = h + chunks[5] * out

    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None].chunk(2, -1)
    h = linear("final_layer.linear", normalise(h, "final_layer.norm_final") * (1 + scale) + shift)
    image = torch.zeros(len(x), h.shape[-1] // p**2, spec.input_size, spec.input_size, dtype=torch.float64)
    for token in range(grid * grid):
        row, column = token // grid * p, token % grid * p
        image[:, :, row : row + p, column : column + p] = h[:, token].unflatten(-1, (p, p, -1)).permute(0, 3, 1, 2)
    return image


def naive_positions(grid: int, width: int) -> Tensor:
    """Quarter by quarter: sin and cos of the column, sin and cos of the row."""
    quarter = width // 4
    rows = []
    for row in range(grid):
        for column in range(grid):
            frequencies = [10000 ** (-i / quarter) for i in range(quarter)]
            parts = [(f, place) for place in (column, row) for f in (math.sin, math.cos)]
            rows.append([f(place * frequency) for f, place in parts for frequency in frequencies])
    return torch.tensor(rows, dtype=torch.float64)


def naive_rope(q_BNHK: Tensor, grid: int) -> Tensor:
    """Pairs as complex numbers, turned by position * 10000^(-i / (K/4)): first half row, second half column."""
    quarter = q_BNHK.shape[-1] // 4
    frequency = torch.tensor([10000 ** (-i / quarter) for i in range(quarter)], dtype=torch.float64)
    token = torch.arange(grid * grid)
    angle = torch.cat([(token // grid)[:, None] * frequency, (token % grid)[:, None] * frequency], 1)
    turned = torch.view_as_complex(q_BNHK.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)[None, :, None]
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize("name", SPECS)
def test_forward_equals_naive_form(name: str) -> None:
    spec = SPECS[name]
    model = randomised(LightningDiT(spec))
    x, t, y = inputs(spec)
    expected = naive_forward(spec, model.state_dict(), x, t, y)
    with torch.no_grad():
        found = model.forward_with_variance(x, t, y)
        assert torch.equal(model(x, t, y), found[:, : spec.in_channels])
    assert found.shape == expected.shape
    assert expected.std() > 0.1
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_state_dict_names_are_the_references() -> None:
    block = ["adaLN_modulation.1", "attn.proj", "attn.qkv", "mlp.w12", "mlp.w3"]
    expected = {f"blocks.{i}.{layer}.{kind}" for i in range(2) for layer in block for kind in ("weight", "bias")}
    expected |= {f"blocks.{i}.{norm}.weight" for i in range(2) for norm in ("norm1", "norm2")}
    expected |= {f"blocks.{i}.attn.{norm}.weight" for i in range(2) for norm in ("q_norm", "k_norm")}
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    expected |= {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    expected |= {"y_embedder.embedding_table.weight", "pos_embed", "final_layer.norm_final.weight"}
    expected |= {"feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    assert set(LightningDiT(SPECS["qk_norm_patch2"]).state_dict()) == expected
    plain = LightningDiT(SPECS["layer_norm_qk_norm_rope"]).state_dict()
    assert {"blocks.0.attn.q_norm.bias", "blocks.0.attn.k_norm.bias"} < set(plain)
    assert not any(name.startswith("blocks.0.norm") for name in plain)


def test_initialisation_and_size() -> None:
    model = LightningDiT(dataclasses.replace(BASE, hidden_size=128, num_classes=400, label_init_std=0.5))
    x, t, y = inputs(model.spec)
    assert torch.equal(model(x, t, y), torch.zeros_like(x)), "adaLN-zero: the output starts at zero"
    state = model.state_dict()
    assert abs(state["y_embedder.embedding_table.weight"].std() - 0.5) < 0.02
    assert abs(state["t_embedder.mlp.0.weight"].std() - 0.02) < 0.001
    bound = math.sqrt(6 / (128 + 3 * 128))
    assert 0.98 * bound < state["blocks.0.attn.qkv.weight"].abs().max() <= bound
    assert all((tensor == 0).all() for name, tensor in state.items() if name.endswith("mlp.w12.bias"))
    assert not model.pos_embed.requires_grad
    assert LightningDiT(dataclasses.replace(BASE, value_residual=True)).blocks[1].attn.value_share.tolist() == [0.5]
    with torch.device("meta"):
        model = LightningDiT(DiTSpec())
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 675


def test_label_dropout() -> None:
    model = randomised(LightningDiT(dataclasses.replace(BASE, class_dropout=0.5))).train()
    x, t, _ = inputs(BASE, 1)
    x, t, y = x.expand(64, -1, -1, -1), t.expand(64), torch.full((64,), 2)
    null = torch.full((64,), model.num_classes)
    with torch.no_grad():
        dropped = model(x, t, y, torch.ones(64, dtype=torch.bool))
        kept = model(x, t, y, torch.zeros(64, dtype=torch.bool))
        torch.manual_seed(0)
        mixed = model(x, t, y)
        model.eval()
        assert torch.allclose(dropped, model(x, t, null), atol=1e-5)
        assert torch.allclose(kept, model(x, t, y), atol=1e-5)
        assert not torch.allclose(kept, dropped, atol=1e-3)
    is_dropped = (mixed - dropped).flatten(1).norm(dim=1) < 1e-3
    is_kept = (mixed - kept).flatten(1).norm(dim=1) < 1e-3
    assert torch.equal(is_dropped, ~is_kept)
    assert 16 < is_dropped.sum() < 48


@pytest.mark.parametrize("name", ["lightning_patch1", "layer_norm_qk_norm_rope", "shift_free"])
def test_gradient_checkpointing_gives_equal_gradients(name: str) -> None:
    model = randomised(LightningDiT(SPECS[name]))
    x, t, y = inputs(model.spec)
    assert_recomputing_changes_nothing(model, lambda: model(x, t, y).square().mean())


def test_blocks_are_computed_twice_only_where_that_saves_memory() -> None:
    model = randomised(LightningDiT(BASE))
    calls = [0]
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
    for checkpointing, expected in ((False, 1), (True, 2)):
        model.gradient_checkpointing = checkpointing
        with torch.no_grad():
            model(*inputs(BASE))
        assert calls == [1]
        calls[0] = 0
        model(*inputs(BASE)).sum().backward()
        assert calls == [expected]
        calls[0] = 0


def test_save_load_and_cast(tmp_path) -> None:
    model = randomised(LightningDiT(SPECS["qk_norm_patch2"]))
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = LightningDiT.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.spec == model.spec
    assert not loaded.training
    assert not loaded.pos_embed.requires_grad
    assert loaded.final_layer.linear.weight.requires_grad
    assert torch.equal(loaded(*inputs(model.spec)), model(*inputs(model.spec)))
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "model.safetensors"}
    model = randomised(LightningDiT(BASE))
    exact = model.feat_rope.freqs_cos.clone()
    model.bfloat16()
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.feat_rope.freqs_cos, exact)
    assert model(*inputs(BASE)).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    pytest.raises(UsageError, LightningDiT.from_pretrained, tmp_path).match(r"holds no model.safetensors")
    randomised(LightningDiT(BASE)).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"depth": 2', '"depth": 3'))
    with pytest.raises(UsageError, match=r"model.safetensors: tensor blocks\.2\.\S+ of shape .* is missing"):
        LightningDiT.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="hidden_size 30"):
        LightningDiT(dataclasses.replace(BASE, hidden_size=30, num_heads=3, rope=False))
