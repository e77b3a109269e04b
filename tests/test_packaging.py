"""The object that ships: built and loaded without a GPU, bound to nothing but torch's stable ABI, and optional."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILT = sorted((ROOT / "bigkern").glob("_C*.so"))
REQUIRED = os.environ.get("BIGKERN_EXT") == "1"

needs_extension = pytest.mark.skipif(
    not BUILT and not REQUIRED, reason="bigkern/_C*.so is not built (no nvcc); BIGKERN_EXT=1 makes this a failure"
)


@pytest.fixture
def built() -> Path:
    assert len(BUILT) == 1, f"expected one bigkern/_C*.so, got {BUILT}"
    return BUILT[0]


def dynamic_section(path: Path) -> str:
    return subprocess.run(["readelf", "-d", "-W", str(path)], capture_output=True, text=True, check=True).stdout


@needs_extension
@pytest.mark.compiled
def test_extension_loads_and_registers_without_a_gpu(built):
    script = """
import torch
from bigkern.ops import _extension
assert _extension.load() is None, _extension.load()
import bigkern.ops
declared = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bigkern_cuda::")]
assert "bigkern_cuda::layer_norm_forward" in declared, declared
for op in declared:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"), op
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"), op
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@needs_extension
@pytest.mark.compiled
def test_extension_needs_libtorch_and_no_cuda_library(built):
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic_section(built))
    # Through libtorch.so alone the loader finds torch's current CUDA stream (CONTRIBUTING.md).
    assert "libtorch.so" in needed
    for name in needed:
        assert not re.match(r"lib(cuda|cudart|c10_cuda|torch_cuda|torch_python|python)", name), name


@needs_extension
@pytest.mark.compiled
def test_extension_uses_the_stable_abi_only(built):
    """No C++ symbol of torch's: those change between releases, the C shim does not."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(built)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch") for symbol in symbols)
    assert not [symbol for symbol in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)", symbol)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_backend_without_a_gpu_says_why():
    """In its own process: here the emulated kernels may be loaded."""
    script = """
import torch, bigkern
available, reason = bigkern.backends()["cuda"]
assert not available and reason, (available, reason)
with bigkern.use_backend("cuda"):
    try:
        bigkern.ops.layer_norm(torch.randn(2, 8), (8,))
    except bigkern.BackendError as error:
        assert all(f"{name}: " in str(error) for name in ("cuda", "triton", "torch")), error
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@needs_extension
@pytest.mark.compiled
def test_raw_op_on_a_cpu_tensor_is_refused_clearly(built):
    script = """
import torch, bigkern.ops
try:
    torch.ops.bigkern_cuda.layer_norm_forward(torch.randn(2, 8), None, None, None, 1e-5, False, 0.0, None)
except NotImplementedError as error:
    assert "bigkern_cuda::layer_norm_forward" in str(error) and "CPU" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def run_setup(monkeypatch, capsys, **environment) -> tuple[dict, str]:
    """setup.py with setuptools.setup replaced: what it would have built, and what it said."""
    import setuptools

    for name in ("BIGKERN_EXT", "BIGKERN_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    called = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: called.update(kwargs, called=True))
    runpy.run_path(str(ROOT / "setup.py"))
    return called, capsys.readouterr().out


def hide_nvcc(monkeypatch):
    exists, which = Path.exists, shutil.which
    monkeypatch.setattr(Path, "exists", lambda self, **kw: self.name != "nvcc" and exists(self, **kw))
    monkeypatch.setattr(shutil, "which", lambda name, *args, **kw: None if name == "nvcc" else which(name, *args, **kw))


def test_setup_without_nvcc_is_pure_python_and_says_so(monkeypatch, capsys):
    hide_nvcc(monkeypatch)
    called, said = run_setup(monkeypatch, capsys)
    assert called == {"called": True}
    assert len(said.splitlines()) == 1
    assert "no nvcc" in said and "--no-build-isolation" in said


@pytest.mark.parametrize("switch", ["BIGKERN_EXT", "BIGKERN_CUDA"])
def test_setup_fails_when_the_extension_is_asked_for(monkeypatch, capsys, switch):
    hide_nvcc(monkeypatch)
    with pytest.raises(SystemExit, match="no nvcc"):
        run_setup(monkeypatch, capsys, **{switch: "1"})


def test_setup_can_be_told_not_to_build(monkeypatch, capsys):
    called, said = run_setup(monkeypatch, capsys, BIGKERN_EXT="0")
    assert "ext_modules" not in called and "BIGKERN_EXT=0" in said


def test_setup_without_torch_is_pure_python(monkeypatch, capsys):
    """As in an isolated build."""
    if not shutil.which("nvcc") and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("no nvcc here: that reason comes first")
    monkeypatch.setitem(sys.modules, "torch", None)
    called, said = run_setup(monkeypatch, capsys)
    assert "ext_modules" not in called and "torch is not in the build environment" in said


@pytest.mark.parametrize(
    ("archs", "hopper"), [("8.0;9.0", True), ("9.0a", True), ("9.0+PTX", True), ("8.0+PTX", False)]
)
def test_hopper_is_built_for_what_only_it_has_or_left_out(monkeypatch, capsys, archs, hopper):
    """Kernels of sm_90a are empty in code for plain sm_90, and launchers must know which of them is there."""
    called, said = run_setup(monkeypatch, capsys, TORCH_CUDA_ARCH_LIST=archs)
    if "ext_modules" not in called:
        pytest.skip(said)
    flags = called["ext_modules"][0].extra_compile_args["nvcc"]
    assert ("-DBK_SM90A" in flags) == any("code=sm_90a" in flag for flag in flags) == hopper
    assert not any(flag.endswith("code=sm_90") for flag in flags)


@pytest.fixture
def steady(monkeypatch, tmp_path):
    """setup.py's build_until_steady; a header; the mark of a build that runs."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.setenv("BIGKERN_EXT", "0")
    monkeypatch.delenv("BIGKERN_CUDA", raising=False)
    header = tmp_path / "csrc/kernels/norm.cuh"
    header.parent.mkdir(parents=True)
    header.write_text("old")
    os.utime(header, (1e9, 1e9))
    return runpy.run_path(str(ROOT / "setup.py"))["build_until_steady"], header, tmp_path / "build/unfinished"


class Ninja:
    """Compiles a header when it is newer than the object: reads it, lets ``during`` happen, and writes what it read."""

    def __init__(self, header: Path):
        self.header, self.made = header, header.parents[2] / "norm.o"
        self.during = lambda: None

    def __call__(self):
        if self.made.exists() and self.made.stat().st_mtime_ns >= self.header.stat().st_mtime_ns:
            return
        read, during = self.header.read_text(), self.during
        self.during = lambda: None
        time.sleep(0.02)  # as file systems count time
        during()
        time.sleep(0.02)
        self.made.write_text(read)


def test_an_edit_during_the_build_is_built_again(steady, capsys):
    build_until_steady, header, mark = steady
    ninja = Ninja(header)
    ninja.during = lambda: header.write_text("new")
    build_until_steady(ninja, header.parents[1], mark)
    assert ninja.made.read_text() == "new" and not mark.exists()
    assert "edited during the build, building again: norm.cuh" in capsys.readouterr().out
    build_until_steady(ninja, header.parents[1], mark)
    assert capsys.readouterr().out == ""


def test_an_edit_before_the_build_was_interrupted_is_built(steady):
    build_until_steady, header, mark = steady
    ninja = Ninja(header)
    ninja.during = lambda: header.write_text("new")

    def interrupted():
        ninja()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_until_steady(interrupted, header.parents[1], mark)
    ninja()
    assert ninja.made.read_text() == "old", "ninja alone would have seen it: the test shows nothing"
    build_until_steady(ninja, header.parents[1], mark)
    assert ninja.made.read_text() == "new" and not mark.exists()


@pytest.mark.slow
def test_sdist_builds_a_wheel_with_the_extension(tmp_path):
    """What pip does with the source distribution; needs nvcc."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, env=os.environ | {"BIGKERN_EXT": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"})
    (wheel,) = tmp_path.glob("*.whl")
    assert "abi3" in wheel.name
    import zipfile

    assert any(name.startswith("bigkern/_C") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.skipif("BIGKERN_OTHER_PYTHON" not in os.environ, reason="BIGKERN_OTHER_PYTHON names no second interpreter")
def test_one_file_loads_under_another_torch(built):
    """The same file, in the interpreter BIGKERN_OTHER_PYTHON names, whose torch is another release or a CUDA build."""
    script = f"""
import torch
torch.ops.load_library({str(built)!r})
assert torch._C._dispatch_has_kernel_for_dispatch_key("bigkern_cuda::layer_norm_forward", "CUDA")
print(torch.__version__)
"""
    subprocess.run([os.environ["BIGKERN_OTHER_PYTHON"], "-c", script], check=True, cwd="/")
