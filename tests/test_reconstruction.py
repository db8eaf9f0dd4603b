"""Reconstruction metrics: exact cases, and independence of the batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vadit.eval import tokenizer as reconstruction
from vadit.eval.metrics import frechet_distance, mean_and_covariance
from vadit.images.pixels import to_signed, to_uint8
from vadit.runtime.errors import UsageError


@dataclass
class Posterior:
    mean: Tensor
    std: Tensor


@dataclass
class PixelCodec:
    """Latent = image; `noise` is the posterior's standard deviation, `offset` is added on the way back."""

    noise: float = 0.0
    offset: float = 0.0

    def encode(self, x: Tensor) -> Posterior:
        return Posterior(x, torch.full_like(x, self.noise))

    def decode(self, z: Tensor) -> Tensor:
        return z + self.offset


def images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def test_to_uint8_and_to_signed_are_inverse_on_every_value() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_signed(pixels)), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]


def test_psnr_by_hand_is_per_image() -> None:
    first = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    second = first.clone()
    second[0] += 10  # error 10 everywhere
    second[1, 0] = 255  # a third of the values off by the whole range
    expected = [20 * math.log10(255 / 10), 10 * math.log10(3)]
    assert reconstruction.psnr(first, second).tolist() == pytest.approx(expected)


def test_ssim_of_equal_and_of_constant_images() -> None:
    x = to_signed(images(2))
    assert reconstruction.ssim(x, x).tolist() == pytest.approx([1, 1])
    # Constants a, b have no variance: only (2ab + c1) / (a^2 + b^2 + c1) is left, c1 = (0.01 * 2)^2.
    a, b, c1 = 0.5, -0.25, 0.02**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    found = reconstruction.ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert found.tolist() == pytest.approx([expected], abs=1e-4)
    with pytest.raises(UsageError, match="11 pixels, the images are 8x8"):
        reconstruction.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_a_perfect_tokenizer_is_perfect() -> None:
    result = reconstruction.evaluate_tokenizer(
        PixelCodec(), [images(4)], features=lambda x: x.flatten(1)[:, :5].float()
    )
    assert (result.num_images, result.psnr) == (4, math.inf)
    assert result.ssim == pytest.approx(1)
    assert result.rfid == pytest.approx(0, abs=1e-6)
    assert result.lpips is None


def test_numbers_do_not_depend_on_the_batch_size() -> None:
    pixels = images(7)

    def features(x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3))

    def lpips(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    whole, split = (
        reconstruction.evaluate_tokenizer(
            PixelCodec(noise=0.1), pixels.split(size), lpips=lpips, features=features, seed=3
        )
        for size in (7, 2)
    )
    assert whole.psnr == split.psnr
    for name in ("ssim", "lpips", "rfid"):
        assert getattr(whole, name) == pytest.approx(getattr(split, name), rel=1e-5)
    # Noise of 0.1 in a range of 2 (clamped at the ends): about 10 log10(4 / 0.01) = 26 dB.
    assert whole.psnr == pytest.approx(26, abs=0.5)
    mode = reconstruction.evaluate_tokenizer(PixelCodec(noise=0.1), [pixels], posterior="mode")
    assert mode.psnr == math.inf
    other_seed = reconstruction.evaluate_tokenizer(PixelCodec(noise=0.1), [pixels], seed=4)
    assert other_seed.psnr != whole.psnr


def test_rfid_compares_with_the_very_images() -> None:
    pixels = images(6) // 2

    def features(x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3))

    result = reconstruction.evaluate_tokenizer(PixelCodec(offset=0.2), [pixels], features=features)
    moved = to_uint8(to_signed(pixels) + 0.2)
    expected = frechet_distance(*mean_and_covariance(features(pixels)), *mean_and_covariance(features(moved)))
    assert result.rfid == pytest.approx(expected)
    assert expected > 100


def test_unusable_input_is_refused() -> None:
    with pytest.raises(UsageError, match="no images"):
        reconstruction.evaluate_tokenizer(PixelCodec(), [])
    with pytest.raises(UsageError, match="uint8"):
        reconstruction.evaluate_tokenizer(PixelCodec(), [torch.zeros(1, 3, 16, 16)])

    class Cropping(PixelCodec):
        def decode(self, z: Tensor) -> Tensor:
            return z[..., :8]

    with pytest.raises(UsageError, match="downsample ratio"):
        reconstruction.evaluate_tokenizer(Cropping(), [images(1)])
