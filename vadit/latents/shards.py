"""The files of a latent folder: safetensors shards, `index.json` and `latents_stats.pt`, read and written.

A shard's header says where each row lies (`vadit.runtime.safetensors_file`).

| key | shape | content |
|---|---|---|
| `latents`, `latents_flip` | (N, d, h, w) | one posterior sample of image and mirror image (the authors' layout) |
| `moments`, `moments_flip` | (N, 2d, h, w) | the posterior instead: d channels of mean, then d of standard deviation |
| `features`, `features_flip` | (N, D, h, w) | a foundation model's features of both (`vadit encode --features`) |
| `labels` | (N,) | class |
| `ids` | (N,) | index of the image in its source (our shards) |
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.safetensors_file import REMEDY, TensorEntry, parse_header, write_parts, write_tensors

INDEX_FILE = "index.json"
STATISTICS_FILE = "latents_stats.pt"
FORMAT = "vadit-latents"


@dataclass(frozen=True)
class LatentSettings:
    """What the latents of a folder depend on; it stands in every shard's header and in the index."""

    tokenizer: str
    """Hash of the autoencoder's weights."""
    config: str
    """The autoencoder's spec as JSON."""
    source: str
    """Where the images came from."""
    num_images: int
    """Images of the source."""
    num_classes: int
    """Classes of the source."""
    size: int
    """Side of the images in pixels."""
    store: Literal["moments", "sample"]
    """moments: mean and standard deviation; sample: one draw."""
    dtype: Literal["bf16", "fp32"]
    """Type of the stored numbers."""
    flip: bool
    """Whether the mirrored images are there, too."""
    seed: int
    """Seed of the draw (store="sample")."""
    shard_size: int
    """Images per shard."""
    features: str = ""
    """What the foundation features are of, as JSON (`vadit.latents.encode`); empty where there are none."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of a tensor lie in their file: one after another from `start` on."""

    start: int
    row_bytes: int


@dataclass(frozen=True)
class FeatureRows:
    """The foundation features of a shard, (D, h, w) each."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    plain: Rows
    flipped: Rows | None


@dataclass(frozen=True)
class LatentShard:
    """One shard: what its header says, and the labels. Rows are read when they are wanted."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    """(d, h, w) of one latent; stored rows have 2d channels where `has_moments`."""
    dtype: torch.dtype
    has_moments: bool
    plain: Rows
    flipped: Rows | None
    labels: Tensor
    """int64 (N,)."""
    num_bytes: int
    """Of the file."""
    settings: LatentSettings | None
    """None for a shard that is not ours."""
    features: FeatureRows | None = None
    """Foundation features beside the latents."""

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a stored row."""
        channels, height, width = self.shape
        return (2 * channels if self.has_moments else channels, height, width)

    @property
    def kind(self) -> tuple[tuple[int, int, int], torch.dtype, bool, tuple[int, int, int] | None]:
        """What shards of one folder have in common."""
        return (self.shape, self.dtype, self.has_moments, self.features.shape if self.features is not None else None)

    def rows(self, start: int, stop: int, *, flipped: bool) -> Tensor:
        """Rows [start, stop) as stored, (stop - start, c, h, w). RunError where the file is cut by now."""
        source = self.flipped if flipped and self.flipped is not None else self.plain
        stored = torch.empty((stop - start, *self.stored_shape), dtype=self.dtype)
        target = stored.view(torch.uint8).numpy().reshape(-1).data if stored.numel() else memoryview(b"")
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(source.start + start * source.row_bytes)
                done = 0
                while done < len(target):
                    count = file.readinto(target[done:])
                    if not count:
                        raise RunError(f"{self.path} is cut short; fetch or encode the file anew")
                    done += count
        except OSError as error:
            raise RunError(f"{self.path} cannot be read ({error.strerror or error}); {REMEDY}") from None
        return stored


def open_shard(path: Path) -> LatentShard:
    """Read a shard's header; RunError names a file that is cut short or whose header does not fit its content."""
    tensors, metadata = parse_header(path)
    key = next((key for key in ("latents", "moments") if key in tensors), None)
    if key is None or "labels" not in tensors:
        raise RunError(f"{path} holds {sorted(tensors)}; needed: latents or moments, and labels; remove the file")
    plain, flipped, has_moments = tensors[key], tensors.get(f"{key}_flip"), key == "moments"
    labels = _read_integers(path, "labels", tensors["labels"])
    if len(plain.shape) != 4 or not plain.dtype.is_floating_point or (has_moments and plain.shape[1] % 2):
        raise RunError(
            f"{path}: {key} is {plain.dtype} {plain.shape}; needed: floating point (N, channels, h, w); {REMEDY}"
        )
    if flipped is not None and (flipped.shape != plain.shape or flipped.dtype != plain.dtype):
        raise RunError(
            f"{path}: {key}_flip {flipped.dtype} {flipped.shape} does not match {key} {plain.dtype} {plain.shape}"
        )
    count, channels, height, width = plain.shape
    if labels.shape != (count,):
        raise RunError(f"{path}: {tuple(labels.shape)} labels for {count} {key}; the file is damaged; {REMEDY}")
    settings = _parse_settings(path, metadata)
    if settings is not None and metadata.get("count") != str(count):
        raise RunError(
            f"{path}: the header counts {metadata.get('count')} images but {count} are there; encode it anew"
        )
    row_bytes = math.prod(plain.shape[1:]) * plain.dtype.itemsize
    return LatentShard(
        path=path,
        count=count,
        shape=(channels // 2 if has_moments else channels, height, width),
        dtype=plain.dtype,
        has_moments=has_moments,
        plain=Rows(plain.offset, row_bytes),
        flipped=Rows(flipped.offset, row_bytes) if flipped is not None else None,
        labels=labels,
        features=_features(path, tensors, count, flipped is not None),
        num_bytes=max(entry.offset + math.prod(entry.shape) * entry.dtype.itemsize for entry in tensors.values()),
        settings=settings,
    )


def _features(path: Path, tensors: dict[str, TensorEntry], count: int, has_flipped: bool) -> FeatureRows | None:
    """Where the features lie, checked to fit the latents; None where there are none."""
    plain, flipped = tensors.get("features"), tensors.get("features_flip")
    if plain is None:
        return None
    if len(plain.shape) != 4 or plain.shape[0] != count or plain.dtype != torch.bfloat16:
        raise RunError(
            f"{path}: features are {plain.dtype} {plain.shape}; needed: bfloat16 ({count}, D, h, w); {REMEDY}"
        )
    if (flipped is not None) != has_flipped or (flipped is not None and flipped.shape != plain.shape):
        found = "are missing" if flipped is None else f"have shape {flipped.shape}"
        raise RunError(f"{path}: features_flip {found}; they must match features and the mirrored latents; {REMEDY}")
    _, channels, height, width = plain.shape
    row_bytes = math.prod(plain.shape[1:]) * plain.dtype.itemsize
    mirrored = Rows(flipped.offset, row_bytes) if flipped is not None else None
    return FeatureRows((channels, height, width), plain.dtype, Rows(plain.offset, row_bytes), mirrored)


def read_ids(path: Path) -> Tensor | None:
    """Of each latent of a shard: the index of its image in the source, int64 (N,); None where the shard has none."""
    tensors, _ = parse_header(path)
    return _read_integers(path, "ids", tensors["ids"]) if "ids" in tensors else None


def open_folder(folder: Path) -> list[LatentShard]:
    """All shards of a latent folder in file-name order, checked to agree with each other."""
    shards = []
    for path in shard_paths(folder):
        shards.append(open_shard(path))
        refuse_other_kind(shards[-1], shards[0])
    return shards


def shard_paths(folder: Path) -> list[Path]:
    """The files of a latent folder, sorted by name."""
    if not str(folder) or not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"data.path {folder} {problem}; set it to a folder that `vadit encode` wrote")
    try:
        paths = sorted(folder.glob("*.safetensors"))
    except OSError as error:
        raise UsageError(f"data.path {folder} cannot be read ({error.strerror}); give read permission") from None
    if not paths:
        raise UsageError(
            f"data.path {folder} holds no .safetensors shards; set it to a folder that `vadit encode` wrote"
        )
    return paths


def refuse_other_kind(shard: LatentShard, first: LatentShard) -> None:
    """RunError where a shard does not go together with the first one of its folder."""
    if shard.kind != first.kind:
        what, other = (
            f"{one.dtype} {one.stored_shape}" + (f" with features {one.features.shape}" if one.features else "")
            for one in (shard, first)
        )
        raise RunError(f"{shard.path} holds {what} but {first.path.name} {other}; keep shards of one kind in a folder")


class LatentShardWriter:
    """Collects one shard in memory, in its final dtype, and writes it whole or not at all."""

    def __init__(self, path: Path, settings: LatentSettings) -> None:
        self.path = path
        self.settings = settings
        self.count = 0
        self._parts: dict[str, list[Tensor]] = {}

    def add(
        self,
        latents: Tensor,
        flipped: Tensor | None,
        labels: Tensor,
        ids: Tensor,
        features: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """Append rows: latents (B, c, h, w), c = 2d (mean, std) for moments; labels and ids (B,).

        features: those of the images and of their mirror images, (B, D, h, w) each, kept as bfloat16.
        """
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.settings.dtype]
        key = "moments" if self.settings.store == "moments" else "latents"
        rows = {"labels": labels.to(torch.int64), "ids": ids.to(torch.int64), key: latents.to(dtype)}
        if flipped is not None:
            rows[f"{key}_flip"] = flipped.to(dtype)
        for name, part in zip(("features", "features_flip"), features or (None, None), strict=True):
            if part is not None:
                rows[name] = part.to(torch.bfloat16)
        for name, part in rows.items():
            self._parts.setdefault(name, []).append(part.detach().cpu().contiguous())
        self.count += len(labels)

    def close(self) -> int:
        """Write the shard; the number of images in it. RunError where the disk is full, and no partial file stays."""
        values = {name: str(value) for name, value in asdict(self.settings).items()}
        if not self.settings.features:
            del values["features"]  # such files stay as they were before there were features
        write_tensors(self.path, self._parts, {"format": FORMAT, "count": str(self.count), **values})
        return self.count


def save_index(folder: Path, settings: LatentSettings, classes: Sequence[str]) -> None:
    """Write index.json from the shards that are there: the mark of a complete folder."""
    shards = open_folder(folder)
    index = {
        "format": FORMAT,
        "num_images": sum(shard.count for shard in shards),
        "num_classes": len(classes),
        "classes": list(classes),
        "statistics": STATISTICS_FILE,
        "settings": asdict(settings),
        "shards": [{"file": shard.path.name, "count": shard.count} for shard in shards],
    }
    write_atomically(folder / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())


def read_index(folder: Path) -> dict[str, Any] | None:
    """The content of index.json, or None where there is none (the authors' folders)."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text())
        # The keys that readers use; anything else in the file is information for people.
        return {
            "num_classes": int(index["num_classes"]),
            "shards": {str(shard["file"]): int(shard["count"]) for shard in index["shards"]},
        }
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(f"{path} is damaged ({error!r}); run the `vadit encode` command again to rewrite it") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; RunError where the disk does not take it."""
    write_parts(path, [content])


def _read_integers(path: Path, name: str, entry: TensorEntry) -> Tensor:
    """int64, of the shape that the file has."""
    if entry.dtype not in (torch.int64, torch.int32):
        raise RunError(f"{path}: {name} are {entry.dtype}; needed: int64 or int32; {REMEDY}")
    kind = np.int64 if entry.dtype == torch.int64 else np.int32
    try:
        values = np.fromfile(path, kind, math.prod(entry.shape), offset=entry.offset)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}); {REMEDY}") from None
    if len(values) != math.prod(entry.shape):
        raise RunError(f"{path} is cut short; {REMEDY}")
    return torch.from_numpy(values.astype(np.int64).reshape(entry.shape))


def _parse_settings(path: Path, metadata: dict[str, str]) -> LatentSettings | None:
    if metadata.get("format") != FORMAT:
        return None
    try:
        return LatentSettings(
            tokenizer=metadata["tokenizer"],
            config=metadata["config"],
            source=metadata["source"],
            num_images=int(metadata["num_images"]),
            num_classes=int(metadata["num_classes"]),
            size=int(metadata["size"]),
            store="moments" if metadata["store"] == "moments" else "sample",
            dtype="fp32" if metadata["dtype"] == "fp32" else "bf16",
            flip=metadata["flip"] == "True",
            seed=int(metadata["seed"]),
            shard_size=int(metadata["shard_size"]),
            features=metadata.get("features", ""),
        )
    except (KeyError, ValueError) as error:
        raise RunError(f"{path} has damaged metadata ({error!r}); remove it and encode it anew") from None
