"""The version of this package, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mlx-dgemma")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"
