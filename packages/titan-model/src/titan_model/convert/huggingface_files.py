"""Folders as Hugging Face's transformers reads and writes them: config.json and safetensors files."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_model.convert.errors import WeightsError, check_shapes
from titan_model.convert.huggingface_config import config_from_huggingface
from titan_model.convert.huggingface_names import huggingface_map
from titan_model.convert.loading import load_mapped, native_tensors, read_description
from titan_model.convert.weight_map import TensorRule
from titan_model.decoder import Decoder

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_huggingface(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """Build a decoder from a folder as transformers' `save_pretrained` writes it, or as it is downloaded from the Hub.

    Tensors go from the files to the device a few at a time: memory never holds two copies of the model. No code of
    the folder's is run and nothing is unpickled.

    Args:
        folder: Holds `config.json` (model type `llama`, `qwen3` or `qwen3_moe`) and `model.safetensors`, or several
            files and `model.safetensors.index.json`.
        device: Where the parameters shall lie.
        dtype: What they shall be; None keeps that of the files.

    Returns:
        The model, its head tied to its embedding where `config.json` says so.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If `config.json` describes something that a `Decoder` is not.
        WeightsError: If tensors are missing, unexpected or misshaped: all of them in one message.
    """
    folder = Path(folder)
    config = config_from_huggingface(read_description(folder / "config.json", "a Hugging Face model"))
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise WeightsError(f"{path} is damaged or no safetensors file: {error}") from None
            files |= dict.fromkeys(file.keys(), file)
        shapes = {name: file.get_slice(name).get_shape() for name, file in files.items()}
        return load_mapped(
            config,
            huggingface_map(config, fused_experts=any(name.endswith(".experts.gate_up_proj") for name in files)),
            shapes,
            lambda name: files[name].get_tensor(name),
            str(folder),
            device,
            dtype,
        )


def save_huggingface(
    model: Decoder,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5_000_000_000,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers' `AutoConfig` and `AutoModelForCausalLM.from_pretrained` read.

    The folder appears under its name when everything is in it. Tied weights are written once. Memory holds no more
    than one file's tensors besides the model. Put the tokenizer's files beside afterwards.

    Args:
        model: Whole: not sharded over ranks.
        folder: Must not exist, or be empty.
        dtype: What the tensors shall be written as; None keeps that of the parameters.
        max_file_bytes: Above this size of its tensors a further file is begun. (The tensors that one native tensor
            becomes stay together, those of a block's experts for example.)
        extra_config: Further entries of `config.json`, such as `bos_token_id` and `eos_token_id`.

    Raises:
        FileExistsError: If the folder is there with something in it.
        ValueError: If transformers has no such model, or the parameters are sharded or on the meta device.
        WeightsError: If the model's tensors are not those of its config (wrapped modules, for example).
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: name another folder, or remove it first")
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes is {max_file_bytes}, must be at least 1")
    weights = huggingface_map(model.config)
    tensors = _whole_tensors(model)
    files = _split(weights.rules, tensors, dtype, max_file_bytes)
    kept = dtype or tensors["embed.weight"].dtype
    values = {**weights.config, "torch_dtype": str(kept).removeprefix("torch."), **(extra_config or {})}

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    staging.mkdir()
    try:
        _write_json(staging / "config.json", values)
        _write_files(staging, files, tensors, dtype)
        staging.replace(folder)  # an empty folder gives way, any other is an error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        named = read_description(folder / _INDEX, "a Hugging Face model").get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise ValueError(f"{folder / _INDEX} has no weight_map: it does not say which files there are")
        paths = [folder / name for name in sorted(set(named.values()))]
        lost = [path.name for path in paths if not path.is_file()]
        if lost:
            raise FileNotFoundError(f"{folder} lacks {', '.join(lost)}, which its {_INDEX} names")
        return paths
    if (folder / _ONE_FILE).is_file():
        return [folder / _ONE_FILE]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    why = f"; {pickled[0]} is a pickle, which may run code: convert it to safetensors" if pickled else ""
    raise FileNotFoundError(f"{folder} holds neither {_ONE_FILE} nor {_INDEX}{why}")


def _whole_tensors(model: Decoder) -> dict[str, Tensor]:
    tensors = model.state_dict()
    if model.config.tied_embeddings:
        tensors.pop("head.weight", None)
    expected = {name: tensor.shape for name, tensor in native_tensors(model.config).items()}
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, expected, "the model")
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is sharded over ranks: save_huggingface writes a model that is whole in one process"
            )
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no values: fill the model first")
    if model.config.tied_embeddings and model.head.weight is not model.embed.weight:
        raise ValueError(
            "head.weight is a weight of its own, but the config ties it to embed.weight: "
            "set `model.head.weight = model.embed.weight` first"
        )
    return tensors


def _split(
    rules: tuple[TensorRule, ...], tensors: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int
) -> list[list[TensorRule]]:
    """Deal the rules to files, in order."""
    files: list[list[TensorRule]] = [[]]
    size = 0
    for rule in rules:
        native = (tensors[name] for name in rule.native)
        more = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in native)
        if files[-1] and size + more > max_bytes:
            files.append([])
            size = 0
        files[-1].append(rule)
        size += more
    return files


def _write_files(
    folder: Path, files: list[list[TensorRule]], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    where: dict[str, str] = {}
    total = 0
    for number, rules in enumerate(files, start=1):
        name = _ONE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        foreign: dict[str, Tensor] = {}
        for rule in rules:
            foreign |= rule.to_foreign({name: tensors[name].detach() for name in rule.native})
        ready = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in foreign.items()}
        total += sum(tensor.nbytes for tensor in ready.values())
        where |= dict.fromkeys(ready, name)
        save_file(ready, folder / name, metadata={"format": "pt"})  # transformers refuses files without the metadata
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    if len(files) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
