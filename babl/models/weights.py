"""Models in and out of transformers folders: config.json and safetensors, single or sharded."""

import json
import math
import re
import tempfile
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
from babl.files import refuse_pointer
from babl.models import bloom, llama, t5
from babl.models.layers import Model
from babl.text.tokenizer import tokenizer_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEAD = "lm_head.weight"  # of every family
SHARD_BYTES = 5 << 30  # of a weight file: what the hub stores and fetches well
EXTRA = "extra*.safetensors"  # parameters that the family does not have, by their names here
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What a folder may hold of the model that was saved into it before.
REPLACED = ("model*.safetensors", INDEX, "pytorch_model*.bin", PICKLE_INDEX, "generation_config.json")

Family = Literal["t5", "llama", "bloom"]  # of which a new model can be made


class FamilyParts(NamedTuple):
    """One model file, as loading and saving see it."""

    model: type[Model]
    config: Any  # a dataclass with from_hf and to_hf
    hf_keys: Callable[[Any], dict[str, str]]
    ignored: re.Pattern[str]  # tensors that old folders carry and the model never used
    prefix: str  # of the names of all but the head, which folders of the bare model leave out
    embedding: tuple[str, ...]  # the embedding's name, then those under which some folders hold it instead


FAMILIES: dict[str, FamilyParts] = {  # by model_type
    "t5": FamilyParts(t5.T5, t5.T5Config, t5.hf_keys, t5.IGNORED_KEYS, "", t5.EMBEDDING_KEYS),
    "mt5": FamilyParts(t5.T5, t5.MT5Config, t5.hf_keys, t5.IGNORED_KEYS, "", t5.EMBEDDING_KEYS),
    "umt5": FamilyParts(t5.T5, t5.UMT5Config, t5.hf_keys, t5.IGNORED_KEYS, "", t5.EMBEDDING_KEYS),
    "llama": FamilyParts(
        llama.Llama, llama.LlamaConfig, llama.hf_keys, llama.IGNORED_KEYS, "model.", ("model.embed_tokens.weight",)
    ),
    "bloom": FamilyParts(
        bloom.Bloom,
        bloom.BloomConfig,
        bloom.hf_keys,
        bloom.IGNORED_KEYS,
        "transformer.",
        ("transformer.word_embeddings.weight",),
    ),
}


class StoredTensor(NamedTuple):
    """Where a tensor lies: a safetensors file, open, and the tensor's name in it."""

    path: Path
    file: Any
    key: str

    def part(self) -> Any:
        """Returns what knows shape and dtype without reading, and reads what is indexed."""
        return self.file.get_slice(self.key)

    def read(self) -> Tensor:
        """Returns the whole tensor, from a mapping of its own: let go of, it leaves no page behind in memory."""
        with _open(self.path) as file:
            return file.get_tensor(self.key)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the parsed config.json of a model folder.

    Raises:
        UserError: There is no folder, no config, or a config of a family Babl does not have.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json, so not a model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, found {type(config).__name__}")
    family = config.get("model_type")
    if family not in list(FAMILIES):  # a list, for a type that cannot be hashed is no family either
        raise UserError(f"{path}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
    return config


def build_config(hf: dict[str, Any], tied: bool) -> Any:
    """Returns the family's config of a parsed config.json, without reading any weights.

    Args:
        hf: From `read_config`.
        tied: Whether the weights hold one tensor for head and embedding.

    Raises:
        UserError: The model is quantised, or a variant that Babl does not compute, or a value is not usable.
    """
    if hf.get("quantization_config"):
        method = hf["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(f"the weights are quantised (quantization_config says {method!r}), expected plain floats")
    try:
        return FAMILIES[hf["model_type"]].config.from_hf(hf, tied=tied)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{error} is absent") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"not usable ({error})") from None


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


def _model_of(folder: Path, hf: dict[str, Any], found: dict[str, StoredTensor]) -> Model:
    """Returns the blank model that a folder's config and files are of."""
    config = _config_of(folder, hf, found)
    layers = max(config.cache_shape[0], getattr(config, "num_layers", 0))  # of T5's encoder, too
    if layers > len(found):  # to build them all would take long
        raise UserError(f"{folder}: config.json says {layers:,} layers, but there are {len(found):,} tensors")
    try:
        return blank_model(config)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:  # torch's, of sizes that cannot be
        raise UserError(f"{folder / 'config.json'}: no model has these sizes ({str(error).splitlines()[0]})") from None


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
    with _tensors(folder, hf["model_type"]) as found:
        model = _model_of(folder, hf, found)
        where = _checked(model, folder, found)
        # Copied, not left mapped: who writes into the file later would change a part of the model that is in use.
        state = {name: stored.read().to(device, dtype, copy=True) for name, stored in where.items()}
    model.load_state_dict(state, strict=False, assign=True)  # not strict: a tied head has a name, but no tensor
    model.tie_weights()
    return model.eval()


@contextmanager
def stored_weights(config: Any, folder: Path, extra: bool = False) -> Iterator[dict[str, Any]]:
    """Yields each parameter of a model by its name here, in the folder's files: only what is indexed is read.

    Args:
        config: The model's.
        folder: As for `from_pretrained`.
        extra: Whether also those that a loop has added to the model, which a checkpoint has in files of their own.

    Raises:
        UserError: As `from_pretrained`.
    """
    model = blank_model(config)
    with _tensors(folder, config.model_type) as found, ExitStack() as stack:
        weights = {name: stored.part() for name, stored in _checked(model, folder, found).items()}
        for path in folder.glob(EXTRA) if extra else ():
            file = stack.enter_context(_open(path))
            weights |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        yield weights


@contextmanager
def _tensors(folder: Path, model_type: str) -> Iterator[dict[str, StoredTensor]]:
    """Yields where each tensor lies, by its name in a folder as transformers writes it now.

    Folders of the bare model leave out a prefix; those that keep shared tensors once may have dropped the embedding in
    favour of one of its copies.
    """
    family = FAMILIES[model_type]
    embedding = family.embedding[0]
    with ExitStack() as stack:
        found: dict[str, StoredTensor] = {}
        for path in weight_files(folder):
            file = stack.enter_context(_open(path))
            found |= {key: StoredTensor(path, file, key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if not any(key.startswith(family.prefix) for key in found):
            found = {key if key == HEAD else family.prefix + key: stored for key, stored in found.items()}
        copies = [name for name in (*family.embedding[1:], HEAD) if name in found]
        if embedding not in found and copies:
            found[embedding] = found[copies[0]]
        yield found


def _config_of(folder: Path, hf: dict[str, Any], found: dict[str, StoredTensor]) -> Any:
    """Returns the config of a folder, with head and embedding tied where its files hold one of them, or equal ones."""
    embedding = found.get(FAMILIES[hf["model_type"]].embedding[0])
    head = found.get(HEAD)
    tied = head is None or embedding is None or _equal(head, embedding)
    try:
        return build_config(hf, tied)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    parts = [stored.part() for stored in (one, other)]
    alike = parts[0].get_shape() == parts[1].get_shape() and parts[0].get_dtype() == parts[1].get_dtype()
    return alike and (one == other or torch.equal(one.read(), other.read()))


def weight_files(folder: Path) -> list[Path]:
    """Returns the folder's files of weights; as transformers, the single one where shards are there too."""
    if files := listed_files(folder, SINGLE, INDEX):
        return files
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise UserError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when read; only safetensors is loaded, and "
            f"`babl convert {folder}` writes it"
        )
    raise UserError(f"{folder}: no weights (expected {SINGLE} or {INDEX})")


def listed_files(folder: Path, single: str, index: str) -> list[Path]:
    """Returns the single file of weights, or else the shards that the index names; none where there is neither.

    Raises:
        UserError: The index is none, or a shard is missing.
    """
    if (folder / single).is_file():
        return [folder / single]
    if not (folder / index).is_file():
        return []
    text = (folder / index).read_text(encoding="utf-8", errors="replace")
    names = shard_names(text, str(folder / index), Path(single).suffix)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder}: shard {absent[0]} named by {index} is missing")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def shard_names(index: str, where: str, ending: str) -> list[str]:
    """Returns the names of the files that an index, the text of a `model.safetensors.index.json`, names.

    Args:
        index: The text.
        where: It is from, for errors.
        ending: Of the names of weight files.

    Raises:
        UserError: It is no such index, or names a file outside its folder.
    """
    try:
        names = sorted(set(json.loads(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or not name.endswith(ending)]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: not an index of shards ({error})") from None
    if outside:
        raise UserError(f"{where}: names {outside[0]!r}, expected a {ending} file beside it")
    return names


def _checked(model: Model, folder: Path, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns where each parameter lies, where every one is there in its shape, and no other."""
    family = FAMILIES[model.config.model_type]
    keys = family.hf_keys(model.config)
    expected = {keys[name]: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors missing, first {missing[0]}")
    copies = {HEAD, *family.embedding} if model.config.tie_word_embeddings else set(family.embedding)
    others = found.keys() - expected.keys() - copies
    unexpected = sorted(key for key in others if not family.ignored.fullmatch(key))
    if unexpected:
        near = did_you_mean(unexpected[0], expected)
        raise UserError(f"{folder}: {len(unexpected)} unexpected tensors, first {unexpected[0]}{near}")
    for key, shape in expected.items():
        actual = tuple(found[key].part().get_shape())
        if actual != shape:
            raise UserError(f"{folder}: {key} has shape {actual}, config.json says {shape}")
    return {name: found[keys[name]] for name, _ in model.named_parameters()}


def save_pretrained(model: Model, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """The folder holds config.json and safetensors weights as transformers reads them, and no other model's.

    Weights of a model that was there before, in whatever form, go when the new ones are written.

    Args:
        model: Of any family.
        folder: Created where it does not exist.
        shard_bytes: A file of weights is not larger, unless one tensor is; with several there is an index.

    Raises:
        UserError: The model no longer has all of its parameters, as an engine's on a CPU, which are packed.
    """
    names = FAMILIES[model.config.model_type].hf_keys(model.config)
    absent = sorted(set(names) - {name for name, _ in model.named_parameters()})
    if absent:
        raise UserError(
            f"a model without its parameter {absent[0]} cannot be saved; save what from_pretrained returns, not an "
            "engine's model, whose weights are packed for answering"
        )
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
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as beside:  # the old one may be what is mapped
        aside = Path(beside)
        for number, shard in enumerate(shards):
            save_shard(model.config, shard, aside / shard_name(number, len(shards)))
        save_index(aside, len(shards))
        save_config(model.config, next(model.parameters()).dtype, aside)
        for old in [path for pattern in REPLACED for path in folder.glob(pattern)]:
            old.unlink()
        for path in aside.iterdir():
            path.replace(folder / path.name)


def shard_name(number: int, total: int) -> str:
    """Returns the name of one of `total` weight files; numbers count from 0."""
    return SINGLE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def save_shard(config: Any, tensors: dict[str, Tensor], path: Path) -> list[Path]:
    """The file holds these parameters of a model, named as transformers names them; returns the files written.

    What the family does not have, such as a head that a loop has added, is in a file beside it that no model folder
    has: `extra` instead of `model`.
    """
    family = FAMILIES[config.model_type]
    keys = family.hf_keys(config)
    state = {keys[name]: tensor.cpu().contiguous() for name, tensor in tensors.items() if name in keys}
    if config.tie_word_embeddings and not config.to_hf()["tie_word_embeddings"] and family.embedding[0] in state:
        state[HEAD] = state[family.embedding[0]].clone()  # for transformers 4, which takes the two for untied
    _write(state, path)
    extra = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if name not in keys}
    if not extra:
        return [path]
    beside = path.with_name(path.name.replace("model", "extra", 1))
    _write(extra, beside)
    return [path, beside]


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # as files are here; safetensors lets nobody but the owner read its own
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


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
    """Returns what a model folder holds and what it takes, without reading its weights.

    `shared_parameters`, of head and embedding, are among the `parameters` once; `cache_per_token` counts numbers.

    Raises:
        UserError: `from_pretrained` would refuse the folder.
    """
    try:
        return _facts(folder, read_config(folder))
    except UserError:
        raise
    except Exception as error:  # whatever a damaged folder provokes is a line about this folder, not the end of a list
        raise UserError(f"{folder}: cannot be read ({type(error).__name__}: {str(error)[:200]!r})") from error


def _facts(folder: Path, hf: dict[str, Any]) -> dict[str, Any]:
    with _tensors(folder, hf["model_type"]) as found:
        model = _model_of(folder, hf, found)
        parts = [stored.part() for stored in _checked(model, folder, found).values()]
        return {
            "family": hf["model_type"],
            "parameters": sum(math.prod(part.get_shape()) for part in parts),
            "shared_parameters": next(model.parameters()).numel() if model.config.tie_word_embeddings else 0,
            "dtypes": ", ".join(sorted({part.get_dtype() for part in parts})),
            "bytes": sum(path.stat().st_size for path in weight_files(folder)),
            "context": model.context_length,
            "cache_per_token": 2 * math.prod(model.config.cache_shape),
            "tokenizer": tokenizer_file(folder) or "none",
        }
