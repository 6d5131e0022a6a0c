"""The Triton kernels compile for real GPUs, without spills, with 64-bit offsets. `make kernels` does all of them."""

import dataclasses
import os
import re
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then")

if os.environ.get("TRITON_INTERPRET") != "1":
    from on_torch.kernels.gpu import kernel_table

KERNELS = {
    "row_terms_kernel",
    "row_fold_kernel",
    "row_grad_kernel",
    "row_kernel",
    "pair_terms_kernel",
    "pair_fold_kernel",
    "pair_grad_kernel",
    "pair_kernel",
}


def _distinct(vocab, dtype):
    return list(dict.fromkeys(kernel_table.launches(vocab, dtype)))


def test_every_kernel_is_in_the_table():
    assert {one.name for one in _distinct(128256, "bfloat16")} == KERNELS


@pytest.mark.parametrize(
    ("target", "vocab", "dtype"),
    [
        ("sm_90", 128256, "bfloat16"),
        ("sm_90", 151936, "float16"),
        ("sm_90", kernel_table.RAGGED if os.environ.get("TRITON_INTERPRET") != "1" else 0, "float32"),
        ("sm_80", 32000, "float32"),
        ("sm_100", 262144, "bfloat16"),
        ("gfx942", 128256, "bfloat16"),
    ],
)
def test_compiles_without_spills(target, vocab, dtype):
    for row in kernel_table.compile_all(_distinct(vocab, dtype), [target]):
        assert not row.problem, kernel_table.line(row)
        assert row.registers > 0


def test_a_spill_and_an_error_are_noticed():
    one = next(one for one in _distinct(128256, "float32") if one.name == "pair_terms_kernel")
    greedy = dataclasses.replace(
        one, size=dataclasses.replace(one.size, num_warps=1), constants=_with_block(one, 1 << 12)
    )
    assert "spills" in kernel_table.compile_one(greedy, "sm_90").problem
    wrong = dataclasses.replace(one, constants=_with_block(one, 1000))
    assert "Error" in kernel_table.compile_one(wrong, "sm_90").problem


def _with_block(one, block):
    place = next(i for i, parameter in enumerate(one.kernel.params) if parameter.name == "BLOCK_V")
    return tuple((path, block if path == (place,) else value) for path, value in one.constants)


def test_offsets_are_64_bits_wide():
    """Where a row begins may be beyond 2^31, and so may a column be where a stride multiplies it."""
    for row in kernel_table.compile_all(_distinct(50257, "bfloat16"), ["sm_90"]):
        rows = re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (\w+)", row.ttir)
        columns = re.findall(r"tt\.addptr .* : tensor<\w+x!tt\.ptr<\w+>>, tensor<\d+x(\w+)>", row.ttir)
        name = row.what.name
        assert rows, name
        assert set(rows) == {"i64"}, name
        assert name.endswith("fold_kernel") or set(columns) == {"i64"}, (name, columns)
