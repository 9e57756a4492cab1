"""The command line: each verb is the Python function of the same name, its options read by tyro."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence

from msae import __version__
from msae.base.errors import Interrupted, MsaeError, nearest
from msae.cli.output import say
from msae.cli.verbs import VERBS

OVERVIEW = """\
usage: msae VERB [options]        msae VERB --help explains one verb

Matryoshka sparse autoencoders for CLIP and SigLIP embeddings.

  demo       the whole chain on a small world that comes with the package, offline
  embed      images or captions -> a store of embeddings
  train      a store -> a sparse autoencoder in a run folder
  evaluate   runs -> the poster's metrics and table
  name       a run and a vocabulary -> names for its latents, with evidence
  gallery    what activates a latent most; the tree of latents; their magnitudes
  stability  which latents come back in runs from other seeds
  search     nearest neighbours of a query in which concepts are turned up or down
  audit      which concepts a classifier relies on, and what removing them does
  report     a run as one HTML file that opens offline, and as a model card
  explore    runs and a store in a browser on this machine
  info       what a store or a run holds

Every verb: --json FILE writes what it printed as data (- is stdout), --debug shows tracebacks.
"""


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
        command = _parse(verb, arguments)
        command()
        sys.stdout.flush()
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
        say(f"msae {verb}: unexpected {type(err).__name__}: {_one_line(err)}; --debug shows where, please report it")
        return 1
    return 0


def _parse(verb: str, arguments: list[str]) -> Callable[[], None]:
    """The verb with its options bound; wrong usage is one line and exit code 2."""
    import tyro

    function = VERBS[verb](arguments)
    bound = functools.wraps(function)(lambda *args, **options: functools.partial(function, *args, **options))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(bound, prog=f"msae {verb}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as leave:
        if leave.code == 2:
            say(f"msae {verb}: {_usage_line(complaint.getvalue())}; type: msae {verb} --help")
        raise


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
