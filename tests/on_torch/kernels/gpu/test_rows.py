"""Rows of the Triton kernels against float64, in Triton's interpreter."""

import itertools

import pytest
import torch

from loss_core.row_terms import Coefficients, CrossEntropy, LogProbability, RowTerms, Sums
from loss_core_torch.kernels import Rows, whole_rows
from on_torch.kernels.gpu.sets import SETS, V, counted, layouts

pytestmark = pytest.mark.parametrize("flag", ["torch:triton"])
each_set = pytest.mark.parametrize("name", SETS)

FORMATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _rows(logits, vocab_start=0, ignored=True):
    """Rows, some with a label outside of these columns, and some ignored."""
    num_rows, vocab = logits.shape[:-1].numel(), logits.shape[-1]
    labels_T = torch.randint(0, vocab, (num_rows,)) + vocab_start
    labels_T[1::5] = vocab_start + vocab + 3
    return Rows(logits, labels_T, torch.arange(num_rows) % 4 != 3 if ignored else None, vocab_start)


def _expected(rows, coef_T, uniform_T=None, of_entropy_T=None):
    """Terms and gradient in float64, by definition: of coef * cross entropy, and of_entropy * entropy."""
    z_TV, slope_TV = whole_rows(rows._replace(logits=rows.logits.double()))
    hit_TV = rows.labels_T[:, None] - rows.vocab_start == torch.arange(z_TV.shape[1])
    t_T = torch.where(hit_TV, z_TV, -torch.inf).amax(-1)
    m_T = z_TV.amax(-1)
    x_TV, log_p_TV = z_TV - m_T[:, None], z_TV.log_softmax(-1)
    terms = RowTerms(m_T, x_TV.exp().sum(-1), t_T, z_TV.sum(-1), (x_TV.exp() * x_TV).sum(-1))
    grad_TV = coef_T.double()[:, None] * (z_TV.softmax(-1) - hit_TV.double())
    if uniform_T is not None:
        grad_TV -= uniform_T.double()[:, None]
    if of_entropy_T is not None:
        entropy_T1 = -(log_p_TV.exp() * log_p_TV).sum(-1, keepdim=True)
        grad_TV -= of_entropy_T.double()[:, None] * log_p_TV.exp() * (log_p_TV + entropy_T1)
    grad_TV *= slope_TV
    if rows.keep_T is not None:
        grad_TV = torch.where(rows.keep_T[:, None], grad_TV, 0.0)
    return terms, grad_TV.view(rows.logits.shape)


def _close(got, expected, dtype):
    """Equal up to float32 inside and one rounding to the dtype."""
    inner = 1e-12 if dtype == torch.float64 else 2e-6
    rtol = max(torch.finfo(dtype).eps, 10 * inner)
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=max(inner, torch.finfo(dtype).tiny))


def _same_terms(rows, got, expected):
    keep_T = slice(None) if rows.keep_T is None else rows.keep_T
    for name, term_T, want_T in zip(RowTerms._fields, got, expected, strict=True):
        if term_T is not None:
            dtype = term_T.dtype
            torch.testing.assert_close(
                term_T[keep_T].double(), want_T[keep_T], rtol=20 * torch.finfo(dtype).eps, atol=1e-4, msg=name
            )


@each_set
@pytest.mark.parametrize("dtype", FORMATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("ignored", [True, False], ids=["some-ignored", "none-ignored"])
def test_terms_and_gradient(flag, name, dtype, ignored):
    kernels = SETS[name]
    rows = _rows((torch.randn(7, V) * 3).to(dtype), vocab_start=5, ignored=ignored)
    coef_T = torch.randn(7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    terms, grad = _expected(rows, coef_T)
    found = kernels.row_terms(rows, Sums())
    assert found.z_sum is None
    _same_terms(rows, found, terms)
    coefficients = CrossEntropy(V).coefficients(torch, found, [coef_T])
    _close(kernels.row_grad(rows, found, coefficients), grad, dtype)
    at_once, made, _ = kernels.row_terms_and_grad(rows, coef_T, CrossEntropy(V))
    _same_terms(rows, at_once, terms)
    _close(made, grad, dtype)
    assert made.dtype == dtype


@each_set
def test_the_sum_of_all_logits_and_the_uniform_part(flag, name):
    kernels, rows, coef_T, uniform_T = SETS[name], _rows(torch.randn(7, V)), torch.randn(7), torch.randn(7)
    terms, grad = _expected(rows, coef_T, uniform_T)
    for found in (
        kernels.row_terms(rows, Sums(z_sum=True)),
        kernels.row_terms_and_grad(rows, coef_T, CrossEntropy(V, 0.1))[0],
    ):
        assert found.z_sum is not None
        _same_terms(rows, found, terms)
    coefficients = CrossEntropy(V).coefficients(torch, found, [coef_T])
    coefficients = coefficients._replace(uniform=uniform_T, target=coefficients.target - uniform_T)
    _close(kernels.row_grad(rows, found, coefficients), grad, torch.float32)


@each_set
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [None, 1.5])
def test_entropy_softcap_and_temperature(flag, name, softcap, temperature):
    kernels, rows, upstream_T, of_entropy_T = SETS[name], _rows(torch.randn(7, V)), torch.randn(7), torch.randn(7)
    inverse_T = None if temperature is None else 1.0 / torch.linspace(0.5, temperature, 7)
    rows = rows._replace(softcap=softcap, inverse_temperature_T=inverse_T)
    terms, grad = _expected(rows, -upstream_T, of_entropy_T=of_entropy_T)
    found = kernels.row_terms(rows, Sums(e=True))
    _same_terms(rows, found, terms)
    coefficients = LogProbability(entropy=True).coefficients(torch, found, [upstream_T, of_entropy_T])
    _close(kernels.row_grad(rows, found, coefficients), grad, torch.float32)
    found, made, _ = kernels.row_terms_and_grad(rows, upstream_T, CrossEntropy(V))
    _same_terms(rows, found, terms)
    _close(made, _expected(rows, upstream_T)[1], torch.float32)


@each_set
def test_the_column_of_the_label_is_rounded_once(flag, name):
    """Where the label has nearly all of the probability, p in bfloat16 is 1, and p - 1 must not be 0."""
    logits = torch.zeros(3, V, dtype=torch.bfloat16)
    logits[:, 20] = 12.0
    rows, coef_T = Rows(logits, torch.tensor([20, 20, 20]), None), torch.ones(3)
    _, grad = _expected(rows, coef_T)
    terms, made, _ = SETS[name].row_terms_and_grad(rows, coef_T, CrossEntropy(V))
    coefficients = CrossEntropy(V).coefficients(torch, terms, [coef_T])
    for got in (made, SETS[name].row_grad(rows, terms, coefficients)):
        torch.testing.assert_close(got[:, 20].double(), grad[:, 20], rtol=2**-8, atol=0)


@each_set
def test_ignored_rows_of_nan_and_inf(flag, name):
    logits = torch.randn(6, V)
    logits[1::2] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None]
    rows = Rows(logits, torch.arange(6), torch.arange(6) % 2 == 0)
    coef_T = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 0.5, 1.0])
    terms, made, _ = SETS[name].row_terms_and_grad(rows, coef_T, CrossEntropy(V))
    coefficients = CrossEntropy(V).coefficients(torch, terms, [coef_T])
    for grad in (made, SETS[name].row_grad(rows, terms, coefficients)):
        assert not grad[1::2].any()
        assert grad[::2].isfinite().all()
        assert grad[::2].any()


@each_set
def test_minus_infinity_and_huge_logits(flag, name):
    logits = torch.randn(4, V) + torch.tensor([0.0, 1e4, -1e4, 0.0])[:, None]
    logits[0, ::2], logits[3, 1:] = -torch.inf, -torch.inf
    rows, coef_T = Rows(logits, torch.tensor([1, 2, 3, 0]), None), torch.ones(4)
    terms, grad = _expected(rows, coef_T)
    found, made, _ = SETS[name].row_terms_and_grad(rows, coef_T, CrossEntropy(V))
    _close(made, grad, torch.float32)
    expected = CrossEntropy(V).values(torch, terms._replace(z_sum=None))[0]
    torch.testing.assert_close(CrossEntropy(V).values(torch, found)[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", layouts())
def test_any_layout(flag, layout):
    kernels, rows = SETS["tiny-blocks"], _rows(layouts()[layout])
    coef_T = torch.randn(rows.labels_T.shape)
    grad = _expected(rows, coef_T)[1] if rows.logits.numel() else rows.logits.double()
    found, made, _ = kernels.row_terms_and_grad(rows, coef_T, CrossEntropy(V))
    shared, coefficients = SETS["shared-rows"], CrossEntropy(V).coefficients(torch, found, [coef_T])
    by_several = shared.row_terms_and_grad(rows, coef_T, CrossEntropy(V))[1]
    for got in (made, by_several, kernels.row_grad(rows, found, coefficients)):
        assert got.is_contiguous()
        _close(got, grad, torch.float32)
    # `out` may have any layout.
    whole = torch.full((*rows.logits.shape[:-1], 2 * rows.logits.shape[-1]), 7.0)
    out = whole.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]
    assert kernels.row_grad(rows, found, coefficients, out=out) is out
    _close(out, grad, torch.float32)


@pytest.mark.parametrize("layout", layouts())
def test_any_layout_is_one_launch(flag, layout):
    kernels, launched = counted()
    rows = _rows(layouts()[layout])
    if not rows.logits.numel():
        return
    terms = kernels.row_terms(rows, Sums())
    kernels.row_grad(rows, terms, CrossEntropy(V).coefficients(torch, terms, [torch.ones(1)]))
    assert launched == ["row_terms_kernel", "row_grad_kernel"]


@pytest.mark.parametrize("layout", [name for name in layouts() if "expanded" not in name])
def test_in_place_of_the_logits(flag, layout):
    kernels, logits = SETS["tiny-blocks"], layouts(torch.bfloat16)[layout]
    rows = _rows(logits)
    coef_T = torch.randn(rows.labels_T.shape)
    terms = kernels.row_terms(rows, Sums())
    coefficients = CrossEntropy(V).coefficients(torch, terms, [coef_T])
    expected = kernels.row_grad(rows, terms, coefficients)
    assert kernels.row_grad(rows, terms, coefficients, out=logits) is logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("layout", [name for name in layouts() if "expanded" not in name])
def test_shared_rows_in_place_of_the_logits(flag, layout):
    """No program writes before all programs of the row have read their logits."""
    logits = layouts(torch.bfloat16)[layout]
    rows = _rows(logits)
    coef_T = torch.randn(rows.labels_T.shape)
    terms, grad = _expected(rows, coef_T) if logits.numel() else (None, logits.double())
    found, made, _ = SETS["shared-rows"].row_terms_and_grad(rows, coef_T, CrossEntropy(V), out=logits)
    assert made is logits
    _close(logits, grad, torch.bfloat16)
    if terms is not None:
        _same_terms(rows, found, terms)


@each_set
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_returned_coefficients(flag, name, smoothing):
    rows, coef_T, objective = _rows(torch.randn(7, V)), torch.randn(7), CrossEntropy(V, smoothing, z_loss=0.1)
    terms, _, found = SETS[name].row_terms_and_grad(rows, coef_T, objective)
    expected = objective.coefficients(torch, terms, [coef_T])
    for got_T, want_T in zip(found, expected, strict=True):
        assert (got_T is None) == (want_T is None)
        if got_T is not None:
            torch.testing.assert_close(got_T[rows.keep_T], want_T[rows.keep_T], rtol=1e-6, atol=1e-6)


@each_set
def test_a_factor_of_all_coefficients(flag, name):
    """With a factor of 1, `out` is not written."""
    kernels, rows, coef_T = SETS[name], _rows(torch.randn(4, V)), torch.randn(4)
    terms, made, coefficients = kernels.row_terms_and_grad(rows, coef_T, CrossEntropy(V, 0.1))
    for factor, written in ((1.0, False), (1.0 + 2**-20, True), (3.0, True), (torch.nan, True)):
        out, scalar = torch.full((4, V), 7.0), torch.tensor(factor)
        assert kernels.row_grad(rows, terms, coefficients._replace(factor=scalar), out) is out
        assert bool((out != 7.0).all()) == written
        expected = torch.where(rows.keep_T[:, None], made * factor, 0.0)
        for got in (kernels.row_grad(rows, terms, coefficients._replace(factor=scalar)), *([out] if written else [])):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
        sloped = coefficients._replace(slope=torch.linspace(-1.0, 1.0, 4))
        expected = torch.where(rows.keep_T[:, None], kernels.row_grad(rows, terms, sloped) * factor, 0.0)
        got = kernels.row_grad(rows, terms, sloped._replace(factor=scalar))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_labels_and_coefficients_of_any_stride(flag):
    logits, labels_T = torch.randn(8, V), torch.arange(24).view(8, 3)[:, 1]
    rows, coef_T = Rows(logits, labels_T, None), torch.tensor(0.5).expand(8)
    _, grad = _expected(rows, coef_T)
    terms, made, _ = SETS["own-sizes"].row_terms_and_grad(rows, coef_T, CrossEntropy(V))
    _close(made, grad, torch.float32)
    coefficients = CrossEntropy(V).coefficients(torch, terms, [coef_T])
    coefficients = Coefficients(coefficients.scale, torch.stack([coefficients.target] * 2, 1)[:, 0])
    _close(SETS["own-sizes"].row_grad(rows, terms, coefficients), grad, torch.float32)


def test_more_columns_than_a_block_of_the_gpu_sizes(flag):
    for vocab in (40001, 9001):
        kernels, launched = counted()
        rows, coef_T = _rows(torch.randn(3, vocab).to(torch.bfloat16)), torch.ones(3)
        terms, grad = _expected(rows, coef_T)
        found, made, _ = kernels.row_terms_and_grad(rows, coef_T, CrossEntropy(V))
        _same_terms(rows, found, terms)
        _close(made, grad, torch.bfloat16)
        assert launched == ["row_kernel"]


@each_set
def test_rows_that_begin_between_vectors(flag, name):
    """Of any width and offset: shorter than a vector, edges alone, one column more than full vectors."""
    memory = torch.randn(4096).to(torch.bfloat16)
    for start, vocab in itertools.product((0, 1, 7), (1, 2, 7, 9, 15, 16, 17, 31, 97)):
        rows = _rows(memory[start : start + 3 * vocab].view(3, vocab))
        coef_T = torch.randn(3)
        terms, grad = _expected(rows, coef_T)
        found, made, _ = SETS[name].row_terms_and_grad(rows, coef_T, CrossEntropy(vocab))
        _same_terms(rows, found, terms)
        coefficients = CrossEntropy(vocab).coefficients(torch, found, [coef_T])
        for got in (made, SETS[name].row_grad(rows, found, coefficients)):
            _close(got, grad, torch.bfloat16)


@each_set
def test_a_row_does_not_depend_on_the_others(flag, name):
    """Bitwise, alone and among others, where a row is a multiple of the vector width."""
    logits, labels_T, coef_T = torch.randn(7, 104).to(torch.bfloat16), torch.randint(0, 104, (7,)), torch.randn(7)
    found, grad, _ = SETS[name].row_terms_and_grad(Rows(logits, labels_T, None), coef_T, CrossEntropy(104))
    for at in (slice(3, 4), slice(2, 6)):
        alone = Rows(logits[at].clone(), labels_T[at], None)
        terms, made, _ = SETS[name].row_terms_and_grad(alone, coef_T[at], CrossEntropy(104))
        assert torch.equal(terms.m, found.m[at])
        assert torch.equal(terms.s, found.s[at])
        assert torch.equal(made, grad[at])


def test_offsets_beyond_32_bits(flag):
    # 4.3 GB, of which only the pages written are allocated.
    rows_apart = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 40), (2**31 + 16, 1))
    columns_apart = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 40), (16, (2**31 + 16) // 39))
    for far in (rows_apart, columns_apart):
        far.copy_(torch.randn(2, 40))
        rows, coef_T = Rows(far, torch.tensor([3, 39]), None), torch.ones(2)
        terms, grad = _expected(rows, coef_T)
        found = SETS["own-sizes"].row_terms(rows, Sums())
        _same_terms(rows, found, terms)
        coefficients = CrossEntropy(V).coefficients(torch, found, [coef_T])
        _close(SETS["own-sizes"].row_grad(rows, found, coefficients, out=far), grad, torch.bfloat16)


def test_no_vocabulary_is_an_empty_piece(flag):
    kernels, launched = counted()
    rows, zeros_T = Rows(torch.randn(2, 3, 0), torch.zeros(6).long(), None), torch.zeros(6)
    found = kernels.row_terms(rows, Sums(z_sum=True, e=True))
    torch.testing.assert_close(tuple(found), (zeros_T - torch.inf, zeros_T, zeros_T - torch.inf, zeros_T, zeros_T))
    assert kernels.row_terms_and_grad(rows, torch.ones(6), CrossEntropy(V))[1].shape == rows.logits.shape
    assert not launched
