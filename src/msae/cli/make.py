"""The verbs that make something: embeddings, runs, records, names. Each is a function that tyro reads."""

# No `from __future__ import annotations` here: tyro reads the real types of functions made inside functions.
import functools
import itertools
import json as json_format
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msae.cli.output import check_target, report, say

if TYPE_CHECKING:
    from msae.demo.chain import DemoResult

Modality = Literal["image", "text"]


def demo_verb(_: list[str]) -> Callable[..., None]:
    from msae.demo.chain import demo

    def run(out: Path = Path("msae-demo"), seed: int = 0, json: str | None = None) -> None:
        """The whole chain on the embedded default, offline: scenes, embeddings, SAEs, the poster's table.

        Args:
            out: Folder for everything it makes; a finished step in it is not done again.
            seed: Of the scenes and of the training.
            json: Write the result as JSON to this file; - is stdout.
        """
        tell = say if json == "-" else functools.partial(print, flush=True)
        check_target(json)
        result = demo(out, seed=seed, say=tell)
        tell("writing the report, with an audit of a classifier of hats")
        page = _demo_report(result)
        closing = f"{result.to_text()}\n\nall of it, to look at  {page}"
        report(closing, {**result.to_json(), "report": str(page)}, json)

    return run


def _demo_report(result: "DemoResult") -> Path:
    """The report of the demo's named run, beside the other runs."""
    from msae.use.audit import audit
    from msae.web.report import report as make_report

    run, holdout = result.named_run, result.holdout
    hats = audit(run, holdout, "hat") if len(result.names) else None
    return make_report(run, holdout, beside=result.runs, audit=hats).path


def embed_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.data.embed import embed

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
        n_skipped = store.record["counts"]["skipped"]
        skipped = f", {n_skipped:,} inputs skipped (listed in store.json)" if n_skipped else ""
        text = f"{out}: {len(store):,} rows x {store.d_in} of {' and '.join(store.modalities)}{skipped}"
        text = "\n  ".join([text, *store.record.get("notes", ())])
        report(text, store.describe(), json)

    return run


def train_verb(arguments: list[str]) -> Callable[..., None]:
    import tyro

    from msae.base.config import from_mapping, read_toml, to_mapping
    from msae.sae.train import TrainSettings, train

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
            f"FVU {'unknown' if last['fvu'] is None else format(last['fvu'], '.3f')} at sparsity "
            f"{last['sparsity']:.3f}\nnext: msae evaluate {out} --on STORE"
        )
        report(text, {"run": str(out), "settings": to_mapping(settings), "last": last}, json)

    return run


def evaluate_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.measure.evaluate import evaluate, poster_table

    def run(
        runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN...")],
        /,
        *,
        on: str,
        modality: Modality = "image",
        inference: Literal["relu", "trained", "topk"] = "trained",
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
            inference: trained is the activation of training; relu keeps every positive latent, as in the poster;
                topk keeps the --k largest.
            k: Latents kept by --inference topk.
            labels: A metadata column of the store: adds a linear probe and its agreement, KL and accuracies.
            probe_train: The store on whose original embeddings the probe is trained; without it, the run's training
                store. Rows that are also in --on are divided: one half trains the probe, the other is evaluated.
            recovery: Also FVU, cosine, CKNNA and dead latents of the k strongest latents for k = 1, 2, 4, …
            latex: Print the table in LaTeX.
            seed: Of the batches that CKNNA is averaged over.
            device: auto, cpu, cuda …
            json: Write the records as JSON to this file; - is stdout.
        """
        check_target(json)
        results = evaluate(
            list(runs), on, modality=modality, inference=inference, k=k, labels=labels, probe_train=probe_train,
            recovery=recovery, seed=seed, device=device,
        )  # fmt: skip
        for note in dict.fromkeys(note for result in results for note in result.notes):
            say(f"note: {note}")
        report(poster_table(results, style="latex" if latex else "markdown"), results.to_json(), json)

    return run


def name_verb(_: list[str]) -> Callable[..., None]:
    import tyro

    from msae.concepts.naming import NameSettings, name

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
        report(names.to_text(), names.to_json(), json)

    return run
