"""The verbs that look at what was made. Each is a function that tyro reads."""

# No `from __future__ import annotations` here: tyro reads the real types of functions made inside functions.
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from msae.base.errors import ConfigError
from msae.cli.output import check_target, report

Modality = Literal["image", "text"]


def gallery_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.concepts import gallery as galleries

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
        pairs: Path | None = None,
        magnitudes: bool = False,
        json: str | None = None,
    ) -> None:
        """The images and texts that activate a latent most; or how all latents nest; or how large activations are.

        Args:
            run: A run folder, or a hub repository with an SAE.
            on: The store whose samples to show.
            latent: Which latent; or
            concept: the name of one, #12, or several of these divided by |; the nearest to its name is shown.
            n: Samples of each modality.
            inference: trained is the activation of training; relu keeps every positive latent.
            sheet: Also make a contact sheet of the latent, a .png or an .html that opens offline.
            tree: Print which latents are parts of which others.
            k: For --tree, count a latent as firing where it is among the k strongest of its row; the default is the
                smallest level of a matryoshka SAE, and all that are not zero for other kinds.
            pairs: For --tree, a table with the columns child and parent, a word and a broader one, to score it against.
            magnitudes: Print how large the non-zero activations are, and the largest of each row.
            json: Write the result as JSON to this file; - is stdout.
        """
        if pairs is not None and not tree:
            raise ConfigError(f"--pairs {pairs} is what a tree is scored against; add --tree")
        if tree:
            found = galleries.concept_tree(run, on, k=k, inference=inference, pairs=pairs)
            report(found.to_text(), found.to_json(), json)
        elif magnitudes:
            sizes = galleries.all_magnitudes(run, on, inference=inference)
            report(sizes.to_text(), sizes.to_json(), json)
        else:
            shown = galleries.gallery(run, on, latent=latent, concept=concept, n=n, inference=inference)
            if sheet is not None:
                from msae.web.report.sheet import write_sheet

                write_sheet(shown, sheet)
            report(shown.to_text(), shown.to_json(), json)

    return run


def stability_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.concepts.stability import stability

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
        report(result.to_text(), result.to_json(), json)

    return run


def audit_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.use.audit import audit, parse_class_texts

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
            concept: A name, #123 or several divided by |; may be given several times. Without it, every named concept.
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
            from msae.web.report.audit import write_html

            write_html(found, html)
        report(found.to_text(), found.to_json(), json)

    return run


def search_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.use.search import search

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
            strict: Edit only the named latents; leave correlated latents unchanged.
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
            from msae.web.report.search import write_page

            write_page(result, html)
        report(result.to_text(), result.to_json(), json)

    return run


def report_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.web.report import report as make_report

    def run(
        run: Annotated[str, tyro.conf.arg(metavar="RUN")],
        /,
        *,
        on: str | None = None,
        out: Path | None = None,
        beside: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN...")] = (),
        audit: Path | None = None,
        json: str | None = None,
    ) -> None:
        """Everything that is known about a run in one HTML file that opens offline, and its model card, README.md.

        Args:
            run: A run folder.
            on: The store for samples, hierarchy and a search; without it, that of an earlier gallery or report.
            out: The file to write; without it, report.html in the run folder.
            beside: Other run folders to set beside this one in tables and curves.
            audit: An audit to include, as msae audit --json wrote it.
            json: Write what was made, and what is missing, as JSON to this file; - is stdout.
        """
        check_target(json)
        made = make_report(run, on, out=out, beside=beside, audit=audit)
        report(made.to_text(), made.to_json(), json)

    return run


def explore_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.cli.output import say

    def run(
        runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN...")],
        /,
        *,
        on: str | None = None,
        port: int = 7860,
        json: str | None = None,
    ) -> None:
        """Runs and a store in a browser: concepts, one concept, search, audit, models. Ctrl-C ends it.

        Nothing leaves this machine: it listens on 127.0.0.1 alone and shows no file but pictures that the store lists.

        Args:
            runs: Run folders.
            on: The store whose pictures, texts and columns are shown; the one that the first run was trained on.
            port: Where on 127.0.0.1; 0 takes any that is free.
            json: Write the address as JSON to this file once it can be opened; - is stdout.
        """
        import sys

        import msae

        def ready(url: str) -> None:
            report(f"open {url} in a browser (Ctrl-C ends it)", {"url": url, "runs": list(runs), "on": on}, json)
            sys.stdout.flush()

        msae.explore(runs, on, port, say=say, ready=ready)

    return run


def info_verb(_: list[str]) -> Callable[..., None]:
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
        from msae.sae.train import describe_run

        return describe_run(path)
    from msae.data.store import EmbeddingStore

    return EmbeddingStore.open(path).describe()
