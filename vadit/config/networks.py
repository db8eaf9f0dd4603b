"""The settings of the networks."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vadit.config.ranges import Blocks, Checked, PathName, Range, Share, Side, Width
from vadit.runtime.errors import UsageError


@dataclass(frozen=True)
class AutoencoderSpec(Checked, group="autoencoder"):
    """The LDM / VQGAN-KL autoencoder (Rombach et al. 2022; reference settings: f16d32 at 256 pixels)."""

    image_size: Side = 256  # Side of the training images in pixels; attention resolutions are counted at this size.
    in_channels: Width = 3  # Channels of the image.
    latent_channels: Width = 32  # Channels d of the latent.
    base_channels: Width = 128  # Width of the first level, in channels.
    channel_multipliers: tuple[Width, ...] = (1, 1, 2, 2, 4)
    """Width of each level as a multiple of base_channels; each level after the first halves the side."""
    num_res_blocks: Annotated[int, Range(1, 100)] = 2
    """Residual blocks per level of the encoder (the decoder has one more)."""
    attention_resolutions: tuple[Side, ...] = (16,)
    """Feature-map sides, in pixels at image_size, that get self-attention (the middle always has it)."""
    norm_groups: Width = 32  # Groups of GroupNorm; must divide every level's width.

    @property
    def downsample_ratio(self) -> int:
        """Image side over latent side (f16: 16)."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_size(self) -> int:
        """Side of the latent of a training image."""
        return self.image_size // self.downsample_ratio

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.channel_multipliers) <= 12:
            raise UsageError(f"autoencoder.channel_multipliers is {self.channel_multipliers}; name 1 to 12 levels")
        if self.image_size % self.downsample_ratio:
            raise UsageError(
                f"autoencoder.image_size {self.image_size} is not divisible by the downsample ratio "
                f"{self.downsample_ratio}; choose a multiple of {self.downsample_ratio}"
            )
        sides = [self.image_size // 2**level for level in range(len(self.channel_multipliers))]
        if idle := set(self.attention_resolutions) - set(sides):
            raise UsageError(
                f"autoencoder.attention_resolutions {self.attention_resolutions}: no level has a side of {min(idle)}; "
                f"they have {', '.join(map(str, sides))} at autoencoder.image_size {self.image_size}"
            )
        for width in (self.base_channels * multiplier for multiplier in self.channel_multipliers):
            if width % self.norm_groups:
                raise UsageError(
                    f"autoencoder.norm_groups {self.norm_groups} does not divide the level width {width}; change "
                    "autoencoder.base_channels or norm_groups"
                )


@dataclass(frozen=True)
class DiTSpec(Checked, group="model"):
    """LightningDiT, or with the four switches off the plain DiT (Peebles & Xie 2023)."""

    input_size: Side = 16  # Side of the latent.
    patch_size: Side = 1  # Side of a patch, in latent positions.
    in_channels: Width = 32  # Channels of the latent.
    hidden_size: Width = 1152  # Width of the transformer.
    depth: Blocks = 28  # Number of blocks.
    num_heads: Width = 16  # Attention heads.
    mlp_ratio: Annotated[float, Range(0, 1_000, above=True)] = 4.0
    """Hidden width of the MLP over hidden_size (SwiGLU uses 2/3 of it)."""
    num_classes: Annotated[int, Range(1, 1_000_000)] = 1000
    """Number of classes; the null class of guidance has this index."""
    class_dropout: Share = 0.1  # Probability that a training label becomes the null class.
    learn_sigma: bool = False  # Predict the variance, too (DDPM baseline): doubles the output channels.
    qk_norm: bool = False  # Normalise queries and keys per head (a cure of NaN in long runs).
    swiglu: bool = True  # SwiGLU instead of the GELU MLP.
    rope: bool = True  # 2-D rotary position embedding on queries and keys, besides the fixed sin-cos embedding.
    rmsnorm: bool = True  # RMSNorm with a weight instead of LayerNorm without one.
    shift_free: bool = False  # adaLN without shifts (4 chunks instead of 6).
    value_residual: bool = False
    """Mix each block's attention values with the first block's, by learnt weights (Zhou et al. 2024)."""
    label_init_std: Annotated[float, Range(0, 10)] = 0.02  # Standard deviation of the label embedding at the start.

    def __post_init__(self) -> None:
        super().__post_init__()
        width, heads, side, patch = self.hidden_size, self.num_heads, self.input_size, self.patch_size
        if width % 4:
            raise UsageError(f"model.hidden_size {width} is not divisible by 4 (sin-cos embedding)")
        if width % heads:
            raise UsageError(f"model.hidden_size {width} is not divisible by model.num_heads {heads}")
        if self.rope and width // heads % 4:
            raise UsageError(
                f"model.rope needs a head width divisible by 4, found {width}/{heads}; change model.num_heads or set "
                "--model.no-rope"
            )
        if side % patch:
            raise UsageError(f"model.input_size {side} is not divisible by model.patch_size {patch}")


@dataclass(frozen=True)
class FoundationSpec(Checked, group="foundation"):
    """The frozen vision foundation model that the latent is aligned to, through timm.

    It sees images of patch size x latent side (DINOv2: 224), so that its grid is the latent's.
    """

    name: str = "dinov2"  # dinov2, mae, sam, clip, any timm model name, or none (no alignment).
    weights: PathName = "hub"
    """hub (timm downloads them), a path to a .safetensors/.pth/.bin file, own (a tokenizer's: trained on its pictures
    first, and kept in its run folder), or random (tests only)."""
    own_steps: Annotated[int, Range(1, 1_000_000)] = 300
    """Steps of such a training, of 64 images each."""
    input_range: Literal["normalized", "minus_one_one"] = "normalized"
    """normalized: the model's own mean and std; minus_one_one: images in [-1, 1] as the authors fed them."""
    model_args: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Extra keyword arguments of timm.create_model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.model_args.items():
            if isinstance(value, (int, float)) and value not in (limits := Range(0, 65_536)):
                raise UsageError(f"foundation.model_args.{name} is {value}; it must be {limits}")
