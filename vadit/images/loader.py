"""Images for the tokenizer and for encoding: what sources, decoders and the loader share.

A source holds encoded images and their labels (folders, tar, beton). A decoder turns them into pixels under the rules
of transforms (pillow: the rule itself; dali; ffcv). `ImageLoader` puts them in order.
"""

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from vadit.config.data import Alpha, Exif, ImageDataSpec
from vadit.images.formats import peek, reason
from vadit.images.sources.folders import REMEDY
from vadit.images.sources.page_order import PageOrder
from vadit.images.transforms import CropKind, turn_of
from vadit.runtime import rng
from vadit.runtime.errors import RunError
from vadit.runtime.reading import ReadFault, no_memory
from vadit.runtime.stream import PREFETCH_BATCHES, PositionedLoader, split_epochs

logger = logging.getLogger(__name__)

FEW_BAD = 3  # Bad images that are always tolerated where any are: a share means nothing in a small set.


@dataclass(frozen=True)
class ImageBatch:
    """A batch as the loaders hand it out."""

    images: Tensor  # uint8 (B, 3, H, W), stored channels last
    labels: Tensor  # int64 (B,): index into `classes`
    ids: Tensor  # int64 (B,): index of the image in its source


class ImageSource(Protocol):
    """Encoded images and their labels; decodes nothing."""

    name: str  # the path that the user gave
    classes: list[str]  # names of the labels
    labels: Tensor  # int64 (n,)

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """An image as the bytes of a file (raw pixels as PPM), from any thread; RunError names what is damaged."""

    def describe(self, index: int) -> str:
        """Where the image is, for people: a path, or shard:member."""


@dataclass(frozen=True)
class Request:
    """One image as it is wanted."""

    index: int
    crop: CropKind = "center"
    crop_seed: int = 0
    mirror: bool = False


@dataclass(frozen=True)
class Decoded:
    """What became of some requests."""

    pixels: Tensor  # uint8 (B, size, size, 3); undefined where a request failed
    failures: dict[int, RunError]  # place in the batch -> why that image does not decode


class ImageDecoder(Protocol):
    """Turns requests into pixels, several batches at a time."""

    def submit(self, requests: Sequence[Request]) -> Callable[[], Decoded]:
        """Begin with some requests; the function that is returned waits for them. It may be dropped uncalled."""


Decoder = Callable[[], AbstractContextManager[ImageDecoder]]
"""Starts a decoder, and ends its threads and pipelines when the context ends."""


@dataclass(eq=False)
class ImageSet:
    """A source with the settings of a run: side, crop, mirroring, and what happens to bad images."""

    source: ImageSource
    size: int
    crop: CropKind = ImageDataSpec.crop
    flip: bool = ImageDataSpec.flip
    on_error: Literal["raise", "skip"] = ImageDataSpec.on_error
    max_bad_share: float = ImageDataSpec.max_bad_share
    alpha: Alpha = ImageDataSpec.alpha
    exif: Exif = ImageDataSpec.exif
    bad: dict[int, RunError] = field(default_factory=dict, init=False)
    """Images that did not decode so far, and why (on_error="skip")."""

    def __len__(self) -> int:
        return len(self.source)

    def is_turned(self, data: bytes | memoryview) -> bool:
        """Whether EXIF turns a JPEG, which is then Pillow's to decode."""
        with contextlib.suppress(Exception):  # whoever decodes it will say what it is
            return self.exif == "apply" and turn_of(peek(data)) is not None
        return False

    def requests(self, ids: Sequence[int] | Tensor, *, seed: int, epoch: int) -> list[Request]:
        """Images as training samples: crop and mirroring are functions of (seed, id, epoch)."""
        indices = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        centred, plain = self.crop == "center", not self.flip
        crop_seeds = [0] * len(indices) if centred else rng.seeds(rng.fold(seed, "crop", epoch), ids)
        mirrored = [False] * len(indices) if plain else (rng.uniform(rng.fold(seed, "flip", epoch), ids) < 0.5).tolist()
        return [
            Request(index, self.crop, crop_seed, mirror)
            for index, crop_seed, mirror in zip(indices, crop_seeds, mirrored, strict=True)
        ]

    def note_bad(self, index: int, error: RunError) -> None:
        """Count an image that does not decode; raises where that is unwanted, or one too many, or not its fault."""
        if self.on_error == "raise" or isinstance(error, ReadFault):
            raise error
        self.bad.setdefault(index, error)
        if len(self.bad) > most_bad(self.max_bad_share, len(self)):
            raise RunError(
                f"{len(self.bad)} of {len(self)} images of {self.source.name} do not decode, more than "
                f"data.max_bad_share {self.max_bad_share:g} allows: {self._bad_names()}; replace them, or raise "
                "--max-bad-share (vadit train: --data.max-bad-share)"
            ) from error

    def warn_of_bad_files(self) -> None:
        """Log how many images did not decode, with the first ten names."""
        if self.bad:
            logger.warning("%d images do not decode and were skipped: %s", len(self.bad), self._bad_names())

    def _bad_names(self) -> str:
        return ", ".join(self.source.describe(index) for index in sorted(self.bad)[:10])


def most_bad(share: float, num_images: int) -> float:
    """How many bad images a share above 0 allows: FEW_BAD at least."""
    return max(share * num_images, FEW_BAD if share > 0 else 0)


def describe_classes(classes: Sequence[str], labels: Tensor) -> str:
    """How many classes there are, and the first and last of them with their labels and images, in one line."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    shown = [
        f"{label}{'' if name == str(label) else f' {name}'}: {count:,}"
        for label, (name, count) in enumerate(zip(classes, counts, strict=True))
    ]
    shown[0] += " images"
    if len(shown) > 6:
        shown[5:-1] = ["..."]
    order = ", in the order of their numbers" if len(shown) > 1 and all(map(str.isdigit, classes)) else ""
    return f"{len(classes)} class{'es' if len(classes) != 1 else ''}{order} ({', '.join(shown)})"


def undecodable(images: ImageSet, index: int, error: Exception) -> RunError:
    """The error that names an image which a decoder could not read."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, MemoryError):
        return no_memory(images.source.describe(index))
    return RunError(f"image {images.source.describe(index)} does not decode ({reason(error)}); {REMEDY}")


class ImageLoader(PositionedLoader[ImageBatch]):
    """Shuffled training batches of an image set; see PositionedLoader for order, position and ranks.

    on_error="skip": an image that does not decode gives its place to the next one of the epoch's order that does (a
    function of the position alone), is noted in the set's `bad`, and a warning closes the iteration. `order` is for a
    .beton larger than memory, in place of the random order.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        decoder: Decoder,
        order: PageOrder | None = None,
    ) -> None:
        super().__init__(len(images), batch_size, seed, rank, world_size)
        self.images = images
        self._decoder = decoder
        self._order = order

    @contextlib.contextmanager
    def _session(self) -> Iterator[Callable[[Tensor], Callable[[], ImageBatch]]]:
        with contextlib.ExitStack() as stack:
            stack.callback(self.images.warn_of_bad_files)
            decoder = stack.enter_context(self._decoder())
            touch = stack.enter_context(self._order.reading_ahead()) if self._order else lambda *_: None
            yield lambda positions: self._start(decoder, touch, positions)

    def _ids(self, places: Tensor, epoch: int, seed: int) -> Tensor:
        return self._order.ids(places, epoch, seed) if self._order else super()._ids(places, epoch, seed)

    def _start(
        self, decoder: ImageDecoder, touch: Callable[[Tensor, int, int], None], positions: Tensor
    ) -> Callable[[], ImageBatch]:
        seed = self.seed
        candidates: list[Iterator[Request]] = []
        for epoch, places in split_epochs(positions, self.num_samples):
            touch(places, epoch, seed)
            own = self.images.requests(self._ids(places, epoch, seed), seed=seed, epoch=epoch)
            candidates += [self._candidates(*one, epoch, seed) for one in zip(own, places.tolist(), strict=True)]
        requests = [next(candidate) for candidate in candidates]
        pending = decoder.submit(requests)

        def wait() -> ImageBatch:
            decoded = pending()
            for place, error in sorted(decoded.failures.items()):
                failure: RunError | None = error
                while failure is not None:
                    self.images.note_bad(requests[place].index, failure)
                    requests[place] = next(candidates[place])
                    again = decoder.submit([requests[place]])()
                    failure = again.failures.get(0)
                decoded.pixels[place] = again.pixels[0]
            return assemble(self.images, decoded.pixels, [request.index for request in requests])

        return wait

    def _candidates(self, own: Request, place: int, epoch: int, seed: int) -> Iterator[Request]:
        """What may stand at a place of an epoch: its own image, then those that follow, but for known bad ones."""
        if own.index not in self.images.bad:
            yield own
        for ahead in range(1, self.num_samples):
            ids = self._ids(torch.tensor([(place + ahead) % self.num_samples]), epoch, seed)
            if int(ids[0]) not in self.images.bad:
                yield from self.images.requests(ids, seed=seed, epoch=epoch)
        raise RunError(f"none of the {self.num_samples} images of {self.images.source.name} decodes; name others")


def load_in_order(images: ImageSet, ids: Sequence[int], batch_size: int, decoder: ImageDecoder) -> Iterator[ImageBatch]:
    """Centre-cropped, unmirrored batches of the given images, in order, each image once.

    Images that do not decode are left out (on_error="skip") or end the iteration with a RunError ("raise").
    """

    def begin(part: Sequence[int]) -> tuple[Sequence[int], Callable[[], Decoded]]:
        return part, decoder.submit([Request(index) for index in part])

    parts = (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))
    pending = deque(map(begin, itertools.islice(parts, PREFETCH_BATCHES)))
    while pending:
        part, wait = pending.popleft()
        decoded = wait()
        for place, error in sorted(decoded.failures.items()):
            images.note_bad(part[place], error)
        good = [place for place in range(len(part)) if place not in decoded.failures]
        if good:
            pixels = decoded.pixels if len(good) == len(part) else decoded.pixels[good]
            yield assemble(images, pixels, [part[place] for place in good])
        pending.extend(map(begin, itertools.islice(parts, 1)))


def assemble(images: ImageSet, pixels: Tensor, ids: Sequence[int]) -> ImageBatch:
    """A batch of pixels uint8 (B, H, W, 3), without a copy."""
    indices = torch.tensor(ids, dtype=torch.int64)
    return ImageBatch(images=pixels.permute(0, 3, 1, 2), labels=images.source.labels[indices], ids=indices)
