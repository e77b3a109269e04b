"""Layer norm's Triton kernels, interpreted: the raw forward and backward against torch in float64.

The rule (design): the kernel's error is at most twice torch's own in the same dtype, plus a floor of one unit in the
last place of the result's scale.  tests/ops runs the public op over the same kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from bigkern.ops import _triton_support
from bigkern.ops.layer_norm import _triton
from tests.conftest import pick
from tests.triton.philox import keep_mask

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("interpreter")]

EPS = 1e-5
SEED, OFFSET = 2**61 + 99, 2**33 + 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Problem:
    """Random inputs and gradients of one call, and its reference in float64."""

    def __init__(
        self, rows, cols, dtype=torch.float32, *, parameters=None, residual=False, rms=False, dropout_p=0.0,
        weight=True, bias=True, grad_summed=None, mean=0.5, scale=1.0, layout=None, seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def matrix(shift=0.0, spread=1.0):
            values = (torch.randn(rows, cols, generator=generator) * spread + shift).to(dtype)
            return values if layout is None else layout(values)

        def vector(shift):
            return (torch.randn(cols, generator=generator) * 0.3 + shift).to(parameters or dtype)

        self.rms, self.dropout_p, self.spread = rms, dropout_p, abs(mean) + scale
        self.input = matrix(mean, scale)
        self.residual = matrix() if residual else None
        self.weight = vector(1.0) if weight else None
        self.bias = vector(0.0) if bias and not rms else None
        self.grad_output = matrix()
        self.grad_summed = matrix() if (residual if grad_summed is None else grad_summed) else None
        self.philox = torch.tensor([SEED, OFFSET]) if dropout_p > 0 else None
        index = np.arange(rows * cols, dtype=np.uint64)
        self.keep = torch.from_numpy(keep_mask(SEED, OFFSET, index, dropout_p).reshape(rows, cols))

    def run(self):
        """The kernels' results by name."""
        forward = _triton.forward(
            self.input, self.residual, self.weight, self.bias, EPS, self.rms, self.dropout_p, self.philox
        )
        _, summed, mean, rstd = forward
        if self.residual is None:
            summed = self.input
        backward = _triton.backward(
            self.grad_output, self.grad_summed, summed, mean, rstd, self.weight,
            self.rms, self.dropout_p, self.philox, self.weight is not None, self.bias is not None,
        )  # fmt: skip
        names = ("output", "summed", "mean", "rstd", "grad_input", "grad_residual", "grad_weight", "grad_bias")
        results = dict(zip(names, (*forward, *backward), strict=True))
        return {name: value for name, value in results.items() if value.numel()}

    def expect(self, dtype, summed=None):
        """The same by torch's operators in dtype (float64: the reference), starting from the given rounded sum."""
        convert = {"dtype": dtype, "copy": True}
        weight, bias = (None if t is None else t.to(**convert).requires_grad_() for t in (self.weight, self.bias))
        if summed is None:
            summed = self.input if self.residual is None else self._sum(dtype)
        x = summed.to(**convert).requires_grad_()
        if self.rms:
            output = F.rms_norm(x, x.shape[1:], weight, EPS)
        else:
            output = F.layer_norm(x, x.shape[1:], weight, bias, EPS)
        output.backward(self.grad_output.to(dtype))
        grad = x.grad if self.grad_summed is None else x.grad + self.grad_summed.to(dtype)
        results = {"output": output.detach(), "grad_input": grad}
        if self.residual is not None:
            results["summed"] = self._sum(dtype)
        if self.dropout_p > 0:
            results["grad_residual"] = grad
            results["grad_input"] = self._drop(grad)
        if weight is not None:
            results["grad_weight"] = weight.grad
        if bias is not None:
            results["grad_bias"] = bias.grad
        wide = x.detach().double()
        if not self.rms:
            results["mean"] = wide.mean(1)
        variance = wide.square().mean(1) if self.rms else wide.var(1, correction=0)
        results["rstd"] = (variance + EPS).rsqrt()
        return results

    def _drop(self, x):
        scale = 0.0 if self.dropout_p == 1 else 1 / (1 - self.dropout_p)
        return torch.where(self.keep, x * scale, 0.0)

    def _sum(self, dtype):
        x = self.input.to(dtype)
        return (self._drop(x) if self.dropout_p > 0 else x) + self.residual.to(dtype)


def check(problem: Problem) -> dict[str, torch.Tensor]:
    """Compares every result, in the largest and in the mean error, and returns the kernels' results."""
    results = problem.run()
    dtype = problem.input.dtype
    # Statistics are taken of the rounded sum, so the reference of all but `summed` starts there.
    summed = results.get("summed")
    reference, own = problem.expect(torch.float64, summed), problem.expect(dtype, summed)
    assert results.keys() == reference.keys()
    for name, value in results.items():
        expected = reference[name]
        assert value.shape == expected.shape, name
        if name in ("mean", "rstd"):
            assert value.dtype == torch.float32
            # The mean's error grows with the values it cancels; rstd has nothing to cancel.
            floor = 1e-6 * problem.spread if name == "mean" else 0.0
            torch.testing.assert_close(value.double(), expected, rtol=3e-6, atol=floor, msg=lambda m: f"{name}: {m}")  # noqa: B023
            continue
        parameter = name in ("grad_weight", "grad_bias")
        assert value.dtype == (problem.weight.dtype if parameter and problem.weight is not None else dtype), name
        error, torch_error = (value.double() - expected).abs(), (own[name].double() - expected).abs()
        ulp = torch.finfo(value.dtype).eps * expected.abs().max()
        for measure in (torch.max, torch.mean):
            assert measure(error) <= 2 * measure(torch_error) + ulp, (
                f"{name}: {measure.__name__} error {measure(error):.3g}, torch's {measure(torch_error):.3g}, {ulp=:.3g}"
            )
    return results


@pytest.mark.parametrize("cols", pick([1, 2, 7, 64, 127, 128, 129, 255, 1000, 1024], [1, 7, 64, 127, 129, 1000]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(cols, dtype):
    check(Problem(5, cols, dtype))


@pytest.mark.parametrize("features", [{"rms": True}, {"residual": True}, {"residual": True, "rms": True}])
@pytest.mark.parametrize("cols", pick([1, 7, 64, 129, 1000], [7, 64, 129]))
@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.float32, torch.bfloat16]))
def test_variants(cols, dtype, features):
    check(Problem(5, cols, dtype, **features))


@pytest.mark.parametrize("cols", [7, 64, 129])
@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("dropout_p", [0.1, 0.75, 1.0])
def test_dropout(cols, dtype, dropout_p):
    """The kept elements are those of the documented generator, exactly, in both directions."""
    problem = Problem(6, cols, dtype, residual=True, dropout_p=dropout_p)
    problem.residual.zero_()
    results = check(problem)
    assert torch.equal(results["summed"] != 0, problem.keep & (problem.input != 0))
    assert torch.equal(results["grad_input"] != 0, problem.keep & (results["grad_residual"] != 0))


@pytest.mark.parametrize(
    "features", [{}, {"rms": True}, {"residual": True}, {"residual": True, "rms": True, "dropout_p": 0.5},
                 {"residual": True, "dropout_p": 0.3}]
)  # fmt: skip
@pytest.mark.parametrize("cols", pick([65, 100, 127, 128, 129, 256, 257], [65, 128, 201]))
@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.bfloat16]))
def test_rows_split_over_programs(monkeypatch, cols, dtype, features):
    """The path of rows too wide for one program, brought down to widths that the interpreter can afford."""
    monkeypatch.setattr(_triton, "MAX_WHOLE_ROW_FORWARD", 64)
    monkeypatch.setattr(_triton, "MAX_WHOLE_ROW_BACKWARD", 64)
    monkeypatch.setattr(_triton, "SPLIT_COLS_FORWARD", 64)
    monkeypatch.setattr(_triton, "SPLIT_COLS_BACKWARD", 32)
    problem = Problem(4, cols, dtype, mean=30.0, **features)
    results = check(problem)
    if "dropout_p" in features:
        assert torch.equal(results["grad_input"] != 0, problem.keep & (results["grad_residual"] != 0))


def test_split_and_whole_rows_really_differ(monkeypatch):
    """That the limits lowered in the test above do choose another path."""
    from bigkern.ops.layer_norm import _triton_kernels

    launched = []
    for name in [name for name in vars(_triton_kernels) if name.endswith("_kernel")]:
        kernel = getattr(_triton_kernels, name)

        class Spy:
            def __getitem__(self, grid, name=name, kernel=kernel):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(_triton_kernels, name, Spy())
    problem = Problem(2, 65)
    problem.run()
    whole = set(launched)
    launched.clear()
    monkeypatch.setattr(_triton, "MAX_WHOLE_ROW_FORWARD", 64)
    monkeypatch.setattr(_triton, "MAX_WHOLE_ROW_BACKWARD", 64)
    problem.run()
    assert set(launched) - whole == {"layer_norm_split_statistics_kernel", "layer_norm_split_sums_kernel"}


@pytest.mark.parametrize("cols", pick([16385, 131_073], [16385]))
def test_wide_rows(cols):
    """At the product's own limits."""
    check(Problem(1, cols, torch.bfloat16, residual=True))


@pytest.mark.parametrize("rows", [1, 2, 63, 300])
def test_row_counts(rows):
    """Rows that do and do not fill tiles, and more tiles than programs."""
    check(Problem(rows, 24, torch.float32, residual=True, dropout_p=0.2))


def test_more_rows_than_a_grid_axis_holds():
    check(Problem(65_540, 2, torch.float32))


def _padded(values, extra=5):
    wide = torch.full((values.shape[0], values.shape[1] + extra), float("nan"), dtype=values.dtype)
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


def _from_odd_element(values):
    flat = torch.full((values.numel() + 1,), float("nan"), dtype=values.dtype)
    flat[1:] = values.flatten()
    return flat[1:].view(values.shape)


@pytest.mark.parametrize(
    "layout",
    [_padded, lambda v: _padded(v, 8), _from_odd_element, lambda v: v[:1].expand_as(v)],
    ids=["padded", "padded-aligned", "odd-offset", "expanded"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_offsets(layout, dtype):
    check(Problem(6, 64, dtype, residual=True, dropout_p=0.4, layout=layout))


def test_rows_further_apart_than_int32_reaches():
    """Row strides over 2^31 elements; the pages between the rows are never touched."""
    stride = 2**31 + 64
    storage = torch.empty(stride + 64, dtype=torch.bfloat16)
    check(Problem(2, 64, torch.bfloat16, layout=lambda v: storage.as_strided((2, 64), (stride, 1)).copy_(v)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rms", [False, True])
def test_fp32_parameters(dtype, rms):
    results = check(Problem(4, 96, dtype, parameters=torch.float32, rms=rms))
    assert results["grad_weight"].dtype == torch.float32


@pytest.mark.parametrize("weight, bias", [(False, False), (True, False), (False, True)])
def test_absent_parameters(weight, bias):
    check(Problem(4, 96, weight=weight, bias=bias))


def test_residual_without_its_gradient():
    check(Problem(4, 96, residual=True, dropout_p=0.5, grad_summed=False))


@pytest.mark.parametrize("mean, scale", [(1e3, 1.0), (-1e3, 1e-1), (0.0, 1e-3), (0.0, 1e3)])
def test_far_from_zero(mean, scale):
    check(Problem(4, 1000, mean=mean, scale=scale))


def test_long_rows_far_from_zero():
    check(Problem(1, 9_000, mean=1e3, scale=1.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("split", [False, True])
def test_nonfinite_row_stays_alone(monkeypatch, value, split):
    if split:
        monkeypatch.setattr(_triton, "MAX_WHOLE_ROW_FORWARD", 32)
        monkeypatch.setattr(_triton, "MAX_WHOLE_ROW_BACKWARD", 32)
        monkeypatch.setattr(_triton, "SPLIT_COLS_FORWARD", 32)
        monkeypatch.setattr(_triton, "SPLIT_COLS_BACKWARD", 32)
    problem = Problem(5, 48)
    clean = problem.run()
    problem.input[2, 11] = value
    with np.errstate(invalid="ignore"):
        results = problem.run()
    for name in ("output", "grad_input"):
        assert results[name][2].isnan().all()
        others = [row for row in range(5) if row != 2]
        assert torch.equal(results[name][others], clean[name][others])
    assert results["grad_weight"].isnan().all()


def test_runs_are_bitwise_equal():
    problem = Problem(50, 40, torch.bfloat16, residual=True, dropout_p=0.3)
    first, second = problem.run(), problem.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_wanted_gradients():
    problem = Problem(3, 20)
    _, _, mean, rstd = _triton.forward(problem.input, None, problem.weight, problem.bias, EPS, False, 0.0, None)
    for need_weight, need_bias in [(False, False), (True, False), (False, True)]:
        _, _, grad_weight, grad_bias = _triton.backward(
            problem.grad_output,
            None,
            problem.input,
            mean,
            rstd,
            problem.weight,
            False,
            0.0,
            None,
            need_weight,
            need_bias,
        )
        assert grad_weight.numel() == (20 if need_weight else 0)
        assert grad_bias.numel() == (20 if need_bias else 0)


@pytest.mark.parametrize("features", [{}, {"rms": True}, {"residual": True, "dropout_p": 0.5}])
@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.bfloat16]))
def test_opcheck(features, dtype):
    problem = Problem(3, 24, dtype, **features)
    results = problem.run()
    torch.library.opcheck(
        torch.ops.bigkern_triton.layer_norm_forward.default,
        (
            problem.input,
            problem.residual,
            problem.weight,
            problem.bias,
            EPS,
            problem.rms,
            problem.dropout_p,
            problem.philox,
        ),
    )
    summed = results.get("summed", problem.input)
    mean = results.get("mean", torch.empty(0))
    torch.library.opcheck(
        torch.ops.bigkern_triton.layer_norm_backward.default,
        (
            problem.grad_output, problem.grad_summed, summed, mean, results["rstd"], problem.weight, problem.rms,
            problem.dropout_p, problem.philox, True, not problem.rms,
        ),
    )  # fmt: skip


def _objection(input, residual=None, weight=None, bias=None, dropout_p=0.0):
    return _triton.unsupported(input, residual, weight, bias, EPS, False, dropout_p)


def test_unsupported(monkeypatch):
    x = torch.zeros(2, 4)
    assert _objection(x, x, x[0], x[0], 0.5) is None
    assert _objection(x.bfloat16(), None, x[0], x[0]) is None
    assert "float64" in _objection(x.double())
    assert "weight is torch.float64" in _objection(x, weight=x[0].double())
    assert "weight is on meta" in _objection(x, weight=x[0].to("meta"))
    assert "residual is torch.bfloat16" in _objection(x, x.bfloat16())
    assert "dropout" in _objection(x, dropout_p=0.5)
    assert "meta" in _objection(x.to("meta"))
    monkeypatch.setattr(_triton_support, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in _objection(x)
    monkeypatch.setattr(_triton_support, "MISSING", "Triton is not installed (pip install triton; Linux only)")
    assert "pip install triton" in _objection(x)
