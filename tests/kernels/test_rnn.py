"""The recurrent kernels, called as raw ops: every variant, cell and dtype, against torch in float64.

On the CPU these are the emulated kernels, on a GPU the compiled ones.  The public ops have tests of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigkern.ops import _extension
from bigkern.ops.rnn import _cuda, _torch
from bigkern.ops.rnn._schema import CELLS, GATES, SAVED
from tests import emulated
from tests.conftest import pick
from tests.numerics import assert_close, uninitialised_memory_is_nan

ROOT = Path(__file__).resolve().parents[2]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
VARIANTS = ["block", "grid", "step"]

cells = pytest.mark.parametrize("cell", range(4), ids=CELLS)


@pytest.fixture(autouse=True)
def kernels(device, request):
    """The kernels, on a GPU that holds 16 blocks when emulated."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        yield
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=16, blocks_per_multiprocessor=1)
    yield
    emulator.set_options(**options)


def inputs(cell, dtype, device="cpu", *, steps=4, batch=3, hidden=17, directions=1, lengths=None, mask=False, seed=0):
    """The arguments of a forward call, by name."""
    generator = torch.Generator().manual_seed(seed + 31 * cell + hidden)

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    if lengths is not None:
        steps, batch = lengths[0], len(lengths)
        sizes = torch.tensor([sum(length > t for length in lengths) for t in range(steps)])
    rows = steps * batch if lengths is None else sum(lengths)
    gates = GATES[cell] * hidden
    dropped = (torch.rand(directions, batch, hidden, generator=generator) < 0.8) / 0.8
    return dict(
        gates=randn(rows, directions * gates),
        weight_hh=randn(directions, gates, hidden, scale=hidden**-0.5),
        bias_hn=randn(directions, hidden) if CELLS[cell] == "GRU" else None,
        h0=randn(directions, batch, hidden),
        c0=randn(directions, batch, hidden) if CELLS[cell] == "LSTM" else None,
        mask=dropped.to(device, dtype) if mask else None,
        offsets=None if lengths is None else (sizes.cumsum(0) - sizes).to(device),
        lengths=None if lengths is None else torch.tensor(lengths, device=device),
        cell=cell,
    )


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def run(arguments, variant):
    """Forward and backward on the kernels: all eight results."""
    with uninitialised_memory_is_nan():
        found = _cuda.forward(**arguments, save=True, variant=variant)
        grads = _cuda.backward(*cotangents(found, arguments), **kept(found, arguments), variant=variant)
    return found, grads


def cotangents(found, arguments):
    generator = torch.Generator().manual_seed(99)

    def like(tensor):
        return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    return like(found[0]), like(found[1]), like(found[2]) if arguments["c0"] is not None else None


def kept(found, arguments):
    names = ["weight_hh", "h0", "c0", "mask", "offsets", "lengths", "cell"]
    names += [name for name in arguments if "zone" in name]
    return {"output": found[0], "saved": found[3], **{name: arguments[name] for name in names}}


def check(arguments, variant):
    """The error rule of tests/numerics.py: torch's own error is that of its mathematics in fp32, rounded at the end, so
    16-bit kernels, which round what they multiply, get the dtype's unit for each product beside.
    """
    found, grads = run(arguments, variant)
    dtype = arguments["gates"].dtype
    exact = _torch.forward(**{name: double(value) for name, value in arguments.items()}, save=True)
    own = _torch.forward(**arguments, save=True)
    # Gradients are those of the states and gates that the kernel saved: that is what it differentiates.
    values = kept(found, arguments)
    exact_grads = _torch.backward(
        *map(double, cotangents(found, arguments)), **{name: double(value) for name, value in values.items()}
    )
    own_grads = _torch.backward(*cotangents(found, arguments), **values)
    names = ("output", "hn", "cn", "saved", "grad_gates", "grad_hidden", "grad_h0", "grad_c0")
    for name, mine, its, truth in zip(names, found + grads, own + own_grads, exact + exact_grads, strict=True):
        assert mine.shape == its.shape and mine.dtype == its.dtype, name
        if not mine.numel():
            continue
        if dtype == F32:
            assert_close(name, mine, its, truth)
        else:
            error = (mine.double() - truth).norm() / truth.norm()
            assert error <= 1.5 * torch.finfo(dtype).eps, f"{name}: error {error:.2e}"
    return found, grads


SHAPES = [
    dict(steps=1, batch=1, hidden=1),
    dict(steps=3, batch=3, hidden=17),
    dict(steps=3, batch=9, hidden=31, directions=2),
    dict(lengths=[4, 4, 3, 1], hidden=33, directions=2),
    dict(lengths=[3, 2, 2, 2, 2, 2, 1, 1, 1, 1], hidden=40, directions=2, mask=True),
    dict(steps=2, batch=17, hidden=8),
    dict(steps=2, batch=2, hidden=97, directions=2, mask=True),
    dict(steps=2, batch=8, hidden=128),
]


@cells
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", pick(SHAPES, SHAPES[3:5]), ids=str)
@pytest.mark.parametrize("dtype", pick([F32, BF16, F16], [None]), ids=str)
def test_variants(cell, variant, shape, dtype, device, request):
    if dtype is None:  # one dtype for each, all in turn
        dtype = [BF16, F32, F16][(cell + VARIANTS.index(variant)) % 3]
    if variant == "block" and dtype == F32:
        dtype = F16
    if device.type == "cpu" and shape["hidden"] > 64:
        request.getfixturevalue("emulator").set_options(multiprocessors=32)  # two directions in fp32 take 26
    check(inputs(cell, dtype, device, **shape), variant)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_sizes_of_one(dtype, device):
    for variant in VARIANTS[dtype == F32 :]:
        check(inputs(2, dtype, device, **SHAPES[0]), variant)


@pytest.mark.parametrize(("cell", "hidden"), pick([(2, 830), (3, 830), (0, 2100), (2, 257)], [(0, 1100)]))
def test_weights_beyond_the_registers(cell, hidden, device, request):
    """More K blocks than a warp holds in registers: the others are read from shared memory."""
    if device.type == "cpu":
        request.getfixturevalue("emulator").set_options(multiprocessors=140)
    check(inputs(cell, BF16, device, steps=2, batch=1, hidden=hidden), "grid")


def test_float_products_of_several_stages(device, request):
    if device.type == "cpu":
        request.getfixturevalue("emulator").set_options(multiprocessors=80)
    check(inputs(3, F32, device, steps=2, batch=2, hidden=pick([601], [301])[0]), "grid")


def test_waves(device):
    """More groups of sequences than are resident: 16 blocks hold eight groups of two blocks' slices each."""
    found = check(inputs(2, BF16, device, steps=2, batch=75, hidden=20), "grid")
    steps = run(inputs(2, BF16, device, steps=2, batch=75, hidden=20), "step")
    assert all(map(torch.equal, found[0] + found[1], steps[0] + steps[1]))


@pytest.mark.parametrize(
    ("cell", "dtype"), pick([(i, t) for i in (0, 2, 3) for t in (BF16, F16)], [(2, BF16)]), ids=str
)
def test_error_does_not_grow_with_the_steps(cell, dtype, device):
    """Over 2,000 steps against float64: the last 400 as exact as the first, where h and c are carried in fp32."""
    arguments = inputs(cell, dtype, device, steps=2000, batch=1, hidden=8)
    found = _cuda.forward(**arguments, save=False)[0].double()
    exact = _torch.forward(**{name: double(value) for name, value in arguments.items()}, save=False)[0]
    parts = zip(found.chunk(5), exact.chunk(5), strict=True)
    errors = [((mine - truth).norm() / truth.norm()).item() for mine, truth in parts]
    assert max(errors) <= 1.5 * errors[0] and max(errors) <= torch.finfo(dtype).eps, errors


@pytest.mark.parametrize("hidden", [16, 24])
def test_weights_and_states_at_odd_addresses(hidden, device):
    arguments = inputs(3, BF16, device, hidden=hidden)
    for name in ("gates", "weight_hh", "h0"):
        tensor = arguments[name]
        storage = torch.empty(tensor.numel() + 1, dtype=BF16, device=device)
        shifted = storage[1:].view(tensor.shape).copy_(tensor)
        for variant in VARIANTS:
            check({**arguments, name: shifted}, variant)


@cells
def test_missing_gradients_and_saved_values(cell, device):
    """Without grad_output, grad_hn or grad_cn the others' part alone; without `save` nothing is kept."""
    arguments = inputs(cell, F16, device, lengths=[3, 2, 1])
    for variant in VARIANTS:
        found = _cuda.forward(**arguments, save=True, variant=variant)
        bare = _cuda.forward(**arguments, save=False, variant=variant)
        assert all(map(torch.equal, bare[:3], found[:3])) and bare[3].shape == (0,)
        assert found[3].shape == ((found[0].shape[0], SAVED[cell] * 17) if SAVED[cell] else (0,))
        values, given = kept(found, arguments), cotangents(found, arguments)
        for missing in range(3):
            some = [None if i == missing else grad for i, grad in enumerate(given)]
            grads = _cuda.backward(*some, **values, variant=variant)
            for mine, truth in zip(grads, _torch.backward(*some, **values), strict=True):
                torch.testing.assert_close(mine, truth, rtol=5e-3, atol=5e-3)


def tagged(arguments, largest=1.9):
    """Arguments whose states pass between blocks with tags: every |h0| below 2."""
    return {**arguments, "h0": arguments["h0"].clamp(-largest, largest)}


def bits(tensors):
    return [tensor.view(torch.int16) for tensor in tensors]


@pytest.mark.parametrize("cell", [0, 2, 3], ids=["RNN_TANH", "LSTM", "GRU"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(steps=6, batch=11, hidden=37),
        dict(lengths=[7, 5, 5, 3, 2, 2, 2, 1, 1], hidden=33, directions=2),
        dict(steps=90, batch=1, hidden=20),
        *pick([dict(steps=4, batch=8, hidden=48, directions=2)], []),
    ],
    ids=str,
)
def test_tags_carry_what_flags_guard(cell, shape, device, request):
    """Bit for bit: with h0 below 2, at the edges, beyond, where flags are taken after all, and with NaN on the way."""
    dtype = [BF16, F16][cell == 2]
    arguments = tagged(inputs(cell, dtype, device, **shape))
    edge = torch.tensor(1.9921875 if dtype == BF16 else 1.9990234375)  # the last below 2, which stands for NaN
    starts = {
        "below": arguments["h0"],
        "none": torch.zeros_like(arguments["h0"]),
        "edge": arguments["h0"].index_fill(2, torch.tensor([3], device=device), edge.item()),
        "beyond": arguments["h0"].index_fill(2, torch.tensor([16], device=device), -2.0),
        "infinite": arguments["h0"].index_fill(2, torch.tensor([1], device=device), float("-inf")),
    }
    broken = arguments["gates"].clone()
    broken[1, 2] = float("nan")  # one unit of the second sequence
    for start in pick(list(starts), ["below", "edge", "beyond"]):
        for gates in (arguments["gates"], broken):
            given = {**arguments, "h0": starts[start], "gates": gates}
            found, expected = (_cuda.forward(**given, save=True, variant=variant) for variant in ("grid", "flags"))
            assert all(map(torch.equal, bits(found), bits(expected))), start


@pytest.mark.parametrize("cell", [0, 2], ids=["RNN_TANH", "LSTM"])
def test_tags_under_every_schedule(cell, device, request):
    """Polling blocks go on in whatever order; on a GPU, over many steps and repeated."""
    shape = dict(lengths=[5, 4, 1], hidden=40, directions=2)
    if device.type == "cuda":
        shape = dict(steps=2000, batch=16, hidden=768)
    arguments = tagged(inputs(cell, BF16, device, **shape))
    emulator = request.getfixturevalue("emulator") if device.type == "cpu" else None
    expected = _cuda.forward(**arguments, save=True, variant="flags")
    for schedule in emulator.schedules(seeds=pick([3], [1])[0]) if emulator else [{}] * 20:
        if emulator:
            emulator.set_options(**schedule)
        found = _cuda.forward(**arguments, save=True, variant="grid")
        assert all(map(torch.equal, bits(found), bits(expected))), schedule


def zoned(arguments, mean=None):
    """Arguments with zoneout: drawn, or for every unit its mean."""
    rows, directions, hidden = arguments["gates"].shape[0], *arguments["h0"].shape[::2]
    is_lstm = arguments["c0"] is not None
    if mean is not None:
        return {**arguments, "zoneout": mean, "cell_zoneout": mean / 2 if is_lstm else 0.0}
    generator = torch.Generator().manual_seed(7)
    draw = torch.rand(2, rows, directions * hidden, generator=generator) < 0.4
    zone, cell_zone = draw.to(arguments["gates"].device, arguments["gates"].dtype)
    return {**arguments, "zone": zone, "cell_zone": cell_zone if is_lstm else None}


@cells
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mean", pick([None, 0.3], [None]))
def test_zoneout(cell, variant, mean, device):
    """Outputs and gradients beside autograd's through the composite, in float64 and in the kernel's dtype."""
    dtype = F32 if variant != "block" and cell % 2 else BF16
    arguments = zoned(tagged(inputs(cell, dtype, device, lengths=[4, 4, 3, 1], hidden=33, directions=2)), mean)
    found, grads = run(arguments, variant)

    def differentiate(convert):
        given = {name: convert(value) for name, value in arguments.items()}
        names = ["gates", "h0"] + (["c0"] if given["c0"] is not None else [])
        for name in names:
            given[name] = given[name].detach().requires_grad_()
        outputs = _torch.forward(**given, save=False)[: len(names)]
        weights = [convert(grad) for grad in cotangents(found, arguments)[: len(outputs)]]
        return outputs, torch.autograd.grad(outputs, [given[name] for name in names], weights)

    exact, own = differentiate(double), differentiate(lambda value: value)
    mine = found[: len(exact[0])], (grads[0], *grads[2 : 1 + len(exact[1])])
    for kind in range(2):
        for i, (value, its, truth) in enumerate(zip(mine[kind], own[kind], exact[kind], strict=True)):
            assert value.shape == truth.shape and value.dtype == dtype
            if dtype == F32:
                assert_close(f"{kind} {i}", value, its, truth)
            else:  # the kernel's gradients are those of the states that it saved
                error = (value.double() - truth).norm() / truth.norm()
                assert error <= (1.5, 6)[kind] * torch.finfo(dtype).eps, f"{kind} {i}: {error:.2e}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_zoneout_of_none_and_of_all(variant, device):
    """Weights of 0 change no bit; weights of 1 keep the states."""
    arguments = tagged(inputs(2, BF16, device, lengths=[3, 2], hidden=19))
    plain, nothing = run(arguments, variant), zoned(arguments)
    nothing["zone"], nothing["cell_zone"] = (torch.zeros_like(nothing[name]) for name in ("zone", "cell_zone"))
    same = _cuda.forward(**nothing, save=False, variant=variant)
    assert all(map(torch.equal, same[:3], plain[0][:3]))
    still = _cuda.forward(**{**arguments, "zoneout": 1.0, "cell_zoneout": 1.0}, save=False, variant=variant)
    assert torch.equal(still[1], arguments["h0"]) and torch.equal(still[2], arguments["c0"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_inputs_give_equal_bits(variant, device, request):
    """Under any schedule of the threads."""
    emulator = request.getfixturevalue("emulator") if device.type == "cpu" else None
    schedules = emulator.schedules(seeds=1) if emulator else [{}] * 4
    arguments = inputs(2, BF16, device, lengths=[3, 2, 1], hidden=40, directions=2)
    first = None
    for schedule in schedules:
        if emulator:
            emulator.set_options(**schedule)
        found, grads = run(arguments, variant)
        first = first or found + grads
        assert all(map(torch.equal, found + grads, first))


@pytest.mark.sanitized
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", [2, 3], ids=["LSTM", "GRU"])
def test_small(cell, variant, device):
    """Small enough for the race checker and AddressSanitizer; odd widths, several blocks, a padded group."""
    dtype = F32 if variant == "step" else BF16
    run(inputs(cell, dtype, device, lengths=[2, 1], hidden=19), variant)


@pytest.mark.sanitized
@pytest.mark.parametrize("cell", [0, 2, 3], ids=["RNN_TANH", "LSTM", "GRU"])
def test_small_with_tags(cell, device):
    arguments = zoned(tagged(inputs(cell, BF16, device, lengths=[4, 2], hidden=19)))
    found, expected = (_cuda.forward(**arguments, save=True, variant=variant) for variant in ("grid", "flags"))
    assert all(map(torch.equal, bits(found), bits(expected)))


@pytest.mark.sanitized
def test_small_float(device):
    run(inputs(0, F32, device, steps=2, batch=2, hidden=11), "grid")


def test_the_variant_is_chosen_by_shape(device, request):
    """One block to H = 128 in 16 bits, else the grid; a launch a step where its blocks are not resident at once."""
    if device.type == "cuda":
        pytest.skip("the launches are counted by the emulator")
    emulator = request.getfixturevalue("emulator")

    def launches(dtype, hidden):
        emulator.reset_counters()
        _cuda.forward(**inputs(0, dtype, steps=3, batch=1, hidden=hidden), save=False)
        return emulator.counters()["launches"]

    assert launches(BF16, 128) == 1
    assert launches(BF16, 129) == 2  # what fills the exchange, and all steps
    assert launches(F32, 20) == 2
    emulator.set_options(multiprocessors=2)
    assert launches(F32, 20) == 1 + 3


def test_a_variant_that_cannot_serve_is_refused(device, request):
    with pytest.raises(RuntimeError, match="variant 1 cannot serve 17 hidden units"):
        _cuda.forward(**inputs(0, F32, device), save=False, variant="block")
    with pytest.raises(RuntimeError, match="variant 1 cannot serve 129 hidden units"):
        _cuda.forward(**inputs(0, BF16, device, hidden=129), save=False, variant="block")
    if device.type == "cpu":
        request.getfixturevalue("emulator").set_options(multiprocessors=1)
        with pytest.raises(RuntimeError, match="variant 2 cannot serve 17 hidden units"):
            _cuda.forward(**inputs(0, BF16, device), save=False, variant="grid")


# A step's traffic: the counters of one step more.
_COUNT = """
import json
from tests import emulated
from tests.kernels.test_rnn import BF16, inputs
from bigkern.ops.rnn import _cuda
emulator = emulated.load("race")
emulator.set_options(multiprocessors=16, blocks_per_multiprocessor=1)
found = {}
for name, h0 in (("block", 0), ("grid", 1.9), ("flags", 1.9), ("grid beyond", 2)):
    counts, variant = [], name.split()[0]
    for steps in (2, 3):
        arguments = inputs(2, BF16, steps=steps, batch=8, hidden=32)
        arguments["h0"].fill_(h0)
        emulator.reset_counters()
        _cuda.forward(**arguments, save=True, variant=variant)
        counts.append(emulator.counters())
    found[name] = {key: counts[1][key] - counts[0][key] for key in counts[0] if "place" not in key}
print(json.dumps(found))
"""


@pytest.mark.emulated
def test_a_step_moves_the_floor():
    """Global bytes of a step: the gates read once, the output and what is saved written once; and, on the grid, the
    state written once, read once by each of the two blocks. With tags, which an h0 of 2 rules out, the state is
    neither: it is polled.
    """
    environment = {**os.environ, **emulated.environment("race"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _COUNT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    pairs, blocks = 8 * 32, 2
    read, written = 4 * 2 * pairs, (1 + 5) * 2 * pairs
    assert (counts["block"]["global_load_bytes"], counts["block"]["global_store_bytes"]) == (read, written)
    state = 2 * pairs
    for name in ("flags", "grid beyond"):
        assert counts[name]["global_store_bytes"] == written + state
        assert counts[name]["global_load_bytes"] == read + blocks * state
    assert (counts["grid"]["global_load_bytes"], counts["grid"]["global_store_bytes"]) == (read, written)
    assert counts["grid"]["global_atomic_bytes"] >= (1 + blocks) * state


def test_refusals_name_the_argument(device):
    """Raw ops check what keeps a kernel inside its tensors."""
    good = inputs(2, F32, device, lengths=[3, 2])
    bad = {
        "gates": [(good["gates"][:, 1:], "gates is"), (good["gates"].double(), "no kernel for Double|expected")],
        "weight_hh": [(good["weight_hh"][:, :4], "weight_hh is"), (good["weight_hh"].half(), "weight_hh is Half")],
        "h0": [(good["h0"][0], "h0 is .* expected three dimensions"), (good["h0"].mT, "h0|weight_hh|gates")],
        "c0": [(None, "c0 belongs to the LSTM"), (good["c0"][:, :1], "c0 is")],
        "mask": [(good["h0"][:, :1], "mask is")],
        "offsets": [(None, "offsets and lengths come together"), (good["offsets"].int(), "offsets is Int")],
        "lengths": [(good["lengths"][:1], "lengths is")],
        "cell": [(4, "cell is 4")],
        "zone": [(good["gates"], "zone is"), (good["h0"][0], "zone is")],
        "zoneout": [(1.5, "zoneout is 1.5")],
    }
    for name, cases in bad.items():
        for value, message in cases:
            with pytest.raises(RuntimeError, match=message):
                _cuda.forward(**{**good, name: value}, save=True)
    with pytest.raises(RuntimeError, match="bias_hn was given"):
        _cuda.forward(**{**good, "bias_hn": good["h0"][:, 0]}, save=True)
    with pytest.raises(RuntimeError, match="belong to the LSTM alone"):
        _cuda.forward(**inputs(0, F32, device), save=True, cell_zoneout=0.5)
    with pytest.raises(RuntimeError, match="not whole steps"):
        _cuda.forward(**{**good, "offsets": None, "lengths": None}, save=True)
