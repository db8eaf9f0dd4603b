"""vadit: a performance-engineered distributed trainer for VA-VAE and LightningDiT.

What `__all__` names is what users may rely on; each name is loaded when it is first asked for, so that `import vadit`
needs no torch.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "LightningDiT": "vadit.models.dit",
    "Autoencoder": "vadit.models.autoencoder",
    "load_reference_dit": "vadit.models.interop",
    "load_reference_autoencoder": "vadit.models.interop",
    "sample_ode": "vadit.sampling.solvers",
    "LatentDataset": "vadit.latents.dataset",
    "LatentLoader": "vadit.latents.loader",
}
__all__ = list(_HOMES)

_OPS = Path(__file__).parents[1] / "kernels" / "ops"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vadit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _KernelsOfCheckout:
    """Finds vadit.kernels where a checkout is used without installing it (PYTHONPATH): there it lies in kernels/ops."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "vadit.kernels":
            return None
        file = _OPS / "__init__.py"
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(_OPS)])


if _OPS.is_dir():
    sys.meta_path.append(_KernelsOfCheckout)  # type: ignore[arg-type]  # asked last, after every installed package
