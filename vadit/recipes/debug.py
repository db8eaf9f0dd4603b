"""The debug twin of a recipe: the same switches, a model that fits in a teaspoon, two steps per stage on a CPU."""

from dataclasses import replace

from vadit.config import Config, DiTConfig, FoundationSpec, RunSpec, TokenizerConfig, vary

STEPS = 2
BATCH_SIZE = 4


def debug_twin(name: str, config: Config) -> Config:
    """`config`, recipe `name`, made small; only sizes, lengths, data, precision and the averages' warm-up change."""
    small = _tokenizer(config) if isinstance(config, TokenizerConfig) else _generator(config)
    stages = len(small.stages) if isinstance(small, TokenizerConfig) else 0
    return vary(
        small,
        engine={"precision": "fp32", "ema_warmup": True},
        paper={"source": f"debug twin of {name}", "metric": "none: two steps"},
        data={"path": f"debug:{2 * BATCH_SIZE}"},
        run=RunSpec(
            out=f"runs/{name}-debug",
            total_images=max(stages, 1) * STEPS * BATCH_SIZE,
            batch_size=BATCH_SIZE,
            log_every_images=BATCH_SIZE,
            save_every_images=STEPS * BATCH_SIZE,
            device="cpu",
        ),
    )


def _tokenizer(config: TokenizerConfig) -> TokenizerConfig:
    """Two latent positions a side, one small block per level; the discriminator starts at the second step at latest."""
    side = 2
    return vary(
        config,
        autoencoder={
            "image_size": side * config.autoencoder.downsample_ratio,
            "base_channels": 8,
            "norm_groups": 4,
            "num_res_blocks": 1,
            "attention_resolutions": (side,),
        },
        foundation=config.foundation if config.foundation.name == "none" else _tiny_vit(config.foundation),
        loss={"perceptual_weight": 0.0, "disc_channels": 8, "disc_start_step": min(config.loss.disc_start_step, STEPS)},
        data={"num_workers": 1},
        stages=tuple(
            replace(
                stage,
                total_images=STEPS * BATCH_SIZE,
                disc_start_step=None if stage.disc_start_step is None else min(stage.disc_start_step, STEPS),
            )
            for stage in config.stages
        ),
    )


def _tiny_vit(spec: FoundationSpec) -> FoundationSpec:
    """A foundation model of random weights that takes the same images."""
    sizes: dict[str, int | float | str | bool] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    return replace(spec, name="vit_tiny_patch16_224", weights="random", model_args=sizes)


def _generator(config: DiTConfig) -> DiTConfig:
    """Four tokens a side, two blocks; a change of the time law falls between the two steps."""
    late = config.flow.uniform_after_images is not None
    aligned = {"block": 1, "projector_width": 32, "foundation": _tiny_vit(config.repa.foundation)}
    return vary(
        config,
        model={
            "input_size": 4 * config.model.patch_size,
            "hidden_size": 64,
            "depth": 2,
            "num_heads": 4,
            "num_classes": 10,
        },
        flow={"uniform_after_images": BATCH_SIZE if late else None},
        repa=aligned if config.repa.weight > 0 else {},
        mask={"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2},
        optimizer={"warmup_images": min(config.optimizer.warmup_images, BATCH_SIZE)},
        sample={"num_steps": 4},
    )
