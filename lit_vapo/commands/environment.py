"""`lit-vapo env`: what to paste into a report of a fault."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys

from lit_vapo import __version__

OPTIONAL = ("vllm", "deepspeed", "flash-attn")


def environment() -> None:
    """Print versions, devices and memory; no paths, no variables, no names."""
    found = facts()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")


def facts() -> dict[str, str]:
    """What a report of a fault should say of the machine and what is installed on it."""
    import torch

    found = {"lit-vapo": __version__} | {name: _version(name) for name in (*_requirements(), *OPTIONAL)}
    found["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processors"] = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"
    if sys.platform == "linux":
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    found["free disk"] = f"{shutil.disk_usage(os.getcwd()).free / 2**30:.0f} GiB"
    found["CUDA"] = f"{torch.version.cuda or 'none'}"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found[f"GPU {i}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return found


def _requirements() -> list[str]:
    """The packages that lit_vapo needs, as it was installed, without those of its extras."""
    lines = importlib.metadata.requires("lit-vapo") or []
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
