"""Run verbs as a bare install would: modules that come with extras cannot be imported. Not a test itself.

Usage: python bare_install.py RESULTS.json MODULE,MODULE... < lines of JSON, each the words of one command.
"""

import contextlib
import io
import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path


class Finder:
    """Finds what is installed, but for some modules."""

    def __init__(self, hidden: list[str]) -> None:
        self.hidden = hidden

    find_distributions = staticmethod(PathFinder.find_distributions)

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.hidden:
            return None
        return PathFinder.find_spec(fullname, path, target)


def main() -> None:
    finder = Finder(sys.argv[2].split(","))
    sys.meta_path[:] = [finder if known is PathFinder else known for known in sys.meta_path]
    from msae.cli import main as msae

    found = []
    for line in sys.stdin:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                msae(json.loads(line))
            except SystemExit as leave:
                code = leave.code
        found.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
