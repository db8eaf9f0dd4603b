"""LightningDiT, its training step and its sampler as a plain loop has them: what vadit's are measured against.

The network is written from its equations (arXiv 2501.01423) in eager torch, without a module or kernel of vadit's. The
step and the sampler do what the authors' loop does: torch's AdamW, `clip_grad_norm_`, an average weight by weight, the
loss read at every step; both halves of guidance at every point of time. Names of weights are those of released
checkpoints, so vadit's `state_dict` loads; tests/test_benchmarks.py holds outputs, steps and samples equal.

Shapes: B batch, C latent channels, h w latent rows and columns, N tokens, p patch side, D width, H heads, K head width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vadit.config import DiTConfig, DiTSpec, SampleSpec
from vadit.latents.dataset import open_latents
from vadit.latents.loader import LatentLoader


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class Rotary(nn.Module):
    """Tables (N, K); they are among a checkpoint's buffers, and only their shapes are made here."""

    def __init__(self, head_dim: int, tokens: int) -> None:
        super().__init__()
        self.register_buffer("freqs_cos", torch.ones(tokens, head_dim))
        self.register_buffer("freqs_sin", torch.zeros(tokens, head_dim))

    def forward(self, x_BHNK: Tensor) -> Tensor:
        even, odd = x_BHNK[..., 0::2], x_BHNK[..., 1::2]
        turned_BHNK = torch.stack([-odd, even], dim=-1).flatten(-2)
        return x_BHNK * self.freqs_cos + turned_BHNK * self.freqs_sin


class Attention(nn.Module):
    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.qkv = nn.Linear(spec.hidden_size, 3 * spec.hidden_size)
        head_dim = spec.hidden_size // spec.num_heads
        self.q_norm, self.k_norm = (RMSNorm(head_dim) if spec.qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, x_BND: Tensor, rotary: Rotary) -> Tensor:
        B, N, D = x_BND.shape
        q, k, v = self.qkv(x_BND).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out_BHNK = F.scaled_dot_product_attention(rotary(self.q_norm(q)), rotary(self.k_norm(k)), v)
        return self.proj(out_BHNK.transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        x1, x2 = self.w12(x_BND).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BND * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.norm1, self.norm2, self.attn = RMSNorm(width), RMSNorm(width), Attention(spec)
        self.mlp = SwiGLU(width, int(2 / 3 * int(width * spec.mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor, rotary: Rotary) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BND = x_BND + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BND), shift1, scale1), rotary)
        return x_BND + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BND), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.norm_final, self.linear = RMSNorm(width), nn.Linear(width, spec.patch_size**2 * spec.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x_BND), *self.adaLN_modulation(c_BD).chunk(2, dim=1)))


class PlainDiT(nn.Module):
    """Latents (B, C, h, w), times (B,) and labels (B,) to velocities (B, C, h, w)."""

    def __init__(self, spec: DiTSpec) -> None:
        if not (spec.rmsnorm and spec.swiglu and spec.rope) or spec.shift_free or spec.value_residual:
            raise SystemExit("the plain network is LightningDiT: RMSNorm, SwiGLU, RoPE, and nothing beyond")
        super().__init__()
        self.spec, width = spec, spec.hidden_size
        tokens = (spec.input_size // spec.patch_size) ** 2
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(spec.in_channels, width, spec.patch_size, spec.patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(spec.num_classes + 1, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        self.feat_rope = Rotary(width // spec.num_heads, tokens)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final_layer = FinalLayer(spec)

    def forward(self, x_BChw: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        spec = self.spec
        angle = t_B[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, device=t_B.device) / 128)
        if self.training and spec.class_dropout > 0:
            y_B = torch.where(torch.rand(len(y_B), device=y_B.device) < spec.class_dropout, spec.num_classes, y_B)
        time_BD = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        c_BD = time_BD + self.y_embedder.embedding_table(y_B)
        x_BND = self.x_embedder.proj(x_BChw).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x_BND = block(x_BND, c_BD, self.feat_rope)
        (B, C, h, w), p = x_BChw.shape, spec.patch_size
        patches = self.final_layer(x_BND, c_BD).reshape(B, h // p, w // p, p, p, C)
        return torch.einsum("bhwpqc->bchpwq", patches).reshape(B, C, h, w)


class PlainTraining:
    """The training step; to `step_timing.measure` it is task, engine, guard and average in one.

    weights: those to start from, so that both contenders multiply the same numbers.
    """

    def __init__(self, config: DiTConfig, weights: dict[str, Tensor], device: torch.device) -> None:
        if config.engine.precision == "bf16" or config.engine.gradient_accumulation > 1:
            raise SystemExit("the plain loop is autocast or fp32, without accumulation")
        self.config, self.device = config, device
        self.network = PlainDiT(config.model).to(device)
        self.network.load_state_dict(weights)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        optimizer = config.optimizer
        self.adam = torch.optim.AdamW(
            self.network.parameters(), lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        if config.engine.compile is True:  # auto is for settled() to say
            self.network.compile()
        self.loader = LatentLoader(open_latents(config.data, config.model, config.repa), config.run.batch_size)
        self.engines = {"model": self}
        self.guard = SimpleNamespace(step=self._optimize)
        self.ema = SimpleNamespace(update=self._average, begin_step=lambda step: None)

    def begin_step(self, lr: float) -> None:
        self.adam.param_groups[0]["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, batches: Iterator[Any], position: Any = None) -> float:
        """One step on the next batch; its loss."""
        x1, labels = (part.to(self.device, non_blocking=True) for part in next(batches))
        t_B = torch.sigmoid(torch.randn(len(x1), device=self.device))
        x0, t = torch.randn_like(x1), t_B.view(-1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.engine.precision == "autocast"):
            found = self.network(t * x1 + (1 - t) * x0, t_B, labels)
        target, found = x1 - x0, found.float()
        loss = (found - target).square().mean() + (1 - F.cosine_similarity(found, target, dim=1)).mean()
        self.adam.zero_grad()
        self.backward(loss)
        self.guard.step()
        self.ema.update()
        return loss.item()

    def _optimize(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.engine.max_grad_norm or math.inf)
        self.adam.step()

    @torch.no_grad()
    def _average(self) -> None:
        decay = self.config.engine.ema_decays[0]
        for mean, weight in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mean.mul_(decay).add_(weight, alpha=1 - decay)


@torch.no_grad()
def plain_samples(network: PlainDiT, x_BChw: Tensor, y_B: Tensor, spec: SampleSpec) -> Tensor:
    """Euler's method from noise (B, C, h, w), with both halves of guidance, 2 B rows, at every time."""
    times, shift, guided = torch.linspace(0, 1, spec.num_steps), spec.timestep_shift, spec.cfg_channels
    times = shift * times / (1 + (shift - 1) * times)
    both_2B = torch.cat([y_B, torch.full_like(y_B, network.spec.num_classes)])
    for t, later in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        found = network(torch.cat([x_BChw, x_BChw]), x_BChw.new_full((len(both_2B),), t), both_2B)
        velocity, without = found.chunk(2)
        if t >= spec.cfg_interval[0]:
            pulled = without[:, :guided] + spec.cfg_scale * (velocity[:, :guided] - without[:, :guided])
            velocity = torch.cat([pulled, velocity[:, guided:]], dim=1)
        x_BChw = x_BChw + (later - t) * velocity
    return x_BChw
