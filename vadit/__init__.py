"""vadit: a performance-engineered distributed trainer for VA-VAE and LightningDiT."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

__version__ = "0.1.0"

_OPS = Path(__file__).parents[1] / "kernels" / "ops"


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
