"""`push`: a run as a repository of the Hugging Face hub, with a model card, for msae and for SAELens."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from msae.base.errors import ConfigError, RunError, first_line, require
from msae.base.files import MADE_BY, write_json
from msae.base.results import Result
from msae.sae.formats import write_folder
from msae.sae.model import looks_like_hub_id
from msae.sae.run import SETTINGS_SCHEMA_VERSION, Run, RunLike
from msae.web.report.card import FILE as CARD
from msae.web.report.card import card, is_ours
from msae.web.report.facts import facts_of

Extra = Literal["names", "report"]
_PART = r"""[^\s\\/<>"'&]+"""
PATH = re.compile(
    rf"""(?<=[\s>"'=;(])(?:(?:s3|gs|hf|memory)://|(?:[A-Za-z]:|~|\.{{1,2}})[\\/]|[\\/]{{1,2}}{_PART}[\\/])(?:{_PART}[\\/])*({_PART})?"""
)
"""A path in a page that is absolute, of a bucket, or begins with a dot, a tilde or a drive; and its last part."""
PLACES = ("store", "on", "vocabulary", "words", "run")
"""Keys of records whose text is a path."""


@dataclass(frozen=True, repr=False)
class Pushed(Result):
    """What was sent to the hub, or would be."""

    run: str
    repo: str
    private: bool
    sent: bool
    files: tuple[tuple[str, int], ...]
    """Paths in the repository, and bytes."""
    url: str | None
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        total = sum(size for _, size in self.files)
        kind = "private" if self.private else "public"
        what = f"sent to the {kind} repository" if self.sent else f"for a {kind} repository; nothing was sent"
        lines = [f"{self.repo}: {len(self.files)} files, {total:,} bytes, {what}"]
        lines += [f"  {size:>12,}  {name}" for name, size in self.files]
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(f'read it by: msae.SAE.from_pretrained("{self.repo}")')
        return "\n".join([*lines, *([self.url] if self.url else [])])

    def records(self) -> list[dict[str, Any]]:
        return [{"file": name, "bytes": size} for name, size in self.files]

    def to_json(self) -> dict[str, Any]:
        names = ("run", "repo", "private", "sent", "url")
        return {**{name: getattr(self, name) for name in names}, "files": self.records(), "notes": list(self.notes)}


def push(
    run: RunLike,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    include: Sequence[Extra] = (),
) -> Pushed:
    """A run as a repository of the Hugging Face hub: weights, thresholds, a model card, and a folder for SAELens.

    The repository is made where there is none. Of paths on this machine only the last part is sent.

    Args:
        run: A run folder.
        repo: The repository, as OWNER/NAME.
        private: Make a private repository; one that is there already stays as it is.
        dry_run: Print what would be sent, and send nothing.
        license: What others may do with the weights, as the hub writes it: mit, cc-by-4.0 and so on.
        include: What else to send: names, report.

    Raises:
        ConfigError: `repo` is no name of a repository, or something to include is missing.
        RunError: There is no run, the hub cannot be reached, or it refuses.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII):
        raise ConfigError(f"{repo} is no name of a repository; give OWNER/NAME, in letters, digits and -_.")
    if not dry_run:
        require("huggingface_hub")
    opened = Run.open(run)
    if opened.folder is None:
        raise ConfigError(f"{opened.name} has no folder; save the SAE into one, or give a run folder")
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name)
        notes = _fill(stage, opened, repo, license, include)
        paths = sorted(file for file in stage.rglob("*") if file.is_file())
        files = tuple((file.relative_to(stage).as_posix(), file.stat().st_size) for file in paths)
        url = None if dry_run else _send(stage, repo, [name for name, _ in files], private)
    return Pushed(opened.name, repo, private, not dry_run, files, url, tuple(notes))


def _fill(stage: Path, run: Run, repo: str, license: str | None, include: Sequence[Extra]) -> list[str]:
    """Put what belongs into the repository into `stage`; gives what is worth knowing."""
    assert run.folder is not None
    sae, notes = copy.copy(run.sae), []
    sae.config = replace(sae.config, encoder=_without_paths(sae.config.encoder))
    sae.save(stage)
    settings = run.settings or {"imported": True, "d_in": sae.d_in, "d_sae": sae.d_sae}
    known = {key: value for key, value in settings.items() if key not in ("schema_version", "made_by")}
    # The hub counts a download by a request for this file.
    write_json(stage / "config.json", _without_paths(known), schema_version=SETTINGS_SCHEMA_VERSION)
    own = run.folder / CARD
    if own.exists() and not is_ours(own):
        shutil.copy(own, stage / CARD)
        notes.append(f"{CARD} is the one that was edited in {run.folder}")
    else:
        (stage / CARD).write_text(
            card(replace(facts_of(run.folder), sae=sae), place=repo, license=license), encoding="utf-8"
        )
        if license is None:
            notes.append("the card names no license, so nobody may use the weights; give for example --license mit")
    if sae.config.soft_cap is None:
        for modality in sae.standardizer.modalities:
            folder = stage / f"saelens-{modality}"
            folder.mkdir()
            write_folder(sae, "saelens", folder, modality)
    else:
        notes.append("there is no folder for SAELens: it has no soft cap")
    for extra in dict.fromkeys(include):
        file = {"names": run.names_file, "report": run.report_file}.get(extra)
        if file is None:
            raise ConfigError(f"there is nothing called {extra!r} to include; give names or report")
        if not file.exists():
            raise ConfigError(f"{file} does not exist; type msae {extra.removesuffix('s')} {run.folder} first")
        if file.suffix == ".json":
            data = _json(file)
            (stage / file.name).write_text(json.dumps(_without_paths(data), ensure_ascii=False), encoding="utf-8")
        else:
            page = file.read_text(encoding="utf-8")
            records = [*run.folder.glob("*.json"), *run.folder.glob("eval/*.json")]
            paths = {path for one in records for path in _paths_in(_json(one))}
            for path in sorted({*paths, run.name} - {last_part(run.name)}, key=len, reverse=True):
                page = page.replace(html.escape(path), html.escape(last_part(path)))
            (stage / file.name).write_text(re.sub(PATH, r"\1", page), encoding="utf-8")
    return notes


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise RunError(f"{file} is no JSON, so its paths cannot be left out; repair it or move it away") from err


def _without_paths(value: Any, key: str = "") -> Any:
    """JSON in which paths are only their last part: others have no use for them, and they tell of a person."""
    if isinstance(value, dict):
        return {name: _without_paths(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_paths(one, key) for one in value]
    return last_part(value) if isinstance(value, str) and _is_path(value, key) else value


def _is_path(text: str, key: str) -> bool:
    if key == "encoder":
        return Path(text).exists() or not looks_like_hub_id(text)
    # Paths of Windows are paths here too: a run may have been made there.
    return key in PLACES or bool(re.match(r"[\\/]|[A-Za-z]:[\\/]|~[\\/]|\.{1,2}[\\/]", text))


def last_part(path: str) -> str:
    """Of a path of any system."""
    return PureWindowsPath(path).name


def _paths_in(value: Any, key: str = "") -> set[str]:
    """The paths in JSON that have more than a last part."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else ((key, one) for one in value)
        return set().union(*(_paths_in(one, name) for name, one in pairs))
    is_path = isinstance(value, str) and _is_path(value, key) and last_part(value) not in ("", value)
    return {value} if is_path else set()


def _send(stage: Path, repo: str, files: Sequence[str], private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(library_name=MADE_BY)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(name, stage / name) for name in files]
        return str(api.create_commit(repo, operations, commit_message="Upload by msae push").commit_url)
    except OfflineModeIsEnabled as err:
        raise RunError("HF_HUB_OFFLINE is set, so nothing is sent; unset it to push") from err
    except (HfHubHTTPError, LocalTokenNotFoundError) as err:
        status = getattr(getattr(err, "response", None), "status_code", None)
        if status in (401, 403, 404) or status is None:
            raise RunError(
                f"the hub does not let you write {repo} ({status or first_line(err)}); type hf auth login with a token "
                "that may write, or give a repository of your own"
            ) from err
        raise RunError(f"the hub refused {repo} ({first_line(err)}); try again later") from err
    except Exception as err:
        # The client of huggingface_hub is one of several HTTP libraries, each with its own error of connection.
        if "connect" in f"{type(err).__name__}{err}".lower() or isinstance(err, OSError):
            raise RunError(f"the hub cannot be reached ({first_line(err)}); connect, then type it again") from err
        raise
