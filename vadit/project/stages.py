"""A project, the folder that `vadit new` makes: where its parts lie, and what a run needs that is not there yet.

| in the project | content |
|---|---|
| `project.json` | marks it; where the pictures lie |
| `tokenizer/`, `generator/` | run folders, each with its config.json: `vadit train PROJECT/tokenizer` |
| `pictures.beton` | the pictures scaled once, where decoding them in every epoch would hold up training |
| `latents/` | what the generator learns; made where its training begins |
| `README.md` | what was found, and every setting that was chosen with its reason |

Its parts are found by where the project lies, so it may be moved.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from vadit.config import Config, TokenizerConfig, vary
from vadit.config.files import load_run_config
from vadit.images.backends import open_images
from vadit.images.prepare import prepare_images
from vadit.latents.encode import encode
from vadit.latents.shards import INDEX_FILE, open_finished_folder
from vadit.models.pretrained import weights_hash
from vadit.runtime import distributed
from vadit.runtime.console import ProgressBar, note_once
from vadit.runtime.errors import UsageError
from vadit.runtime.json_files import read_json
from vadit.train import engine, runs
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.export import load_autoencoder

MARK, PICTURES, LATENTS, TOKENIZER, GENERATOR = "project.json", "pictures.beton", "latents", "tokenizer", "generator"
BATCH = 64

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Project:
    """What project.json holds."""

    images: str  # absolute
    labels_file: str | None
    prepared: bool  # whether pictures.beton takes the pictures' place


def placed(config: C, run: Path) -> C:
    """The config of a run folder with its paths where its project lies now; one of no project stays as it is."""
    config, root = vary(config, run={"out": str(run)}), run.parent
    if not (root / MARK).is_file():
        return config
    if isinstance(config, TokenizerConfig):
        project = read_json(root / MARK, Project, remedy="make the project anew with `vadit new`")
        return vary(config, data={"path": str(root / PICTURES)}) if project.prepared else config
    aside = {"tokenizer": str(root / TOKENIZER)} if config.evaluation.every_images else {}
    return vary(config, data={"path": str(root / LATENTS)}, evaluation=aside)


def run_config(folder: str) -> Config:
    """The config of the run folder that `vadit train FOLDER` names."""
    if (Path(folder) / MARK).is_file():
        raise UsageError(f"{folder} is a project of two runs; name {Path(folder) / TOKENIZER} or {GENERATOR} there")
    return placed(load_run_config(folder), Path(folder))


def make_ready(config: Config) -> None:
    """Make what a run of a project trains on, where it is not there: scaled pictures, or latents. Collective."""
    root = Path(config.data.path).parent
    if not (root / MARK).is_file() or runs.has_checkpoint(runs.final_folder(config.run.out)):
        return
    device = distributed.device(config.run.device)
    if distributed.world_size() > 1:
        engine.start(device)
        distributed.set_collective_timeout(0)
    if isinstance(config, TokenizerConfig):
        if config.data.path == str(root / PICTURES):
            distributed.from_main(lambda: _prepare(root, config))
    elif config.data.path == str(root / LATENTS):
        _encode(root, device)


def _prepare(root: Path, config: TokenizerConfig) -> None:
    if (root / PICTURES).exists():
        return
    project = read_json(root / MARK, Project)
    spec = dataclasses.replace(config.data, path=project.images, labels_file=project.labels_file)
    size, workers = config.autoencoder.image_size, config.data.num_workers
    summary = prepare_images(spec, root / PICTURES, size=size, num_workers=workers, verify=False)
    if summary.bad:
        note_once(f"{len(summary.bad):,} pictures do not decode and are left out: {summary.bad_file}")


def _encode(root: Path, device: torch.device) -> None:
    """The latents of the project's pictures by its tokenizer, which must be at its end unless they are there."""
    tokenizer, latents = root / TOKENIZER, root / LATENTS
    config = placed(load_run_config(tokenizer), tokenizer)
    assert isinstance(config, TokenizerConfig), "it stands in the tokenizer's place"
    newest = publish.newest(runs.final_folder(tokenizer) / "checkpoints", hashes=False)
    seen, total = 0 if newest is None else publish.read_state(newest).images_seen, config.run.total_images
    finished = (latents / INDEX_FILE).is_file()
    if seen < total and not (finished and seen):
        raise UsageError(
            f"{tokenizer} has been trained on {seen:,} of {total:,} images, and the generator learns its latents: run "
            f"`vadit train {tokenizer}` to its end first"
        )
    autoencoder = load_autoencoder(tokenizer).to(device).eval().requires_grad_(False)
    if finished:
        settings = open_finished_folder(latents)[0][0].settings
        if settings is None or settings.tokenizer != weights_hash(autoencoder):
            raise UsageError(f"{latents} was encoded by another tokenizer than {tokenizer} is now; remove that folder")
        return
    images = open_images(config.data, config.autoencoder.image_size)
    with ProgressBar("encode", len(images)) as bar:
        workers = config.data.num_workers
        encode(autoencoder, images, latents, batch_size=BATCH, num_workers=workers, progress=bar.update)
