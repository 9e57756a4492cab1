"""The words that latents are compared with: those that come with msae, or one's own list, embedded once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from msae.base.errors import ConfigError, EmbedderError, MissingDependencyError, RunError, StoreError
from msae.base.files import atomic_folder, is_writable, user_cache
from msae.base.progress import progress
from msae.data.arrays import unit_rows
from msae.data.embedder import Embedder, embedder_for
from msae.data.store import EmbeddingStore, StorePart, write_store
from msae.data.tables import TABLE_SUFFIXES, read_table, values_of
from msae.sae.run import Run

WORD_COLUMNS = ("word", "text", "name", "caption")
PROMPTS = ("{}", "a photo of {}", "a picture of a {}", "an image showing {}")
"""A word is the mean of its prompts. They suit nouns, adjectives and actions alike."""
SHIPPED = "the words that come with msae"
BATCH = 256


def shipped_words() -> list[str]:
    """The words that come with msae; concepts/words.txt says where they are from."""
    lines = files("msae.concepts").joinpath("words.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def words_in(file: str | Path) -> list[str]:
    """The words of a text file, one a line, or of a table's column `word`, `text`, `name` or `caption`.

    Raises:
        ConfigError: It cannot be read, or holds fewer than two different words.
    """
    file = Path(file)
    if file.suffix.lower() in TABLE_SUFFIXES:
        table = read_table(file, ConfigError)
        column = next((name for name in WORD_COLUMNS if name in table.column_names), None)
        if column is None:
            raise ConfigError(
                f"{file} has no column {', '.join(WORD_COLUMNS)} (it has {', '.join(table.column_names)}); "
                f"call its column of words word"
            )
        lines = [str(value) for value in values_of(table.column(column)) if value is not None]
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"{file} cannot be read as a list of words, one a line ({err})") from err
    words: dict[str, str] = {}
    for word in (" ".join(line.split()) for line in lines):
        if word:
            words.setdefault(word.casefold(), word)
    if len(words) < 2:
        raise ConfigError(f"{file} holds {len(words)} words; a name needs at least two to choose from")
    return list(words.values())


def embedded_words(
    run: Run, file: str | Path | None = None, *, encoder: str | Path | None = None, device: str = "auto"
) -> EmbeddingStore:
    """The words of a file, or those that come with msae, embedded by the encoder of the run's SAE.

    They are kept in the user's cache folder, for all runs of the encoder, or in the run folder where that cannot be
    written; other words or another encoder make others.

    Raises:
        ConfigError: The file has no words, or nothing says which encoder it was.
        EmbedderError: The encoder cannot be loaded, or knows none of the words.
        StoreError: The encoder is another than that of the SAE.
        RunError: The words can be kept nowhere.
    """
    words = shipped_words() if file is None else words_in(file)
    folders = [user_cache() / "words", *run.caches("words")[:1]]
    if encoder is None and (revision := run.sae.config.encoder_revision):
        for folder in folders:
            if (folder / _name(words, revision) / "store.json").exists():
                return EmbeddingStore.open(folder / _name(words, revision))
    try:
        embedder = embedder_for(
            None, run.sae.config, need="a list of words", option="--encoder", encoder=encoder, device=device
        )
    except (ConfigError, EmbedderError, MissingDependencyError) as err:
        raise type(err)(f"{err}; or give words that are embedded already with --vocabulary STORE") from err
    if embedder.d_in != run.sae.d_in:
        raise StoreError(
            f"{embedder.id} makes embeddings of {embedder.d_in} numbers, but {run.name} reads {run.sae.d_in}; "
            f"give the encoder of its embeddings with --encoder"
        )
    place = next((folder for folder in folders if is_writable(folder)), None)
    if place is None:
        raise RunError(
            f"the embedded words can be kept in none of {', '.join(map(str, folders))}; "
            f"set XDG_CACHE_HOME to a folder that can be written"
        )
    store = place / _name(words, str(embedder.revision))
    if not (store / "store.json").exists():
        _write(store, words, embedder, SHIPPED if file is None else str(file))
    return EmbeddingStore.open(store)


def _name(words: Sequence[str], revision: str) -> str:
    made_of = "\n".join([revision, *PROMPTS, *words])
    return f"{hashlib.blake2b(made_of.encode(), digest_size=12).hexdigest()}.store"


def _write(path: Path, words: Sequence[str], embedder: Embedder, origin: str) -> None:
    import pyarrow as pa

    known = [word for word, is_known in zip(words, embedder.is_known(words), strict=True) if is_known]
    if len(known) < 2:
        raise EmbedderError(f"{embedder.id} knows {len(known)} of {len(words)} words; give others with --words FILE")
    rows = np.concatenate(list(_embedded(known, embedder))).astype(np.float16)
    record = {
        "encoder": embedder.id,
        "encoder_revision": embedder.revision,
        "precision": embedder.dtype,
        "words": origin,
        "prompts": list(PROMPTS),
        "n_unknown_words": len(words) - len(known),
    }
    table = pa.table({"id": [str(i) for i in range(len(known))], "word": known})
    try:
        with atomic_folder(path) as temporary:
            write_store(temporary, [StorePart({"text": rows}, table)], record=record)
    except OSError as err:
        if not (path / "store.json").exists():  # else another process was faster
            raise RunError(f"the embedded words cannot be kept in {path.parent} ({err.strerror})") from err


def _embedded(words: Sequence[str], embedder: Embedder) -> Iterator[np.ndarray]:
    """The mean of the prompts of each word, as unit rows."""
    # A prompt of words that the encoder does not know says nothing and hides the word.
    prompts = [prompt for prompt in PROMPTS if embedder.is_known([prompt.format("")])[0]]
    with progress("embedding words, once for this encoder", total=len(words), unit="words") as advance:
        for first in range(0, len(words), BATCH):
            block = words[first : first + BATCH]
            embedded = [embedder.embed_texts([prompt.format(word) for word in block]) for prompt in prompts]
            yield unit_rows(np.mean(embedded, axis=0))
            advance(len(block))
