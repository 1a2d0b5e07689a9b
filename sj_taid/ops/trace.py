"""``SJ_TAID_TRACE=FILE``: append a line of JSON to FILE for each call of a fused backend.

``python experiments/benchmark/neuron.py --trace FILE`` times the calls again.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .alif.norm import Norm
from .surrogate import DERIVATIVES


def trace_calls(multi_step: Callable[..., Any]) -> Callable[..., Any]:
    """``multi_step``, writing its calls if ``SJ_TAID_TRACE`` is set now: on import."""
    name = os.environ.get("SJ_TAID_TRACE")
    if not name:
        return multi_step
    path = Path(name).absolute()

    @wraps(multi_step)
    def traced(engine: Any, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            _warn_of_compiled()
        else:
            _append(path, json.dumps(describe(*arguments, **options)))
        return multi_step(engine, *arguments, **options)

    return traced


def describe(
    x_seq: Tensor,
    v: Tensor | float,
    w: Tensor,
    v_threshold: Tensor,
    *,
    surrogate_function: Any,
    norm: Norm | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What a call's time depends on: shapes, dtype, layout, device and options, no values."""
    leaves: dict[str, Any] = {"x_seq": x_seq, "v": v, "w": w, "v_threshold": v_threshold}
    if norm is not None:
        leaves |= {"weight": norm.weight, "bias": norm.bias}
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    grad = [name for name, tensor in tensors.items() if tensor.requires_grad]
    surrogate = type(surrogate_function).__name__
    return {
        "shape": [*x_seq.shape],
        "stride": [*x_seq.stride()],
        "dtype": str(x_seq.dtype).removeprefix("torch."),
        "device": x_seq.device.type,
        "grad": grad if torch.is_grad_enabled() else [],
        "v_tensor": "v" in tensors,
        "per_channel": w.dim() + v_threshold.dim() > 0,
        "norm": None if norm is None else "running" if norm.fixed else "batch",
        "surrogate": surrogate,
        "surrogate_options": {
            name: getattr(surrogate_function, name) for name in DERIVATIVES[surrogate].parameters
        },
        "return_bits": False,
        **options,
    }


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        error.add_note("SJ_TAID_TRACE names this file: make its folder, or name another file")
        raise


@torch.compiler.assume_constant_result
def _warn_of_compiled() -> None:
    warnings.warn(
        "SJ_TAID_TRACE: calls under torch.compile are not written; trace the net without it",
        RuntimeWarning,
        stacklevel=2,
    )
