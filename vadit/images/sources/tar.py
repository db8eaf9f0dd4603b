"""Images in WebDataset shards (.tar files, https://github.com/webdataset/webdataset), read at random.

Shards of samples KEY.jpg + KEY.cls (or KEY.json with "label" or "cls"), which need not be unpacked or read in order.
"""

import logging
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vadit.images.formats import OTHER_EXTENSIONS
from vadit.images.sources.folders import SET_FOLDER
from vadit.images.sources.tar_index import IMAGE_EXTENSIONS, NO_LABEL, Damaged, members, shard_index, stamp_of, text
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.reading import MAX_WHOLE, OpenFiles
from vadit.runtime.walk import visible

logger = logging.getLogger(__name__)

INDEX_THREADS = 8
REMEDY = "replace the shard, or leave bad ones out with --data.on-error skip (vadit prepare and encode: --on-error)"


class TarSource:
    """The images of WebDataset shards as an ImageSource, in the order of the shards' names and of their members.

    `path` is a folder of *.tar, one .tar, or a pattern like images-{000000..000099}.tar. Classes are named by their
    numbers; shards without any label are of one class, "all", and a line is logged of what they hold. What is wrong
    with a shard (cut short, a sample without label or with two images, a link in an image's place, ...) is an error at
    once (on_error="raise"), or left out, logged and noted in `bad_files` (on_error="skip"): of a shard that is cut or
    damaged the samples before that place are used then.
    """

    def __init__(self, path: str | Path, *, on_error: Literal["raise", "skip"] = "raise") -> None:
        self.name = str(path)
        self.bad_files: dict[str, str] = {}  # SHARD:MEMBER -> why it is left out
        self._on_error = on_error
        self._shards = find_shards(self.name)
        with ThreadPoolExecutor(INDEX_THREADS, thread_name_prefix="vadit-index") as pool:
            indices = list(pool.map(shard_index, self._shards))
        for shard, index in zip(self._shards, indices, strict=True):
            for member, why in index.bad.items():
                self._note(f"{shard}:{member}", why)
        self._records = np.concatenate([index.records for index in indices])
        counts = [len(index.records) for index in indices]
        self._shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._stamps = [index.stamp for index in indices]
        self._files = OpenFiles(self._shards, self._check)
        if len(self._records) == 0:
            raise UsageError(
                f"{self.name} holds no images ({len(self._shards)} shards; images end in "
                f"{' '.join(sorted(IMAGE_EXTENSIONS))}); {SET_FOLDER} to shards of images"
            )
        others = sum((Counter(index.others) for index in indices), Counter[str]())
        self.unread = {end[1:].upper(): others[end] for end in others if end in OTHER_EXTENSIONS}
        self.classes = self._label(sorted(others))
        self.labels: Tensor = torch.from_numpy(self._records["label"].astype(np.int64))
        if self.bad_files:
            names = "; ".join(f"{place} {why}" for place, why in list(self.bad_files.items())[:10])
            logger.warning("%d damaged places of %s are left out: %s", len(self.bad_files), self.name, names)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> bytes:
        record = self._records[index]
        size = int(record["size"])
        if size > MAX_WHOLE:
            raise RunError(f"{self.describe(index)} cannot be read (more than {MAX_WHOLE >> 30} GiB); {REMEDY}")
        try:
            data = self._files.read(int(self._shard_of[index]), int(record["start"]), size)
        except OSError as error:
            raise RunError(f"{self.describe(index)} cannot be read ({error.strerror}); {REMEDY}") from None
        if len(data) != size:
            raise RunError(f"{self.describe(index)}: the shard was cut short while it was in use; replace it")
        return data

    def describe(self, index: int) -> str:
        """SHARD:MEMBER (SHARD:byte N where the shard cannot be read any more)."""
        number, position = int(self._shard_of[index]), int(self._records["header"][index])
        try:
            with open(self._shards[number], "rb") as file:
                member = next(members(file, position))
        except (OSError, Damaged, StopIteration):
            return f"{self._shards[number]}:byte {position}"
        return f"{self._shards[number]}:{text(member.name)}"

    def _check(self, number: int, status: os.stat_result) -> None:
        if stamp_of(status) != self._stamps[number]:
            raise RunError(f"{self._shards[number]} was changed while it was in use; start again")

    def _note(self, place: str, why: str) -> None:
        if self._on_error == "raise":
            raise RunError(f"{place}: {why}; {REMEDY}")
        self.bad_files[place] = why

    def _label(self, others: list[str]) -> list[str]:
        """Names of the classes; images without a label are dealt with here."""
        unlabelled = self._records["label"] == NO_LABEL
        if unlabelled.all():
            logger.warning(
                '%s: no labels were found, neither .cls nor .json with "label" or "cls": all images are of one class. '
                "Beside the images lie %s; store labels as .cls, or unpack the shards and set --labels-file "
                "(vadit train: --data.labels-file)",
                *(self.name, " ".join(others) or "no other members"),
            )
            self._records = self._records.copy()
            self._records["label"] = 0
            return ["all"]
        for index in np.flatnonzero(unlabelled):
            self._note(self.describe(int(index)), 'there is no label, neither .cls nor .json with "label" or "cls"')
        self._records, self._shard_of = self._records[~unlabelled], self._shard_of[~unlabelled]
        return [str(label) for label in range(int(self._records["label"].max()) + 1)]


def find_shards(name: str) -> list[Path]:
    """The shards of a folder, a file or a pattern, in order; UsageError where there are none."""
    path = Path(name)
    if path.is_dir():
        if not (found := visible(path, ".tar")):
            raise UsageError(f"{name} holds no .tar files; {SET_FOLDER} to a folder of WebDataset shards")
        return found
    shards = [path] if path.exists() else [Path(each) for each in expand(name)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        some = f" ({len(missing)} of the {len(shards)} shards that {name} names are missing)" if len(shards) > 1 else ""
        raise UsageError(f"{missing[0]} does not exist{some}; {SET_FOLDER} to .tar files that are there")
    return shards


def expand(pattern: str) -> list[str]:
    """What a pattern with {000..099} stands for, in order."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    ends = expand(pattern[found.end() :])
    numbers = range(int(first), int(last) + 1)
    return [f"{pattern[: found.start()]}{number:0{len(first)}d}{end}" for number in numbers for end in ends]
