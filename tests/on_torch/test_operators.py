"""The methods of a kernel set as custom operators: a trace computes the same as a direct call."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from helpers.torch_calls import usable_flags
from loss_core import MaskedCrossEntropyConfig
from loss_core.dispatch.observed import names, observing
from loss_core.row_terms import Coefficients, CrossEntropy, PairTerms, RowTerms, Sums
from loss_core_torch import kernels, operators
from loss_core_torch.kernels import BothWanted, HeadOperands, Linear, LinearPairs, PairCoefficients, Pairs, Rows, Wanted
from loss_core_torch.kernels.eager import EagerKernels

# T = tokens, V = vocabulary, H = hidden
T, V, H = 6, 37, 5
OBJECTIVE = CrossEntropy(V)


def _numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _labels(shift=0):
    return (torch.arange(T) * 5 + shift) % V


def _keep():
    return torch.arange(T) % 3 != 1


def _rows(logits):
    return Rows(logits, _labels(), _keep() if logits.dtype != torch.bfloat16 else None)


def _row_terms_of(logits):
    z_TV = logits.float()
    m_T = z_TV.amax(-1)
    return RowTerms(m_T, (z_TV - m_T[:, None]).exp().sum(-1), z_TV.gather(1, _labels()[:, None])[:, 0])


def _pair_terms_of(student, teacher):
    m_s, m_t = student.float().amax(-1), teacher.float().amax(-1)
    s_s, s_t = ((z.float() - m[:, None]).exp().sum(-1) for z, m in ((student, m_s), (teacher, m_t)))
    return PairTerms(m_t, s_t, torch.zeros_like(s_t) + 1e-6, m_s, s_s)


def _linear(h_TH, w_VH, softcap=0.0):
    return Linear(HeadOperands(h_TH, w_VH, h_TH.dtype), _labels(), softcap=softcap)


def _row_grad(kernel_set, logits, upstream_T):
    terms = _row_terms_of(logits)
    coefficients = Coefficients(upstream_T / terms.s, -upstream_T, upstream_T / V)
    return operators.row_grad(kernel_set, _rows(logits), terms, coefficients)


def _pair_grad(of_teacher, beta=0.0):
    def call(kernel_set, student, teacher, upstream_T):
        pairs, terms = Pairs(student, teacher, _keep(), 0.5, 4), _pair_terms_of(student, teacher)
        wanted = PairCoefficients(upstream_T.abs(), upstream_T, of_teacher, beta)
        return operators.pair_grad(kernel_set, pairs, terms, wanted)

    return call


def _pair_mixture(kernel_set, student, teacher):
    pairs, terms = Pairs(student, teacher, _keep(), 0.5, 4), _pair_terms_of(student, teacher)
    return operators.pair_mixture(kernel_set, pairs, terms, 0.3)


def _linear_grads(want):
    def call(kernel_set, h_TH, w_VH, upstream_T):
        linear, terms = _linear(h_TH, w_VH, 3.0), _row_terms_of(h_TH.float() @ w_VH.float().t())
        kept = h_TH.new_empty(0, dtype=torch.float32)
        coefficients = Coefficients(upstream_T / terms.s, -upstream_T, upstream_T / V)
        return operators.linear_grads(kernel_set, linear, terms, coefficients, want, kept)

    return call


def _at_once(want):
    def call(kernel_set, h_TH, w_VH, upstream_T):
        return operators.linear_terms_and_grads(kernel_set, _linear(h_TH, w_VH), upstream_T, OBJECTIVE, want)

    return call


def _linear_pairs(h_s, h_t, w_s, w_t):
    return LinearPairs(HeadOperands(h_s, w_s, h_s.dtype), HeadOperands(h_t, w_t, h_t.dtype), _keep(), 0.5)


def _pairs_at_once(beta, *want):
    def call(kernel_set, *tensors):
        *heads, upstream_T = tensors
        both = BothWanted(*want)
        return operators.linear_pair_loss_and_grads(kernel_set, _linear_pairs(*heads), upstream_T, beta, both)

    return call


def _with_terms(h_s, h_t, w_s, w_t):
    """Linear pairs, and terms of their logits."""
    student, teacher = h_s.float() @ w_s.float().t(), h_t.float() @ w_t.float().t()
    return _linear_pairs(h_s, h_t, w_s, w_t), _pair_terms_of(student, teacher)


def _linear_pair_grads(kernel_set, *tensors):
    *heads, upstream_T = tensors
    linear, terms = _with_terms(*heads)
    wanted = (PairCoefficients(upstream_T.abs(), upstream_T, of_teacher) for of_teacher in (False, True))
    return operators.linear_pair_grads(kernel_set, linear, terms, *wanted, BothWanted(*[Wanted(True, True)] * 2))


LOGITS, OPERANDS = ((T, V),), ((T, H), (V, H))
HEADS = ((T, H), (T, H + 2), (V, H), (V, H + 2))
# Name -> (shapes of the tensors that are drawn, the call).
CALLS = {
    "row_terms": (LOGITS, lambda kernel_set, z: operators.row_terms(kernel_set, _rows(z), Sums(z_sum=True, e=True))),
    "row_grad": ((*LOGITS, (T,)), _row_grad),
    "pair_terms": (LOGITS * 2, lambda kernel_set, s, t: operators.pair_terms(kernel_set, Pairs(s, t, _keep(), 0.5))),
    "pair_grad of the student": ((*LOGITS * 2, (T,)), _pair_grad(False)),
    "pair_grad of the teacher": ((*LOGITS * 2, (T,)), _pair_grad(True)),
    "pair_grad of a mixture": ((*LOGITS * 2, (T,)), _pair_grad(False, 0.3)),
    "pair_mixture": (LOGITS * 2, _pair_mixture),
    "linear_terms": (
        OPERANDS,
        lambda kernel_set, h, w: operators.linear_terms(kernel_set, _linear(h, w, 3.0), Sums(e=True), False),
    ),
    "linear_grads": ((*OPERANDS, (T,)), _linear_grads(Wanted(True, True))),
    "linear_grads of the weight alone": ((*OPERANDS, (T,)), _linear_grads(Wanted(False, True))),
    "linear_terms_and_grads": ((*OPERANDS, (T,)), _at_once(Wanted(True, True))),
    "linear_terms_and_grads of the hidden states alone": ((*OPERANDS, (T,)), _at_once(Wanted(True, False))),
    "linear_pair_terms": (
        HEADS,
        lambda kernel_set, *heads: operators.linear_pair_terms(kernel_set, _linear_pairs(*heads)),
    ),
    "linear_pair_mixture": (
        HEADS,
        lambda kernel_set, *heads: operators.linear_pair_mixture(kernel_set, *_with_terms(*heads), 0.3),
    ),
    "linear_pair_grads": ((*HEADS, (T,)), _linear_pair_grads),
    "linear_pair_loss_and_grads": (
        (*HEADS, (T,)),
        _pairs_at_once(0.3, Wanted(True, True), Wanted(True, True)),
    ),
    "linear_pair_loss_and_grads of the student's alone": (
        (*HEADS, (T,)),
        _pairs_at_once(0.0, Wanted(True, False), Wanted(False, False)),
    ),
}
# Those for which kernel sets have no method: they call methods block by block.
OVER_BLOCKS = tuple(name for name in CALLS if name.startswith("linear_pair"))
SETS = [flag for flag in usable_flags() if flag in ("torch:eager", "torch:compile", "torch:triton")]


def _cells(flags):
    return pytest.mark.parametrize(
        ("flag", "name"),
        [
            pytest.param(flag, name, id=f"{flag}-{name}", marks=[pytest.mark.slow] if flag == "torch:compile" else [])
            for flag in flags
            for name in CALLS
            if name in OVER_BLOCKS or hasattr(kernels.find(flag.partition(":")[2]), name.partition(" ")[0])
        ],
    )


cells = _cells(SETS)
some_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def _call(flag, name, dtype, seed=0):
    """A call of a kernel set, and its tensors; [T] ones are in the dtype of the arithmetic."""
    shapes, call = CALLS[name]
    kernel_set = kernels.find(flag.partition(":")[2])
    drawn = [
        _numbers(*shape, seed=seed + i, dtype=dtype if len(shape) > 1 else torch.float32)
        for i, shape in enumerate(shapes)
    ]
    return lambda *tensors: tuple(x for x in pytree.tree_leaves(call(kernel_set, *tensors)) if x is not None), drawn


def _ours(graph):
    return [node.target for node in graph.graph.nodes if str(node.target).startswith("loss_core.")]


@pytest.mark.parametrize(
    ("mode", "dtype"), [("real", torch.bfloat16), ("symbolic", torch.float32)], ids=["real", "symbolic"]
)
@cells
def test_make_fx_records_one_operator_with_the_same_results(flag, name, mode, dtype):
    call, drawn = _call(flag, name, dtype)
    graph = make_fx(call, tracing_mode=mode)(*drawn)
    assert [str(target) for target in _ours(graph)] == [f"loss_core.{name.partition(' ')[0]}.default"]
    # Values that were not traced.
    _, others = _call(flag, name, dtype, seed=7)
    # NaN: values of ignored rows are arbitrary.
    torch.testing.assert_close(graph(*others), call(*others), rtol=0, atol=0, equal_nan=True)


@some_dtypes
@cells
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(flag, name, dtype):
    call, drawn = _call(flag, name, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = call(*map(mode.from_tensor, drawn))
    expected = [(x.shape, x.dtype, x.stride()) for x in call(*drawn)]
    assert [(x.shape, x.dtype, x.stride()) for x in fakes] == expected


# torch.compile identifies a kernel set by its name.
@_cells([flag for flag in SETS if flag != "torch:triton"])
def test_torch_compile_records_one_operator_with_the_same_results(flag, name):
    call, drawn = _call(flag, name, torch.float32)
    expected = call(*drawn)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*drawn)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in CALLS if "alone" not in name])
def test_the_operators_pass_pytorchs_opcheck(name, dtype):
    # PyTorch's own check: nothing is mutated or aliased, and fake results match real ones.
    call, drawn = _call("torch:eager", name, dtype)
    found = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "loss_core":
                found.append((func, args, kwargs or {}))
            return func(*args, **kwargs or {})

    if dtype == torch.float64:
        drawn = [x.double() for x in drawn]
    graph = make_fx(call)(*drawn)
    with Seen():
        graph(*drawn)
    ((operator, args, kwargs),) = found
    torch.library.opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_a_call_without_a_trace_is_no_operator_and_is_recorded():
    call, drawn = _call("torch:eager", "row_grad", torch.float32)
    with torch.profiler.profile() as profiler, observing() as seen:
        call(*drawn)
    assert not [event for event in profiler.events() if event.name.startswith("loss_core::")]
    assert names(seen) == "torch:eager"
    graph = make_fx(call)(*drawn)
    with observing() as seen:
        graph(*drawn)
    assert names(seen) == "torch:eager"


def test_a_second_derivative_names_the_flag_that_has_it():
    def call(z):
        return operators.row_terms(kernels.find("eager"), Rows(z, _labels(), None), Sums()).s

    graph = make_fx(call)(_numbers(T, V))
    z = _numbers(T, V).requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='torch:plain'"):
        graph(z).sum().backward()


PRODUCTS = {
    "linear_terms": 1,
    "linear_grads": 3,
    "linear_grads of the weight alone": 2,
    "linear_terms_and_grads": 3,
    "linear_terms_and_grads of the hidden states alone": 2,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_the_operators_are_those_of_their_products(name):
    call, drawn = _call("torch:eager", name, torch.float32)
    graph = make_fx(call)(*drawn)
    with FlopCounterMode(display=False) as counted:
        graph(*drawn)
    by_operator = counted.get_flop_counts()["Global"]
    ours = {str(operator): flops for operator, flops in by_operator.items() if "loss_core" in str(operator)}
    assert ours == {f"loss_core.{name.partition(' ')[0]}": PRODUCTS[name] * 2 * T * H * V}
    with FlopCounterMode(display=False) as counted:
        call(*drawn)
    # The test computes the terms for these gradients itself, with one more product.
    own = name.startswith("linear_grads")
    assert counted.get_total_flops() == (PRODUCTS[name] + own) * 2 * T * H * V


def test_custom_kernels_are_refused_in_a_graph():
    # A graph identifies kernels by their flag: it would run those of the library.
    loss = MaskedCrossEntropyConfig().build(backend="torch:eager").with_kernels(EagerKernels())
    logits, labels = _numbers(T, V), _labels()
    expected = loss(logits, labels)
    with pytest.raises(Exception, match=r"'torch:eager' were given to the module by with_kernels"):
        torch.compile(loss, fullgraph=True, backend="eager")(logits, labels)
    with pytest.raises(RuntimeError, match=r"'torch:eager' were given to the module by with_kernels"):
        make_fx(loss)(logits, labels)
    assert torch.equal(loss(logits, labels), expected)
