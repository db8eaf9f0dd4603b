"""Pictures for people: grids of images, and originals above their reconstructions."""

from __future__ import annotations

import numpy as np
import pytest

from vadit.images.pixels import image_grid, reconstruction_pairs
from vadit.runtime.errors import UsageError


def test_a_grid_holds_each_image_enlarged_without_smoothing() -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    grid = np.asarray(image_grid(images, columns=3, scale=2))
    assert grid.shape == (2 * 16 + 2, 3 * 16 + 4, 3)
    np.testing.assert_array_equal(grid[18:34:2, 18:34:2], images[4])
    np.testing.assert_array_equal(grid[19:34:2, 19:34:2], images[4])
    assert (grid[18:, 36:] == 255).all()  # the place of the missing sixth
    assert image_grid(images).size[0] == 3 * 64 + 4  # 8 pixels grow to 64


def test_pairs_stand_one_above_the_other() -> None:
    originals = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    picture = np.asarray(reconstruction_pairs(originals, 255 - originals, columns=3, scale=1))
    height, width = 2 * (2 * 16 + 2) + 10, 3 * 16 + 4
    assert picture.shape[0] == height
    body = picture[:, -width:]
    np.testing.assert_array_equal(body[:16, :16], originals[0])
    np.testing.assert_array_equal(body[18:34, :16], 255 - originals[0])
    np.testing.assert_array_equal(body[44:60, 18:34], originals[4])
    assert picture[:, : -width - 4].min() < 200  # the labels are there
    with pytest.raises(UsageError, match="one shape"):
        reconstruction_pairs(originals, originals[:4])
    with pytest.raises(UsageError, match="uint8"):
        image_grid(originals.astype(np.float32))
