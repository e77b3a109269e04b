"""Attention's results and gradients on every backend: the error rule, the features crossed, edge cases, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import bigkern
from bigkern.ops import attention, attention_varlen
from tests import numerics
from tests.conftest import pick
from tests.ops.attention_cases import PHILOX, Case, pairwise, relaid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("query", "key", "value", "attn_mask")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(case: Case, device, factor=2.0):
    inputs = case.inputs(device)
    numerics.check(case.kernel, case.reference, inputs, names=NAMES[: len(inputs)], factor=factor)


def qkv(*shape, dtype=torch.float32, device="cpu", seed=0, grad=True):
    """Three normal tensors of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad) for _ in range(3)]


# The error rule, over all features


# Of a query that sees one key, the score's gradient is grad_lse beside P dP - delta, the difference of two equal sums.
# torch rounds both alike; 3xTF32 keeps 2^-22 of a product, the sum of the rows' delta 2^-24. What is left is a few
# roundings of |grad_output| |value|, here 3 and 9 times torch's, root mean square of eight draws.
ONE_KEY = (
    Case(
        head_dim=200, value_dim=24, lengths=(1, 200), heads=(4, 2), mask="bias keys", window=(1, 0), alibi="batch",
        layout="joined", scale=-0.2, lse=True,
    ),
    Case(
        head_dim=8, lengths=(1, 200), heads=(3, 1), mask="bool", window=(1, 0), softcap=2.0, alibi="heads",
        dropout_p=0.3, scale=-0.2, lse=True,
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", pick(pairwise(400), pairwise(1)[::4]), ids=str)
def test_features_crossed(backend, device, case):
    check(case, device, factor=12 if case in ONE_KEY else 2)


@dtypes
@pytest.mark.parametrize("head_dim", pick([1, 7, 16, 64, 65, 127, 128, 129, 256], [1, 64, 129]))
def test_head_dims(backend, device, dtype, head_dim):
    check(Case(dtype=dtype, head_dim=head_dim, lengths=(5, 37), heads=(1, 1), lse=True), device)


@dtypes
@pytest.mark.parametrize("lengths", pick([(1, 1), (64, 64), (127, 129), (129, 127), (3, 300), (300, 3)], [(129, 65)]))
def test_lengths(backend, device, dtype, lengths):
    check(Case(dtype=dtype, lengths=lengths, causal="top"), device)
    check(Case(dtype=dtype, lengths=lengths, causal="bottom"), device)


@dtypes
@pytest.mark.parametrize("scale", pick([1e-3, 1e-2, 10.0], [1e-3, 10.0]))
def test_scales(backend, device, dtype, scale):
    inputs = [(scale * x.detach()).requires_grad_() for x in Case(dtype=dtype).inputs(device)]
    numerics.check(Case().kernel, Case().reference, inputs)


@dtypes
def test_large_scores_pick_one_key(backend, device, dtype):
    """Scores of about 1e6: weights are 0 and 1, and the output one of the values."""
    q, k, v = (1e3 * x.detach() for x in Case(dtype=dtype).inputs(device))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attention(q, k, v).double(), expected, rtol=2**-21, atol=0)


@dtypes
def test_one_key_a_row(backend, device, dtype):
    """The weights are 1: the values come out, exactly but for the split of float32."""
    q, k, v = (x.detach() for x in Case(dtype=dtype, lengths=(70, 70)).inputs(device))
    torch.testing.assert_close(attention(q, k, v, window=0), v, rtol=2**-21 if dtype == torch.float32 else 0, atol=0)


def test_the_reference_is_torchs_operator():
    """Where torch's has the feature; its gradients by autograd."""
    for case in (Case(), Case(causal="top", heads=(4, 2)), Case(mask="bool rows", batch=2), Case(mask="bias heads")):
        inputs = [numerics.to_double(x) for x in case.inputs("cpu")]
        group = case.heads[0] != case.heads[1]

        def torchs(q, k, v, bias=None, case=case, group=group):
            mask = case.bool_mask("cpu") if bias is None else bias
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, case.causal == "top", enable_gqa=group)

        mine, its = (numerics.run(f, inputs) for f in (case.reference, torchs))
        torch.testing.assert_close(mine[0] + mine[1], its[0] + its[1])


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 8), (7, 8), (7, 6)],
        [(3, 5, 8), (3, 7, 8), (3, 7, 6)],
        [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)],
        [(2, 1, 2, 3, 5, 8), (2, 1, 2, 3, 7, 8), (2, 1, 2, 3, 7, 6)],
        [(2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6)],
        [(1, 4, 2, 5, 8), (3, 1, 2, 7, 8), (3, 1, 2, 7, 6)],
    ],
    ids=str,
)
def test_shapes_as_torch(backend, device, shapes):
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    assert attention(*inputs).shape == F.scaled_dot_product_attention(*inputs).shape
    numerics.check(attention, F.scaled_dot_product_attention, inputs)
    output, lse = attention(*inputs, return_lse=True)
    assert lse.shape == output.shape[:-1]


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (3, 1, 1), (2, 1, 5, 7), (7,), ()], ids=str)
@pytest.mark.parametrize("boolean", [True, False])
def test_mask_shapes_as_torch(backend, device, shape, boolean):
    q, k, v = (torch.randn(2, 3, n, 8, device=device) for n in (5, 7, 7))
    mask = torch.rand(shape, device=device)
    mask = mask > 0.5 if boolean else mask
    wide = mask if mask.dim() > 1 else mask.expand(5, 7)
    torch.testing.assert_close(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, wide))


def test_causal_biases_as_torch(backend, device):
    q, k, v = (torch.randn(1, 2, n, 8, device=device) for n in (5, 9, 9))
    for make in (causal_upper_left, causal_lower_right):
        bias = make(5, 9)
        torch.testing.assert_close(attention(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, bias))
    upper = attention(q, k, v, causal_upper_left(5, 9))
    assert torch.equal(upper, attention(q, k, v, is_causal=True))


def test_causal_biases_under_compile(backend, device):
    """Made outside of the traced function, as torch.compile wants it: what it is a mask of is not lost."""
    q, k, v = (torch.randn(1, 2, n, 8, device=device) for n in (5, 9, 9))
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for make in (causal_upper_left, causal_lower_right):
        bias = make(5, 9)
        torch.testing.assert_close(compiled(q, k, v, bias), attention(q, k, v, bias))


def test_float64(backend, device):
    inputs = qkv(1, 2, 5, 8, dtype=torch.float64, device=device)
    if backend == "torch":
        torch.testing.assert_close(attention(*inputs), F.scaled_dot_product_attention(*inputs))
    else:
        with pytest.raises(bigkern.BackendError, match=r"float64(.|\n)*torch: could serve them"):
            attention(*inputs)


# Strides and storage


@pytest.mark.parametrize("head_dim", pick([8, 16, 65, 128], [16, 65]))
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd", "joined", "inner"])
def test_layouts_of_the_outputs_gradient(backend, device, layout, head_dim):
    class Relaid(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return relaid(grad, layout)

    inputs = qkv(2, 2, 9, head_dim, device=device)
    numerics.check(
        lambda *t: Relaid.apply(attention(*t)), lambda *t: Relaid.apply(F.scaled_dot_product_attention(*t)), inputs
    )


def test_expanded_tensors(backend, device):
    q, k, v = qkv(1, 1, 9, 16, device=device)
    numerics.check(
        lambda *t: attention(*(x.expand(2, 3, 9, 16) for x in t)),
        lambda *t: F.scaled_dot_product_attention(*(x.expand(2, 3, 9, 16) for x in t)),
        [q, k, v],
    )
    one_row = qkv(1, 2, 1, 16, device=device)
    numerics.check(
        lambda *t: attention(*(x.expand(1, 2, 40, 16) for x in t)),
        lambda *t: F.scaled_dot_product_attention(*(x.expand(1, 2, 40, 16) for x in t)),
        one_row,
    )


def test_one_tensor_three_times(backend, device):
    x = qkv(2, 2, 9, 16, device=device)[0]
    numerics.check(lambda x: attention(x, x, x), lambda x: F.scaled_dot_product_attention(x, x, x), [x])


def test_rows_far_apart_in_storage(backend, device):
    """Three rows that span more than 2^31 elements: offsets need 64 bits.  The pages between them are never touched."""
    stride = 2**30 + 8
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((1, 1, 3, 64), (0, 0, stride, 1))
    near = torch.randn(1, 1, 3, 64, device=device).to(torch.bfloat16)
    far.copy_(near)
    for place in range(3):
        inputs = [near] * 3
        inputs[place] = far
        torch.testing.assert_close(attention(*inputs), attention(near, near, near), rtol=0, atol=0.02)


# Which gradients


@pytest.mark.parametrize("wanted", range(4), ids=NAMES)
def test_gradient_of_one_input_only(backend, device, wanted):
    case = Case(mask="bias", lengths=(9, 11))
    inputs = [x.detach() for x in case.inputs(device)]
    inputs[wanted].requires_grad_()
    numerics.check(case.kernel, case.reference, inputs, names=NAMES)


@pytest.mark.parametrize("used", [0, 1], ids=["output", "lse"])
def test_gradient_of_one_output_only(backend, device, used):
    case = Case(lengths=(9, 11), lse=True)
    inputs = [x.detach().requires_grad_(i < 2) for i, x in enumerate(case.inputs(device))]
    numerics.check(lambda *t: case.kernel(*t)[used], lambda *t: case.reference(*t)[used], inputs)


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=["heads", "batch"])
@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(33, 70), heads=(4, 4), batch=2),
        Case(dtype=torch.bfloat16, heads=(4, 2), batch=2, causal="bottom", softcap=2.0, dropout_p=0.3, lse=True),
        Case(head_dim=200, value_dim=24, lengths=(70, 33), heads=(4, 2), batch=2, mask="bool", window=(9, -1)),
    ],
    ids=str,
)
def test_gradient_of_alibi_slopes(backend, device, case, shape):
    inputs = case.inputs(device)

    def reference(q, k, v, slopes):
        """ALiBi as the bias that it is, which the slopes' gradient comes from."""
        seqlen_q, seqlen_k = case.lengths
        position = torch.arange(seqlen_q, device=device).unsqueeze(1)
        position = position + (seqlen_k - seqlen_q if case.bottom_right() else 0)
        distance = (torch.arange(seqlen_k, device=device) - position).abs()
        return case.reference(q, k, v, -slopes[..., None, None] * distance)

    def kernel(q, k, v, slopes):
        return case.kernel(q, k, v, slopes=slopes)

    slopes = torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.3
    numerics.check(kernel, reference, [*inputs, slopes.to(device).requires_grad_()])


@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=["heads", "sequences"])
def test_gradient_of_alibi_slopes_of_packed_sequences(backend, device, shape):
    inputs = [packed([5, 0, 70], 2, 16, torch.float32, device, seed) for seed in range(3)]
    cu = cumulative([5, 0, 70], device)
    inputs.append(torch.linspace(0.1, 0.9, math.prod(shape), device=device).reshape(shape).requires_grad_())

    def kernel(q, k, v, slopes):
        return attention_varlen(q, k, v, cu, cu, 70, 70, is_causal=True, alibi_slopes=slopes)

    def reference(*tensors):
        with bigkern.use_backend("torch"):
            return kernel(*tensors)

    numerics.check(kernel, reference, inputs)


def test_no_graph_without_gradients(backend, device):
    inputs = qkv(1, 2, 5, 8, device=device)
    with torch.no_grad():
        assert not attention(*inputs).requires_grad
    with torch.inference_mode():
        attention(*inputs)


def test_gradients_accumulate(backend, device):
    inputs = qkv(1, 2, 5, 8, device=device)
    for _ in range(2):
        attention(*inputs).square().sum().backward()
    once = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    for x, grad in zip(inputs, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * grad)


# Nothing, NaN and infinity


@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)], ids=str)
def test_no_elements(backend, device, sizes):
    batch, heads, seqlen_q, seqlen_k = sizes
    inputs = [
        torch.randn(batch, heads, n, 8, device=device, requires_grad=True) for n in (seqlen_q, seqlen_k, seqlen_k)
    ]
    output, lse = attention(*inputs, return_lse=True)
    assert output.shape == (batch, heads, seqlen_q, 8) and lse.shape == (batch, heads, seqlen_q)
    assert not output.any() and (lse == -torch.inf).all()
    for x, grad in zip(inputs, torch.autograd.grad(output.sum(), inputs), strict=True):
        assert grad.shape == x.shape and not grad.any()
    assert torch.equal(attention(*inputs), output)


@dtypes
def test_rows_that_see_nothing_are_zero(backend, device, dtype):
    inputs = qkv(1, 2, 6, 16, dtype=dtype, device=device)
    mask = torch.ones(6, 6, dtype=torch.bool, device=device)
    mask[2] = False
    bias = torch.zeros(6, 6, dtype=dtype, device=device).masked_fill(~mask, -torch.inf)
    for given_mask in (mask, bias):
        output, lse = attention(*inputs, given_mask, return_lse=True)
        assert not output[:, :, 2].any() and (lse[:, :, 2] == -torch.inf).all()
        grads = torch.autograd.grad(output.sum() + lse[:, :, 3:].sum(), inputs)
        assert all(grad.isfinite().all() for grad in grads) and not grads[0][:, :, 2].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_stays_alone(backend, device, bad):
    q, k, v = qkv(1, 2, 40, 16, device=device, grad=False)
    clean = attention(q, k, v)
    q[0, 1, 7, 3] = bad
    output = attention(q, k, v)
    assert output[0, 1, 7].isnan().any()
    others = torch.ones(1, 2, 40, dtype=torch.bool, device=device)
    others[0, 1, 7] = False
    assert torch.equal(output[others], clean[others])


# Dropout


@pytest.mark.parametrize("lengths", [(5, 8), (7, 13), (20, 68)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mask_is_philoxs_on_every_backend(backend, device, lengths, dtype):
    """Equal scores and a unit matrix of values show the weights: the mask, element for element, and in the gradient."""
    from tests.triton.philox import keep_mask

    seqlen_q, seqlen_k = lengths
    philox = torch.tensor(PHILOX, device=device)
    index = torch.arange(2 * 3 * seqlen_q * seqlen_k).numpy()
    kept = torch.from_numpy(keep_mask(*PHILOX, index, 0.5)).view(2, 3, seqlen_q, seqlen_k).to(device)
    q = torch.zeros(2, 3, seqlen_q, 16, dtype=dtype, device=device)
    k = torch.zeros(2, 3, seqlen_k, 16, dtype=dtype, device=device)
    v = torch.eye(seqlen_k, dtype=dtype, device=device).expand(2, 3, seqlen_k, seqlen_k).clone().requires_grad_()
    output = attention(q, k, v, dropout_p=0.5, philox=philox)
    assert torch.equal(output != 0, kept)
    grad = torch.autograd.grad(output, v, torch.eye(seqlen_q, dtype=dtype, device=device)[:, :1].expand_as(output))[0]
    # Row 0 alone has a gradient; each value's is its weight there.
    assert torch.equal(grad[:, :, :, 0] != 0, kept[:, :, 0])


def test_philox_is_drawn_from_torchs_generator_returned_and_taken(backend, device):
    inputs = qkv(1, 2, 16, 16, device=device, grad=False)
    torch.manual_seed(7)
    output, philox = attention(*inputs, dropout_p=0.3, return_philox=True)
    other, other_philox = attention(*inputs, dropout_p=0.3, return_philox=True)
    assert not torch.equal(philox, other_philox) and not torch.equal(output, other)
    torch.manual_seed(7)
    assert torch.equal(attention(*inputs, dropout_p=0.3, return_philox=True)[0], output)
    assert torch.equal(attention(*inputs, dropout_p=0.3, philox=philox), output)
    for _ in range(2):
        torch.manual_seed(9)
        results = [attention(*inputs, dropout_p=0.3) for _ in range(2)]
        assert not torch.equal(*results)


def test_without_dropout_no_philox_is_drawn(backend, device):
    inputs = qkv(1, 2, 5, 8, device=device)
    state = torch.get_rng_state()
    assert attention(*inputs, return_philox=True)[1] is None
    assert torch.equal(state, torch.get_rng_state())


def test_dropping_everything(backend, device):
    inputs = qkv(1, 2, 5, 8, device=device)
    output = attention(*inputs, dropout_p=1.0, philox=torch.tensor([1, 2], device=device))
    assert not output.any()
    assert not any(grad.any() for grad in torch.autograd.grad(output.sum(), inputs))


# Properties


@settings(
    max_examples=pick([100], [8])[0],
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_properties(backend, device, data):
    seqlen_q, seqlen_k = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 150))
    head_dim, value_dim = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    causal = data.draw(st.booleans())
    window = data.draw(st.sampled_from([None, 5, (0, 9)]))
    q, k, v = (
        torch.randn(1, 2, n, d, device=device)
        for n, d in ((seqlen_q, head_dim), (seqlen_k, head_dim), (seqlen_k, value_dim))
    )
    arguments = dict(is_causal=causal, window=window)
    output, lse = attention(q, k, v, return_lse=True, **arguments)
    # Weights sum to one: equal values come back, but in rows that see nothing.
    rows = attention(q, k, torch.ones_like(v), **arguments)
    seen = (lse > -torch.inf).unsqueeze(3).expand_as(rows)
    torch.testing.assert_close(rows[seen], torch.ones_like(rows[seen]))
    assert not rows[~seen].any()
    # The order of keys does not matter.
    if not causal and window is None:
        order = torch.randperm(seqlen_k)
        torch.testing.assert_close(attention(q, k[:, :, order], v[:, :, order]), output, rtol=1e-4, atol=1e-5)
    # What lies after a query does not matter to it.
    if causal:
        part = min(seqlen_q, seqlen_k) // 2 + 1
        prefix = attention(q[:, :, :part], k[:, :, :part], v[:, :, :part], **arguments)
        torch.testing.assert_close(prefix, output[:, :, :part], rtol=1e-4, atol=1e-5)
    # Two halves of the keys, weighed by their sums, are the whole.
    if not causal and window is None and seqlen_k > 1:
        half = seqlen_k // 2
        halves = [attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(half), slice(half, None))]
        total = torch.logaddexp(halves[0][1], halves[1][1])
        torch.testing.assert_close(total, lse, rtol=1e-5, atol=1e-5)
        joined = sum(o * (part - total).exp().unsqueeze(3) for o, part in halves)
        torch.testing.assert_close(joined, output, rtol=1e-4, atol=1e-5)


def test_many_keys_and_one_query(backend, device):
    """Decoding: few rows, whose keys several blocks share; in Triton they do not, and fewer keys are as many tiles."""
    many = 1 if backend == "triton" else 4
    for case in (
        Case(lengths=(1, 375 * many), heads=(4, 2), lse=True, dtype=torch.bfloat16),
        Case(lengths=(2, 175 * many), heads=(4, 1), batch=2, causal="bottom", window=(75 * many, -1)),
        Case(lengths=(1, 175 * many), heads=(2, 2), mask="bool", head_dim=40, softcap=2.0),
    ):
        check(case, device)


# Packed sequences

LENGTHS = {
    "equal": ([3, 20, 1, 70], [3, 20, 1, 70]),
    "cross": ([5, 33, 2], [40, 7, 65]),
    "empty": ([4, 0, 3, 6], [4, 9, 0, 6]),
    "one": ([17], [30]),
}


def packed(lengths, heads, dim, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), heads, dim, generator=generator).to(device, dtype).requires_grad_()


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", pick(DTYPES, [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True, "window": (9, -1)},
        {"softcap": 2.0, "alibi_slopes": True, "scale": 0.3},
        {"dropout_p": 0.3, "is_causal": True},
    ],
    ids=lambda arguments: ",".join(arguments) or "plain",
)
def test_packed_sequences(backend, device, dtype, lengths, arguments):
    """Each is what attention gives for that sequence alone, at the lower right corner."""
    lengths_q, lengths_k = LENGTHS[lengths]
    inputs = [
        packed(lengths_q, 4, 24, dtype, device, 0),
        packed(lengths_k, 2, 24, dtype, device, 1),
        packed(lengths_k, 2, 16, dtype, device, 2),
    ]
    cu_q, cu_k = cumulative(lengths_q, device), cumulative(lengths_k, device)
    philox = torch.tensor(PHILOX, device=device)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.1], device=device)

    def kernel(q, k, v):
        given_arguments = dict(arguments)
        if "alibi_slopes" in arguments:
            given_arguments["alibi_slopes"] = slopes
        if "dropout_p" in arguments:
            given_arguments["philox"] = philox
        return attention_varlen(
            q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), enable_gqa=True, return_lse=True, **given_arguments
        )

    def reference(q, k, v):
        outputs, sums = [], []
        for i, (queries, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            case = Case(
                lengths=(queries, keys),
                heads=(4, 2),
                head_dim=24,
                value_dim=16,
                causal="bottom" if "is_causal" in arguments else "",
                window=arguments.get("window"),
                softcap=arguments.get("softcap"),
                scale=arguments.get("scale"),
                lse=True,
            )
            starts = int(cu_q[i]), int(cu_k[i])
            part = [
                t[s : s + n].transpose(0, 1).unsqueeze(0)
                for t, s, n in zip((q, k, v), (starts[0], starts[1], starts[1]), (queries, keys, keys), strict=True)
            ]
            output, lse = sequence(case, part, i)
            outputs.append(output[0].transpose(0, 1))
            sums.append(lse[0])
        return torch.cat(outputs), torch.cat(sums, 1)

    def sequence(case, part, i):
        """Case.reference, with the slopes, the corner and the dropout mask of the packed call."""
        q, k, v = part
        queries, keys = case.lengths
        distance = (
            torch.arange(keys, device=device) - torch.arange(queries, device=device).unsqueeze(1) - keys + queries
        )
        bias = None
        if "alibi_slopes" in arguments:
            bias = -slopes[:, None, None] * distance.abs()
        if not queries or not keys:
            return q.new_zeros(1, 4, queries, 16) + 0 * q.sum(), torch.full((1, 4, queries), -torch.inf, device=device)
        if "dropout_p" not in arguments:
            return case.reference(q, k, v, bias)
        from tests.triton.philox import keep_mask

        shape = (len(lengths_q), 4, max(lengths_q), max(lengths_k))
        kept = torch.from_numpy(keep_mask(*PHILOX, torch.arange(torch.Size(shape).numel()).numpy(), 0.3)).view(shape)
        kept = kept[i : i + 1, :, :queries, :keys].to(device)
        # Values of a unit matrix are the weights.
        eye = torch.eye(keys, device=device, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        weights, lse = case.reference(q.to(eye.dtype), k.to(eye.dtype), eye.expand(1, 2, keys, keys))
        weights = torch.where(kept, weights / 0.7, 0)
        return (weights @ v.to(eye.dtype).repeat_interleave(2, 1)).to(q.dtype), lse

    numerics.check(kernel, reference, inputs, names=NAMES[:3])


def test_packed_equals_padded(backend, device):
    inputs = [packed([9, 4], 2, 16, torch.float32, device, seed) for seed in range(3)]
    cu = cumulative([9, 4], device)
    output = attention_varlen(*inputs, cu, cu, 9, 9)
    padded = [torch.nn.utils.rnn.pad_sequence(x.split([9, 4]), batch_first=True).transpose(1, 2) for x in inputs]
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=device)
    mask[1, ..., 4:] = False
    expected = attention(*padded, mask).transpose(1, 2)
    torch.testing.assert_close(output, torch.cat([expected[0], expected[1, :4]]))


# Repeated runs


def test_runs_are_bitwise_equal(backend, device):
    batch = 1 if backend == "triton" else 2  # interpreted, a second one costs as much again
    case = Case(dtype=torch.bfloat16, lengths=(70, 150), heads=(2, 1), mask="bias heads", batch=batch, dropout_p=0.3)
    inputs = case.inputs(device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (numerics.run(case.kernel, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


@pytest.mark.parametrize(
    "case",
    pick(pairwise(100)[:40], [Case(dtype=torch.bfloat16, lengths=(70, 150), mask="bias heads", batch=2, causal="")]),
    ids=str,
)
def test_deterministic_mode(backend, device, case):
    torch.use_deterministic_algorithms(True)
    try:
        check(case, device)
    finally:
        torch.use_deterministic_algorithms(False)


# Bad input

Q = torch.ones(2, 4, 5, 8)
K = torch.ones(2, 4, 7, 8)
P = torch.ones(9, 4, 8)
CU = torch.tensor([0, 4, 9], dtype=torch.int32)


def varlen(cu=CU, longest=5, **arguments):
    return attention_varlen(P, P, P, cu, CU, longest, 5, **arguments)


REFUSED = {
    "heads": (lambda: attention(Q, K[:, :2], K[:, :2]), ValueError, "4 heads and key 2.*enable_gqa"),
    "group": (lambda: attention(Q, K[:, :3], K[:, :3], enable_gqa=True), ValueError, "must be a multiple"),
    "value heads": (lambda: attention(Q, K, K[:, :2], enable_gqa=True), ValueError, "key has 4 heads and value 2"),
    "value length": (lambda: attention(Q, K, K[:, :, :3]), ValueError, "key is 7 long and value 3"),
    "head_dim": (lambda: attention(Q, K[..., :4], K), ValueError, "query has head_dim 8 and key 4"),
    "batch": (lambda: attention(Q, K[[0, 0, 0]], K[[0, 0, 0]]), ValueError, r"batch dimensions \(2,\), \(3,\)"),
    "dimensions": (lambda: attention(Q, K[0], K[0]), ValueError, "the same number of dimensions"),
    "one dimension": (lambda: attention(Q[0, 0, 0], K[0, 0, 0], K[0, 0, 0]), ValueError, "at least 2"),
    "not a tensor": (lambda: attention([1.0], K, K), TypeError, "query is a list"),
    "integers": (lambda: attention(Q.long(), K, K), TypeError, "query has dtype torch.int64"),
    "dtypes": (lambda: attention(Q, K.half(), K), TypeError, "must be the same: convert"),
    "devices": (lambda: attention(Q, K.to("meta"), K), ValueError, "key is on meta and query on cpu"),
    "causal and mask": (
        lambda: attention(Q, K, K, torch.ones(5, 7, dtype=torch.bool), is_causal=True), ValueError, "is_causal is set",
    ),
    "causal twice": (
        lambda: attention(Q, K, K, causal_lower_right(5, 7), is_causal=True), ValueError, "only one of them",
    ),
    "causal bias": (lambda: attention(Q, K, K, causal_lower_right(5, 8)), ValueError, "5 queries and 8 keys"),
    "mask shape": (lambda: attention(Q, K, K, torch.ones(5, 6)), ValueError, r"shape \(5, 6\).*\(2, 4, 5, 7\)"),
    "mask dtype": (lambda: attention(Q, K, K, torch.ones(5, 7).long()), TypeError, "attn_mask has dtype torch.int64"),
    "mask device": (lambda: attention(Q, K, K, torch.ones(5, 7, device="meta")), ValueError, "attn_mask is on meta"),
    "mask not a tensor": (lambda: attention(Q, K, K, [1.0]), TypeError, "attn_mask is a list"),
    "dropout_p negative": (lambda: attention(Q, K, K, dropout_p=-0.1), ValueError, r"is -0.1.*\[0, 1\]"),
    "dropout_p above 1": (lambda: attention(Q, K, K, dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    "scale": (lambda: attention(Q, K, K, scale=float("nan"), softcap=1.0), ValueError, "scale is nan"),
    "softcap": (lambda: attention(Q, K, K, softcap=-1.0), ValueError, "softcap is -1.0; it must be positive"),
    "window": (lambda: attention(Q, K, K, window=(1, 2, 3)), ValueError, r"window is \(1, 2, 3\)"),
    "window negative": (lambda: attention(Q, K, K, window=-2), ValueError, "window is -2"),
    "slopes shape": (lambda: attention(Q, K, K, alibi_slopes=torch.ones(3)), ValueError, r"\(4,\) or \(2, 4\)"),
    "slopes dtype": (lambda: attention(Q, K, K, alibi_slopes=torch.ones(4).long()), TypeError, "expected float32"),
    "philox": (lambda: attention(Q, K, K, dropout_p=0.5, philox=torch.ones(2)), ValueError, "philox is torch.float32"),
    "cu_seqlens falls": (
        lambda: varlen(torch.tensor([0, 6, 5], dtype=torch.int32)), ValueError, "must start at 0 and never fall",
    ),
    "cu_seqlens total": (
        lambda: varlen(torch.tensor([0, 4, 8], dtype=torch.int32)), ValueError, "ends at 8; it must end at.*9",
    ),
    "cu_seqlens start": (lambda: varlen(torch.tensor([1, 4, 9], dtype=torch.int32)), ValueError, "must start at 0"),
    "cu_seqlens dtype": (lambda: varlen(CU.long()), TypeError, "cu_seqlens_q is torch.int64"),
    "cu_seqlens size": (lambda: varlen(CU[:1]), ValueError, "at least 2"),
    "sequences": (lambda: varlen(torch.tensor([0, 9], dtype=torch.int32), 9), ValueError, "is of 1 sequences"),
    "max_seqlen": (lambda: varlen(longest=3), ValueError, "max_seqlen_q is 3 and the longest sequence.*5"),
    "packed dimensions": (
        lambda: attention_varlen(Q, Q, Q, CU, CU, 5, 5), ValueError, r"each must be \(total, heads, head_dim\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(backend, case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_head_dim_beyond_256(backend, device):
    inputs = qkv(1, 1, 3, 257, device=device)
    if backend == "torch":
        torch.testing.assert_close(attention(*inputs), F.scaled_dot_product_attention(*inputs))
    else:
        with pytest.raises(bigkern.BackendError, match=r"head_dim is 257(.|\n)*torch: could serve them"):
            attention(*inputs)
