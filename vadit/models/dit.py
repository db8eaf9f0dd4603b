"""LightningDiT (Yao et al. 2025, arXiv 2501.01423) and, with its switches off, the plain DiT (Peebles & Xie 2023).

State-dict names are those of the authors' code, so their checkpoints load without renaming (`vadit.models.interop`).

Shapes: B batch, C latent channels, h w latent rows and columns, N tokens, p patch side, D hidden size, H heads,
K head width, F MLP width, S 256 timestep frequencies.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vadit.config import DiTSpec, RepaSpec
from vadit.kernels import gated_norm, is_exact, rms_norm, rope, rope_qkv, swiglu
from vadit.models.attention import Attend, torch_attention
from vadit.models.pretrained import Pretrained

TIME_FREQUENCIES = 256
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6

CosSin = tuple[Tensor, Tensor]
Places = CosSin | Tensor | None
"""What attention knows of its tokens' places: rotary tables, entries of a relative bias (`vadit.models.masked`)."""


class DiTOutput(NamedTuple):
    """What a pass through a generator gives a loss."""

    prediction: Tensor  # (B, C, h, w), or (B, 2C, h, w) with the learned variance
    hidden: dict[int, Tensor]  # outputs (B, N, D) of the blocks asked for, by their number from 1
    projected: Tensor | None = None  # (B, N, F): REPA's projection of the aligned block's output, where that is tapped
    mask_BN: Tensor | None = None  # bool, True where a token was not seen; None where all were


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sin-cos embedding (1, grid*grid, width): first half the column, second half the row."""
    omega = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), omega)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = line[None, :, :].expand(grid, grid, -1)
    rows = line[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, width).float()


class RotaryTable(nn.Module):
    """Cosines and sines (N, K) of the 2-D rotary embedding (EVA-02): K/2 numbers for the row, K/2 for the column.

    Pairs (2i, 2i+1) share a frequency. The tables stay float32 when the model is cast: positions in bfloat16 blur.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: int) -> None:
        super().__init__()
        half = head_dim // 2
        frequency = 1.0 / MAX_PERIOD ** (torch.arange(0, half, 2).float() / half)
        angle = torch.outer(torch.arange(grid).float(), frequency).repeat_interleave(2, dim=1)
        rows = angle[:, None, :].expand(grid, grid, half)
        columns = angle[None, :, :].expand(grid, grid, half)
        angle_NK = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_dim)
        self.register_buffer("freqs_cos", angle_NK.cos())
        self.register_buffer("freqs_sin", angle_NK.sin())

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryTable":
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def forward(self) -> CosSin:
        return self.freqs_cos, self.freqs_sin


class PatchEmbed(nn.Module):
    """Patches of p x p latent positions to tokens, row by row."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.proj(x_BChw).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of t, unscaled (t in [0, 1] for the flow, 0..999 for DDPM), then a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        half = TIME_FREQUENCIES // 2
        index = torch.arange(half, device=t_B.device, dtype=torch.float32)
        frequency = torch.exp(index * -math.log(MAX_PERIOD) / half)
        angle = t_B.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))


class LabelEmbedder(nn.Module):
    """A row per class, and a last one (index num_classes) for "no class", which guidance needs."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y_B: Tensor, drop_B: Tensor | None) -> Tensor:
        if drop_B is None and self.training and self.dropout > 0:
            drop_B = torch.rand(y_B.shape[0], device=y_B.device) < self.dropout
        if drop_B is not None:
            y_B = torch.where(drop_B, self.num_classes, y_B)
        return self.embedding_table(y_B)


class Pending(NamedTuple):
    """The end of a block's branch, x + gate * (h + bias), left to the norm that comes next: one pass over memory."""

    x_BND: Tensor
    h_BND: Tensor
    gate_BD: Tensor
    bias_D: Tensor | None  # None where h has it
    values_BHNK: Tensor | None = None  # with value residual those of the block's attention


Tokens = Tensor | Pending


def closed(tokens: Tokens) -> Tensor:
    """The tokens themselves, (B, N, D)."""
    if isinstance(tokens, Tensor):
        return tokens
    x_BND, h_BND, gate_BD, bias_D, _ = tokens
    return x_BND + gate_BD.unsqueeze(1) * (h_BND if bias_D is None else h_BND + bias_D)


class RMSNorm(nn.Module):
    """RMSNorm with a weight, over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=NORM_EPS)


class ModulatedRMSNorm(nn.Module):
    """Closed tokens and, from the same pass, their RMSNorm with a weight and the adaLN modulation (B, D).

    The norm comes in the dtype that autocast gives to the linear layer after it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tokens, scale_BD: Tensor, shift_BD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(tokens, Pending) and not is_exact():
            x_BND, h_BND, gate_BD, bias_D, _ = tokens
            rest = (h_BND, gate_BD, self.weight, bias_D, scale_BD, shift_BD)
            return gated_norm(x_BND, *rest, eps=NORM_EPS, dtype=_linear_dtype(x_BND))
        x_BND = closed(tokens)
        return x_BND, rms_norm(x_BND, self.weight, scale_BD, shift_BD, eps=NORM_EPS, dtype=_linear_dtype(x_BND))


def _linear_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


class PlainLayerNorm(nn.Module):
    """Closed tokens and their LayerNorm without a weight, as the plain DiT has it, with the same modulation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: Tokens, scale_BD: Tensor, shift_BD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_BND = closed(tokens)
        y_BND = F.layer_norm(x_BND, (self.width,), eps=NORM_EPS) * (1 + scale_BD.unsqueeze(1))
        return x_BND, y_BND if shift_BD is None else y_BND + shift_BD.unsqueeze(1)


class LateBiasLinear(nn.Linear):
    """A linear layer that can leave its bias to the op after it, which then sums up the bias's gradient, too."""

    def forward(self, x: Tensor, *, add_bias: bool = True) -> Tensor:
        return F.linear(x, self.weight, self.bias if add_bias else None)


def _last_linear(spec: DiTSpec) -> type[nn.Linear]:
    """Of a branch: RMSNorm's op adds its bias, LayerNorm is plain torch."""
    return LateBiasLinear if spec.rmsnorm else nn.Linear


def without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A layer's product and the bias left to the op after it; None where the layer adds it (float8's, `exact()`)."""
    if not isinstance(layer, LateBiasLinear) or is_exact():
        return layer(x), None
    return layer(x, add_bias=False), layer.bias


def end_of_branch(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`without_bias` for the next block, too: a copy of the bias, which ZeRO 3 takes away behind its module."""
    product, bias_D = without_bias(layer, x)
    return product, None if bias_D is None else bias_D.clone()


class Attention(nn.Module):
    """Multi-head self-attention; QK-norm (where on) comes before the rotation."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.head_dim = spec.hidden_size // spec.num_heads
        self.qkv = LateBiasLinear(spec.hidden_size, 3 * spec.hidden_size)
        self.proj = _last_linear(spec)(spec.hidden_size, spec.hidden_size)
        self.attend: Attend = torch_attention
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if spec.qk_norm:
            # the reference's LayerNorm here is torch's default one: eps 1e-5, weight and bias
            norm = RMSNorm if spec.rmsnorm else nn.LayerNorm
            self.q_norm, self.k_norm = norm(self.head_dim), norm(self.head_dim)
        # share of the first block's values (Zhou et al. 2024, ResFormer, with a learnt share); one half at the start
        self.value_share = nn.Parameter(torch.full((1,), 0.5)) if spec.value_residual else None

    def forward(
        self, x_BND: Tensor, places: Places, first_BHNK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens; the bias that they lack, if any; with value residual its values, the first block's mixed in."""
        B, N, D = x_BND.shape
        rotated = isinstance(places, tuple) and (self.q_norm is None or isinstance(self.q_norm, RMSNorm))
        qkv, bias = without_bias(self.qkv, x_BND) if rotated else (self.qkv(x_BND), None)
        q_BHNK, k_BHNK, v_BHNK = self.placed(qkv.view(B, N, 3, self.num_heads, self.head_dim), places, bias)
        own_BHNK = None if self.value_share is None else v_BHNK
        if self.value_share is not None and first_BHNK is not None:
            v_BHNK = torch.lerp(v_BHNK, first_BHNK, self.value_share.to(v_BHNK.dtype))
        # norms may hand back float32 under autocast; attention needs one dtype
        out_BHNK = self.mix(q_BHNK.to(v_BHNK.dtype), k_BHNK.to(v_BHNK.dtype), v_BHNK, places)
        return *end_of_branch(self.proj, out_BHNK.transpose(1, 2).reshape(B, N, D)), own_BHNK

    def placed(self, qkv_BN3HK: Tensor, places: Places, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed and rotated, and values, each (B, H, N, K); `bias` is one not yet added to qkv."""
        assert not isinstance(places, Tensor), "a relative bias needs PlacedAttention"
        if places is not None and self.q_norm is None:
            return rope_qkv(qkv_BN3HK, *places, bias=bias)
        if places is not None and isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            return rope_qkv(qkv_BN3HK, *places, self.q_norm.weight, self.k_norm.weight, bias=bias)
        q_BHNK, k_BHNK, v_BHNK = qkv_BN3HK.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q_BHNK, k_BHNK = self.q_norm(q_BHNK), self.k_norm(k_BHNK)
        if places is not None:
            q_BHNK, k_BHNK = rope(q_BHNK, k_BHNK, *places)
        return q_BHNK, k_BHNK, v_BHNK

    def mix(self, q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, places: Places) -> Tensor:
        """The values that each token attends to, (B, H, N, K)."""
        return self.attend(q_BHNK, k_BHNK, v_BHNK)


class SwiGLU(nn.Module):
    """w3(silu(x1) * x2) with x1, x2 = w12(x) (Shazeer 2020); two thirds of the width keep the parameter count."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.w12 = LateBiasLinear(spec.hidden_size, 2 * mlp_width(spec))
        self.w3 = _last_linear(spec)(mlp_width(spec), spec.hidden_size)

    def forward(self, x_BND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens and the bias that they lack (None: nothing)."""
        return end_of_branch(self.w3, swiglu(*without_bias(self.w12, x_BND)))


class MLP(nn.Module):
    """Two layers with GELU (tanh form) between: the plain DiT's."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.hidden_size, mlp_width(spec))
        self.fc2 = _last_linear(spec)(mlp_width(spec), spec.hidden_size)

    def forward(self, x_BND: Tensor) -> tuple[Tensor, Tensor | None]:
        return end_of_branch(self.fc2, F.gelu(self.fc1(x_BND), approximate="tanh"))


def mlp_width(spec: DiTSpec) -> int:
    """F, rounded down as the reference does: released shapes depend on it."""
    hidden = int(spec.hidden_size * spec.mlp_ratio)
    return int(2 / 3 * hidden) if spec.swiglu else hidden


def _norm(spec: DiTSpec) -> nn.Module:
    return (ModulatedRMSNorm if spec.rmsnorm else PlainLayerNorm)(spec.hidden_size)


def _modulation(condition_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(condition_width, out_width))


class Block(nn.Module):
    """adaLN-zero transformer block: x + gate * attention(modulate(norm(x))), then the same with the MLP.

    `condition_width` is that of the condition, where it differs from the block's.
    """

    def __init__(self, spec: DiTSpec, condition_width: int | None = None) -> None:
        super().__init__()
        width = spec.hidden_size
        self.shift_free = spec.shift_free
        self.norm1 = _norm(spec)
        self.attn = Attention(spec)
        self.norm2 = _norm(spec)
        self.mlp: nn.Module = (SwiGLU if spec.swiglu else MLP)(spec)
        self.adaLN_modulation = _modulation(condition_width or width, (4 if spec.shift_free else 6) * width)

    def forward(
        self,
        x_BND: Tensor,
        c_BD: Tensor,
        places: Places,
        first_BHNK: Tensor | None = None,
        h_BND: Tensor | None = None,
        gate_BD: Tensor | None = None,
        bias_D: Tensor | None = None,
    ) -> Pending:
        """h, gate and bias are what the block before left pending: one by one, since torch's hooks see no others."""
        before = x_BND if h_BND is None or gate_BD is None else Pending(x_BND, h_BND, gate_BD, bias_D)
        modulation = self.adaLN_modulation(c_BD)
        shift_attn: Tensor | None = None
        shift_mlp: Tensor | None = None
        if self.shift_free:
            scale_attn, gate_attn, scale_mlp, gate_mlp = modulation.chunk(4, dim=1)
        else:
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x_BND, normed_BND = self.norm1(before, scale_attn, shift_attn)
        attended_BND, bias_D, values_BHNK = self.attn(normed_BND, places, first_BHNK)
        x_BND, normed_BND = self.norm2(Pending(x_BND, attended_BND, gate_attn, bias_D), scale_mlp, shift_mlp)
        h_BND, bias_D = self.mlp(normed_BND)
        return Pending(x_BND, h_BND, gate_mlp, bias_D, values_BHNK)


class FinalLayer(nn.Module):
    """adaLN, then a linear layer, for the generator to the p*p*C numbers of each patch."""

    def __init__(self, spec: DiTSpec, out_width: int, condition_width: int | None = None) -> None:
        super().__init__()
        self.norm_final = _norm(spec)
        self.linear = nn.Linear(spec.hidden_size, out_width)
        self.adaLN_modulation = _modulation(condition_width or spec.hidden_size, 2 * spec.hidden_size)

    def forward(self, tokens: Tokens, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(self.norm_final(tokens, scale, shift)[1])


class LightningDiT(Pretrained):
    """The generator: latent z_t, time t and class y to velocity (or noise, or score), adaLN-zero conditioned.

    `gradient_checkpointing` recomputes each block in the backward pass; it can be set at any time.
    """

    Spec = DiTSpec

    def __init__(self, spec: DiTSpec, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.gradient_checkpointing = gradient_checkpointing
        self.num_classes = spec.num_classes
        self.in_channels = spec.in_channels
        self.out_channels = spec.in_channels * (2 if spec.learn_sigma else 1)
        grid = spec.input_size // spec.patch_size
        self.x_embedder = PatchEmbed(spec.patch_size, spec.in_channels, spec.hidden_size)
        self.t_embedder = TimestepEmbedder(spec.hidden_size)
        self.y_embedder = LabelEmbedder(spec.num_classes, spec.hidden_size, spec.class_dropout)
        # a frozen parameter, not a buffer, because the released checkpoints list it among the parameters
        self.pos_embed = nn.Parameter(sincos_positions(spec.hidden_size, grid), requires_grad=False)
        self.feat_rope = RotaryTable(spec.hidden_size // spec.num_heads, grid) if spec.rope else None
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final_layer = FinalLayer(spec, spec.patch_size**2 * self.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier-uniform linears, N(0, 0.02) embeddings, zero modulation and output (DiT, section 3.2)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.spec.label_init_std)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        for module in self.modules():
            if isinstance(module, (Block, FinalLayer)):
                last = module.adaLN_modulation[-1]
                assert isinstance(last, nn.Linear), "the modulation ends in a linear layer"
                nn.init.zeros_(last.weight)

    @property
    def compiled_blocks(self) -> list[nn.Module]:
        """All transformer blocks: what a trainer compiles one by one."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward(
        self, x_BChw: Tensor, t_B: Tensor, y_B: Tensor, drop_B: Tensor | None = None, *, with_variance: bool = False
    ) -> Tensor:
        """Prediction (B, C, h, w); a learned variance is left out unless `with_variance` asks for all (B, 2C, h, w).

        Labels are in [0, num_classes], the last one meaning "no class". In training mode a label is dropped with
        probability `spec.class_dropout` unless `drop_B` (bool) says which.
        """
        return self.forward_features(x_BChw, t_B, y_B, drop_B, with_variance=with_variance).prediction

    def forward_features(
        self,
        x_BChw: Tensor,
        t_B: Tensor,
        y_B: Tensor,
        drop_B: Tensor | None = None,
        *,
        with_variance: bool = False,
        taps: tuple[int, ...] = (),
        masked: bool = False,
    ) -> DiTOutput:
        """`forward` as training wants it: with the outputs of the blocks `taps`, or from a part of the tokens."""
        c_BD = self.condition(t_B, y_B, drop_B)
        hidden: dict[int, Tensor] = {}
        tokens, mask_BN = self.trunk(self.tokens(x_BChw), c_BD, taps=taps, hidden=hidden, masked=masked)
        return DiTOutput(self.head(tokens, c_BD, with_variance=with_variance), hidden, mask_BN=mask_BN)

    def trunk(
        self, x_BND: Tensor, c_BD: Tensor, *, taps: tuple[int, ...], hidden: dict[int, Tensor], masked: bool
    ) -> tuple[Tokens, Tensor | None]:
        """All tokens as the last layer takes them, and which of them were masked."""
        assert not masked, "a pass over a part of the tokens needs a MaskedDiT"
        places = None if self.feat_rope is None else self.feat_rope()
        return self.through(self.blocks, x_BND, c_BD, places, taps=taps, hidden=hidden), None

    def tokens(self, x_BChw: Tensor) -> Tensor:
        """Patches with their positions, (B, N, D)."""
        x_BND = self.x_embedder(x_BChw.to(self.dtype)) + self.pos_embed
        # a convolution leaves tokens innermost in memory, and sums with it keep that through all blocks
        return x_BND if is_exact() else x_BND.contiguous()

    def condition(self, t_B: Tensor, y_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """What modulates every block: time plus class, (B, D)."""
        return self.t_embedder(t_B, self.dtype) + self.y_embedder(y_B, drop_B)

    def through(
        self,
        blocks: Iterable[nn.Module],
        tokens: Tokens,
        c_BD: Tensor,
        places: Places,
        *,
        taps: tuple[int, ...] = (),
        hidden: dict[int, Tensor] | None = None,
    ) -> Tokens:
        """Tokens (B, N, D) through some of the blocks; `places` are those of the tokens that are there.

        The outputs of the blocks `taps`, counted from 1 among `blocks`, are put into `hidden`.
        """
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        first_BHNK: Tensor | None = None
        for number, block in enumerate(blocks, start=1):
            x_BND, *pending = (tokens,) if isinstance(tokens, Tensor) else tokens[:4]
            arguments = (x_BND, c_BD, places, first_BHNK, *pending)
            after = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            first_BHNK, tokens = after.values_BHNK if first_BHNK is None else first_BHNK, after
            if hidden is not None and number in taps:
                hidden[number] = closed(tokens)
        return tokens

    def head(self, tokens: Tokens, c_BD: Tensor, *, with_variance: bool = True) -> Tensor:
        """Tokens (B, N, D) to all output channels (B, C or 2C, h, w), or to the prediction (B, C, h, w) alone."""
        output = self._unpatchify(self.final_layer(tokens, c_BD))
        return output if with_variance else output[:, : self.in_channels]

    def forward_with_variance(self, x_BChw: Tensor, t_B: Tensor, y_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """All output channels: (B, 2C, h, w) with learn_sigma, (B, C, h, w) without."""
        return self(x_BChw, t_B, y_B, drop_B, with_variance=True)

    def _unpatchify(self, x_BNE: Tensor) -> Tensor:
        """(B, N, p*p*C) to (B, C, h, w)."""
        p = self.spec.patch_size
        grid = self.spec.input_size // p
        x = x_BNE.reshape(-1, grid, grid, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.out_channels, grid * p, grid * p)


class AlignedDiT(LightningDiT):
    """LightningDiT with REPA's projector (Yu et al. 2024): three linear layers from the tokens of block `repa.block`.

    They become (B, N, F) where that block is tapped. The projector serves training alone: an exported network, and one
    that samples, has none.
    """

    def __init__(self, spec: DiTSpec, repa: RepaSpec, feature_dim: int, gradient_checkpointing: bool = False) -> None:
        super().__init__(spec, gradient_checkpointing)
        width = repa.projector_width
        self.aligned_block = repa.block
        self.projector = nn.Sequential(
            nn.Linear(spec.hidden_size, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, feature_dim),
        )
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward_features(self, *arguments: Any, **options: Any) -> DiTOutput:
        """As LightningDiT's; where the aligned block is among the taps, with its projection."""
        features = super().forward_features(*arguments, **options)
        if self.aligned_block not in features.hidden:
            return features
        return features._replace(projected=self.projector(features.hidden[self.aligned_block]))
