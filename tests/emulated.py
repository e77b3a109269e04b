"""Builds the CUDA kernels for the emulator and loads them.

    control = load("plain")                 # registers bigkern_cuda::* for CPU tensors
    control.set_options(order="priority", seed=3)

There are three builds: ``plain``; ``asan``, under AddressSanitizer, which must be preloaded (``environment("asan")``
gives a subprocess what it needs); and ``race``, with the race checker and exact counts of the bytes moved. A process
loads one.

``build_library`` compiles a few sources against the emulator, with text replaced in them if asked: tests of the
emulator itself, and of planted bugs, load the result with ``open_library``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "emulated"
BUILDS = ("plain", "asan", "race")

_MODULE = "bigkern_emulator"
_KEPT_LIBRARIES = 3
_loaded: dict[str, ModuleType] = {}
_controls: list[ModuleType] = []

_COMMON = [
    "-std=c++17",
    "-fPIC",
    "-g1",
    "-fno-strict-aliasing",  # kernels read memory as wider vectors
    "-ffp-contract=off",  # the same bits whatever the compiler
    "-fno-gnu-unique",  # several libraries with an emulator each may share a process
    "-pthread",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DBK_EMULATE",
]
if platform.machine() == "x86_64":
    # threadIdx is a thread-local read: descriptors make it cheap without claiming the process's few static slots.
    _COMMON.append("-mtls-dialect=gnu2")
# The emulator answers the sanitizers' calls itself (alignment.cpp, race_hooks.cpp): only ASan brings a runtime library.
_ALIGNMENT = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
_EMULATOR_FLAGS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    "race": ["-O2", "-DBK_EMULATE_RACE"],
}
_KERNEL_FLAGS = {
    "plain": ["-O2", *_ALIGNMENT],
    "asan": ["-O1", "-fsanitize=address", "-fno-omit-frame-pointer", *_ALIGNMENT],
    "race": [
        "-O2",
        "-DBK_EMULATE_RACE",
        "-fsanitize=thread",
        "--param=tsan-distinguish-volatile=1",
        "-Wno-tsan",
        *_ALIGNMENT,
    ],
}
_LINK_FLAGS = {
    "plain": [],
    "asan": ["-fsanitize=address"],
    # Copies the compiler leaves to the C library are accesses of the kernel too.
    "race": ["-Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset"],
}


class Library(NamedTuple):
    """A library of kernels with an emulator of its own: its C functions, and its emulator's control module."""

    functions: ctypes.CDLL
    control: ModuleType


def load(build: str = "plain") -> ModuleType:
    """Builds what has changed, loads the emulated kernels and returns the emulator's control module.

    Raises:
        RuntimeError: another build is loaded, AddressSanitizer is not preloaded, or the build fails.
    """
    _check(build)
    if build in _loaded:
        return _loaded[build]
    if _loaded:
        raise RuntimeError(f"this process has loaded the {next(iter(_loaded))} build; {build} needs its own")
    import torch  # noqa: F401  its libraries must be there before ours

    _loaded[build] = _open(_build_all(build), build)
    return _loaded[build]


def launches() -> int:
    """Kernels this process has launched on the emulator."""
    return sum(control.counters()["launches"] for control in _controls)


def environment(build: str) -> dict[str, str]:
    """What a subprocess that loads the build needs beside this process's environment. Builds nothing."""
    _check(build)
    if build != "asan":
        return {}
    libraries = [_print_file_name("libasan.so"), _print_file_name("libstdc++.so")]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def open_library(path: Path, build: str = "plain") -> Library:
    """Loads what build_library made."""
    control = _open(path, build)
    return Library(ctypes.CDLL(str(path)), control)


def build_library(
    sources: Sequence[Path | str],
    build: str,
    name: str,
    extra_flags: Iterable[str] = (),
    replace: Mapping[Path | str, tuple[str, str] | Sequence[tuple[str, str]]] | None = None,
) -> Path:
    """Compiles the sources against the emulator and returns the shared library.

    Args:
        sources: paths from the repository's root, or absolute ones within it. Only these are compiled; sources of
            ``csrc/torch`` register their ops when the library is loaded.
        build: one of BUILDS.
        name: names the library's folder.
        extra_flags: for the compiler, for example ``-D...``.
        replace: by path from the repository's root, the text to replace and its replacement, or several such pairs.
            The text must occur exactly once. Files of the emulator cannot be changed.

    Raises:
        ValueError: a text does not occur exactly once.
        RuntimeError: the sources do not compile.
    """
    _check(build)
    paths = [_relative(source) for source in sources]
    tree = {path: (ROOT / path).read_text() for path in [*_tree(CSRC), *paths]}
    for path, pairs in (replace or {}).items():
        path = _relative(path)
        if path.is_relative_to("csrc/emulator"):
            raise ValueError(f"{path}: the emulator is compiled once for all libraries")
        if isinstance(pairs[0], str):
            pairs = [pairs]
        for old, new in pairs:
            found = tree[path].count(old)
            if found != 1:
                raise ValueError(f"{path}: the text to replace occurs {found} times, not once: {old!r}")
            tree[path] = tree[path].replace(old, new)

    toolchain = _toolchain(build)
    flags = list(extra_flags)
    key = _hash(toolchain.key, *flags, *(f"{path}\n{text}" for path, text in sorted(tree.items())), *map(str, paths))
    folder = toolchain.folder / "libraries" / f"{name}-{key}"
    library = folder / f"{name}.so"
    if library.exists():
        return library
    with _lock(folder):
        if library.exists():
            return library
        objects = _build_emulator(toolchain)
        for path, text in tree.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        rules = _Rules(toolchain, folder, folder / "csrc")
        objects += [rules.compile(folder / path, flags) for path in paths]
        rules.link(library, objects, torch=any(path.is_relative_to("csrc/torch") for path in paths))
        with _lock(toolchain.folder / "emulator", shared=True):
            rules.run([library])
    return library


# ---- the toolchain


class _Toolchain(NamedTuple):
    build: str
    compiler: str
    includes: list[str]
    torch_includes: list[str]
    torch_libraries: str
    key: str
    folder: Path


@cache
def _toolchain(build: str) -> _Toolchain:
    import torch
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    includes = [str(path) for path in _cuda_includes()] + [_pybind11_include(), sysconfig.get_path("include")]
    flags = [*_COMMON, *_EMULATOR_FLAGS[build], *_KERNEL_FLAGS[build], *_LINK_FLAGS[build]]
    key = _hash(version, *flags, *includes, torch.__version__, sys.version)
    return _Toolchain(
        build=build,
        compiler=compiler,
        includes=includes,
        torch_includes=cpp_extension.include_paths(),
        torch_libraries=str(Path(torch.__file__).parent / "lib"),
        key=key,
        folder=FOLDER / f"{build}-{key}",
    )


def _pybind11_include() -> str:
    """pybind11's headers: the package's, or the copy that torch carries, as on a GPU machine without a network."""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    import torch

    return str(Path(torch.__file__).parent / "include")


def _cuda_includes() -> list[Path]:
    """The folders of CUDA's headers: a toolkit's, or those of NVIDIA's wheels."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        toolkits.append(str(Path(nvcc).resolve().parent.parent))
    candidates = [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    candidates += sorted(Path("/usr/local").glob("cuda-*/include"), reverse=True)
    candidates += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"), reverse=True)
    for folder in candidates:
        if (folder / "cuda_bf16.h").exists() and (folder / "crt" / "host_defines.h").exists():
            return [path for path in (folder, folder / "cccl") if path.is_dir()]
    raise RuntimeError(
        "the emulated build needs CUDA's headers: install a CUDA toolkit, or "
        "`pip install nvidia-cuda-runtime nvidia-cuda-crt`"
    )


def _print_file_name(library: str) -> str:
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# ---- building


class _Rules:
    """A ninja file under construction."""

    def __init__(self, toolchain: _Toolchain, folder: Path, csrc: Path):
        self._toolchain = toolchain
        self._folder = folder
        self._csrc = csrc
        self._lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            "  command = $compiler $flags -MMD -MF $out.d -x c++ -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            # Complete or absent: another process may look for it.
            "  command = $compiler -shared $in -o $out.part $flags && mv $out.part $out",
            "  description = link $out",
            f"compiler = {toolchain.compiler}",
        ]

    def compile(self, source: Path, extra_flags: Sequence[str] = ()) -> Path:
        toolchain = self._toolchain
        relative = source.relative_to(self._csrc.parent)
        kind = relative.parts[1] if relative.parts[0] == "csrc" else ""
        flags = list(_COMMON)
        if kind == "torch":  # host code: only ASan sees through it
            flags += _EMULATOR_FLAGS[toolchain.build]
            flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DBK_DISPATCH_KEY=CPU"]
        else:
            flags += (_EMULATOR_FLAGS if kind == "emulator" else _KERNEL_FLAGS)[toolchain.build]
        # Messages name files from the root, also those of a changed copy.
        root = self._csrc.parent
        flags += [f"-I{self._csrc}", f"-ffile-prefix-map={root}/=", f"-fdebug-prefix-map={self._folder}=."]
        includes = toolchain.includes + (toolchain.torch_includes if kind == "torch" else [])
        flags += [f"-isystem {path}" for path in includes]
        target = self._folder / "objects" / relative.with_suffix(relative.suffix + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._lines += [
            f"build {_escape(target)}: compile {_escape(source)}",
            f"  flags = {' '.join([*flags, *extra_flags])}",
        ]
        return target

    def link(self, library: Path, objects: Sequence[Path], torch: bool) -> None:
        flags = [*_COMMON, *_LINK_FLAGS[self._toolchain.build], "-Wl,-Bsymbolic"]
        if torch:
            folder = self._toolchain.torch_libraries
            flags += [f"-L{folder}", f"-Wl,-rpath,{folder}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        inputs = " ".join(map(_escape, objects))
        self._lines += [f"build {_escape(library)}: link {inputs}", f"  flags = {' '.join(flags)} -ldl"]

    def run(self, targets: Sequence[Path]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "build.ninja").write_text("\n".join(self._lines) + "\n")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        command = [_ninja(), "-C", str(self._folder), "-j", jobs, *map(str, targets)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"the {self._toolchain.build} emulated build failed:\n{result.stdout[-20000:]}")


def _build_all(build: str) -> Path:
    """The library of all kernels and bindings, named by the content of csrc: rebuilt exactly when that changes."""
    toolchain = _toolchain(build)
    library = _library_path(toolchain)
    if library.exists():
        return library
    with _lock(toolchain.folder / "all"):
        while not (library := _library_path(toolchain)).exists():
            objects = _build_emulator(toolchain)
            rules = _Rules(toolchain, toolchain.folder / "all", CSRC)
            bindings = sorted(CSRC.glob("torch/*.cpp"))
            objects += [rules.compile(source) for source in [*sorted(CSRC.glob("kernels/*.cu")), *bindings]]
            library.parent.mkdir(parents=True, exist_ok=True)
            rules.link(library, objects, torch=bool(bindings))
            with _lock(toolchain.folder / "emulator", shared=True):
                rules.run([library])
            if library != _library_path(toolchain):  # a source changed while it was compiled
                library.unlink()
        _prune(library.parent.parent)
    return library


def _library_path(toolchain: _Toolchain) -> Path:
    content = _hash(*(f"{path}\n{(ROOT / path).read_text()}" for path in _tree(CSRC)))
    return toolchain.folder / "all" / "libraries" / content / f"{_MODULE}.so"


def _build_emulator(toolchain: _Toolchain) -> list[Path]:
    """The emulator's objects, which all libraries of a build share."""
    folder = toolchain.folder / "emulator"
    with _lock(folder):
        rules = _Rules(toolchain, folder, CSRC)
        objects = [rules.compile(source) for source in sorted(CSRC.glob("emulator/*.cpp"))]
        rules.run(objects)
    return objects


def _prune(folder: Path) -> None:
    libraries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in libraries[_KEPT_LIBRARIES:]:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, shared: bool = False):
    """One process at a time builds in a folder; any number may read what lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def _open(path: Path, build: str) -> ModuleType:
    if build == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("the asan build needs a process started with tests.emulated.environment('asan')")
    # pybind11 keeps one module for each full name, and every library has its own.
    name = f"{hashlib.sha256(str(path).encode()).hexdigest()[:12]}.{_MODULE}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.ExtensionFileLoader(name, str(path)))
    control = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(control)
    _controls.append(control)
    return control


def _check(build: str) -> None:
    if build not in BUILDS:
        raise ValueError(f"build: got {build!r}, expected one of {', '.join(BUILDS)}")


def _relative(path: Path | str) -> Path:
    path = Path(path)
    return path.relative_to(ROOT) if path.is_absolute() else path


def _tree(folder: Path) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in folder.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _escape(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


def _ninja() -> str:
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if not found:
        raise RuntimeError("the emulated build needs ninja: `pip install ninja`")
    return found
