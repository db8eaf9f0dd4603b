"""Samples from a generator: which noise and label each has, and the files they become.

Sample i is a function of (seed, i) and the settings alone: of no batch size, number of processes or place of a restart.
Its noise, label and SDE noise are keyed by (seed, i), and since the last bits of a matrix product depend on how many
rows it has (and dopri5's steps on all of them), all arithmetic runs on aligned groups of 64 indices, whole ones always.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vadit.config import FlowSpec, SampleSpec
from vadit.images.pixels import channels_last, image_grid, read_png, to_uint8
from vadit.models.pretrained import weights_hash
from vadit.runtime import distributed, rng
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import whole_file
from vadit.sampling.solvers import evaluation, sample_ddpm, sample_ode, sample_sde

__all__ = [
    "GROUP",
    "Drawn",
    "SampleFiles",
    "draw",
    "sample_ddpm",
    "sample_labels",
    "sample_ode",
    "sample_sde",
    "sampler_name",
    "write_samples",
]

GROUP = 64
"""Samples that are computed together: index i belongs to group i // 64."""
DECODE_BATCH = 16
"""Latents that are decoded together: a decoder's activations are large, and the cut must not depend on anything."""
GRID_IMAGES = 64
"""Images of the grid picture, at most."""


class Decoder(Protocol):
    """What is needed of an autoencoder."""

    def decode(self, z: Tensor, /) -> Tensor: ...


class Drawn(NamedTuple):
    """Some samples."""

    indices: list[int]
    latents: Tensor
    """(n, C, h, w), as the generator knows them (normalised)."""
    labels: Tensor
    """(n,) int64."""


class SampleFiles(NamedTuple):
    """What `write_samples` wrote."""

    images: Path
    """Folder of PNGs: index with six digits."""
    npz: Path
    """ADM's file: arr_0 uint8 (N, H, W, 3), labels int64 (N,)."""
    grid: Path
    """The first images in one picture."""


def spare_points(spec: SampleSpec) -> int:
    """How many more `num_steps` counts than there are steps: 1 where they lie between the points of a grid, else 0."""
    closes = spec.method == "euler_maruyama" and spec.sde_last_step != "none"  # a step of its own after the grid's
    return 0 if spec.method == "ddpm" or closes else 1


def sampler_name(spec: SampleSpec, *, autoguidance: bool = False, listed: bool = False) -> str:
    """How samples were drawn, for the name of a metric: euler249_shift0.3_cfg10_from0.11_ch3_random.

    The number is that of steps: linspace(0, 1, 250) has 249, though the authors' tables say euler250. The last word is
    the law of the labels; `listed`: they were given.
    """
    parts = [spec.method if spec.method == "dopri5" else f"{spec.method}{spec.num_steps - spare_points(spec)}"]
    if spec.method == "euler_maruyama":
        parts += [spec.sde_diffusion] * (spec.sde_diffusion != SampleSpec.sde_diffusion)
        parts += [spec.sde_last_step] * (spec.sde_last_step != SampleSpec.sde_last_step)
    if spec.timestep_shift > 0:
        parts.append(f"shift{spec.timestep_shift:g}")
    if spec.cfg_scale != 1:
        parts.append(f"{'autoguided' if autoguidance else 'cfg'}{spec.cfg_scale:g}")
        low, high = spec.cfg_interval
        parts += [f"from{low:g}"] * (low > 0) + [f"to{high:g}"] * (high < 1)
        parts += [f"ch{spec.cfg_channels}"] * (spec.cfg_channels is not None)
        parts += [f"power{spec.cfg_power:g}"] if spec.cfg_power is not None else []
    return "_".join([*parts, "listed" if listed else spec.labels])


def sample_labels(
    indices: Sequence[int], seed: int, num_classes: int, law: str, fixed: Sequence[int] | None = None
) -> Tensor:
    """Labels (n,) int64 of samples `indices`: `fixed` over and over, or by `law` random or balanced.

    balanced is index % num_classes, so the classes are equally frequent where num_classes divides the count.
    """
    ids = torch.tensor(list(indices), dtype=torch.int64)
    if fixed is not None:
        return torch.tensor(list(fixed))[ids % len(fixed)]
    if law == "balanced":
        return ids % num_classes
    return rng.integers(rng.fold(seed, "label"), ids, num_classes)


# ------------------------------------------------------------------------------------------------ drawing


def draw(
    model: Any,
    spec: SampleSpec,
    *,
    num_samples: int,
    batch_size: int,
    flow: FlowSpec | None = None,
    guide: nn.Module | None = None,
    labels: Sequence[int] | None = None,
    latent_shape: tuple[int, int, int] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Iterator[Drawn]:
    """This process's share of samples 0..num_samples-1, at most batch_size at a time, on the model's device.

    batch_size is what is handed out together and changes no sample (see the top). Groups go to processes in turn.
    model: callable (x, t, labels) with num_classes; latent_shape (C, h, w) defaults to a LightningDiT's own.
    guide: a weaker generator for autoguidance, instead of the null label. labels: a list that is used over and over.
    """
    _check_request(model, spec, flow, num_samples, batch_size, labels)
    shape = latent_shape or _latent_shape(model)
    waiting: Drawn | None = None
    for group in _own_groups(num_samples, rank, world_size):
        drawn = _draw_group(model, spec, group, shape, flow, guide, labels)
        drawn = _rows(drawn, 0, num_samples - group.start)
        waiting = drawn if waiting is None else _join(waiting, drawn)
        while len(waiting.indices) >= batch_size:
            yield _rows(waiting, 0, batch_size)
            waiting = _rows(waiting, batch_size, None)
    if waiting is not None and waiting.indices:
        yield waiting


def _draw_group(
    model: Any,
    spec: SampleSpec,
    indices: range,
    shape: tuple[int, int, int],
    flow: FlowSpec | None,
    guide: nn.Module | None,
    fixed_labels: Sequence[int] | None,
) -> Drawn:
    device = _device(model)
    labels = sample_labels(indices, spec.seed, model.num_classes, spec.labels, fixed_labels).to(device)
    noise = rng.normal(rng.fold(spec.seed, "x0"), indices, shape).to(device)
    guidance: dict[str, Any] = {
        "cfg_scale": spec.cfg_scale,
        "cfg_interval": spec.cfg_interval,
        "cfg_channels": spec.cfg_channels,
        "cfg_power": spec.cfg_power,
        "guide": guide,
        "num_steps": spec.num_steps,
    }
    if spec.method == "ddpm":
        latents = sample_ddpm(model, noise, labels, seed=spec.seed, indices=indices, **guidance)
    elif spec.method == "euler_maruyama":
        latents = sample_sde(
            model,
            noise,
            labels,
            diffusion_form=spec.sde_diffusion,
            last_step=spec.sde_last_step,
            timestep_shift=spec.timestep_shift,
            flow=flow,
            seed=spec.seed,
            indices=indices,
            **guidance,
        )
    else:
        latents = sample_ode(
            model,
            noise,
            labels,
            method=spec.method,
            timestep_shift=spec.timestep_shift,
            atol=spec.atol,
            rtol=spec.rtol,
            flow=flow,
            **guidance,
        )
    return Drawn(list(indices), latents, labels)


def _own_groups(num_samples: int, rank: int | None, world_size: int | None) -> Iterator[range]:
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    for number in range(rank, math.ceil(num_samples / GROUP), world_size):
        yield range(number * GROUP, (number + 1) * GROUP)


def _rows(drawn: Drawn, start: int, stop: int | None) -> Drawn:
    return Drawn(drawn.indices[start:stop], drawn.latents[start:stop], drawn.labels[start:stop])


def _join(first: Drawn, second: Drawn) -> Drawn:
    latents, labels = torch.cat([first.latents, second.latents]), torch.cat([first.labels, second.labels])
    return Drawn(first.indices + second.indices, latents, labels)


def _check_request(
    model: Any, spec: SampleSpec, flow: FlowSpec | None, num_samples: int, batch_size: int, labels: Sequence[int] | None
) -> None:
    if num_samples < 1:
        raise UsageError(f"--num-samples is {num_samples}; it must be at least 1")
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}; it must be at least 1")
    objective = (flow or FlowSpec()).objective
    if (spec.method == "ddpm") != (objective == "ddpm"):
        remedy = "ddpm" if objective == "ddpm" else "euler, heun, dopri5 or euler_maruyama"
        raise UsageError(
            f"--method {spec.method} does not fit this generator (flow.objective {objective}); set --method {remedy} "
            "(vadit train: --sample.method)"
        )
    if labels is not None and not labels:
        raise UsageError("the list of labels is empty; name at least one class or leave it out")
    for label in labels or ():
        if not 0 <= label < model.num_classes:
            raise UsageError(
                f"label {label} is out of range: the generator has {model.num_classes} classes, "
                f"0 to {model.num_classes - 1}; choose labels (vadit sample --classes) among those"
            )


def _latent_shape(model: Any) -> tuple[int, int, int]:
    return model.spec.in_channels, model.spec.input_size, model.spec.input_size


def _device(model: Any) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


# ------------------------------------------------------------------------------------------------ files


def write_samples(
    out: str | Path,
    model: Any,
    autoencoder: Decoder,
    spec: SampleSpec,
    *,
    num_samples: int,
    mean: Tensor,
    std: Tensor,
    multiplier: float = 1.0,
    flow: FlowSpec | None = None,
    guide: nn.Module | None = None,
    labels: Sequence[int] | None = None,
    latent_shape: tuple[int, int, int] | None = None,
    source: dict[str, Any] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> SampleFiles:
    """Draw and decode samples 0..num_samples-1 into out/images/000000.png ..., out/samples.npz and out/grid.png.

    z * std / multiplier + mean (LatentDataset's statistics, (C,) or (1, C, 1, 1)) is what the decoder gets. Files are
    whole or absent. Images that exist are not drawn again, if out/settings.json (sampler, flow, labels, statistics and
    hashes of the weights) matches; num_samples may grow. `source` names the checkpoints there, for a reader. Each
    process draws its share; the first one writes .npz and grid once all are done. progress(n) gets how many of this
    process's images are there.

    Raises:
        UsageError: the folder holds samples of other weights or settings.
        RunError: latents that are not finite, a damaged folder, a full disk.
    """
    _check_request(model, spec, flow, num_samples, GROUP, labels)
    out, shape = Path(out), latent_shape or _latent_shape(model)
    rank = distributed.rank() if rank is None else rank
    networks = {"generator": model, "tokenizer": autoencoder, "guide": guide}
    settings = {
        "weights": {name: weights_hash(each) for name, each in networks.items() if isinstance(each, nn.Module)},
        "sampler": dataclasses.asdict(spec),
        "flow": dataclasses.asdict(flow or FlowSpec()),
        "label_list": None if labels is None else list(labels),
        "num_classes": model.num_classes,
        "latent_shape": shape,
        "autoguidance": guide is not None,
        "multiplier": multiplier,
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
    }
    distributed.from_main(lambda: _claim_folder(out, settings, source or {}, write=rank == 0))
    device = _device(model)
    mean, std = (values.reshape(1, -1, 1, 1).to(device) for values in (mean, std))
    done = 0
    for group in _own_groups(num_samples, rank, world_size):
        wanted = [index for index in group if index < num_samples]
        missing = [index for index in wanted if not _is_whole(_png(out, index))]
        if missing:
            latents = _draw_group(model, spec, group, shape, flow, guide, labels).latents
            if not latents.isfinite().all():  # they would become black images, and a number
                raise RunError(
                    f"samples {group.start} to {group.stop - 1} are not finite in the latent; look at the generator's "
                    "log, and sample from an earlier checkpoint or an average (--ema)"
                )
            with evaluation(autoencoder):
                parts = (latents * std / multiplier + mean).split(DECODE_BATCH)
                images = torch.cat([to_uint8(autoencoder.decode(part)) for part in parts])
                pixels = channels_last(images).cpu().numpy()
            for index in missing:
                _write_png(_png(out, index), Image.fromarray(pixels[index - group.start]))
        done += len(wanted)
        if progress is not None:
            progress(done)
    distributed.barrier()
    files = SampleFiles(out / "images", out / "samples.npz", out / "grid.png")
    if rank == 0:
        all_labels = sample_labels(range(num_samples), spec.seed, model.num_classes, spec.labels, labels)
        _write_npz(files.npz, [_png(out, index) for index in range(num_samples)], all_labels.numpy())
        shown = np.stack([read_png(_png(out, index)) for index in range(min(num_samples, GRID_IMAGES))])
        _write_png(files.grid, image_grid(shown, scale=1))
    distributed.barrier()
    return files


def _claim_folder(out: Path, settings: dict[str, Any], source: dict[str, Any], *, write: bool) -> None:
    """Make the folder and its settings.json, or check that what is there was drawn with the same settings."""
    file = out / "settings.json"
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made ({error.strerror}); choose another folder") from None
    settings = json.loads(json.dumps(settings))
    if file.is_file():
        try:
            noted = json.loads(file.read_text())
        except json.JSONDecodeError:
            raise RunError(f"{file} is damaged; delete {out} or choose another folder") from None
        before = dict(_flat(noted))
        for key, value in _flat(settings):
            if (old := before.get(key)) != value:
                network = key.removeprefix("weights.")
                what = f"drawn with {key} {old!r}, now it is {value!r}" if network == key else f"of another {network}"
                now = f" (weights {old}, now {value})" if network != key else ""
                raise UsageError(f"{out} holds samples {what}{now}; set --out to another folder, or delete this one")
    elif write:
        _write_whole(file, lambda stream: stream.write(json.dumps(settings | {"source": source}, indent=2).encode()))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _png(out: Path, index: int) -> Path:
    return out / "images" / f"{index:06d}.png"


def _is_whole(path: Path) -> bool:
    """Whether a PNG is there with its end (files of ours are whole or absent; copied ones may be cut)."""
    try:
        with path.open("rb") as stream:
            stream.seek(-12, os.SEEK_END)
            return stream.read(8)[4:] == b"IEND"
    except OSError:
        return False


def _write_png(path: Path, image: Image.Image) -> None:
    _write_whole(path, lambda stream: image.save(stream, format="png"))


def _write_npz(path: Path, images: Sequence[Path], labels: np.ndarray) -> None:
    """One image in memory at a time: 50,000 of 256 pixels are 9.8 GB."""
    first = read_png(images[0])
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *first.shape)}

    def write(stream: IO[bytes]) -> None:
        # a ZipInfo of its own has a fixed date, so equal samples give equal files
        with zipfile.ZipFile(stream, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for image in images:
                    member.write(read_png(image).tobytes())
            with archive.open(zipfile.ZipInfo("labels.npy"), "w") as member:
                np.lib.format.write_array(member, labels)

    _write_whole(path, write)


def _write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    try:
        with whole_file(path) as partial, partial.open("wb") as stream:
            write(stream)
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror or error}); free space there or choose another folder, "
            "then run the same command again"
        ) from None
