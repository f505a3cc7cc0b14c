"""`python -m kserve_lite` is `kserve-lite`."""

from __future__ import annotations

from kserve_lite.cli import main

if __name__ == "__main__":
    main()
