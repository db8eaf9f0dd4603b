"""Table 1 of the paper (arXiv 2501.01423): from the plain DiT to LightningDiT in nine changes.

Every row trains an XL model on 102.4 million images (80 epochs) and is scored by FID-50k without guidance. The first
row draws by DDPM in 250 steps, as DiT does; all others with dopri5 (section 4 of the paper). Until the last row the
latents are SD-VAE's f8d4, only multiplied by 0.18215: so the authors answer on how to reach 7.13 (their issue 22).
"""

from collections.abc import Callable
from dataclasses import dataclass

from vadit.config import DiTConfig, DiTSpec, EngineSpec, FlowSpec, LatentDataSpec, OptimizerSpec, Paper, RunSpec, vary
from vadit.config import SampleSpec as Sample
from vadit.recipes.sizes import DIT_SIZES

SD_VAE = "SD-VAE f8d4 (ft-ema)"
"""The tokenizer of the plain DiT and of all that compare with it: diffusers' AutoencoderKL sd-vae-ft-ema."""


def plain_dit() -> DiTConfig:
    """DiT-XL/2 (Peebles & Xie 2023) on SD-VAE latents: DDPM with learnt variance, 400,000 steps of 256 images.

    Its weights are fp32 with bf16 arithmetic, as in all rows; DiT's own code computes in fp32 (TF32).
    """
    return DiTConfig(
        model=DiTSpec(
            **DIT_SIZES["XL"],
            patch_size=2,
            in_channels=4,
            input_size=32,
            learn_sigma=True,
            swiglu=False,
            rope=False,
            rmsnorm=False,
        ),
        flow=FlowSpec(objective="ddpm", time_law="uniform", direction_loss=False),
        optimizer=OptimizerSpec(lr=1e-4, betas=(0.9, 0.999)),
        engine=EngineSpec(precision="autocast", max_grad_norm=0.0, ema_warmup=False),
        run=RunSpec(batch_size=256, total_images=400_000 * 256),
        data=LatentDataSpec(normalize=False, multiplier=0.18215),
        sample=Sample(method="ddpm", num_steps=250),
        paper=Paper(tokenizer=SD_VAE),
    )


def rectified_flow(config: DiTConfig) -> DiTConfig:
    """`config` as a flow: straight paths, velocity, no learnt variance; drawn with an ODE solver."""
    return vary(config, model={"learn_sigma": False}, flow={"objective": "flow"}, sample={"method": "dopri5"})


def large_batch(config: DiTConfig) -> DiTConfig:
    """`config` with four times the batch and twice the learning rate, on as many images."""
    return vary(config, run={"batch_size": 1024}, optimizer={"lr": 2e-4})


def on_vavae(config: DiTConfig) -> DiTConfig:
    """`config` on normalised VA-VAE f16d32 latents, one token per latent position: as many tokens as before."""
    return vary(
        config,
        model={"patch_size": 1, "in_channels": 32, "input_size": 16},
        data={"normalize": True, "multiplier": 1.0},
        paper={"tokenizer": "vavae-f16d32-dinov2"},
    )


@dataclass(frozen=True)
class Row:
    """A row of the table: the row before it, changed."""

    name: str  # as in table1-NN-NAME
    label: str  # as the paper writes it
    fid: float  # FID-50k without guidance
    change: Callable[[DiTConfig], DiTConfig]


ROWS = (
    Row("dit", "DiT-XL/2", 19.50, lambda c: c),
    Row("rectified-flow", "+ rectified flow", 17.20, rectified_flow),
    Row("batch-1024", "+ batch size x4 and learning rate x2", 16.59, large_batch),
    Row("beta2", "+ AdamW beta2 0.95", 16.61, lambda c: vary(c, optimizer={"betas": (0.9, 0.95)})),
    Row("logit-normal", "+ logit-normal time", 13.99, lambda c: vary(c, flow={"time_law": "logit_normal"})),
    Row("direction", "+ velocity direction loss", 12.52, lambda c: vary(c, flow={"direction_loss": True})),
    Row("swiglu", "+ SwiGLU", 10.10, lambda c: vary(c, model={"swiglu": True})),
    Row("rmsnorm", "+ RMSNorm", 9.25, lambda c: vary(c, model={"rmsnorm": True})),
    Row("rope", "+ RoPE", 7.13, lambda c: vary(c, model={"rope": True})),
    Row("vavae", "+ patch size 1 and VA-VAE", 4.29, on_vavae),
)
"""Each line is one change to the line above it."""


def table1(number: int) -> DiTConfig:
    """Row `number`, from 0."""
    config = plain_dit()
    for row in ROWS[: number + 1]:
        config = row.change(config)
    row, sampler = ROWS[number], "dopri5" if number else "ddpm250"
    return vary(config, paper={"source": f"Table 1, {row.label}", "metric": f"fid50k_{sampler}_random {row.fid:.2f}"})
