"""The table of activations: the numbers are those of the SAE, the columns those that were asked for."""

import numpy as np
import pytest

import msae
from msae.base.errors import ConfigError, StoreError
from msae.concepts.names import Concept, ConceptNames
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, Statistics
from tests.test_naming import write_store


@pytest.fixture
def world(tmp_path):
    """A run of 6 latents, of which 2 and 5 are called red, on 20 rows with titles and no captions."""
    import torch

    x = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    store = write_store(tmp_path / "x.npy", x, id=[f"i{row}" for row in range(20)],
                        title=[f"<b>title</b> {row}" for row in range(20)], colour=["red"] * 20)  # fmt: skip
    sae = SAE(SAEConfig(8, 6, kind="relu"), Standardizer({"image": Statistics(torch.zeros(8), 1.0)}), seed=3)
    sae.save(tmp_path / "run")
    ConceptNames("evidence", 6, (Concept(2, "red", 0.7, None), Concept(5, "red", 0.6, None))).save(tmp_path / "run")
    return tmp_path / "run", store, sae.encode(x)


def test_the_strongest_latents_come_first_and_the_numbers_are_those_of_the_sae(world):
    run, store, z = world
    found = msae.activations(run, store, rows=range(3, 9), n=4)
    strongest = np.argsort(-z[3:9].sum(0), kind="stable")[:4]
    assert list(found.latents) == [latent for latent in strongest if z[3:9, latent].sum() > 0]
    np.testing.assert_allclose(found.values, z[3:9][:, list(found.latents)], rtol=1e-6)  # another block, another sum
    assert [row.id for row in found.rows] == [f"i{row}" for row in range(3, 9)]


def test_without_rows_the_first_ten_and_latents_that_never_fire_are_left_out(world):
    run, store, z = world
    found = msae.activations(run, store, n=100)
    assert [row.row for row in found.rows] == list(range(10))
    assert set(found.latents) == set(np.flatnonzero(z[:10].sum(0)).tolist())


def test_each_latent_of_a_concept_is_a_column_with_its_name(world):
    run, store, z = world
    found = msae.activations(run, store, rows=["i7", -1, 0], concept=["Red", "#0|#2"])
    assert "nearest word: red #2" in found.to_text()  # no rows have confirmed it
    assert found.labels == ("red #2", "red #5", "#0") and [row.row for row in found.rows] == [7, 19, 0]
    np.testing.assert_allclose(found.values, z[[7, 19, 0]][:, [2, 5, 0]], rtol=1e-6)
    frame = found.to_pandas()
    assert list(frame.columns) == ["row", "id", *found.labels]
    np.testing.assert_array_equal(frame["red #5"].to_numpy(np.float32), found.values[:, 1])
    assert found.to_json()["latents"][0] == {"latent": 2, "name": "red"}
    assert msae.activations(run, store, rows=7, concept="red").values.shape == (1, 2)


def test_the_text_has_at_most_six_columns_and_says_what_is_left_out(world):
    run, store, _ = world
    found = msae.activations(run, store, concept=[f"#{latent}" for latent in range(6)], show="colour")
    head, _, titles, line, first, *_ = found.to_text().splitlines()
    assert "6 latents in 10 image rows" in head and "inference trained" in head
    assert len(line.split()) == 6 and found.to_text().endswith("2 more latents; to_pandas() has all")
    assert "red #2" in titles and first.endswith("<b>title</b> 0 · colour: red")
    assert len(repr(found)) < 400 and "<b>" not in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rows": [20]}, StoreError, "there is no row 20: .* has the rows 0 to 19"),
        ({"rows": ["i99"]}, StoreError, "no row with the id 'i99'"),
        ({"concept": "blue"}, ConfigError, "blue"),
        ({"n": 0}, ConfigError, "n is 0"),
        ({"device": "nowhere"}, ConfigError, "device nowhere cannot be used here"),
        ({"show": "hue"}, StoreError, "no column 'hue'; it has id, title, colour: give --show one of these"),
    ],
)
def test_what_is_not_there_is_one_line(world, options, error, match):
    run, store, _ = world
    with pytest.raises(error, match=match):
        msae.activations(run, store, **options)


@pytest.mark.parametrize("rows", [[1.5], [True, False], np.array([True, False]), np.array([0.0])])
def test_a_row_that_is_neither_a_number_nor_an_id_is_refused(world, rows):
    """A mask would be taken for the rows 0 and 1, a fraction would be cut off."""
    run, store, _ = world
    with pytest.raises(ConfigError, match="is neither a number nor an id"):
        msae.activations(run, store, rows=rows)
