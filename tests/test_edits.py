import numpy as np
import pytest
import torch

from msae.base.errors import ConfigError
from msae.concepts.concept import latents_of, make_group, natural_of, with_correlated
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.use.edits import Edit, apply, edit_activations, parse_change, parse_edit, target, warn
from tests.oracles import edits as oracle

X = torch.randn(600, 12, generator=torch.Generator().manual_seed(0)) + 2


@pytest.fixture(scope="module")
def sae():
    standardizer = Standardizer({m: fit_statistics(lambda s=s: [X * s]) for m, s in (("image", 1), ("text", 3))})
    made = SAE(SAEConfig(d_in=12, d_sae=48, levels=(8, 48)), standardizer, seed=1)
    with torch.no_grad():  # biases of 0 would hide a forgotten bias
        made.b_enc.copy_(torch.linspace(-0.1, 0.1, 48))
        made.b_dec.copy_(torch.linspace(-1, 1, 12))
    return made


def learn(sae, *latents, name="beach"):
    return make_group(name, latents, sae.encode(X, "image")[:, list(latents)], sae.W_dec)


def edit(sae, latents, value):
    return Edit(learn(sae, *latents), parse_change(value))


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("keep", [True, False])
def test_setting_one_latent_agrees_with_the_oracle(sae, modality, keep):
    known = sae.standardizer.statistics[modality]
    weights = [w.detach().double().numpy() for w in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    edited = apply(sae, X[:4], modality, [edit(sae, [7], 5.0)], keep_residual=keep)
    for x, found in zip(X[:4].numpy(), edited.numpy(), strict=True):
        wanted = oracle.set_latent(x, known.mean.numpy(), known.scale, *weights, 7, 5.0, keep_residual=keep)
        np.testing.assert_allclose(found, wanted, atol=2e-5)  # float32 sums of 60 terms of size 1


def test_no_edits_and_identity_edits_leave_every_bit(sae):
    for edits in ([], [edit(sae, [3, 9], "x1")], [edit(sae, [3, 9], "+0")]):
        assert torch.equal(apply(sae, X, "image", edits), X)


def test_without_the_residual_an_unedited_row_is_its_reconstruction(sae):
    found = apply(sae, X, "image", [], keep_residual=False)
    assert torch.equal(found, sae.decode(sae.encode(X, "image"), "image"))


def test_setting_a_strength_gives_it_to_one_latent_and_to_many(sae):
    z = sae.encode(X, "image")
    for latents in ([7], [3, 9, 20]):
        for value in (0.0, 0.5, 4.0):
            one = edit(sae, latents, value)
            assert torch.allclose(
                one.group.strength(edit_activations(z, [one])), torch.tensor(value).expand(len(X)), atol=1e-4
            )


def test_setting_the_strength_that_a_row_has_changes_nothing(sae):
    z = sae.encode(X[:1], "image")
    group = learn(sae, 3, 9, 20)
    same = Edit(group, parse_change(float(group.strength(z))))
    assert torch.allclose(edit_activations(z, [same]), z, atol=1e-6)


def test_other_latents_are_left_alone_and_removal_is_exact(sae):
    z = sae.encode(X, "image")
    edited = edit_activations(z, [edit(sae, [3, 9], 0)])
    rest = [i for i in range(48) if i not in (3, 9)]
    assert not edited[:, [3, 9]].any() and torch.equal(edited[:, rest], z[:, rest])


def test_a_group_of_one_is_the_latent_itself(sae):
    one = learn(sae, 7)
    assert torch.allclose(one.pattern, torch.ones(1)) and torch.allclose(one.reader, torch.ones(1))
    z = sae.encode(X, "image")
    assert torch.allclose(one.strength(z), z[:, 7])


@pytest.mark.parametrize(("there", "back"), [("x4", "x0.25"), ("+3", "-3")])
def test_an_edit_and_its_inverse_restore_the_activations(sae, there, back):
    z = sae.encode(X, "image")
    both = edit_activations(z, [edit(sae, [7], there), edit(sae, [7], back)])
    assert torch.allclose(both, z, atol=1e-5)


def test_strength_never_falls_below_zero(sae):
    z = sae.encode(X, "image")
    assert edit_activations(z, [edit(sae, [7, 8], "-100")]).min() >= 0


def test_edits_of_different_concepts_commute(sae):
    a, b = edit(sae, [7], "p99"), edit(sae, [3, 9], "x2")
    z = sae.encode(X, "image")
    assert torch.equal(edit_activations(z, [a, b]), edit_activations(z, [b, a]))


def test_the_order_of_a_groups_latents_does_not_matter(sae):
    z = sae.encode(X, "image")
    a, b = edit_activations(z, [edit(sae, [3, 9], "p99")]), edit_activations(z, [edit(sae, [9, 3], "p99")])
    assert torch.allclose(a, b, atol=1e-6)


def test_natural_quantiles_are_those_of_numpy(sae):
    strength = sae.encode(X, "image")[:, 7]
    firing = strength[strength > 0].numpy()
    natural = natural_of(strength)
    for percent in (0, 50, 90, 99, 99.9, 100):
        assert natural.quantile(percent) == pytest.approx(np.percentile(firing, percent), rel=1e-3)
    assert natural.firing_rate == pytest.approx(len(firing) / len(X))
    assert natural.maximum == pytest.approx(firing.max())


def test_percentiles_are_targets_and_can_be_scaled(sae):
    group = learn(sae, 3, 9)
    now = torch.zeros(2)
    p99, twice = (float(target(Edit(group, parse_change(value)), now)[0]) for value in ("p99", "2xp99"))
    assert twice == pytest.approx(2 * p99) and p99 == pytest.approx(group.natural.quantile(99))


def test_a_warning_is_given_only_beyond_the_natural_range(sae):
    z = sae.encode(X[:1], "image")
    assert warn(edit(sae, [7], "p99"), z) is None
    assert warn(edit(sae, [7], 0), z) is None
    assert "beyond the natural range" in warn(edit(sae, [7], 50), z)


def test_a_split_concept_is_turned_as_one():
    """Two latents of one direction that share its contexts: p99 of the pair is p99 of the concept, not twice it."""
    direction = torch.zeros(1, 8)
    direction[0, 0] = 1
    strength = torch.rand(4000, generator=torch.Generator().manual_seed(2)) + 1
    even = (torch.arange(4000) % 2 == 0).float()
    z = torch.stack([strength * even, strength * (1 - even)], 1)
    pair = make_group("blue", [0, 1], z, direction.expand(2, 8))
    assert pair.natural.quantile(99) == pytest.approx(float(strength.quantile(0.99)), rel=1e-3)
    edited = edit_activations(torch.zeros(1, 2), [Edit(pair, parse_change("p99"))])
    assert float((edited @ direction.expand(2, 8)).norm()) == pytest.approx(pair.natural.quantile(99), rel=1e-4)


def concept(sae, *latents, size=64):
    """A group with its correlated latents."""
    return with_correlated(learn(sae, *latents), [sae.encode(x, "image") for x in X.split(size)])


def test_companions_are_what_differs_where_the_concept_is_present(sae):
    z = sae.encode(X, "image").double().numpy()
    group = concept(sae, 3, 9)
    a = z[:, [3, 9]] @ group.reader.numpy()
    present = a > 0.6 * np.percentile(a[a > 0], 99)
    for latent in range(48):
        there, elsewhere = z[present, latent], z[~present, latent]
        share = (there.mean() - elsewhere.mean()) / (a[present].mean() - a[~present].mean())
        assert float(group.correlated[latent]) == pytest.approx(0 if latent in (3, 9) else share, abs=1e-4)


def test_companions_do_not_depend_on_the_batches(sae):
    one, many = (concept(sae, 3, 9, size=size).correlated for size in (200, 7))
    assert torch.allclose(one, many, atol=1e-5) and one.any()


def test_a_concept_seen_too_seldom_has_no_companions(sae):
    few = with_correlated(learn(sae, 3, 9), [sae.encode(X[:4], "image")])
    assert not few.correlated.any()


def test_with_companions_the_strength_is_still_the_one_asked_for(sae):
    z = sae.encode(X, "image")
    for value in (0, 0.5, "p99"):
        one = Edit(concept(sae, 3, 9, 20), parse_change(value))
        edited = edit_activations(z, [one])
        assert torch.allclose(one.group.strength(edited), target(one, one.group.strength(z)), atol=1e-4)
        assert edited.min() >= 0


def test_identity_edits_move_no_companion(sae):
    for value in ("x1", "+0"):
        assert torch.equal(apply(sae, X, "image", [Edit(concept(sae, 3, 9), parse_change(value))]), X)


def test_the_latents_of_an_edit_are_nobodys_companions(sae):
    z = sae.encode(X, "image")
    both = [Edit(concept(sae, 7), parse_change("p99")), Edit(concept(sae, 3, 9), parse_change(0))]
    edited = edit_activations(z, both)
    assert not edited[:, [3, 9]].any() and torch.allclose(
        edited[:, 7], torch.tensor(both[0].group.natural.quantile(99))
    )
    assert torch.allclose(edit_activations(z, both[::-1]), edited, atol=1e-6)


@pytest.mark.parametrize(
    ("written", "shown"),
    [("20", "20"), (" 3.5 ", "3.5"), ("x2", "x2"), ("*2", "x2"), ("+3", "+3"), ("-1", "-1"), ("p99", "p99"),
     ("2xp99", "2xp99"), ("2 x p99.5", "2xp99.5"), (0, "0"), (".5", "0.5")],
)  # fmt: skip
def test_changes_are_read_and_shown(written, shown):
    assert str(parse_change(written)) == shown
    assert parse_change(shown) == parse_change(written)


@pytest.mark.parametrize(
    "written", ["", "much", "x", "p", "x-2", "--1", "1e3", "p99x2", "nan", "p101", -1.0, float("nan")]
)
def test_other_changes_are_refused_in_one_line(written):
    with pytest.raises(ConfigError) as caught:
        parse_change(written)
    assert "\n" not in str(caught.value)


def test_an_edit_is_divided_at_its_last_equals_sign():
    assert parse_edit("a=b=x2") == ("a=b", parse_change("x2"))
    for bad in ("beach", "=3", " = 2"):
        with pytest.raises(ConfigError, match="CONCEPT=VALUE"):
            parse_edit(bad)


def test_concepts_are_names_numbers_and_groups():
    names = {"blue": [4, 2], "azure": [2, 9]}
    assert latents_of("blue", names, 10) == (4, 2)
    assert latents_of("blue | azure|#3", names, 10) == (4, 2, 9, 3)
    with pytest.raises(ConfigError, match="no latent is named 'bleu'; did you mean 'blue'"):
        latents_of("bleu", names, 10)
    with pytest.raises(ConfigError, match="#0 to #9"):
        latents_of("#10", names, 10)


def test_a_concept_that_never_fires_is_refused(sae):
    with pytest.raises(ConfigError, match=r"'beach'.*never fires"):
        make_group("beach", [5], torch.zeros(10, 1), sae.W_dec)
