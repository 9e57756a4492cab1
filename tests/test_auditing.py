"""Laws of `audit`: closed forms against decoding every row anew, honest p-values, one clear line for bad input."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.stats
import torch
from safetensors.numpy import save_file

from msae.base.errors import ConfigError, RunError, StoreError
from msae.concepts.names import Concept, ConceptNames
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.use.audit import Audit, audit
from msae.use.audit.auditor import PermutationTests
from msae.use.audit.measure import matched_groups, profile_of
from msae.use.audit.subjects import target_columns
from msae.use.classifier import LinearClassifier
from msae.web.report.audit import section
from tests.oracles import audits as oracle
from tests.oracles import statistics as statistics_oracle

D_IN, D_SAE, N = 12, 24, 600
NAMES = {"own": [0], "planted": [1], "pair": [2, 3], "other": [4], "silent": [5], "rest": [6, 7, 8]}


def make_sae(**config) -> SAE:
    """Directions that are drawn at random and read back through their transpose; latent 5 never fires."""
    sae = SAE(SAEConfig(D_IN, D_SAE, **({"kind": "relu"} | config)), seed=1)
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-0.4)
        sae.b_enc[5] = -1e3
    return sae


def world(n=N, *, bias=0.5, seed=0, classes=("a", "b")):
    """Embeddings in which latent 0 is the class and latent 1 goes with it in a share `bias` of rows."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, len(classes), n)
    z = rng.gamma(3, 0.5, (n, D_SAE)) * (rng.random((n, D_SAE)) < 0.2)
    z[:, 0] = (truth == 1) * rng.gamma(3, 0.5, n)
    has = np.where(rng.random(n) < bias, truth == 1, truth != 1)
    z[:, 1] = has * rng.gamma(4, 0.5, n)
    directions = make_sae().W_dec.detach().numpy()
    x = (z @ directions + 0.3 * rng.normal(size=(n, D_IN)) + 1).astype(np.float32)
    return x, [classes[k] for k in truth]


def make_store(path: Path, x, labels, **columns):
    table = pa.table({"id": [f"row {i}" for i in range(len(x))], "y": labels, **columns})
    return write_store(path, [StorePart({"image": x}, table)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def store(folder):
    return make_store(folder / "test.store", *world(seed=1))


@pytest.fixture(scope="module")
def biased(folder):
    return make_store(folder / "biased.store", *world(1500, bias=0.95, seed=2))


@pytest.fixture(scope="module")
def sae(store):
    x = torch.from_numpy(store.take(np.arange(N), "image"))
    found = make_sae()
    found.standardizer = Standardizer().with_statistics("image", fit_statistics(lambda: [x]))
    return found


@pytest.fixture(scope="module")
def found(sae, store, biased):
    return audit(sae, store, "y", train_store=biased, names=NAMES, n_permutations=400)


def coefficients(n_classes=2, *, unit_norm=False, seed=0):
    rng = np.random.default_rng(seed)
    tensors = [
        torch.from_numpy(part).float() for part in (rng.normal(size=(n_classes, D_IN)), rng.normal(size=n_classes))
    ]
    mean, scale = (torch.from_numpy(part).float() for part in (rng.normal(size=D_IN), rng.uniform(0.5, 2, D_IN)))
    return LinearClassifier(tuple("abc"[:n_classes]), *tensors, mean, scale, unit_norm, "test")


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("config", [{}, {"kind": "topk", "k": 6}, {"soft_cap": 1.0}], ids=str)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_closed_form_is_decoding_and_classifying_every_edited_row(sae, store, config, unit_norm, n_classes):
    subject = make_sae(**config)
    subject.standardizer = sae.standardizer
    classifier = coefficients(n_classes, unit_norm=unit_norm)
    result = audit(subject, store, classifier=classifier, names=NAMES, n_permutations=20)
    x = torch.from_numpy(store.take(np.arange(N), "image"))
    z = subject.encode(x)
    before = classifier.logits(x).softmax(1)
    for name, latents in NAMES.items():
        if name == "silent":
            continue
        one = result[name]
        fires = (z[:, latents] > 0).any(1)
        k = classifier.classes.index(one.class_)
        strength = oracle.group_strength(z, latents, subject.W_dec.detach())
        for edit, q in ((one.remove, None), (one.set_p50, 0.5), (one.set_p99, 0.99)):
            rows = fires if q is None else ~fires
            wanted = 0.0 if q is None else float(np.quantile(strength[strength > 0].detach(), q))
            edited = oracle.set_group(
                z, torch.nonzero(rows).flatten().tolist(), latents, subject.W_dec.detach(), wanted
            )
            after = oracle.edited_probabilities(subject, classifier, x, z, edited)
            change, flips = oracle.mean_change(before, after, rows, k)
            assert edit.n == int(rows.sum()) and edit.strength == pytest.approx(wanted, rel=1e-4)
            assert edit.change == pytest.approx(change, abs=1e-5)  # float32 probabilities
            assert edit.flip_rate == pytest.approx(flips, abs=2 / N)  # a row may lie on the border


def test_group_gaps_are_those_of_classifying_every_row_with_the_concept_removed(sae, store, biased, found):
    x = torch.from_numpy(store.take(np.arange(N), "image"))
    truth = np.array(store.column("y"))
    z = sae.encode(x)
    edited = z.clone()
    edited[:, 1] = 0
    again = audit(sae, store, "y", train_store=biased, names={"planted": [1]}, n_permutations=20)["planted"].debiasing
    assert again.overall == pytest.approx(found.classifier["accuracy"])
    assert sum(group.n for group in again.groups) == N
    for group in again.groups:
        rows = (truth == group.class_) & ((z[:, 1] > 0).numpy() == group.present)
        assert group.n == rows.sum()
        if not group.present:
            assert group.accuracy == group.accuracy_removed
    assert again.worst == min(group.accuracy for group in again.groups)
    assert again == found["planted"].debiasing


def test_a_planted_correlation_is_found_and_removing_it_helps_the_worst_group(found):
    assert found.concepts[0].name in ("planted", "own")  # the class itself has an effect too
    planted = found["planted"]
    assert planted.given_true.q < 0.05 and planted.given_true.effect_size > 0.3
    assert abs(planted.by_true.effect_size) < 0.2  # the audited store does not have the correlation
    assert planted.remove.change < -0.1 < 0.1 < planted.set_p99.change
    assert planted.control.beaten == 1  # the class itself, latent 0, is no control of it
    assert planted.effect > 2 * planted.control.set_p50
    assert planted.debiasing.worst_levelled > planted.debiasing.worst + 0.1
    assert planted.test == "train_shift" and planted.train_shift.q < 0.05
    # its direction is not orthogonal to the others', so they carry some of it
    assert planted.train_shift.effect_size == max(
        one.train_shift.effect_size for one in found.concepts if one.train_shift
    )


def test_on_the_unbiased_twin_nothing_is_reported(sae, store, folder):
    twin = make_store(folder / "twin.store", *world(1500, seed=7))
    result = audit(sae, store, "y", train_store=twin, names=NAMES, n_permutations=400)
    assert result.reported() == []


def test_train_shift_counts_every_pair_of_a_training_and_another_row_of_one_class():
    rng = np.random.default_rng(0)
    strengths = (rng.gamma(2, 1, (60, 2)) * (rng.random((60, 2)) < 0.6)).astype(np.float32)
    is_training, truth = rng.random(60) < 0.5, rng.integers(0, 3, 60)
    found = PermutationTests(("a", "b", "c"), 1, 50, rng).train_shift(strengths, is_training, truth)
    for one, column in zip(found, strengths.T, strict=True):
        sides = [
            statistics_oracle.cliffs_delta(column[side], is_training[side], truth[side])
            for side in (truth == 1, truth != 1)
        ]
        assert one.effect_size == pytest.approx((sides[0] - sides[1]) / 2, abs=1e-6)


def test_train_shift_p_values_are_uniform_where_training_and_audited_rows_are_alike():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 2, 400)
    strengths = (truth[:, None] + rng.normal(size=(400, 400))).clip(0).astype(np.float32)  # all follow the class
    found = PermutationTests(("a", "b"), 1, 1000, rng).train_shift(strengths, np.arange(400) < 150, truth)
    assert scipy.stats.kstest([one.p for one in found], "uniform").pvalue > 0.01


def test_the_words_of_the_class_itself_come_last(sae, store, biased):
    names = {"B": [0], "planted": [1], "silent": [5]}
    result = audit(sae, store, "y", train_store=biased, names=names, n_permutations=20)
    assert [(one.name, one.is_target) for one in result.concepts] == [("planted", False), ("B", True)]


def test_concepts_come_strongest_causal_effect_first(found):
    effects = [one.effect for one in found.concepts]
    assert effects == sorted(effects, reverse=True)
    top = found.concepts[0]
    assert top.effect == pytest.approx((abs(top.remove.change) + abs(top.set_p50.change)) / 2)


def test_json_has_the_contracts_keys_and_no_nan(found):
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {"target", "classifier", "concepts"} <= set(data)
    wanted = {"latent", "name", "effect_size", "p", "q", "remove", "set_p99", "flip_rate", "control", "class"}
    for concept in data["concepts"]:
        assert wanted <= set(concept)
    assert "planted" in found.to_text()


def test_p_values_of_shuffled_predictions_are_uniform():
    rng = np.random.default_rng(0)
    strengths = (rng.gamma(2, 1, (300, 400)) * (rng.random((300, 400)) < 0.5)).astype(np.float32)
    truth = rng.integers(0, 2, 300)
    predicted = np.where(rng.random(300) < 0.8, truth, 1 - truth)  # independent of every column, given the truth
    for labels, strata in ((predicted, truth), (predicted, np.zeros(300, int))):
        some = PermutationTests(("a", "b"), 1, 1000, rng).associate(strengths, labels, strata)
        assert scipy.stats.kstest([one.p for one in some], "uniform").pvalue > 0.01


def test_given_the_truth_a_concept_that_only_follows_the_truth_is_not_reported():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 1000)
    predicted = np.where(rng.random(1000) < 0.9, truth, 1 - truth)
    strengths = (truth + rng.normal(size=1000)).clip(0).astype(np.float32)[:, None]
    tests = PermutationTests(("a", "b"), 1, 999, rng)
    one = tests.associate(strengths, predicted, np.zeros(1000, int))[0]
    other = tests.associate(strengths, predicted, truth)[0]
    assert one.p < 0.01 < 0.05 < other.p
    assert abs(other.effect_size) < 0.1 < one.effect_size


def test_the_same_seed_gives_the_same_audit_and_concepts_are_audited_alone_as_among_others(sae, store, biased, found):
    again = audit(sae, store, "y", train_store=biased, names=NAMES, n_permutations=400)
    assert again.to_json() == found.to_json()
    alone = audit(sae, store, "y", train_store=biased, names=NAMES, concept=["Planted"], n_permutations=400)
    assert [one.name for one in alone.concepts] == ["planted"]
    assert "; planted stands out beyond its controls." in alone.verdict  # its class, latent 0, is no control of it
    own = audit(sae, store, "y", train_store=biased, names=NAMES, concept=["rest", "silent"], n_permutations=20)
    assert "0 of the 2 concepts asked for stand out" in own.verdict and "\nrest " in own.to_text()  # asked for: shown
    assert alone["planted"].remove.change == pytest.approx(found["planted"].remove.change, abs=1e-6)


def test_more_latents_than_memory_take_more_passes_and_change_nothing(sae, store, biased, found, monkeypatch):
    monkeypatch.setattr("msae.use.audit.auditor.ACTIVATION_ENTRIES", 2 * N)
    monkeypatch.setattr("msae.use.audit.measure.EDIT_ENTRIES", 100)
    again = audit(sae, store, "y", train_store=biased, names=NAMES, n_permutations=400)
    for one in found.concepts:
        if one.remove:
            assert again[one.name].remove.change == pytest.approx(one.remove.change, abs=1e-6)
            assert again[one.name].debiasing == one.debiasing


def test_a_concept_that_never_fires_is_left_out_and_counted_unless_it_is_asked_for(sae, found, store, biased):
    assert "silent" not in [one.name for one in found.concepts] and found.settings["n_rare"] == 1
    assert "concepts left out because they fire in fewer than 6 rows: 1 (silent)" in found.notes
    with pytest.raises(ConfigError, match="none of the 1 concepts fires in 6 of the 600 audited rows"):
        audit(sae, store, "y", train_store=biased, names={"silent": [5]}, n_permutations=20)
    asked = audit(sae, store, "y", train_store=biased, names=NAMES, concept=["silent"], n_permutations=20)
    silent = asked["silent"]
    assert silent.note == f"never fires on {store.path}"
    assert silent.remove is silent.main is silent.control is None and silent.effect == 0


def test_one_test_is_reported_for_all_concepts_and_its_q_values_are_one_family(sae, store, biased, found):
    assert {one.test for one in found.concepts} == {"train_shift"} and found.settings["test"] == "train_shift"
    for name in ("by_predicted", "by_true", "given_true", "train_shift"):
        tested = [one for concept in found.concepts if (one := getattr(concept, name)) is not None]
        wanted = scipy.stats.false_discovery_control([one.p for one in tested])
        assert [one.q for one in tested] == pytest.approx(list(wanted))
    assert [one.name for one in found.reported()] == [
        one.name
        for one in found.concepts
        if one.train_shift and one.train_shift.q < 0.05 and one.effect_low > one.control.largest
    ]
    without = audit(sae, store, "y", names=NAMES, n_permutations=20)
    assert {one.test for one in without.concepts} == {"given_true"} == {without.settings["test"]}


def test_what_stands_out_is_listed_by_effect_times_association_and_the_classes_own_words_last(found):
    def one(name, effect, size, is_target=False):
        main = dataclasses.replace(found["planted"].main, effect_size=size, q=0.001)
        return dataclasses.replace(
            found["planted"], name=name, is_target=is_target, effect=effect, train_shift=main, beside_stronger=None
        )

    concepts = (one("moves much", 0.3, 0.1), one("pulls", 0.2, -0.4), one("class", 0.5, 0.9, is_target=True))
    made = dataclasses.replace(found, concepts=concepts)
    assert [concept.name for concept in made.standing_out] == ["pulls", "moves much", "class"]
    assert made["pulls"].pull == pytest.approx(0.08) and made.ranked == made.reported() == made.standing_out
    of_score = tuple(dataclasses.replace(one, class_="score", is_target=False) for one in concepts)
    score = dataclasses.replace(made, concepts=of_score, classifier={**made.classifier, "is_score": True})
    assert [concept.name for concept in score.standing_out] == ["class", "moves much", "pulls"]  # by effect alone


def test_a_concept_that_fires_in_training_rows_alone_is_in_the_family_of_q_values(sae, folder, biased):
    x, labels = world(400, seed=8)
    silent = (sae.encode(torch.from_numpy(x))[:, 1] == 0).numpy()
    without = make_store(folder / "without.store", x[silent], [labels[i] for i in np.flatnonzero(silent)])
    result = audit(sae, without, "y", train_store=biased, names=NAMES, n_permutations=400)
    planted = result["planted"]
    assert planted.note == f"never fires on {without.path}" and planted.remove is None
    assert planted.main is planted.train_shift and planted.main.q < 0.05 and planted in result.reported()
    assert result.in_training_alone == [planted] and planted not in result.ranked
    assert f"In the training rows planted (q {planted.main.q:.2g}) goes with the classes" in result.to_text()
    assert "it fires in none of the audited rows, so the effect cannot be measured here" in result.verdict
    assert Audit.from_json(json.dumps(result.to_json()), where="x").reported() == result.reported()
    page = section(result)
    assert "planted (q " in page.split("</p>")[0]
    assert page.count(">planted<") == 1 and "In the training rows alone" in page.split(">planted<")[0]
    tested = [one.train_shift for one in result.concepts if one.train_shift]
    wanted = scipy.stats.false_discovery_control([one.p for one in tested])
    assert [one.q for one in tested] == pytest.approx(list(wanted))


def test_a_concept_is_found_by_its_name_in_any_case_and_an_unknown_one_is_one_line(found):
    assert found["Planted"] is found["planted"]
    with pytest.raises(ConfigError, match="no concept 'plantd' was audited; did you mean 'planted'"):
        found["plantd"]
    with pytest.raises(ConfigError, match="no concept '#7777' was audited"):
        found[7777]


def test_the_table_has_what_stands_out_in_six_columns_and_says_what_each_means(found):
    text = found.to_text()
    head = next(line for line in text.splitlines() if line.startswith("concept"))
    assert [one.strip() for one in head.split("  ") if one.strip()] == [
        "concept", "pushes", "by", "q", "rows", "what helps",
    ]  # fmt: skip
    line = next(line for line in text.splitlines() if line.startswith("planted"))
    planted = found["planted"]
    assert "towards b" in line and f"{planted.effect:.3f} ({planted.control.largest:.3f})" in line
    assert f"{planted.debiasing.worst:.3f} > {planted.debiasing.worst_levelled:.3f} levelled" in line
    assert f"{round(planted.firing_rate * N)}" in line and f"{planted.train_shift.q:.2g}" in line
    assert "(test train_shift)" in text and "random latents" in text
    assert not any(line.startswith("rest") for line in text.splitlines())  # no more than random latents do
    accuracy = found.classifier["accuracy"]
    assert len(found.reported()) == 1
    assert found.verdict == (
        f"The classifier is right in {accuracy:.1%} of 600 rows of 2 classes; 1 of 5 concepts "
        f"stands out beyond its controls, where chance would have {found.n_by_chance:.1f}."
    )
    assert text.startswith(found.verdict)


def test_where_nothing_stands_out_that_is_said_and_nothing_is_ranked(sae, folder):
    twin = make_store(folder / "calm.store", *world(1500, seed=7))
    on = make_store(folder / "calm-on.store", *world(600, seed=1))
    result = audit(sae, on, "y", train_store=twin, names=NAMES, n_permutations=400)
    assert "Nothing stands out: 0 of 5 concepts" in result.verdict and result.ranked == []
    assert "pushes" not in result.to_text()
    # chance is judged by the number that pass the test: one of 21 has the largest effect
    q = dataclasses.replace(result["planted"].main, q=0.01)
    many = dataclasses.replace(
        result,
        concepts=tuple(dataclasses.replace(result["planted"], **{result.settings["test"]: q}) for _ in range(42)),
    )
    assert many.n_by_chance == 2


def test_a_result_is_a_table_for_pandas_and_reads_well_in_a_notebook(found):
    pandas = pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.name) == [one.name for one in found.concepts]
    assert frame.set_index("name").effect["planted"] == found["planted"].effect
    json.dumps(found.to_json(), allow_nan=False)
    assert "Association(" not in repr(found["planted"])
    evil = dataclasses.replace(found["planted"], name="<script>")
    assert "<script>" not in evil._repr_html_() and "&lt;script&gt;" in evil._repr_html_()


def test_an_audit_of_another_version_is_one_line(found):
    text = json.dumps(found.to_json()).replace('"test": "train_shift"', '"test": "taught"')
    with pytest.raises(ConfigError, match="reports the test 'taught' of another version of msae; audit again"):
        Audit.from_json(text, where="a.json")


def test_the_change_of_one_edited_row_has_no_narrow_interval(sae, folder):
    x, labels = world(40, seed=6)
    rows = sae.encode(torch.from_numpy(x))[:, 1] > 0
    one = int(np.flatnonzero(rows.numpy())[0])
    keep = [i for i in range(40) if not rows[i] or i == one]
    few = make_store(folder / "one.store", x[keep], [labels[i] for i in keep])
    effect = audit(sae, few, classifier=coefficients(), concept=["#1"], n_permutations=20)["#1"].remove
    assert effect.n == 1 and (effect.low, effect.high) == (-1.0, 1.0)


def test_missing_labels_are_left_out_and_counted(sae, folder, biased):
    x, labels = world(300, seed=4)
    holes = [None if i % 10 == 0 else "" if i % 10 == 1 else label for i, label in enumerate(labels)]
    result = audit(
        sae, make_store(folder / "holes.store", x, holes), "y", train_store=biased, names=NAMES, n_permutations=20
    )
    assert (result.n, result.n_left_out) == (240, 60)


def test_without_a_classifier_half_the_rows_train_one_and_the_other_half_is_audited(sae, store):
    result = audit(sae, store, "y", names=NAMES, n_permutations=20)
    assert result.n == result.classifier["n_train"] == N // 2


def test_a_store_of_texts_alone_is_audited_as_texts(sae, folder):
    x, labels = world(seed=1)
    table = pa.table({"id": [f"row {i}" for i in range(len(x))], "y": labels})
    texts = write_store(folder / "texts.store", [StorePart({"text": x}, table)])
    images = make_store(folder / "same.store", x, labels)
    own = make_sae()
    own.standardizer = Standardizer(dict.fromkeys(("image", "text"), sae.standardizer.statistics["image"]))
    found, same = (audit(own, one, "y", names=NAMES, n_permutations=50) for one in (texts, images))
    assert found.settings["modality"] == "text" and same.settings["modality"] == "image"
    of_texts, of_images = (
        [(one["name"], one["p"], one["remove"]) for one in each.to_json()["concepts"]] for each in (found, same)
    )
    assert of_texts == of_images


def test_without_names_every_latent_is_audited(sae, store, biased):
    result = audit(sae, store, "y", train_store=biased, n_permutations=20)
    assert len(result.concepts) == D_SAE - 1 and "every latent" in result.notes[0]  # one never fires
    few = audit(sae, store, "y", train_store=biased, concept=["#3"], n_permutations=20)
    assert [one.latents for one in few.concepts] == [(3,)]


def test_names_of_other_weights_are_refused(sae, store, tmp_path):
    sae.save(tmp_path)
    names = ConceptNames("evidence", D_SAE, (Concept(1, "planted", 0.9, None),), record={"sae": "other weights"})
    names.save(tmp_path)
    with pytest.raises(RunError, match=r"of other weights or thresholds than .* has now; type: msae name"):
        audit(tmp_path, store, "y", n_permutations=20)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_coefficients_in_a_file_are_the_classifier(sae, store, folder, suffix):
    classifier = coefficients(3, unit_norm=True)
    path = folder / f"coefficients{suffix}"
    if suffix == ".npz":
        classifier.save(path)
    else:
        arrays = {key: getattr(classifier, key).numpy() for key in ("weight", "bias", "mean", "scale")}
        save_file(arrays, path, {"classes": '["a", "b", "c"]', "unit_norm": "true"})
    again = LinearClassifier.load(path, d_in=D_IN)
    assert (again.classes, again.unit_norm) == (classifier.classes, True)
    x = torch.from_numpy(store.take(np.arange(9), "image"))
    assert torch.equal(again.logits(x), classifier.logits(x))
    result = audit(sae, store, classifier=path, names=NAMES, n_permutations=20)
    assert result.n == N and result.concepts[0].given_true is None and result.concepts[0].by_predicted is not None


def test_one_row_of_weights_is_scikit_learns_logit_of_the_second_class(store, folder):
    np.savez(folder / "one.npz", weight=np.ones((1, D_IN)), bias=[0.5], classes=["no", "yes"])
    x = torch.from_numpy(store.take(np.arange(9), "image"))
    found = LinearClassifier.load(folder / "one.npz", d_in=D_IN).logits(x).softmax(1)[:, 1]
    assert torch.allclose(found, torch.sigmoid(x.sum(1) + 0.5))


def test_a_sweep_begins_without_the_concept_and_passes_the_samples_own_probability(sae, store, biased):
    x, _ = world(seed=1)
    z = sae.encode(torch.from_numpy(x))
    row = int(z[:, 1].argmax())
    result = audit(
        sae, store, "y", train_store=biased, names={"planted": [1]}, n_permutations=20, sweep_id=f"row {row}"
    )
    sweep = result["planted"].sweep
    assert sweep.id == f"row {row}" and sweep.own == pytest.approx(float(z[row, 1]), rel=1e-5)
    assert list(sweep.probabilities) == sorted(sweep.probabilities)
    assert sweep.strengths[0] == 0 and sweep.strengths[-1] == pytest.approx(2 * sweep.natural_p99, rel=1e-6)


def test_controls_fire_like_the_concept_and_are_others():
    rng = np.random.default_rng(0)
    rate = np.repeat([0.1, 0.5], 20)
    z = ((rng.random((2000, 40)) < rate) * rng.gamma(3, 1, (2000, 40))).astype(np.float32)
    z[:, 39] = 0
    drawn = matched_groups((0,), profile_of(z), n_controls=10, rng=rng)
    assert len(drawn) == 10 and all(0 < latent < 20 for (latent,) in drawn)
    pairs = matched_groups((0, 20), profile_of(z), n_controls=10, rng=rng)
    assert all(not {0, 20, 39} & set(pair) and len(pair) == 2 and pair[0] < 20 <= pair[1] for pair in pairs)


def test_a_latent_that_goes_with_the_class_more_than_the_concept_is_no_control_of_it():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 2000)
    z = ((rng.random((2000, 12)) < 0.4) * rng.gamma(3, 1, (2000, 12))).astype(np.float32)
    z[:, 5] *= truth == 1  # the class
    z[:, 6] *= 0.8 + 0.2 * (truth == 1)  # hardly
    profile = profile_of(z, truth)
    correlations = [abs(np.corrcoef(z[:, latent], truth == k)[0, 1]) for latent in (5, 6) for k in range(3)]
    wanted = [max(correlations[:3]), max(correlations[3:])]
    assert list(profile.of_class[[5, 6]]) == pytest.approx(wanted, abs=1e-4)  # float32 sums
    controls = {latent for (latent,) in matched_groups((0,), profile, n_controls=11, rng=rng)}
    assert controls == set(range(1, 12)) - {5}
    assert len(matched_groups((5,), profile, n_controls=11, rng=rng)) == 11  # what does go with it is judged by all
    assert {5} == controls ^ {one for (one,) in matched_groups((0,), profile_of(z), n_controls=11, rng=rng)}


CASES = {
    "no such column": ("StoreError", {"target": "yy"}, "has no column 'yy'; did you mean 'y'"),
    "constant": ("ConfigError", {"target": "same"}, "has only 'x' in 600 labelled rows; an audit needs two classes"),
    "empty": ("ConfigError", {"target": "nothing"}, "has no labels; an audit needs two classes"),
    "many texts": ("ConfigError", {"target": "code"}, "has 600 different values"),
    "unknown concept": ("ConfigError", {"concept": ["plantd"]}, "no latent is named 'plantd'; did you mean 'planted'"),
    "unknown latent": ("ConfigError", {"concept": ["#99"]}, "there is no latent #99; this SAE has #0 to #23"),
    "unknown class": ("ConfigError", {"positive": "z"}, "there is no class 'z'; the classes are a, b"),
    "nothing to audit": ("ConfigError", {"target": None}, "nothing to audit; give --target COLUMN"),
    "two classifiers": ("ConfigError", {"classifier": "x.npz", "class_texts": {}}, "keep one of them"),
    "no file": ("ConfigError", {"classifier": "missing.npz"}, "missing.npz does not exist"),
    "no names": ("RunError", {"names": "nowhere"}, "or audit every latent with --all-latents"),
    "no encoder": (
        "ConfigError",
        {"class_texts": {"a": "a", "b": "b"}},
        "which --class-texts needs; a store made by msae embed says it",
    ),
    "unknown sweep": ("StoreError", {"sweep_id": "row 9999"}, "has no row with the id 'row 9999'"),
}


@pytest.fixture(scope="module")
def bad_store(folder):
    x, labels = world(seed=1)
    columns = {"same": ["x"] * N, "nothing": pa.nulls(N, pa.string()), "code": [f"c{i}" for i in range(N)]}
    return make_store(folder / "bad.store", x, labels, **columns)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(sae, bad_store, case):
    kind, options, message = CASES[case]
    with pytest.raises({"ConfigError": ConfigError, "StoreError": StoreError, "RunError": RunError}[kind]) as caught:
        audit(sae, bad_store, **({"target": "y", "names": NAMES, "n_permutations": 20} | options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_coefficients_are_one_clear_line(folder):
    for name, arrays, message in (
        ("wide", {"weight": np.ones((2, 5))}, "weights of width 5, the embeddings have 12"),
        ("odd", {"weight": np.ones((2, D_IN)), "bias": np.ones(3)}, "2 rows of weights, 3 biases"),
        ("keys", {"coef_": np.ones((2, D_IN))}, "holds coef_; wanted weight"),
        ("nan", {"weight": np.full((2, D_IN), np.nan)}, "NaN or infinite"),
        ("pickle", {"weight": np.array([object()])}, "cannot be read"),
    ):
        np.savez(folder / f"{name}.npz", **arrays)
        with pytest.raises(ConfigError, match=message):
            LinearClassifier.load(folder / f"{name}.npz", d_in=D_IN)


def test_a_compressed_classifier_with_changed_bytes_is_one_line(folder):
    file = folder / "changed.npz"
    np.savez_compressed(file, weight=np.random.default_rng(0).normal(size=(2, 400)))
    content = bytearray(file.read_bytes())
    content[60:400] = bytes(byte ^ 0x55 for byte in content[60:400])
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"changed\.npz cannot be read as \.npz") as caught:
        LinearClassifier.load(file, d_in=400)
    assert "\n" not in str(caught.value)


def test_a_classifier_that_predicts_one_class_leaves_nothing_to_test(sae, store):
    nothing = torch.zeros(D_IN)
    classifier = LinearClassifier(
        ("a", "b"), torch.zeros(2, D_IN), torch.tensor([0.0, 5.0]), nothing, nothing + 1, False, "test"
    )
    result = audit(sae, store, "y", classifier=classifier, names=NAMES, n_permutations=20)
    assert result.notes[-1] == "the classifier predicts 'b' for every row, so there is no association to test"
    assert all(one.main is None for one in result.concepts)


def test_columns_of_every_type_that_has_classes_can_be_audited(tmp_path):
    x, labels = world(6, seed=3)
    columns = {
        "category": pa.array(["a", "b", "", None, "a", "a"]).dictionary_encode(),
        "flag": [True, False] * 3,
        "nothing": pa.nulls(6),
        "same": [1] * 6,
        "lists": [[1], [2]] * 3,
        "caption": ["a cat", "a dog"] * 3,
    }
    table = pa.table({"id": list("abcdef"), "y": labels, **columns})
    np.save(tmp_path / "rows.npy", x)
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    store = EmbeddingStore.open(tmp_path / "rows.npy")
    assert target_columns(store) == {"y": 2, "category": 2, "flag": 2}


# --- The fix


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_fix_writes_a_classifier_that_does_what_the_audit_says(sae, folder, biased, suffix):
    x, labels = world(3000, seed=11)
    z = sae.encode(torch.from_numpy(x))[:, 1].numpy()
    on = make_store(folder / f"fix{suffix}.store", x, labels, has=[bool(one) for one in z > 0.5])
    file = folder / f"fixed{suffix}"
    found = audit(
        sae, on, "y", train_store=biased, names=NAMES, concept=["planted"], n_permutations=20, fix=file, groups="has"
    ).fix
    assert found.file == str(file) and found.recommended == found.ways[0].name
    assert found.n_fit + found.n_choose + found.n_judge == 3000
    best = found.ways[0]
    assert best.worst > found.worst + 0.1 and best.overall >= found.overall - 0.01
    fresh, truth = world(4000, seed=12)  # rows that neither fitted nor chose nor judged
    has = sae.encode(torch.from_numpy(fresh))[:, 1].numpy() > 0.5
    fixed = LinearClassifier.load(file, d_in=D_IN)
    right = np.array(fixed.classes)[fixed.logits(torch.from_numpy(fresh)).argmax(1).numpy()] == truth
    groups = [right[(np.array(truth) == k) & (has == h)].mean() for k in "ab" for h in (False, True)]
    assert min(groups) == pytest.approx(best.worst, abs=0.07)  # two standard errors of a group of 250 rows


def test_rows_that_judge_a_fix_neither_fit_nor_choose_it():
    from msae.use.audit.fix import _thirds

    group = np.repeat([0, 1, 3], [100, 31, 12])
    parts = _thirds(group, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(143))
    assert [np.bincount(group[part]).tolist() for part in parts] == [[34, 11, 0, 4], [33, 10, 0, 4], [33, 10, 0, 4]]


def test_after_leace_no_linear_classifier_reads_the_concept_within_a_class(sae, store):
    from msae.sae.view import View
    from msae.use.audit import fix as fixes
    from msae.use.audit.subjects import make_subject

    subject = make_subject(
        View(sae, store, "image"), target="y", classifier=coefficients(2), class_texts=None, train_store=None, seed=0
    )
    rows = fixes._rows(subject, (1,), None)
    before, after = subject.classifier, fixes.leace(subject, (1,), rows, np.random.default_rng(0))
    x, has = (part.double().numpy() for part in fixes._within_classes(before.features(rows.x), rows))
    # what is left of the weights has no covariance with the concept, where the ridge changes nothing
    covariance = x.T @ has / len(x)
    left, was = (np.abs(one.weight.double().numpy() @ covariance).max() for one in (after, before))
    assert left < 1e-4 * was


def test_otsus_border_divides_two_hills(sae, store):
    from msae.sae.view import View
    from msae.use.audit.fix import clearly_present

    rng = np.random.default_rng(0)
    z = np.concatenate([rng.uniform(0, 0.3, 700), rng.uniform(1.5, 2, 300)]).astype(np.float32)[:, None]
    assert np.array_equal(clearly_present(View(sae, store, "image"), (1,), z), np.arange(1000) >= 700)


def test_without_a_concept_the_fix_takes_the_strongest_that_has_enough_rows(sae, store, biased, folder, monkeypatch):
    from msae.use import audit as module

    common = {"train_store": biased, "names": NAMES, "n_permutations": 20, "fix": folder / "next.npz"}
    order = ["planted", "rest"]
    monkeypatch.setattr(Audit, "ranked", property(lambda self: [self[name] for name in order]))

    def refuse(names):
        def fix_classifier(subject, name, *args, **options):
            if name in names:
                raise module.TooFewRows(f"{name!r} has 4 rows")
            return whole(subject, name, *args, **options)

        return fix_classifier

    whole = module.fix_classifier
    monkeypatch.setattr(module, "fix_classifier", refuse(order[:1]))
    found = audit(sae, store, "y", **common)
    assert found.fix.concept == order[1] and f"so the next was taken: {order[0]}" in found.notes[-1]
    monkeypatch.setattr(module, "fix_classifier", refuse(order))
    with pytest.raises(ConfigError, match=f"none of the {len(order)} concepts .* '{order[0]}' has 4 rows"):
        audit(sae, store, "y", **common)


def test_a_fix_that_the_judging_rows_do_not_bear_out_is_doubted():
    from msae.use.audit import Fix, Way

    ways = (Way("reweigh", 0.78, 0.93, True), Way("erase", 0.89, 0.93, True))
    fix = Fix("hat", "firing", 9, 9, 9, 3, 0.88, 0.93, ways, "reweigh", "a.npz")
    assert "does not raise the worst group (0.880 as it is)" in fix.doubt
    assert dataclasses.replace(fix, recommended="erase").doubt is None
    assert dataclasses.replace(fix, recommended=None).doubt is None


def test_a_fix_that_cannot_be_is_one_line(sae, store, biased, folder):
    common = {"train_store": biased, "names": NAMES, "n_permutations": 20}
    for options, message in (
        ({"fix": "a.txt"}, "is no .npz or .safetensors file"),
        ({"groups": "y"}, "add --fix FILE"),
        ({"fix": "a.npz", "concept": ["planted", "own"]}, "keep one --concept"),
        ({"fix": "a.npz", "concept": ["planted"], "groups": "z"}, "has no column 'z'"),
    ):
        with pytest.raises((ConfigError, StoreError), match=message):
            audit(sae, store, "y", **common, **options)


def test_where_audits_only_the_rows_that_fit(sae, folder, biased):
    x, labels = world(seed=1)
    parts = ["left" if i % 3 else "right" for i in range(N)]
    both = make_store(folder / "parts.store", x, labels, part=parts)
    chosen = [i for i in range(N) if i % 3 == 0]
    alone = make_store(folder / "right.store", x[chosen], [labels[i] for i in chosen])
    common = {"train_store": biased, "names": NAMES, "n_permutations": 20}
    found = audit(sae, both, "y", where="part == 'right'", **common)
    assert found.n == len(chosen) and found.n_left_out == 0
    wanted = audit(sae, alone, "y", **common)
    assert found["planted"].remove == wanted["planted"].remove
    with pytest.raises(ConfigError, match=r"no row of .* fits"):
        audit(sae, both, "y", where="part == 'middle'", **common)


# --- A model of one number


def scorer(weight, bias=0.5):
    nothing = torch.zeros(D_IN)
    weight, bias = torch.from_numpy(weight[None]).float(), torch.tensor([bias])
    return LinearClassifier(("score",), weight, bias, nothing, nothing + 1, False, "test")


def test_removing_a_concept_takes_its_part_from_a_score(sae, store, folder):
    direction = sae.W_dec.detach().numpy()[1] - 0.5 * sae.W_dec.detach().numpy()[4]
    file = folder / "score.npz"
    np.savez(file, weight=direction, bias=0.5)  # one output and no classes
    found = audit(sae, store, classifier=file, names=NAMES, n_permutations=50)
    x = torch.from_numpy(store.take(np.arange(N), "image"))
    z = sae.encode(x)[:, 1].numpy()
    unit = sae.W_dec.detach().numpy()[1] / sae.standardizer.statistics["image"].scale
    planted = found["planted"]
    assert planted.remove.change == pytest.approx(-(z[z > 0].mean() * unit @ direction), rel=1e-4)
    assert planted.towards == "up" and planted.debiasing is None and planted.remove.flip_rate == 0
    scores = scorer(direction).logits(x)[:, 0].numpy()
    assert planted.main.effect_size == pytest.approx(scipy.stats.spearmanr(z, scores).statistic, abs=1e-6)
    assert planted.test == "by_predicted" and found.classifier["is_score"]
    assert found.classifier["mean"] == pytest.approx(scores.mean(), rel=1e-5)
    assert found.verdict.startswith(f"The score of 600 rows is {scores.mean():.3g} on average")
    json.dumps(found.to_json(), allow_nan=False)
    assert Audit.from_json(json.dumps(found.to_json()), where="a.json").verdict == found.verdict


def test_a_column_of_numbers_is_predicted_by_ridge_regression_on_half_of_the_rows(sae, folder):
    x, labels = world(seed=1)
    z = sae.encode(torch.from_numpy(x))[:, 1].numpy()
    ages = [None if i % 50 == 0 else float(age) for i, age in enumerate(20 + 5 * z)]
    on = make_store(folder / "ages.store", x, labels, age=ages)
    found = audit(sae, on, "age", names=NAMES, n_permutations=200)
    assert found.n + found.classifier["n_train"] == N - 12 and found.classifier["correlation"] > 0.7
    assert found.n_left_out == 12
    assert found.concepts[0].name == "planted" and found.concepts[0].towards == "up"
    with pytest.raises(ConfigError, match="names a class, and the model gives a number"):
        audit(sae, on, "age", names=NAMES, positive="a")
    with pytest.raises(ConfigError, match="a fix needs true classes"):
        audit(sae, on, "age", names=NAMES, n_permutations=20, concept=["planted"], fix=folder / "f.npz")


# --- Slices of errors


def test_a_slice_of_errors_is_found_within_its_class_and_its_rows_are_counted(sae, folder):
    x, labels = world(3000, seed=21)
    z = sae.encode(torch.from_numpy(x)).numpy()
    wrong_side = torch.zeros(2, D_IN)
    mean, scale = sae.standardizer.statistics["image"].mean, sae.standardizer.statistics["image"].scale
    # says "b" by the class's own latent, and "a" where latent 4 is strong
    directions = sae.W_dec.detach()
    wrong_side[1] = 3 * directions[0] - 6 * directions[4]
    bias = torch.tensor([0.0, -1.5])
    biased_model = LinearClassifier(("a", "b"), wrong_side, bias, mean, torch.full((D_IN,), scale), False, "test")
    on = make_store(folder / "slices.store", x, labels)
    found = audit(sae, on, "y", classifier=biased_model, names=NAMES, n_permutations=2000, errors=True)
    first = next(one for one in found.slices if one.class_ == "b")
    assert first.name == "other" and first.q < 0.05 and first.effect_size > 0.2
    truth, wrong = (
        np.array(labels),
        biased_model.logits(torch.from_numpy(x)).argmax(1).numpy() != (np.array(labels) == "b"),
    )
    rows = np.array([int(id.split()[1]) for id in first.ids])
    assert (truth[rows] == "b").all() and z[rows, 4].min() > 0
    assert (first.n, first.n_wrong) == (len(rows), wrong[rows].sum())
    assert first.error == pytest.approx(wrong[rows].mean()) and first.error > 2 * first.error_elsewhere
    assert "wrong elsewhere" in found.to_text()
    again = Audit.from_json(json.dumps(found.to_json()), where="a.json")
    assert again.slices == found.slices


def test_where_errors_are_chance_no_slice_is_named():
    from msae.use.audit.slices import compare_errors

    rng = np.random.default_rng(0)
    strengths = (rng.gamma(2, 1, (800, 300)) * (rng.random((800, 300)) < 0.3)).astype(np.float32)
    tested = compare_errors(strengths, rng.integers(0, 2, 800), rng.random(800) < 0.2, n_permutations=500, rng=rng)
    assert len(tested.p) == 600 and scipy.stats.kstest(tested.p, "uniform").pvalue > 0.01


def test_errors_without_true_classes_are_one_line(sae, store):
    with pytest.raises(ConfigError, match="errors need true classes"):
        audit(sae, store, classifier=coefficients(), names=NAMES, errors=True)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_score_in_a_file_stays_a_score_and_with_a_column_of_classes_is_a_logit(sae, store, tmp_path, suffix):
    model = scorer(np.random.default_rng(0).normal(size=D_IN))
    model.save(tmp_path / f"s{suffix}")
    again = LinearClassifier.load(tmp_path / f"s{suffix}", d_in=D_IN)
    assert again.is_score and torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)
    found = audit(sae, store, "y", classifier=tmp_path / f"s{suffix}", names=NAMES, n_permutations=20)
    assert found.classes == ("a", "b") and not found.is_score


def test_nothing_stands_out_unless_more_do_than_chance_would_have(found):
    planted = dataclasses.replace(found["planted"], is_target=False)
    weak = dataclasses.replace(found["rest"], **{found["rest"].test: dataclasses.replace(found["rest"].main, q=0.01)})
    assert planted.stands_out and not weak.stands_out
    few = dataclasses.replace(found, concepts=(planted, *[weak] * 6))  # 7 pass the test: 1/3 by chance, deviation .58
    assert few.ranked == [planted] and "1 of 7 concepts stands out" in few.verdict
    many = dataclasses.replace(found, concepts=(planted, *[weak] * 20))  # 21 pass the test: 1 by chance
    assert many.ranked == [] and "Nothing stands out: 1 of 21 concepts" in many.verdict


def test_what_only_follows_a_stronger_concept_does_not_pass_beside_it():
    rng = np.random.default_rng(3)
    truth, is_training = rng.integers(0, 2, 600), np.arange(600) < 300
    has = np.where(rng.random(600) < np.where(is_training, 0.9, 0.5), truth, 1 - truth)  # planted in training rows
    leaks = (0.7 * has[:, None] + rng.normal(size=(600, 300))).astype(np.float32)
    tests = PermutationTests(("a", "b"), 1, 1000, rng)
    alone = tests.train_shift(leaks, is_training, truth)
    beside = tests.train_shift(leaks, is_training, truth, 2 * truth + has)
    assert np.mean([one.p < 0.05 for one in alone]) > 0.8
    assert scipy.stats.kstest([one.p for one in beside], "uniform").pvalue > 0.01
