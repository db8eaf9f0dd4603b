"""The crop rule against an independent, literal implementation, odd image modes, and pictures for people."""

import numpy as np
import pytest
from image_files import center_crop
from PIL import Image

from vadit.images import transforms
from vadit.images.pixels import image_grid, reconstruction_pairs
from vadit.runtime.errors import UsageError


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def crop(image: Image.Image, kind: transforms.CropKind, size: int, seed: int) -> np.ndarray:
    return np.asarray(transforms.apply_crop(image, transforms.plan_crop(kind, *image.size, size, seed)))


def naive_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's rule, spelled with arrays: halve by averaging, bicubic to the short side, slice the middle."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"),
    [(32, 32), (33, 47), (47, 33), (64, 64), (63, 200), (200, 129), (131, 128), (5, 9), (1, 40), (300, 70)],
)
def test_center_crop_is_the_adm_rule(width: int, height: int) -> None:
    image = picture(width, height)
    cropped = center_crop(image, 32)
    assert cropped.size == (32, 32)
    assert np.array_equal(np.asarray(cropped), naive_center_crop(image, 32))


def test_crops_of_odd_shapes() -> None:
    image = picture(64, 64)
    pixels = np.asarray(image).astype(np.float64)
    for _ in range(2):
        side = len(pixels) // 2
        pixels = pixels.reshape(side, 2, side, 2, 3).mean(axis=(1, 3))
    cropped = np.asarray(center_crop(image, 16)).astype(np.float64)
    assert np.abs(cropped - pixels).max() <= 2.0  # four roundings to 8 bits: two passes, rows and columns
    pytest.raises(ValueError, center_crop, picture(1, 5000), 32).match("1 x 5000 pixels")
    image = picture(90, 40)  # the short side becomes 32, the long one 72
    whole = np.asarray(image.resize((72, 32), Image.Resampling.BICUBIC))
    crops = [crop(image, "random", 32, seed) for seed in range(40)]
    places = {next(x for x in range(41) if np.array_equal(whole[:, x : x + 32], pixels)) for pixels in crops}
    assert min(places) < 8 and max(places) > 32, "the whole width is used"
    assert np.array_equal(crops[5], crop(image, "random", 32, 5))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "YCbCr", "HSV", "F", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = picture(20, 20, "L").convert(mode) if mode in ("LA", "F", "I") else picture(20, 20, mode)
    assert transforms.to_rgb(source).mode == "RGB"


def test_grids_and_pairs_of_pictures() -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    grid = np.asarray(image_grid(images, columns=3, scale=2))
    assert grid.shape == (2 * 16 + 2, 3 * 16 + 4, 3)
    np.testing.assert_array_equal(grid[18:34:2, 18:34:2], images[4])
    np.testing.assert_array_equal(grid[19:34:2, 19:34:2], images[4])
    assert (grid[18:, 36:] == 255).all()  # the place of the missing sixth
    assert image_grid(images).size[0] == 3 * 64 + 4  # 8 pixels grow to 64
    originals = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    picture = np.asarray(reconstruction_pairs(originals, 255 - originals, columns=3, scale=1))
    height, width = 2 * (2 * 16 + 2) + 10, 3 * 16 + 4
    assert picture.shape[0] == height
    body = picture[:, -width:]
    np.testing.assert_array_equal(body[:16, :16], originals[0])
    np.testing.assert_array_equal(body[18:34, :16], 255 - originals[0])
    np.testing.assert_array_equal(body[44:60, 18:34], originals[4])
    assert picture[:, : -width - 4].min() < 200  # the labels are there
    pytest.raises(UsageError, reconstruction_pairs, originals, originals[:4]).match("one shape")
    pytest.raises(UsageError, image_grid, originals.astype(np.float32)).match("uint8")
