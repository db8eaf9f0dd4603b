"""`vadit doctor`: the accelerations of this machine with versions, and for each that is missing why and what brings it.

Optional packages are looked up by their metadata and never imported: a broken one must not break the doctor.
"""

import importlib.util
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    detail: str  # what it is good for, or why it is missing
    version: str = ""
    remedy: str = ""  # the command that brings what is missing; empty for what is there

    @property
    def state(self) -> Literal["ok", "missing"]:
        """Whether it is there."""
        return "missing" if self.remedy else "ok"


OPTIONAL_PACKAGES = {
    r"flash[-_]attn": Finding(
        "flash-attn",
        "attention: engine.attention flash_attn_2, or auto; without it torch's own, which has flash kernels, too",
        remedy="pip install flash-attn --no-build-isolation  (builds for hours; needs nvcc)",
    ),
    r"flash[-_]attn[-_]3": Finding(
        "flash-attn 3",
        "attention on Hopper: engine.attention flash_attn_3, or auto",
        remedy="git clone https://github.com/Dao-AILab/flash-attention && pip install --no-build-isolation "
        "./flash-attention/hopper  (builds for hours; needs nvcc)",
    ),
    "torchao": Finding(
        "torchao", "float8 in the generator's blocks: engine.float8", remedy="pip install -c constraints.txt torchao"
    ),
    r"nvidia[-_]dali[-_]cuda\d+": Finding(
        "DALI",
        "decoding of JPEGs: data.loader dali, or auto",
        remedy="pip install -c constraints.txt nvidia-dali-cuda130",
    ),
    "ffcv": Finding(
        "FFCV",
        "a loader of packed images",
        remedy="apt-get install libopencv-dev libturbojpeg0-dev pkg-config && pip install ffcv==1.0.2",
    ),
}
"""By a regular expression of the distributions that carry each: what it is good for, and what brings it."""

NVIDIA_APEX = (
    "git clone https://github.com/NVIDIA/apex && pip install -v --no-build-isolation "
    '--config-settings "--build-option=--cpp_ext --cuda_ext" ./apex'
)


def examine() -> list[Finding]:
    """Everything that the doctor looks at, in the order of the report; takes seconds (torch)."""
    return [
        Finding("Python", platform.platform(), platform.python_version()),
        *_torch(),
        _compiler(),
        _extension(),
        *_backends(),
        *_optional(),
        _apex(),
        Finding("DeepSpeed", "the engine of both trainers; its compiled ops go unused", metadata.version("deepspeed")),
    ]


def report(findings: list[Finding]) -> Table:
    table = Table(title="vadit doctor", title_justify="left", show_lines=False)
    for column in ("what", "state", "version", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        colour = "green" if finding.state == "ok" else "yellow"
        detail = finding.detail + (f"\n-> {finding.remedy}" if finding.remedy else "")
        table.add_row(finding.name, Text(finding.state, colour), finding.version, detail)
    return table


def version_of(pattern: str) -> str:
    """Version of the installed distribution whose name matches `pattern` whole; empty where there is none."""
    found = (each for each in metadata.distributions() if re.fullmatch(pattern, each.metadata["Name"] or "", re.I))
    return next((each.version for each in found), "")


def _torch() -> Iterator[Finding]:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Finding("torch", f"{build}; {torch.get_num_threads()} CPU threads", torch.__version__)
    driver = _driver()
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        sizes = [f"{card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}" for card in cards]
        names = ", ".join(f"{card.name} ({size})" for card, size in zip(cards, sizes, strict=True))
        yield Finding("CUDA", f"driver {driver}; {names}", torch.version.cuda or "")
    elif torch.version.cuda is None:
        remedy = "pip install --force-reinstall -c constraints.txt torch"
        yield Finding("CUDA", "this torch is a CPU build", remedy=remedy)
    elif driver is None:
        remedy = "install your GPU's NVIDIA driver (nvidia-smi shows it)"
        yield Finding("CUDA", "no NVIDIA driver is loaded; everything runs on the CPU", remedy=remedy)
    else:
        why = f"driver {driver} is loaded, but torch sees no GPU: too old for CUDA {torch.version.cuda}, or hidden"
        yield Finding("CUDA", why, remedy="check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if triton := version_of("triton"):
        used = "fused GPU kernels" if torch.cuda.is_available() else "installed; its kernels need a GPU"
        yield Finding("Triton", used, triton)
    else:
        yield Finding("Triton", "fused GPU kernels", remedy="pip install triton")


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", path.read_text()) if path.is_file() else None
    return match[1] if match else None


def _compiler() -> Finding:
    tools = {name: shutil.which(name) for name in ("g++", "ninja", "nvcc")}
    if tools["g++"] is None:
        return Finding("compilers", "no g++: nothing can be compiled here", remedy="apt-get install g++")
    found = ", ".join(f"{name} {path}" for name, path in tools.items() if path)
    return Finding("compilers", found + ("" if tools["nvcc"] else "; no nvcc: CUDA code is not compiled"))


def _extension() -> Finding:
    import vadit

    files = sorted(Path(vadit.__file__).parent.glob("_C*.so"))
    if files:
        return Finding("vadit._C", f"compiled kernels: {files[0].name}", vadit.__version__)
    install = "pip install --no-build-isolation -e .  (in the checkout; it says why where it cannot compile)"
    remedy = install if shutil.which("g++") else f"apt-get install g++ && {install}"
    return Finding("vadit._C", "not compiled; plain torch and Triton do the work of the C++ kernels", remedy=remedy)


def _backends() -> Iterator[Finding]:
    from vadit import kernels

    for device in ("cpu", "cuda"):
        reasons = kernels.reasons(device)
        for name, backend in kernels.backends(device).items():
            yield Finding(f"kernel {name}", f"on {device}: {backend} ({reasons[name]})")


def _optional() -> Iterator[Finding]:
    for pattern, package in OPTIONAL_PACKAGES.items():
        if version := version_of(pattern):
            yield replace(package, version=version, remedy="")
        else:
            yield replace(package, detail=f"not installed ({package.detail}); optional")


def _apex() -> Finding:
    """NVIDIA's apex has apex.normalization and apex.optimizers; the `apex` of PyPI is a web toolkit without them."""
    use = "optimizer.kind apex_fused (its norms are not used); without it torch's fused AdamW"
    version, spec = version_of("apex"), importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    if any((folder / "normalization").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        return Finding("apex", use, version)
    if version or spec:
        why = f"the installed apex {version} is another project (PyPI's `apex`), not NVIDIA's"
        return Finding("apex", why, remedy=f"pip uninstall apex && {NVIDIA_APEX}")
    why = f"not installed ({use}); optional. PyPI's `apex` is another project: do not pip install it"
    return Finding("apex", why, remedy=NVIDIA_APEX)
