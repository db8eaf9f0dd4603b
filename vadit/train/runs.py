"""The run folder: its config, its seeds, the weights it starts from, and the weights it gives.

docs/training.md lists its files ("The run folder"). A tokenizer's stage-K is a run folder of its own.
"""

import contextlib
import dataclasses
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vadit.config import Config, DiTConfig, RunSpec, TokenizerConfig, settled, vary
from vadit.config.files import load_run_config, save_config
from vadit.models.pretrained import WEIGHTS_NAME, bare_state, load_state
from vadit.runtime import choices, distributed, rng
from vadit.runtime.choices import Choice
from vadit.runtime.console import note, note_once
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import refuse_other_settings, save_json
from vadit.runtime.owner import owned
from vadit.runtime.safetensors_file import load_tensors
from vadit.runtime.stream import check_position
from vadit.sampling.info import FILE as INFO
from vadit.sampling.info import info_of, read_info, save_info
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.shares import WEIGHTS, Shares, average
from vadit.train.engine import Engine, start

# Settings that may change between two starts of the same run.
_FREE = {
    *("out", "device", "log_every_images", "save_every_images", "keep_checkpoints", "keep_every_images"),
    *("background_saves", "hang_timeout_s", "peak_tflops"),
}
# How the work is spread over processes, and rounding that only GPUs have: a checkpoint serves all of it.
_FREE_ENGINE = ("tf32", "zero_stage", "offload_optimizer", "offload_weights", "overlap_comm", "gradient_accumulation")
_FREE_DATA = ("path", "images", "num_workers", "on_error", "max_bad_share")
_PROJECTION = ("linear_proj.", "projector.")
LABEL_TABLE = "y_embedder.embedding_table.weight"


C = TypeVar("C", bound=Config)


def check_folder(config: TokenizerConfig | DiTConfig, num_samples: int) -> None:
    """Check that what the run folder holds is of the same config and as many samples, but for what may change.

    Nothing is written: `save_start` does that once nothing refuses the start any more. Where nothing was saved yet
    there is nothing to continue, and the new config takes the old one's place.
    """
    folder, now = Path(config.run.out), _fixed(config)
    if (newest := publish.newest(final_folder(folder) / "checkpoints", hashes=False)) is None:
        return
    if (before := _before(config)) is not None:
        if before.kind != config.kind:
            raise UsageError(
                f"{folder} holds a run of kind {before.kind}, this one is {config.kind}; set another --run.out"
            )
        remedy = "set it as it was to continue it, or another --run.out"
        refuse_other_settings(folder, "a run", _fixed(before), now, remedy)
    check_position(publish.read_state(newest).loader, num_samples)
    if isinstance(config, DiTConfig) and (folder / INFO).is_file():
        made, found = None, info_of(config).tokenizer_hash
        with contextlib.suppress(RunError):  # a damaged one is written anew
            made = read_info(folder).tokenizer_hash
        if None not in (made, found) and made != found:
            raise UsageError(
                f"data.path {config.data.path} holds latents of another tokenizer ({found}) than the run {folder} was "
                f"begun with ({made}); set data.path to those, or start from the run's weights: --run.init-from "
                f"{folder}, and another --run.out"
            )


def _before(config: TokenizerConfig | DiTConfig) -> TokenizerConfig | DiTConfig | None:
    """The config of the run so far; None where only its stages, which are compared one by one, still have theirs."""
    try:
        return load_run_config(config.run.out, stages=False)
    except UsageError as error:
        if not getattr(config, "stages", ()):
            raise
        note_once(f"{error}; it is written anew")
        return None


@contextlib.contextmanager
def owned_folder(config: TokenizerConfig | DiTConfig) -> Iterator[None]:
    """The run folder is this run's alone until the block ends (`owner.owned`). Collective.

    Several processes meet first: where the main one is refused, none waits for it. One that was made here goes again
    where the run fails before its first step: by a wrong path, for one.
    """
    folder = Path(config.run.out)
    fresh = distributed.is_main() and not folder.exists()
    if distributed.world_size() > 1:
        start(distributed.device(config.run.device))
    with owned(folder, "set another --run.out"):
        try:
            yield
        except Exception:
            if fresh and not any(folder.rglob("log.jsonl")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _fixed(config: Any) -> dict[str, Any]:
    """What a checkpoint is bound to: not where folder and data lie, nor what the recipe says of its source.

    A longer run is the same one where no schedule depends on the length; a loader refuses data of another size.
    """
    device = distributed.device(config.run.device).type  # what is automatic may be given as what it takes here
    values = dataclasses.asdict(settled(config, processes=distributed.world_size(), device=device))
    for looked_on in ("guard", "evaluation", "paper"):
        values.pop(looked_on)
    start, out = Path(config.run.init_from or ""), Path(config.run.out)
    if start.parent == out.parent and start.name.startswith("stage-"):  # a stage's is the one before, beside it
        values["run"]["init_from"] = start.name
    if config.optimizer.schedule == "constant":
        values["run"].pop("total_images")
    for part, free in (("run", _FREE), ("engine", _FREE_ENGINE), ("data", _FREE_DATA)):
        values[part] = {name: value for name, value in values[part].items() if name not in free}
    return values


def seed_everything(spec: RunSpec) -> None:
    """Seed initialisation (alike on every process) and ask for deterministic algorithms where the run wants them."""
    torch.manual_seed(rng.fold(spec.seed))
    if spec.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def settle(config: C, device: torch.device) -> tuple[C, list[Choice]]:
    """`config` with what its engine's settings at auto take here, in one line and as choices."""
    found = settled(config, processes=distributed.world_size(), device=device.type)
    taken = []
    for name in ("zero_stage", "compile"):
        wanted, value = getattr(config.engine, name), getattr(found.engine, name)
        why = (
            f"auto, for {distributed.world_size()} process(es) on {device.type} and the other settings"
            if wanted == "auto"
            else "asked for"
        )
        taken.append(Choice(f"engine.{name}", str(value), why))
    if automatic := [f"{choice.setting} is {choice.name}" for choice in taken if choice.reason != "asked for"]:
        note_once(f"  {', '.join(automatic)} (auto)", "dim")
    return found, taken


def engine(network: nn.Module, config: Config, device: torch.device, **rest: Any) -> Engine:
    """A network that the run trains, under the engine of its settings; `rest` is the engine's own."""
    settings: dict[str, Any] = {"optimizer": config.optimizer, "spec": config.engine, **rest}
    return Engine(network.train(), global_batch=config.run.batch_size, device=device, **settings)


def save_start(configs: Sequence[Config], engines: dict[str, Engine], chosen: list[Choice]) -> None:
    """Keep the config, in its run folder, DeepSpeed's own of each network and what was chosen. Collective.

    The last of `configs` is the run's; before it, that of the run whose stage it is. Tells of wishes that could not be
    met, and of processes that compute otherwise: another kernel on one machine is slower there and rounds otherwise,
    worth a line, not an end.
    """
    for choice in chosen:
        choices.report(choice)
    own, folder = [(choice.setting, choice.name) for choice in chosen], Path(configs[-1].run.out)

    def keep() -> list[tuple[str, str]]:
        for config in configs:
            save_config(config, Path(config.run.out) / "config.json")
            if isinstance(config, DiTConfig):
                save_info(info_of(config), folder)
        save_json(folder / "deepspeed.json", {name: engine.config for name, engine in engines.items()})
        choices.save(folder, chosen)
        return own

    if own != (main := distributed.from_main(keep)):
        note(
            f"rank {distributed.rank()} on {socket.gethostname()} computes with other parts than rank 0: "
            + ", ".join(f"{setting} {name}" for setting, name in own if (setting, name) not in main)
        )


def has_checkpoint(folder: Path) -> bool:
    """Whether a start would continue `folder` rather than begin it."""
    return publish.newest(folder / "checkpoints", hashes=False) is not None


def final_folder(run: str | Path) -> Path:
    """Where the newest weights of a run lie: the run itself, or its last stage that has a checkpoint."""
    folder = Path(run)
    stages = [path for path in sorted(folder.glob("stage-*")) if has_checkpoint(path)]
    return stages[-1] if stages else folder


def read_weights(
    run: str | Path, *, ema: float | None = None, network: str = "model"
) -> tuple[dict[str, torch.Tensor], Path]:
    """Whole fp32 weights of a run's newest checkpoint (or of one of its averages), and the checkpoint.

    They are put together from the processes' shares on this machine, in one process: no more memory than they need.
    """
    folder = final_folder(run) / "checkpoints"
    # In training all read, and one looks for damage: what they start from is broadcast from there.
    path = publish.newest(folder, hashes=distributed.is_main())
    if path is None:
        raise UsageError(f"{run} has no whole checkpoint under {folder}; train it first (`vadit train`)")
    shares = Shares(path, network)
    if ema is None:
        return shares.whole(WEIGHTS), path
    if ema not in (known := shares.averages):
        choice = ", ".join(map(repr, known)) or "left out only"
        raise UsageError(f"{path} has no average with decay {ema}; --ema can be {choice}")
    return shares.whole(average(ema)), path


def initialise(module: nn.Module, source: str) -> None:
    """Start `module` from the weights of a run, of an exported folder or of a .safetensors file."""
    path = Path(source)
    if path.is_file() and path.suffix != ".safetensors":
        kind = f"of {path.suffix}" if path.suffix else "without a suffix"
        raise UsageError(
            f"run.init_from {source} is a file {kind}; needed: a run, an exported folder or a .safetensors file: "
            f"turn it into one with `vadit import {source} --out FOLDER`, and set --run.init-from FOLDER"
        )
    own = module.state_dict()
    if path.is_file():
        content, origin = load_tensors(path), path
        state = bare_state(content, next(iter(own)))[0] | {name: content[name] for name in content if name in own}
    elif (path / WEIGHTS_NAME).is_file():
        state, origin = load_tensors(path / WEIGHTS_NAME), path
    elif (path / "config.json").is_file() or has_checkpoint(final_folder(path)):
        state, origin = read_weights(path)
    else:
        raise UsageError(f"run.init_from {source} is no run, exported folder or .safetensors file; see `vadit import`")
    # Projections to features (VF loss, REPA) are no part of an exported network, and of no use without alignment.
    state = {name: value for name, value in state.items() if name in own or not name.startswith(_PROJECTION)}
    state |= {name: value for name, value in own.items() if name not in state and name.startswith(_PROJECTION)}
    _fit_classes(state, own, str(origin))
    load_state(module, state, str(origin))


def _fit_classes(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], origin: str) -> None:
    """Give the table of labels the rows of `own`: data may have grown, or have other classes.

    The row of no class, the last, goes along. Known classes do where there are more now; fewer are others.
    """
    old, new = state.get(LABEL_TABLE), own.get(LABEL_TABLE)
    if old is None or new is None or len(old) == len(new) or old.shape[1:] != new.shape[1:]:
        return
    kept = len(old) - 1 if len(old) < len(new) else 0
    state[LABEL_TABLE] = torch.cat([old[:kept], new[kept:-1], old[-1:]])
    note_once(
        f"{origin} has {len(old) - 1:,} classes, this run {len(new) - 1:,}: {len(new) - 1 - kept:,} begin untrained"
    )


def initialise_discriminator(module: nn.Module, source: str) -> None:
    """Go on with the discriminator of a run, where `source` is one that has it; exported folders do not."""
    path = publish.newest(final_folder(source) / "checkpoints", hashes=False)
    if path is not None and any(path.glob("discriminator-*")):
        state, path = read_weights(source, network="discriminator")
        load_state(module, state, str(path))


def stage_config(config: TokenizerConfig, index: int) -> TokenizerConfig:
    """The config of one stage of a tokenizer: a run of its own that starts from the weights of the stage before."""
    stage = config.stages[index]
    out = Path(config.run.out)
    start = config.run.init_from if index == 0 else str(out / f"stage-{index}")
    run = {"out": str(out / f"stage-{index + 1}"), "total_images": stage.total_images, "init_from": start}
    return vary(config, run=run, loss=stage.loss(config.loss), stages=())
