"""The verbs: for each a function that tyro reads, made when its verb is asked for, so that others load nothing."""

# No `from __future__ import annotations` here: tyro reads the real types of functions made inside functions.
import functools
import itertools
import json as json_format
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from msae.cli.output import report, say

Modality = Literal["image", "text"]


def _demo(_: list[str]) -> Callable[..., None]:
    from msae.demo.chain import demo

    def run(out: Path = Path("msae-demo"), seed: int = 0, json: str | None = None) -> None:
        """The whole chain on the embedded default, offline: scenes, embeddings, SAEs, the poster's table.

        Args:
            out: Folder for everything it makes; a finished step in it is not done again.
            seed: Of the scenes and of the training.
            json: Write the result as JSON to this file; - is stdout.
        """
        tell = say if json == "-" else functools.partial(print, flush=True)
        result = demo(out, seed=seed, say=tell)
        report(result.closing, result.to_dict(), json)

    return run


def _embed(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.embedding import embed

    def run(
        source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
        /,
        *,
        encoder: str,
        out: Path,
        batch_size: int = 64,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        revision: str | None = None,
        json: str | None = None,
    ) -> None:
        """Embed images or captions into a store; the same command goes on after an interruption.

        Args:
            source: A folder of images, a .txt/.csv/.jsonl/.parquet of captions or image paths, webdataset tars,
                or hf://DATASET.
            encoder: A CLIP, SigLIP or SigLIP 2 model: a folder, a hub id, or demo for the one in the package.
            out: The store to make.
            batch_size: Images or captions per forward pass.
            device: auto, cpu, cuda, cuda:1 …
            dtype: Arithmetic of the encoder.
            revision: Of a hub model.
            json: Write the result as JSON to this file; - is stdout.
        """
        store = embed(
            source, encoder=encoder, out=out, batch_size=batch_size, device=device, dtype=dtype, revision=revision
        )
        skipped = f", {len(store.skipped)} inputs skipped (listed in store.json)" if store.skipped else ""
        text = f"{out}: {len(store):,} rows x {store.d_in} of {' and '.join(store.modalities)}{skipped}"
        report(text, store.describe(), json)

    return run


def _train(arguments: list[str]) -> Callable[..., None]:
    import tyro

    from msae.config import from_mapping, read_toml, to_mapping
    from msae.training import TrainSettings, train

    # The file's values become the defaults, so that an option given on the command line wins over it.
    file = next((b for a, b in itertools.pairwise(arguments) if a == "--config"), None)
    file = file or next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), None)
    defaults = from_mapping(TrainSettings, read_toml(Path(file)), where=file) if file else TrainSettings()

    def run(
        store: Annotated[str, tyro.conf.arg(metavar="STORE")],
        /,
        *,
        out: Path,
        settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = defaults,
        config: Path | None = None,  # noqa: ARG001  # read above, for the defaults
        resume: bool = False,
        json: str | None = None,
    ) -> None:
        """Train a sparse autoencoder on a store and write it into a run folder.

        Args:
            store: A store, clip-retrieval folder, .npy, .parquet or .safetensors of embeddings.
            out: The run folder to make.
            settings: What to train and how.
            config: A TOML file of these settings; options given here win over it.
            resume: Go on with an interrupted run, or start one where there is none.
            json: Write the result as JSON to this file; - is stdout.
        """
        sae = train(store, out=out, resume=resume, settings=settings)
        last = json_format.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        text = (
            f"{out}: {sae.config.kind} SAE {sae.d_in} -> {sae.d_sae}, {last['step']:,} steps; on its last batch "
            f"FVU {last['fvu']:.3f} at sparsity {last['sparsity']:.3f}\nnext: msae evaluate {out} --on STORE"
        )
        report(text, {"run": str(out), "settings": to_mapping(settings), "last": last}, json)

    return run


def _evaluate(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.evaluation import evaluate, poster_table

    def run(
        runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN...")],
        /,
        *,
        on: str,
        modality: Modality = "image",
        inference: Literal["relu", "trained", "topk"] = "relu",
        k: int | None = None,
        labels: str | None = None,
        probe_train: str | None = None,
        recovery: bool = False,
        latex: bool = False,
        seed: int = 0,
        device: str = "auto",
        json: str | None = None,
    ) -> None:
        """Evaluate runs on a store with the poster's metrics; several runs print the poster's table.

        Args:
            runs: Run folders, or hub repositories with an SAE.
            on: The store to evaluate on.
            modality: Which embeddings of the store.
            inference: relu is the poster's; trained is the activation of training; topk keeps the --k largest.
            k: Latents kept by --inference topk.
            labels: A metadata column of the store: adds a linear probe and its agreement, KL and accuracies.
            probe_train: The store on whose original embeddings the probe is trained.
            recovery: Also FVU, cosine, CKNNA and dead latents of the k strongest latents for k = 1, 2, 4, …
            latex: Print the table in LaTeX.
            seed: Of the batches that CKNNA is averaged over.
            device: auto, cpu, cuda …
            json: Write the records as JSON to this file; - is stdout.
        """
        results = evaluate(
            list(runs), on, modality=modality, inference=inference, k=k, labels=labels, probe_train=probe_train,
            recovery=recovery, seed=seed, device=device,
        )  # fmt: skip
        report(poster_table(results, style="latex" if latex else "markdown"), [r.to_dict() for r in results], json)

    return run


def _name(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.concepts import names_table
    from msae.naming import NameSettings, name

    def run(
        sae: str,
        /,
        *,
        vocabulary: str,
        on: str | None = None,
        out: Path | None = None,
        settings: Annotated[NameSettings, tyro.conf.arg(name="")] = NameSettings(),  # noqa: B008
        json: str | None = None,
    ) -> None:
        """Name the latents of a run by the words nearest to their decoder rows, where the evidence allows it.

        Args:
            sae: A run folder, or a hub repository with an SAE.
            vocabulary: A store of words, embedded as text by the encoder of the SAE.
            on: A store with captions or labels: names must then also agree with them.
            out: The file to write; without it, names.json in the run folder.
            settings: The rule and its choices.
            json: Write the result as JSON to this file; - is stdout.
        """
        names = name(sae, vocabulary, on=on, out=out, settings=settings)
        report(names_table(names), names.to_dict(), json)

    return run


def _gallery(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae import galleries

    def run(
        run: Annotated[str, tyro.conf.arg(metavar="RUN")],
        /,
        *,
        on: str,
        latent: int | None = None,
        concept: str | None = None,
        n: int = 16,
        inference: Literal["relu", "trained"] = "trained",
        sheet: Path | None = None,
        tree: bool = False,
        k: int | None = None,
        magnitudes: bool = False,
        json: str | None = None,
    ) -> None:
        """The images and texts that activate a latent most; or how all latents nest; or how large activations are.

        Args:
            run: A run folder, or a hub repository with an SAE.
            on: The store whose samples to show.
            latent: Which latent; or
            concept: the name of one, as msae name gave it.
            n: Samples of each modality.
            inference: trained is the activation of training; relu keeps every positive latent.
            sheet: Also make a contact sheet of the latent, a .png or an .html that opens offline.
            tree: Print which latents are parts of which others.
            k: For --tree, count a latent as firing where it is among the k strongest of its row; the default is the
                smallest level of a matryoshka SAE, and all that are not zero for other kinds.
            magnitudes: Print how large the non-zero activations are, and the largest of each row.
            json: Write the result as JSON to this file; - is stdout.
        """
        if tree:
            found = galleries.concept_tree(run, on, k=k, inference=inference)
            report(found.to_text(), found.to_dict(), json)
        elif magnitudes:
            sizes = galleries.all_magnitudes(run, on, inference=inference)
            report(sizes.to_text(), sizes.to_dict(), json)
        else:
            shown = galleries.gallery(run, on, latent=latent, concept=concept, n=n, inference=inference)
            if sheet is not None:
                from msae.reporting.sheet import write_sheet

                write_sheet(shown, sheet)
            report(shown.to_text(), shown.to_dict(), json)

    return run


def _stability(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.alignment import stability

    def run(
        runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN...")],
        /,
        *,
        threshold: float = 0.7,
        json: str | None = None,
    ) -> None:
        """Match the latents of runs from several seeds, and list the concepts that come back in all of them.

        Args:
            runs: At least two run folders of one size.
            threshold: Cosine, at least, between any two latents of a concept that comes back.
            json: Write the result as JSON to this file; - is stdout.
        """
        result = stability(runs, threshold=threshold)
        report(result.to_text(), result.to_dict(), json)

    return run


def _audit(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.auditing import audit, parse_class_texts

    def run(
        sae: Annotated[str, tyro.conf.arg(metavar="RUN")],
        /,
        *,
        on: str,
        target: str | None = None,
        concept: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
        classifier: str | None = None,
        class_texts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS=TEXT")] = (),
        train_store: str | None = None,
        positive: str | None = None,
        names: str | None = None,
        all_latents: bool = False,
        modality: Modality = "image",
        inference: Literal["relu", "trained", "topk"] = "trained",
        permutations: int | None = None,
        sweep_id: str | None = None,
        seed: int = 0,
        html: Path | None = None,
        json: str | None = None,
    ) -> None:
        """Which concepts a linear classifier relies on, by association and by intervention.

        Args:
            sae: A run folder, or a hub repository with an SAE.
            on: The store whose rows are audited.
            target: A metadata column of true classes.
            concept: A name, or a latent as '#123'; may be given several times. Without it, every named concept.
            classifier: A .npz or .safetensors file of coefficients.
            class_texts: A text for each class, for CLIP's zero-shot classifier.
            train_store: Where a classifier is trained; without it, on half of the rows of --on.
            positive: The class whose probability is watched; without it the second of two, or all of more.
            names: A names.json; without it, the run's.
            all_latents: Audit every latent, named or not.
            modality: Which embeddings of the store.
            inference: The activation of the SAE.
            permutations: At most so many shuffles for a p-value; without it 40 per concept, at least 2,000.
            sweep_id: The row whose concepts are swept from 0 to twice their p99.
            seed: Of everything that is drawn.
            html: Write a page with plots to this file.
            json: Write the result as JSON to this file; - is stdout.
        """
        found = audit(
            sae, on, target, concept=concept, classifier=classifier, class_texts=parse_class_texts(class_texts),
            train_store=train_store, positive=positive, names=names, all_latents=all_latents, modality=modality,
            inference=inference, n_permutations=permutations, sweep_id=sweep_id, seed=seed,
        )  # fmt: skip
        if html is not None:
            from msae.reporting.audit import write_html

            write_html(found, html)
        report(found.table(), found.to_dict(), json)

    return run


def _search(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.reporting.search import write_page
    from msae.retrieval import search

    def run(
        run: str,
        /,
        *,
        on: str,
        like: str | None = None,
        image: Path | None = None,
        text: str | None = None,
        embedding: Path | None = None,
        set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="CONCEPT=VALUE")] = (),
        n: int = 20,
        no_residual: bool = False,
        exclusive: bool = False,
        strict: bool = False,
        where: str | None = None,
        space: Literal["embedding", "latent"] = "embedding",
        modality: Modality | None = None,
        query_modality: Modality | None = None,
        encoder: str | None = None,
        html: Path | None = None,
        json: str | None = None,
    ) -> None:
        """The rows of a store nearest to a query, before and after concepts of the query are turned up or down.

        Args:
            run: A run folder, or a hub repository with an SAE.
            on: The store to search.
            like: Search for the row with this id; or
            image: for the picture in this file; or
            text: for these words; or
            embedding: for the vector in this .npy file.
            set: A name, #123 or several divided by |, and a strength: 8 (0 removes it), x2, +3, -1, p99 or 2xp99.
            n: Rows to find.
            no_residual: Drop what the SAE does not reconstruct of the query.
            exclusive: Also set to 0 the concepts of the same kind as one that is raised.
            strict: Turn the latents that bear a name alone, without what moves with them.
            where: Only rows whose metadata fit, such as "split == 'test' and size in (1, 2)".
            space: embedding is by cosine, latent by the L1 distance of activations.
            modality: What is searched; images where the store has them.
            query_modality: Of the row or vector that is searched for; as what is searched.
            encoder: The model for --image and --text; that which made the store.
            html: Also make a page of what was found before and after the edits; it opens offline.
            json: Write the result as JSON to this file; - is stdout.
        """
        result = search(
            run, on, like=like, image=image, text=text, embedding=embedding, set=set, n=n, modality=modality,
            query_modality=query_modality, where=where, space=space, keep_residual=not no_residual,
            exclusive=exclusive, strict=strict, encoder=encoder,
        )  # fmt: skip
        if html is not None:
            write_page(result, html)
        report(result.table(), result.to_dict(), json)

    return run


def _info(_: list[str]) -> Callable[..., None]:
    import tyro

    def run(path: Annotated[str, tyro.conf.arg(metavar="PATH")], /, *, json: str | None = None) -> None:
        """What a store or a run holds.

        Args:
            path: A store or a run folder.
            json: Write the result as JSON to this file; - is stdout.
        """
        data = _describe(Path(path))
        width = max(map(len, data))
        report("\n".join(f"{key:<{width}}  {value}" for key, value in data.items()), data, json)

    return run


def _describe(path: Path) -> dict[str, Any]:
    if (path / "sae.json").exists() or (path / "config.json").exists():
        from msae.training import describe_run

        return describe_run(path)
    from msae.store import EmbeddingStore

    return EmbeddingStore.open(path).describe()


VERBS: dict[str, Callable[[list[str]], Callable[..., None]]] = {
    "demo": _demo,
    "embed": _embed,
    "train": _train,
    "evaluate": _evaluate,
    "name": _name,
    "gallery": _gallery,
    "stability": _stability,
    "audit": _audit,
    "search": _search,
    "info": _info,
}
