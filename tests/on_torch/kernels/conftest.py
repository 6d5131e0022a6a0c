import pytest

from loss_core_torch import compat

no_onednn = pytest.mark.skipif(compat.onednn_operator() is None, reason="this PyTorch has no oneDNN")


@pytest.fixture(params=[pytest.param(False, id="mkl"), pytest.param(True, id="onednn", marks=no_onednn)])
def by_onednn(request):
    """Whether oneDNN or MKL computes the products."""
    return request.param
