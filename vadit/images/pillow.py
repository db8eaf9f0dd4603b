"""Decoding with Pillow in threads (it releases the interpreter's lock): needs nothing else, and is the pixel rule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from vadit.images.loader import Decoded, Decoder, ImageSet, Request, undecodable
from vadit.images.transforms import apply_crop, open_image, plan_crop, to_rgb
from vadit.runtime.errors import RunError


class PillowDecoder:
    """An ImageDecoder whose pixels are exactly those of vadit.images.transforms."""

    def __init__(self, images: ImageSet, pool: ThreadPoolExecutor, *, pinned: bool) -> None:
        self._images = images
        self._pool = pool
        self._pinned = pinned

    def submit(self, requests: Sequence[Request]) -> Callable[[], Decoded]:
        """Every image is decoded by some thread into its place of the batch."""
        size = self._images.size
        pixels = torch.empty((len(requests), size, size, 3), dtype=torch.uint8, pin_memory=self._pinned)
        places = pixels.numpy()
        futures = [
            self._pool.submit(self._decode_into, places[place], request) for place, request in enumerate(requests)
        ]

        def wait() -> Decoded:
            errors = [future.result() for future in futures]
            return Decoded(pixels, {place: error for place, error in enumerate(errors) if error is not None})

        return wait

    def _decode_into(self, pixels: np.ndarray, request: Request) -> RunError | None:
        try:
            pixels[:] = decode(self._images, request)
        except RunError as error:
            return error
        return None


def pillow_decoder(images: ImageSet, num_workers: int, device: torch.device | str = "cpu") -> Decoder:
    """Starts PillowDecoders with so many threads; batches for a GPU lie in pinned memory."""

    @contextlib.contextmanager
    def start() -> Iterator[PillowDecoder]:
        Image.init()  # register all of Pillow's formats before threads need them
        pool = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="vadit-data")
        try:
            yield PillowDecoder(images, pool, pinned=torch.device(device).type == "cuda")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return start


def decode(images: ImageSet, request: Request) -> np.ndarray:
    """One image, uint8 (size, size, 3); RunError names one that does not decode."""
    try:
        rgb = to_rgb(open_image(images.source.read(request.index)))
        crop = plan_crop(request.crop, *rgb.size, images.size, request.crop_seed)
        pixels = np.asarray(apply_crop(rgb, crop))
    except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
        raise undecodable(images, request.index, error) from error
    return pixels[:, ::-1] if request.mirror else pixels
