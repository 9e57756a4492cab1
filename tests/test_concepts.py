"""Concepts are written alike everywhere: a name, `#12`, or several divided by `|`."""

import pytest
import torch

from msae import audit, gallery, search
from msae.base.errors import ConfigError
from msae.concepts.concept import ConceptSet, excluded_by, groups_of, latents_of, quantiles_above_zero
from msae.concepts.names import Concept, ConceptNames
from msae.sae.model import SAE
from msae.sae.view import View
from tests.test_retrieval import run, store  # noqa: F401

NAMES = ConceptNames(
    "evidence", 8, tuple(Concept(i, n, 0.9, 0.5, synonyms=s) for i, n, s in
                         ((1, "watch", ()), (4, "clock", ("timepiece",)), (6, "watch", ()), (7, "a|b", ())))
)  # fmt: skip


def test_names_give_the_latents_of_a_name():
    assert NAMES["watch"] == [1, 6] == NAMES["WATCH"] and NAMES["timepiece"] == [4]
    assert "watch" in NAMES and "watches" not in NAMES and 1 not in NAMES
    assert NAMES.by_name == {"a|b": [7], "clock": [4], "watch": [1, 6]}
    with pytest.raises(ConfigError, match="no latent is named 'wacth'; did you mean 'watch'"):
        NAMES["wacth"]


@pytest.mark.parametrize("names", [NAMES, NAMES.by_name])
@pytest.mark.parametrize(
    ("written", "latents"),
    [("watch", (1, 6)), ("#3", (3,)), ("#3|#1", (3, 1)), (" clock | #3", (4, 3)), ("watch|#6", (1, 6)), ("a|b", (7,))],
)
def test_a_concept_is_a_name_a_number_or_several(names, written, latents):
    assert latents_of(written, names, 8) == latents
    assert groups_of([written], names, 8) == {written: latents}


@pytest.mark.parametrize("written", ["#8", "#1|#8"])
def test_a_latent_that_is_not_there_is_refused(written):
    with pytest.raises(ConfigError, match="there is no latent #8; this SAE has #0 to #7"):
        latents_of(written, None, 8)


@pytest.mark.parametrize("written", ["#2|#3", "green|#3", "green|blue"])
def test_every_verb_takes_the_same_concept(run, store, written):  # noqa: F811
    latents = (2, 3)
    assert search(run, store, like="row7", set=[f"{written}=p99"]).edits[0].latents == latents
    found = audit(run, store, "place", concept=[written], n_permutations=50).concepts
    assert [(one.name, one.latents) for one in found] == [(written, latents)]
    shown = gallery(run, store, concept=written, n=2)
    assert (shown.latent, *shown.alike) == latents


def test_numbers_need_no_names(run, store):  # noqa: F811
    sae = SAE.load(run)
    assert gallery(sae, store, concept="#2|#3", n=2).alike == (3,)
    assert [one.latents for one in audit(sae, store, "place", concept=["#2|#3"], n_permutations=50).concepts] == [
        (2, 3)
    ]
    with pytest.raises(ConfigError, match="there is no concept 'green': this run has no names"):
        gallery(sae, store, concept="#2|green")


def test_the_strength_of_a_group_is_present_from_one_share_of_its_p99_on(run, store):  # noqa: F811
    group = ConceptSet(View(run, store), ConceptNames.load(run))["green"]
    p99 = group.natural.quantile(99)
    assert group.is_present(torch.tensor([0.0, 0.59, 0.61]) * p99).tolist() == [False, False, True]


def test_there_is_one_p99():
    x = torch.rand(500, generator=torch.Generator().manual_seed(0)) - 0.3
    found = quantiles_above_zero(x, [0.5, 0.99])
    assert torch.allclose(found, x[x > 0].quantile(torch.tensor([0.5, 0.99])), atol=1e-6)
    assert quantiles_above_zero(-x.abs(), [0.5]).tolist() == [0.0]


def test_concepts_that_never_meet_exclude_each_other_and_independent_ones_do_not():
    mine = torch.arange(400) % 2 == 0
    theirs = torch.stack([~mine, torch.arange(400) % 4 < 2], 1)
    assert excluded_by(mine, theirs).tolist() == [True, False]
