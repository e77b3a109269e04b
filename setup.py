"""Builds bigkern/_C.abi3.so, the CUDA kernels on torch's stable ABI, where nvcc is; pure Python where it is not.

Environment:
    BIGKERN_EXT=auto|1|0    1: fail when the extension cannot be built; 0: do not try
    BIGKERN_CUDA=auto|1|0   the same, for nvcc alone
    TORCH_CUDA_ARCH_LIST    as torch's; unset: the visible GPUs, or every architecture we ship when there is none
    MAX_JOBS                parallel compile jobs
"""

import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
SHIPPED_ARCHS = "8.0;8.6;8.9;9.0a;10.0a;12.0a"
STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest torch the object loads under
STRICT = "1" in (os.environ.get("BIGKERN_EXT"), os.environ.get("BIGKERN_CUDA"))
SKIP = "0" in (os.environ.get("BIGKERN_EXT"), os.environ.get("BIGKERN_CUDA"))


def find_cuda() -> Path | None:
    """The toolkit: CUDA_HOME, the standard place, nvcc on PATH, then the packages of the [nvcc] extra."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    homes = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        "/usr/local/cuda",
        *sorted(wheels.glob("cu[0-9]*")),
    ]
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper script outside its toolkit: ask it where it lives.
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"TOP=(\S+)", dry):
            homes.insert(3, top[1])
    return next((Path(home).resolve() for home in homes if home and (Path(home) / "bin/nvcc").exists()), None)


def nvcc_version(cuda: Path) -> str:
    said = subprocess.run([cuda / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def visible_archs(torch) -> str:
    """TORCH_CUDA_ARCH_LIST for the GPUs of this machine; 9.0 and later need the architecture-specific target."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(found))


def missing() -> str | None:
    """Why the extension cannot be built here, with the cure."""
    if SKIP:
        return "BIGKERN_EXT=0 or BIGKERN_CUDA=0 is set"
    if find_cuda() is None:
        return (
            "no nvcc: install a CUDA toolkit, or `pip install bigkern[nvcc]`, then `pip install --no-build-isolation .`"
        )
    if not shutil.which(os.environ.get("CXX", "c++")):
        return "no C++ compiler: install g++, then `pip install --no-build-isolation .`"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not in the build environment: `pip install --no-build-isolation .` shows it yours"
    return None


def build_until_steady(build: Callable[[], None], sources: Path, mark: Path) -> None:
    """Call ``build`` until no file under ``sources`` changes while it runs.

    ninja goes by time: an object finished after its header was edited passes for new, though the compiler had read the
    header before. ``mark`` has the time at which a build began, and is left behind by one that did not end.
    """

    def edited() -> list[Path]:
        began = mark.stat().st_mtime_ns
        return sorted(path for path in sources.rglob("*") if path.is_file() and path.stat().st_mtime_ns > began)

    mark.parent.mkdir(parents=True, exist_ok=True)
    late = edited() if mark.exists() else []
    while True:
        mark.touch()
        now = time.time_ns()  # finer than the clock of touch: later than any object's
        for path in (*late, mark):
            os.utime(path, ns=(now, now))
        build()
        late = edited()
        if not late:
            break
        print(f"bigkern: edited during the build, building again: {', '.join(path.name for path in late)}", flush=True)
    mark.unlink()


def extension() -> dict:
    import torch
    from torch.utils import cpp_extension

    cuda = find_cuda()
    # A CPU-only torch forces CUDA_HOME to None although it can compile and load our object; and, having no CUDA version
    # of its own, it would write no header dependencies for nvcc: a changed header would not be compiled again.
    cpp_extension.CUDA_HOME = str(cuda)
    torch.version.cuda = torch.version.cuda or nvcc_version(cuda)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", visible_archs(torch) or SHIPPED_ARCHS)
    targets = cpp_extension._get_cuda_arch_flags()
    # Compute 8.x has one instruction set: one front-end pass (60 % of an architecture's compile time) serves it all.
    ampere = min((int(number) for number in re.findall(r"compute_(8\d)", " ".join(targets))), default=80)
    targets = [re.sub(r"compute_8\d,code=sm_", f"compute_{ampere},code=sm_", target) for target in targets]
    # Hopper's own kernels exist for the architecture-specific target alone; compute_90 of "9.0+PTX" is for later GPUs.
    targets = [re.sub(r"compute_90,code=sm_90$", "compute_90a,code=sm_90a", target) for target in targets]
    hopper = ["-DBK_SM90A"] if any("sm_90a" in target for target in targets) else []
    cccl = [f"-I{path}" for path in (cuda / "include/cccl", cuda / "cccl/include") if path.is_dir()]
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    # torch's helper hides the conversions and operators of __half and __nv_bfloat16.
    shown = [
        f"-U__CUDA_NO_{name}__"
        for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    ]
    # CppExtension, not CUDAExtension: that one links libc10_cuda, which a CPU-only torch lacks and we do not need.
    module = cpp_extension.CppExtension(
        "bigkern._C",
        sorted(
            str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/torch/*.cpp"), *ROOT.glob("csrc/kernels/*.cu")]
        ),
        # setuptools asks ninja at all only when one of these is newer than the object.
        depends=[str(path) for path in ROOT.glob("csrc/*/**/*.*h")] + [__file__],
        include_dirs=[str(ROOT / "csrc"), str(cuda / "include")],
        library_dirs=[str(path) for path in (cuda / "lib64", cuda / "lib") if path.is_dir()],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={
            "cxx": ["-O2", "-fvisibility=hidden", *defines],
            "nvcc": [
                "-O3",
                "-std=c++17",
                "-lineinfo",
                "-Xcompiler=-fvisibility=hidden",
                "-Xfatbin=-compress-all",
                *targets,
                *hopper,
                *shown,
                *cccl,
            ],
        },
        # libtorch.so must be a recorded dependency: through it alone the loader finds torch's current stream.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL", "-s"],
        py_limited_api=True,
    )

    class Build(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)):
        def build_extensions(self):
            build_until_steady(super().build_extensions, ROOT / "csrc", Path(self.build_temp) / "unfinished")

    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = missing()
if reason and STRICT and not SKIP:
    raise SystemExit(f"bigkern: the CUDA extension was asked for (BIGKERN_EXT=1 or BIGKERN_CUDA=1) but {reason}")
if reason:
    print(f"bigkern: installing without the CUDA extension: {reason}", flush=True)
setup(**({} if reason else extension()))
