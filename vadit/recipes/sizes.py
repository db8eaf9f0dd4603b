"""Sizes and names of networks, and lengths in images that several recipes share."""

from typing import Any

from vadit.config import Config, DiTSpec, TokenizerConfig

DIT_SIZES: dict[str, dict[str, Any]] = {
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "1p0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
    "1p6B": {"depth": 28, "hidden_size": 1792, "num_heads": 28},
}
"""Keyword arguments of DiTSpec for each size of the paper; patch_size 1 or 2 goes with any."""

IMAGENET_IMAGES = 1_281_167  # training images of ImageNet-1k: one epoch

BATCH_SIZE = 1024  # of LightningDiT's runs

EPOCHS_80 = 100_000 * BATCH_SIZE  # what the paper calls 80 epochs, in images (79.9)


def dit_size(model: DiTSpec) -> str:
    """The paper's letter of a generator's size; empty where it is none of them."""
    sizes = (name for name, size in DIT_SIZES.items() if all(getattr(model, key) == size[key] for key in size))
    return next(sizes, "")


def model_name(config: Config) -> str:
    """LightningDiT-XL/1, DiT-XL/2, VA-VAE f16d32 ...; what sets it apart behind it."""
    if isinstance(config, TokenizerConfig):
        spec = config.autoencoder
        kind = "VAE" if config.foundation.name == "none" else "VA-VAE"
        aligned = "" if config.foundation.name == "none" else f", {config.foundation.name}"
        stages = f", {len(config.stages)} stages" if config.stages else ""
        return f"{kind} f{spec.downsample_ratio}d{spec.latent_channels}{aligned}{stages}"
    model = config.model
    size = dit_size(model) or f"{model.depth}x{model.hidden_size}"
    new = [name for name in ("swiglu", "rmsnorm", "rope") if getattr(model, name)]
    kind, extras = ("LightningDiT", []) if len(new) == 3 else ("DiT", new)
    extras = [*extras, *[config.mask.kind] * (config.mask.kind != "none"), *["repa"] * (config.repa.weight > 0)]
    return ", ".join([f"{kind}-{size}/{model.patch_size}", *extras])
