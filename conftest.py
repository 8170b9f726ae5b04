"""Doctests of edu/fast are collected only where numba, which its kernels need, is installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("numba") else ["edu/fast/cpu_*.py"]
