"""Google's buckets, tried again for two minutes where gcsfs gives up after half a minute.

`rfl_jax.files` tells fsspec of it, by which all that opens `gs://` comes here: epath, Orbax and our own reading and
writing. Arrays go through tensorstore, which is patient of itself.
"""

import logging
import sys
import time
from typing import Any, ClassVar

import gcsfs

from rfl_jax.errors import first_line, is_passing

ROUNDS = 4  # of gcsfs' own six attempts, which take half a minute
SAID_FOR_S = 60

# What fails in the end is raised; before that gcsfs would print a traceback of it.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


class Bucket(gcsfs.GCSFileSystem):
    """As gcsfs' own, but patient."""

    _said: ClassVar[float] = -SAID_FOR_S

    async def _request(self, *args: Any, **options: Any) -> Any:
        for _ in range(ROUNDS - 1):
            try:
                return await super()._request(*args, **options)
            except Exception as error:
                if not is_passing(error):
                    raise
                self._say(error)
        return await super()._request(*args, **options)

    @classmethod
    def _say(cls, error: Exception) -> None:
        """One line of all the requests that wait."""
        now = time.monotonic()
        if now - cls._said >= SAID_FOR_S:
            cls._said = now
            print(
                f"gs://: trying again, as the network failed ({first_line(error)[:200]})", file=sys.stderr, flush=True
            )
