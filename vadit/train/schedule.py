"""The learning rate over a run."""

from __future__ import annotations

import math

from vadit.config import OptimizerSpec


def learning_rate(spec: OptimizerSpec, *, images_seen: int, total_images: int) -> float:
    """Learning rate of the step that starts at `images_seen`."""
    done = images_seen / total_images
    if spec.schedule == "one_cycle":  # Smith & Topin 2019: cosine up from 1/25 over 30%, cosine down to nothing
        if done < 0.3:
            return spec.lr * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / 0.3)) / 2)
        return spec.lr * (1 + math.cos(math.pi * min((done - 0.3) / 0.7, 1.0))) / 2
    warmup = min((images_seen + 1) / spec.warmup_images, 1.0) if spec.warmup_images else 1.0
    return spec.lr * warmup * (1 - done if spec.schedule == "linear" else 1.0)
