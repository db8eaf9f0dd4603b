"""The debug twin of a recipe: the same switches, a model that fits in a teaspoon, two steps per stage on a CPU."""

from __future__ import annotations

from dataclasses import replace

from vadit.config import Config, DiTConfig, FoundationSpec, RepaSpec, RunSpec, TokenizerConfig

STEPS = 2
BATCH_SIZE = 4


def debug_twin(name: str, config: Config) -> Config:
    """`config`, recipe `name`, made small; only sizes, lengths, data and precision change."""
    small = _tokenizer(config) if isinstance(config, TokenizerConfig) else _generator(config)
    return replace(
        small,
        engine=replace(config.engine, precision="fp32"),
        paper=replace(config.paper, source=f"debug twin of {name}", metric="none: two steps"),
        run=RunSpec(
            out=f"runs/{name}-debug",
            total_images=small.run.total_images,
            batch_size=BATCH_SIZE,
            log_every_images=BATCH_SIZE,
            save_every_images=STEPS * BATCH_SIZE,
            device="cpu",
        ),
    )


def _tokenizer(config: TokenizerConfig) -> TokenizerConfig:
    """Two latent positions a side, one small block per level; the discriminator starts at the second step at latest."""
    latent_side = 2
    stages = tuple(
        replace(
            stage,
            total_images=STEPS * BATCH_SIZE,
            disc_start_step=None if stage.disc_start_step is None else min(stage.disc_start_step, STEPS),
        )
        for stage in config.stages
    )
    align = config.foundation.name != "none"
    return replace(
        config,
        autoencoder=replace(
            config.autoencoder,
            image_size=latent_side * config.autoencoder.downsample_ratio,
            base_channels=8,
            norm_groups=4,
            num_res_blocks=1,
            attention_resolutions=(latent_side,),
        ),
        foundation=_tiny_vit(config.foundation) if align else config.foundation,
        loss=replace(
            config.loss, perceptual_weight=0.0, disc_channels=8, disc_start_step=min(config.loss.disc_start_step, STEPS)
        ),
        run=replace(config.run, total_images=max(len(stages), 1) * STEPS * BATCH_SIZE),
        data=replace(config.data, path=f"debug:{2 * BATCH_SIZE}", num_workers=1),
        stages=stages,
    )


def _tiny_vit(spec: FoundationSpec) -> FoundationSpec:
    """A foundation model of random weights that takes the same images."""
    return FoundationSpec(
        name="vit_tiny_patch16_224",
        weights="random",
        input_range=spec.input_range,
        model_args={"embed_dim": 32, "depth": 1, "num_heads": 2},
    )


def _generator(config: DiTConfig) -> DiTConfig:
    """Four tokens a side, two blocks; a change of the time law falls between the two steps."""
    late = config.flow.uniform_after_images is not None
    aligned = RepaSpec(
        weight=config.repa.weight,
        block=1,
        projector_width=32,
        features=config.repa.features,
        foundation=_tiny_vit(config.repa.foundation),
    )
    return replace(
        config,
        model=replace(
            config.model,
            input_size=4 * config.model.patch_size,
            hidden_size=64,
            depth=2,
            num_heads=4,
            num_classes=10,
        ),
        flow=replace(config.flow, uniform_after_images=BATCH_SIZE if late else None),
        repa=aligned if config.repa.weight > 0 else config.repa,
        mask=replace(config.mask, decoder_depth=1, decoder_width=32, decoder_heads=2),
        optimizer=replace(config.optimizer, warmup_images=min(config.optimizer.warmup_images, BATCH_SIZE)),
        run=replace(config.run, total_images=STEPS * BATCH_SIZE),
        data=replace(config.data, path=f"debug:{2 * BATCH_SIZE}"),
        sample=replace(config.sample, num_steps=4),
    )
