"""The files of a latent folder: safetensors shards, `index.json` and `latents_stats.pt`, read and written.

| key | shape | content |
|---|---|---|
| `latents`, `latents_flip` | (N, d, h, w) | one posterior sample of image and mirror image (the authors' layout) |
| `moments`, `moments_flip` | (N, 2d, h, w) | the posterior instead: d channels of mean, then d of standard deviation |
| `features`, `features_flip` | (N, D, h, w) | a foundation model's features of both (`vadit encode --features`) |
| `labels` | (N,) | class |
| `ids` | (N,) | index of the image in its source (our shards) |

The header of a shard of ours holds its settings and the SHA-256 of its tensors, and so does the index.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from vadit.config import PictureSpec
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import reference, save_json, saved_file
from vadit.runtime.json_files import Count, parse_json, read_json
from vadit.runtime.precision import Precision
from vadit.runtime.reading import ReadFault, openable, patiently, readable
from vadit.runtime.safetensors_file import load_tensors, save_tensors, sound
from vadit.runtime.walk import visible

INDEX_FILE = "index.json"
STATISTICS_FILE = "latents_stats.pt"
FORMAT = "vadit-latents"
KINDS = ("latents", "moments", "features")  # tensors that all shards of a folder have in one shape and type, or none
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
MAX_ROWS, MAX_ROW_BYTES = 1 << 24, 1 << 26
REMEDY = "fetch or encode the file anew"
NAME_FOLDER = "name a folder that `vadit encode` wrote (vadit train: --data.path)"


@dataclass(frozen=True)
class LatentSettings(PictureSpec):
    """What the latents of a folder depend on; it stands in every shard's header and in the index."""

    config: dict[str, Any]  # the autoencoder's spec
    tokenizer: str  # hash of the autoencoder's weights
    source: str  # where the images came from
    num_images: int  # images of the source
    num_classes: int  # classes of the source
    size: int  # side of the images in pixels
    store: Literal["moments", "sample"]  # moments: mean and standard deviation; sample: one draw
    dtype: Literal["bf16", "fp32"]  # type of the stored numbers
    flip: bool  # whether the mirrored images are there, too
    seed: int  # of the draw (store="sample")
    shard_size: int  # images per shard
    features: dict[str, Any] | None = None
    """What the foundation features are of (`vadit.latents.encode`); None where there are none."""
    precision: Precision = "fp32"  # what the autoencoder computed in


@dataclass(frozen=True)
class _About:
    """What a shard's header says besides its tensors."""

    settings: LatentSettings
    sha256: str


@dataclass(frozen=True)
class _ShardEntry:
    """A shard in the index."""

    file: str
    count: Count
    sha256: str


@dataclass(frozen=True)
class Index:
    """What is read of index.json."""

    num_classes: Count
    shards: list[_ShardEntry]
    classes: list[str] | None = None  # names by label
    tokenizer: str | None = None  # its path (`files.reference`)
    settings: LatentSettings | None = None


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header of its file describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # first byte in the file

    @property
    def row_bytes(self) -> int:
        """Of one entry along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class LatentShard:
    """One shard: what its header says, and the labels. Rows are read when they are wanted."""

    path: Path
    tensors: dict[str, TensorEntry]
    key: Literal["latents", "moments"]
    labels: Tensor  # int64 (N,)
    settings: LatentSettings | None  # None for a shard that is not ours, as is the checksum
    sha256: str | None

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def has_moments(self) -> bool:
        """Rows hold mean and deviation, and not one draw."""
        return self.key == "moments"

    @property
    def has_flipped(self) -> bool:
        return f"{self.key}_flip" in self.tensors

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d, h, w) of one latent."""
        _, channels, height, width = self.tensors[self.key].shape
        return (channels // 2 if self.has_moments else channels, height, width)

    def rows(self, start: int, stop: int, *, flipped: bool) -> Tensor:
        """Rows [start, stop) as stored: (stop - start, d or 2d, h, w)."""
        name = f"{self.key}_flip" if flipped and self.has_flipped else self.key
        return read_rows(self.path, self.tensors[name], start, stop)

    def ids(self) -> Tensor | None:
        """Of each latent: the index of its image in the source, int64 (N,); None where the shard has none."""
        return read_rows(self.path, self.tensors["ids"], 0, self.count).long() if "ids" in self.tensors else None

    def is_intact(self) -> bool:
        """Whether the content has the checksum of the header; reads the whole file."""
        try:
            return checksum(load_tensors(self.path)) == self.sha256
        except ReadFault:
            raise
        except RunError:
            return False

    def damage(self, problem: str) -> RunError:
        """What is wrong with the file, whether its checksum says so, too, and what mends it."""
        if self.sha256 is None:
            return RunError(f"{self.path}: {problem}; {REMEDY}")
        intact = self.is_intact()
        return RunError(
            f"{self.path}: {problem}, and its checksum {'is right' if intact else 'is wrong'}; "
            f"{'remove it and ' if intact else ''}run the `vadit encode` command of {self.path.parent} again, "
            "which makes this shard anew"
        )


def read_rows(path: Path, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor in a file; RunError where they are not there by now."""
    num_bytes = (stop - start) * entry.row_bytes
    offset = entry.offset + start * entry.row_bytes
    with readable(path, REMEDY):
        data = patiently(lambda: np.fromfile(path, np.uint8, num_bytes, offset=offset), path)
    if len(data) != num_bytes:
        raise RunError(f"{path} is cut short; {REMEDY}")
    return torch.from_numpy(data).view(entry.dtype).reshape(stop - start, *entry.shape[1:])


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_finite(values: Tensor) -> bool:
    """Whether none of the values, at least one, is infinite or NaN."""
    return all(math.isfinite(value) for value in values.aminmax())  # both are NaN wherever there is one


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Every tensor of a safetensors file and the header's metadata; RunError where it is damaged or cut short.

    The library checks the header and the file's size, but does not say where the tensors lie.
    """

    def read() -> tuple[int, dict[str, dict[str, Any]]]:
        with path.open("rb") as file, openable(path) as name, safe_open(name, framework="numpy"):
            start = 8 + int.from_bytes(file.read(8), "little")
            return start, parse_json(
                file.read(start - 8), dict[str, dict[str, Any]], f"{path}: its header", remedy=REMEDY
            )

    with sound(path, REMEDY):
        start, header = patiently(read, path)
    metadata = header.pop("__metadata__", {})
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise RunError(f"{path}: {name} is {entry['dtype']}; needed: {', '.join(DTYPES)}; {REMEDY}")
    return {
        name: TensorEntry(DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in header.items()
    }, metadata


def open_shard(path: Path) -> LatentShard:
    """Read a shard's header; RunError names a file that is cut short or whose header does not fit its content."""
    tensors, metadata = read_header(path)
    key: Literal["latents", "moments"] = "latents" if "latents" in tensors else "moments"
    if key not in tensors or "labels" not in tensors:
        raise RunError(f"{path} holds {sorted(tensors)}; needed: latents or moments, and labels; remove the file")
    plain = tensors[key]
    if len(plain.shape) != 4 or not plain.dtype.is_floating_point or (key == "moments" and plain.shape[1] % 2):
        raise RunError(f"{path}: {key} is {plain}; needed: floating point (N, channels, h, w); {REMEDY}")
    if plain.shape[0] > MAX_ROWS or any(entry.row_bytes > MAX_ROW_BYTES for entry in tensors.values()):
        raise RunError(
            f"{path}: {key} is {plain}; a shard may hold {MAX_ROWS:,} rows, and each {MAX_ROW_BYTES:,} bytes; {REMEDY}"
        )
    needed = {
        f"{key}_flip": (plain.shape, {plain.dtype}),
        "labels": (plain.shape[:1], {torch.int64, torch.int32}),
        "ids": (plain.shape[:1], {torch.int64, torch.int32}),
    }
    if "features" in tensors:
        shape = (*plain.shape[:1], *tensors["features"].shape[1:4])
        needed |= {name: (shape, {torch.bfloat16}) for name in ("features", "features_flip")}
        if len(shape) != 4 or (f"{key}_flip" in tensors) != ("features_flip" in tensors):
            raise RunError(f"{path}: its features are not those of its latents; {REMEDY}")
    for name, (shape, dtypes) in needed.items():
        if name in tensors and (tensors[name].shape != shape or tensors[name].dtype not in dtypes):
            raise RunError(f"{path}: {name} is {tensors[name]}; needed: {shape}, as {key} is {plain}; {REMEDY}")
    settings = sha256 = None
    if FORMAT in metadata:
        remedy = "remove it and encode it anew"
        about = parse_json(metadata[FORMAT], _About, f"{path}: its damaged metadata", remedy=remedy)
        settings, sha256 = about.settings, about.sha256
    return LatentShard(
        path, tensors, key, read_rows(path, tensors["labels"], 0, plain.shape[0]).long(), settings, sha256
    )


def open_folder(folder: Path) -> list[LatentShard]:
    """All shards of a latent folder in file-name order, checked to agree with each other."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {problem}; {NAME_FOLDER}")
    paths = visible(folder, ".safetensors")
    if not paths:
        raise UsageError(f"{folder} holds no .safetensors shards; {NAME_FOLDER}")
    shards = [open_shard(path) for path in paths]
    kinds = [
        {name: (entry.dtype, *entry.shape[1:]) for name, entry in shard.tensors.items() if name in KINDS}
        for shard in shards
    ]
    for shard, kind in zip(shards, kinds, strict=True):
        if kind != kinds[0]:
            raise RunError(
                f"{shard.path} holds {kind} but {paths[0].name} {kinds[0]}; keep shards of one kind in a folder"
            )
    return shards


def read_index(folder: Path) -> Index | None:
    """What index.json says; None where there is none."""
    path = folder / INDEX_FILE
    remedy = "run the `vadit encode` command again to rewrite it"
    return read_json(path, Index, remedy=remedy) if path.exists() else None


def open_finished_folder(folder: Path) -> tuple[list[LatentShard], int]:
    """The shards and the number of classes, checked to agree with the index where there is one.

    The authors' folders have none; there the largest label gives the number of classes.
    """
    shards = open_folder(folder)
    if (index := read_index(folder)) is not None:
        num_classes, expected = index.num_classes, {each.file: (each.count, each.sha256) for each in index.shards}
        found = {shard.path.name: (shard.count, shard.sha256) for shard in shards}
        for name in sorted(found | expected):
            if found.get(name) != expected.get(name):
                raise RunError(f"{folder / name} does not agree with index.json; run the `vadit encode` command again")
    elif any(shard.settings is not None for shard in shards):
        raise UsageError(f"{folder} is not finished: run its `vadit encode` command again to complete it")
    else:
        num_classes = max((int(shard.labels.max()) for shard in shards if shard.count), default=0) + 1
    for shard in shards:
        outside = shard.labels[(shard.labels < 0) | (shard.labels >= num_classes)]
        if len(outside):
            raise UsageError(f"{shard.path} holds label {int(outside[0])}; labels must be in [0, {num_classes})")
    return shards, num_classes


class LatentShardWriter:
    """Collects one shard in memory, in its final dtype, and writes it whole or not at all."""

    def __init__(self, path: Path, settings: LatentSettings) -> None:
        self.path = path
        self.settings = settings
        self.count = 0
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows (B, ...) by the names of this module's table; RunError where any are not finite."""
        for name, part in rows.items():
            kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.settings.dtype]
            if name in ("labels", "ids"):
                kind = torch.int64
            elif name.startswith("features"):
                kind = torch.bfloat16
            stored = part.detach().to("cpu", kind).contiguous()
            if not is_finite(stored):
                first, last = rows["ids"][0], rows["ids"][-1]
                raise RunError(f"the {name} of images {first} to {last} are not finite; check the network's weights")
            self._parts.setdefault(name, []).append(stored)
        self.count += len(rows["ids"])

    def close(self) -> int:
        """Write the shard; the number of images in it. RunError where the disk is full, and no partial file stays."""
        tensors = {name: torch.cat(self._parts.pop(name)) for name in list(self._parts)}
        about = {"sha256": checksum(tensors), "settings": asdict(self.settings)}
        with saved_file(self.path) as partial:
            save_tensors(partial, tensors, {FORMAT: json.dumps(about)})
        return self.count


def save_index(folder: Path, settings: LatentSettings, classes: Sequence[str], tokenizer: str | None = None) -> None:
    """Write index.json from the shards that are there: the mark of a complete folder. tokenizer: its path."""
    shards = open_folder(folder)
    index = {
        "format": FORMAT,
        "num_images": sum(shard.count for shard in shards),
        "num_classes": len(classes),
        "classes": list(classes),
        "tokenizer": tokenizer and reference(tokenizer, folder),
        "statistics": STATISTICS_FILE,
        "settings": asdict(settings),
        "shards": [{"file": shard.path.name, "count": shard.count, "sha256": shard.sha256} for shard in shards],
    }
    save_json(folder / INDEX_FILE, index)
