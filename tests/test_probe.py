import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from msae.base.errors import ConfigError
from msae.measure.probe import C, Probe, fit_probe, unit_norm


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("msae.measure.probe.MINIBATCH_STEPS", 120)


def clouds(n=300, n_classes=4, d_in=10, spread=0.6, seed=0):
    """Rows around one centre per class, of very different norms, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_classes, d_in, generator=torch.Generator().manual_seed(99))
    classes = torch.randint(n_classes, (n,), generator=generator)
    x = centres[classes] + spread * torch.randn(n, d_in, generator=generator)
    return x * (0.1 + 5 * torch.rand(n, 1, generator=generator)), [f"class {i}" for i in classes.tolist()]


def fit(x, labels, **options):
    return fit_probe(lambda rows: x[torch.from_numpy(rows)], labels, **options)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_lbfgs_probe_is_scikit_learns(n_classes):
    x, labels = clouds(n_classes=n_classes)
    model = LogisticRegression(C=C, max_iter=1000).fit(unit_norm(x).double().numpy(), labels)
    probe = fit(x, labels)
    assert probe.solver == "lbfgs" and probe.classes == tuple(model.classes_)
    found = probe.logits(x).softmax(1).numpy()
    # weights rounded to float32
    np.testing.assert_allclose(found, model.predict_proba(unit_norm(x).double().numpy()), atol=1e-5)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_both_solvers_minimise_the_same_objective(n_classes):
    x, labels = clouds(n_classes=n_classes)
    one, other = (fit(x, labels, solver=solver) for solver in ("lbfgs", "minibatch"))
    difference = (one.logits(x).softmax(1) - other.logits(x).softmax(1)).abs()
    assert difference.mean() < 0.01  # Adam stops near the minimum, not at it


def test_rows_without_a_label_change_nothing():
    x, labels = clouds()
    holes = [None if i % 3 == 0 else label for i, label in enumerate(labels)]
    kept = [i for i in range(len(x)) if i % 3]
    one, other = fit(x, holes), fit(x[kept], [labels[i] for i in kept])
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_the_norm_of_a_row_does_not_matter():
    x, labels = clouds()
    probe = fit(x, labels)
    assert probe.logits(7 * x).allclose(probe.logits(x), atol=1e-5)
    assert probe.logits(0 * x).allclose(probe.bias.expand(len(x), -1))


@pytest.mark.parametrize("solver", ["lbfgs", "minibatch"])
def test_the_same_seed_gives_the_same_probe(solver):
    x, labels = clouds()
    one, other = (fit(x, labels, solver=solver, seed=1) for _ in range(2))
    assert torch.equal(one.weight, other.weight)


def test_many_classes_go_to_minibatches(monkeypatch):
    monkeypatch.setattr("msae.measure.probe.LBFGS_WORK", 300 * 4 * 10 - 1)
    assert fit(*clouds()).solver == "minibatch"


def test_labels_of_any_type_become_classes_and_unknown_ones_minus_one():
    x, _ = clouds(6)
    probe = fit(x, [1, 2, 1, 2, None, 1])
    assert probe.classes == ("1", "2")
    assert probe.encode([2, "1", None, 3]).tolist() == [1, 0, -1, -1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([None] * 6, "no labels"),
        (["a"] * 5 + [None], "only the class 'a'"),
        (list("abcdef"), "each of the 6 labels occurs once"),
    ],
)
def test_labels_that_teach_nothing_are_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        fit(clouds(6)[0], labels)


def test_a_probe_moves_between_devices():
    probe = fit(*clouds())
    assert isinstance(probe.to("cpu"), Probe) and torch.equal(probe.to("cpu").weight, probe.weight)


def test_many_rare_classes_give_no_warning_of_the_library(recwarn):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32))
    probe = fit_probe(lambda rows: x[torch.from_numpy(rows)], [f"class {i // 2}" for i in range(10)] + ["a", "b"])
    assert len(probe.classes) == 7 and [str(one.message) for one in recwarn] == []
