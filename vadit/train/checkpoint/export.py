"""From a run (or an exported folder) to a network: what `vadit export`, `encode` and `sample` start from."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from vadit.config import DiTConfig, TokenizerConfig
from vadit.config.files import load_run_config
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT
from vadit.models.interop import load_foreign_autoencoder
from vadit.models.masked import build_generator, load_exported
from vadit.models.pretrained import WEIGHTS_NAME, Origin, load_state
from vadit.models.repa import PREFIX
from vadit.runtime.errors import UsageError
from vadit.runtime.json_files import checked
from vadit.train import runs
from vadit.train.checkpoint import publish
from vadit.train.ema import start_share

M = TypeVar("M", Autoencoder, LightningDiT)


def load_autoencoder(path: str | Path, ema: float | None = None) -> Autoencoder:
    """The autoencoder of a tokenizer run (`ema`: of its average with that decay), of an exported folder, or of others.

    Others': a file of the authors, or an AutoencoderKL of diffusers.
    """
    if _is_exported(path):
        return _looked_at(Autoencoder.from_pretrained(path), path)
    if (foreign := load_foreign_autoencoder(path)) is not None:
        return foreign
    config = load_run_config(path)
    if not isinstance(config, TokenizerConfig):
        raise UsageError(f"{path} is a generator's run; a tokenizer is needed here")
    state, file = runs.read_weights(path, ema=ema)
    model = Autoencoder(config.autoencoder)
    # The projection of the VF loss serves training alone.
    load_state(model, {name: value for name, value in state.items() if not name.startswith("linear_proj.")}, str(file))
    model.origin = _origin(config, file, ema)
    return _looked_at(model.eval(), path)


def load_generator(path: str | Path, ema: float | None = None) -> LightningDiT:
    """The generator of a run or of an exported folder.

    From a run comes the average with decay `ema`, by default the run's first, or the plain weights where the run
    averages nothing or `ema` is 0.
    """
    if _is_exported(path):
        return _looked_at(load_exported(path), path)
    config = load_run_config(path)
    if not isinstance(config, DiTConfig):
        raise UsageError(f"{path} is a tokenizer's run; a generator is needed here")
    if ema is None and config.engine.ema_decays:
        ema = config.engine.ema_decays[0]
    state, file = runs.read_weights(path, ema=ema or None)
    model = build_generator(config.model, config.mask)
    # REPA's projector serves training alone.
    load_state(model, {name: value for name, value in state.items() if not name.startswith(PREFIX)}, str(file))
    model.origin = _origin(config, file, ema)
    return _looked_at(model.eval(), path)


def export_run(run: str | Path, out: str | Path, ema: float | None = None) -> None:
    """Write a run's network as one safetensors file with its config beside it."""
    config = load_run_config(run)
    with torch.no_grad():
        network = load_generator(run, ema) if isinstance(config, DiTConfig) else load_autoencoder(run, ema or None)
    network.save_pretrained(out)


def _is_exported(path: str | Path) -> bool:
    return (Path(path) / WEIGHTS_NAME).is_file()


def _origin(config: DiTConfig | TokenizerConfig, checkpoint: Path, ema: float | None) -> Origin:
    """What a checkpoint of a run says of its weights."""
    state = publish.read_state(checkpoint)
    share = start_share(state.step, ema, config.engine.ema_warmup) if ema else 0.0
    values = {"ema": ema or 0.0, "start_share": share, "classes": state.loader.get("classes")}
    return checked(Origin, values, str(checkpoint))


def _looked_at(model: M, path: str | Path) -> M:
    model.origin.warn(str(path))
    return model
