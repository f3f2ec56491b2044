"""Model folders from the Hugging Face hub, or whatever `HF_ENDPOINT` names: weights, tokenizer and config alone.

The hub's description of the repository, the config and the index are read first: what cannot be loaded is refused
before any weights are fetched.
"""

import json
import os
import shutil
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from babl.errors import UserError
from babl.models.weights import (
    FAMILIES,
    HEAD,
    INDEX,
    PICKLE,
    PICKLE_INDEX,
    SINGLE,
    build_config,
    read_config,
    shard_names,
)
from babl.text.tokenizer import SIDE_FILES, TOKENIZER_FILES

COMPANIONS = tuple(dict.fromkeys(("config.json", *TOKENIZER_FILES, *SIDE_FILES)))  # of the weights
PULL_REQUESTS = 50  # the newest, which are looked through for safetensors
SPARE = 64 << 20  # bytes of disk to leave free


class Repository:
    """One commit of a repository on the hub.

    Attributes:
        commit: Its hash.
        sizes: Bytes of each file, by name.
    """

    def __init__(self, api: Any, repo_id: str, revision: str, aside: Path):
        """The hub describes the commit; what is fetched lies in the folder `aside`."""
        self._api, self._repo_id, self._aside = api, repo_id, aside
        self._named = repo_id if revision == "main" else f"{repo_id} at {revision}"
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        self.commit: str = info.sha
        self.sizes: dict[str, int] = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def fetch(self, name: str) -> Path:
        """Returns the file, which is here now and as long as the hub said; a transfer that broke off goes on."""
        fetched = self._api.hf_hub_download(self._repo_id, name, revision=self.commit, local_dir=self._aside)
        path = Path(fetched)
        if path.stat().st_size != self.sizes[name]:
            path.unlink()
            raise UserError(f"{name} arrived with another size than the {self.sizes[name]} bytes announced; run again")
        return path

    def check_config(self) -> None:
        """The config is of a model that Babl computes.

        Raises:
            UserError: It is of another family, quantised, or of a variant that Babl does not have.
        """
        if "config.json" not in self.sizes:
            adapter = "adapter_config.json" in self.sizes
            what = "an adapter, which needs the model it was made for" if adapter else "no model of transformers"
            raise UserError(f"{self._named} has no config.json: {what}")
        self.fetch("config.json")
        try:
            self._config = read_config(self._aside)
            build_config(self._config, tied=True)
        except UserError as error:
            reason = str(error).removeprefix(f"{self._aside}/").removeprefix("config.json: ")
            raise UserError(f"{self._named}: config.json: {reason}") from None

    def weights(self, single: str = SINGLE, index: str = INDEX) -> list[str]:
        """Returns the files that hold the weights, an index among them; none where the repository has neither form.

        Args:
            single: The name of the one file; where it is, transformers reads no other.
            index: The name of the file that names the shards.

        Raises:
            UserError: The index is none, is of another model than the config, or names a shard that is not there.
        """
        if single in self.sizes:
            return [single]
        if index not in self.sizes:
            return []
        text = self.fetch(index).read_text(encoding="utf-8", errors="replace")
        shards = shard_names(text, f"{self._named}: {index}", Path(single).suffix)
        absent = [name for name in shards if name not in self.sizes]
        if absent:
            raise UserError(f"{self._named}: {absent[0]}, which {index} names, is not there")
        self._check_names(index, json.loads(text)["weight_map"].keys())
        return [index, *shards]

    def _check_names(self, index: str, names: Set[str]) -> None:
        """The index names each tensor of the config's model, and no others."""
        family = FAMILIES[self._config["model_type"]]
        if not any(name.startswith(family.prefix) for name in names):  # of the bare model
            names = {name if name == HEAD else family.prefix + name for name in names}
        config = build_config(self._config, tied=HEAD not in names)
        layers = max(config.cache_shape[0], getattr(config, "num_layers", 0))
        if layers > len(names):
            raise UserError(
                f"{self._named}: config.json says {layers:,} layers, but {index} names {len(names):,} tensors"
            )
        expected = set(family.hf_keys(config).values())
        missing = sorted(expected - names - set(family.embedding))  # any of its names will do
        other = sorted(names - expected - {HEAD, *family.embedding})
        other = [name for name in other if not family.ignored.fullmatch(name)]
        if missing or other:
            wrong = f"names no {missing[0]}" if missing else f"names {other[0]}"
            raise UserError(f"{self._named}: {index} {wrong}, and so is not that of the model in config.json")


def pull(
    repo_id: str, folder: Path, revision: str = "main", pickles: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Returns the folder, which now holds the repository's model; a pull that broke off before goes on.

    Everything is written beside the folder and verified against the sizes the hub announced, then named.

    Args:
        repo_id: "owner/name".
        folder: Must not exist yet.
        revision: A branch, a tag or a commit. Where `main` has no safetensors, the newest pull request that has them is
            taken.
        pickles: Whether pickled weights are taken where the revision has no safetensors; no pull request is.
        say: Is told, a line each, what the user should know of what was taken.

    Raises:
        UserError: The repository, its family or its weights are not what Babl can load, the disk is too small, or the
            hub cannot be reached or does not let us in; the message says what to do.
    """
    import httpx  # what huggingface_hub speaks, and whose errors it lets through

    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain HTTP, which can go on in the middle of a file
    from huggingface_hub import HfApi, errors

    if folder.exists():
        raise UserError(f"{folder} is there already; remove it, or choose another --to")
    aside = folder.with_name(f".{folder.name}.part")
    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        try:
            repository, weights = _choose(api, repo_id, revision, pickles, aside, say)
        except (UserError, errors.GatedRepoError):
            shutil.rmtree(aside, ignore_errors=True)  # nothing to go on with
            raise
        names = list(dict.fromkeys([*(name for name in COMPANIONS if name in repository.sizes), *weights]))
        _check_room(folder, sum(repository.sizes[name] for name in names))
        for name in names:
            repository.fetch(name)
        _keep_only(aside, names)
    except errors.HFValidationError as error:
        raise UserError(f"{str(error).splitlines()[0]}") from None
    except errors.GatedRepoError:
        url = f"https://huggingface.co/{repo_id}"
        raise UserError(
            f"{repo_id} is gated: accept its terms at {url}, then set HF_TOKEN or `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"--revision: {repo_id} has no branch, tag or commit {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repo_id}: no such repository, or a private one (then set HF_TOKEN); OWNER/NAME?") from None
    except (
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        httpx.HTTPError,
        errors.LocalEntryNotFoundError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the hub did not give {repo_id} ({reason}); run again to go on, set HF_ENDPOINT to a mirror, or copy a "
            f"downloaded folder to {folder}"
        ) from None
    except OSError as error:
        raise UserError(f"{aside} cannot be written ({error}); run again to go on") from None
    aside.rename(folder)
    if PICKLE in weights or PICKLE_INDEX in weights:
        say(f"{folder} holds pickles, which Babl does not load; `babl convert {folder}` writes them as safetensors")
    return folder


def _choose(
    api: Any, repo_id: str, revision: str, pickles: bool, aside: Path, say: Callable[[str], None]
) -> tuple[Repository, list[str]]:
    """Returns the commit to fetch from and the files of its weights; the other arguments are those of `pull`."""
    repository = Repository(api, repo_id, revision, aside)
    repository.check_config()
    if weights := repository.weights():
        return repository, weights
    pickled = repository.weights(PICKLE, PICKLE_INDEX)
    if pickles and pickled:
        return repository, pickled
    if not pickles and revision == "main" and (request := _pull_request(api, repo_id)):
        repository = Repository(api, repo_id, request, aside)
        repository.check_config()
        otherwise = "; --pickles takes the pickles of main, for `babl convert`" if pickled else ""
        say(f"main has no safetensors: taking {request}, a pull request that nobody has merged{otherwise}")
        return repository, repository.weights()
    if not pickled:
        raise UserError(f"{repo_id} has no weights on {revision} (expected {SINGLE} or {INDEX})")
    raise UserError(
        f"{repo_id} has no safetensors, only {pickled[-1]}, a pickle, which can run code when read; "
        f"`babl pull {repo_id} --pickles` fetches it, and `babl convert` then reads it without running any"
    )


def _pull_request(api: Any, repo_id: str) -> str | None:
    """Returns the newest pull request with weights in safetensors, as `refs/pr/N`."""
    from huggingface_hub import errors

    try:
        requests = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
    except errors.HfHubHTTPError as error:
        if error.response.status_code != 404:
            raise
        return None  # a mirror that does not know of pull requests
    newest = sorted((found.ref for found in requests), key=lambda ref: int(Path(ref).name), reverse=True)
    for ref in newest[:PULL_REQUESTS]:
        if api.get_paths_info(repo_id, [SINGLE, INDEX], revision=ref):
            return ref
    return None


def _keep_only(aside: Path, names: list[str]) -> None:
    """The folder holds these files alone: no notes of the library, and nothing of another commit."""
    shutil.rmtree(aside / ".cache", ignore_errors=True)
    for path in aside.iterdir():
        if path.name not in names:
            path.unlink()


def _check_room(folder: Path, needed: int) -> None:
    """The disk has room for the files, or an error says how much is missing; what has arrived before is not counted."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.part")
    arrived = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()) if aside.exists() else 0
    missing, free = needed - arrived + SPARE, shutil.disk_usage(folder.parent).free
    if missing > free:
        raise UserError(f"--to: {folder.parent} has {free >> 20:,} MiB free, but {missing >> 20:,} MiB are needed")
