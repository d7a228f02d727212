"""Reading a bucket by paths: gcsfs, whose errors are OSErrors here.

Those who read a workdir expect of a bucket what a file system does: an OSError in one line.  gcsfs
raises an exception of its own (`HttpError`), or that of its HTTP client, once it has tried six
times, within half a minute.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

# gcsfs reads this when it is imported, by whomever.  Else it asks another service for the kind of
# the bucket, with a warning at every access where it is not allowed to.  "true": zonal buckets.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@functools.cache
def register() -> None:
    """Has paths at gs:// read by our class, those of Orbax too."""
    import fsspec

    for scheme in ("gs", "gcs"):
        fsspec.register_implementation(scheme, file_system_class(), clobber=True)


@functools.cache
def file_system_class() -> Any:
    """The class; made when it is needed, since gcsfs belongs to an extra."""
    import gcsfs

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints pages of what it then raises

    from dsmoe_jax.storage.away import away, first_line, is_away

    class FileSystem(gcsfs.GCSFileSystem):
        """All its requests pass through this one method, tries included."""

        async def _request(self, method: str, path: str, *args: str, **options: Any) -> Any:
            try:
                return await super()._request(method, path, *args, **options)
            except (FileNotFoundError, FileExistsError):
                raise  # answers
            except Exception as error:
                what = f"gs://{'/'.join(args) or path}"
                if is_away(error):
                    raise away(what, error) from error
                if isinstance(error, (OSError, ValueError)):
                    raise
                raise OSError(f"{what}: cannot be read: {first_line(error)}") from error

    return FileSystem
