"""The encoder as an ONNX graph: raw embeddings in, activations out, standardised and thresholded in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from msae.base.errors import require
from msae.sae.model import SAE, Inference
from msae.sae.standardize import Modality

OPSET = 17
IR_VERSION = 9
"""Of ONNX 1.14 and newer; runtimes refuse versions that came after them."""
LARGEST = 2**31 - 2**20
"""Bytes of weights in one file: protobuf reads none of 2 GiB, and the graph needs room too."""


def write_onnx(
    sae: SAE, file: Path, modality: Modality, *, inference: Inference = "trained", k: int | None = None
) -> None:
    """Write a graph from `embeddings (n, d_in)` to `activations (n, d_sae)`, for any n.

    The operations are those of the SAE in their order, so that the numbers differ by rounding alone. An encoder too
    large for one file lies beside it in `FILE.data`.

    Raises:
        MissingDependencyError: onnx is not installed.
    """
    require("onnx")
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    known, rule = sae.standardizer.statistics[modality], sae.rule(inference, k, modality)
    weights = {
        "mean": known.mean,
        "scale": np.float32(known.scale),
        "b_dec": sae.b_dec,
        "W_enc": sae.W_enc,
        "b_enc": sae.b_enc,
    }
    nodes = [
        helper.make_node("Sub", ["embeddings", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["x"]),
        helper.make_node("Sub", ["x", "b_dec"], ["less_bias"]),
        helper.make_node("Gemm", ["less_bias", "W_enc", "b_enc"], ["h"]),
    ]
    if rule.k is not None:
        weights |= {"k": np.array([min(rule.k, sae.d_sae)], np.int64), "zero": np.float32(0)}
        nodes += [
            helper.make_node("TopK", ["h", "k"], ["strongest", "latents"], axis=1, sorted=0),
            helper.make_node("Relu", ["strongest"], ["positive"]),
            helper.make_node("Mul", ["h", "zero"], ["nothing"]),
            helper.make_node("ScatterElements", ["nothing", "latents", "positive"], ["z"], axis=1),
        ]
    elif rule.threshold is not None:
        weights |= {"threshold": rule.threshold, "zero": np.float32(0)}
        nodes += [
            helper.make_node("Greater", ["h", "threshold"], ["fires"]),
            helper.make_node("Where", ["fires", "h", "zero"], ["kept"]),
            helper.make_node("Relu", ["kept"], ["z"]),
        ]
    else:
        nodes.append(helper.make_node("Relu", ["h"], ["z"]))
    if sae.config.soft_cap is not None:
        weights["cap"] = np.float32(sae.config.soft_cap)
        nodes += [
            helper.make_node("Div", ["z", "cap"], ["of_cap"]),
            helper.make_node("Tanh", ["of_cap"], ["bent"]),
            helper.make_node("Mul", ["bent", "cap"], ["capped"]),
        ]
    weights["factor"] = np.float32(rule.scale)
    last = "z" if sae.config.soft_cap is None else "capped"
    nodes.append(helper.make_node("Mul", [last, "factor"], ["activations"]))
    arrays = {name: _array(value) for name, value in weights.items()}
    tensors = []
    if sum(array.nbytes for array in arrays.values()) > LARGEST:
        data, array = file.with_name(file.name + ".data"), arrays.pop("W_enc")
        array.tofile(data)
        outside = TensorProto(name="W_enc", data_type=TensorProto.FLOAT, dims=array.shape)
        outside.data_location = TensorProto.EXTERNAL
        outside.external_data.add(key="location", value=data.name)
        tensors.append(outside)
    graph = helper.make_graph(
        nodes,
        "msae",
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["n", sae.d_in])],
        [helper.make_tensor_value_info("activations", TensorProto.FLOAT, ["n", sae.d_sae])],
        [*tensors, *(numpy_helper.from_array(array, name) for name, array in arrays.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="msae")
    model.ir_version = IR_VERSION
    onnx.save(model, file)
    onnx.checker.check_model(str(file))  # of the file: it knows what lies beside it


def _array(value: object) -> np.ndarray:
    return np.ascontiguousarray(value.detach().cpu().numpy()) if isinstance(value, Tensor) else np.asarray(value)
