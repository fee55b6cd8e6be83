"""A converted folder to the Hub, by huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, UsageError
from ..loading import HUB_ID
from .journal import JOURNAL


def check_repo(repo: str) -> None:
    """Raise UsageError for what is not owner/name."""
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"upload_repo {repo!r} is not a Hub id (owner/name)")


def upload(folder: Path, repo: str) -> None:
    """Create `repo` if need be and send the folder. Files that an interrupted upload had sent are not sent again.

    Raises InputError if the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type="model", folder_path=folder, ignore_patterns=[JOURNAL])
    except Exception as error:  # the hub client lets through what its HTTP library raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{repo}: the upload failed ({reason}); {folder} is whole, send it with hf upload") from None
