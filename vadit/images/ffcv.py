"""Images of a .beton through FFCV's Loader: its reader, compiled pipeline and turbojpeg; order and position are ours.

`ffcv.loader.Loader` reads the tables and compiles the pipeline once. What iterates it is ours: FFCV's own iterator
knows no position inside an epoch, leaks its threads where it is left early (ffcv issues 345 and 393), and hands out
buffers that it writes again. So order, ranks, position and bad images are those of every other loader, exactly.

Images are stored with the short side that is wanted, so that both square crops are parts of them and nothing is scaled:
the pixels equal Pillow's, for raw pixels and for JPEG (the same inverse DCT and upsampling; FFCV's own decoder asks
for a faster, less exact one). FFCV follows addresses without a check: it gets files that BetonFile took, and a
sample only after its checksum (where the file has them) and its JPEG's own size were compared.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadit.images.loader import Decoder, ImageSet, Request, undecodable
from vadit.images.pillow import ThreadedDecoder, decode
from vadit.images.sources.beton import BetonSource
from vadit.images.transforms import plan_crop
from vadit.runtime.errors import RunError, UsageError, first_line

VERSION = "1.0.2"  # of FFCV, whose inside `_Pipeline` uses
CHUNK = 16  # most images that a thread takes at a time
TJ_FLAGS = 0  # of turbojpeg, whose pixel format 0 is RGB: neither the fast inverse DCT nor the fast upsampling
_PLAN = np.dtype("<i8")


def why_not(images: ImageSet) -> str:
    """Why FFCV cannot load these images; empty where it can."""
    source = images.source
    if not isinstance(source, BetonSource):
        return f"FFCV reads .beton files, and {source.name} is none (vadit prepare makes one)"
    other = np.flatnonzero(np.minimum(source.widths, source.heights) != images.size)
    if len(other):
        index = int(other[0])
        return (
            f"FFCV takes images whose short side is {images.size} pixels, and {source.describe(index)} has "
            f"{source.widths[index]} x {source.heights[index]} (vadit prepare --size {images.size} scales them)"
        )
    try:
        with _torch_threads_kept():
            import ffcv.libffcv  # noqa: F401
    except Exception as error:  # a native library that is missing shows in many ways
        return f"ffcv does not import ({first_line(error)}); pip install 'vadit[ffcv]'"
    if (found := metadata.version("ffcv")) != VERSION:
        return f"ffcv {found} is installed, and this loader is made for {VERSION} (pip install 'vadit[ffcv]')"
    return ""


def ffcv_decoder(images: ImageSet, num_workers: int, device: torch.device | str = "cpu") -> Decoder:
    """Starts FfcvDecoders with so many threads; compiles, for some seconds.

    UsageError where FFCV cannot load these images.
    """
    reason = why_not(images)
    if reason or not isinstance(images.source, BetonSource):
        raise UsageError(f"data.loader is ffcv, but {reason}; set --data.loader torch")
    pipeline = _Pipeline(images.source, images.size)
    pinned = torch.device(device).type == "cuda"
    return lambda: FfcvDecoder(images, pipeline, max(1, num_workers), pinned=pinned)


class FfcvDecoder(ThreadedDecoder):
    """An ImageDecoder over FFCV's compiled pipeline."""

    def __init__(self, images: ImageSet, pipeline: "_Pipeline", num_threads: int, *, pinned: bool) -> None:
        super().__init__(images, num_threads, part=CHUNK, num_parts=2 * num_threads, pinned=pinned)
        self._pipeline = pipeline

    def _decode(self, requests: Sequence[Request], pixels: Tensor) -> dict[int, RunError]:
        failures: dict[int, RunError] = {}
        plan = np.zeros((len(requests), 3), _PLAN)
        good: list[int] = []
        turned: set[int] = set()
        self._pipeline.source.file.check_size()
        for place, request in enumerate(requests):
            try:
                image = self._pipeline.source.check(request.index, self._pipeline.mapped)
                crop = plan_crop(request.crop, image.width, image.height, self._images.size, request.crop_seed)
            except (RunError, ValueError) as error:  # ValueError: it is too long
                failures[place] = undecodable(self._images, request.index, error)
                continue
            plan[place] = (*crop.window, request.mirror)
            good.append(place)
            if image.mode == "jpg" and self._images.is_turned(image.data):
                turned.add(place)
        indices = np.array([requests[place].index for place in good], np.int64)
        statuses = self._pipeline.run(indices, np.array(good, np.int64), pixels.numpy(), plan)
        for place, status in zip(good, statuses.tolist(), strict=True):
            if status or place in turned:  # turbojpeg refuses or warns: Pillow has the last word, as with every loader
                try:
                    pixels[place].numpy()[:] = decode(self._images, requests[place])
                except RunError as error:
                    failures[place] = error
        return failures


_COMPILED: dict[tuple[str, int], tuple[Callable[..., Any], int]] = {}
"""Type of the rows and number of the image's column -> the pipeline and its node: files are arguments of it."""


class _Pipeline:
    """FFCV's Loader of a file, with a decoder that takes each image's crop and mirroring from us."""

    def __init__(self, source: BetonSource, size: int) -> None:
        self.source = source
        self._code, self._node, self._rows, self._storage = _insides(source)
        self.mapped = memoryview(self._storage[0])
        self._library = _turbojpeg()
        jpegs = source.widths * source.heights * source.is_jpeg
        self._scratch_bytes = max(int(jpegs.max()) * 3, 1)
        none = np.zeros(0, np.int64)
        self.run(none, none, np.zeros((1, size, size, 3), np.uint8), np.zeros((0, 3), _PLAN))  # compiles

    def run(self, indices: np.ndarray, places: np.ndarray, pixels: np.ndarray, plan: np.ndarray) -> np.ndarray:
        """Decode images `indices` into pixels[places]; plan[place] is left, top, mirror. Statuses (n,), 0: good."""
        statuses = np.zeros(len(indices), np.int64)
        # Room for the largest JPEG's pixels. Of two dimensions: FFCV makes numba's one type of writable rows of bytes
        # a read-only one, for the whole process.
        scratch = np.empty((1, self._scratch_bytes), np.uint8)
        handle = self._library.tjInitDecompress()
        try:
            numbers = np.array([handle, pixels.shape[1]], np.int64)
            memory = (pixels.reshape(len(pixels), -1), scratch, places, plan, statuses, numbers)
            own = {f"memory_{self._node}": memory, f"shared_memory_{self._node}": None}
            self._code(batch_indices=indices, metadata=self._rows, storage_state=self._storage, **own)
        finally:
            self._library.tjDestroy(handle)
        return statuses


def _insides(source: BetonSource) -> tuple[Callable[..., Any], int, np.ndarray, tuple[Any, ...]]:
    """What of FFCV is used that it does not promise: the only place, for FFCV VERSION.

    The compiled pipeline, the number of its one node (which its arguments are named by), the file's rows, and what the
    pipeline reads from: the mapped file with the sorted addresses and sizes of its payloads.
    """
    with _torch_threads_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated syntax trees, from inside FFCV
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline import PipelineSpec

        others = {field.name: None for field in source.file.fields}
        loader = Loader(
            source.name,
            batch_size=1,
            num_workers=1,  # the threads are ours
            os_cache=True,
            order=OrderOption.SEQUENTIAL,  # never iterated
            pipelines={**others, source.image_field: PipelineSpec(source.image_field, _operation())},
        )
    ((code, _),) = loader.code[0]
    (node,) = (node.id for node in loader.graph.root_nodes)
    key = (str(source.file.rows.dtype), loader.field_name_to_f_ix[source.image_field])
    code, node = _COMPILED.setdefault(key, (code, node))
    manager = loader.memory_manager
    return code, node, loader.reader.metadata, (np.memmap(source.name, np.uint8, "r"), manager.ptrs, manager.sizes)


def _turbojpeg() -> ctypes.CDLL:
    """The turbojpeg that FFCV links. Addresses as integers: numba passes arrays' addresses so."""
    import ffcv._libffcv

    library = ctypes.CDLL(ffcv._libffcv.__file__)
    address, number = ctypes.c_int64, ctypes.c_int32
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    library.tjDecompress2.argtypes = [address, address, ctypes.c_uint64, address, *[number] * 5]
    library.tjDecompress2.restype = number
    return library


@contextlib.contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """FFCV sets torch's number of threads, for the whole process, when it is imported and when a Loader is made."""
    count = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _operation() -> Any:
    """The decoder in FFCV's pipeline (its base class is there only with FFCV)."""
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State

    decompress = _turbojpeg().tjDecompress2

    class CropDecoder(Operation):  # type: ignore[misc, unused-ignore]
        """Cuts the planned square out of each image; its memory is what `_Pipeline.run` passes."""

        def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery | None]:
            return previous_state, None

        def generate_code(self) -> Callable[..., Any]:
            read = self.memory_read

            # Plain loops over flat bytes: numba compiles them in a fraction of the time that slices take it.
            def crop(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
                pixels, scratch, places, plan, statuses, numbers = memory
                handle, size = numbers[0], numbers[1]
                for number in range(len(batch_indices)):
                    field = metadata[batch_indices[number]]
                    width, height = np.int64(field["width"]), np.int64(field["height"])
                    source = read(field["data_ptr"], storage_state)
                    if field["mode"] == 0:
                        statuses[number] = decompress(
                            handle, source.ctypes.data, source.size, scratch.ctypes.data, width, 0, height, 0, TJ_FLAGS
                        )
                        source = scratch[0]
                    place = places[number]
                    left, top, mirror = plan[place, 0], plan[place, 1], plan[place, 2]
                    for row in range(size):
                        begin = ((top + row) * width + left) * 3
                        if mirror:
                            for column in range(size):
                                for channel in range(3):
                                    pixels[place, (row * size + size - 1 - column) * 3 + channel] = source[
                                        begin + column * 3 + channel
                                    ]
                        else:
                            for byte in range(3 * size):
                                pixels[place, row * size * 3 + byte] = source[begin + byte]
                return pixels

            return crop

    return CropDecoder()
