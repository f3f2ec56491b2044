"""Fetches the official SQuAD files, verifies them, and cuts a validation slice that shares no article with training.

python scripts/prepare_squad.py --version 1.1 --to data/squad
"""

import argparse
import hashlib
import json
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from babl.data.articles import split_by_article
from babl.data.squad import load_squad, to_squad
from babl.errors import UserError
from babl.files import write_whole

URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
BLOBS = {  # git's id of each file's content, which does not change where it is served from
    "1.1": {
        "train-v1.1.json": "77f1d9a7daee11f7bc293832020f7709f63410ad",
        "dev-v1.1.json": "e9a3f913ad1468ebe105b891334ca7b0bc0e2510",
    },
    "2.0": {
        "train-v2.0.json": "312f804dbf85888fdce3299eaa58d6ec3f0bb6b7",
        "dev-v2.0.json": "c6fa1a89a12c90b7fbfa8f6fb437cfff27af41ca",
    },
}
CHUNK = 1 << 16  # bytes
ROOM = 200 << 20  # bytes: the larger version, its slices, and a little


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--to", type=Path, default=Path("data/squad"), metavar="DIR")
    parser.add_argument("--version", choices=BLOBS, default="1.1")
    parser.add_argument("--fraction", type=float, default=0.05, help="share of the questions held out (default 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="which articles are held out")
    parser.add_argument("--base-url", default=URL)
    args = parser.parse_args(argv)
    try:
        prepare(args.to, BLOBS[args.version], args.base_url, args.fraction, args.seed)
    except UserError as error:
        print(f"prepare_squad: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(folder: Path, blobs: dict[str, str], base_url: str, fraction: float, seed: int) -> None:
    """The folder holds the verified files, and the training file cut into -train and -validation."""
    if not 0 < fraction < 1:
        raise UserError(f"--fraction is {fraction}, expected more than 0 and less than 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to: {folder} cannot be written ({error.strerror})") from None
    if shutil.disk_usage(folder).free < ROOM:
        raise UserError(f"--to: {folder} has less than {ROOM >> 20} MiB free")
    for name, blob in blobs.items():
        file = folder / name
        if not (file.exists() and blob_id(file) == blob):
            fetch(f"{base_url}/{name}", file, blob)
        print(f"{file}: verified")
        if name.startswith("train"):
            for part, examples in zip(
                ("train", "validation"), split_by_article(load_squad(file, tell=print), fraction, seed), strict=True
            ):
                target = file.with_name(f"{file.stem}-{part}.json")
                write_whole(target, json.dumps(to_squad(examples)))
                print(f"{target}: {len(examples):,} questions of {len({e.title for e in examples})} articles")


def fetch(url: str, file: Path, blob: str) -> None:
    """The file is there and is the one the blob id names; a download that broke off before goes on."""
    part = file.with_name(file.name + ".part")
    by_hand = f"download {url} yourself and put it at {file}"
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            resumed = response.status == 206
            total = int(response.headers.get("Content-Length", 0)) + (have if resumed else 0)
            with (
                part.open("ab" if resumed else "wb") as out,
                tqdm(total=total or None, initial=out.tell(), desc=file.name, unit="B", unit_scale=True) as bar,
            ):
                while chunk := response.read(CHUNK):
                    out.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after what we have, which is therefore not what we want
            part.unlink()
            raise UserError(f"{part} did not fit {url} and was removed; run again") from None
        raise UserError(f"{url} answered {error.code} {error.reason}; {by_hand}") from None
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{url} cannot be reached ({error}); run again to go on, or {by_hand}") from None
    if total and part.stat().st_size < total:
        raise UserError(f"{url} broke off at {part.stat().st_size} of {total} bytes; run again to go on")
    found = blob_id(part)
    if found != blob:
        part.unlink()
        raise UserError(f"{url} is not the official file: git blob id {found}, expected {blob}; nothing was kept")
    part.rename(file)


def blob_id(file: Path) -> str:
    """Returns git's id of the file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
