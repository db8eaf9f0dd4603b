"""MaskDiT and MDT against slower forms of the same: all tokens computed and masked ones hidden from attention."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_help import assert_recomputing_changes_nothing, randomised
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training_plain import BATCH, flow_loss, logged, plain_dit, tiny_dit

from vadit.config import DiTConfig, DiTSpec, FlowSpec, MaskSpec
from vadit.models.dit import LightningDiT, closed
from vadit.models.interop import save_reference
from vadit.models.masked import MDT, MaskDiT, MaskedDiT, build_generator
from vadit.objectives import ddpm, flow, masked
from vadit.runtime.errors import UsageError
from vadit.sampling.solvers import sample_ode
from vadit.train import dit, runs
from vadit.train.checkpoint import export

SPEC = DiTSpec(
    input_size=8, patch_size=2, in_channels=3, hidden_size=48, depth=3, num_heads=4, num_classes=5, class_dropout=0.0
)
PLAIN = dataclasses.replace(SPEC, swiglu=False, rope=False, rmsnorm=False)
SPECS = {
    "lightning": SPEC,
    "qk_norm": dataclasses.replace(SPEC, qk_norm=True),
    "layer_norm_qk_norm_rope": dataclasses.replace(SPEC, rmsnorm=False, qk_norm=True),
    "plain": PLAIN,
    "plain_qk_norm": dataclasses.replace(PLAIN, qk_norm=True),
}
MASKDIT = MaskSpec(kind="maskdit", ratio=0.5, decoder_depth=2, decoder_width=32, decoder_heads=2)
MDT_MASK = MaskSpec(kind="mdt", ratio=0.3, decoder_depth=1)
TOKENS = 16


def whole(spec: DiTSpec, mask: MaskSpec) -> Any:
    return randomised(build_generator(spec, mask)).train()


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, SPEC.in_channels, SPEC.input_size, SPEC.input_size, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 5


def same_mask(model: MaskedDiT, batch: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """The mask of a forward pass after this seed: visible places (B, V), and (B, N) True where masked."""
    torch.manual_seed(seed)
    visible = model.draw_visible(batch)
    mask = torch.tensor([[place not in row for place in range(TOKENS)] for row in visible.tolist()])
    torch.manual_seed(seed)
    return visible, mask


def naive_attention(attention: Any, x: Tensor, rope: Any, hidden: Tensor | None) -> Tensor:
    """All tokens by einsum, the columns of hidden tokens (B, N) at minus infinity; a bias by its two offsets."""
    heads, width, grid = attention.num_heads, attention.head_dim, math.isqrt(TOKENS)
    q, k, v = attention.qkv(x).unflatten(-1, (3, heads, width)).unbind(2)
    if attention.q_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        cos, sin = (table[:, None, :] for table in rope)

        def turn(t: Tensor) -> Tensor:
            partner = torch.stack([-t[..., 1::2], t[..., 0::2]], dim=-1).flatten(-2)
            return t * cos + partner * sin

        q, k = turn(q), turn(k)
    logits = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(width)
    if attention.relative_bias is not None:
        for n in range(TOKENS):
            for m in range(TOKENS):
                rows, columns = n // grid - m // grid, n % grid - m % grid
                entry = (rows + grid - 1) * (2 * grid - 1) + columns + grid - 1
                logits[:, :, n, m] = logits[:, :, n, m] + attention.relative_bias[entry]
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None, None, :], -math.inf)
    return attention.proj(torch.einsum("bhnm,bmhk->bnhk", logits.softmax(-1), v).flatten(2))


class NaiveAttention(torch.nn.Module):
    """Takes the place of a block's attention."""

    def __init__(self, attention: Any, hidden: Tensor | None) -> None:
        super().__init__()
        self.inner, self.hidden = attention, hidden

    def forward(self, x: Tensor, places: Any, first: None = None) -> tuple[Tensor, None, None]:
        return naive_attention(self.inner, x, places if isinstance(places, tuple) else None, self.hidden), None, None


def naive_blocks(model: Any, blocks: Any, x: Tensor, c: Tensor, hidden: Tensor | None) -> Tensor:
    rope = None if model.feat_rope is None else model.feat_rope()
    for block in blocks:
        attention, block.attn = block.attn, NaiveAttention(block.attn, hidden)
        x = closed(block(x, c, rope))
        block.attn = attention
    return x


def naive_maskdit(model: MaskDiT, x: Tensor, t: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    c = model.condition(t, y)
    tokens = naive_blocks(model, model.blocks, model.tokens(x), c, mask)
    tokens = torch.where(mask[:, :, None], model.mask_token, model.narrowing(tokens, c)) + model.decoder_pos_embed
    rope = None if model.decoder_rope is None else model.decoder_rope()
    for block in model.decoder_blocks:
        tokens = closed(block(tokens, c, rope))
    return model.head(tokens, c)


def naive_mdt(model: MDT, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    c, late = model.condition(t, y), model.mask.decoder_depth
    tokens = naive_blocks(model, model.blocks[:-late], model.tokens(x), c, mask)
    if mask is not None:
        tokens = torch.where(mask[:, :, None], model.mask_token, tokens)
    tokens = tokens + model.decoder_pos_embed
    if mask is not None:
        side = naive_blocks(model, [model.side_block], tokens, c, None)
        tokens = torch.where(mask[:, :, None], side, tokens)
    return model.head(naive_blocks(model, model.blocks[-late:], tokens, c, None), c)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("name", SPECS)
def test_maskdit_is_the_whole_network_with_masked_tokens_hidden(name: str) -> None:
    model = whole(SPECS[name], MASKDIT)
    x, t, y = inputs()
    _, mask = same_mask(model, len(x))
    output = model.forward_features(x, t, y, masked=True)
    assert output.mask_BN is not None and torch.equal(output.mask_BN, mask)
    assert close(output.prediction, naive_maskdit(model, x, t, y, mask))
    assert close(model(x, t, y), naive_maskdit(model, x, t, y, torch.zeros_like(mask)))


@pytest.mark.parametrize("name", SPECS)
def test_mdt_is_the_whole_network_with_masked_tokens_hidden(name: str) -> None:
    model = whole(SPECS[name], MDT_MASK)
    x, t, y = inputs()
    _, mask = same_mask(model, len(x))
    output = model.forward_features(x, t, y, masked=True).prediction
    assert close(output, naive_mdt(model, x, t, y, mask))
    assert close(model(x, t, y), naive_mdt(model, x, t, y, None))
    assert not torch.equal(output, model(x, t, y))


@pytest.mark.parametrize(("spec", "mask"), [(SPEC, MASKDIT), (PLAIN, MASKDIT), (SPEC, MDT_MASK), (PLAIN, MDT_MASK)])
def test_what_is_masked_does_not_show(spec: DiTSpec, mask: MaskSpec) -> None:
    model = whole(spec, mask)
    x, t, y = inputs()
    _, hidden = same_mask(model, len(x))

    def predict(images: Tensor) -> Tensor:
        torch.manual_seed(7)
        return model.forward_features(images, t, y, masked=True).prediction

    expected = predict(x)
    positions = masked.spread(hidden, x.shape[-2:])[:, None]
    assert torch.equal(predict(torch.where(positions, 100.0, x)), expected)
    assert not torch.equal(predict(torch.where(positions, x, 100.0)), expected)


@pytest.mark.parametrize(("spec", "mask"), [(SPEC, MASKDIT), (PLAIN, MDT_MASK)])
def test_gradient_checkpointing_gives_the_same_gradients(spec: DiTSpec, mask: MaskSpec) -> None:
    model = whole(spec, mask)
    x, t, y = inputs()

    def loss() -> Tensor:
        torch.manual_seed(7)
        return model.forward_features(x, t, y, masked=True).prediction.square().sum()

    assert_recomputing_changes_nothing(model, loss)


@pytest.mark.parametrize(("mask", "visible"), [(MASKDIT, 8), (MDT_MASK, 11)])
def test_masks_are_uniform_draws_for_each_sample(mask: MaskSpec, visible: int) -> None:
    model = whole(SPEC, mask)
    torch.manual_seed(0)
    places = model.draw_visible(4000)
    assert places.shape == (4000, visible) and (places.diff(dim=1) > 0).all()
    share = torch.bincount(places.flatten(), minlength=TOKENS) / 4000
    probability = visible / TOKENS
    assert (share - probability).abs().max() < 5 * math.sqrt(probability * (1 - probability) / 4000)
    assert len({tuple(row) for row in places.tolist()}) > 1000
    torch.manual_seed(0)
    assert torch.equal(model.draw_visible(4000), places)


def test_masked_tokens_cost_the_encoder_nothing() -> None:
    """Products per image: linear layers by the number of visible tokens, attention by its square."""
    spec = dataclasses.replace(SPEC, depth=6)
    model = whole(spec, dataclasses.replace(MASKDIT, decoder_depth=1))

    def flops(*, tokens: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            rope = tuple(table[:tokens] for table in model.feat_rope())
            model.through(model.blocks, torch.zeros(2, tokens, 48), torch.zeros(2, 48), rope)
        return counter.get_total_flops()

    def products(**options: bool) -> int:
        x, t, y = inputs(2)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.forward_features(x, t, y, **options)
        return counter.get_total_flops()

    narrow = 2 * 2 * 8 * 48 * 32  # the linear layer to the decoder's width, for 8 of 16 tokens of two images
    assert products() - products(masked=True) == flops(tokens=16) - flops(tokens=8) + narrow


def test_start_is_the_papers() -> None:
    torch.manual_seed(0)
    maskdit, mdt = MaskDiT(PLAIN, MASKDIT), MDT(PLAIN, MDT_MASK)
    x, t, y = inputs()
    assert (maskdit(x, t, y) == 0).all() and (mdt(x, t, y) == 0).all()
    assert (maskdit.narrowing.linear.weight == 0).all()
    assert 0.01 < mdt.mask_token.std() < 0.04 and 0.01 < maskdit.mask_token.std() < 0.04
    assert mdt.pos_embed.requires_grad and mdt.decoder_pos_embed.requires_grad
    assert not maskdit.pos_embed.requires_grad and not maskdit.decoder_pos_embed.requires_grad
    for bias in (block.attn.relative_bias for block in (*mdt.blocks, mdt.side_block)):
        assert 0.005 < bias.std() < 0.04
    assert MDT(SPEC, MDT_MASK).blocks[0].attn.relative_bias is None


@pytest.mark.parametrize("direction_loss", [True, False])
def test_maskdit_loss_is_the_papers(direction_loss: bool) -> None:
    """Number by number: patches cut out by hand, each an own mean."""
    x1 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[True, False, False, True], [False, True, True, True]])
    weight = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spec = FlowSpec(direction_loss=direction_loss)
    drawn = flow.draw(spec, x1, 0, torch.Generator().manual_seed(2))
    loss = masked.loss(spec, drawn, drawn.x_t * weight, mask, 0.1)
    mse, direction, rebuilt = [], [], []
    for b in range(2):
        x_t, t = drawn.x_t[b], drawn.t[b].double()
        velocity = (x1[b] - x_t) / (1 - t)
        output = x_t * weight[b]
        estimate = x_t + (1 - t) * output
        sums: dict[bool, list[Tensor]] = {True: [], False: []}
        cosines = []
        for token in range(4):
            rows, columns = slice(token // 2 * 2, token // 2 * 2 + 2), slice(token % 2 * 2, token % 2 * 2 + 2)
            hidden = bool(mask[b, token])
            if hidden:
                target = x_t[:, rows, columns]
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                sums[True].append((estimate[:, rows, columns] - target).square().mean())
            else:
                sums[False].append((output - velocity)[:, rows, columns].square().mean())
                cosines.append(1 - F.cosine_similarity(output[:, rows, columns], velocity[:, rows, columns], 0).mean())
        rebuilt.append(torch.stack(sums[True]).mean())
        mse.append(torch.stack(sums[False]).mean())
        direction.append(torch.stack(cosines).mean())
    expected = [torch.stack(values).mean().item() for values in (mse, direction, rebuilt)]
    assert loss["mse"].item() == pytest.approx(expected[0], rel=1e-6)
    assert loss["direction"].item() == pytest.approx(expected[1] if direction_loss else 0.0, rel=1e-6)
    assert loss["reconstruction"].item() == pytest.approx(expected[2], rel=1e-6)
    total = loss["mse"] + loss["direction"] + 0.1 * loss["reconstruction"]
    assert loss["loss"].item() == pytest.approx(total.item(), rel=1e-12)


def test_passes_and_patches_of_a_step() -> None:
    assert masked.passes(MaskSpec(), 0) == (False,)
    assert masked.passes(MDT_MASK, 0) == (False, True)
    assert masked.passes(MASKDIT, 10**9) == (True,)
    tuned = dataclasses.replace(MASKDIT, unmasked_after_images=100)
    assert [masked.passes(tuned, seen) for seen in (99, 100)] == [(True,), (False,)]
    # A token's patch, as the loss cuts it, is what the patch embedding and the last layer take it for.
    model = whole(SPEC, MASKDIT)
    x, _, _ = inputs()
    assert torch.equal(model._unpatchify(masked.patchify(x, TOKENS)), x)
    mask = torch.zeros(1, TOKENS, dtype=torch.bool)
    mask[0, 6] = True
    changed = torch.where(masked.spread(mask, x.shape[-2:])[:, None], x + 1, x)
    differs = (model.tokens(changed) != model.tokens(x)).any(dim=-1)
    assert differs[:, 6].all() and differs.sum() == len(x)


SMALL_MASKDIT = dataclasses.replace(MASKDIT, decoder_depth=1)


def config(out: Path, mask: MaskSpec, *, steps: int = 4, model: dict[str, Any] | None = None, **options: Any) -> Any:
    """The debug twin with masks; MDT as published: without rotary tables, so with its relative bias."""
    plain = tiny_dit(out, steps=steps, **options)
    switches = {"rope": mask.kind == "maskdit", **(model or {})}
    return dataclasses.replace(plain, mask=mask, model=dataclasses.replace(plain.model, **switches))


def masked_loss(config: DiTConfig, model: Any, latents: Tensor, labels: Tensor, seen: int) -> Tensor:
    """That of a micro-batch, by the passes that it takes."""
    late = config.mask.unmasked_after_images
    if config.mask.kind == "maskdit":
        if late is not None and seen >= late:
            return flow_loss(config, model, latents, labels, seen)
        drawn = flow.draw(config.flow, latents, seen)
        output = model.forward_features(drawn.x_t, drawn.t, labels, masked=True)
        weight = config.mask.reconstruction_weight
        found = masked.loss(config.flow, drawn, output.prediction, output.mask_BN, weight)
        return found["mse"] + found["direction"] + weight * found["reconstruction"]
    loss = torch.zeros(())
    for masks in (False, True):
        if config.flow.objective == "ddpm":
            noised = ddpm.draw(latents)
            output = model.forward_features(noised.x_t, noised.t, labels, with_variance=True, masked=masks)
            loss = loss + ddpm.loss(noised, output.prediction)["loss"]
        else:
            drawn = flow.draw(config.flow, latents, seen)
            output = model.forward_features(drawn.x_t, drawn.t, labels, masked=masks)
            loss = loss + flow.loss(config.flow, drawn, output.prediction)["loss"]
    return loss


def check_against_plain(config: DiTConfig) -> None:
    expected, weights = plain_dit(config, loss_of=masked_loss)
    assert logged(dit.train(config)) == pytest.approx(expected, rel=1e-5)
    state, _ = runs.read_weights(config.run.out)
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert (state[name] - value).norm() <= 1e-3 * value.norm() + 1e-3, name


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_maskdit_trains_as_plain_adamw_does_through_both_stages(zero_stage: int, tmp_path: Path) -> None:
    late = dataclasses.replace(SMALL_MASKDIT, unmasked_after_images=2 * BATCH)
    check_against_plain(config(tmp_path, late, zero_stage=zero_stage))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [("reconstruction" in line) for line in lines] == [True, True, False, False]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_mdt_trains_as_plain_adamw_does(zero_stage: int, tmp_path: Path) -> None:
    check_against_plain(config(tmp_path, MDT_MASK, zero_stage=zero_stage))
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["mse"] + line["masked_mse"], rel=1e-6)


def test_mdt_trains_with_ddpm(tmp_path: Path) -> None:
    base = config(tmp_path, MDT_MASK, steps=2, model={"learn_sigma": True}, zero_stage=2)
    check_against_plain(dataclasses.replace(base, flow=dataclasses.replace(base.flow, objective="ddpm")))


@pytest.mark.parametrize(("mask", "kind"), [(SMALL_MASKDIT, MaskDiT), (MDT_MASK, MDT)])
def test_a_run_is_exported_and_drawn_from_and_begun_from(mask: MaskSpec, kind: type, tmp_path: Path) -> None:
    run = dit.train(config(tmp_path / "run", mask, steps=2))
    export.load_network(run).save_pretrained(tmp_path / "out")
    networks = [export.load_generator(run), export.load_generator(tmp_path / "out")]
    assert all(type(network) is kind for network in networks)
    spec = networks[0].spec
    noise = torch.randn(2, spec.in_channels, spec.input_size, spec.input_size)
    labels = torch.tensor([1, 2])
    drawn = [sample_ode(network, noise, labels, num_steps=3, cfg_scale=2.0) for network in networks]
    assert torch.equal(*drawn) and drawn[0].isfinite().all() and not torch.equal(drawn[0], noise)
    pytest.raises(UsageError, LightningDiT.from_pretrained, tmp_path / "out").match("tensor")
    pytest.raises(UsageError, save_reference, networks[0], tmp_path / "authors.pt").match("masked generator")
    if kind is MaskDiT:
        tune = dataclasses.replace(mask, unmasked_after_images=0)
        tuned = config(tmp_path / "tuned", tune, steps=1, run={"init_from": str(tmp_path / "out")})
        log = json.loads((dit.train(tuned) / "log.jsonl").read_text())
        assert "reconstruction" not in log
