"""Small classifiers of pictures, trained in a minute: above all a foundation model where there is none to download.

Such a model knows the run's own pictures and nothing else; for small images that is what the latent needs to know.
"""

import dataclasses
import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vadit.config import FoundationSpec
from vadit.images.loader import ImageSet, load_in_order
from vadit.images.pillow import pillow_decoder
from vadit.images.pixels import to_signed
from vadit.models.foundation import FoundationModel
from vadit.models.pretrained import write_safetensors
from vadit.runtime import distributed, rng
from vadit.runtime.console import ProgressBar

BATCH = 64
LR = 2e-3
NOISE = 0.1
OWN = "own"  # FoundationSpec.weights of a model that is trained on the run's pictures
MOST_IMAGES = 4096  # that it is trained on, spread over all: they stay in memory


def train_classifier(
    network: nn.Module, images_N3HW: Tensor, labels_N: Tensor, *, title: str, steps: int, seed: int
) -> nn.Module:
    """Train `network` on uint8 images and their labels; returned in evaluation mode.

    Images are shifted at random by up to 2 pixels, and get noise.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    network.train()
    with ProgressBar(title, steps * BATCH) as bar:
        for step in range(steps):
            chosen = torch.randint(len(images_N3HW), (BATCH,), generator=generator)
            dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
            x = to_signed(images_N3HW[chosen]).roll((dy, dx), dims=(2, 3))
            x = x + NOISE * torch.randn(x.shape, generator=generator)
            logits = network(x.to(device))
            loss = F.cross_entropy(logits, labels_N[chosen].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update((step + 1) * BATCH)
    return network.eval()


def own_foundation(
    spec: FoundationSpec, images: ImageSet, folder: Path, *, grid: int, device: torch.device, seed: int
) -> FoundationSpec:
    """`spec` with the weights that lie in the run folder; where there are none they are trained first. Collective.

    It learns the classes; where there is but one, the quarter turns of rotated pictures (RotNet, Gidaris et al. 2018).
    """
    # a name for what it depends on: a folder where nothing was trained yet may be begun with other settings
    about = json.dumps([dataclasses.asdict(spec), len(images), len(images.source.classes), images.size, seed])
    path = folder / f"foundation-{zlib.crc32(about.encode()):08x}.safetensors"

    def make() -> None:
        if path.is_file():
            return
        pixels, labels = _some(images)
        count = len(images.source.classes)
        if count == 1:
            count = 4
            labels = torch.arange(4).repeat_interleave(len(pixels))
            pixels = torch.cat([pixels.rot90(turns, dims=(2, 3)) for turns in range(4)])
        torch.manual_seed(rng.fold(seed))
        sized = dataclasses.replace(spec, weights="random", model_args=spec.model_args | {"num_classes": count})
        network = FoundationModel(sized, grid).model.requires_grad_(True).to(device)
        train_classifier(network, pixels, labels, title="foundation model", steps=spec.own_steps, seed=seed)
        state = {name: value for name, value in network.state_dict().items() if not name.startswith("head.")}
        write_safetensors(state, path)

    distributed.from_main(make)
    return dataclasses.replace(spec, weights=str(path), model_args=spec.model_args | {"num_classes": 0})


def _some(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Up to MOST_IMAGES pictures, evenly spread, uint8 (N, 3, H, W), and their labels."""
    ids = range(0, len(images), -(-len(images) // MOST_IMAGES))
    with pillow_decoder(images, 4)() as decoder:
        batches = list(load_in_order(images, ids, BATCH, decoder))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])
