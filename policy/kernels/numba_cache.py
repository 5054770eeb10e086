"""Compiled code that numba keeps on disk: checked when read, and where anything fails, compiled anew."""

import contextlib
import functools
import hashlib
import os
import pickle
import sys
from pathlib import Path

from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile


def keep(compiled):
    """``compiled``, a function of ``njit`` or a ``CFunc`` before its compilation, whose code is kept on disk."""
    source = Path(compiled.__wrapped__.__code__.co_filename)
    try:
        compiled._cache = _Cache(compiled.__wrapped__)
    except RuntimeError:  # numba found no folder
        _tell(config.CACHE_DIR or source.parent / "__pycache__", "not writable")
    return compiled


@functools.cache  # a line for each folder
def _tell(folder, reason):
    advice = "compiling anew; NUMBA_CACHE_DIR names another folder"
    print(f"numba: cannot use the cache in {folder} ({reason}): {advice}", file=sys.stderr)


class _Cache(FunctionCache):
    """numba's cache whose failures are no errors: what it cannot read or write it drops."""

    def __init__(self, function):
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _SealedFiles(self.cache_path, f"{self._impl.filename_base}-sealed", stamp)

    def load_overload(self, *arguments):
        with self._forgiven("damaged or unreadable"):
            return super().load_overload(*arguments)

    def save_overload(self, *arguments):
        with self._forgiven("not writable"):
            super().save_overload(*arguments)

    @contextlib.contextmanager
    def _forgiven(self, reason):
        try:
            yield
        except Exception as error:  # a damaged pickle may raise anything
            _tell(self.cache_path, getattr(error, "strerror", None) or reason)
            with contextlib.suppress(OSError):
                os.unlink(self._cache_file._index_path)  # or it would name code that another source left there


class _SealedFiles(IndexDataCacheFile):
    """Compiled code with a digest: a flipped bit would run. ValueError for another digest, source or signature."""

    def save(self, key, data):
        content = self._dump((self._source_stamp, key, data))
        super().save(key, (hashlib.sha256(content).digest(), content))

    def load(self, key):
        sealed = super().load(key)
        if sealed is None:
            return None
        digest, content = sealed
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("digest: got another one than that of the code")
        *origin, data = pickle.loads(content)
        if origin != [self._source_stamp, key]:
            raise ValueError("code: got that of another source or signature")
        return data
