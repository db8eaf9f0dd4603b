"""The Inception network of 2015 that published FID, sFID, IS, precision and recall rest on.

torch-fidelity carries the graph (TF1's bilinear resize to 299 without antialias, (x - 128) / 128, the pooling quirks of
`classify_image_graph_def.pb`) and publishes its weights; this file adds the layer that sFID needs and keeps the
arithmetic in fp32. The network is the protocol: features of torchvision's Inception give other numbers.
"""

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadit.models.pretrained import compare_published, read_weights
from vadit.runtime.errors import UsageError, first_line
from vadit.runtime.precision import computing

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the published file; its name begins it."""
SPATIAL_CHANNELS = 7
"""Channels of mixed_6/conv that sFID takes (Nash et al. 2021): 7 x 17 x 17 = 2023 numbers, about pool_3's 2048."""


class InceptionFeatures(NamedTuple):
    """Features of B images, fp32."""

    pool: Tensor  # (B, 2048): pool_3, for FID, precision and recall
    spatial: Tensor  # (B, 2023): the first 7 channels of mixed_6/conv (17 x 17), flattened in NHWC order, for sFID
    probabilities: Tensor
    """(B, 1008): softmax of pool_3 times the class weights, without the bias, for the inception score."""


class Inception:
    """Inception features of uint8 images; `weights` is the path of torch-fidelity's file."""

    def __init__(self, weights: str | Path | None, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._network = _load(weights).to(self.device)
        self._spatial: list[Tensor] = []
        # TF names the 17x17 blocks mixed_4 .. mixed_7, torch Mixed_6b .. Mixed_6e, and the first convolution of a
        # block is its 1x1 branch: mixed_6/conv is the output (after ReLU) of Mixed_6d.branch1x1, 192 channels.
        self._network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, out: self._spatial.append(out))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> InceptionFeatures:
        """Features of images uint8 (B, 3, H, W), any size."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UsageError(
                f"Inception needs uint8 images of shape (B, 3, H, W), found {images.dtype} {tuple(images.shape)}"
            )
        self._spatial.clear()
        # The protocol is fp32: no TF32 in convolutions and products, whatever the caller has set, and no autocast.
        with computing("fp32", self.device), torch.autocast(self.device.type, enabled=False):
            pool, logits = self._network(images.to(self.device))
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return InceptionFeatures(pool, spatial, logits.softmax(dim=1))

    def pool(self, images: Tensor) -> Tensor:
        """The pool_3 features (B, 2048) alone, the form that rFID takes."""
        return self(images).pool


def provenance(weights: str | Path | None) -> dict[str, Any]:
    """Which Inception network numbers rest on, for the file that holds them; empty without one."""
    if weights is None:
        return {}
    with Path(weights).open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    published = found == PUBLISHED_SHA256
    return {"inception_weights": str(weights), "inception_sha256": found, "inception_published": published}


def _load(weights: str | Path | None) -> Any:
    """torch-fidelity's network with the weights of its file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is None or not Path(weights).is_file():
        found = "no file was given" if weights is None else f"{weights} does not exist"
        raise UsageError(
            f"the Inception weights are needed and {found}; download {WEIGHTS_FILE} from {WEIGHTS_URL} "
            "and name it with --inception-weights"
        )
    path = Path(weights)
    state = read_weights(path)
    if not isinstance(state, dict) or "Mixed_6d.branch1x1.conv.weight" not in state:
        raise UsageError(f"{path} is not torch-fidelity's Inception; name {WEIGHTS_FILE} with --inception-weights")
    compare_published(path, PUBLISHED_SHA256)
    own = io.BytesIO()  # torch-fidelity unpickles freely what it is given: not the file, but these tensors
    torch.save(state, own)
    own.seek(0)
    try:
        # Weights are drawn before they are loaded: not from the random state of a training run that evaluates samples.
        with torch.random.fork_rng(devices=[]):
            return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], own)
    except RuntimeError as error:
        raise UsageError(
            f"{path} does not fit the Inception of 2015 ({first_line(error)}); take {WEIGHTS_FILE}"
        ) from None
