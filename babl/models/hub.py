"""Model folders from the Hugging Face hub, or whatever `HF_ENDPOINT` names: safetensors, tokenizer and config alone."""

import os
import shutil
from pathlib import Path
from typing import Any

from babl.errors import UserError
from babl.models.weights import INDEX, PICKLES, SINGLE, read_config
from babl.text.tokenizer import SIDE_FILES, TOKENIZER_FILES

CONFIGS = ("config.json", "generation_config.json")
SPARE = 64 << 20  # bytes of disk to leave free


def pull(repo_id: str, folder: Path, revision: str = "main") -> Path:
    """Returns the folder, which now holds the repository's model; a pull that broke off before goes on.

    Everything is written beside the folder and verified against the sizes the hub announced, then named.

    Args:
        repo_id: "owner/name".
        folder: Must not exist yet.
        revision: A branch, a tag or a commit.

    Raises:
        UserError: The repository, its family or its weights are not what Babl can load, the disk is too small, or the
            hub cannot be reached or does not let us in; the message says what to do.
    """
    import httpx  # what huggingface_hub speaks, and whose errors it lets through

    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain HTTP, which can go on in the middle of a file
    from huggingface_hub import HfApi, errors, hf_hub_download

    if folder.exists():
        raise UserError(f"{folder} is there already; remove it, or choose another --to")
    aside = folder.with_name(f".{folder.name}.part")
    try:
        api = HfApi()
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        small = [name for name in (*CONFIGS, *TOKENIZER_FILES, *SIDE_FILES, INDEX) if name in sizes]
        weights = _weights(repo_id, sizes)
        _check_room(folder, sum(sizes[name] for name in {*small, *weights}))

        def fetch(name: str) -> None:
            path = Path(hf_hub_download(repo_id, name, revision=info.sha, local_dir=aside))
            if path.stat().st_size != sizes[name]:
                path.unlink()
                raise UserError(f"{name} arrived with another size than the {sizes[name]} bytes announced; run again")

        for name in small:
            fetch(name)
        try:
            read_config(aside)  # a family that cannot be loaded is known before its weights are fetched
        except UserError as error:
            shutil.rmtree(aside)
            raise UserError(f"{repo_id}: {str(error).removeprefix(f'{aside}/')}") from None
        for name in weights:
            fetch(name)
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
    shutil.rmtree(aside / ".cache", ignore_errors=True)  # the library's notes on what has arrived
    aside.rename(folder)
    return folder


def _weights(repo_id: str, sizes: dict[str, Any]) -> list[str]:
    """Returns the names of the weight files, single or sharded, of a repository."""
    if INDEX in sizes:
        stem = SINGLE.removesuffix(".safetensors")
        shards = sorted(n for n in sizes if n.startswith(f"{stem}-") and n.endswith(".safetensors"))
        if shards:
            return shards
    if SINGLE in sizes:
        return [SINGLE]
    pickles = sorted(name for name in sizes if any(Path(name).match(pattern) for pattern in PICKLES))
    if pickles:
        raise UserError(
            f"{repo_id} has no safetensors, only {pickles[0]}, a pickle, which can run code when read; look for a "
            "revision or a copy in safetensors"
        )
    raise UserError(f"{repo_id} has no weights (expected {SINGLE} or {INDEX})")


def _check_room(folder: Path, needed: int) -> None:
    """The disk has room for the files, or an error says how much is missing; what has arrived before is not counted."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.part")
    arrived = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()) if aside.exists() else 0
    missing, free = needed - arrived + SPARE, shutil.disk_usage(folder.parent).free
    if missing > free:
        raise UserError(f"--to: {folder.parent} has {free >> 20:,} MiB free, but {missing >> 20:,} MiB are needed")
