"""Float8 matrix products by torchao, an optional dependency.

`parallelize` checks the options and converts linears before any other transform; `ParallelModel` prepares the scales
before each step.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from titan_parallel.errors import LayoutError
from titan_parallel.options import Float8Options
from titan_parallel.plan import ParallelPlan, match_names, style_names

_UNIT = 16  # the kernels require sizes that are multiples of 16 bytes
_CAPABILITY = (8, 9)
_NUMBER = r"\b\d+\b"
_log = logging.getLogger(__name__)


def check_float8(options: Float8Options, device_type: str) -> None:
    """Check that torchao is installed and, unless float8 is emulated, that the hardware supports it.

    Raises:
        LayoutError: If not.
    """
    if importlib.util.find_spec("torchao") is None:
        raise LayoutError("float8: requires torchao; pip install 'titan-parallel[float8]'")
    if options.emulate:
        return
    found = torch.cuda.get_device_capability() if device_type == "cuda" else None
    if found is None or found < _CAPABILITY:
        here = f"compute capability {found[0]}.{found[1]}" if found else device_type
        raise LayoutError(
            f"float8: requires a GPU of compute capability 8.9 or above (H100, L40 and later), but this is {here}; "
            "unset it or, for tests, set float8.emulate, which rounds to float8 but is not faster"
        )


def convert_linears(
    model: nn.Module, blocks: Sequence[str], plan: ParallelPlan, tp: int, options: Float8Options
) -> None:
    """Convert the linears within blocks to float8 products, in place. Parameters and their names do not change.

    Linears that float8 kernels do not support are left unchanged and logged.

    Args:
        model: The unsharded model, on any device, meta included.
        blocks: Names of its blocks; if empty, the model is one block.
        plan: The plan, for the sizes of tensor-parallel shards.
        tp: Degree of tensor parallelism.
        options: Recipe and exceptions.

    Raises:
        LayoutError: If a pattern of `skip` matches nothing.
    """
    skipped = [name for names in match_names(model, options.skip).values() for name in names]
    styles = style_names(model, plan) if tp > 1 else {}
    shared = "heads" in plan and plan["heads"][1] < tp
    wanted = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and (not blocks or _within(name, blocks)) and not _within(name, skipped)
    ]
    reasons = {
        name: why
        for name in wanted
        if (why := _unfit(model.get_submodule(name), styles.get(name, ""), tp, shared_heads=shared))
    }
    if reasons:
        # Report a module that every block has once.
        listed = dict.fromkeys(f"{re.sub(_NUMBER, '*', name, count=1)} ({why})" for name, why in reasons.items())
        _log.warning("linears not converted to float8: %s", "; ".join(listed))
    chosen = frozenset(wanted) - reasons.keys()
    torchao: Any = importlib.import_module("torchao.float8")
    config = torchao.Float8LinearConfig.from_recipe_name(options.recipe)
    config = replace(config, emulate=options.emulate, enable_fsdp_float8_all_gather=options.fsdp_all_gather)
    torchao.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)


def prepare_weights(model: nn.Module) -> None:
    """Compute the scales of all weights that are gathered in float8 in one all-reduce, instead of one per weight."""
    importlib.import_module("torchao.float8").precompute_float8_dynamic_scale_for_fsdp(model)


def is_float8(module: nn.Module) -> bool:
    """Return whether a module is a linear converted to float8."""
    return isinstance(module, nn.Linear) and type(module).__name__ == "Float8Linear"


def _within(name: str, above: Iterable[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in above)


def _unfit(linear: nn.Module, style: str, tp: int, *, shared_heads: bool) -> str:
    """Return why float8 kernels do not support a linear, or an empty string."""
    assert isinstance(linear, nn.Linear)
    if style == "colwise_kv" and shared_heads:
        return "ranks share its heads"
    inner, outer = linear.in_features, linear.out_features
    if style in ("colwise", "colwise_kv"):
        outer //= tp
    if style == "rowwise":
        inner //= tp
    if inner % _UNIT or outer % _UNIT:
        return f"{outer} x {inner} on a rank, not both multiples of {_UNIT}"
    return ""
