"""A bucket that is away: its service or the network to it does not answer, and may do so later.

Four libraries reach a bucket (google-cloud-storage, gcsfs, tensorstore, and Orbax with all three),
and each has errors of its own, most of which are no OSError.  They are told apart here: what comes
from a bucket that is away is `Away`, after which the same command goes on; the rest (a bucket that
is forbidden, an object that is missing) is an OSError, which the same command would meet again.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator

# Each library tries again by itself, for half a minute and more, before its error comes here.
_CODES = {408, 429, *range(500, 600)}
_FROM_TENSORSTORE = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED): ")
_LONGEST = 200  # of what a library says, so that it can be part of a line


class Away(OSError):
    """A bucket does not answer now; nothing is lost, and the same command goes on.

    Attributes:
      exit_code: EX_TEMPFAIL: a launcher starts the command again.
    """

    exit_code = os.EX_TEMPFAIL


@contextlib.contextmanager
def naming(what: object, wrong: str = "cannot be written") -> Iterator[None]:
    """Makes an OSError in one line of whatever the libraries say of a bucket.

    Args:
      what: the path, or the user's key with its value, with which the line begins.
      wrong: what the error means, if the bucket answers.

    Raises:
      FileNotFoundError, FileExistsError: as they are; they answer a question.
      OSError: `Away` if the bucket does not answer.
    """
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (FileNotFoundError, FileExistsError, Away):
        raise
    except (OSError, GoogleAPIError, GoogleAuthError) as error:
        if is_away(error):
            raise away(what, error) from error
        raise OSError(f"{what}: {wrong}: {first_line(error)}") from error


def away(what: object, error: BaseException) -> Away:
    """The error of a bucket that is away, by what a library said."""
    return Away(f"{what}: the bucket does not answer ({first_line(error)}); try again later")


def is_away(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, says that a bucket does not answer."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if _says_so(cause):
            return True
        seen.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def _says_so(error: BaseException) -> bool:
    if isinstance(error, (Away, ConnectionError, TimeoutError, socket.gaierror)):
        return True
    if isinstance(error, ValueError):  # tensorstore has no classes of its own
        return _FROM_TENSORSTORE.search(str(error)) is not None
    import aiohttp
    import requests
    from gcsfs.retry import HttpError
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError

    of_the_network = (
        aiohttp.ClientConnectionError,
        aiohttp.ClientPayloadError,
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        exceptions.RetryError,
        TransportError,
    )
    if isinstance(error, of_the_network):
        return True
    return isinstance(error, (HttpError, exceptions.GoogleAPICallError)) and error.code in _CODES


def first_line(error: BaseException) -> str:
    """The first line of what an error says, short enough to be part of a line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
