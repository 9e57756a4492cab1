"""Makes training steps of one library, when told to: a child of `train_step.py`, in that library's own environment.

Reads one JSON request per line and answers each with one line. `{"build": case}` sets up a model, `{"step": 1}` makes
one step and answers its CPU and wall seconds. Every library gets the same rows, the same sizes, where its encoder has a
bias the same share of positive pre-activations, and a learning rate so small that this share stays.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import NormalDist
from unittest.mock import MagicMock

Step = Callable[[], object]
LR = 1e-6


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    step: Step | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "build" in request:
                step = None  # free the last case's memory first
                step = build(**request["build"])
                answer: dict[str, object] = {"ok": True}
            else:
                assert step is not None
                cpu, wall = time.process_time(), time.perf_counter()
                step()
                answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        except Exception as err:  # noqa: BLE001 (the parent shows why a library cannot do a case)
            answer = {"error": f"{type(err).__name__}: {err}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


def build(library: str, threads: int, **case) -> Step:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(case["batch"], case["d_in"])
    bias = NormalDist().inv_cdf(case["density"]) if case.get("density") else 0.0
    return BUILDERS[library](x, bias, case)


def levels_of(case: dict) -> tuple[int, ...]:
    """The levels of a recipe; else `n_levels` that end at d_sae: doubling from 64 where that fits, or evenly spread."""
    d_sae = case["d_sae"]
    if case["kind"] in ("default", "faithful"):
        first, last = case["d_in"] // 64, case["d_in"] if case["kind"] == "default" else d_sae
        return (*(first << i for i in range(40) if first << i < last), last)
    doubling = [64 << i for i in range(40) if 64 << i < d_sae] + [d_sae]
    n_levels = case.get("n_levels") or len(doubling)
    if n_levels == len(doubling):
        return tuple(doubling)
    return (
        tuple(round(64 * (d_sae / 64) ** (i / (n_levels - 1))) for i in range(n_levels)) if n_levels > 1 else (d_sae,)
    )


def our_parameters(bias: float, case: dict):
    """Encoder (d_in, d_sae), its bias, decoder with unit rows and its bias; pre-activations have unit variance."""
    import torch

    rows = torch.randn(case["d_sae"], case["d_in"])
    rows /= rows.norm(dim=1, keepdim=True)
    tensors = rows.clone().T, torch.full((case["d_sae"],), bias), rows, torch.zeros(case["d_in"])
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def msae(x, bias: float, case: dict, *, kernel: str = "cpu") -> Step:
    import torch

    from msae.sae.kernels import Selection, adamw_step_, sae_loss

    parameters = our_parameters(bias, case)
    kind, d_sae, k, settings = case["kind"], case["d_sae"], case.get("k"), {}
    if kind in ("matryoshka", "default", "faithful"):
        selection = Selection(levels=levels_of(case))
        if kind != "matryoshka":
            parameters.append(torch.nn.Parameter(torch.ones(selection.n_levels)))
            settings["level_scales"] = parameters[4]
    elif kind == "widths":
        selection = Selection(widths=widths_of(d_sae), batch_k=k)
    elif kind == "topk":
        selection = Selection(levels=(k,))
    elif kind == "batchtopk":
        selection = Selection(batch_k=k)
    elif kind == "jumprelu":
        selection, settings = Selection(bandwidth=0.05), {"l0": 1e-3, "l0_target": 64}
        parameters.append(torch.nn.Parameter(torch.full((d_sae,), 0.1)))
        settings["threshold"] = parameters[4]
    else:
        selection, settings = Selection(), {"l1": 0.003}
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, eps=6.25e-10, fused=True)
    weights = (1.0,) * selection.n_levels

    def step() -> None:
        loss = sae_loss(x, *parameters[:4], selection=selection, weights=weights, kernel=kernel, **settings).total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        adamw_step_(optimizer, unit_rows=parameters[2], max_grad_norm=1.0)

    return step


def reference(x, bias: float, case: dict) -> Step:
    return msae(x, bias, case, kernel="reference")


def naive(x, bias: float, case: dict) -> Step:
    """Our step as the formulas read: a selection and a dense decode for each level, autograd, torch's optimiser."""
    import torch

    parameters = our_parameters(bias, case)
    W_enc, b_enc, W_dec, b_dec = parameters
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, eps=6.25e-10)
    levels = (
        levels_of(case) if case["kind"] in ("matryoshka", "default", "faithful") else (case.get("k") or case["d_sae"],)
    )

    def step() -> None:
        h = (x - b_dec) @ W_enc + b_enc
        total = 0.0
        for k in levels:
            values, places = h.topk(k, dim=1)
            z = torch.zeros_like(h).scatter(1, places, values.relu())
            total = total + (x - z @ W_dec - b_dec).square().mean()
        optimizer.zero_grad(set_to_none=True)
        (total / len(levels)).backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def floor(x, bias: float, case: dict) -> Step:
    """The five dense products of a plain SAE's step, and nothing else: no optimiser, no selection."""
    import torch

    W_enc, _, W_dec, _ = (p.detach() for p in our_parameters(bias, case))
    z, error = torch.randn(len(x), case["d_sae"]), torch.randn_like(x)
    out = [torch.empty_like(t) for t in (z, x, z, W_dec, W_dec)]

    def step() -> None:
        torch.mm(x, W_enc, out=out[0])
        torch.mm(z, W_dec, out=out[1])
        torch.mm(error, W_dec.T, out=out[2])
        torch.mm(z.T, error, out=out[3])
        torch.mm(z.T, x, out=out[4])

    return step


def widths_of(d_sae: int) -> tuple[int, ...]:
    """Five nested prefixes, each twice as wide as the one before."""
    return tuple(d_sae >> i for i in (4, 3, 2, 1, 0))


def overcomplete(x, bias: float, case: dict) -> Step:  # noqa: ARG001 (its encoder has no bias to set)
    import torch

    for module in ("models", "visualization"):
        # Only its SAEs are measured; so its vision models and plots need no matching torchvision and matplotlib.
        sys.modules.setdefault(f"overcomplete.{module}", MagicMock())
    from overcomplete.sae import SAE, BatchTopKSAE, TopKSAE

    kind = case["kind"]
    if kind == "topk":
        model = TopKSAE(case["d_in"], nb_concepts=case["d_sae"], top_k=case["k"], device="cpu")
    elif kind == "batchtopk":
        model = BatchTopKSAE(case["d_in"], nb_concepts=case["d_sae"], top_k=case["k"] * case["batch"], device="cpu")
    elif kind == "relu":
        model = SAE(case["d_in"], nb_concepts=case["d_sae"], device="cpu")
    else:
        raise NotImplementedError(f"overcomplete has no {kind}")
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    model.train()

    def step() -> None:  # the body of its train_sae, less the logging
        optimizer.zero_grad()
        _, z, x_hat = model(x)
        loss = (x - x_hat).square().mean() + (0.003 * z.abs().sum(-1).mean() if kind == "relu" else 0.0)
        loss.backward()
        optimizer.step()

    return step


def dictionary_learning(x, bias: float, case: dict) -> Step:
    import torch
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, standard, top_k

    sizes = {"activation_dim": case["d_in"], "dict_size": case["d_sae"], "device": "cpu"}
    named = {"layer": 0, "lm_name": "none", "lr": LR}
    kind = case["kind"]
    if kind == "relu":
        trainer = standard.StandardTrainer(steps=10**6, l1_penalty=0.003, **sizes, **named)
    elif kind == "topk":
        trainer = top_k.TopKTrainer(steps=10**6, k=case["k"], **sizes, **named)
    elif kind == "batchtopk":
        trainer = batch_top_k.BatchTopKTrainer(steps=10**6, k=case["k"], **sizes, **named)
    elif kind == "widths":
        widths = (0, *widths_of(case["d_sae"]))
        fractions = [(b - a) / case["d_sae"] for a, b in zip(widths, widths[1:])]  # noqa: B905, RUF007
        trainer = matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
            steps=10**6, k=case["k"], group_fractions=fractions, **sizes, **named
        )
    else:
        raise NotImplementedError(f"dictionary_learning has no {kind}")
    if kind == "relu":
        with torch.no_grad():
            h = trainer.ae.encoder(x - trainer.ae.bias)
            trainer.ae.encoder.bias += bias * h.std()
    count = iter(range(1, 10**9))  # from 1: its step 0 sets b_dec to a median, once
    return lambda: trainer.update(next(count), x)


def sae_lens(x, bias: float, case: dict) -> Step:
    import sae_lens
    import torch
    from sae_lens.saes.sae import TrainStepInput

    kind = case["kind"]
    sizes = {"d_in": case["d_in"], "d_sae": case["d_sae"], "dtype": "float32", "device": "cpu"}
    names = {"relu": "Standard", "topk": "TopK", "batchtopk": "BatchTopK", "widths": "MatryoshkaBatchTopK"}
    if kind not in names:
        raise NotImplementedError(f"sae_lens has no comparable {kind}")
    name = names[kind] + "TrainingSAE"
    special = {"l1_coefficient": 0.003} if kind == "relu" else {"k": case["k"]}
    if kind == "widths":
        special["matryoshka_widths"] = list(widths_of(case["d_sae"]))
    model = getattr(sae_lens, name)(getattr(sae_lens, name + "Config")(**sizes, **special))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    coefficients = dict.fromkeys(model.get_coefficients(), 0.003)
    if kind == "relu":
        with torch.no_grad():
            model.b_enc += bias * ((x - model.b_dec) @ model.W_enc).std()
    count = iter(range(1, 10**9))

    def step() -> None:  # the body of its SAETrainer's train step, less schedulers and logging
        model.train()
        dead = torch.zeros(case["d_sae"], dtype=torch.bool)
        n = next(count)
        out = model.training_forward_pass(
            TrainStepInput(
                sae_in=x, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=n, is_logging_step=False
            )
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


BUILDERS = {
    "msae": msae,
    "reference": reference,
    "naive": naive,
    "floor": floor,
    "overcomplete": overcomplete,
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
}

if __name__ == "__main__":
    main()
