"""Loading and saving model folders of Hugging Face's transformers: config.json and safetensors files.

The public entry points `load_huggingface` and `save_huggingface`. Names come from `huggingface_names`, the config from
`huggingface_config`; `loading` builds the model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_model.companions import Companions
from titan_model.convert.errors import WeightsError, check_shapes, shown
from titan_model.convert.folders import check_downloaded, open_folder, read_json_object
from titan_model.convert.huggingface_companions import CONFIG, companion_files, config_with, read_companions
from titan_model.convert.huggingface_config import config_from_huggingface
from titan_model.convert.huggingface_names import huggingface_map
from titan_model.convert.load_changes import LoadChanges, change_config
from titan_model.convert.loading import TensorSource, internal_tensors, load_mapped
from titan_model.convert.weight_map import TensorRule
from titan_model.decoder import Decoder

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[^/\\\x00]+\.safetensors")


def load_huggingface(
    directory: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **changes: Unpack[LoadChanges],
) -> Decoder:
    """Build a decoder from a folder that transformers' `save_pretrained` wrote or that was downloaded from the Hub.

    Tensors go from the files to the device a few at a time: memory never holds two copies of the model. No code in
    the folder is run and nothing is unpickled.

    Args:
        directory: Folder with `config.json` (model type `llama`, `qwen3` or `qwen3_moe`) and `model.safetensors`, or
            several files and `model.safetensors.index.json`.
        device: Device of the parameters.
        dtype: Dtype of the parameters; None keeps that of the files or, if they mix several, takes the smallest that
            holds all their values.
        changes: Settings that differ from those of `config.json`, by the names of `DecoderConfig` and `MoEConfig`:
            `attention`, `norm`, `max_seq_len`, `rope_theta`, `rope_scaling`, `init_std`, `vocab_size`, `balance_loss`
            and `balance_bias_rate`. With a larger `vocab_size` each new row of embedding and head is the mean of the
            file's rows; with a smaller one the last rows are dropped.

    Returns:
        The model. Its head is tied to its embedding if `config.json` says so.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ValueError: If `config.json` has a setting that a `Decoder` does not support, or a change is not possible.
        WeightsError: If tensors are missing, unexpected, quantized or of the wrong shape; the message lists all of
            them. If the folder is another thing (a LoRA adapter, files that Git LFS did not download); the message says
            what it is.

    Example:
        >>> import tempfile
        >>> from titan_model import build, load_huggingface, preset, save_huggingface
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save_huggingface(build(preset("debug_qwen3"), device="cpu"), f"{parent}/my-qwen3")
        ...     model = load_huggingface(f"{parent}/my-qwen3")
        >>> model.config == preset("debug_qwen3")
        True
    """
    directory = open_folder(directory)
    stored = config_from_huggingface(read_json_object(directory / CONFIG, "a Hugging Face model"))
    config = change_config(stored, changes)
    stored = replace(config, vocab_size=stored.vocab_size)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path, listed in _weight_files(directory).items():
            check_downloaded(path)
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise WeightsError(f"{path}: corrupt, or not a safetensors file: {error}") from None
            if listed is not None and (differing := sorted(listed ^ set(file.keys()))):
                raise WeightsError(
                    f"{path}: {differing[0]} is in the file or in {_INDEX}, but not in both; download the folder again"
                )
            files |= dict.fromkeys(file.keys(), file)
        source = TensorSource(
            where=str(directory),
            shapes={name: file.get_slice(name).get_shape() for name, file in files.items()},
            dtypes={name: _dtype_name(file.get_slice(name).get_dtype()) for name, file in files.items()},
            fetch=lambda name: files[name].get_tensor(name),
        )
        fused_experts = any(name.endswith(".experts.gate_up_proj") for name in files)
        weights = huggingface_map(stored, fused_experts=fused_experts)
        model = load_mapped(stored, weights, source, device, dtype, vocab_size=config.vocab_size)
    model.companions = read_companions(directory)
    return model


def save_huggingface(
    model: Decoder,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5_000_000_000,
    tokenizer: str | os.PathLike[str] | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers' `AutoConfig` and `AutoModelForCausalLM.from_pretrained` read.

    The folder appears under its name only when it is complete. Tied weights are written once. Besides the model, memory
    holds the tensors of one file at most. Tokenizer files, chat templates, `generation_config.json` and token ids are
    written as they were in the folder that the model was loaded from, or in `tokenizer`.

    Args:
        model: The model, unsharded.
        directory: Folder to write; must not exist, or be empty.
        dtype: Dtype of the written tensors; None keeps that of the parameters.
        max_file_bytes: Size of its tensors above which a new file is started. (The external tensors that one tensor of
            the model becomes stay in one file, for example those of a block's experts.)
        tokenizer: Folder with the files of a tokenizer; None takes those that the model was loaded with, if any.
        extra_config: Further entries of `config.json`, such as `bos_token_id` and `eos_token_id`. They cannot override
            what describes the model.

    Raises:
        FileExistsError: If the folder exists and is not empty.
        ValueError: If transformers has no architecture for this model, the parameters are sharded or on the meta
            device, or `extra_config` contradicts the model.
        WeightsError: If the model's tensors do not match its config (wrapped modules, for example).
    """
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} already exists: choose another folder, or remove it first")
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes is {max_file_bytes}, must be at least 1")
    weights = huggingface_map(model.config)
    tensors = _unsharded_tensors(model)
    files = _split(weights.rules, tensors, dtype, max_file_bytes)
    kept = dtype or tensors["embed.weight"].dtype
    extra = dict(extra_config or {})
    companions = model.companions if tokenizer is None else read_companions(open_folder(tokenizer))
    companions = companions or Companions()
    described = {**weights.config, "torch_dtype": str(kept).removeprefix("torch.")}
    values = config_with(described, companions, extra)
    beside = companion_files(companions, values, extra)

    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    staging.mkdir()
    try:
        _write_json(staging / CONFIG, values)
        for name, content in beside.items():
            _write(staging / name, content)
        _write_files(staging, files, tensors, dtype)
        staging.replace(directory)  # replaces an empty folder; fails on any other
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Return the safetensors files of a model folder, each with the tensors that the index lists for it.

    A single file that the index does not name holds the entire model (None): it is newer than the index, which
    transformers leaves behind when it saves a single file.
    """
    index = directory / _INDEX
    if (directory / _ONE_FILE).is_file() and not (index.is_file() and _names_single_file(index)):
        return {directory / _ONE_FILE: None}
    if index.is_file():
        listed = read_json_object(index, "a Hugging Face model").get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f"{index}: no valid weight_map, which must give the file of each tensor")
        outside = [name for name in listed.values() if not _FILE_NAME.fullmatch(name)]
        if outside:
            raise ValueError(f"{index}: names the file {shown(outside[0])}, which is not in its folder")
        files: dict[Path, set[str] | None] = {}
        for tensor, name in sorted(listed.items(), key=lambda item: item[1]):
            tensors = files.setdefault(directory / name, set())
            assert tensors is not None
            tensors.add(tensor)
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{directory}: missing {', '.join(missing)}, listed in {_INDEX}")
        return files
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    why = f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else ""
    raise FileNotFoundError(f"{directory}: neither {_ONE_FILE} nor {_INDEX} found{why}")


def _names_single_file(index: Path) -> bool:
    """Return whether an index lists the single file; an unreadable one, next to such a file, lists nothing."""
    try:
        listed = read_json_object(index, "a Hugging Face model").get("weight_map")
    except ValueError:
        return False
    return isinstance(listed, dict) and _ONE_FILE in listed.values()


def _dtype_name(code: str) -> str:
    """Return torch's name of a dtype of safetensors, or its code if it is not one that weights may have."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}
    names |= {"F8_E5M2": "float8_e5m2"} | {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    return names.get(code) or ("uint8" if code == "U8" else code.lower())


def _unsharded_tensors(model: Decoder) -> dict[str, Tensor]:
    """Return the tensors to save, without a tied head, after checking that each is complete and has values."""
    tensors = model.state_dict()
    if model.config.tied_embeddings:
        tensors.pop("head.weight", None)
    expected = {name: tensor.shape for name, tensor in internal_tensors(model.config).items()}
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, "the model")
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is sharded over ranks: save_huggingface needs a model that is unsharded in one process"
            )
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values: initialize or load the model first")
    if model.config.tied_embeddings and model.head.weight is not model.embed.weight:
        raise ValueError(
            "head.weight is not embed.weight, but the config ties them: "
            "set `model.head.weight = model.embed.weight` first"
        )
    return tensors


def _split(
    rules: tuple[TensorRule, ...], tensors: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int
) -> list[list[TensorRule]]:
    """Assign the rules to files, in order, starting a new file where `max_bytes` would be exceeded."""
    files: list[list[TensorRule]] = [[]]
    size = 0
    for rule in rules:
        internal = (tensors[name] for name in rule.internal)
        more = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in internal)
        if files[-1] and size + more > max_bytes:
            files.append([])
            size = 0
        files[-1].append(rule)
        size += more
    return files


def _write_files(
    directory: Path, files: list[list[TensorRule]], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Write the safetensors files and, if there are several, their index."""
    where: dict[str, str] = {}
    total = 0
    for number, rules in enumerate(files, start=1):
        name = _ONE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        external: dict[str, Tensor] = {}
        for rule in rules:
            external |= rule.to_external({name: tensors[name].detach() for name in rule.internal})
        ready = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in external.items()}
        total += sum(tensor.nbytes for tensor in ready.values())
        where |= dict.fromkeys(ready, name)
        save_file(ready, directory / name, metadata={"format": "pt"})  # transformers rejects files without the metadata
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
    if len(files) > 1:
        _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(values, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
