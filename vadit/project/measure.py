"""What `vadit new` finds: the pictures, the machine, and how fast a real training step is here."""

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from vadit.config import Config, TokenizerConfig, vary
from vadit.estimate.flops import training_flops
from vadit.images.formats import open_image, reason
from vadit.images.loader import ImageSource, describe_classes
from vadit.runtime import distributed
from vadit.runtime.console import muted
from vadit.runtime.errors import UsageError
from vadit.runtime.free import free_bytes
from vadit.runtime.spread import spread
from vadit.train import dit, tokenizer

LOOK_S, LOOK_IMAGES = 4.0, 100  # pictures are decoded for so long, or so many
STEPS, PART = 9, 3  # that a trial takes; the fastest part of them counts


class Pictures(NamedTuple):
    """A set of pictures, by all names and some of the files."""

    num_images: int
    num_classes: int
    side: int  # median of the shorter sides, in pixels
    decode_s: float  # of one picture, on one core
    words: str


class Machine(NamedTuple):
    """What trains here."""

    gpu: bool
    cores: int
    free: int  # bytes, of the GPU where there is one
    words: str


def look(source: ImageSource) -> Pictures:
    """Decode some of the pictures; UsageError where none of them can be read."""
    sides, bad, started = list[int](), list[str](), time.monotonic()
    places = spread(len(source), LOOK_IMAGES)[torch.randperm(min(len(source), LOOK_IMAGES)).numpy()]
    for index in places.tolist():
        if time.monotonic() - started > LOOK_S and sides:
            break
        try:
            sides.append(min(open_image(source.read(index)).size))
        except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
            bad.append(f"{source.describe(index)} ({reason(error)})")
    if not sides:
        raise UsageError(f"none of {len(bad)} pictures of {source.name} can be read, such as {bad[0]}; name others")
    words = f"{len(source):,} pictures, {describe_classes(source.classes, source.labels)}; of {len(sides):,} looked at "
    words += f"the short side has {min(sides):,} to {max(sides):,} pixels, {median(sides):,.0f} in the middle"
    words += f"; {len(bad)} cannot be read and are left out, such as {bad[0]}" if bad else ""
    decode_s = (time.monotonic() - started) / len(sides)
    return Pictures(len(source), len(source.classes), int(median(sides)), decode_s, words)


def find_machine(choice: str) -> Machine:
    """The device of this process and what it has free."""
    device, cores = distributed.device(choice), len(os.sched_getaffinity(0))
    free, name = free_bytes(device), torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return Machine(device.type == "cuda", cores, free, f"{cores} CPU cores, {name}; {free / 2**30:.1f} GiB free")


def speed(config: Config) -> float:
    """FLOP/s that training steps of `config` reach here, by the trainer itself on pictures or latents of noise."""
    batch = config.run.batch_size
    with tempfile.TemporaryDirectory(prefix="vadit-new-") as folder, muted():
        run = {"out": f"{folder}/run", "total_images": STEPS * batch, "log_every_images": PART * batch}
        parts = {"run": run | {"save_every_images": STEPS * batch}, "data": {"path": f"debug:{2 * batch}"}}
        if isinstance(config, TokenizerConfig):
            given = config.foundation.weights not in ("hub", "own")  # a file is looked at: it may be a wrong one
            weights = {} if given else {"weights": "random"}  # of a foundation model: its arithmetic is the same
            tokenizer.train(vary(config, **parts, loss={"disc_start_step": 1}, foundation=weights))
        else:
            dit.train(vary(config, **parts, engine={"compile": False}))
        lines = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
    return max(json.loads(line)["images_per_s"] for line in lines) * training_flops(config)
