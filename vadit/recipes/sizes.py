"""Sizes of the generator, and lengths in images that several recipes share."""

from __future__ import annotations

from typing import Any

DIT_SIZES: dict[str, dict[str, Any]] = {
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "1p0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
    "1p6B": {"depth": 28, "hidden_size": 1792, "num_heads": 28},
}
"""Keyword arguments of DiTSpec for each size of the paper; patch_size 1 or 2 goes with any."""

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k: one epoch."""

BATCH_SIZE = 1024
"""Of LightningDiT's runs."""

EPOCHS_80 = 100_000 * BATCH_SIZE
"""What the paper calls 80 epochs, in images (79.9)."""
