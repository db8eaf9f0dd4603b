"""Counter-based randomness: bijection, independence of batching, and plain statistics."""

from __future__ import annotations

import pytest
import torch

from vadit.runtime import rng


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 100, 1000, 1023, 1024, 1025, 20_001])
def test_permute_is_a_bijection(n: int) -> None:
    for seed in (0, 1, 2**62):
        out = rng.permute(torch.arange(n), n, seed)
        assert out.dtype == torch.int64
        assert torch.equal(out.sort().values, torch.arange(n))


def test_permute_of_parts_at_any_size_depends_on_the_seed() -> None:
    whole = rng.permute(torch.arange(1000), 1000, 7)
    parts = torch.cat([rng.permute(torch.arange(start, 1000, 3), 1000, 7) for start in range(3)])
    assert torch.equal(parts, torch.cat([whole[start::3] for start in range(3)]))
    assert (whole == rng.permute(torch.arange(1000), 1000, 8)).float().mean() < 0.02
    assert (whole == torch.arange(1000)).float().mean() < 0.02
    n = 10**15 + 37
    positions = torch.arange(n - 5000, n)
    out = rng.permute(positions, n, 3)
    assert out.min() >= 0 and out.max() < n and out.unique().numel() == 5000
    n, draws = 7, 1400
    table = torch.stack([rng.permute(torch.arange(n), n, rng.fold("spread", seed)) for seed in range(draws)])
    counts = torch.stack([torch.bincount(table[:, position], minlength=n) for position in range(n)]).double()
    expected = draws / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 80  # 36 degrees of freedom; the 99.99% quantile is 77


def test_normal_rows_depend_on_seed_and_id_alone() -> None:
    together = rng.normal(5, [3, 9, 4], (4, 3, 3))
    assert together.shape == (3, 4, 3, 3) and together.dtype == torch.float32
    for row, number in enumerate((3, 9, 4)):
        assert torch.equal(together[row], rng.normal(5, torch.tensor([number]), (4, 3, 3))[0])
    assert not torch.equal(together, rng.normal(6, [3, 9, 4], (4, 3, 3)))
    many = rng.normal(0, range(200), (16, 8))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_uniform_and_integers_cover_their_range_evenly() -> None:
    ids = torch.arange(40_000)
    values = rng.uniform(11, ids)
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    assert (torch.histc(values, 10, 0, 1) / 4000 - 1).abs().max() < 0.1
    assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) < 0.02
    labels = rng.integers(11, ids, 10)
    assert labels.dtype == torch.int64
    assert (torch.bincount(labels, minlength=10) / 4000 - 1).abs().max() < 0.1
    assert torch.equal(values[[7, 3]], rng.uniform(11, [7, 3]))
    assert (rng.integers(0, ids, 1) == 0).all()


def test_fold_is_63_bits_ordered_and_stable() -> None:
    assert rng.fold(1, 2) != rng.fold(2, 1) and rng.fold(1, "flip") != rng.fold(1, "noise")
    assert all(0 <= rng.fold(value, -value) < 2**63 for value in range(100))
    assert len({rng.fold(a, b) for a in range(50) for b in range(50)}) == 2500
    ids = [0, 5, 2**40]
    assert rng.seeds(3, ids) == [rng.fold(3, index) for index in ids]
    # Golden values: a change of the hash would silently change every sample of a seed.
    assert rng.fold(0) == 0xE220A8397B1DCDAF >> 1
    assert rng.integers(3, ids, 1000).tolist() == [737, 806, 52]
    assert rng.permute(torch.tensor([0, 1, 999]), 1000, 7).tolist() == [741, 287, 126]
