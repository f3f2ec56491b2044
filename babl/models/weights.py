"""Models in and out of transformers folders: config.json and safetensors, single or sharded."""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from babl.errors import UserError, did_you_mean
from babl.models import bloom, llama, t5
from babl.models.layers import Model
from babl.text.tokenizer import TOKENIZER_FILES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 << 30  # of a weight file: what the hub stores and fetches well
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


Family = Literal["t5", "llama", "bloom"]


class FamilyParts(NamedTuple):
    """One model file, as loading and saving see it."""

    model: type[Model]
    config: Any  # a dataclass with from_hf and to_hf
    hf_keys: Callable[[Any], dict[str, str]]
    ignored: re.Pattern[str]  # tensors that old folders carry and the model never used
    prefix: str  # of the names of all but the head, which folders of the bare model leave out


FAMILIES: dict[Family, FamilyParts] = {
    "t5": FamilyParts(t5.T5, t5.T5Config, t5.hf_keys, t5.IGNORED_KEYS, ""),
    "llama": FamilyParts(llama.Llama, llama.LlamaConfig, llama.hf_keys, llama.IGNORED_KEYS, "model."),
    "bloom": FamilyParts(bloom.Bloom, bloom.BloomConfig, bloom.hf_keys, bloom.IGNORED_KEYS, "transformer."),
}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the parsed config.json of a model folder.

    Raises:
        UserError: There is no folder, no config, or a config of a family Babl does not have.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json, so not a model folder") from None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: not valid JSON ({error})") from None
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{folder / 'config.json'}: model_type is {family!r}, expected one of {known}")
    return config


class _WithoutInitialValues(TorchFunctionMode):
    """Within it parameters are not drawn, which on the meta device would cost a second and 70 MB of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def blank_model(config: Any) -> Model:
    """Returns the model of a family's config, whose parameters have shapes but neither values nor memory."""
    with torch.device("meta"), _WithoutInitialValues():
        return FAMILIES[config.model_type].model(config)


def from_pretrained(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Model:
    """Returns the model of a folder, in evaluation mode; its weights take their memory once.

    Args:
        folder: Holds config.json and safetensors weights, one file or shards with an index.
        dtype: Of the parameters.
        device: Where they live.

    Raises:
        UserError: A file is absent or damaged, the weights are pickles, or a tensor is missing, unexpected or of
            another shape than the config says.
    """
    folder = Path(folder)
    hf = read_config(folder)
    family = FAMILIES[hf["model_type"]]
    with _tensors(folder) as found:
        try:
            config = family.config.from_hf(hf, tied="lm_head.weight" not in found)
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / 'config.json'}: {error} is absent or not usable") from None
        except UserError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from None
        model = blank_model(config)
        keys = _checked_keys(model, folder, found)
    state = {name: tensor.to(device, dtype) for name, tensor in _read(folder, keys)}
    model.load_state_dict(state, strict=False, assign=True)  # not strict: a tied head has a name, but no tensor
    model.tie_weights()
    return model.eval()


@contextmanager
def stored_weights(config: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields each parameter of a model by its name here, in the folder's files: only what is indexed is read.

    Args:
        config: The model's.
        folder: As for `from_pretrained`.

    Raises:
        UserError: As `from_pretrained`.
    """
    model = blank_model(config)
    with _tensors(folder) as found:
        yield {name: found[key].get_slice(key) for name, key in _checked_keys(model, folder, found).items()}


def _read(folder: Path, keys: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensor of each key under its name, mapped rather than copied.

    Each has a mapping of its own: of what is converted, packed or sent to a GPU, no page stays behind in memory.
    """
    for path in _weight_files(folder):
        with _open(path) as file:
            here = file.keys()
        for name in (name for name, key in keys.items() if key in here):
            with _open(path) as file:
                yield name, file.get_tensor(keys[name])


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the open file that holds each tensor, by the tensor's name."""
    with ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in _weight_files(folder)]
        yield {key: file for file in files for key in file.keys()}  # noqa: SIM118 (not a dict)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / INDEX}: not an index of shards ({error})") from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{folder}: shard {absent[0]} named by {INDEX} is missing")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise UserError(f"{folder}: {pickles[0]} is a pickle, which can run code when read; only safetensors is loaded")
    raise UserError(f"{folder}: no weights (expected {SINGLE} or {INDEX})")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _checked_keys(model: Model, folder: Path, found: dict[str, Any]) -> dict[str, str]:
    """Returns each parameter's name in the files, where every one is there in its shape, and no other."""
    family = FAMILIES[model.config.model_type]
    keys = family.hf_keys(model.config)
    if not any(key.startswith(family.prefix) for key in found):
        keys = {name: key.removeprefix(family.prefix) for name, key in keys.items()}
    expected = {keys[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors missing, first {missing[0]}")
    unexpected = sorted(key for key in found.keys() - expected.keys() if not family.ignored.fullmatch(key))
    if unexpected:
        near = did_you_mean(unexpected[0], expected)
        raise UserError(f"{folder}: {len(unexpected)} unexpected tensors, first {unexpected[0]}{near}")
    for key, shape in expected.items():
        actual = tuple(found[key].get_slice(key).get_shape())
        if actual != shape:
            raise UserError(f"{folder}: {key} has shape {actual}, config.json says {shape}")
    return keys


def save_pretrained(model: Model, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """The folder holds config.json and safetensors weights as transformers reads them, every tensor once.

    Args:
        model: Of any family.
        folder: Created where it does not exist.
        shard_bytes: A file of weights is not larger, unless one tensor is; with several there is an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        if shards[-1] and size + parameter.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = parameter.detach()
        size += parameter.nbytes
    for number, shard in enumerate(shards):
        save_shard(model.config, shard, folder / shard_name(number, len(shards)))
    save_index(folder, len(shards))
    save_config(model.config, next(model.parameters()).dtype, folder)


def shard_name(number: int, total: int) -> str:
    """Returns the name of one of `total` weight files; numbers count from 0."""
    return SINGLE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def save_shard(config: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """The file holds these parameters of a model, named as transformers names them."""
    keys = FAMILIES[config.model_type].hf_keys(config)
    state = {keys[name]: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(state, path, metadata={"format": "pt"})


def save_config(config: Any, dtype: torch.dtype, folder: Path) -> None:
    """The folder says which model's weights, and of which dtype, it holds."""
    stated = config.to_hf() | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")


def save_index(folder: Path, total: int) -> None:
    """The folder's weight files, where there are several, have the index that finds a tensor's file."""
    if total == 1:
        return
    weight_map: dict[str, str] = {}
    size = 0
    for name in (shard_name(number, total) for number in range(total)):
        with _open(folder / name) as file:
            weight_map |= dict.fromkeys(file.keys(), name)
            size += (folder / name).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def describe(folder: Path) -> dict[str, Any]:
    """Returns family, size, dtype, bytes and context length of a model folder, without reading its weights.

    Raises:
        UserError: As `from_pretrained`.
    """
    hf = read_config(folder)
    with _tensors(folder) as found:
        slices = [file.get_slice(key) for key, file in found.items()]
        return {
            "family": hf["model_type"],
            "parameters": sum(math.prod(part.get_shape()) for part in slices),
            "dtypes": ", ".join(sorted({part.get_dtype() for part in slices})),
            "bytes": sum(path.stat().st_size for path in _weight_files(folder)),
            "context": hf["max_position_embeddings"] if hf["model_type"] == "llama" else None,
            "tokenizer": next((name for name in TOKENIZER_FILES if (folder / name).is_file()), "none"),
        }
