"""KServe's `constants` package."""
