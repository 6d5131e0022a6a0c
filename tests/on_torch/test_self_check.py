"""Whether kernels agree with others on a few rows, and what auto does where they do not."""

import re
import warnings

import pytest
import torch

from helpers.torch_calls import every_dtype
from loss_core import KernelChoice
from loss_core_torch import auto, kernels
from loss_core_torch.kernels.eager import EagerKernels
from loss_core_torch.self_check import disagreement

CPU = torch.device("cpu")
EAGER = kernels.find("eager")


class _Wrong(EagerKernels):
    """Kernels one of whose results comes out wrong."""

    flag = "torch:wrong"

    def __init__(self, method, spoil, at=None):
        super().__init__()
        real = getattr(EAGER, method)

        setattr(self, method, lambda *args, **kwargs: _spoilt(real(*args, **kwargs), spoil, at))


def _spoilt(made, spoil, at):
    """What was made, wrong at a place: None for all of it, an index, or the name of a product into its first matrix."""
    if at is None:
        return spoil(made)
    if isinstance(at, str):
        real = getattr(made, at)

        def multiply(out_MN, *args):
            real(out_MN, *args)
            out_MN.copy_(spoil(out_MN))

        setattr(made, at, multiply)
        return made
    make = type(made)._make if hasattr(made, "_make") else tuple
    return make(spoil(x) if i == at else x for i, x in enumerate(made))


def _of_terms(name, spoil):
    return lambda made: (made[0]._replace(**{name: spoil(getattr(made[0], name))}), *made[1:])


def _scaled(x):
    return x * 1.01


def _with_a_nan(x):
    x = x.clone()
    x.view(-1)[5] = torch.nan
    return x


def _raises(x):
    raise RuntimeError("no kernel image is available")


# What is spoilt -> (method, index of the result or None for all of it, what the message names).
RESULTS = {
    "row gradient": ("row_terms_and_grad", 1, "the gradient of the logits"),
    "student's gradient": ("pair_grad", None, "the student's gradient"),
    "student's gradient in one visit": ("pair_terms_and_grad", 1, "the student's gradient of long rows"),
    "weight's gradient": ("products", "accumulate", "the gradient of the weight"),
}


@every_dtype
def test_kernels_agree_with_themselves(dtype):
    assert disagreement(EAGER, EAGER, CPU, dtype) is None


@every_dtype
@pytest.mark.parametrize("spoil", [lambda x: x * 1.25, _with_a_nan], ids=["scaled", "nan"])
@pytest.mark.parametrize("result", RESULTS)
def test_a_wrong_gradient_is_named_with_its_numbers(result, spoil, dtype):
    method, at, name = RESULTS[result]
    found = disagreement(_Wrong(method, spoil, at), EAGER, CPU, dtype)
    pattern = rf"{name} of torch:wrong and torch:eager in {dtype} is (\S+) and (\S+) at element (\d+)"
    got, wanted, at_element = re.fullmatch(pattern, found).groups()
    if got == "nan":
        assert at_element == "5"
    else:
        assert float(got) == pytest.approx(1.25 * float(wanted), rel=1e-2)
        assert float(wanted) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("result", RESULTS)
def test_a_hundredth_is_enough(result, dtype):
    method, at, name = RESULTS[result]
    assert name in disagreement(_Wrong(method, _scaled, at), EAGER, CPU, dtype)


def test_a_wrong_sum_is_named():
    found = disagreement(_Wrong("row_terms_and_grad", _of_terms("s", _scaled)), EAGER, CPU, torch.float32)
    assert found.startswith("the sum of a row of torch:wrong")


def test_a_wrong_product_is_named():
    found = disagreement(_Wrong("products", _scaled, "into"), EAGER, CPU, torch.float32)
    assert found.startswith("the sum of a fused row of torch:wrong")


def test_a_wrong_divergence_is_named():
    found = disagreement(
        _Wrong("pair_terms", lambda terms: terms._replace(a=terms.a * 1.01)), EAGER, CPU, torch.float32
    )
    assert found.startswith("the divergence of a row of torch:wrong")


def test_what_ignored_rows_hold_is_compared():
    # Row 3 is ignored: its gradient must be exactly 0.
    def spoil(grad_TV):
        return torch.where(torch.arange(len(grad_TV))[:, None] == 3, 0.5, grad_TV)

    found = disagreement(_Wrong("row_terms_and_grad", spoil, 1), EAGER, CPU, torch.float32)
    assert re.match(
        r"the gradient of the logits of torch:wrong and torch:eager in torch.float32 is 0.5 and 0 at", found
    )


def test_kernels_that_raise_disagree():
    found = disagreement(_Wrong("row_terms_and_grad", _raises, 1), EAGER, CPU, torch.float32)
    assert found == "torch:wrong raised RuntimeError: no kernel image is available"


@pytest.mark.parametrize("flag", ["torch:triton"])
@every_dtype
def test_triton_agrees(flag, dtype):
    assert disagreement(kernels.find("triton"), EAGER, CPU, dtype) is None


@pytest.mark.parametrize("flag", ["torch:triton"])
def test_triton_made_wrong_does_not(flag):
    class Wrong(type(kernels.find("triton"))):
        def row_terms_and_grad(self, *args, **kwargs):
            terms, grad, coefficients = super().row_terms_and_grad(*args, **kwargs)
            return terms, grad * 1.01, coefficients

    found = disagreement(Wrong(), EAGER, CPU, torch.float32)
    assert found.startswith("the gradient of the logits of torch:triton and torch:eager in torch.float32 is")


@pytest.mark.parametrize("flag", ["torch:triton"])
@pytest.mark.parametrize(("kernel", "named"), [("row", "the gradient"), ("pair", "the student's gradient")])
def test_rows_that_programs_share_are_compared(flag, kernel, named):
    """As on a device that never lets one program see what another tells: such rows are NaN."""
    from loss_core_torch.kernels.gpu import GpuKernels
    from loss_core_torch.kernels.gpu.launch import Launcher, launch

    def run(launched, grid, grad, *args, **options):
        launch(launched, grid, grad, *args, **options)
        if options.get("NUM_PIECES", 1) > 1 and launched.fn.__name__ == f"{kernel}_kernel":
            grad.fill_(torch.nan)

    found = disagreement(GpuKernels(Launcher(launch=run)), EAGER, CPU, torch.bfloat16)
    assert found.startswith(f"{named} of long rows of torch:triton and torch:eager in torch.bfloat16 is nan")


# --- what auto does


TRITON = KernelChoice("torch:triton", "by the table", ("eager", "triton"))


def test_auto_takes_what_agrees():
    assert auto.where_it_agrees(TRITON, EAGER, CPU, torch.float32) is TRITON


def test_auto_takes_eager_instead_and_warns_once():
    wrong = _Wrong("row_terms_and_grad", _scaled, 1)
    with pytest.warns(
        UserWarning, match=r"torch:auto takes torch:eager instead of torch:wrong on cpu: the gradient of"
    ):
        choice = auto.where_it_agrees(TRITON, wrong, CPU, torch.float32)
    assert choice.flag == "torch:eager"
    assert choice.reason.startswith("torch:wrong was found wrong on this device: the gradient of the logits of")
    assert choice.candidates == TRITON.candidates
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert auto.where_it_agrees(TRITON, wrong, CPU, torch.float32) == choice


def test_auto_takes_eager_instead_of_kernels_that_raise():
    with pytest.warns(UserWarning, match="raised RuntimeError: no kernel image"):
        choice = auto.where_it_agrees(TRITON, _Wrong("pair_grad", _raises), CPU, torch.float32)
    assert choice.flag == "torch:eager"
