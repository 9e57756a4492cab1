"""Which concepts stand out in some rows."""

import numpy as np
import pytest

from msae.concepts.samples import Origin, SampleMiner
from msae.concepts.strongest import shown_as, standing_out

NATURAL = np.array([[1, 0, 4, 0], [2, 0, 8, 0], [3, 0, 12, 1e-3], [4, 0, 16, 0]], dtype=np.float32)


@pytest.fixture(scope="module")
def samples():
    miner = SampleMiner(4, n=2, levels=(1, 4))
    miner.add(NATURAL)
    return miner.finish(Origin("s", "f", "m", "w", "image", "trained", "run"), list("abcd"))


def test_what_is_strong_for_itself_comes_before_what_is_strong(samples):
    z = np.array([[3, 0, 8, 0]], dtype=np.float32)
    found = standing_out(z, samples, None, 4)
    assert [one.concept for one in found] == ["#0", "#2"]
    assert [one.strength for one in found] == pytest.approx([3 / 4, 8 / 16], rel=1 / 16)  # bins of a 16th octave


def test_a_latent_below_its_threshold_or_without_a_natural_range_is_not_shown(samples):
    z = np.array([[0, 5, 0, 0]], dtype=np.float32)
    assert standing_out(z, samples, None, 4) == []


def test_several_rows_count_by_their_mean_and_say_in_how_many(samples):
    z = np.array([[4, 0, 0, 0], [0, 0, 12, 0], [0, 0, 12, 0]], dtype=np.float32)
    found = standing_out(z, samples, None, 4)
    assert [(one.concept, one.n_rows) for one in found] == [("#2", 2), ("#0", 1)]
    assert standing_out(z, samples, None, 1) == found[:1]
    assert standing_out(z, samples, None, 4, without=("#2",)) == found[1:]


def test_an_unnamed_concept_is_shown_by_the_row_that_fires_it_most(samples):
    assert shown_as("#0", [0], None, samples) == ("#0", 3)
    assert shown_as("#0|#2", [0, 2], None, samples) == ("#0|#2", 3)
    assert shown_as("#1", [1], None, samples) == ("#1", None)
