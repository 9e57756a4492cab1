"""The command line: each verb is the Python function of the same name, its options read by tyro."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from msae import __version__
from msae.base.errors import FailedElsewhere, Interrupted, MsaeError, missing_dependency, nearest
from msae.base.processes import joined, started
from msae.cli.output import check_target, report, say
from msae.cli.verbs import VERBS, Verb, load

if TYPE_CHECKING:
    from msae.cli.options import Option

OVERVIEW = "\n".join(
    [
        "usage: msae VERB [options]        msae VERB --help explains one verb",
        "",
        "Matryoshka sparse autoencoders for CLIP and SigLIP embeddings.",
        "",
        *(f"  {name:<9}  {verb.summary}" for name, verb in VERBS.items()),
        "",
        "What the words and scores mean: docs/glossary.md, and Glossary in msae explore and in each report.",
        "Where to begin: README.md.",
        "Every verb: --json FILE writes what it printed as data (- is stdout), --debug shows tracebacks.",
        "",
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and leave with its exit code: 0 done, 1 a named error, 2 wrong usage, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(OVERVIEW)
        sys.exit(0)
    if arguments[0] == "--version":
        sys.stdout.write(f"msae {__version__}\n")
        sys.exit(0)
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        say(f"msae: there is no verb {verb!r}{nearest(verb, VERBS)}; msae --help lists them")
        sys.exit(2)
    debug = "--debug" in rest
    rest = [argument for argument in rest if argument != "--debug"]
    sys.exit(_run(verb, rest, debug=debug))


def _run(verb: str, arguments: list[str], *, debug: bool) -> int:
    try:
        rank, size = started()
        if size > 1 and verb != "train":
            if rank == 0:
                say(f"msae {verb}: runs in one process, but {size} were started (WORLD_SIZE); leave torchrun out")
            return 2
        with joined():
            command = _parse(verb, arguments)
            command()
        sys.stdout.flush()
    except FailedElsewhere:
        return 1
    except _UsageError as err:
        say(f"msae {verb}: {err}; type: msae {verb} --help")
        return 2
    except Interrupted as err:
        say(f"msae {verb}: {err}")
        return 130
    except KeyboardInterrupt:
        say(f"msae {verb}: interrupted; nothing half-written was left, type the same command to start again")
        return 130
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; say nothing more to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MsaeError, OSError, MemoryError) as err:
        if debug:
            raise
        say(f"msae {verb}: {_one_line(err)}")
        return 1
    except Exception as err:
        if debug:
            raise
        missing = missing_dependency(err)
        if missing is not None:
            say(f"msae {verb}: {missing}")
            return 1
        say(f"msae {verb}: unexpected {type(err).__name__}: {_one_line(err)}; --debug shows where, please report it")
        return 1
    return 0


def verb_options(name: str) -> dict[str, Option]:
    """The options of a verb by name, with the argument that needs none."""
    from msae.cli.options import options_of

    return options_of(VERBS[name])


class _UsageError(Exception):
    """The command line is not one of this verb; the message says why."""


def _parse(name: str, arguments: list[str]) -> Callable[[], None]:
    """The verb with its options bound.

    Raises:
        SystemExit: Help was asked for and is shown.
    """
    from msae.cli.options import parse
    from msae.cli.signatures import description

    verb = VERBS[name]
    options = verb_options(name)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            given = parse(name, description(verb.function), options, verb.places, _renamed(verb, arguments))
    except SystemExit as leave:
        if leave.code == 2:
            raise _UsageError(_usage_line(complaint.getvalue())) from None
        raise
    for argument, metavar in verb.places.items():
        if argument and not given.get(argument):
            raise _UsageError(f"{metavar} is missing")
    return functools.partial(_show, verb, given)


def _renamed(verb: Verb, arguments: list[str]) -> list[str]:
    """The arguments with the options of earlier versions under their names of today, and those alone with a value."""
    words = (argument.partition("=") for argument in arguments)
    found = [(verb.renamed or {}).get(option, option) + equals + value for option, equals, value in words]
    alone = verb.alone or {}
    following = [*found, "--"][1:]
    return [
        f"{word}={alone[word]}" if word in alone and after.startswith("--") else word
        for word, after in zip(found, following, strict=True)
    ]


def _show(verb: Verb, given: dict[str, Any]) -> None:
    """Call the function, print what it found, and write it where --json says."""
    json = given.pop("json", None)
    check_target(json)
    of_finish = {key: given.pop(key) for key in inspect.signature(verb.finish).parameters if key in given}
    if "json" in inspect.signature(verb.finish).parameters:
        of_finish["json"] = json
    shown = verb.finish(functools.partial(load(verb.function), **given), **of_finish)
    if shown is not None:
        text, data, *pages = shown
        report(text, data, json)
        for write in pages:
            write()


def _usage_line(complaint: str) -> str:
    """tyro's page about a wrong option as one line: what is wrong, and the nearest option where it names one."""
    # Framed or dashed, as the terminal has it; the first section after the title says what is wrong.
    title, *sections = [" ".join(part.split()) for part in re.split(r"[-─]{6,}", re.sub("[│╭╮╰╯]", " ", complaint))]
    what = sections[0] if sections else title
    what = re.sub(r"^Missing from msae \w+: (\S+).*", r"\1 is missing", what).removesuffix(".")
    near = next((re.search(r"--[\w-]+", part) for part in sections if part.startswith("Perhaps you meant")), None)
    return what + (f"; did you mean {near.group()}?" if near else "")


def _one_line(err: BaseException) -> str:
    if isinstance(err, OSError) and err.filename is not None:
        return f"{err.filename}: {err.strerror}; check the path, its permissions and the free space"
    return " ".join(str(err).split()) or type(err).__name__
