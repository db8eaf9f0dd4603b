"""Whether a run fits its data and its machine: known before anything is built or written."""

from collections.abc import Collection

import torch

from vadit.config import Config, DiTConfig, settled, vary
from vadit.config.files import load_run_config
from vadit.estimate.memory import estimate
from vadit.latents.dataset import SHAPE, differences, shape_of
from vadit.runtime import distributed, launcher
from vadit.runtime.console import note_once
from vadit.runtime.errors import UsageError
from vadit.runtime.free import free_bytes
from vadit.train.runs import final_folder, has_checkpoint

SMALL = 1 << 21
"""Positions x width x depth of a batch below which a step needs 0.6 GB at most, and no estimate, which takes time."""
GIB = 2**30


def follow_data(config: DiTConfig, asked: Collection[str] | None = None) -> DiTConfig:
    """`config` with the shape of its latents, but for the settings of SHAPE that are `asked` for (None: all).

    A run that goes on keeps what it was begun with: UsageError, with all differences, where that contradicts the data.
    """
    path, out = config.data.path, config.run.out
    if not path or path.startswith("debug:") or asked is None:
        return config  # where all is asked for, `open_latents` compares
    before = load_run_config(out) if has_checkpoint(final_folder(out)) else None
    found = shape_of(path, config.model.num_classes)
    kept = vars(before.model) if isinstance(before, DiTConfig) else {}
    if wrong := differences(found, kept):
        raise UsageError(
            f"data.path {path} does not fit the run {out}: {wrong}; set data.path to the data that it was begun with, "
            f"or start from its weights: --run.init-from {out}, and another --run.out"
        )
    own = vars(config.model)
    changed = {name: kept.get(name, found[name]) for name in SHAPE if name not in asked}
    changed = {name: value for name, value in changed.items() if value != own[name]}
    if changed:
        values = ", ".join(f"model.{name} {value} ({own[name]})" for name, value in changed.items())
        note_once(f"  {'as the run was begun' if kept else 'as the latents are'}, not the recipe's: {values}", "dim")
    return vary(config, model=changed)


def check_size(config: Config, num_samples: int, device: torch.device) -> None:
    """UsageError where a run that begins has a larger batch than there are samples, or than memory is likely to hold.

    A run that goes on has shown that it fits. Debug data are of any number. Also where a loss compares the samples of a
    micro-batch, which holds one.
    """
    run, engine = config.run, config.engine
    micro, path = distributed.per_rank_batch(run.batch_size, engine.gradient_accumulation), config.data.path
    alone = config.flow if isinstance(config, DiTConfig) and micro == 1 else None
    for name in ("contrastive_weight", "dispersive_weight"):
        if getattr(alone, name, 0) > 0:
            raise UsageError(
                f"flow.{name} compares samples of a micro-batch, which holds 1; raise --run.batch-size or lower "
                "--engine.gradient-accumulation"
            )
    if has_checkpoint(final_folder(run.out)):
        return
    if run.batch_size > num_samples and not path.startswith("debug:"):
        parts = run.batch_size // micro
        raise UsageError(
            f"run.batch_size {run.batch_size:,} is more than the {num_samples:,} samples of data.path {path}; set "
            f"--run.batch-size {max(num_samples // parts, 1) * parts} or less"
        )
    if isinstance(config, DiTConfig):
        model = config.model
        size = (model.input_size // model.patch_size) ** 2 * model.hidden_size * model.depth
    else:
        size = config.autoencoder.image_size**2 * config.autoencoder.base_channels
    if micro * size < SMALL:
        return
    count, on_gpu = distributed.world_size(), device.type == "cuda"
    found = estimate(config, count)
    needed = found.stages[settled(config, processes=count, device=device.type).engine.stage]
    free = free_bytes(device) // (1 if on_gpu else launcher.place().local_size)
    if needed.total <= free:
        return
    # Gradients stay between the passes of a step.
    whole = needed.total - needed.activations - needed.gradients + 4 * sum(each.num_trained for each in found.networks)
    cuts = [cut for cut in range(2, micro + 1) if micro % cut == 0 and whole + needed.activations / cut <= free]
    remedy = "a smaller network, as its weights alone are too large, or use more processes and --engine.zero-stage 3"
    if cuts:
        more = cuts[0] * engine.gradient_accumulation
        remedy = f"--engine.gradient-accumulation {more} (the batch stays as it is) or a smaller --run.batch-size"
    raise UsageError(
        f"run.batch_size {run.batch_size:,} needs about {needed.total / GIB:,.1f} GiB for the {micro:,} images of a "
        f"pass, and {free / GIB:,.1f} GiB of {'the GPU' if on_gpu else 'memory'} are free for each process; set "
        + remedy
    )
