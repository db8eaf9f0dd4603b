"""`vadit doctor`: the accelerations of this machine with versions, and for each that is missing why and what brings it.

Optional packages are looked up by their metadata and never imported: a broken one must not break the doctor.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: Literal["ok", "missing"]
    version: str
    detail: str
    """What it is good for, or why it is missing."""
    remedy: str = ""
    """The command that brings it."""


@dataclass(frozen=True)
class OptionalPackage:
    """An acceleration that comes with one pip package."""

    name: str
    distributions: str
    """Regular expression of the distribution names that carry it."""
    use: str
    remedy: str


OPTIONAL_PACKAGES = (
    OptionalPackage(
        "flash-attn",
        r"flash[-_]attn",
        "attention: engine.attention flash_attn_2, or auto; without it torch's own, which has flash kernels, too",
        "pip install flash-attn --no-build-isolation  (builds for hours; needs nvcc)",
    ),
    OptionalPackage(
        "flash-attn 3",
        r"flash[-_]attn[-_]3",
        "attention on Hopper: engine.attention flash_attn_3, or auto",
        "git clone https://github.com/Dao-AILab/flash-attention && pip install --no-build-isolation "
        "./flash-attention/hopper  (builds for hours; needs nvcc)",
    ),
    OptionalPackage(
        "torchao",
        r"torchao",
        "float8 in the generator's blocks: engine.float8",
        "pip install -c constraints.txt torchao",
    ),
    OptionalPackage(
        "DALI",
        r"nvidia[-_]dali[-_]cuda\d+",
        "decoding of JPEGs: data.loader dali, or auto",
        "pip install -c constraints.txt nvidia-dali-cuda130",
    ),
    OptionalPackage(
        "FFCV",
        r"ffcv",
        "a loader of packed images",
        "apt-get install libopencv-dev libturbojpeg0-dev pkg-config && pip install ffcv==1.0.2",
    ),
)

OP_LIBRARIES = {"async_io": "apt-get install libaio-dev"}
"""What brings a DeepSpeed op that lacks a system library."""

NVIDIA_APEX = (
    "git clone https://github.com/NVIDIA/apex && pip install -v --no-build-isolation "
    '--config-settings "--build-option=--cpp_ext --cuda_ext" ./apex'
)


def examine() -> list[Finding]:
    """Everything that the doctor looks at, in the order of the report; takes seconds (torch and DeepSpeed)."""
    return [
        Finding("Python", "ok", platform.python_version(), platform.platform()),
        *_torch(),
        _compiler(),
        _extension(),
        *_backends(),
        *(_optional(package) for package in OPTIONAL_PACKAGES),
        _apex(),
        *_deepspeed(),
    ]


def report(findings: list[Finding]) -> Table:
    """The findings as a table."""
    table = Table(title="vadit doctor", title_justify="left", show_lines=False)
    for column in ("what", "state", "version", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        colour = "green" if finding.state == "ok" else "yellow"
        detail = finding.detail + (f"\n-> {finding.remedy}" if finding.remedy else "")
        table.add_row(finding.name, f"[{colour}]{finding.state}[/]", finding.version, detail.replace("[", r"\["))
    return table


def distribution(pattern: str) -> tuple[str, str] | None:
    """Name and version of the installed distribution whose name matches `pattern` whole."""
    for found in metadata.distributions():
        name = found.metadata["Name"] or ""
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return name, found.version
    return None


# ------------------------------------------------------------------------------------------------ torch and our kernels


def _torch() -> list[Finding]:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    findings = [Finding("torch", "ok", torch.__version__, f"{build}; {torch.get_num_threads()} CPU threads")]
    driver = _driver()
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        sizes = [f"{card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}" for card in cards]
        names = ", ".join(f"{card.name} ({size})" for card, size in zip(cards, sizes, strict=True))
        findings.append(Finding("CUDA", "ok", torch.version.cuda or "", f"driver {driver}; {names}"))
    elif torch.version.cuda is None:
        why = "this torch is a CPU build"
        findings.append(Finding("CUDA", "missing", "", why, "pip install --force-reinstall -c constraints.txt torch"))
    elif driver is None:
        why = "no NVIDIA driver is loaded; everything runs on the CPU"
        findings.append(Finding("CUDA", "missing", "", why, "install your GPU's NVIDIA driver (nvidia-smi shows it)"))
    else:
        why = f"driver {driver} is loaded, but torch sees no GPU: too old for CUDA {torch.version.cuda}, or hidden"
        findings.append(Finding("CUDA", "missing", "", why, "check nvidia-smi and CUDA_VISIBLE_DEVICES"))
    triton = distribution("triton")
    if triton is None:
        findings.append(Finding("Triton", "missing", "", "fused GPU kernels", "pip install triton"))
    else:
        used = "fused GPU kernels" if torch.cuda.is_available() else "installed; its kernels need a GPU"
        findings.append(Finding("Triton", "ok", triton[1], used))
    return findings


def _driver() -> str | None:
    """Version of the loaded NVIDIA driver."""
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", path.read_text()) if path.is_file() else None
    return match[1] if match else None


def _compiler() -> Finding:
    tools = {name: shutil.which(name) for name in ("g++", "ninja", "nvcc")}
    found = ", ".join(f"{name} {path}" for name, path in tools.items() if path)
    if tools["g++"] is None:
        return Finding("compilers", "missing", "", "no g++: nothing can be compiled here", "apt-get install g++")
    return Finding("compilers", "ok", "", found + ("" if tools["nvcc"] else "; no nvcc: CUDA code is not compiled"))


def _extension() -> Finding:
    import vadit

    files = sorted(Path(vadit.__file__).parent.glob("_C*.so"))
    if files:
        return Finding("vadit._C", "ok", vadit.__version__, f"compiled kernels: {files[0].name}")
    why = "the C++ kernels are not compiled; plain torch and Triton do their work"
    install = "pip install --no-build-isolation -e .  (in the checkout; it says why where it cannot compile)"
    remedy = install if shutil.which("g++") else f"apt-get install g++ && {install}"
    return Finding("vadit._C", "missing", "", why, remedy)


def _backends() -> Iterator[Finding]:
    from vadit import kernels

    for device in ("cpu", "cuda"):
        reasons = kernels.reasons(device)
        for name, backend in kernels.backends(device).items():
            yield Finding(f"kernel {name}", "ok", "", f"on {device}: {backend} ({reasons[name]})")


# ------------------------------------------------------------------------------------------------ optional packages


def _optional(package: OptionalPackage) -> Finding:
    found = distribution(package.distributions)
    if found is None:
        return Finding(package.name, "missing", "", f"not installed ({package.use}); optional", package.remedy)
    return Finding(package.name, "ok", found[1], package.use)


def _apex() -> Finding:
    """NVIDIA's apex has apex.normalization and apex.optimizers; the `apex` of PyPI is a web toolkit without them."""
    use = "optimizer.kind apex_fused (its norms are not used); without it torch's fused AdamW"
    found = distribution("apex")
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    parts = ("normalization", "optimizers")
    real = any(all((Path(folder) / part).is_dir() for part in parts) for folder in folders)
    if real:
        return Finding("apex", "ok", found[1] if found else "", use)
    if found or spec:
        version = f" {found[1]}" if found else ""
        why = f"the installed apex{version} is another project (PyPI's `apex`), not NVIDIA's"
        return Finding("apex", "missing", "", why, f"pip uninstall apex && {NVIDIA_APEX}")
    why = f"not installed ({use}); optional. PyPI's `apex` is another project: do not pip install it"
    return Finding("apex", "missing", "", why, NVIDIA_APEX)


# ------------------------------------------------------------------------------------------------ DeepSpeed


def _deepspeed() -> list[Finding]:
    found = distribution("deepspeed")
    if found is None:
        return [Finding("DeepSpeed", "missing", "", "the engine of both trainers", "pip install deepspeed")]
    # It probes compilers and prints what it misses; the table below says the same in one line each.
    with _quiet():
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        states = {
            name: (bool(installed_ops.get(name)), builder.is_compatible(verbose=False), builder.BUILD_VAR)
            for name, builder in ALL_OPS.items()
            if name != "deepspeed_not_implemented"
        }
    findings = [Finding("DeepSpeed", "ok", found[1], f"{len(states)} ops for this accelerator")]
    for name, (installed, compatible, variable) in states.items():
        if installed:
            findings.append(Finding(f"DeepSpeed {name}", "ok", "", "built in"))
        elif compatible:
            findings.append(Finding(f"DeepSpeed {name}", "ok", "", "builds at first use (ninja, some seconds)"))
        else:
            why = "its compiler or libraries are not here; only needed by runs that ask for it"
            build = f"{variable}=1 pip install --no-build-isolation deepspeed  (says what it misses)"
            remedy = OP_LIBRARIES.get(name, build)
            findings.append(Finding(f"DeepSpeed {name}", "missing", "", why, remedy))
    return findings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence prints, logging, and what child processes write to the two streams."""
    import logging

    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    saved = {stream: os.dup(stream) for stream in (1, 2)}
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in saved:
            os.dup2(null, stream)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for stream, copy in saved.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)
        logging.disable(previous)
