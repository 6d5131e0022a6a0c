"""The Triton kernels compile for GPU targets, without spills, with 64-bit offsets; `make kernels` compiles them all."""

import dataclasses
import functools
import os
import re
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="nothing is compiled then"),
    # In one process of pytest-xdist, which compiles each kernel once.
    pytest.mark.xdist_group("compiled"),
]

RAGGED = 50257
if not INTERPRETED:
    from on_torch.kernels.gpu import kernel_table
    from on_torch.kernels.gpu.predicted import CHIPS, Plan, share_of_copy

KERNELS = {
    "row_terms_kernel",
    "row_grad_kernel",
    "row_kernel",
    "pair_terms_kernel",
    "pair_mixture_kernel",
    "pair_grad_kernel",
    "pair_kernel",
    "scaled_kernel",
}


def _distinct(vocab, dtype):
    return list(dict.fromkeys(kernel_table.launches(vocab, dtype)))


def test_every_kernel_is_in_the_table():
    assert {one.name for one in _distinct(128256, "bfloat16")} == KERNELS


@functools.cache
def _compiled(vocab):
    """bfloat16 launches on sm_90: the last ones of each kernel, and every option where rows are full vectors.

    Options cost the same over matrices and over other layouts; the last launch of a kernel has all options.
    """
    launches = _distinct(vocab, "bfloat16")
    last = _last_of_each(launches)
    options = [] if vocab == RAGGED else [one for one in launches if not _general(one)]
    return list(kernel_table.compile_all([*options, *last], ["sm_90"]))


def _assert_compiled(rows):
    for row in rows:
        assert not row.problem, kernel_table.line(row)
        assert row.registers > 0


@pytest.mark.parametrize("vocab", [128256, RAGGED])
def test_compiles_without_spills(vocab):
    _assert_compiled(_compiled(vocab))


@pytest.mark.parametrize(
    ("target", "vocab", "dtype"),
    [
        ("sm_80", 32000, "float32"),
        ("gfx942", 128256, "bfloat16"),
        # The same loops for other NVIDIA chips and in other widths.
        pytest.param("sm_90", 151936, "float16", marks=pytest.mark.slow),
        pytest.param("sm_90", RAGGED, "float32", marks=pytest.mark.slow),
        pytest.param("sm_100", 262144, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_compiles_elsewhere_without_spills(target, vocab, dtype):
    _assert_compiled(kernel_table.compile_all(_last_of_each(_distinct(vocab, dtype)), [target]))


def _last_of_each(launches):
    """The last launch of each kernel over a matrix and the last over another layout: with all options."""
    return list({(one.name, _general(one)): one for one in launches}.values())


def _general(launch):
    """Whether a tensor has several leading dimensions or strided columns."""
    return "layout" in " ".join(kernel_table.flags_of(launch))


# Instructions per logit of all loops over the vocabulary, with a small margin over the present count.
LIMITS = {"row_terms_kernel": 8.5, "row_grad_kernel": 8.5, "row_kernel": 16.0, "pair_terms_kernel": 23.0,
          "pair_mixture_kernel": 55.0, "pair_grad_kernel": 17.0, "pair_kernel": 38.0}  # fmt: skip
# In addition: the sum of all logits, the entropy (4.0 for its term, 4.0 for its gradient), the mixture's logarithms.
EXTRA = {"z_sum": 1.5, "entropy": 4.5, "mixture": 31.0}


@pytest.mark.parametrize("vocab", [128256, RAGGED])
def test_instructions_of_the_loops(vocab):
    """No exchange between threads, full vectors, and no more instructions than the limits.

    Disassembling takes half a second per kernel: each option is read for matrices with rows of full vectors, other
    layouts with all options.
    """
    checked = set()
    for row in _compiled(vocab):
        flags, name = kernel_table.flags_of(row.what), row.what.name
        if name not in LIMITS:
            continue
        checked.add(name)
        # One loop over the logits for the terms, and one for the gradient; `loops` excludes those that poll.
        loops_of_each = 2 if name in ("row_kernel", "pair_kernel") else 1
        assert len(row.main_loops) >= loops_of_each, name
        if not {"exclude_targets", "unaligned"} & set(flags):
            assert len(row.main_loops) == loops_of_each, kernel_table.line(row)
        assert not any(loop.exchanges or loop.spills for loop in row.loops), kernel_table.line(row)
        # Unaligned rows are read column by column, a softcap adds arithmetic, and excluded targets a loop that reads
        # them.
        if {"unaligned", "softcap", "exclude_targets"} & set(flags):
            continue
        assert {bits for loop in row.main_loops for bits in (*loop.load_bits, *loop.store_bits)} == {128}, name
        extra = sum(cost for flag, cost in EXTRA.items() if flag in flags)
        assert sum(row.per_logit) <= LIMITS[name] + extra, kernel_table.line(row)
    assert checked == set(LIMITS)


def test_exchanges_and_narrow_accesses_are_found():
    """In blocks with fewer lanes than threads, Triton moves values between threads."""
    one = next(one for one in _distinct(128256, "bfloat16") if one.name == "row_terms_kernel")
    torn = dataclasses.replace(one, constants=_with(one, L=32, W=1))
    assert any(loop.exchanges for loop in kernel_table.compile_one(torn, "sm_90").loops)
    narrow = dataclasses.replace(one, constants=_with(one, L=256, W=1), divisible=())
    assert {bits for loop in kernel_table.compile_one(narrow, "sm_90").loops for bits in loop.load_bits} == {16}


def test_predicted_shares():
    """Shares of a copy's rate, against those measured on an H200."""
    for vocab, registers, block_warps, instructions, plan, measured in (
        (32000, 39, 16, 16.0, Plan(4, 2), 0.88),
        (128256, 63, 16, 15.8, Plan(4, 2), 0.79),
        (262144, 63, 16, 15.8, Plan(4, 2), 0.71),
        (128256, 59, 16, 36.3, Plan(6, 4), 0.66),
        # Rows shared by several programs.
        (8192, 95, 2, 15.0, Plan(4, 2), 0.92),
        (8192, 96, 4, 35.0, Plan(6, 4), 0.76),
    ):
        predicted = share_of_copy(CHIPS["H200"], plan, vocab, registers, 32 * block_warps, instructions)
        assert predicted == pytest.approx(measured, abs=0.12)
    # More programs do not help when the cache is full.
    assert share_of_copy(CHIPS["H200"], Plan(4, 2), 128256, 32, 256, 16.0) < 0.7


def test_a_spill_and_an_error_are_reported():
    one = next(one for one in _distinct(128256, "float32") if one.name == "pair_terms_kernel")
    greedy = dataclasses.replace(
        one, size=dataclasses.replace(one.size, num_warps=1), constants=_with(one, BLOCK_V=1 << 12)
    )
    assert "spills" in kernel_table.compile_one(greedy, "sm_90").problem
    wrong = dataclasses.replace(one, constants=_with(one, BLOCK_V=1000))
    assert "Error" in kernel_table.compile_one(wrong, "sm_90").problem


def _with(one, **changed):
    names = [parameter.name for parameter in one.kernel.params]
    return tuple((path, changed.get(names[path[0]], value)) for path, value in one.constants)


def test_offsets_are_64_bits_wide():
    """The offset of a row, or of a strided column, may exceed 2^31."""
    for row in _compiled(RAGGED):
        rows = re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (\w+)", row.ttir)
        columns = re.findall(r"tt\.addptr .* : tensor<\w+x!tt\.ptr<\w+>>, tensor<\d+x(\w+)>", row.ttir)
        name = row.what.name
        assert rows or name == "scaled_kernel"
        assert set(rows) <= {"i64"}, name
        assert set(columns) == {"i64"}, (name, columns)
