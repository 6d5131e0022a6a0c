"""Laws of the terms of one distribution: identity, any split, any order, blocks of -inf; what an objective declares."""

from typing import NamedTuple

import numpy as np

from helpers.row_terms import CUTS, OBJECTIVE, draw_logits, fold, namespace, namespaces, split, terms_of, top_k_terms
from loss_core import row_terms
from loss_core.row_terms import EMPTY_ROW, CrossEntropy, LogProbability, RowTerms, TopK, is_objective

# T = rows, V = vocabulary


@namespaces
@CUTS
def test_any_split_merges_to_the_terms_of_the_full_row(name, cuts):
    xp, asarray = namespace(name)
    z_TV, column_T = draw_logits()
    pieces, whole = split(terms_of, cuts, z_TV, column_T), terms_of(z_TV, column_T)
    rtol = 1e-6 if name == "jax" else 1e-13
    for order in (pieces, pieces[::-1]):
        folded = fold(xp, asarray, row_terms.combine, order)
        for got, expected in zip(folded, whole, strict=True):
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol)


def test_associative():
    z_TV, column_T = draw_logits()
    a, b, c = split(terms_of, (4, 9, 13), z_TV, column_T)
    left = row_terms.combine(np, row_terms.combine(np, a, b), c)
    right = row_terms.combine(np, a, row_terms.combine(np, b, c))
    for got, expected in zip(left, right, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-14)


def test_identity_is_exact_and_two_empty_pieces_stay_empty():
    z_TV, column_T = draw_logits()
    terms, empty = terms_of(z_TV, column_T), RowTerms(*(np.full(6, value) for value in EMPTY_ROW))
    for got, expected in zip(terms_of(z_TV, column_T, 5, 5), empty, strict=True):
        np.testing.assert_array_equal(got, expected)
    for pair, whole in (((terms, empty), terms), ((empty, terms), terms), ((empty, empty), empty)):
        for got, expected in zip(row_terms.combine(np, *pair), whole, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_a_sum_that_is_not_needed_stays_none():
    z_TV, column_T = draw_logits()
    a, b = (piece._replace(z_sum=None, e=None) for piece in split(terms_of, (4, 13), z_TV, column_T))
    assert row_terms.combine(np, a, b)[3:] == (None, None)
    assert not any(OBJECTIVE.sums)


def test_an_objective_requests_only_the_sums_that_it_needs():
    assert TopK(np.zeros((1, 2)), tail=True).sums == (False, False)
    assert CrossEntropy(13).sums == CrossEntropy(13, z_loss=0.5).sums == (False, False)
    assert CrossEntropy(13, label_smoothing=0.1).sums == (True, False)
    assert CrossEntropy(13, metrics=True).sums == (False, True)


def test_num_values_is_the_number_of_values():
    z_TV, column_T = draw_logits()
    terms, of_targets = RowTerms(*terms_of(z_TV, column_T)), top_k_terms(z_TV, column_T[:, None])
    teacher = TopK(np.full((6, 1), -1.0), tail=True)
    for objective, of, number in (
        (OBJECTIVE, terms, 1), (LogProbability(), terms, 1), (LogProbability(True), terms, 2), (teacher, of_targets, 1)
    ):  # fmt: skip
        assert objective.num_values == len(objective.values(np, of)) == number


def test_a_z_loss_alone_makes_entries_of_a_gradient_larger_than_their_upstream():
    assert [x.headroom for x in (OBJECTIVE, LogProbability(True), TopK(None, False))] == [0, 0, 0]
    # 1 + 2 * 0.5 * 2^14, and 1 + 2 * 2 * 2^14.
    assert [CrossEntropy(13, z_loss=z_loss).headroom for z_loss in (0.5, 2.0)] == [15, 17]


def test_objectives_of_different_classes_are_not_equal():
    @is_objective
    class Other(NamedTuple):
        gamma: float

    assert tuple(Other(0.0)) == tuple(LogProbability(False))
    assert Other(0.0) != LogProbability(False)
    assert Other(0.0) == Other(0.0)
    assert not Other(0.0) != Other(0.0)  # noqa: SIM202
    assert (Other(1.0) != Other(2.0)) == (Other(2.0) != Other(1.0)) == (Other(1.0) != Other(1.5)) is True
    assert len({Other(0.0), Other(0.0), LogProbability(False), CrossEntropy(3), CrossEntropy(3)}) == 3


def test_a_target_that_no_piece_owns_gives_an_infinite_loss():
    terms = terms_of(draw_logits()[0], np.full(6, 99))
    assert np.all(np.isposinf(OBJECTIVE.values(np, terms)[0]))
    assert np.all(np.isneginf(LogProbability().values(np, terms)[0]))
