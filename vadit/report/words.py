"""Numbers as people read them: a metric's name as words with its protocol, and times in the unit that fits."""

import re
from pathlib import PurePath
from typing import Any, NamedTuple

from vadit.eval.samples import ADM_REFERENCE, FEW_IMAGES

_METRICS = {
    "fid": "FID", "sfid": "sFID", "is": "Inception score", "precision": "Precision", "recall": "Recall", "kid": "KID",
    "fd_dinov2": "FD-DINOv2", "rfid": "rFID", "psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS",
    "agreement": "Samples that are read as meant", "frechet": "Frechet distance", "density_cv": "Density CV of latents",
    "gini": "Gini coefficient of latents", "normalized_entropy": "Normalised entropy of latents",
}  # fmt: skip
_HIGHER = ("is", "precision", "recall", "psnr", "ssim", "agreement", "normalized_entropy")
_OF_INCEPTION = ("fid", "sfid", "rfid", "kid", "is", "precision", "recall")
_SAMPLER = (
    ("dopri5", "dopri5 (adaptive)"), (r"shift(.+)", "time shift {}"), (r"cfg(.+)", "guidance {}"),
    (r"autoguided(.+)", "autoguidance {}"), (r"from(.+)", "from t = {}"), (r"to(.+)", "to t = {}"),
    (r"ch(\d+)", "on the first {} channels"), (r"power(.+)", "power {}"), ("balanced", "balanced classes"),
    ("random", "random classes"), ("listed", "chosen classes"), (r"([a-z]+?)(\d+)", "{1} {0} steps"),
)  # fmt: skip


class Metric(NamedTuple):
    """A metric by its name in a file: fid50k_euler249_cfg10_random."""

    title: str
    kind: str  # fid
    size: int | None  # images that it is of
    protocol: str  # in words


def metric(name: str, num_images: object = None) -> Metric:
    """What a name in metrics.json or evaluations.jsonl means; the name itself where it is no metric of vadit's.

    num_images: of a tokenizer's evaluation, whose names do not say it.
    """
    found = re.fullmatch(r"(fd_dinov2|density_cv|normalized_entropy|[a-z]+)_?(\d+k?)?(?:_(.+))?", name)
    if found is None or found[1] not in _METRICS:
        return Metric(name, name, None, "")
    kind, number, sampler = found.groups()
    of_images = kind in ("rfid", "psnr", "ssim", "lpips")
    known = num_images if of_images and isinstance(num_images, int) else None
    count = int(number.replace("k", "000")) if number else known
    noun = "images" if of_images else "samples"
    parts = [f"{count:,} {noun}" if count else "", sampler_words(sampler) if sampler else ""]
    return Metric(_METRICS[kind], kind, count, ", ".join(filter(None, parts)))


def sampler_words(name: str) -> str:
    """The words of a `sampler_name`."""
    words = []
    for part in name.split("_"):
        matches = ((re.fullmatch(pattern, part), text) for pattern, text in _SAMPLER)
        words.append(next((text.format(*found.groups()) for found, text in matches if found), part))
    return ", ".join(words + ["no guidance"] * (re.search("cfg|autoguided|unnamed", name) is None))


def grounds(name: str, inputs: dict[str, Any]) -> tuple[str, str]:
    """What a number rests on, by the inputs of its metrics.json; and why it compares with few others, or nothing."""
    what, reference, count = metric(name), str(inputs.get("reference") or ""), inputs.get("num_references")
    rests, doubts = "", []
    if reference.endswith(ADM_REFERENCE):
        rests = "against ADM's ImageNet reference"
    elif reference:
        file = PurePath(reference).name
        rests = f"against your {count:,} images ({file})" if isinstance(count, int) else f"against {file}"
    elif judge := inputs.get("judge"):
        rests = f"by {judge}" if what.kind == "agreement" else "in that classifier's features"
    sizes = [size for size in (what.size, count) if isinstance(size, int)]
    if what.kind in ("fid", "sfid", "rfid", "fd_dinov2") and min(sizes, default=FEW_IMAGES) < FEW_IMAGES:
        doubts.append("too few to compare")
    if what.kind in _OF_INCEPTION and inputs.get("inception_published") is False:
        doubts.append("not the published Inception weights")
    return rests, "; ".join(doubts)


def higher_is_better(name: str) -> bool:
    """Whether a metric, by its protocol name (is50k_euler249, precision50k, psnr), grows as images get better."""
    return name.startswith(_HIGHER)


def duration(hours: float) -> str:
    """37 s, 4 min, 2.5 h."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h" if hours < 1000 else f"{hours:,.0f} h"


def time_unit(hours: float) -> tuple[str, float]:
    """The unit that fits a time, and its length in hours."""
    return ("seconds", 1 / 3600) if hours < 1 / 30 else ("minutes", 1 / 60) if hours < 2 else ("hours", 1.0)
