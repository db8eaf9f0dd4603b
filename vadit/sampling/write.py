"""The files that samples become: PNGs, ADM's .npz and a picture, in a folder that belongs to one set of settings."""

import contextlib
import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor, nn

from vadit.config import FlowSpec, SampleSpec
from vadit.images.pixels import channels_last, image_grid, read_png, write_png
from vadit.models.autoencoder import Autoencoder
from vadit.models.pretrained import Origin, weights_hash
from vadit.runtime import distributed
from vadit.runtime.compiled import compile_each
from vadit.runtime.console import note
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import refuse_other_settings, save_json, saved_file
from vadit.runtime.json_files import checked, read_json
from vadit.runtime.owner import owned
from vadit.runtime.precision import Precision, as_computed, resolved
from vadit.sampling import draw

GRID_IMAGES = 64  # images of the grid picture, at most
SETTINGS = "settings.json"
_AGAIN = "free space there or choose another folder, then run the same command again"


class SampleFiles(NamedTuple):
    """What `write_samples` wrote."""

    images: Path  # folder of PNGs: index with six digits
    npz: Path  # ADM's file: arr_0 uint8 (N, H, W, 3), labels int64 (N,)
    grid: Path  # the first images in one picture


def write_samples(
    out: str | Path,
    model: Any,
    autoencoder: Autoencoder,
    spec: SampleSpec,
    *,
    num_samples: int,
    mean: Tensor,
    std: Tensor,
    multiplier: float = 1.0,
    flow: FlowSpec | None = None,
    guide: nn.Module | None = None,
    labels: Sequence[int] | None = None,
    precision: Literal["auto"] | Precision = "fp32",
    compiled: Literal["auto", True, False] = False,
    source: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    named: bool = False,
) -> SampleFiles:
    """Draw and decode samples 0..num_samples-1 into out/images/000000.png ..., out/samples.npz and out/grid.png.

    z * std / multiplier + mean (LatentDataset's statistics, (C,) or (1, C, 1, 1)) is what the decoder gets. Files are
    whole or absent. Images that exist are not drawn again, if out/settings.json (sampler, precision, flow, labels,
    statistics and hashes of the weights) matches; num_samples may grow. `named`: into a folder in `out` that is these
    settings' own. `source` names the checkpoints, for a reader. Each process draws its share; the first one writes .npz
    and grid at the end. progress(n) gets how many of this process's images are there. `compiled` auto: as the folder's
    samples were, else where it pays.

    UsageError: the folder holds samples of other weights or settings, or more images. RunError: latents that are not
    finite, a damaged folder, a full disk.
    """
    draw.check_request(model, spec, flow, labels, guide)
    automatic = {name for name, value in (("precision", precision), ("compile", compiled)) if value == "auto"}
    precision = resolved(precision, draw.device_of(model), generator=True)
    classes, out = draw.trained_classes(model), Path(out)
    networks = {"generator": model, "tokenizer": autoencoder, "guide": guide}
    settings = {
        "weights": {name: weights_hash(each) for name, each in networks.items() if isinstance(each, nn.Module)},
        "sampler": dataclasses.asdict(spec),
        "flow": dataclasses.asdict(flow or FlowSpec()),
        "label_list": None if labels is None else list(labels),
        "num_classes": model.num_classes,
        "classes": None if len(classes) == model.num_classes else classes.tolist(),
        "autoguidance": guide is not None,
        "precision": precision,
        "multiplier": multiplier,
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
    }
    out = out / _name(spec, settings) if named else out
    settings["compile"] = draw.pays_to_compile(model, spec, num_samples, precision) if compiled == "auto" else compiled
    model, guide = (as_computed(network, precision) for network in (model, guide))
    mean, std = (values.reshape(1, -1, 1, 1).to(draw.device_of(model)) for values in (mean, std))
    files = SampleFiles(out / "images", out / "samples.npz", out / "grid.png")
    with owned(out, "set --out to another folder"), ThreadPoolExecutor(1) as writer:
        distributed.from_main(lambda: _check_folder(out, settings, source or {}, num_samples, automatic))
        if read_json(out / SETTINGS, dict[str, Any]).get("compile"):
            compile_each([block for network in (model, guide) for block in getattr(network, "compiled_blocks", ())])
        done, written = 0, writer.submit(_write_pngs, {})
        for group in draw.own_groups(num_samples):
            wanted = group[: num_samples - group.start]
            if missing := [index for index in wanted if not _is_whole(_png(out, index))]:
                latents = _finite(draw.draw_group(model, spec, group, flow, guide, labels, precision).latents, group)
                pixels = channels_last(draw.decode(autoencoder, latents * std / multiplier + mean)).cpu().numpy()
                written.result()
                # PNGs take the host 10 ms each (256 pixels): meanwhile the next group is drawn
                written = writer.submit(_write_pngs, {_png(out, i): pixels[i - group.start] for i in missing})
            done += len(wanted)
            if progress is not None:
                progress(done)
        written.result()
        distributed.barrier()
        if distributed.is_main():
            all_labels = draw.sample_labels(range(num_samples), spec.seed, classes, spec.labels, labels)
            _write_whole(files, [_png(out, index) for index in range(num_samples)], all_labels.numpy())
        distributed.barrier()
    return files


def _finite(latents: Tensor, group: range) -> Tensor:
    if not latents.isfinite().all():  # they would become black images, and a number
        raise RunError(
            f"samples {group.start} to {group.stop - 1} are not finite in the latent; look at the generator's log, and "
            "sample from an earlier checkpoint or an average (--ema)"
        )
    return latents


def _name(spec: SampleSpec, settings: dict[str, Any]) -> str:
    """A folder's name that no other settings have: the sampler, and a hash of all."""
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    listed = settings["label_list"] is not None
    return f"{draw.sampler_name(spec, autoguidance=settings['autoguidance'], listed=listed)}-{digest}"


def noted_sampler(samples: str | Path) -> str | None:
    """`sampler_name` of a folder that `write_samples` made, or of a file in one; None for images of other origin.

    A line where they are an average's that is not worth much yet.
    """
    try:
        noted = _noted(samples)
    except RunError as error:
        note(f"{error}; the sampler is not known from it")
        return None
    if noted is None:
        return None
    checked(Origin, noted.source.get("origin", {}), f"{samples}: {SETTINGS}").warn(str(samples))
    return draw.sampler_name(noted.sampler, autoguidance=noted.autoguidance, listed=noted.label_list is not None)


def noted_precision(samples: str | Path) -> str | None:
    """What the generator of such images computed in."""
    with contextlib.suppress(RunError):
        return getattr(_noted(samples), "precision", None)
    return None


def _noted(samples: str | Path) -> "_Noted | None":
    files = (Path(samples) / SETTINGS, Path(samples).parent / SETTINGS)
    return next((read_json(file, _Noted) for file in files if file.is_file()), None)


@dataclass(frozen=True)
class _Noted:
    """What settings.json says of the sampler and of what was sampled."""

    sampler: SampleSpec
    autoguidance: bool
    label_list: list[int] | None
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    precision: str = "fp32"


def _check_folder(
    out: Path, settings: dict[str, Any], source: dict[str, Any], num_samples: int, automatic: set[str]
) -> None:
    """Write settings.json, or check that what is there was drawn with the same settings and is asked for.

    automatic: settings at auto; compiled or not is then as what is there.
    """
    file = out / SETTINGS
    if not file.is_file():
        _check_images(out, 0)
        save_json(file, settings | {"source": source}, _AGAIN)
        return
    remedy = "set --out to another folder, or delete this one"
    noted = read_json(file, dict[str, Any], remedy=f"it is damaged: {remedy}")
    noted.pop("source", None)
    noted = {"precision": "fp32", "compile": False} | noted  # there was nothing else
    if "compile" in automatic:
        settings = settings | {"compile": noted["compile"]}
    weights = noted.get("weights")
    for network, old in weights.items() if isinstance(weights, dict) else ():
        if old != (now := settings["weights"].get(network, old)):
            raise UsageError(f"{out} holds samples of another {network} (weights {old}, now {now}); {remedy}")
    refuse_other_settings(out, "samples", noted, settings, f"set it as it was, {remedy}", automatic=automatic)
    _check_images(out, num_samples)


def _check_images(out: Path, count: int) -> None:
    """Refuse what evaluation of the folder would count and the .npz not hold; take away an .npz of fewer."""
    images, expected = out / "images", {_png(out, index).name for index in range(count)}
    there = {path.name for path in images.glob("[!.]*") if path.suffix != ".partial"}
    if others := sorted(there - expected):
        raise UsageError(
            f"{images} holds {others[0]}, which is none of the {count:,} samples of these settings: the folder and "
            "samples.npz would be different sets; ask for as many as there are (--num-samples), set --out to another "
            "folder, or delete this one"
        )
    if len(there) < count:
        (out / "samples.npz").unlink(missing_ok=True)


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


def _write_pngs(images: dict[Path, np.ndarray]) -> None:
    for path, pixels in images.items():
        # one that a power cut takes is drawn again; to wait for the disk 50,000 times takes minutes
        write_png(path, Image.fromarray(pixels), _AGAIN, flush=False)


def _write_whole(files: SampleFiles, images: Sequence[Path], labels: np.ndarray) -> None:
    """What is made of all images: the archive and the picture of the first ones."""
    _write_npz(files.npz, images, labels)
    shown = np.stack([read_png(image) for image in images[:GRID_IMAGES]])
    write_png(files.grid, image_grid(shown, scale=1), _AGAIN)


def _write_npz(path: Path, images: Sequence[Path], labels: np.ndarray) -> None:
    """One image in memory at a time: 50,000 of 256 pixels are 9.8 GB."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *read_png(images[0]).shape)}
    # a ZipInfo of its own has a fixed date, so equal samples give equal files
    with saved_file(path, _AGAIN) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for image in images:
                member.write(read_png(image).tobytes())
        with archive.open(zipfile.ZipInfo("labels.npy"), "w") as member:
            np.lib.format.write_array(member, labels)
