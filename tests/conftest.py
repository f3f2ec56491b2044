"""What several tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of real data, tokenizers and checkpoints beside the project."""
    folder = Path(os.environ.get("BABL_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set BABL_SHARED)")
    return folder
