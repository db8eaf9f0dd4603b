"""Which image each latent is of, listed beside its shard, so that images can be added to a folder that is encoded.

shard-00007.json is of shard-00007.safetensors, for sources that are files in a folder. What is there keeps its ids and
labels: ids of added images count on, and new classes come after the known ones.
"""

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from vadit.images.loader import ImageSource
from vadit.images.sources.folders import FolderSource
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import save_json
from vadit.runtime.json_files import Count, read_json
from vadit.runtime.reading import ReadFault


@dataclass(frozen=True)
class _List:
    """The images of a shard: id, label, path below the folder, size and time of the file, digits of its SHA-256."""

    classes: list[str]
    images: list[tuple[Count, Count, str, str, str]]


@dataclass(frozen=True)
class Part:
    """A shard that is there, or one to be made."""

    path: Path
    ids: list[int]
    indices: list[int]  # of its images in the source, now
    listed: bool

    def ids_by_index(self) -> dict[int, int]:
        """The ids of its images by their indices."""
        return dict(zip(self.indices, self.ids, strict=True))


def plan(out: Path, source: ImageSource, shard_size: int) -> tuple[list[str], list[Part]]:
    """The folder's classes, and its shards: listed ones, and new ones for all images that none of these has.

    UsageError names an image that has gone, has changed or is of another class since it was encoded.
    """
    folder, lists = isinstance(source, FolderSource), {}
    for path in sorted(out.glob("shard-*.safetensors")) if folder else ():
        if (file := path.with_suffix(".json")).is_file():
            lists[path] = read_json(file, _List, remedy="remove it, and its shard is made anew")
    classes = max((each.classes for each in lists.values()), key=len, default=[])
    classes = [*classes, *(name for name in source.classes if name not in classes)]
    places = {_name(source, index): index for index in range(len(source))} if isinstance(source, FolderSource) else {}
    parts, taken = [], set()
    for path, each in lists.items():
        indices = []
        for number, label, name, stamp, digest in each.images:
            problem, index = "is not there any more", places.get(name)
            if index is not None and isinstance(source, FolderSource):
                now, same = source.classes[int(source.labels[index])], _stamp(source, index) == stamp
                problem = "" if same or _digest(source, index) == digest else "has changed"
                problem = problem if now == classes[label] else f"was of class {classes[label]}, and is of {now}"
                indices.append(index)
            if problem:
                raise UsageError(
                    f"{out} holds latents of the images of {source.name}, of which {name} {problem}; put it back as it "
                    "was, or set --out to an empty folder"
                )
            taken.add(number)
        parts.append(Part(path, [image[0] for image in each.images], indices, listed=True))
    known = {index for part in parts for index in part.indices}
    rest, ids = ([number for number in range(len(source)) if number not in one] for one in (known, taken))
    paths = (out / f"shard-{number:05d}.safetensors" for number in itertools.count())
    free = (path for path in paths if path not in lists)
    for start in range(0, len(rest), shard_size):
        cut = slice(start, start + shard_size)
        parts.append(Part(next(free), ids[cut], rest[cut], listed=False))
    return classes, sorted(parts, key=lambda part: part.path)


def list_images(part: Part, source: ImageSource, classes: list[str]) -> None:
    """Write the list of a shard, where its images are files in a folder."""
    if isinstance(source, FolderSource):
        with ThreadPoolExecutor(8) as pool:
            digests = pool.map(lambda index: _digest(source, index), part.indices)
        rows, places = [], {name: label for label, name in enumerate(classes)}
        for number, index, digest in zip(part.ids, part.indices, digests, strict=True):
            label = places[source.classes[int(source.labels[index])]]
            rows.append((number, label, _name(source, index), _stamp(source, index), digest))
        save_json(part.path.with_suffix(".json"), asdict(_List(classes, rows)))


def _name(source: FolderSource, index: int) -> str:
    return source.paths[index].removeprefix(os.path.join(Path(source.name), ""))


def _stamp(source: FolderSource, index: int) -> str:
    try:
        found = os.stat(source.paths[index])
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _digest(source: FolderSource, index: int) -> str:
    try:
        return hashlib.sha256(source.read(index)).hexdigest()[:16]
    except ReadFault:
        raise
    except RunError:  # the decoder reports it
        return ""
