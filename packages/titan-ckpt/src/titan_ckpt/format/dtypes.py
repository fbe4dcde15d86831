"""The dtype names of the safetensors format and the torch dtypes they stand for."""

import torch

# The safetensors library has the same table, but does not export it.
TYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}

# What may be cast to one another: the same number, rounded. Integers, booleans and float8 would become something else:
# they are indices, masks, or codes of quantized weights, which need their scales.
CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def can_cast(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Return whether weights of one dtype may be stored in another."""
    return given == wanted or (given in CASTABLE and wanted in CASTABLE)
