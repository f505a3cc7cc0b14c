"""KServe's `utils` package."""
