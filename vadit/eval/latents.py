"""How evenly a tokenizer spreads its latents: the three numbers of the paper's Table 6.

Protocol: latent vectors (one random position of each of n random images, channels normalised) go to two dimensions by
t-SNE (perplexity 30, 1000 iterations); a Gaussian kernel density (Scott's rule) is evaluated at the points themselves;
of these n densities: coefficient of variation, Gini coefficient, entropy over log2 n; mean over draws.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy, gaussian_kde
from torch import Tensor

from vadit.latents.dataset import LatentDataset
from vadit.models.pretrained import read_weights
from vadit.runtime.console import counted
from vadit.runtime.errors import RunError, UsageError, first_line
from vadit.runtime.files import saved_file
from vadit.runtime.npz_files import Npz, read_array_header
from vadit.runtime.torch_file import is_plain

PERPLEXITY = 30.0
ITERATIONS = 1000
NUM_VECTORS = 10_000
READ_AT_ONCE = 256  # latents in memory at once: 8 MiB of 32 x 16 x 16 in float32
MAX_NUMBERS = 1 << 27  # of a file of latent vectors: 4 million of 32 channels

Draw = Callable[[int, int], np.ndarray]  # (num_vectors, seed) to latent vectors (num_vectors, C), normalised by channel


def evaluate_latents(
    draw: Draw, num_vectors: int, seeds: Sequence[int], picture: str | Path | None = None
) -> list[dict[str, float]]:
    """The three numbers of each draw of vectors, one per seed; a picture of the first draw's points."""
    found: list[dict[str, float]] = []
    for seed in counted("draws", len(seeds), seeds, lambda _: 1):
        points = embed(draw(num_vectors, seed), seed)
        if picture is not None and not found:
            draw_picture(points, Path(picture))
        found.append(unevenness(point_densities(points)))
    return found


def unevenness(values: np.ndarray) -> dict[str, float]:
    """The three numbers of densities >= 0 (n,): 0, 0 and 1 where they are equal.

    density_cv: standard deviation over mean. gini: mean absolute difference of all pairs over twice the mean, (n-1)/n
    where all is in one. normalized_entropy: that of the densities scaled to sum 1, over log2 n; 0 where all is in one.
    """
    n = len(values)
    ranks = np.arange(1, n + 1)
    return {
        "density_cv": float(values.std() / values.mean()),
        "gini": float(2 * (ranks * np.sort(values)).sum() / (n * values.sum()) - (n + 1) / n),
        "normalized_entropy": float(entropy(values) / np.log(n)),
    }


def point_densities(points: np.ndarray) -> np.ndarray:
    """Gaussian kernel density (Scott's rule) of points (n, 2) at the points themselves, (n,)."""
    return gaussian_kde(points.T, bw_method="scott")(points.T)


def embed(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE (Table 6's settings) of latent vectors (n, C) to points (n, 2), float64."""
    from sklearn.manifold import TSNE  # a second to import

    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise UsageError(
            f"latent vectors must be finite and of shape (n, C), found {vectors.shape} with "
            f"{int((~np.isfinite(vectors)).sum())} values that are NaN or infinite; look at the tokenizer"
        )
    if len(vectors) <= 3 * PERPLEXITY:
        raise UsageError(
            f"--num-vectors is {len(vectors)}; t-SNE with perplexity {PERPLEXITY:g} needs more than "
            f"{3 * PERPLEXITY:g} latent vectors: raise --num-vectors, or name latents of more images"
        )
    if vectors.std(axis=0).max() == 0:
        raise UsageError("all latent vectors are equal; the tokenizer has collapsed")
    tsne = TSNE(n_components=2, perplexity=PERPLEXITY, max_iter=ITERATIONS, random_state=seed)
    return tsne.fit_transform(vectors).astype(np.float64)


def draw_picture(points: np.ndarray, path: Path) -> None:
    """A PNG of t-SNE points (n, 2), coloured by their density (as the paper's figure of the latents)."""
    from matplotlib.figure import Figure

    densities = point_densities(points)
    order = np.argsort(densities)  # the densest on top
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    size = max(1.0, 4000 / len(points))
    x, y = points[order].T
    axes.scatter(x, y, c=densities[order], s=size, cmap="viridis", linewidths=0)
    axes.set(xticks=[], yticks=[], aspect="equal")
    with saved_file(path, "set --picture to a place with room") as partial:
        figure.savefig(partial, format="png", dpi=150)


def open_vectors(path: str | Path) -> tuple[Draw, int]:
    """What draws vectors from a folder of latents, or a file with a tensor of them; and how many it has, of images."""
    path = Path(path)
    if path.is_file():
        vectors = read_vectors(path)
        return partial(file_vectors, vectors), len(vectors)
    latents = LatentDataset(str(path), flip=False)
    return partial(folder_vectors, latents), len(latents)


def folder_vectors(latents: LatentDataset, num_vectors: int, seed: int) -> np.ndarray:
    """One random position of each of `num_vectors` random latents, which alone are read: float64 (num_vectors, C)."""
    images, positions = _random_places(len(latents), latents.size**2, num_vectors, seed)
    parts = []
    for ids, places in zip(images.split(READ_AT_ONCE), positions.split(READ_AT_ONCE), strict=True):
        flat = latents.batch(ids, epoch=0, seed=seed)[0].flatten(2)
        parts.append(flat[torch.arange(len(ids)), :, places].double().cpu())
    return torch.cat(parts).numpy()


def file_vectors(vectors: Tensor, num_vectors: int, seed: int) -> np.ndarray:
    """`num_vectors` of vectors (N, C) at random, in float64, normalised by the channels of all."""
    images, _ = _random_places(len(vectors), 1, num_vectors, seed)
    vectors = vectors.double()
    std = vectors.std(dim=0)
    std = torch.where(std == 0, 1.0, std)  # a channel that never changes says nothing, and divides nothing
    return ((vectors[images] - vectors.mean(dim=0)) / std).numpy()


def _random_places(num_images: int, num_positions: int, num_vectors: int, seed: int) -> tuple[Tensor, Tensor]:
    """Different images and a position in each, int64 (num_vectors,)."""
    if num_vectors > num_images:
        raise UsageError(
            f"--num-vectors is {num_vectors}, and there are latents of {num_images} images, one vector from each; set "
            f"--num-vectors {num_images} or less (t-SNE needs more than {3 * PERPLEXITY:g})"
        )
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.choice(num_images, num_vectors, replace=False))
    return images, torch.from_numpy(generator.integers(num_positions, size=num_vectors))


def read_vectors(path: Path) -> Tensor:
    """A (N, C) tensor of latent vectors: .npy, .npz or .safetensors or .pt with one tensor in it."""
    value: Any
    if path.suffix == ".npz":
        npz = Npz(path)
        names = [name for name, entry in npz.entries.items() if len(entry.shape) == 2] or [*npz.entries, path.stem]
        value = {name: torch.from_numpy(npz.array(name, (None, None), max_bytes=8 * MAX_NUMBERS)) for name in names}
    elif path.suffix == ".npy":
        try:
            with path.open("rb") as stream:
                read_array_header(stream)
            value = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        except Exception as error:  # numpy evaluates the header, and fails in its own ways on damaged bytes
            raise RunError(f"{path} cannot be read as a tensor ({first_line(error)}); write it again") from None
    else:
        value = read_weights(path)
    tensors = value if isinstance(value, dict) else {path.stem: value}
    two = {name: tensor for name, tensor in tensors.items() if is_plain(tensor) and tensor.ndim == 2}
    if len(two) != 1:
        shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in list(tensors.items())[:8]}
        raise UsageError(f"{path} must hold one tensor of shape (N, C), found {shapes}")
    (vectors,) = two.values()
    if vectors.numel() > MAX_NUMBERS:
        raise UsageError(f"{path} holds {vectors.numel():,} numbers; at most {MAX_NUMBERS:,} are read")
    return vectors
