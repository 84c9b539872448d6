"""Models by their names on the Hugging Face hub: fetched into its cache, and sent there.

A name is OWNER/NAME or OWNER/NAME@REVISION, as huggingface_hub's file systems write it. Nothing is
asked of the network unless one is given.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mass_dpo_jax.errors import UserError

# Owner and name as the hub allows them; a revision is a branch, a tag or a commit.
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")
WEIGHTS = ("*.safetensors",)
# Other folders hold the same weights for other programs, and consolidated* Mistral's own format.
IGNORED = ("*/*", "consolidated*")
LOGIN = "`hf auth login` (or HF_TOKEN) gives access to private and gated models"

_log = logging.getLogger(__name__)


def is_name(path: str) -> bool:
    """Whether a path is a model's name on the hub and not a path on this machine.

    A folder of that name is taken first, and where the part before the slash is a folder here, the
    whole is a path with a mistake in it.
    """
    return bool(_NAME.fullmatch(path)) and not Path(path.split("/")[0]).exists()


def without_revision(path: str) -> str:
    """Returns a model's name on the hub without its revision, and any other path as it is."""
    return split_name(path)[0] if is_name(path) else path


def fetch_model(name: str, setting: str, weights: bool = True) -> str:
    """Downloads a model, if the cache does not have it, and returns its folder in the cache.

    Args:
        name: the name, OWNER/NAME or OWNER/NAME@REVISION.
        setting: the setting that gives the name, for messages.
        weights: False to leave the weights out.

    Raises:
        UserError: there is no such model, it may not be read, or the network fails.
    """
    from huggingface_hub import snapshot_download

    repo, revision = split_name(name)
    patterns = [*SMALL, *(WEIGHTS if weights else ())]
    with _explain_errors(f"config.{setting}={name}"):
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(IGNORED)
        )
    _log.info(f"{name}: revision {Path(folder).name[:12]}, in {folder}")
    return folder


def describe_push(folder: Path, name: str, public: bool) -> Iterator[str]:
    """Yields lines that say what `push_folder` would send."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    kind = "public" if public else "private"
    total = sum(path.stat().st_size for path in files)
    yield f"{name} on the hub, {kind} if it is new: {len(files)} files, {total / 1e9:.3f} GB"
    for path in files:
        yield f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes"


def push_folder(folder: Path, name: str, public: bool, message: str) -> str:
    """Sends a folder to the hub as one commit, and returns its address.

    A repository that is not there is made. In one that is, weights of other names are removed, so
    that none of an earlier model are left beside the new ones; its history keeps them.

    Args:
        folder: the folder of a model or of adapters.
        name: OWNER/NAME.
        public: whether a new repository can be read by everybody.
        message: the commit's message.

    Raises:
        UserError: the name is none, nobody is logged in, it may not be written, or the network
            fails.
    """
    from huggingface_hub import HfApi

    check_push_name(name)
    api = HfApi()
    with _explain_errors(f"--push={name}"):
        api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    return str(commit.commit_url)


def check_push_name(name: str) -> None:
    """Raises UserError for what cannot be a repository's name."""
    match = _NAME.fullmatch(name)
    if not match or match["revision"]:
        raise UserError(f"--push={name}: expected OWNER/NAME, a model's name on the hub")


def split_name(name: str) -> tuple[str, str | None]:
    """Returns the repository and the revision, if there is one, of a name."""
    match = _NAME.fullmatch(name)
    assert match, name
    return match["repo"], match["revision"]


@contextmanager
def _explain_errors(given: str) -> Iterator[None]:
    """Turns what the hub and the network can raise into one line after what was given."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{given}: a gated model; ask for access on its page on huggingface.co, then {LOGIN}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{given}: the model is there, but no branch, tag or commit of this name"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{given}: no such folder here, and no such model on the hub, or a private one; {LOGIN}"
        ) from None
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{given}: nobody is logged in; {LOGIN}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{given}: no such folder here, not whole in the hub's cache, and the hub cannot be "
            "reached (is HF_HUB_OFFLINE set?)"
        ) from None
    except Exception as error:  # Anything from no network to a full disk.
        raise UserError(f"{given}: {' '.join(str(error).split())[:300]}") from None
