"""`Run`: a run folder opened: its SAE and settings, where its files lie, and whether each still holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, Union

from msae.base.errors import RunError, StoreError
from msae.base.files import cache_folders, read_json, writable_cache
from msae.base.notices import notice
from msae.data.arrays import is_sampled_fingerprint
from msae.data.layout import MODALITIES, Modality
from msae.data.store import EmbeddingStore, has_unit_rows, recorded_store
from msae.sae.model import CONFIG_FILE, SAE, check_fit, download, folder_of, looks_like_hub_id, weights_hash

SETTINGS_SCHEMA_VERSION = 1
"""Of config.json, which training writes."""

RunLike: TypeAlias = Union["Run", SAE, str, Path]


class NoTrainingStoreError(Exception):
    """Says why a run's training store is not to be had."""


@dataclass(frozen=True)
class Origin:
    """What a record was derived from. It holds as long as all of this is unchanged: see `Run.holds`."""

    store: str
    """Where the store lay."""
    fingerprint: str
    """Of the store's rows."""
    metadata: str
    """A hash of the store's ids, captions, labels and other columns."""
    sae: str
    """A hash of the SAE's weights and settings."""


class Run:
    """A run folder opened; an SAE that was given itself is a run without a folder.

    Only this class knows which files a folder has. Each record is parsed by the module that owns its format.
    """

    def __init__(self, folder: Path | None, *, sae: SAE | None = None, given: str | None = None) -> None:
        self.folder = folder
        self.given = given
        """The path or hub id as it was given; None for an SAE."""
        if sae is not None:
            self.sae = sae

    @classmethod
    def open(cls, run: RunLike) -> Run:
        """The run in a folder, of an SAE file, or of a hub repository `owner/name`; a `Run` stays itself.

        The files are read when they are first asked for.

        Raises:
            RunError: There is neither a folder nor a reachable repository.
        """
        if isinstance(run, Run):
            return run
        if isinstance(run, SAE):
            return cls(None, sae=run)
        path = Path(run)
        if not path.exists() and looks_like_hub_id(str(run)):
            path = download(str(run))  # with names, where the repository has them
            if not (path / CONFIG_FILE).exists():
                return cls(None, sae=SAE.from_pretrained(str(run)), given=str(run))
        if path.exists():
            return cls(folder_of(path), given=str(run))
        return cls(None, sae=SAE.load(run), given=str(run))

    def __repr__(self) -> str:
        return f"Run({self.name})"

    @cached_property
    def sae(self) -> SAE:
        """The SAE, loaded once; raises `RunError` where it is missing or damaged."""
        assert self.folder is not None
        return SAE.load(self.folder)

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.given or f"the {self.sae.config.kind} SAE"

    @cached_property
    def weights(self) -> str:
        """A hash of all that activations depend on."""
        return weights_hash(self.sae)

    # --- The files of the folder

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What config.json says of the training; empty for an SAE that was imported or given.

        Raises:
            RunError: It is damaged.
        """
        file = self._file("config.json")
        if file is None or not file.exists():
            return {}
        found = read_json(file, schema_version=SETTINGS_SCHEMA_VERSION, error=RunError)
        return {} if found.get("imported") else found

    @property
    def modality(self) -> Modality | None:
        """What it was trained on, where that is one modality and known."""
        found = self.settings.get("modality")
        return found if found in MODALITIES else None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, a step of training each; none where it was not trained here.

        Raises:
            RunError: It is damaged.
        """
        file = self._file("metrics.jsonl")
        if file is None or not file.exists():
            return []
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
            raise RunError(f"{file} is damaged ({err}); delete it to go without the training curves") from err
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise RunError(
                f"{file} has a line that is no step of training; delete it to go without the training curves"
            )
        return rows

    @property
    def names_file(self) -> Path | None:
        """Where `msae name` leaves names; it need not exist. None without a folder."""
        return self._file("names.json")

    def names_file_on(self, fingerprint: str) -> Path | None:
        """Where the names lie that were tested on the rows of that fingerprint; it need not exist."""
        return self._file(f"names/{fingerprint[:24]}.json")

    @property
    def report_file(self) -> Path | None:
        """Where `msae report` writes without --out."""
        return self._file("report.html")

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of an interrupted training, the earliest first."""
        return [] if self.folder is None else sorted((self.folder / "checkpoints").glob("step-*"))

    def cached_files(self, kind: str) -> list[Path]:
        """The JSON files of one kind of derived files, `samples` or `eval`, in the order of their names.

        They lie in the run folder or, where that could not be written, in the user's cache folder.
        """
        return [file for folder in self.caches(kind) for file in sorted(folder.glob("[!.]*.json"))]

    def caches(self, kind: str) -> tuple[Path, ...]:
        """The folders in which derived files of one kind may lie; none without a run folder."""
        return () if self.folder is None else cache_folders(self.folder / kind)

    def writable_cache(self, kind: str) -> Path | None:
        """Where derived files of one kind can be written now; None without a run folder."""
        return None if self.folder is None else writable_cache(self.folder / kind)

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    # --- What belongs together

    def check_fit(self, store: EmbeddingStore) -> None:
        """Refuse embeddings that the SAE was not made for, say it where their norms differ; raises `StoreError`."""
        check_fit(self.sae, store, run=self.given)
        if self.sae.config.unnormalised and has_unit_rows(store):
            notice(
                f"{store.address} holds embeddings of norm 1, but {self.name} was trained on unscaled ones: what it "
                "finds in them means little; give a store of embeddings as the encoder makes them"
            )

    def origin(self, store: EmbeddingStore) -> Origin:
        """What anything is derived from that is made of these weights and that store as they are now."""
        return Origin(store.address, store.fingerprint, store.metadata_fingerprint, self.weights)

    def holds(self, origin: Origin, store: EmbeddingStore | None = None, *, metadata: bool = True) -> bool:
        """Whether what was derived from `origin` is still true of these weights, and of the rows it was made of.

        Args:
            store: The store that it must have been made of; without it, the store that lies where it lay. One that
                is no longer there has not changed: then only the weights are compared.
            metadata: Whether it depends on ids, captions or labels.
        """
        if origin.sae != self.weights:
            return False
        if store is None:
            try:
                store = recorded_store(origin.store)
                found = (store.fingerprint, store.metadata_fingerprint)
            except StoreError:
                return not Path(origin.store).exists()
        else:
            found = (store.fingerprint, store.metadata_fingerprint)
        wanted = (origin.fingerprint, origin.metadata)
        return found == wanted if metadata else found[0] == wanted[0]

    def training_store(self, modality: Modality | None = None) -> EmbeddingStore:
        """The store that it was trained on; of several, the first that has `modality`, else the first.

        Raises:
            NoTrainingStoreError: It is not known, not there, or no longer the same.
        """
        stores = self.training_stores()
        return next((store for store in stores if modality in store.modalities), stores[0])

    def training_stores(self) -> list[EmbeddingStore]:
        """All stores that it was trained on; raises as `training_store` does."""
        known = self.settings.get("stores") or [self.settings]
        return [self._as_it_was(one.get("store"), one.get("store_fingerprint")) for one in known]

    def _as_it_was(self, path: str | None, promised: str | None) -> EmbeddingStore:
        """A store that it was trained on; raises as `training_store` does."""
        if path is None:
            raise NoTrainingStoreError(f"{self.name} does not say what it was trained on")
        try:
            modality = self.settings.get("modality")
            store = recorded_store(path, None if modality == "both" else modality)
            found = store.fingerprint
        except StoreError as err:
            raise NoTrainingStoreError(f"the training store cannot be opened ({err})") from err
        if is_sampled_fingerprint(str(promised)):
            raise NoTrainingStoreError(
                f"{self.name} was trained by an earlier msae, which did not record all rows of {path}"
            )
        if found != promised:
            raise NoTrainingStoreError(f"{path} is no longer what {self.name} was trained on")
        return store
