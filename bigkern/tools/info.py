"""``bigkern info``: versions, the GPU, what is built, and each backend with its reason."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import bigkern
from bigkern.tools.report import add_json_argument, print_table, write_json

_PACKAGE = Path(bigkern.__file__).parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)


def main(args: argparse.Namespace) -> int:
    found = collect()
    if write_json(args.json, found):
        return 0
    print_table(
        "Versions", ("what", "version"), [(name, value or "not found") for name, value in found["versions"].items()]
    )
    gpus = [(gpu["name"], gpu["capability"], gpu["memory"]) for gpu in found["gpus"]]
    print_table("GPUs", ("name", "capability", "memory"), gpus)
    extension = found["extension"]
    print_table(
        "Compiled kernels",
        ("file", "GPU architectures"),
        [(extension["path"], ", ".join(extension["architectures"]) or extension["note"])]
        if extension["path"]
        else [("none", extension["note"])],
    )
    print_table(
        "Backends",
        ("backend", "state", "reason"),
        [
            (name, "available" if state["available"] else "unavailable", state["reason"])
            for name, state in found["backends"].items()
        ],
    )
    return 0


def collect() -> dict[str, Any]:
    """Everything the command prints, as plain data."""
    return {
        "versions": _versions(),
        "gpus": _gpus(),
        "extension": _extension(),
        "backends": {
            name: {"available": state.available, "reason": state.reason} for name, state in bigkern.backends().items()
        },
        "requested_backend": os.environ.get("BIGKERN_BACKEND") or None,
    }


def _versions() -> dict[str, str | None]:
    return {
        "bigkern": bigkern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _distribution_version("triton"),
        "CUDA of torch": torch.version.cuda,
        "NVIDIA driver": _driver_version(),
        "nvcc": _nvcc_version(),
        "system": platform.platform(),
    }


def _distribution_version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _driver_version() -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
        return found and found.group(1)
    return None


def _toolkit_program(name: str) -> str | None:
    """A CUDA program, from the environment's toolkit, the path, the usual place, or a package from PyPI."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            candidate = Path(root) / "bin" / name
            if candidate.exists():
                return str(candidate)
    if found := shutil.which(name):
        return found
    roots = [Path("/usr/local/cuda/bin")]
    for package, folder in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            roots.extend(Path(location).glob(folder))
    return next((str(root / name) for root in roots if (root / name).exists()), None)


def _output(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return None


def _nvcc_version() -> str | None:
    nvcc = _toolkit_program("nvcc")
    found = re.search(r"release [\d.]+, V([\d.]+)", _output(nvcc, "--version") or "") if nvcc else None
    return f"{found.group(1)} ({nvcc})" if found else None


def _gpus() -> list[dict[str, str]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            }
        )
    return gpus


def _extension() -> dict[str, Any]:
    """The compiled extension and the architectures inside it, read from the file itself."""
    path = next(iter(sorted(_PACKAGE.glob("_C*.so"))), None)
    if path is None:
        return {"path": None, "architectures": [], "note": "this installation has no compiled CUDA kernels"}
    cuobjdump = _toolkit_program("cuobjdump")
    if cuobjdump is None:
        return {"path": str(path), "architectures": [], "note": "unknown: cuobjdump is not installed"}
    listing = _output(cuobjdump, "--list-elf", "--list-ptx", str(path))
    if listing is None:
        return {"path": str(path), "architectures": [], "note": "unknown: cuobjdump could not read the file"}
    binaries = set(re.findall(r"\.(sm_\w+)\.cubin", listing))
    ptx = {f"{name} (PTX)" for name in re.findall(r"\.(\w+)\.ptx", listing)}
    return {"path": str(path), "architectures": sorted(binaries | ptx), "note": "" if binaries | ptx else "none inside"}
