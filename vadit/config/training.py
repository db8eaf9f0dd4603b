"""The settings of a run: optimizer, DeepSpeed, guards, length and checkpoints."""

from dataclasses import dataclass
from typing import Annotated, Literal

from vadit.config.ranges import AnyImages, Batch, Checked, Count, Decay, Factor, Images, PathName, Range, Seed, Weight
from vadit.runtime.errors import UsageError

MAX_BUCKET = 500_000_000  # Weights that DeepSpeed reduces or gathers in one piece, at most.


@dataclass(frozen=True)
class OptimizerSpec(Checked, group="optimizer"):
    """Adam with decoupled weight decay, and the learning rate over the run."""

    kind: Literal["adamw", "apex_fused", "muon"] = "adamw"
    """Whose AdamW, for a whole run: torch's, or apex's FusedAdam (GPUs); muon: torch's Muon for the matrices of a
    generator's blocks, AdamW for the rest (engine.zero_stage 0)."""
    lr: Annotated[float, Range(0, 10)] = 2e-4  # Learning rate at its peak.
    betas: tuple[Decay, Decay] = (0.9, 0.95)  # Adam's decay rates.
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-8  # Adam's epsilon.
    weight_decay: Annotated[float, Range(0, 10)] = 0.0  # Decoupled weight decay.
    schedule: Literal["constant", "one_cycle", "linear"] = "constant"
    """constant after the warm-up; one_cycle: cosine up over 30% of the run and down to 0; linear decay to 0."""
    warmup_images: AnyImages = 0  # Images over which the rate rises linearly from 0 (constant and linear).


@dataclass(frozen=True)
class EngineSpec(Checked, group="engine"):
    """DeepSpeed's part: sharding, precision and the numbers of one step."""

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage: 1 shards the optimizer, 2 also gradients, 3 also weights; auto: 0 for a process alone where nothing
    needs more, else 1."""
    precision: Literal["fp32", "bf16", "autocast"] = "fp32"
    """fp32; bf16: bf16 weights with fp32 masters; autocast: fp32 weights, bf16 arithmetic (the authors')."""
    tf32: Literal["none", "convolutions", "all"] = "none"
    """What a GPU computes in TF32 of what is fp32. Tokenizers: convolutions, which is torch's default and theirs."""
    gradient_accumulation: Batch = 1  # Micro-batches per optimizer step.
    max_grad_norm: Weight = 1.0  # Gradient norm that larger ones are clipped to; 0 switches clipping off.
    offload_optimizer: bool = False  # Keep optimizer state in host memory (ZeRO 1-3).
    offload_weights: bool = False  # Keep weights in host memory (ZeRO 3).
    overlap_comm: bool = False  # Overlap gradient reduction with the backward pass.
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile a generator's blocks, or a tokenizer's LPIPS and foundation model (True, False); auto: on GPUs."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "math", "flash_attn_2", "flash_attn_3"] = "auto"
    """The generator's attention: one of torch's kernels, the flash-attn package, or auto (by GPU and head width)."""
    float8: Literal["fused", "rowwise", "tensorwise"] | None = None
    """float8 products in the generator's blocks (GPUs from sm_89, compiled blocks). fused: by vadit's kernels,
    gradients of weights in bf16 (engine.zero_stage 0-2); rowwise, tensorwise: torchao's scalings."""
    ema_decays: tuple[Decay, ...] = (0.9999,)
    """Decay of each exponential moving average of the weights; empty for none."""
    ema_warmup: bool = True
    """Decays rise to theirs as (1 + n) / (10 + n) over the first n steps; off: constant from the start, as the authors'
    are, whose averages are worth little before some 5 / (1 - decay) steps."""

    @property
    def stage(self) -> int:
        """The ZeRO stage of a settled config."""
        assert self.zero_stage != "auto", "settled() comes before an engine"
        return self.zero_stage

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload_optimizer and self.zero_stage == 0:
            raise UsageError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3, found 0")
        if self.offload_weights and self.zero_stage not in ("auto", 3):
            raise UsageError(f"engine.offload_weights needs engine.zero_stage 3, found {self.zero_stage}")


@dataclass(frozen=True)
class GuardSpec(Checked, group="guard"):
    """What happens to steps that would harm the weights; all of it may change between two starts of a run."""

    skip_nonfinite: bool = True
    """Leave out a step whose loss or gradient is NaN or infinite and go on; off: such a step ends the run, unharmed."""
    spike_factor: Annotated[float, Range(1, 1_000_000_000, above=True, or_zero=True)] = 10.0
    """Leave out a step whose gradient norm is above this many times the 90% quantile of the last good; 0: never."""
    spike_window: Annotated[int, Range(8, 1_000_000)] = 128
    """Good steps that the quantile is taken over; none is a spike before there were nine tenths as many."""
    max_skips_in_row: Count = 20
    """Steps left out in a row after which the run goes back to its last checkpoint, and on with the next data."""
    max_rollbacks: Annotated[int, Range(0, 10**9)] = 3
    """Times that a run goes back without reaching its next checkpoint before it stops with an error."""
    rollback_lr_factor: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Learning rate is multiplied by this at each going back."""


@dataclass(frozen=True)
class RunSpec(Checked, group="run"):
    """Length, logging and checkpoints, in images."""

    out: PathName = "runs/default"  # Run folder; the same command continues what is there.
    total_images: Images = 80_000 * 1024  # Images to train on (64 epochs of ImageNet: 81,920,000).
    batch_size: Batch = 1024  # Images per optimizer step over all processes.
    seed: Seed = 0  # Seed of initialisation, order of the data, noise and dropout.
    log_every_images: Images = 102_400  # Images between two log points.
    save_every_images: Images = 5_120_000  # Images between two checkpoints.
    keep_checkpoints: Count = 2  # How many of the newest checkpoints stay on disk.
    keep_every_images: Images | None = None
    """Checkpoints that reach a multiple of this many images stay on disk for ever; left out: none does."""
    background_saves: bool = True
    """Write checkpoints while training goes on; the last one, and one at a stop request, are waited for."""
    hang_timeout_s: Annotated[float, Range(1, 100_000_000, or_zero=True)] = 1800.0
    """Seconds without a finished step after which a process ends the run with a message; 0: never."""
    init_from: PathName | None = None
    """Weights to start from: a run (its plain weights, not its average), an exported or imported folder, or a
    .safetensors file; for the authors' files `vadit import` first (the optimizer starts anew)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"  # Device of the run.
    peak_tflops: Factor | None = None
    """Peak of one GPU in TFLOP/s that utilisation (mfu) refers to; left out: by the GPU's name, where known."""
    deterministic: bool = False
    """Bit-equal runs, slower on GPUs. Without it a GPU may add up in another order each time: the gradients of
    attention, class embeddings and upsampling, and convolutions, whose kernel cuDNN picks by timing."""


@dataclass(frozen=True)
class EvaluationSpec(Checked, group="evaluation"):
    """Evaluations of the network while it trains; they change no bit of the training.

    All of it may change between two starts. A generator draws samples (its recipe's sampler in fewer steps, the first
    average's weights, always the same noise and labels), a tokenizer reconstructs images; a picture of both is kept,
    and the numbers go beside the loss.
    """

    every_images: AnyImages = 0  # Images between two evaluations, with one at the end; 0: none.
    tokenizer: PathName | None = None
    """Tokenizer that decodes a generator's samples: a run folder, one from `vadit export` or `vadit import`, an
    AutoencoderKL of diffusers, or a file of the authors."""
    grid_images: Annotated[int, Range(1, 10_000)] = 36
    """Images of the picture: the first samples, or images evenly spread over a tokenizer's data."""
    steps: Annotated[int, Range(1, 1_000)] = 50  # Steps of the sampler; an adaptive one gives way to Euler's.
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Of a generator that draws; auto: tf32 on a GPU, fp32 on a CPU. All else is evaluated in fp32."""
    num_samples: Annotated[int, Range(2, 10**9)] = 1000
    """Samples that FID and KID are taken over; only comparable at the same number."""
    reference: PathName | None = None
    """Reference for FID and KID: ADM's .npz, one of `vadit evaluate make-reference`, or a folder of PNGs."""
    inception_weights: PathName | None = None
    """torch-fidelity's Inception weights; without reference and weights there are pictures alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.reference is None) != (self.inception_weights is None):
            raise UsageError(
                "FID and KID need both evaluation.reference and evaluation.inception_weights; set the other one, too, "
                "or neither"
            )
