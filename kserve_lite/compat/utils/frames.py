"""pandas, which is imported only by those who ask for data frames."""

from __future__ import annotations

from typing import Any


def pandas() -> Any:
    """Return the package; raise ImportError that says how to get it."""
    try:
        import pandas as pd  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "Data frames need pandas, which is not installed: pip install pandas"
        ) from error
    return pd


def is_frame(value: object) -> bool:
    """Whether a value is a pandas DataFrame; imports nothing."""
    module = type(value).__module__
    return module.startswith("pandas.") and type(value).__name__ == "DataFrame"
