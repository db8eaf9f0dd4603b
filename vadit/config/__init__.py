"""The settings of a run: frozen dataclasses, and the one place where a default is written.

A recipe (`vadit.recipes`) is a function that returns a `TokenizerConfig` or a `DiTConfig`; the command line
overrides single fields of it (`--optimizer.lr 1e-4`); `config.json` in the run folder holds the result.
Progress is counted in images, so a recipe survives a change of batch size. Nothing here imports torch.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from vadit.config.data import ImageDataSpec, LatentDataSpec, PictureSpec
from vadit.config.masks import check_masks
from vadit.config.networks import AutoencoderSpec, DiTSpec, FoundationSpec
from vadit.config.objectives import FlowSpec, MaskSpec, RepaSpec, SampleSpec, TokenizerLossSpec
from vadit.config.ranges import AnyImages, Checked, Images, Margin, Weight
from vadit.config.training import MAX_BUCKET, EngineSpec, EvaluationSpec, GuardSpec, OptimizerSpec, RunSpec
from vadit.runtime.errors import UsageError


@dataclass(frozen=True)
class Paper:
    """What a recipe reproduces."""

    source: str = ""  # table and row
    metric: str = ""  # the paper's number with its protocol name
    tokenizer: str = ""  # whose latents a generator learns: a recipe, or a public model


@dataclass(frozen=True)
class StageSpec(Checked, group="stages"):
    """One stage of a tokenizer's training: fields left at None keep the recipe's value."""

    total_images: Images  # Images of this stage.
    vf_weight: Weight | None = None  # TokenizerLossSpec.vf_weight in this stage.
    cos_margin: Margin | None = None  # TokenizerLossSpec.cos_margin in this stage.
    distmat_margin: Margin | None = None  # TokenizerLossSpec.distmat_margin in this stage.
    disc_start_step: AnyImages | None = None  # TokenizerLossSpec.disc_start_step in this stage, counted from its start.

    def loss(self, whole: TokenizerLossSpec) -> TokenizerLossSpec:
        """The losses of this stage in a run with those of `whole`."""
        own = {name: value for name, value in vars(self).items() if name != "total_images" and value is not None}
        return replace(whole, **own)


@dataclass(frozen=True)
class TokenizerConfig:
    """A whole tokenizer run."""

    autoencoder: AutoencoderSpec = field(default_factory=AutoencoderSpec)
    foundation: FoundationSpec = field(default_factory=FoundationSpec)
    loss: TokenizerLossSpec = field(default_factory=TokenizerLossSpec)
    optimizer: OptimizerSpec = field(default_factory=lambda: OptimizerSpec(lr=1e-4, betas=(0.5, 0.9)))
    engine: EngineSpec = field(
        default_factory=lambda: EngineSpec(tf32="convolutions", ema_decays=(), max_grad_norm=0.0)
    )
    guard: GuardSpec = field(default_factory=GuardSpec)
    run: RunSpec = field(default_factory=lambda: RunSpec(batch_size=256, total_images=50 * 1_281_167))
    data: ImageDataSpec = field(default_factory=ImageDataSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    stages: tuple[StageSpec, ...] = ()
    """Stages that follow each other, each from the last one's weights with a fresh optimizer; empty: one stage."""
    paper: Paper = field(default_factory=Paper)
    kind: Literal["tokenizer"] = "tokenizer"

    def __post_init__(self) -> None:
        _check_optimizer(self.optimizer, self.engine)
        if self.autoencoder.in_channels != 3:
            raise UsageError(f"autoencoder.in_channels is {self.autoencoder.in_channels}; images to train on have 3")
        if self.loss.disc_weight > 0 and self.autoencoder.image_size >> self.loss.disc_layers < 3:
            raise UsageError(
                f"loss.disc_layers is {self.loss.disc_layers}, which leaves nothing of autoencoder.image_size "
                f"{self.autoencoder.image_size}: it must be at least {3 << self.loss.disc_layers} for so many layers; "
                "lower --loss.disc-layers, or set --loss.disc-weight 0"
            )
        for name in ("float8", "attention"):
            if (value := getattr(self.engine, name)) != getattr(EngineSpec, name):
                raise UsageError(f"engine.{name} is {value}, which is for generators; leave out --engine.{name}")
        if self.loss.vf_weight > 0 and self.foundation.name == "none":
            raise UsageError(
                f"loss.vf_weight is {self.loss.vf_weight} but foundation.name is none; set --loss.vf-weight 0, or "
                "--foundation.name dinov2"
            )
        for stage in self.stages:  # refused now, not when its turn comes
            replace(self, loss=stage.loss(self.loss), stages=())


@dataclass(frozen=True)
class DiTConfig:
    """A whole generator run."""

    model: DiTSpec = field(default_factory=DiTSpec)
    flow: FlowSpec = field(default_factory=FlowSpec)
    repa: RepaSpec = field(default_factory=RepaSpec)
    mask: MaskSpec = field(default_factory=MaskSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    engine: EngineSpec = field(default_factory=lambda: EngineSpec(precision="autocast"))
    guard: GuardSpec = field(default_factory=GuardSpec)
    run: RunSpec = field(default_factory=RunSpec)
    data: LatentDataSpec = field(default_factory=LatentDataSpec)
    sample: SampleSpec = field(default_factory=SampleSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    paper: Paper = field(default_factory=Paper)
    kind: Literal["dit"] = "dit"

    def __post_init__(self) -> None:
        _check_optimizer(self.optimizer, self.engine)
        if int(self.model.hidden_size * self.model.mlp_ratio) < 2:
            raise UsageError(f"model.mlp_ratio {self.model.mlp_ratio} leaves no hidden unit; raise it (the paper: 4)")
        if self.engine.float8 is not None and self.engine.precision == "fp32":
            raise UsageError("engine.float8 takes the place of bf16 products; set --engine.precision autocast or bf16")
        if self.engine.float8 is not None and self.engine.zero_stage == 3:
            raise UsageError(
                "engine.float8 keeps every gathered weight until the backward pass, which engine.zero_stage 3 is to "
                "avoid; set --engine.zero-stage 2"
            )
        if self.evaluation.every_images and self.evaluation.tokenizer is None:
            raise UsageError(
                f"evaluation.every_images is {self.evaluation.every_images}, but nothing decodes the samples; set "
                "--evaluation.tokenizer, or --evaluation.every-images 0"
            )
        if self.flow.objective == "ddpm" and not self.model.learn_sigma:
            raise UsageError("flow.objective ddpm learns the variance; set --model.learn-sigma")
        if self.repa.weight > 0 and self.repa.block > self.model.depth:
            raise UsageError(f"repa.block is {self.repa.block}; the generator has blocks 1 to {self.model.depth}")
        if self.mask.kind != "none":
            check_masks(self.mask, self.model, self.flow, self.repa, self.engine)


Config = TokenizerConfig | DiTConfig
C = TypeVar("C", bound=Config)


def vary(config: C, **groups: Any) -> C:
    """`config` with some settings of some groups changed: vary(config, run={"batch_size": 256}, stages=())."""
    parts = {
        name: replace(getattr(config, name), **values) if isinstance(values, dict) else values
        for name, values in groups.items()
    }
    return replace(config, **parts)


def settled(config: C, *, processes: int, device: str) -> C:
    """`config` with what its settings at auto mean for so many processes on devices of this type ("cpu", "cuda")."""
    engine = config.engine
    stage, compiled = engine.zero_stage, engine.compile
    kind, half = config.optimizer.kind, engine.precision == "bf16"
    whole = processes == 1 and not engine.offload_optimizer and (kind == "adamw" or not half)
    if stage == "auto":
        stage = 3 if engine.offload_weights else 0 if whole or kind == "muon" else 1
    if half and stage == 0 and not whole:
        raise UsageError(
            "engine.precision is bf16 and engine.zero_stage 0, where the optimizer of one process keeps the fp32 "
            f"weights (optimizer.kind adamw); found {processes} process(es) and {kind}: set --engine.zero-stage 1, or "
            "--engine.precision autocast"
        )
    if compiled == "auto":
        refused = isinstance(config, DiTConfig) and config.mask.kind == "mdt" and stage == 3
        compiled = device == "cuda" and not refused
    return vary(config, engine={"zero_stage": stage, "compile": compiled})


def _check_optimizer(optimizer: OptimizerSpec, engine: EngineSpec) -> None:
    if optimizer.kind != "adamw" and engine.offload_optimizer:
        raise UsageError(
            f"optimizer.kind {optimizer.kind} steps on the GPU, engine.offload_optimizer keeps its state on the host; "
            "set --optimizer.kind adamw or --engine.no-offload-optimizer"
        )
    if optimizer.kind != "muon":
        return
    for clashes, found, remedy in (
        (engine.offload_weights, "engine.offload_weights cuts into shards", "no-offload-weights"),
        (
            engine.zero_stage not in ("auto", 0),
            f"engine.zero_stage {engine.zero_stage} cuts into shards",
            "zero-stage 0",
        ),
        (engine.precision == "bf16", "engine.precision bf16 does not keep", "precision autocast"),
    ):
        if clashes:
            raise UsageError(f"optimizer.kind muon needs whole matrices in fp32, which {found}; set --engine.{remedy}")
