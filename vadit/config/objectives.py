"""The settings of what is learnt and of how samples are drawn."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vadit.config.networks import FoundationSpec
from vadit.config.ranges import AnyImages, Blocks, Checked, Decay, Margin, PathName, Range, Seed, Share, Weight, Width
from vadit.runtime.errors import UsageError

DDPM_STEPS = 1000  # noise levels of the DDPM objective


@dataclass(frozen=True)
class TokenizerLossSpec(Checked, group="loss"):
    """The generator and discriminator losses of VA-VAE (arXiv 2501.01423, section 3): VQGAN's and the VF loss."""

    perceptual_weight: Weight = 1.0  # Weight of LPIPS (VGG); 0 leaves it out and needs no VGG file.
    vgg_weights: PathName | None = None
    """Path of torchvision's vgg16 file (vgg16-397923af.pth); needed where perceptual_weight > 0."""
    kl_weight: Weight = 1e-6  # Weight of the KL term.
    disc_weight: Weight = 0.5
    """Weight of the adversarial term before the adaptive factor; 0 trains without a discriminator."""
    disc_start_step: AnyImages = 5001
    """First optimizer step at which the discriminator counts (1 for a fine-tuning stage)."""
    disc_channels: Width = 64  # Width of the PatchGAN discriminator's first layer.
    disc_layers: Annotated[int, Range(1, 12)] = 3  # Strided layers of the PatchGAN discriminator.
    vf_weight: Weight = 0.1  # Weight of the VF loss (w_hyper) before the adaptive factor; 0 trains without alignment.
    vf_adaptive: bool = True  # Scale the VF loss by the ratio of gradient norms at the encoder's last layer.
    cos_margin: Margin = 0.5  # Margin m1 of the marginal cosine similarity loss.
    distmat_margin: Margin = 0.25  # Margin m2 of the marginal distance matrix similarity loss.
    cos_weight: Weight = 1.0  # Weight of the marginal cosine similarity loss inside the VF loss.
    distmat_weight: Weight = 1.0  # Weight of the marginal distance matrix similarity loss inside the VF loss.


@dataclass(frozen=True)
class FlowSpec(Checked, group="flow"):
    """What the generator learns: a flow (Lipman et al. 2023; SiT) or the DDPM of the plain DiT."""

    objective: Literal["flow", "ddpm"] = "flow"
    """flow: t in [0, 1], 1 is data; ddpm: 1000 linear-beta steps with learned variance (Table 1, first row)."""
    path: Literal["linear", "gvp", "vp"] = "linear"  # Interpolation path between noise and data.
    prediction: Literal["velocity", "noise", "score"] = "velocity"  # What the network's output stands for.
    time_law: Literal["logit_normal", "uniform"] = "logit_normal"  # Distribution of t in training.
    uniform_after_images: AnyImages | None = None
    """Switch time_law to uniform after this many images (the authors: 600k of 1M steps of the 800-epoch run)."""
    direction_loss: bool = True  # Add 1 - cos(prediction, velocity) along channels.
    loss_weighting: Literal["none", "velocity", "likelihood"] = "none"  # Weighting of noise and score prediction (SiT).
    time_shift: Annotated[float, Range(0, 1_000, above=True)] = 1.0
    """s in u' = s u / (1 + (s - 1) u), u = 1 - t the share of noise, in training (Esser et al. 2024; sqrt(dim / 4096)
    of a latent with dim numbers: Zheng et al. 2025, RAE); 1 for none."""
    contrastive_weight: Decay = 0.0
    """Weight of contrastive flow matching: away from another sample's velocity (Stoica et al. 2025: 0.05)."""
    dispersive_weight: Weight = 0.0
    """Weight of the dispersive loss on the output of the first quarter's last block (Wang & He 2025: 0.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_shift != 1 and self.objective != "flow":
            raise UsageError(f"flow.time_shift is of flow.objective flow, found {self.objective}; set it to 1")
        if self.contrastive_weight > 0 and (self.objective, self.prediction) != ("flow", "velocity"):
            raise UsageError(
                f"flow.contrastive_weight is {self.contrastive_weight}, but flow.objective is {self.objective} and "
                f"flow.prediction {self.prediction}; it needs flow and velocity: set --flow.contrastive-weight 0"
            )


@dataclass(frozen=True)
class RepaSpec(Checked, group="repa"):
    """Alignment of a block's tokens to a foundation model's (REPA, Yu et al. 2024)."""

    weight: Weight = 0.0  # Weight of the alignment, 1 - cosine (REPA: 0.5); 0 for none.
    block: Blocks = 8  # Block, counted from 1, whose output is aligned.
    projector_width: Width = 2048  # Hidden width of the three-layer projector.
    features: Literal["cached", "online"] = "cached"
    """cached: features that `vadit encode --features` wrote beside the latents; online: computed from data.images."""
    foundation: FoundationSpec = field(default_factory=FoundationSpec)
    """The foundation model; `cached` features must be of the same."""


@dataclass(frozen=True)
class MaskSpec(Checked, group="mask"):
    """Training on part of the tokens: MaskDiT (Zheng et al. 2023) or MDT (Gao et al. 2023)."""

    kind: Literal["none", "maskdit", "mdt"] = "none"
    """none; maskdit: encoder on the visible tokens, a small decoder on all; mdt: side-interpolater before the last
    blocks."""
    ratio: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5
    """Share of the tokens that is masked (MaskDiT: 0.5, MDT: 0.3)."""
    decoder_depth: Blocks = 8  # Blocks of MaskDiT's decoder, or blocks after MDT's side-interpolater (2).
    decoder_width: Width = 512  # Width of MaskDiT's decoder (MDT's blocks keep the model's).
    decoder_heads: Width = 16  # Attention heads of MaskDiT's decoder.
    reconstruction_weight: Weight = 0.1  # Weight of MaskDiT's reconstruction of masked patches.
    unmasked_after_images: AnyImages | None = None
    """From so many images on MaskDiT sees all tokens: the fine-tuning stage (0 with run.init_from: a run that is
    nothing else); left out: never."""


@dataclass(frozen=True)
class SampleSpec(Checked, group="sample"):
    """How images are drawn from a generator."""

    method: Literal["euler", "heun", "dopri5", "euler_maruyama", "ddpm"] = "euler"
    """ODE solver, or Euler-Maruyama for the SDE; ddpm for a generator trained with the ddpm objective."""
    num_steps: Annotated[int, Range(2, 100_000)] = 250
    """Points of linspace(0, 1): one less is the number of steps (250 points: 249 steps, as the authors count)."""
    timestep_shift: Annotated[float, Range(0, 1_000)] = 0.0
    """s in t' = s t / (1 + (s - 1) t); 0 for none (the authors: 0.3)."""
    cfg_scale: Annotated[float, Range(0, 1_000)] = 1.0  # Guidance scale; 1 is no guidance.
    cfg_interval: tuple[Share, Share] = (0.0, 1.0)  # Guidance acts where low <= t <= high.
    cfg_channels: Width | None = None  # Guide only the first so many channels (the authors: 3); default all.
    cfg_power: Annotated[float, Range(0, 1_000, above=True)] | None = None
    """s of a scale that rises with t, 1 + (cfg_scale - 1) (1 - cos(pi t^s)) / 2 (MDT: 4); left out: constant."""
    atol: Share = 1e-6  # Absolute tolerance of dopri5.
    rtol: Share = 1e-3  # Relative tolerance of dopri5.
    labels: Literal["random", "balanced"] = "random"  # Uniform random labels, or the same number of each class.
    seed: Seed = 0  # Seed; sample i is a function of (seed, i) alone.
    sde_diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"] = "sigma"
    """Diffusion coefficient of euler_maruyama (SiT, table 3)."""
    sde_last_step: Literal["mean", "tweedie", "euler", "none"] = "mean"
    """How euler_maruyama takes its last step (SiT: mean, of size 0.04)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cfg_interval[0] > self.cfg_interval[1]:
            raise UsageError(f"sample.cfg_interval is {self.cfg_interval}; its low end must not be above its high end")
        if self.method == "ddpm" and self.num_steps > DDPM_STEPS:
            raise UsageError(f"sample.num_steps is {self.num_steps}; sample.method ddpm has at most {DDPM_STEPS}")
        if self.method == "dopri5" and max(self.atol, self.rtol) < 1e-10:  # its steps would be shorter than fp32 tells
            found = f"sample.atol is {self.atol:g} and rtol {self.rtol:g}"
            raise UsageError(f"{found}, which dopri5 cannot meet; raise one of them to 1e-10 or more")
