"""Repositories of the Hugging Face Hub, by names such as ``hf-hub:org/name@revision``; huggingface_hub transports them.

A name that begins so is the only thing that makes a program download weights by itself. Only chosen files of the top
folder are fetched, never Python or pickles. What is in the local cache is used where the Hub cannot be reached, and
with ``HF_HUB_OFFLINE=1``. Several processes may ask for the same files: huggingface_hub locks each one while it is
downloaded. Messages hold no token.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from egohod.errors import UserError

log = logging.getLogger(__name__)

PREFIX = "hf-hub:"
_NAME = re.compile(r"((?:[\w.-]+/)?[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?")
_LOGIN = "hf auth login, or HF_TOKEN in the environment"
# Files of a Hugging Face tokenizer, of which not every repository has all.
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")


def download(source: str, choose: Callable[[Sequence[str]], Sequence[str]]) -> list[Path]:
    """Files of a repository in the local cache, fetched if they are not there yet.

    Args:
        source: ``hf-hub:org/name``, with ``@`` and a branch, tag or commit behind it if not the newest state.
        choose: names of the files of its top folder -> those to fetch; may raise :class:`UserError`.

    Returns:
        Their paths, in the order of ``choose``, all in one folder.

    Raises:
        UserError: one line without ``source``: a malformed name, no such repository or revision, no permission, no
            network and nothing in the cache, a full disk.
    """
    repository, revision = _parse(source)
    from huggingface_hub import HfApi, constants, snapshot_download

    offline = ""
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = [each.rfilename for each in info.siblings or ()]
    except Exception as error:  # the network has many ways to fail
        status = getattr(getattr(error, "response", None), "status_code", 500)
        reason = _reason(error, revision)
        # A refusal is an answer; without an answer the cache is as good as it gets.
        if status < 500 and status != 429:
            raise UserError(reason) from None
        offline = f"{reason}; and there is no complete copy in the local cache ({constants.HF_HUB_CACHE})"
        with _one_line(revision, offline):
            folder = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[])
        names = [each.name for each in Path(folder).iterdir()]
        if not constants.HF_HUB_OFFLINE:
            log.warning("%s: %s; the copy in the local cache is used, commit %s", source, reason, Path(folder).name)
    # Only plain names: nothing from the other end may lead elsewhere, or mean a pattern.
    plain = [name for name in names if re.fullmatch(r"\w[\w.-]*", name)]
    try:
        chosen = list(choose(plain))
    except UserError:
        # What the cache lacks of a download that was interrupted, the repository may have.
        if offline:
            raise UserError(offline) from None
        raise
    if not chosen:
        return []
    with _one_line(revision, offline):
        # By the revision's name: the cache then knows its commit without the Hub, too.
        folder = snapshot_download(repository, revision=revision, allow_patterns=chosen, local_files_only=bool(offline))
    return [Path(folder) / name for name in chosen]


def tokenizer_files(names: Sequence[str]) -> list[str]:
    """Those of ``names`` that a tokenizer is made of; never Python, which some repositories bring along."""
    return [
        name
        for name in names
        if any(fnmatchcase(name, each) for each in _TOKENIZER_FILES) and not name.endswith((".py", ".bin"))
    ]


def folder_of(source: str, choose: Callable[[Sequence[str]], Sequence[str]]) -> Path | None:
    """The local folder of :func:`download`, None if nothing was chosen; its errors begin with ``source``."""
    try:
        return next((file.parent for file in download(source, choose)), None)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def upload(folder: Path, repository: str, *, private: bool = False, message: str = "Upload") -> str:
    """Make ``folder`` the newest state of a repository, which is created if it does not exist; returns its address.

    Files that are only there stay. Raises :class:`UserError` in one line, also for ``private`` where the repository
    exists and is public.
    """
    repository, revision = _parse(repository)
    from huggingface_hub import HfApi

    if "/" not in repository:
        raise UserError(
            f"{repository}: a repository to write to is named org/name, org being your user or organisation"
        )
    with _one_line(revision, where=f"{PREFIX}{repository}: "):
        api = HfApi()
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        # One that exists stays as it is.
        is_public = private and not api.model_info(repository).private
    if is_public:
        raise UserError(f"{PREFIX}{repository}: exists and is public, not private; nothing was uploaded")
    with _one_line(revision, where=f"{PREFIX}{repository}: "):
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, revision=revision)
    return address


def _parse(source: str) -> tuple[str, str | None]:
    # As late as this: most programs need no Hub, and importing it costs half a second.
    from huggingface_hub import errors, utils

    match = _NAME.fullmatch(source.removeprefix(PREFIX))
    try:
        if match is None or ".." in source:
            raise errors.HFValidationError
        utils.validate_repo_id(match[1])
    except errors.HFValidationError:
        text = f"not the name of a repository, which is {PREFIX}org/name or {PREFIX}org/name@revision"
        raise UserError(text) from None
    return match[1], match[2]


@contextmanager
def _one_line(revision: str | None, instead: str = "", where: str = "") -> Iterator[None]:
    """Turn whatever goes wrong within into a :class:`UserError` of one line: ``instead``, or what the error means."""
    try:
        yield
    except Exception as error:  # the network has many ways to fail
        # Without its cause, whose text may hold a token that a traceback would print.
        raise UserError(where + (instead or _reason(error, revision))) from None


def _reason(error: BaseException, revision: str | None) -> str:
    """What an error of huggingface_hub means, and what to do about it; without any token."""
    from huggingface_hub import constants, errors, get_token

    # What a search in the cache ended in was caused by the answer of the Hub.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its conditions on its page, then log in ({_LOGIN})"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision '{revision or 'main'}'"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private: check the name, or log in ({_LOGIN})"
    if status in (401, 403):
        return f"the Hub refuses access ({status}): the token is missing, wrong or has no permission ({_LOGIN})"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1, so the Hub is not contacted"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk of the local cache ({constants.HF_HUB_CACHE}) is full"
    if "Invalid metadata in README.md" in str(error):  # such as a licence that the Hub does not know
        return f"the Hub refuses the model card: {' '.join(str(error).split())[:300]}"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # Some errors quote headers or addresses with what they were made of.
    text = f"no answer from the Hub ({constants.ENDPOINT}): {text}"
    text = re.sub(r"//[^/@\s]*@", "//***@", text)
    if token := get_token():
        text = text.replace(token.strip(), "***")
    return f"the Hub answered {status}" if status else re.sub(r"hf_\w{4,}", "***", text)[:300]
