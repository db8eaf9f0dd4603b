"""Decoding with NVIDIA DALI: JPEGs on a CPU (libjpeg-turbo, as in Pillow) or on a GPU (nvJPEG).

DALI decodes whole, ordinary JPEGs, in small pipelines that are fed with bytes, so that order, position, ranks, crops
and mirroring stay those of every other loader. What it decoded is cut and scaled by torch, whose filters for uint8
follow Pillow's and are several times as fast as Pillow's, and as DALI's own on a CPU. Files of any other kind (PNG,
CMYK, GIF, ...) and damaged ones are Pillow's to decode or to refuse: it is the rule, and DALI is not shown a file about
which the two may disagree.

On a CPU the decoded pixels are Pillow's, bit for bit, and the scaled ones differ by rounding. On a GPU nvJPEG's
arithmetic differs a little, too. The GPU branch has not been run.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from vadit.images.formats import open_image
from vadit.images.jpeg import MAX_AREA, jpeg_area
from vadit.images.loader import ImageSet, Request, undecodable
from vadit.images.pillow import ThreadedDecoder
from vadit.images.transforms import Crop, plan_crop, to_rgb
from vadit.runtime.errors import RunError, UsageError

CHUNK = 8  # most images of one run of a pipeline on a CPU; where one is damaged, Pillow decodes them all
GPU_CHUNK = 64
GPU_PIPELINES = 2  # one reads files while the other decodes

logger = logging.getLogger(__name__)


class DaliDecoder(ThreadedDecoder):
    """An ImageDecoder over DALI pipelines, and the context manager that ends its threads.

    On a CPU `num_workers` threads read, decode and scale, each with a pipeline of its own. On a GPU the workers are
    the threads of two pipelines, and the pixels stay on the device. UsageError where DALI cannot be imported.
    """

    def __init__(self, images: ImageSet, num_workers: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        on_gpu = self._device.type == "cuda"
        if on_gpu and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        count, part = (GPU_PIPELINES, GPU_CHUNK) if on_gpu else (max(1, num_workers), CHUNK)
        # A stream of its own: it does not wait for the training step. None is no stream, on a CPU.
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None
        self._pipelines: SimpleQueue[_JpegPipeline] = SimpleQueue()
        for _ in range(count):
            self._pipelines.put(_JpegPipeline(part, -(-num_workers // count), self._device))
        super().__init__(images, count, part=part, num_parts=count, pinned=False)
        self._warned = False

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        while not self._pipelines.empty():
            self._pipelines.get()

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=torch.uint8, device=self._device)

    def _finished(self, pixels: Tensor) -> Tensor:
        if self._stream is not None:
            pixels.record_stream(torch.cuda.current_stream(self._device))
        return pixels

    def _decode(self, requests: Sequence[Request], pixels: Tensor) -> dict[int, RunError]:
        contents: dict[int, bytes] = {}
        failures: dict[int, RunError] = {}
        for place, request in enumerate(requests):
            try:
                contents[place] = self._images.source.read(request.index)
            except RunError as error:
                failures[place] = error
        with torch.cuda.stream(self._stream):
            areas = {place: jpeg_area(data) for place, data in contents.items()}
            areas |= {place: 0 for place, area in areas.items() if area and self._images.is_turned(contents[place])}
            for places, is_jpeg in _groups(areas):
                by_dali, refusal = self._run([contents[place] for place in places]) if is_jpeg else ([], "")
                for place, image in itertools.zip_longest(places, by_dali):
                    request = requests[place]
                    try:
                        if image is None:
                            rgb = to_rgb(open_image(contents[place]), self._images.alpha, self._images.exif)
                            image = torch.from_numpy(np.array(rgb))
                        pixels[place] = self._finish(image, request)
                    except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
                        failures[place] = undecodable(self._images, request.index, error)
                if refusal and not self._warned and failures.keys().isdisjoint(places):
                    self._warned = True  # nothing is lost but time
                    names = ", ".join(self._images.source.describe(requests[place].index) for place in places)
                    logger.warning("DALI refuses one of these images, so Pillow decoded them: %s\n%s", names, refusal)
                if self._stream is not None:
                    self._stream.synchronize()  # before DALI's memory is let go
        return failures

    def _finish(self, image: Tensor, request: Request) -> Tensor:
        """uint8 (H, W, 3) as it is wanted: uint8 (size, size, 3)."""
        height, width, _ = image.shape
        crop = plan_crop(request.crop, width, height, self._images.size, request.crop_seed)
        window = resample(image.to(self._device), crop, as_float=self._device.type == "cuda")
        return window.flip(1) if request.mirror else window

    def _run(self, jpegs: Sequence[bytes]) -> tuple[list[Tensor], str]:
        """The images as DALI decodes them, or none and what it says where it refuses one (Pillow finds out which)."""
        pipeline = self._pipelines.get()
        try:
            return pipeline.run(jpegs), ""
        except Exception as error:  # of whatever type: these are for Pillow to decode, or to name
            return [], f"{type(error).__name__}: {error}"  # as text: the error itself would keep the pipeline alive
        finally:
            self._pipelines.put(pipeline)


class _JpegPipeline:
    """A pipeline from the bytes of JPEGs to RGB, which outlives its errors; for one thread at a time."""

    def __init__(self, max_images: int, num_threads: int, device: torch.device) -> None:
        self._settings: dict[str, Any] = {
            "batch_size": max_images,
            "num_threads": max(1, num_threads),
            "device_id": device.index if device.type == "cuda" else None,
            "prefetch_queue_depth": 1,
        }
        self._backend = "mixed" if device.type == "cuda" else "cpu"
        self._pipeline = self._build()

    def run(self, jpegs: Sequence[bytes]) -> list[Tensor]:
        """Images uint8 (H, W, 3), valid for as long as they are held; any error where one does not decode."""
        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline, self._pipeline = self._pipeline, None  # no use after an error
        (images,) = pipeline.run(encoded=[np.frombuffer(data, np.uint8) for data in jpegs])
        tensors = [torch.from_dlpack(images[place]) for place in range(len(jpegs))]
        self._pipeline = pipeline
        return tensors

    def _build(self) -> Any:
        try:
            from nvidia.dali import fn, pipeline_def
            from nvidia.dali.types import DALIDataType
        except ImportError as error:
            raise UsageError(f"NVIDIA DALI cannot be imported ({error}); pip install 'vadit[dali]'") from error

        @pipeline_def(**self._settings)
        def decode() -> Any:
            encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
            return fn.decoders.image(
                encoded,
                device=self._backend,
                adjust_orientation=False,  # what EXIF turns is Pillow's to decode
                jpeg_fancy_upsampling=True,  # chroma is interpolated, as in Pillow
                # On a GPU: an image's decoder must not depend on the batch that it comes in, and the ranks of a machine
                # must not tie their threads to the same cores.
                hw_decoder_load=1.0,
                affine=False,
            )

        pipeline = decode()
        pipeline.build()
        return pipeline


def _groups(areas: dict[int, int]) -> Iterator[tuple[list[int], bool]]:
    """Places of ordinary JPEGs (True) in runs of at most MAX_AREA pixels, then the others' (False)."""
    group: list[int] = []
    total = 0
    for place, area in areas.items():
        if area == 0:
            continue
        if group and total + area > MAX_AREA:
            yield group, True
            group, total = [], 0
        group.append(place)
        total += area
    if group:
        yield group, True
    if others := [place for place, area in areas.items() if area == 0]:
        yield others, False


def resample(image: Tensor, crop: Crop, *, as_float: bool = False) -> Tensor:
    """The three steps of a Crop on uint8 (H, W, 3): uint8 (size, size, 3), within rounding of apply_crop's.

    On a CPU uint8 is filtered as such, rounded after each pass, as in Pillow; a GPU needs float32 (`as_float`).
    """
    planes = image[None].permute(0, 3, 1, 2)
    if as_float:
        planes = planes.float()
    for _ in range(crop.halvings):
        planes = _halve(planes)
    width, height = crop.scaled
    if planes.shape[2:] != (height, width):
        planes = interpolate(planes, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    left, top = crop.window
    planes = planes[:, :, top : top + crop.size, left : left + crop.size]
    if as_float:
        planes = planes.round().clamp(0, 255).to(torch.uint8)
    return planes[0].permute(1, 2, 0)


def _halve(planes: Tensor) -> Tensor:
    """Pillow's box filter from (1, 3, H, W) to (1, 3, H // 2, W // 2), columns first.

    Windows average pairs of pixels; those of an odd side jump over its middle, or there is one that averages three.
    """
    for axis in (3, 2):
        side = planes.shape[axis]
        half, pairs, three = side // 2, planes, None
        if side % 2:
            pairs = torch.cat([planes.narrow(axis, 0, half), planes.narrow(axis, half + 1, half)], axis)
            three = _window_of_three(side)
        size = (half, planes.shape[3]) if axis == 2 else (planes.shape[2], half)
        # Between two pixels, linear interpolation is their mean.
        halved = interpolate(pairs, size=size, mode="bilinear", antialias=False, align_corners=False)
        if halved.is_floating_point():
            halved = (halved + 0.5).floor()  # to levels of 8 bits after each pass, as Pillow and as uint8 here
        if three is not None:
            halved.select(axis, three).copy_((planes.narrow(axis, 2 * three, 3).float().mean(axis) + 0.5).floor())
        planes = halved
    return planes


def _window_of_three(side: int) -> int | None:
    """Which window holds three pixels when Pillow halves an odd side, if one does.

    Where two windows meet in the middle of a pixel, its rounding errors decide: it is asked. Pairs of a ramp's values
    have means of n + 1/2, three have a whole number.
    """
    ramp = Image.fromarray(np.arange(side, dtype=np.float32)[None])
    means = np.asarray(ramp.resize((side // 2, 1), Image.Resampling.BOX))[0]
    found = np.flatnonzero(np.abs(means % 1 - 0.5) > 0.25)
    return int(found[0]) if len(found) else None
