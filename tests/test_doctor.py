"""The doctor: what it finds, and what it says of what is missing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vadit import cli
from vadit.runtime import doctor


def install(folder: Path, name: str, version: str, packages: tuple[str, ...] = ()) -> None:
    """A distribution with empty packages, as pip would leave it."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for package in packages:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise RuntimeError('the doctor must not import this')\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A folder that is searched for packages first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path


def test_report_covers_every_acceleration_with_version_or_reason(capsys) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "CUDA", "Triton", "vadit._C", "flash-attn", "apex", "DALI", "FFCV", "torchao", "DeepSpeed"):
        assert part in text, part
    for op in ("gated_norm", "group_norm_silu", "rms_norm", "rope", "swiglu", "vf_loss"):
        assert text.count(f"kernel {op}") == 2, op  # on the CPU and on GPUs
    for finding in doctor.examine():
        assert finding.detail, finding
        if finding.state == "ok" and not finding.name.startswith(("kernel", "compilers")):
            assert finding.version, finding


def test_apex_is_nvidias_or_another_project_and_never_imported(site: Path) -> None:
    absent = doctor._apex()
    assert absent.state == "missing" and "do not pip install it" in absent.detail
    install(site, "apex", "0.9.10", ("apex", "apex/lib"))
    other = doctor._apex()
    assert other.state == "missing" and "apex 0.9.10 is another project" in other.detail
    assert other.remedy.startswith("pip uninstall apex") and "NVIDIA/apex" in other.remedy
    (site / "apex" / "normalization").mkdir()
    assert doctor._apex().state == "missing"
    (site / "apex" / "optimizers").mkdir()
    assert (doctor._apex().state, doctor._apex().version) == ("ok", "0.9.10")


def test_optional_packages_are_found_by_their_distribution(site: Path) -> None:
    install(site, "nvidia_dali_cuda999", "9.9")
    install(site, "flash_attn_3", "3.0.0")
    found = {finding.name: finding for finding in doctor._optional()}
    assert (found["DALI"].state, found["DALI"].version) == ("ok", "9.9")
    assert (found["flash-attn 3"].state, found["flash-attn 3"].version) == ("ok", "3.0.0")
    assert found["flash-attn"].state == "missing" and "flash_attn_2" in found["flash-attn"].detail
