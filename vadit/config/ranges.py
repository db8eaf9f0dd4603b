"""What a Spec asks of its own numbers."""

from __future__ import annotations

from typing import Any

from vadit.runtime.errors import UsageError


def at_least(group: str, spec: Any, **lowest: float) -> None:
    """Refuse the first of the named settings of `group` that lies below its lowest value; None is left out."""
    for name, low in lowest.items():
        value = getattr(spec, name)
        if value is not None and not value >= low:
            raise UsageError(f"{group}.{name} is {value}; it must be at least {low}")
