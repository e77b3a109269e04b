"""Selection, refusals, warnings and quarantine, with stand-ins for the backends so that no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bigkern
from bigkern import backend

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.zeros(1)
# As a CUDA tensor looks to the selection.
GPU = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(backend, "_requested", None)
    monkeypatch.setattr(backend, "_quarantined", {})
    monkeypatch.setattr(backend, "_warned", set())


def stand_in(name, reason):
    return SimpleNamespace(name=name, unsupported=lambda *args: reason)


def implementations(**reasons):
    return {name: stand_in(name, reasons.get(name)) for name in backend.NAMES}


def chosen(tensor=GPU, **reasons):
    return backend.select("op", implementations(**reasons), tensor).name


def test_automatic_choice_takes_the_first_without_an_objection():
    assert chosen() == "cuda"
    assert chosen(cuda="no extension") == "triton"


def test_automatic_choice_leaves_cpu_tensors_to_torch_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(CPU) == "torch"


def test_automatic_choice_warns_once_and_names_the_reasons():
    with pytest.warns(
        UserWarning, match=r"bigkern\.op runs on the torch backend: cuda: no extension; triton: no Triton"
    ):
        assert chosen(cuda="no extension", triton="no Triton") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(cuda="no extension", triton="no Triton") == "torch"
    with pytest.warns(UserWarning, match="float64"):
        assert chosen(cuda="float64", triton="float64") == "torch"


@pytest.mark.parametrize("name", backend.NAMES)
def test_a_request_is_met_or_refused_with_every_reason(name):
    with bigkern.use_backend(name):
        assert chosen() == chosen(CPU) == name
        with pytest.raises(bigkern.BackendError) as refusal:
            chosen(**{other: f"{other} is ill" for other in backend.NAMES})
    message = str(refusal.value)
    assert f"the backend '{name}' was asked for" in message
    assert all(f"{other}: {other} is ill" in message for other in backend.NAMES)


def test_a_refusal_says_what_works():
    with bigkern.use_backend("cuda"), pytest.raises(bigkern.BackendError, match=r'use_backend\("triton"\)'):
        chosen(cuda="no extension")


def test_an_op_may_lack_a_backend():
    only_torch = {"torch": implementations()["torch"]}
    with bigkern.use_backend("cuda"), pytest.raises(bigkern.BackendError, match="cuda: has no op"):
        backend.select("op", only_torch, CPU)


def test_use_backend_nests_and_restores():
    assert backend.requested() is None
    bigkern.use_backend("torch")
    assert backend.requested() == "torch"
    with bigkern.use_backend("triton"):
        assert backend.requested() == "triton"
        with bigkern.use_backend(None):
            assert backend.requested() is None
        assert backend.requested() == "triton"
    assert backend.requested() == "torch"
    with pytest.raises(KeyError), bigkern.use_backend("cuda"):
        raise KeyError
    assert backend.requested() == "torch"


@pytest.mark.parametrize("name", ["CUDA", "", "cudnn"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="choose one of cuda, triton, torch"):
        bigkern.use_backend(name)
    assert backend.requested() is None


def test_quarantine():
    backend.quarantine("cuda", "op", "self-check failed: 3 of 8 wrong")
    assert backend.quarantined() == {("cuda", "op"): "self-check failed: 3 of 8 wrong"}
    assert chosen() == "triton"
    assert backend.select("other_op", implementations(), GPU).name == "cuda"
    with bigkern.use_backend("cuda"), pytest.raises(bigkern.BackendError, match="3 of 8 wrong"):
        chosen()
    with pytest.raises(ValueError, match="last resort"):
        backend.quarantine("torch", "op", "anything")
    with pytest.raises(ValueError, match="unknown backend"):
        backend.quarantine("cudnn", "op", "anything")


def test_backends_lists_each_with_a_reason():
    found = bigkern.backends()
    assert tuple(found) == backend.NAMES
    assert found["torch"].available
    assert all(isinstance(state.available, bool) and state.reason for state in found.values())


def test_torch_compile_follows_a_change_of_backend():
    @torch.compile(fullgraph=True, backend="eager")
    def name(x):
        return x + {"torch": 1, None: 2}[backend.requested()] + (10 if backend.uses_torch(x) else 20)

    assert name(CPU).item() == 12
    with bigkern.use_backend("torch"):
        assert name(CPU).item() == 11
    assert name(CPU).item() == 12


def test_torch_compile_traces_the_choice_and_still_warns():
    parts = {name: stand_in(name, reason) for name, reason in zip(backend.NAMES, ("no a", "no b", None), strict=True)}

    @torch.compile(fullgraph=True, backend="eager")
    def add_one(x):
        return x + {"cuda": 3, "triton": 2, "torch": 1}[backend.select("op", parts, GPU).name]

    with pytest.warns(UserWarning, match="cuda: no a; triton: no b"):
        assert add_one(CPU).item() == 1


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_environment_variable():
    script = "import bigkern; print(bigkern.backend.requested())"
    assert run(script, BIGKERN_BACKEND="triton").stdout == "triton\n"
    assert run(script, BIGKERN_BACKEND="").stdout == "None\n"


def test_unknown_environment_variable_is_named_at_first_use():
    script = "import bigkern, torch; bigkern.ops.layer_norm(torch.ones(1, 2), (2,))"
    refused = run(script, BIGKERN_BACKEND="cudnn")
    assert refused.returncode == 1
    assert refused.stderr.endswith(
        "ValueError: BIGKERN_BACKEND: unknown backend 'cudnn'; choose one of cuda, triton, torch\n"
    )
