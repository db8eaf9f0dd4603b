"""Decoding in threads, and Pillow's decoder (it releases the interpreter's lock), which is the pixel rule."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vadit.images.formats import open_image
from vadit.images.loader import Decoded, Decoder, ImageSet, Request, undecodable
from vadit.images.transforms import apply_crop, plan_crop, to_rgb
from vadit.runtime.errors import RunError


class ThreadedDecoder:
    """An ImageDecoder whose threads decode parts of a batch straight into it, and the context that ends them.

    Its pixels are exactly those of vadit.images.transforms; subclasses come to them in other ways. A part holds at most
    `part` images, and fewer where a batch would else give less than `num_parts` parts. Batches for a GPU lie in pinned
    memory (`pinned`).
    """

    def __init__(self, images: ImageSet, num_threads: int, *, part: int = 1, num_parts: int = 1, pinned: bool) -> None:
        Image.init()  # register all of Pillow's formats before threads need them
        self._images = images
        self._part, self._num_parts, self._pinned = part, num_parts, pinned
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="vadit-data")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, requests: Sequence[Request]) -> Callable[[], Decoded]:
        """Begin with some requests; the function that is returned waits for them."""
        pixels = self._empty((len(requests), self._images.size, self._images.size, 3))
        step = max(1, min(self._part, -(-len(requests) // self._num_parts)))
        parts: list[tuple[int, Future[dict[int, RunError]]]] = [
            (start, self._pool.submit(self._decode, requests[start : start + step], pixels[start : start + step]))
            for start in range(0, len(requests), step)
        ]

        def wait() -> Decoded:
            failures = {start + place: error for start, part in parts for place, error in part.result().items()}
            return Decoded(self._finished(pixels), failures)

        return wait

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)

    def _finished(self, pixels: Tensor) -> Tensor:
        """A batch when all of it is decoded."""
        return pixels

    def _decode(self, requests: Sequence[Request], pixels: Tensor) -> dict[int, RunError]:
        """Some images into uint8 (n, size, size, 3); returned is place -> why it does not decode."""
        failures: dict[int, RunError] = {}
        for place, request in enumerate(requests):
            try:
                pixels[place].numpy()[:] = decode(self._images, request)
            except RunError as error:
                failures[place] = error
        return failures


def pillow_decoder(images: ImageSet, num_workers: int, device: torch.device | str = "cpu") -> Decoder:
    """Starts Pillow's decoders with so many threads."""
    return lambda: ThreadedDecoder(images, max(1, num_workers), pinned=torch.device(device).type == "cuda")


def decode(images: ImageSet, request: Request) -> np.ndarray:
    """One image, uint8 (size, size, 3); RunError names one that does not decode."""
    try:
        rgb = to_rgb(open_image(images.source.read(request.index)), images.alpha, images.exif)
        crop = plan_crop(request.crop, *rgb.size, images.size, request.crop_seed)
        pixels = np.asarray(apply_crop(rgb, crop))
    except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
        raise undecodable(images, request.index, error) from error
    return pixels[:, ::-1] if request.mirror else pixels
