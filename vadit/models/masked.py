"""Generators that train on part of their tokens: MaskDiT (Zheng et al. 2023, 2306.09305), MDT (Gao et al. 2023,
2303.14389, version 1).

Both are a LightningDiT (or, with its switches off, the DiT that the papers start from) with a few more blocks, and both
draw images on all tokens, without a mask, through the ordinary `forward`. In training `forward_features` with
`masked=True` draws a mask per sample from torch's generator on the device and runs the first blocks on the visible
tokens alone: a masked token costs nothing there. Positions go with their tokens: the fixed or learnt embedding is added
before tokens are left out, and rotary tables, or MDT's relative bias, are taken at the visible places.

Shapes: B batch, N tokens, V visible tokens, D hidden size, W decoder width, H heads, K head width, R relative places.
"""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vadit.config import DiTConfig, DiTSpec, EngineSpec, FlowSpec, MaskSpec, RepaSpec
from vadit.config.files import load_config, save_config
from vadit.config.masks import check_masks
from vadit.models import dit
from vadit.models.pretrained import read_model, read_spec
from vadit.runtime.errors import UsageError, naming

MASK_NAME = "mask.json"  # holds the MaskSpec of an exported folder; one without it is a plain LightningDiT's
MAX_RELATIVE_GRID = 64  # side of the grid of tokens for which a table of all pairs fits the memory (0.5 GB)
INIT_STD = 0.02  # standard deviation of mask token and relative bias at the start (both papers' code)


def build_generator(spec: DiTSpec, mask: MaskSpec, gradient_checkpointing: bool = False) -> dit.LightningDiT:
    """The network of a run: a plain LightningDiT where nothing is masked."""
    if mask.kind == "maskdit":
        return MaskDiT(spec, mask, gradient_checkpointing)
    if mask.kind == "mdt":
        return MDT(spec, mask, gradient_checkpointing)
    return dit.LightningDiT(spec, gradient_checkpointing)


def training_network(config: DiTConfig, feature_dim: int | None = None) -> dit.LightningDiT:
    """The generator as it trains: with REPA's projector to features of `feature_dim` channels, where there are any."""
    if feature_dim is not None:
        return dit.AlignedDiT(config.model, config.repa, feature_dim, config.engine.gradient_checkpointing)
    return build_generator(config.model, config.mask, config.engine.gradient_checkpointing)


def load_exported(folder: str | Path) -> dit.LightningDiT:
    """The generator that `save_pretrained` wrote to a folder, masked or not; float32, on the CPU, in evaluation mode.

    UsageError: no such folder, or its weights and its specs do not fit each other. RunError: a damaged file.
    """
    folder = Path(folder)
    if not (folder / MASK_NAME).is_file():
        return dit.LightningDiT.from_pretrained(folder)
    spec, mask = read_spec(DiTSpec, folder), load_config(MaskSpec, folder / MASK_NAME)
    if mask.kind != "none":
        with naming(folder / MASK_NAME):
            check_masks(mask, spec, FlowSpec(), RepaSpec(), EngineSpec())
    return read_model(folder, lambda: build_generator(spec, mask))


class PlacedAttention(dit.Attention):
    """Attention of tokens at any places, each sample's its own.

    `places` are the tokens' rotary tables (N, K) or (B, V, K); or int64 entries of a learnt relative bias, (N, N) or
    (B, V, V) (`relative_grid`: the side of the grid that it is for); or None.
    """

    def __init__(self, spec: DiTSpec, relative_grid: int | None = None) -> None:
        super().__init__(spec)
        self.relative_bias: nn.Parameter | None = None
        if relative_grid is not None:
            self.relative_bias = nn.Parameter(torch.zeros((2 * relative_grid - 1) ** 2, self.num_heads))

    def placed(self, qkv_BN3HK: Tensor, places: dit.Places, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if places is None or isinstance(places, Tensor):
            return super().placed(qkv_BN3HK, None, bias)
        if places[0].ndim == 2:
            return super().placed(qkv_BN3HK, places, bias)
        # The kernel takes one table for all samples: here the samples are laid in one row, and their tables too.
        B, N, _, H, K = qkv_BN3HK.shape
        cos, sin = (table.reshape(B * N, K) for table in places)
        row = super().placed(qkv_BN3HK.reshape(1, B * N, 3, H, K), (cos, sin), bias)
        q, k, v = (t.transpose(1, 2).reshape(B, N, H, K).transpose(1, 2) for t in row)
        return q, k, v

    def mix(self, q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, places: dit.Places) -> Tensor:
        """With the bias of each pair of places added to its logit (MDT, section 3.3); torch's kernels alone can."""
        if not isinstance(places, Tensor):
            return super().mix(q_BHNK, k_BHNK, v_BHNK, places)
        assert self.relative_bias is not None, "a relative bias was asked of an attention without one"
        bias = F.embedding(places, self.relative_bias).movedim(-1, -3).to(v_BHNK.dtype)
        return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, attn_mask=bias)


def relative_entries(grid: int) -> Tensor:
    """(N, N) int64: which of the R = (2 grid - 1)^2 offsets (row, column) lies between two of the grid's places."""
    place = torch.arange(grid * grid, device="cpu")  # also where a model is built without memory
    row, column = place // grid, place % grid
    rows = row[:, None] - row[None, :] + grid - 1
    columns = column[:, None] - column[None, :] + grid - 1
    return rows * (2 * grid - 1) + columns


class MaskedDiT(dit.LightningDiT):
    """What MaskDiT and MDT share: masks, and the places of the tokens that are left."""

    entries_NN: Tensor | None

    def __init__(self, spec: DiTSpec, mask: MaskSpec, gradient_checkpointing: bool = False) -> None:
        super().__init__(spec, gradient_checkpointing)
        self.mask = mask
        grid = spec.input_size // spec.patch_size
        self.num_tokens = grid**2
        self.num_visible = int(self.num_tokens * (1 - mask.ratio))
        assert 0 < self.num_visible < self.num_tokens, f"mask.ratio {mask.ratio} of {self.num_tokens} tokens"
        # rotary tables take the place of MDT's relative bias: they are relative, too
        self.relative_grid = grid if mask.kind == "mdt" and not spec.rope else None
        entries_NN = None if self.relative_grid is None else relative_entries(self.relative_grid)
        self.register_buffer("entries_NN", entries_NN, persistent=False)
        for block in self.blocks:
            self._place(block)

    def _place(self, block: nn.Module) -> None:
        assert isinstance(block, dit.Block), "blocks of a generator are Blocks"
        block.attn = PlacedAttention(self.spec, self.relative_grid)

    def trunk(
        self, x_BND: Tensor, c_BD: Tensor, *, taps: tuple[int, ...], hidden: dict[int, Tensor], masked: bool
    ) -> tuple[dit.Tokens, Tensor | None]:
        assert not taps, "no loss of a masked generator takes outputs of its blocks"
        if not masked:
            return self._through_all(x_BND, c_BD, None), None
        visible_BV = self.draw_visible(len(x_BND))
        x_BVD = x_BND.gather(1, visible_BV[:, :, None].expand(-1, -1, x_BND.shape[-1]))
        return self._through_all(x_BVD, c_BD, visible_BV), self._mask(visible_BV)

    def _through_all(self, x_BND: Tensor, c_BD: Tensor, visible_BV: Tensor | None) -> dit.Tokens:
        """All tokens (B, N, W) as the last layer takes them, from the visible ones or, without a mask, from all."""
        raise NotImplementedError

    def draw_visible(self, batch_size: int) -> Tensor:
        """Visible places (B, V) int64, in ascending order: a uniform draw for each sample."""
        order = torch.rand(batch_size, self.num_tokens, device=self.pos_embed.device).argsort(dim=1)
        return order[:, : self.num_visible].sort(dim=1).values

    def _places(self, visible_BV: Tensor | None = None) -> dit.Places:
        """What attention needs to know of the places of all tokens, or of the visible ones."""
        if self.feat_rope is not None:
            cos, sin = self.feat_rope()
            return (cos, sin) if visible_BV is None else (cos[visible_BV], sin[visible_BV])
        if self.entries_NN is None or visible_BV is None:
            return self.entries_NN
        return self.entries_NN[visible_BV[:, :, None], visible_BV[:, None, :]]

    def _mask(self, visible_BV: Tensor) -> Tensor:
        """(B, N) bool: True where a token is masked."""
        mask_BN = torch.ones(len(visible_BV), self.num_tokens, dtype=torch.bool, device=visible_BV.device)
        return mask_BN.scatter_(1, visible_BV, False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, mask.json and model.safetensors; the masks' settings first, so that none lacks them."""
        save_config(self.mask, Path(folder) / MASK_NAME)
        super().save_pretrained(folder)


def _fill(x_BVD: Tensor, visible_BV: Tensor, token: Tensor, num_tokens: int) -> Tensor:
    """Visible tokens at their places among copies of the mask token, (B, N, D)."""
    B, _, D = x_BVD.shape
    empty = token.to(x_BVD.dtype).expand(B, num_tokens, D)
    return empty.scatter(1, visible_BV[:, :, None].expand(-1, -1, D), x_BVD)


class MaskDiT(MaskedDiT):
    """MaskDiT: all blocks see the visible tokens, then a narrow decoder sees all, mask tokens at the empty places."""

    def __init__(self, spec: DiTSpec, mask: MaskSpec, gradient_checkpointing: bool = False) -> None:
        super().__init__(spec, mask, gradient_checkpointing)
        grid, width = spec.input_size // spec.patch_size, mask.decoder_width
        decoder = dataclasses.replace(
            spec, hidden_size=width, depth=mask.decoder_depth, num_heads=mask.decoder_heads, value_residual=False
        )
        self.narrowing = dit.FinalLayer(spec, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(dit.sincos_positions(width, grid), requires_grad=False)
        self.decoder_rope = dit.RotaryTable(width // mask.decoder_heads, grid) if spec.rope else None
        self.decoder_blocks = nn.ModuleList(dit.Block(decoder, spec.hidden_size) for _ in range(mask.decoder_depth))
        self.final_layer = dit.FinalLayer(decoder, spec.patch_size**2 * self.out_channels, spec.hidden_size)
        self._initialize()
        nn.init.normal_(self.mask_token, std=INIT_STD)
        nn.init.zeros_(self.narrowing.linear.weight)  # as in the authors' code

    def _through_all(self, x_BND: Tensor, c_BD: Tensor, visible_BV: Tensor | None) -> dit.Tokens:
        x_BND = self.narrowing(self.through(self.blocks, x_BND, c_BD, self._places(visible_BV)), c_BD)
        if visible_BV is not None:
            x_BND = _fill(x_BND, visible_BV, self.mask_token, self.num_tokens)
        elif self.training:  # without a mask the token has a gradient of 0, which ZeRO needs more than none
            x_BND = x_BND + 0 * self.mask_token.to(x_BND.dtype)
        x_BND = x_BND + self.decoder_pos_embed.to(x_BND.dtype)
        places = None if self.decoder_rope is None else self.decoder_rope()
        return self.through(self.decoder_blocks, x_BND, c_BD, places)


class MDT(MaskedDiT):
    """MDT: the first blocks see the visible tokens; a side block fills in the others before the last blocks see all.

    Positions as in the paper: both embeddings are learnt, and attention has a learnt relative bias, but for a model
    with rotary tables.
    """

    def __init__(self, spec: DiTSpec, mask: MaskSpec, gradient_checkpointing: bool = False) -> None:
        grid = spec.input_size // spec.patch_size
        if not spec.rope and grid > MAX_RELATIVE_GRID:
            raise UsageError(
                f"model.input_size and model.patch_size give {grid} x {grid} tokens; without model.rope mdt takes at "
                f"most {MAX_RELATIVE_GRID} x {MAX_RELATIVE_GRID}"
            )
        assert 0 < mask.decoder_depth < spec.depth, f"mask.decoder_depth {mask.decoder_depth} of {spec.depth} blocks"
        super().__init__(spec, mask, gradient_checkpointing)
        self.pos_embed.requires_grad_(True)
        self.decoder_pos_embed = nn.Parameter(dit.sincos_positions(spec.hidden_size, grid))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.hidden_size))
        self.side_block = dit.Block(spec)
        self._place(self.side_block)
        self._initialize()
        nn.init.normal_(self.mask_token, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, PlacedAttention) and module.relative_bias is not None:
                nn.init.normal_(module.relative_bias, std=INIT_STD)

    def _through_all(self, x_BND: Tensor, c_BD: Tensor, visible_BV: Tensor | None) -> dit.Tokens:
        blocks = list(self.blocks)
        first, last = blocks[: -self.mask.decoder_depth], blocks[-self.mask.decoder_depth :]
        x_BND = dit.closed(self.through(first, x_BND, c_BD, self._places(visible_BV)))
        everywhere = self._places()
        positions = self.decoder_pos_embed.to(x_BND.dtype)
        if visible_BV is None:
            x_BND = x_BND + positions
        else:
            before_BND = _fill(x_BND, visible_BV, self.mask_token, self.num_tokens) + positions
            side_BND = dit.closed(self.through([self.side_block], before_BND, c_BD, everywhere))
            x_BND = torch.where(self._mask(visible_BV)[:, :, None], side_BND, before_BND)
        return self.through(last, x_BND, c_BD, everywhere)
