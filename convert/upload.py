"""A converted folder to the Hub, by huggingface_hub."""

from __future__ import annotations

import gc
import shlex
import sys
from pathlib import Path

from ..errors import InputError, UsageError
from ..loading import HUB_ID
from .journal import JOURNAL


def check_repo(repo: str) -> None:
    """Raise UsageError for what is not owner/name as the Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(repo, str) or not HUB_ID.fullmatch(repo):
        raise UsageError(f"upload_repo {repo!r} is not a Hub id (owner/name)")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"upload_repo {repo!r}: {' '.join(str(error).split())}") from None


def upload(folder: Path, repo: str) -> None:
    """Create `repo` if need be and send the folder. What an interrupted upload had sent is not sent again.

    Raises InputError if the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api, again = HfApi(), shlex.join(["hf", "upload", repo, str(folder), "--exclude", JOURNAL])
    try:
        api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type="model", folder_path=folder, ignore_patterns=[JOURNAL])
        return
    except KeyboardInterrupt:
        print(f"{folder} is whole, send the rest with: {again}", file=sys.stderr)
        raise
    except Exception as error:  # the hub client lets through what its HTTP library raises
        reason = " ".join(_reason(error).split())[:200]
    gc.collect()  # progress bars that the client leaves open are drawn once more when they go: now, not after our line
    raise InputError(f"{repo}: the upload failed ({reason}); {folder} is whole, send the rest with: {again}")


def _reason(error: BaseException) -> str:
    """What the Hub answered, else what went wrong first: the client puts texts of its own around both."""
    from huggingface_hub.errors import HfHubHTTPError

    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        return f"{type(error).__name__}: {error}"
    response = error.response
    hint = "; hf auth login stores a token" if response.status_code == 401 else ""
    return f"{response.status_code} {response.reason_phrase}: {error.server_message or response.url}{hint}"
