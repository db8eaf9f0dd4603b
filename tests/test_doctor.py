"""The doctor: what it finds, and what it says of what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vadit import cli
from vadit.runtime import doctor


def install(folder: Path, name: str, version: str, packages: tuple[str, ...]) -> None:
    """A distribution with empty packages, as pip would leave it."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for package in packages:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise RuntimeError('the doctor must not import this')\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched for packages first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path


def test_report_covers_every_acceleration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "CUDA", "Triton", "vadit._C", "flash-attn", "apex", "DALI", "FFCV", "torchao", "DeepSpeed"):
        assert part in text, part
    for op in ("rms_norm", "rope", "swiglu", "vf_loss", "cpu_adam", "shm_comm"):
        assert op in text, op


def test_every_missing_thing_has_a_reason_and_a_remedy() -> None:
    for finding in doctor.examine():
        if finding.state == "missing":
            assert finding.detail and finding.remedy, finding
        elif not finding.name.startswith(("kernel", "DeepSpeed ", "compilers")):
            assert finding.version, finding


def test_apex_of_pypi_is_recognised_as_another_project(site: Path) -> None:
    install(site, "apex", "0.9.10", ("apex", "apex/lib"))
    finding = doctor._apex()
    assert finding.state == "missing"
    assert "another project" in finding.detail and "0.9.10" in finding.detail
    assert finding.remedy.startswith("pip uninstall apex") and "NVIDIA/apex" in finding.remedy


def test_apex_of_nvidia_is_found_without_importing_it(site: Path) -> None:
    install(site, "apex", "0.1", ("apex", "apex/normalization", "apex/optimizers"))
    finding = doctor._apex()
    assert (finding.state, finding.version) == ("ok", "0.1")


def test_absent_apex_warns_of_the_name() -> None:
    finding = doctor._apex()
    assert finding.state == "missing" and "do not pip install it" in finding.detail


def test_optional_package_is_found_by_its_distribution(site: Path) -> None:
    dali = next(package for package in doctor.OPTIONAL_PACKAGES if package.name == "DALI")
    install(site, "nvidia_dali_cuda999", "9.9", ())
    finding = doctor._optional(dali)
    assert (finding.state, finding.version) == ("ok", "9.9")


def test_the_two_versions_of_flash_attn_are_told_apart(site: Path) -> None:
    install(site, "flash_attn_3", "3.0.0", ())
    found = {package.name: doctor._optional(package) for package in doctor.OPTIONAL_PACKAGES}
    assert (found["flash-attn 3"].state, found["flash-attn 3"].version) == ("ok", "3.0.0")
    assert found["flash-attn"].state == "missing" and "flash_attn_2" in found["flash-attn"].detail
