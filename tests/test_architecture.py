"""The house rules of CONTRIBUTING.md, as tests: who may import whom, what each op must have, what import touches."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bigkern"
CSRC = ROOT / "csrc"

# A layer may import itself and those before it.
LAYERS = ["backend", "ops", "nn", "optim", "models", "integrations", "training", "tools", "acceleration", "cli"]
# nn and optim stand side by side, as do integrations, training and tools: none of them may see the other.
SIDE_BY_SIDE = [{"nn", "optim"}, {"integrations", "tools"}]

OPS = sorted(path.name for path in (PACKAGE / "ops").iterdir() if path.is_dir() and (path / "__init__.py").exists())
EXPECTED_FILES = [
    "csrc/kernels/{op}.h",
    "csrc/kernels/{op}.cuh",
    "csrc/torch/{op}.cpp",
    "bigkern/ops/{op}/__init__.py",
    "bigkern/ops/{op}/_schema.py",
    "bigkern/ops/{op}/_cuda.py",
    "bigkern/ops/{op}/_triton.py",
    "bigkern/ops/{op}/_torch.py",
    "bigkern/ops/{op}/_cases.py",
    "tests/ops/test_{op}.py",
    "tests/kernels/test_{op}.py",
    "benchmarks/{op}.py",
]


def tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listed.splitlines()]


def imports(path: Path) -> list[str]:
    """Every module a file imports, relative imports resolved, at any depth of the file."""
    package = path.relative_to(ROOT).with_suffix("").parts  # of __init__.py too: its last part stands for one level
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join(package[: len(package) - node.level])
                module = f"{base}.{node.module}" if node.module else base
            else:
                module = node.module or ""
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return found


def layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "bigkern" and parts[1] in LAYERS else None


def code(path: Path) -> str:
    """A C++ source without comments and string literals."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)


def test_python_imports_point_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own is None:
            continue
        for module in imports(path):
            other = layer(module)
            if other is None or other == own:
                continue
            if LAYERS.index(other) > LAYERS.index(own) or any({own, other} <= pair for pair in SIDE_BY_SIDE):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_nothing_in_the_package_sees_tests_or_benchmarks():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in PACKAGE.rglob("*.py")
        for module in imports(path)
        if module.split(".")[0] in ("tests", "benchmarks")
    ]
    assert not wrong, wrong


def test_backend_files_never_import_another_op():
    wrong = []
    for op in OPS:
        for path in (PACKAGE / "ops" / op).glob("*.py"):
            for module in imports(path):
                parts = module.split(".")
                if parts[:2] == ["bigkern", "ops"] and len(parts) > 2 and parts[2] in OPS and parts[2] != op:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_cpp_includes_point_one_way():
    allowed = {
        "device": ("device", "emulator"),
        "emulator": ("emulator", "device"),
        "kernels": ("device", "kernels"),
        "torch": ("device", "kernels", "torch"),
    }
    wrong = []
    for folder, may in allowed.items():
        for path in (CSRC / folder).rglob("*"):
            if path.suffix not in (".h", ".cuh", ".cu", ".cpp"):
                continue
            for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), flags=re.M):
                if kind == "<" and re.match(r"(torch|ATen|c10|pybind11|Python)\b", name):
                    if folder != "torch" and path.name != "control.cpp":
                        wrong.append(f"{path.relative_to(ROOT)} includes {name}")
                elif kind == '"':
                    target = name.split("/")[0] if "/" in name else folder
                    if not name.startswith(".") and target not in may:
                        wrong.append(f"{path.relative_to(ROOT)} includes {name}")
    assert not wrong, wrong


def test_only_platform_knows_cuda_from_emulation():
    knows = [
        str(path.relative_to(ROOT))
        for path in [*CSRC.rglob("*.cuh"), *CSRC.rglob("*.cu"), *(CSRC / "kernels").glob("*.h")]
        if re.search(r"__CUDACC__|BK_EMULATE\b|__CUDA_ARCH__", code(path))
        and path != CSRC / "device" / "platform.cuh"
        and (CSRC / "device" / "cuda") not in path.parents
    ]
    assert not knows, knows


def test_kernels_use_the_device_layer_only():
    wrong = []
    for path in [*(CSRC / "kernels").iterdir(), *(CSRC / "torch").iterdir()]:
        for forbidden in (r"\basm\b", r"<<<", r"__shared__", r"\bcuda[A-Z]\w+\s*\("):
            if path.is_file() and re.search(forbidden, code(path)):
                wrong.append(f"{path.relative_to(ROOT)}: {forbidden}")
    assert not wrong, wrong


def test_host_headers_compile_alone(tmp_path):
    """csrc/kernels/<op>.h is what csrc/torch sees: plain C++, no device code."""
    for header in (CSRC / "kernels").glob("*.h"):
        source = tmp_path / "alone.cpp"
        source.write_text(f'#include "kernels/{header.name}"\n')
        subprocess.run(["c++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{CSRC}", str(source)], check=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("pattern", EXPECTED_FILES)
def test_every_op_has_each_file(op, pattern):
    assert (ROOT / pattern.format(op=op)).is_file()


def test_ops_are_exported_and_listed():
    readme = (ROOT / "README.md").read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for op in OPS:
        assert f"`{op}`" in readme, f"README's table lacks {op}"
    for pattern in EXPECTED_FILES:
        assert pattern.replace("{op}", "<op>") in contributing, f"CONTRIBUTING.md does not name {pattern}"


def test_import_touches_no_gpu_no_triton_no_extension(tmp_path):
    """A copy of the package without its extension: neither CUDA nor an optional package is touched."""
    shutil.copytree(PACKAGE, tmp_path / "bigkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = """
import sys
import torch
before = {name.split(".")[0] for name in sys.modules}
def forbidden(*args, **kwargs):
    raise AssertionError("a CUDA call at import")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = forbidden
import bigkern, bigkern.acceleration, bigkern.integrations, bigkern.models, bigkern.nn, bigkern.ops
assert bigkern.__file__.startswith(sys.argv[1]), bigkern.__file__
assert not torch.cuda.is_initialized()
optional = {"triton", "rich", "sklearn", "matplotlib", "transformers", "torchvision"}
assert not optional & ({name.split(".")[0] for name in sys.modules} - before)
assert torch.equal(bigkern.nn.LayerNorm(8)(torch.ones(2, 8)), torch.zeros(2, 8))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "BIGKERN_BACKEND"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)


def test_every_source_is_part_of_a_build():
    """A .cu or .cpp that no build compiles is dead code."""
    for path in [*tracked("csrc/**/*.cu"), *tracked("csrc/**/*.cpp")]:
        assert path.parent in (CSRC / "torch", CSRC / "kernels", CSRC / "emulator"), path
