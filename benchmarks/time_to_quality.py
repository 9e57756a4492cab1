"""CPU seconds of training until the 64 strongest latents leave at most .11 of a test row unexplained.

    python benchmarks/time_to_quality.py find TRAIN TEST --work FOLDER --peer NAME=PYTHON...
    python benchmarks/time_to_quality.py time TRAIN TEST --work FOLDER --peer NAME=PYTHON... [--rounds 5]

A peer's name is sae-lens or dictionary-learning, PYTHON that of the environment that has it installed. Both train
TopK 64 with their own trainers; ours trains the default recipe. `find` takes the fewest epochs that reach the error,
for each peer and learning rate; `time` then takes the cost of a step of each, in turns, on a quiet machine, and writes
RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WANTED = 0.11
K = 64
BATCH = 256
EXPANSION = 8
RATES = (2e-3, 1e-3, 4e-3)
FIRST_TRIED = 6
MOST_EPOCHS = 12
TIMED_STEPS = 60
OURS = {"msae, default": {}, "msae, TopK 64": {"kind": "topk", "k": K, "lr": 2e-3}}


def main() -> None:
    if sys.argv[1] == "train-peer":
        train_peer(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["find", "time"])
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in arguments.peer)
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepare(arguments)
    if arguments.what == "find":
        find(arguments, peers)
    else:
        report(arguments, peers)


def prepare(arguments: argparse.Namespace) -> None:
    """The standardised rows, once, as files that every library reads."""
    import torch

    from msae import EmbeddingStore
    from msae.sae.standardize import Standardizer, fit_statistics

    if (arguments.work / "test.npy").exists():
        return

    def batches(store: EmbeddingStore) -> Iterator[torch.Tensor]:
        return (torch.from_numpy(rows) for rows in store.batches("image", 4096))

    known = EmbeddingStore.open(arguments.train)
    standardizer = Standardizer().with_statistics("image", fit_statistics(lambda: batches(known)))
    for name, path in (("train", arguments.train), ("test", arguments.test)):
        rows = [standardizer.apply(x, "image") for x in batches(EmbeddingStore.open(path))]
        np.save(arguments.work / f"{name}.npy", torch.cat(rows).numpy())


def find(arguments: argparse.Namespace, peers: dict[str, str]) -> None:
    """The fewest epochs that reach the error, a JSON for each library and rate.

    Each number of epochs is trained from the start with its whole schedule. A further rate of a peer is only asked
    whether it needs fewer epochs than the best rate before it.
    """
    for name, settings in OURS.items():
        search(arguments.work / f"{name}.json", lambda epochs, s=settings: ours(arguments, s, epochs))
    for name, python in peers.items():
        fewest = MOST_EPOCHS + 1
        for rate in RATES:
            file = arguments.work / f"{name}-{rate:g}.json"
            trained = lambda epochs, n=name, p=python, r=rate: peer(arguments, p, n, r, epochs=epochs)  # noqa: E731
            fewest = search(file, trained, below=fewest) or fewest


def search(file: Path, trained: Callable[[int], dict[str, Any]], *, below: int = MOST_EPOCHS + 1) -> int | None:
    """The fewest epochs under `below` that reach the error; None where they do not."""
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"tried": {}}

    def reaches(epochs: int) -> bool:
        if str(epochs) not in record["tried"]:
            record["tried"][str(epochs)] = trained(epochs)
            file.write_text(json.dumps(record, indent=1) + "\n")
        error = record["tried"][str(epochs)]["fvu"]
        print(f"{file.stem}: {epochs} epochs, FVU {error:.4f}", flush=True)
        return error <= WANTED

    epochs = min(FIRST_TRIED, below - 1)
    if reaches(epochs):
        while epochs > 1 and reaches(epochs - 1):
            epochs -= 1
        return epochs
    return next((more for more in range(epochs + 1, below) if reaches(more)), None)


def ours(arguments: argparse.Namespace, settings: dict[str, Any], epochs: int) -> dict[str, Any]:
    import tempfile

    import msae

    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        sae = msae.train(
            arguments.train, out=Path(folder) / "run", epochs=epochs, batch_size=BATCH, expansion=EXPANSION, **settings
        )
        seconds = time.process_time() - began
    weights = {name: tensor.numpy() for name, tensor in sae.state_dict().items()}
    scale = sae.scale_at(K)
    return {"fvu": error_of(arguments.work / "test.npy", weights, scale), "cpu": seconds}


def peer(
    arguments: argparse.Namespace, python: str, name: str, rate: float, *, epochs: int, steps: int | None = None
) -> dict[str, Any]:
    """Train with a peer's own trainer in its own environment; with `steps`, stop there and only time them."""
    out = arguments.work / "peer.npz"
    case = {"name": name, "rate": rate, "epochs": epochs, "steps": steps,
            "rows": str(arguments.work / "train.npy"), "out": str(out)}  # fmt: skip
    finished = subprocess.run(
        [python, __file__, "train-peer", json.dumps(case)], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise SystemExit(f"{name} failed:\n{finished.stderr[-2000:]}")
    timed = json.loads(finished.stdout.splitlines()[-1])
    if steps is not None:
        return timed
    with np.load(out) as weights:
        return {"fvu": error_of(arguments.work / "test.npy", dict(weights), 1.0), **timed}


def error_of(test: Path, weights: dict[str, np.ndarray], scale: float) -> float:
    """FVU per sample with the 64 strongest latents kept: one formula for all libraries."""
    import torch

    x = torch.from_numpy(np.load(test))
    W_enc, b_enc, W_dec, b_dec = (torch.from_numpy(weights[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    lost = []
    for rows in x.split(1024):
        values, latents = ((rows - b_dec) @ W_enc + b_enc).topk(K, dim=1)
        z = torch.zeros(len(rows), len(W_dec)).scatter(1, latents, values.relu() * scale)
        lost.append((rows - z @ W_dec - b_dec).square().sum(1) / rows.square().sum(1))
    return float(torch.cat(lost).mean())


# In the peer's environment -----------------------------------------------------------------------------------------


def train_peer(case: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = torch.from_numpy(np.load(case["rows"]))
    a_pass = len(rows) // BATCH
    steps = case["epochs"] * a_pass

    def batches() -> Any:
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(rows), generator=generator)
            for i in range(a_pass):
                yield rows[order[i * BATCH : (i + 1) * BATCH]]

    make = {"sae-lens": sae_lens, "dictionary-learning": dictionary_learning}[case["name"]]
    step, weights = make(rows.shape[1], steps, case["rate"])
    source = batches()
    for _ in range(5 if case["steps"] else 0):
        step(next(source))  # the first steps allocate; they are not timed
    began = time.process_time()
    for _ in range(case["steps"] or steps):
        step(next(source))
    seconds = time.process_time() - began
    if not case["steps"]:
        np.savez(case["out"], **{name: tensor.detach().numpy() for name, tensor in weights().items()})
    print(json.dumps({"cpu": seconds, "steps": case["steps"] or steps}))


def sae_lens(d_in: int, steps: int, rate: float) -> tuple[Any, Any]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=EXPANSION * d_in, k=K, dtype="float32", device="cpu"))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, lr=rate, lr_end=rate / 100,
            lr_warm_up_steps=steps // 20, lr_decay_steps=steps // 5,
        ),
        sae,
        data_provider=iter(()),
    )  # fmt: skip

    def step(x: Any) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def weights() -> dict[str, Any]:
        sae.process_state_dict_for_saving_inference(state := sae.state_dict())  # folds the norms of the decoder in
        return {name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    return step, weights


def dictionary_learning(d_in: int, steps: int, rate: float) -> tuple[Any, Any]:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=steps, activation_dim=d_in, dict_size=EXPANSION * d_in, k=K, layer=0, lm_name="none", lr=rate,
        warmup_steps=steps // 20, decay_start=steps * 4 // 5, device="cpu",
    )  # fmt: skip
    count = iter(range(10**9))

    def weights() -> dict[str, Any]:
        ae = trainer.ae
        return {"W_enc": ae.encoder.weight.T.contiguous(), "b_enc": ae.encoder.bias,
                "W_dec": ae.decoder.weight.T.contiguous(), "b_dec": ae.b_dec}  # fmt: skip

    return lambda x: trainer.update(next(count), x), weights


# The table ---------------------------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace, peers: dict[str, str]) -> None:
    from results import write_section

    fewest = {file.stem: reached(json.loads(file.read_text())) for file in sorted(arguments.work.glob("*.json"))}
    best = {
        name: min((epochs, rate) for rate in RATES if (epochs := fewest[f"{name}-{rate:g}"]) is not None)
        for name in peers
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*OURS, *peers)}
    for _ in range(arguments.rounds):
        for name, settings in OURS.items():
            assert fewest[name] is not None
            seconds[name].append(ours(arguments, settings, fewest[name])["cpu"])
        for name, python in peers.items():
            epochs, rate = best[name]
            timed = peer(arguments, python, name, rate, epochs=epochs, steps=TIMED_STEPS)
            a_pass = len(np.load(arguments.work / "train.npy", mmap_mode="r")) // BATCH
            seconds[name].append(timed["cpu"] / timed["steps"] * epochs * a_pass)
    lines = ["| trained by | learning rate | epochs | CPU s | times ours |", "|---|---|---|---|---|"]
    base = seconds["msae, default"]
    for name, values in seconds.items():
        ratios = sorted(value / one for value, one in zip(values, base, strict=True))
        rate = f"{best[name][1]:g}" if name in best else "its own" if name == "msae, default" else "0.002"
        lines.append(
            f"| {name} | {rate} | {best[name][0] if name in best else fewest[name]} | {statistics.median(values):.1f} "
            f"| {statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f}) |"
        )
    tried = "; ".join(
        f"{file.stem}: "
        + ", ".join(f"{epochs} epochs {one['fvu']:.4f}" for epochs, one in sorted(found.items(), key=int_key))
        for file in sorted(arguments.work.glob("*.json"))
        if (found := json.loads(file.read_text())["tried"])
    )
    lines += [
        "",
        f"What was tried, and the error: {tried}.",
        "",
        f"Until FVU per sample with the {K} strongest latents is at most {WANTED} on the test rows; batch {BATCH}, "
        f"expansion {EXPANSION}, one thread. Ours: the whole of `msae.train`, thresholds included. Peers: their own "
        f"TopK {K} trainers, {TIMED_STEPS} steps timed in each of {arguments.rounds} rounds, in turns with ours, times "
        "the steps they need; warm-up over 5 % and decay over the last 20 % of the steps.",
    ]
    write_section("time-to-quality", "CPU seconds until an error is reached", "\n".join(lines))
    print("\n".join(lines))


def int_key(item: tuple[str, Any]) -> int:
    return int(item[0])


def reached(record: dict[str, Any]) -> int | None:
    return min((int(epochs) for epochs, found in record["tried"].items() if found["fvu"] <= WANTED), default=None)


if __name__ == "__main__":
    main()
