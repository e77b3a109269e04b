"""Options and fixtures every test shares.

One process tests one world, because the choices are made at import or load time:

* ``pytest tests``                                     torch and the emulated CUDA kernels, on CPU tensors
* ``TRITON_INTERPRET=1 pytest tests --backends triton`` the Triton kernels, interpreted on CPU tensors
* ``pytest tests --emulated-build race``               the emulated kernels under the race checker
* ``pytest tests --device cuda --backends cuda,triton,torch``   the real thing, on a GPU
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FULL_GRID = os.environ.get("BIGKERN_TEST_GRID") == "full"


def pick(full, small):
    """The whole grid when ``BIGKERN_TEST_GRID=full`` (``make test-all``), else the selection that covers every row.

    Read from the environment, not from a pytest option, because ``parametrize`` runs while modules are imported.
    """
    return list(full) if _FULL_GRID else list(small)


def pytest_addoption(parser):
    group = parser.getgroup("bigkern")
    group.addoption(
        "--backends",
        default="triton" if _INTERPRETED else "torch,cuda",
        help="comma-separated backends the `backend` fixture visits",
    )
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the test tensors")
    group.addoption(
        "--emulated-build", default="plain", choices=("plain", "asan", "race"), help="which emulated build to load"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU; runs under --device cuda")
    config.addinivalue_line("markers", "multigpu: needs two GPUs")
    config.addinivalue_line("markers", "slow: only in make test-all")
    config.addinivalue_line("markers", "emulated: drives the emulator itself; runs on the CPU only")
    config.addinivalue_line("markers", "compiled: checks code compiled for GPUs")
    config.addinivalue_line(
        "markers", "sanitized: also runs under the race checker and AddressSanitizer (keep it small)"
    )
    config.addinivalue_line("markers", "xdist_group(name): tests that share a process under pytest-xdist")
    names = config.getoption("--backends").split(",")
    if "triton" in names and config.getoption("--device") == "cpu" and not _INTERPRETED:
        raise pytest.UsageError("--backends triton on the CPU needs TRITON_INTERPRET=1 in the environment")


def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--device") == "cuda"
    for item in items:
        if item.get_closest_marker("cuda") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU (--device cuda)"))
        if item.get_closest_marker("multigpu") and not (on_gpu and _gpu_count() > 1):
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
        if item.get_closest_marker("slow") and not _FULL_GRID:
            item.add_marker(pytest.mark.skip(reason="slow: set BIGKERN_TEST_GRID=full (make test-all)"))
        if item.get_closest_marker("emulated") and on_gpu:
            item.add_marker(pytest.mark.skip(reason="drives the emulator, which runs on the CPU"))


def pytest_runtest_setup(item):
    """torch's random numbers depend on the test alone, whatever ran before it in the process.

    ``BIGKERN_TEST_SEED`` draws others, to find tests that hang on one draw.
    """
    import torch

    torch.manual_seed(zlib.crc32(item.nodeid.encode()) + int(os.environ.get("BIGKERN_TEST_SEED", "0")))


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backends").split(","), indirect=True)


@pytest.fixture
def device(pytestconfig):
    """The torch.device of the test tensors."""
    import torch

    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture
def backend(request, device):
    """A backend's name, asked for explicitly while the test runs; the emulated kernels stand in for CUDA on the CPU."""
    import bigkern

    name = request.param
    if name == "cuda" and device.type == "cpu":
        request.getfixturevalue("emulator")
    if name == "triton" and device.type == "cpu":
        request.getfixturevalue("interpreter")
    with bigkern.use_backend(name):
        yield name


@pytest.fixture(scope="session")
def emulator(pytestconfig):
    """The emulated build's control module; loading it registers bigkern_cuda's kernels for CPU tensors."""
    from tests import emulated

    return emulated.load(pytestconfig.getoption("--emulated-build"))


@pytest.fixture(scope="session")
def interpreter():
    """Triton's interpreter, repaired to round and multiply as a GPU does."""
    from tests.triton import interpreter

    interpreter.install()


# What really ran, for tests/run.py: a world that executed no kernel must not pass for one that did.
_counts: Counter[str] = Counter()
_launches = 0


def _new_launches() -> int:
    """Kernels launched on the emulator since the last call; a test may have set the counters back meanwhile."""
    global _launches
    emulated = sys.modules.get("tests.emulated")
    before, _launches = _launches, emulated.launches() if emulated else 0
    return _launches - before if _launches >= before else _launches


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        _counts[report.outcome] += 1
    if report.when == "call" and report.passed:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        launches = _new_launches()
        _counts["emulated"] += launches > 0
        _counts["emulated_launches"] += launches
        _counts["interpreted"] += _INTERPRETED and (backend == "triton" or "triton" in item.path.parts)
        _counts["compiled"] += item.get_closest_marker("compiled") is not None
    return report


def pytest_sessionfinish(session):
    folder = os.environ.get("BIGKERN_TEST_REPORT")
    if not folder:
        return
    (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(_counts))
