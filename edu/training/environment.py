"""Machine and versions that a run's results depend on."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy")


def environment() -> dict[str, str]:
    """The machine and the versions that a run's figures depend on, by name."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found |= {"CPU": _cpu_name(), "cores": str(cores)}
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    gpus = _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return found | {"GPU": ", ".join(gpus) or "none", "platform": platform.platform()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    told = match.group(1).strip() if match else _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    return told or platform.processor() or platform.machine()


def _output_of(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
