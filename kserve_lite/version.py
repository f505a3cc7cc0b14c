"""The version of the package, as a plain value."""

__version__ = "0.1.0"
