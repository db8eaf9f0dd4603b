"""The settings of a run: frozen dataclasses, and the one place where a default is written.

A recipe (`vadit.recipes`) is a function that returns a `TokenizerConfig` or a `DiTConfig`; the command line
overrides single fields of it (`--optimizer.lr 1e-4`); `config.json` in the run folder holds the result.
Progress is counted in images, so a recipe survives a change of batch size. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vadit.errors import UsageError

# ------------------------------------------------------------------------------------------------ networks


@dataclass(frozen=True)
class AutoencoderSpec:
    """The LDM / VQGAN-KL autoencoder (Rombach et al. 2022; reference settings: f16d32 at 256 pixels)."""

    image_size: int = 256
    """Side of the training images in pixels; attention resolutions are counted at this size."""
    in_channels: int = 3
    """Channels of the image."""
    latent_channels: int = 32
    """Channels d of the latent."""
    base_channels: int = 128
    """Width of the first level, in channels."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each level as a multiple of base_channels; each level after the first halves the side."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder (the decoder has one more)."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Feature-map sides, in pixels at image_size, that get self-attention (the middle always has it)."""
    dropout: float = 0.0
    """Dropout probability in the residual blocks."""
    norm_groups: int = 32
    """Groups of GroupNorm; must divide every level's width."""

    @property
    def downsample_ratio(self) -> int:
        """Image side over latent side (f16: 16)."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def latent_size(self) -> int:
        """Side of the latent of a training image."""
        return self.image_size // self.downsample_ratio

    def __post_init__(self) -> None:
        if self.image_size % self.downsample_ratio:
            raise UsageError(
                f"autoencoder.image_size {self.image_size} is not divisible by the downsample ratio "
                f"{self.downsample_ratio}; choose a multiple of {self.downsample_ratio}"
            )
        for multiplier in self.channel_multipliers:
            if self.base_channels * multiplier % self.norm_groups:
                raise UsageError(
                    f"autoencoder.norm_groups {self.norm_groups} does not divide the level width "
                    f"{self.base_channels * multiplier}; change autoencoder.base_channels or norm_groups"
                )


@dataclass(frozen=True)
class DiTSpec:
    """LightningDiT, or with the four switches off the plain DiT (Peebles & Xie 2023)."""

    input_size: int = 16
    """Side of the latent."""
    patch_size: int = 1
    """Side of a patch, in latent positions."""
    in_channels: int = 32
    """Channels of the latent."""
    hidden_size: int = 1152
    """Width of the transformer."""
    depth: int = 28
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over hidden_size (SwiGLU uses 2/3 of it)."""
    num_classes: int = 1000
    """Number of classes; the null class of guidance has this index."""
    class_dropout: float = 0.1
    """Probability that a training label becomes the null class."""
    learn_sigma: bool = False
    """Predict the variance, too (DDPM baseline): doubles the output channels."""
    qk_norm: bool = False
    """Normalise queries and keys per head (a cure of NaN in long runs)."""
    swiglu: bool = True
    """SwiGLU instead of the GELU MLP."""
    rope: bool = True
    """2-D rotary position embedding on queries and keys, besides the fixed sin-cos embedding."""
    rmsnorm: bool = True
    """RMSNorm with a weight instead of LayerNorm without one."""
    shift_free: bool = False
    """adaLN without shifts (4 chunks instead of 6)."""
    label_init_std: float = 0.02
    """Standard deviation of the label embedding at the start."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UsageError(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}"
            )
        if self.rope and self.hidden_size // self.num_heads % 4:
            raise UsageError(
                f"model.rope needs a head width divisible by 4, found {self.hidden_size}/{self.num_heads}; "
                "change model.num_heads or set --no-model.rope"
            )
        if self.input_size % self.patch_size:
            raise UsageError(
                f"model.input_size {self.input_size} is not divisible by model.patch_size {self.patch_size}"
            )


@dataclass(frozen=True)
class FoundationSpec:
    """The frozen vision foundation model that the latent is aligned to, through timm."""

    name: str = "dinov2"
    """dinov2, mae, sam, clip, any timm model name, or none (no alignment)."""
    weights: str = "hub"
    """hub (timm downloads them), a path to a .safetensors/.pth/.bin file, or random (tests only)."""
    input_size: int | None = None
    """Side that images are resized to, in pixels; default: patch size x latent side (DINOv2: 224)."""
    input_range: Literal["normalized", "minus_one_one"] = "normalized"
    """normalized: the model's own mean and std; minus_one_one: images in [-1, 1] as the authors fed them."""
    model_args: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Extra keyword arguments of timm.create_model."""


# ------------------------------------------------------------------------------------------------ objectives


@dataclass(frozen=True)
class TokenizerLossSpec:
    """The generator and discriminator losses of VA-VAE (reference.md section 2)."""

    perceptual_weight: float = 1.0
    """Weight of LPIPS (VGG); 0 leaves it out and needs no VGG file."""
    vgg_weights: str | None = None
    """Path of torchvision's vgg16 file (vgg16-397923af.pth); needed where perceptual_weight > 0."""
    kl_weight: float = 1e-6
    """Weight of the KL term."""
    disc_weight: float = 0.5
    """Weight of the adversarial term before the adaptive factor; 0 trains without a discriminator."""
    disc_start_step: int = 5001
    """First optimizer step at which the discriminator counts (1 for a fine-tuning stage)."""
    disc_channels: int = 64
    """Width of the PatchGAN discriminator's first layer."""
    disc_layers: int = 3
    """Strided layers of the PatchGAN discriminator."""
    vf_weight: float = 0.1
    """Weight of the VF loss (w_hyper) before the adaptive factor; 0 trains without alignment."""
    vf_adaptive: bool = True
    """Scale the VF loss by the ratio of gradient norms at the encoder's last layer."""
    cos_margin: float = 0.5
    """Margin m1 of the marginal cosine similarity loss."""
    distmat_margin: float = 0.25
    """Margin m2 of the marginal distance matrix similarity loss."""
    cos_weight: float = 1.0
    """Weight of the marginal cosine similarity loss inside the VF loss."""
    distmat_weight: float = 1.0
    """Weight of the marginal distance matrix similarity loss inside the VF loss."""
    vf_projection: Literal["latent_up", "features_down"] = "latent_up"
    """latent_up: z' = W z at the features' width (the paper); features_down: features projected to d."""


@dataclass(frozen=True)
class FlowSpec:
    """What the generator learns: a flow (Lipman et al. 2023; SiT) or the DDPM of the plain DiT."""

    objective: Literal["flow", "ddpm"] = "flow"
    """flow: t in [0, 1], 1 is data; ddpm: 1000 linear-beta steps with learned variance (Table 1, first row)."""
    path: Literal["linear", "gvp", "vp"] = "linear"
    """Interpolation path between noise and data."""
    prediction: Literal["velocity", "noise", "score"] = "velocity"
    """What the network's output stands for."""
    time_law: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of t in training."""
    uniform_after_images: int | None = None
    """Switch time_law to uniform after this many images (the authors: 600k of 1M steps of the 800-epoch run)."""
    direction_loss: bool = True
    """Add 1 - cos(prediction, velocity) along channels."""
    loss_weighting: Literal["none", "velocity", "likelihood"] = "none"
    """Weighting of noise and score prediction (SiT)."""


# ------------------------------------------------------------------------------------------------ optimisation


@dataclass(frozen=True)
class OptimizerSpec:
    """Adam with decoupled weight decay, and the learning rate over the run."""

    kind: Literal["adamw", "deepspeed_fused", "apex_fused", "adamw_8bit"] = "adamw"
    """Whose AdamW, for a whole run: torch's, DeepSpeed's or apex's FusedAdam (GPUs), or torchao's in 8 bits."""
    lr: float = 2e-4
    """Learning rate at its peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "one_cycle", "linear"] = "constant"
    """constant after the warm-up; one_cycle: cosine up over 30% of the run and down to 0; linear decay to 0."""
    warmup_images: int = 0
    """Images over which the rate rises linearly from 0 (constant and linear)."""


@dataclass(frozen=True)
class EngineSpec:
    """DeepSpeed's part: sharding, precision and the numbers of one step."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 1 shards the optimizer, 2 also gradients, 3 also weights."""
    precision: Literal["fp32", "bf16", "autocast"] = "fp32"
    """fp32; bf16: bf16 weights with fp32 masters; autocast: fp32 weights, bf16 arithmetic (the authors')."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step."""
    max_grad_norm: float = 1.0
    """Gradient norm that larger ones are clipped to; 0 switches clipping off."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (ZeRO 1-3)."""
    offload_weights: bool = False
    """Keep weights in host memory (ZeRO 3)."""
    overlap_comm: bool = False
    """Overlap gradient reduction with the backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each block."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "math", "flash_attn_2", "flash_attn_3"] = "auto"
    """The generator's attention: one of torch's kernels, the flash-attn package, or auto (by GPU and head width)."""
    float8: Literal["rowwise", "tensorwise"] | None = None
    """Scaling of float8 products in the generator's blocks (torchao; GPUs from sm_89; with --engine.compile)."""
    ema_decays: tuple[float, ...] = (0.9999,)
    """Decay of each exponential moving average of the weights; empty for none."""


@dataclass(frozen=True)
class RunSpec:
    """Length, logging and checkpoints, in images."""

    out: str = "runs/default"
    """Run folder; the same command continues what is there."""
    total_images: int = 80_000 * 1024
    """Images to train on (64 epochs of ImageNet: 81,920,000)."""
    batch_size: int = 1024
    """Images per optimizer step over all processes."""
    seed: int = 0
    """Seed of initialisation, order of the data, noise and dropout."""
    log_every_images: int = 102_400
    """Images between two log points."""
    save_every_images: int = 5_120_000
    """Images between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    init_from: str | None = None
    """Weights to start from: a run, an exported folder or a checkpoint of the authors (optimizer starts anew)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the run."""
    deterministic: bool = False
    """Deterministic algorithms only: bit-equal runs, slower on GPUs."""


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class ImageDataSpec:
    """Images for the tokenizer."""

    path: str = ""
    """Folder of images: one subfolder per class, or flat. debug:N makes N random images (debug recipes)."""
    crop: Literal["center", "random", "random_resized"] = "center"
    """center: ADM's centre crop; random: a random square of the short side; random_resized: of area 0.8-1."""
    flip: bool = False
    """Mirror images at random."""
    num_workers: int = 8
    """Decoding threads per process."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with an image that does not decode: stop and name it, or leave it out and count it."""


@dataclass(frozen=True)
class LatentDataSpec:
    """Latents for the generator."""

    path: str = ""
    """Folder of latent shards (from `vadit encode` or the authors). debug:N makes N random latents."""
    normalize: bool = True
    """Subtract the channel mean and divide by the channel standard deviation."""
    multiplier: float = 1.0
    """Factor after normalisation (SD-VAE: normalize off, 0.18215)."""
    flip: bool = True
    """Take the mirrored latent with probability 1/2."""


@dataclass(frozen=True)
class SampleSpec:
    """How images are drawn from a generator."""

    method: Literal["euler", "heun", "dopri5", "euler_maruyama", "ddpm"] = "euler"
    """ODE solver, or Euler-Maruyama for the SDE; ddpm for a generator trained with the ddpm objective."""
    num_steps: int = 250
    """Points of linspace(0, 1): one less is the number of steps (250 points: 249 steps, as the authors count)."""
    timestep_shift: float = 0.0
    """s in t' = s t / (1 + (s - 1) t); 0 for none (the authors: 0.3)."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is no guidance."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance acts where low <= t <= high."""
    cfg_channels: int | None = None
    """Guide only the first so many channels (the authors: 3); default all."""
    atol: float = 1e-6
    """Absolute tolerance of dopri5."""
    rtol: float = 1e-3
    """Relative tolerance of dopri5."""
    labels: Literal["random", "balanced"] = "random"
    """Uniform random labels, or the same number of each class."""
    seed: int = 0
    """Seed; sample i is a function of (seed, i) alone."""
    sde_diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"] = "sigma"
    """Diffusion coefficient of euler_maruyama (SiT, table 3)."""
    sde_last_step: Literal["mean", "tweedie", "euler", "none"] = "mean"
    """How euler_maruyama takes its last step (SiT: mean, of size 0.04)."""


# ------------------------------------------------------------------------------------------------ whole recipes


@dataclass(frozen=True)
class Paper:
    """What a recipe reproduces."""

    source: str = ""
    """Table and row."""
    metric: str = ""
    """The paper's number with its protocol name."""


@dataclass(frozen=True)
class StageSpec:
    """One stage of a tokenizer's training: fields left at None keep the recipe's value."""

    total_images: int
    """Images of this stage."""
    vf_weight: float | None = None
    """TokenizerLossSpec.vf_weight in this stage."""
    cos_margin: float | None = None
    """TokenizerLossSpec.cos_margin in this stage."""
    distmat_margin: float | None = None
    """TokenizerLossSpec.distmat_margin in this stage."""
    disc_start_step: int | None = None
    """TokenizerLossSpec.disc_start_step in this stage, counted from its start."""


@dataclass(frozen=True)
class TokenizerConfig:
    """A whole tokenizer run."""

    autoencoder: AutoencoderSpec = field(default_factory=AutoencoderSpec)
    foundation: FoundationSpec = field(default_factory=FoundationSpec)
    loss: TokenizerLossSpec = field(default_factory=TokenizerLossSpec)
    optimizer: OptimizerSpec = field(default_factory=lambda: OptimizerSpec(lr=1e-4, betas=(0.5, 0.9)))
    engine: EngineSpec = field(default_factory=lambda: EngineSpec(ema_decays=(), max_grad_norm=0.0))
    run: RunSpec = field(default_factory=lambda: RunSpec(batch_size=256, total_images=50 * 1_281_167))
    data: ImageDataSpec = field(default_factory=ImageDataSpec)
    stages: tuple[StageSpec, ...] = ()
    """Stages that follow each other, each from the last one's weights with a fresh optimizer; empty: one stage."""
    paper: Paper = field(default_factory=Paper)
    kind: Literal["tokenizer"] = "tokenizer"

    def __post_init__(self) -> None:
        _check_run(self.run, self.engine)
        _check_peers(self.optimizer, self.engine)
        if self.engine.float8 is not None or self.engine.attention != "auto":
            raise UsageError("engine.float8 and engine.attention are a generator's; leave them out for a tokenizer")
        if self.loss.vf_weight > 0 and self.foundation.name == "none":
            raise UsageError(
                "loss.vf_weight is above 0 but foundation.name is none; set --loss.vf-weight 0 or name a model"
            )


@dataclass(frozen=True)
class DiTConfig:
    """A whole generator run."""

    model: DiTSpec = field(default_factory=DiTSpec)
    flow: FlowSpec = field(default_factory=FlowSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    engine: EngineSpec = field(default_factory=lambda: EngineSpec(precision="autocast"))
    run: RunSpec = field(default_factory=RunSpec)
    data: LatentDataSpec = field(default_factory=LatentDataSpec)
    sample: SampleSpec = field(default_factory=SampleSpec)
    paper: Paper = field(default_factory=Paper)
    kind: Literal["dit"] = "dit"

    def __post_init__(self) -> None:
        _check_run(self.run, self.engine)
        _check_peers(self.optimizer, self.engine)
        if self.flow.objective == "ddpm" and not self.model.learn_sigma:
            raise UsageError("flow.objective ddpm learns the variance; set --model.learn-sigma")


Config = TokenizerConfig | DiTConfig


def _check_run(run: RunSpec, engine: EngineSpec) -> None:
    for name in ("total_images", "batch_size", "log_every_images", "save_every_images", "keep_checkpoints"):
        if getattr(run, name) < 1:
            raise UsageError(f"run.{name} is {getattr(run, name)}; it must be at least 1")
    if engine.gradient_accumulation < 1:
        raise UsageError(f"engine.gradient_accumulation is {engine.gradient_accumulation}; it must be at least 1")
    if any(not 0 <= decay < 1 for decay in engine.ema_decays):
        raise UsageError(f"engine.ema_decays {engine.ema_decays}: every decay must be in [0, 1)")
    if engine.precision == "bf16" and engine.zero_stage == 0:
        raise UsageError("engine.precision bf16 keeps its fp32 weights in ZeRO; set --engine.zero-stage 1, 2 or 3")
    if engine.offload_weights and engine.zero_stage != 3:
        raise UsageError(f"engine.offload_weights needs engine.zero_stage 3, found {engine.zero_stage}")


def _check_peers(optimizer: OptimizerSpec, engine: EngineSpec) -> None:
    """Refuse combinations that other people's kernels cannot do, or that would undo what they are for."""
    if optimizer.kind != "adamw" and engine.offload_optimizer:
        raise UsageError(
            f"optimizer.kind {optimizer.kind} steps on the GPU, engine.offload_optimizer keeps its state on the host; "
            "set --optimizer.kind adamw or --no-engine.offload-optimizer"
        )
    if optimizer.kind == "adamw_8bit" and engine.zero_stage == 0:
        raise UsageError(
            "optimizer.kind adamw_8bit cannot be resumed at engine.zero_stage 0; set --engine.zero-stage 1, 2 or 3"
        )
    if engine.float8 is None:
        return
    if engine.precision == "fp32":
        raise UsageError("engine.float8 takes the place of bf16 products; set --engine.precision autocast or bf16")
    if engine.zero_stage == 3:
        raise UsageError(
            "engine.float8 keeps every gathered weight until the backward pass, which engine.zero_stage 3 is to avoid; "
            "set --engine.zero-stage 2"
        )
