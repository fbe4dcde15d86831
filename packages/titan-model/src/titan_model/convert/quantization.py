"""Quantized weights, recognized by their names and dtypes: a Decoder computes with floating-point weights only.

An integer or float8 tensor without its scale is not a weight: converted to another dtype it would load without an
error, as garbage. `loading` calls `check_not_quantized` before it reads any tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from titan_model.convert.errors import WeightsError

FLOATS = ("float64", "float32", "float16", "bfloat16")

# Names that end like this belong to the scales and codes of a method.
_SIGNS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "float8 with scales of blocks",
    "weight_scale": "float8 or integers with scales",
    "SCB": "bitsandbytes, 8 bits",
    "absmax": "bitsandbytes, 4 bits",
}


def check_not_quantized(dtypes: Mapping[str, str], needed: Collection[str], where: str) -> None:
    """Check that weights are floating-point numbers of at least 16 bits.

    Args:
        dtypes: Dtype of every external tensor, by name.
        needed: Names of the tensors that will be read.
        where: What holds them, for the message.

    Raises:
        WeightsError: If weights are quantized; the message gives the method, a tensor, and how many there are.
    """
    methods = {name: _SIGNS[end] for name in dtypes if (end := name.rpartition(".")[2]) in _SIGNS}
    codes = [name for name, dtype in dtypes.items() if name in needed and dtype not in FLOATS]
    affected = codes or [name for name in methods if dtypes[name] not in FLOATS] or [*methods]
    if not affected:
        return
    first = affected[0]
    method = next(iter(methods.values()), None) or ("float8" if dtypes[first].startswith("float8") else "integers")
    more = f" and {len(affected) - 1:,} more" if len(affected) > 1 else ""
    raise WeightsError(
        f"{where}: the weights are quantized ({method}): {first} is {dtypes[first]}{more}; load an unquantized copy, "
        "or dequantize them first"
    )
