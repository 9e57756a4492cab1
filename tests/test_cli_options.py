"""Every option that msae had stays, and the help of each verb says what each option means."""

import inspect
import re

import pytest

from msae.cli import VERBS, main, verb_options
from msae.cli.verbs import load
from msae.sae.train.recipes import RECIPES

OLD_OPTIONS = {
    "demo": "--json --out --seed",
    "embed": "--batch-size --device --dtype --encoder --json --out --revision",
    "train": "--auxiliary --batch-size --checkpoint-every --config --d-sae --dead-after --decay --device --epochs "
    "--expansion --json --k --kind --l1 --levels --log-every --loggers --lr --max-grad-norm --modality --out "
    "--precision --recipe --resume --seed --soft-cap --warmup --weighting --weights",
    "evaluate": "--device --inference --json --k --labels --latex --modality --on --probe-train --recovery --seed",
    "name": "--candidates --centre --column --false-names --json --max-rows --modality --no-subtract-b-dec --on --out "
    "--rule --seed --synonyms --untested --vocabulary --words",
    "gallery": "--concept --inference --json --k --latent --magnitudes --n --on --pairs --sheet --tree",
    "stability": "--json --threshold",
    "audit": "--all-latents --class-texts --classifier --concept --html --inference --json --modality --names --on "
    "--permutations --positive --seed --sweep-id --target --train-store",
    "search": "--embedding --encoder --exclusive --html --image --json --like --modality --n --no-residual --on "
    "--query-modality --set --space --strict --text --where",
    "report": "--audit --beside --json --on --out",
    "explore": "--json --on --port",
    "info": "--json",
}
"""What the command line had when its options were still written by hand, verb by verb."""


def known_options(verb: str) -> set[str]:
    """Every option that a verb takes, those of earlier versions included."""
    found = set(VERBS[verb].renamed or {})
    for option in verb_options(verb).values():
        is_on = option.hint is bool and option.default is True
        found.add(("--no-" if is_on else "--") + option.name.replace("_", "-"))
    return found


def help_of(verb: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as leave:
        main([verb, "--help"])
    assert leave.value.code == 0
    return capsys.readouterr().out


def test_no_verb_and_no_option_is_lost():
    assert set(OLD_OPTIONS) <= set(VERBS)
    for verb, options in OLD_OPTIONS.items():
        assert set(options.split()) <= known_options(verb), verb


@pytest.mark.parametrize(
    ("verb", "old", "now"), [(verb, old, now) for verb in VERBS for old, now in (VERBS[verb].renamed or {}).items()]
)
def test_an_option_of_an_earlier_version_is_the_option_of_today(verb, old, now):
    from msae.cli import _renamed

    assert _renamed(VERBS[verb], [old, "3", f"{old}=3", f"--x={old}"]) == [now, "3", f"{now}=3", f"--x={old}"]
    assert now in known_options(verb)


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option_and_never_says_none(verb, capsys, monkeypatch):
    page = help_of(verb, capsys, monkeypatch)
    assert not re.search(r"\bNone\b|\{None\}|\bSTR\b|\(default: \)|default: False|`", page)
    for option in verb_options(verb).values():
        assert len(option.help.split()) >= 2 and option.help.endswith("."), f"{verb}: {option.name}: {option.help!r}"


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_real_defaults(verb, capsys, monkeypatch):
    page = " ".join(re.sub("[│╭╮╰╯]", " ", help_of(verb, capsys, monkeypatch)).split())
    for option in verb_options(verb).values():
        if isinstance(option.default, str | float | int) and not isinstance(option.default, bool):
            assert f"(default: {option.default})" in page
    assert page.count("(required)") == sum(
        option.default is inspect.Parameter.empty for option in verb_options(verb).values()
    )


def test_help_of_the_learning_rate_is_what_the_recipes_fill_in():
    text = " ".join(verb_options("train")["lr"].help.split())
    assert (
        "3e-3 for matryoshka, 2e-3 for topk and batchtopk, 5e-4 for the others; recipe faithful: 1e-3 for matryoshka"
        in text
    )
    assert "poster: 1e-4 for matryoshka, 5e-5 for relu, 5e-4 for the others" in text
    unlike = {
        name: {kind: rate for kind, rate in recipe.lr.items() if rate != 5e-4} for name, recipe in RECIPES.items()
    }
    assert unlike == {
        "default": {"matryoshka": 3e-3, "topk": 2e-3, "batchtopk": 2e-3},
        "faithful": {"matryoshka": 1e-3, "topk": 2e-3, "batchtopk": 2e-3},
        "poster": {"matryoshka": 1e-4, "relu": 5e-5},
    }


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_the_parameters_of_the_python_function(verb):
    """What only the command line has is written down here, and nothing else."""
    only_here = {"evaluate": {"latex", "poster"}, "gallery": {"sheet", "tree", "k", "pairs", "magnitudes"}}
    only_here |= {"audit": {"html"}, "search": {"html"}}
    settings = VERBS[verb].settings
    parameters = set(inspect.signature(load(VERBS[verb].function)).parameters)
    if settings is not None:
        parameters |= set(inspect.signature(load(settings)).parameters)
    assert set(verb_options(verb)) - parameters == {"json"} | only_here.get(verb, set())
