"""Says in one line why a model cannot be fetched from the Hub, and what to do."""

import errno

from lsjax.errors import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def explain(error: Exception, text: str, repository: str, revision: str | None, file: str = "") -> UserError:
    """Returns the error of huggingface_hub as a UserError.

    text: the name that was given. repository: org/name. file: the file that was being fetched; empty before the first.
    """
    from huggingface_hub import constants, errors

    # huggingface_hub wraps the reason when it has looked in its cache as well.
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    hub = constants.ENDPOINT
    missing = f"no model at {text}: no such file or folder here"
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{repository} is gated: accept its conditions at {hub}/{repository}, then log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may read it"
        )
    # A stranger who asks for a repository that is private, or is not there, gets the status 401 for both.
    status, token_is_bad = _status(error)
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and not token_is_bad):
        return UserError(
            f"{missing}, and {hub} shows no model {repository}: correct the name, or, if it is private, set HF_TOKEN "
            "to a token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"{repository} on the Hub has no revision {revision}: give one of its branches, tags or commits"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(
            f"{missing}, and huggingface_hub's cache {constants.HF_HUB_CACHE} does not hold all of it; unset "
            "HF_HUB_OFFLINE to fetch it"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return UserError(f"{repository} on the Hub has no file {file}")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{missing}, and this is no name of a model on the Hub: {_first_line(error)}")
    if status is not None:
        return _refused(status, hub, repository)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return UserError(
            f"cannot write to huggingface_hub's cache {constants.HF_HUB_CACHE} ({error.strerror}): free space there, "
            "or set HF_HOME to another folder"
        )
    return UserError(
        f"{missing}, and {hub} cannot be reached ({_first_line(error)}): check the network, or give the path of a model"
    )


def _refused(status: int, hub: str, repository: str) -> UserError:
    if status == 401:
        return UserError(f"{hub} does not accept your token: correct HF_TOKEN, or log in with `hf auth login`")
    if status == 403:
        return UserError(f"{hub} does not let your token read {repository}: set HF_TOKEN to one that may")
    return UserError(f"{hub} answered with status {status} when asked for {repository}: try again later")


def _status(error: Exception) -> tuple[int | None, bool]:
    """Returns the HTTP status that an error is about, if any, and whether the Hub does not know the token."""
    response = getattr(error, "response", None)
    if response is None:
        return None, False
    return response.status_code, "Invalid credentials" in response.headers.get("X-Error-Message", "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
