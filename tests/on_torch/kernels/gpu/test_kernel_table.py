"""The Triton kernels compile for real GPUs, without spills, with 64-bit offsets. `make kernels` does all of them."""

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
    # One process of pytest-xdist runs them, so that they share what is compiled.
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
    """Launches in bfloat16 on sm_90: of each kernel the last ones, and where rows are whole vectors each option too.

    An option over rows that lie apart is read as over rows that lie together; the last of a kernel has every one.
    """
    launches = _distinct(vocab, "bfloat16")
    last = _last_of_each(launches)
    options = [] if vocab == RAGGED else [one for one in launches if not _apart(one)]
    return list(kernel_table.compile_all([*options, *last], ["sm_90"]))


def _hold(rows):
    for row in rows:
        assert not row.problem, kernel_table.line(row)
        assert row.registers > 0


@pytest.mark.parametrize("vocab", [128256, RAGGED])
def test_compiles_without_spills(vocab):
    _hold(_compiled(vocab))


@pytest.mark.parametrize(
    ("target", "vocab", "dtype"),
    [
        ("sm_80", 32000, "float32"),
        ("gfx942", 128256, "bfloat16"),
        # Other chips of one maker, and other widths of the same loops; `make kernels` has them as well.
        pytest.param("sm_90", 151936, "float16", marks=pytest.mark.slow),
        pytest.param("sm_90", RAGGED, "float32", marks=pytest.mark.slow),
        pytest.param("sm_100", 262144, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_compiles_elsewhere_without_spills(target, vocab, dtype):
    _hold(kernel_table.compile_all(_last_of_each(_distinct(vocab, dtype)), [target]))


def _last_of_each(launches):
    """Of each kernel the last launch over rows that lie together and the last over others: with every option."""
    return list({(one.name, _apart(one)): one for one in launches}.values())


def _apart(launch):
    """Whether it walks over rows of more than one dimension, or over strided columns."""
    return "layout" in " ".join(kernel_table.flags_of(launch))


# Instructions per logit of all loops over the vocabulary; what is there today, and a little.
LIMITS = {"row_terms_kernel": 8.5, "row_grad_kernel": 8.5, "row_kernel": 16.0, "pair_terms_kernel": 23.0,
          "pair_mixture_kernel": 55.0, "pair_grad_kernel": 17.0, "pair_kernel": 38.0}  # fmt: skip
# On top: the sum of all logits, the entropy (4.0 each way), the logarithms to a mixture.
EXTRA = {"z_sum": 1.5, "entropy": 4.5, "mixture": 31.0}


@pytest.mark.parametrize("vocab", [128256, RAGGED])
def test_what_the_loops_cost(vocab):
    """No exchange between threads, whole vectors, and no more instructions than there were.

    Disassembling takes half a second each. What options cost is read where rows lie together and are a whole number of
    vectors; what other layouts cost, of each kernel with every option.
    """
    seen = set()
    for row in _compiled(vocab):
        flags, name = kernel_table.flags_of(row.what), row.what.name
        # A flag that lets a launch do nothing leaves its loop as it is.
        if name not in LIMITS or "unless_one" in flags:
            continue
        seen.add(name)
        # One over the logits for terms and one for the gradient; a loop that waits for other programs is none of them.
        loops_of_each = 2 if name in ("row_kernel", "pair_kernel") else 1
        assert len(row.main_loops) >= loops_of_each, name
        if not {"left_out", "unlike"} & set(flags):
            assert len(row.main_loops) == loops_of_each, kernel_table.line(row)
        assert not any(loop.exchanges or loop.spills for loop in row.loops), kernel_table.line(row)
        # Rows that begin unlike each other are taken column by column; a softcap is arithmetic on top; and targets that
        # are left out have a loop of their own, in which they are read.
        if {"unlike", "softcap", "left_out"} & set(flags):
            continue
        assert {bits for loop in row.main_loops for bits in (*loop.load_bits, *loop.store_bits)} == {128}, name
        extra = sum(cost for flag, cost in EXTRA.items() if flag in flags)
        assert sum(row.per_logit) <= LIMITS[name] + extra, kernel_table.line(row)
    assert seen == set(LIMITS)


def test_exchanges_and_narrow_accesses_are_noticed():
    """A block whose threads hold no whole column of lanes: Triton then moves values from thread to thread."""
    one = next(one for one in _distinct(128256, "bfloat16") if one.name == "row_terms_kernel")
    torn = dataclasses.replace(one, constants=_with(one, L=32, W=1))
    assert any(loop.exchanges for loop in kernel_table.compile_one(torn, "sm_90").loops)
    narrow = dataclasses.replace(one, constants=_with(one, ALIKE=False, L=256, W=1), divisible=())
    assert {bits for loop in kernel_table.compile_one(narrow, "sm_90").loops for bits in loop.load_bits} == {16}


def test_predicted_shares():
    """Of a copy's rate, against what was measured on an H200."""
    for vocab, registers, block_warps, instructions, plan, measured in (
        (32000, 39, 16, 16.0, Plan(4, 2), 0.88),
        (128256, 63, 16, 15.8, Plan(4, 2), 0.79),
        (262144, 63, 16, 15.8, Plan(4, 2), 0.71),
        (128256, 59, 16, 36.3, Plan(6, 4), 0.66),
        # Rows that programs share.
        (8192, 95, 2, 15.0, Plan(4, 2), 0.92),
        (8192, 96, 4, 35.0, Plan(6, 4), 0.76),
    ):
        predicted = share_of_copy(CHIPS["H200"], plan, vocab, registers, 32 * block_warps, instructions)
        assert predicted == pytest.approx(measured, abs=0.12)
    # More programs do not help where the cache is full.
    assert share_of_copy(CHIPS["H200"], Plan(4, 2), 128256, 32, 256, 16.0) < 0.7


def test_a_spill_and_an_error_are_noticed():
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
    """Where a row begins may be beyond 2^31, and so may a column be where a stride multiplies it."""
    for row in _compiled(RAGGED):
        rows = re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (\w+)", row.ttir)
        columns = re.findall(r"tt\.addptr .* : tensor<\w+x!tt\.ptr<\w+>>, tensor<\d+x(\w+)>", row.ttir)
        name = row.what.name
        assert rows or name == "scaled_kernel"
        assert set(rows) <= {"i64"}, name
        assert set(columns) == {"i64"}, (name, columns)
