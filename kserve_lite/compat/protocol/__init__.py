"""KServe's `protocol` package."""
