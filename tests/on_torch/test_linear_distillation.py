"""FusedLinearKDLoss: equal to KDLoss over the logits of both heads, with no more products than its gradients need."""

# T = tokens, V = vocabulary, H = hidden, K = hidden of the teacher

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.largest_tensor import LargestTensor
from helpers.torch_calls import assert_same, cells, inputs, leaves, run
from loss_core import BackendUnavailable, FusedLinearKDConfig, KDLossConfig
from loss_core_torch.kernels.eager import EagerKernels
from loss_core_torch.kernels.eager.sizes import Sizes

T, V, H, K = 12, 160, 32, 64
CONFIGS = [
    FusedLinearKDConfig(temperature=2.0),
    FusedLinearKDConfig(divergence="reverse_kl", temperature=0.5),
    FusedLinearKDConfig(divergence="jsd", beta=0.3),
]
NAMES = ("student_hidden_states", "student_lm_weight", "teacher_hidden_states", "teacher_lm_weight")
# Blocks of tokens and tiles of classes that divide no size.
SMALL = EagerKernels(Sizes(elements_cpu=64, logits_bytes_cpu=0, min_tokens=5, max_tokens=5, tile_columns_cpu=7))
by_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.divergence)


def frozen(arguments, *names):
    return {name: x.detach() if name in names else x for name, x in arguments.items()}


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@cells(CONFIGS)
def test_it_equals_kd_loss_over_the_logits(flag, config):
    arguments = inputs(config, (3, 7), 13, 5, dtype=torch.float64)
    over_logits = KDLossConfig(temperature=config.temperature, divergence=config.divergence, beta=config.beta)
    whole = over_logits.build(backend="torch:plain")

    def by_hand(student_hidden_states, student_lm_weight, teacher_hidden_states, teacher_lm_weight, labels):
        student, teacher = student_hidden_states @ student_lm_weight.T, teacher_hidden_states @ teacher_lm_weight.T
        return whole(student, teacher, labels)

    assert_same(run(config.build(backend=flag), arguments), run(by_hand, arguments), rtol=1e-12, atol=1e-14)


@by_config
def test_blocks_of_tokens_and_tiles_of_classes(config):
    arguments = inputs(config, (2, 23), 31, 6, dtype=torch.float64)
    whole = run(config.build(backend="torch:eager"), arguments)
    assert_same(run(config.build().with_kernels(SMALL), arguments), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [1, 8], ids=["small", "large"])
@cells(CONFIGS)
def test_one_product_for_each_head_and_each_gradient(flag, config, scale):
    arguments = inputs(config, (T * scale,), V * scale, H, ignored=0)
    loss, unit = config.build(backend=flag), 2 * T * V * scale**2
    assert flops(lambda: run(loss, arguments)) == unit * (3 * H + 3 * K)
    assert flops(lambda: run(loss, frozen(arguments, *NAMES[2:]))) == unit * (3 * H + K)
    assert flops(lambda: run(loss, frozen(arguments, *NAMES[1:]))) == unit * (2 * H + K)
    with torch.no_grad():
        assert flops(lambda: loss(**arguments)) == unit * (H + K)


@cells(CONFIGS, flags=["torch:eager"])
def test_no_tensor_of_tokens_times_vocabulary(flag, config):
    arguments = frozen(inputs(config, (2048,), 3001, 8), *NAMES[2:])
    loss = config.build(backend=flag)
    with LargestTensor() as largest:
        run(loss, arguments)
    assert largest.numel <= 1024 * 3001


@cells(CONFIGS)
def test_gradients_that_are_not_wanted_are_none(flag, config):
    arguments = inputs(config, (2, 3), 11, 5)
    every = run(config.build(backend=flag), arguments)
    for name in NAMES:
        others = run(config.build(backend=flag), frozen(arguments, name))
        assert_same(others, {k: x for k, x in every.items() if k != name}, rtol=1e-6, atol=1e-7)


@cells(CONFIGS)
def test_a_second_backward(flag, config):
    arguments = inputs(config)
    loss, wanted = config.build(backend=flag)(**arguments), list(leaves(arguments).values())
    for upstream in (1.0, 0.5, 1.0):
        got = torch.autograd.grad(loss, wanted, torch.tensor(upstream), retain_graph=True)
        expected = run(config.build(backend=flag), arguments, upstream)
        assert_same(dict(zip(leaves(arguments), got, strict=True)), {k: x for k, x in expected.items() if k != "loss"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@cells(CONFIGS)
def test_a_teacher_of_another_dtype(flag, config, dtype):
    arguments = inputs(config, (4,), 11, 5)
    arguments |= {name: arguments[name].detach().to(dtype).requires_grad_() for name in NAMES[2:]}
    got = run(config.build(backend=flag), arguments)
    wide = {name: x.detach().double().requires_grad_() if x.is_floating_point() else x for name, x in arguments.items()}
    expected = run(config.build(backend="torch:plain"), wide)
    assert got["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got["loss"].double(), expected["loss"], rtol=1e-5, atol=1e-6)
    for name in NAMES:
        assert got[name].dtype == arguments[name].dtype
        eps = torch.finfo(arguments[name].dtype).eps
        torch.testing.assert_close(got[name].double(), expected[name], rtol=max(eps, 1e-5), atol=1e-5)


@pytest.mark.parametrize("flag", ["torch:plain", "torch:eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_hidden_states_with_a_float32_head(flag, dtype):
    arguments = inputs(FusedLinearKDConfig(), (4,), 11, 5)
    arguments |= {name: arguments[name].detach().to(dtype).requires_grad_() for name in NAMES[::2]}
    got = run(FusedLinearKDConfig().build(backend=flag), arguments)
    assert [got[name].dtype for name in NAMES] == [dtype, torch.float32] * 2
    rounded = {n: x.detach().to(dtype).double().requires_grad_() if n in NAMES else x for n, x in arguments.items()}
    expected = run(FusedLinearKDConfig().build(backend="torch:plain"), rounded)
    torch.testing.assert_close(got["loss"].double(), expected["loss"], rtol=1e-5, atol=1e-6)
    for name in NAMES[1::2]:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_transformer_engine_does_not_have_it():
    with pytest.raises(BackendUnavailable, match="torch:te"):
        FusedLinearKDConfig().build(backend="torch:te")


# (name, another tensor for it, error, part of its message)
WRONG = {
    "classes": ("teacher_lm_weight", torch.zeros(12, 10), ValueError, r"\(11, 5\) but teacher_lm_weight .*\(12, 10\)"),
    "tokens": ("teacher_hidden_states", torch.zeros(2, 4, 10), ValueError, r"\(2, 3, 5\) but teacher_.*\(2, 4, 10\)"),
    "student's H": ("student_lm_weight", torch.zeros(11, 6), ValueError, r"student_lm_weight has .*\(11, 6\).*H = 5"),
    "teacher's H": ("teacher_lm_weight", torch.zeros(11, 5), ValueError, r"teacher_lm_weight has .*\(11, 5\).*H = 10"),
    "labels' shape": ("labels", torch.zeros(2, 4, dtype=torch.int64), ValueError, r"labels has .*\(2, 4\)"),
    "labels' dtype": ("labels", torch.zeros(2, 3), TypeError, "labels must be integers"),
    "integers": ("student_hidden_states", torch.zeros(2, 3, 5, dtype=torch.int64), TypeError, "student_hidden_st"),
    "no tensor": ("teacher_lm_weight", [[1.0]], TypeError, r"teacher_lm_weight must be a torch\.Tensor, got list"),
    "dtypes": ("student_lm_weight", torch.zeros(11, 5, dtype=torch.float16), TypeError, "student_lm_weight is"),
    "weights without a count": ("loss_weights", torch.ones(2, 3), ValueError, "num_batch_labels"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("flag", ["torch", "torch:plain", "torch:eager"])
def test_wrong_arguments_are_named(flag, wrong):
    name, value, error, message = wrong
    arguments = inputs(FusedLinearKDConfig()) | {name: value}
    with pytest.raises(error, match=message):
        FusedLinearKDConfig().build(backend=flag)(**arguments)
