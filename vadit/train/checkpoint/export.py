"""From a run (or an exported folder) to a network: what `vadit export`, `encode` and `sample` start from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vadit.config import DiTConfig, TokenizerConfig
from vadit.config.files import load_run_config
from vadit.models import interop_diffusers
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT
from vadit.models.interop import load_foreign
from vadit.models.masked import build_generator, load_exported
from vadit.models.pretrained import CONFIG_NAME, TRAINING_ONLY, WEIGHTS_NAME, Origin, build_model
from vadit.runtime.errors import UsageError
from vadit.runtime.json_files import checked, read_json
from vadit.train import runs
from vadit.train.checkpoint import publish
from vadit.train.ema import start_share

M = TypeVar("M", Autoencoder, LightningDiT)


def load_autoencoder(path: str | Path, ema: float | None = None) -> Autoencoder:
    """The autoencoder of a tokenizer run (`ema`: of its average with that decay), of an exported folder, or of others.

    Others': a file of the authors, or an AutoencoderKL of diffusers.
    """
    if is_exported(path):
        model = Autoencoder.from_pretrained(path)
    elif interop_diffusers.find(path) or Path(path).is_file():
        if not isinstance(foreign := load_foreign(path), Autoencoder):
            raise UsageError(f"{path} is a generator; a tokenizer is needed here")
        model = foreign
    else:
        config = load_run_config(path)
        if not isinstance(config, TokenizerConfig):
            raise UsageError(f"{path} is a generator's run; a tokenizer is needed here")
        model = _of_run(path, config, ema, lambda: Autoencoder(config.autoencoder))
    model.path = str(path)
    model.origin.warn(str(path))
    return model


def load_generator(path: str | Path, ema: float | None = None) -> LightningDiT:
    """The generator of a run or of an exported folder.

    From a run comes the average with decay `ema`, by default the run's first, or the plain weights where the run
    averages nothing or `ema` is 0.
    """
    if is_exported(path):
        model = load_exported(path)
        if ema not in (None, known := model.origin.ema):
            raise UsageError(
                f"--ema is {ema:g}, but {path} was exported with --ema {known:g}; name the run, or export it anew"
            )
    else:
        config = load_run_config(path)
        if not isinstance(config, DiTConfig):
            raise UsageError(f"{path} is a tokenizer's run; a generator is needed here")
        if ema is None:
            ema = next(iter(config.engine.ema_decays), None)
        model = _of_run(path, config, ema, lambda: build_generator(config.model, config.mask))
    model.origin.warn(str(path))
    return model


def load_network(path: str | Path, ema: float | None = None) -> Autoencoder | LightningDiT:
    """The tokenizer or the generator of a run or of an exported folder; `ema` as of those, 0 for plain weights."""
    if is_exported(path):
        is_generator = "depth" in read_json(Path(path) / CONFIG_NAME, dict[str, Any])
    else:
        is_generator = isinstance(load_run_config(path), DiTConfig)
    return load_generator(path, ema) if is_generator else load_autoencoder(path, ema or None)


def is_exported(path: str | Path) -> bool:
    """Whether it is a folder of `save_pretrained`."""
    return (Path(path) / WEIGHTS_NAME).is_file()


def _of_run(run: str | Path, config: DiTConfig | TokenizerConfig, ema: float | None, make: Callable[[], M]) -> M:
    """A network with the weights of a run's newest checkpoint, but for those that serve training alone."""
    weights, file = runs.read_weights(run, ema=ema or None)
    model = build_model(
        make, {name: weights[name] for name in weights if not name.startswith(TRAINING_ONLY)}, str(file)
    )
    state = publish.read_state(file)
    share = start_share(state.step, ema, config.engine.ema_warmup) if ema else 0.0
    values = {"ema": ema or 0.0, "start_share": share, "classes": state.loader.get("classes")}
    model.origin = checked(Origin, values, str(file))
    return model
