"""Reconstruction metrics: exact cases, and independence of batches and processes."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import run_ranks
from PIL import Image
from torch import Tensor

from vadit import cli
from vadit.config import AutoencoderSpec
from vadit.eval import tokenizer as reconstruction
from vadit.eval.metrics import frechet_distance, mean_and_covariance
from vadit.images.pixels import to_signed, to_uint8
from vadit.models.autoencoder import Autoencoder
from vadit.runtime import distributed, launcher
from vadit.runtime.errors import UsageError


@dataclasses.dataclass
class Posterior:
    mean: Tensor
    std: Tensor


@dataclasses.dataclass
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


def means(x: Tensor) -> Tensor:
    return x.float().mean(dim=(2, 3))


def test_psnr_and_ssim_by_hand_and_of_a_perfect_tokenizer() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_signed(pixels)), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
    first = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    second = first.clone()
    second[0] += 10  # error 10 everywhere
    second[1, 0] = 255  # a third of the values off by the whole range
    expected = [20 * math.log10(255 / 10), 10 * math.log10(3)]
    assert reconstruction.psnr(first, second).tolist() == pytest.approx(expected)
    x = to_signed(images(2, size=11))
    assert reconstruction.ssim(x, x).tolist() == pytest.approx([1, 1])
    # Constants a, b have no variance: only (2ab + c1) / (a^2 + b^2 + c1) is left, c1 = (0.01 * 2)^2.
    a, b, c1 = 0.5, -0.25, 0.02**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    found = reconstruction.ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert found.tolist() == pytest.approx([expected], abs=1e-4)
    with pytest.raises(UsageError, match="11 pixels, the images are 8x8"):
        reconstruction.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    count, found = reconstruction.evaluate_tokenizer(PixelCodec(), [images(4)], features=means)
    perfect = {"psnr": math.inf, "ssim": pytest.approx(1), "rfid4": pytest.approx(0, abs=1e-6)}
    assert count == 4 and found == perfect


def test_the_latent_is_a_sample_of_the_posterior() -> None:
    def evaluate(codec: PixelCodec, **options: object) -> float:
        return reconstruction.evaluate_tokenizer(codec, [images(7)], **options)[1]["psnr"]  # type: ignore[arg-type]

    # Noise of 0.1 in a range of 2 (clamped at the ends): about 10 log10(4 / 0.01) = 26 dB.
    assert evaluate(PixelCodec(noise=0.1), seed=3) == pytest.approx(26, abs=0.5)
    assert evaluate(PixelCodec(noise=0.1), seed=4) != evaluate(PixelCodec(noise=0.1), seed=3)
    assert evaluate(PixelCodec(noise=0.1), posterior="mode") == math.inf


def test_rfid_compares_with_the_very_images_and_lpips_sees_all_of_the_decoded() -> None:
    pixels = images(6) // 2

    def lpips(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).mean(dim=(1, 2, 3), keepdim=True)

    _, found = reconstruction.evaluate_tokenizer(PixelCodec(offset=0.2), [pixels], features=means, lpips=lpips)
    moved = to_uint8(to_signed(pixels) + 0.2)
    expected = frechet_distance(*mean_and_covariance(means(pixels)), *mean_and_covariance(means(moved)))
    assert found["rfid6"] == pytest.approx(expected) and expected > 100
    _, far = reconstruction.evaluate_tokenizer(PixelCodec(offset=2.0), [pixels], lpips=lpips)
    assert (found["lpips"], far["lpips"]) == (pytest.approx(0.2), pytest.approx(2.0))


def test_unusable_input_is_refused() -> None:
    pytest.raises(UsageError, reconstruction.evaluate_tokenizer, PixelCodec(), []).match("no images")
    with pytest.raises(UsageError, match="uint8"):
        reconstruction.evaluate_tokenizer(PixelCodec(), [torch.zeros(1, 3, 16, 16)])

    class Cropping(PixelCodec):
        def decode(self, z: Tensor) -> Tensor:
            return z[..., :8]

    pytest.raises(UsageError, reconstruction.evaluate_tokenizer, Cropping(), [images(1)]).match("downsample ratio")


def test_the_command_takes_a_folder_and_gives_means_over_seeds(tmp_path: Path, capsys) -> None:
    spec = AutoencoderSpec(image_size=16, latent_channels=2, base_channels=32, channel_multipliers=(1, 1))
    torch.manual_seed(0)
    tokenizer = Autoencoder(spec).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images(5)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{index}.png")
    out = tmp_path / "numbers.json"
    arguments = ["evaluate", "tokenizer", "--tokenizer", str(tmp_path / "tokenizer"), "--device", "cpu"]
    arguments += ["--images", str(tmp_path / "images"), "--num-workers", "1", "--seeds", "2", "--seed", "7"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    each = [reconstruction.evaluate_tokenizer(tokenizer, [images(5)], seed=seed)[1]["psnr"] for seed in (7, 8)]
    assert found["metrics"].keys() == {"psnr", "ssim"} and found["inputs"]["num_images"] == 5
    assert found["metrics"]["psnr"] == pytest.approx(np.mean(each), rel=1e-6)
    assert found["spread"]["psnr"] == pytest.approx(np.std(each, ddof=1), rel=1e-3)
    assert cli.main([*arguments, "--posterior", "mode"]) == 2
    assert "set --seeds 1" in capsys.readouterr().err


WORKER = """
import torch
from vadit.eval.tokenizer import _all_rows
from vadit.runtime import distributed
torch.distributed.init_process_group("gloo")
rank = distributed.rank()
ids = torch.arange(rank, 5, 2)
rows = torch.stack([ids.float(), -ids.float()], 1)
values = _all_rows(ids.tolist(), list(rows.split(1)))
assert torch.equal(values, torch.stack([torch.arange(5.0), -torch.arange(5.0)], 1)), values
values = _all_rows([], []) if rank == 1 else _all_rows(ids.tolist(), [rows])
assert values.tolist() == [[0, 0], [2, -2], [4, -4]], values
torch.distributed.destroy_process_group()
"""


def test_rows_of_two_processes_come_together() -> None:
    codes, said = run_ranks([sys.executable, "-c", WORKER])
    assert codes == [0, 0], said


class UnevenCodec(PixelCodec):
    """Its answer to an image depends, in the last bits, on how many images came with it, as a convolution's does."""

    def encode(self, x: Tensor) -> Posterior:
        return Posterior(x * (1 + 1e-3 * len(x)), torch.full_like(x, 0.1))


def test_numbers_are_those_of_any_batch_and_any_number_of_processes(monkeypatch) -> None:
    pixels = images(75, size=12)

    def features(x: Tensor) -> Tensor:
        return means(x) * (1 + 1e-3 * len(x))

    def lpips(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3)) * len(x)

    def evaluate_all(batch: int, ids: list[int] | None = None) -> tuple[int, dict[str, float]]:
        own = pixels if ids is None else pixels[ids]
        return reconstruction.evaluate_tokenizer(
            UnevenCodec(), own.split(batch), ids=ids, features=features, lpips=lpips
        )

    whole = evaluate_all(75)
    assert whole[0] == 75 and whole[1].keys() == {"psnr", "ssim", "lpips", "rfid75"}
    assert all(evaluate_all(batch) == whole for batch in (1, 32, 40))
    gathered: dict[int, list[tuple[list[int], Tensor]]] = {}

    def record(own: tuple[list[int], Tensor]) -> list[tuple[list[int], Tensor]]:
        gathered.setdefault(distributed.rank(), []).append(own)
        return [parts[len(gathered[distributed.rank()]) - 1] for parts in gathered.values()]

    monkeypatch.setattr(distributed, "all_gathered", record)
    found = None
    for rank in range(2):
        monkeypatch.setattr(launcher, "_place", launcher.Place(rank, 2))
        found = evaluate_all(10, reconstruction.share_of_images(75))
    assert found == whole
