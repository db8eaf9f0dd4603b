"""Tests are modules of their own (--import-mode=importlib); the helpers that several share lie beside them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
