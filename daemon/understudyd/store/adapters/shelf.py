"""The adapters of a store folder: which there are, their records. No torch here.

As with models nothing is locked: an adapter appears and disappears by one rename.
"""

import re
import stat
from pathlib import Path

import msgspec

from understudyd.store.adapters.records import AdapterRecord
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import FORMAT_VERSION
from understudyd.store.safetensors_file import DTYPE_BITS
from understudyd.store.store import Store, check_name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class AdapterShelf:
    """A store's adapters. Safe to use while another process writes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.path / "adapters"
        self._decoder = msgspec.json.Decoder(AdapterRecord)

    def folder(self, name: str) -> Path:
        """Where an adapter's manifest is, whether or not it exists. Raises `StoreError(bad_name)`."""
        return self._path / check_name(name)

    def names(self) -> list[str]:
        """Every adapter's name, sorted, the damaged ones included."""
        if not self._path.is_dir():
            return []
        return sorted(entry.name for entry in self._path.iterdir() if _NAME.fullmatch(entry.name))

    def scan(self) -> tuple[dict[str, AdapterRecord], dict[str, str]]:
        """Every usable adapter by name, and why each other one cannot be used."""
        found: dict[str, AdapterRecord] = {}
        damaged: dict[str, str] = {}
        for name in self.names():
            try:
                found[name] = self.adapter(name)
            except StoreError as error:
                if error.code is not StoreErrorCode.NOT_FOUND:  # removed since it was listed
                    damaged[name] = error.message
        return found, damaged

    def adapter(self, name: str) -> AdapterRecord:
        """One adapter's record, read afresh.

        Raises `StoreError`: `bad_name`, `not_found`, or `corrupt_store` when its manifest cannot be read or
        its blob is missing or of the wrong length.
        """
        path = self.folder(name) / "manifest.json"
        try:
            record = self._decoder.decode(path.read_bytes())
        except FileNotFoundError as error:
            raise StoreError(
                StoreErrorCode.NOT_FOUND, f"the store has no adapter {name!r}; see its list of adapters"
            ) from error
        except OSError as error:
            raise _damaged(f"{path} cannot be read ({error.strerror})") from error
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise _damaged(f"{path.name} of {name} is not what the store wrote ({error})") from error
        if record.format_version != FORMAT_VERSION or record.name != name:
            raise _damaged(f"{path.name} of {name} is of format {record.format_version}, {record.name!r:.80}")
        self._check(record)
        return record

    def _check(self, record: AdapterRecord) -> None:
        blob = record.blob
        path = self._store.blob_path(blob.sha256)
        try:
            status = path.lstat()
        except OSError as error:
            raise _damaged(f"the blob {path.name} cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode) or status.st_size != blob.data_start_bytes + blob.size_bytes:
            raise _damaged(f"the blob {path.name} is not as long as it was")
        for target in record.targets:
            for factor in (target.down, target.up):
                fits = factor.offset >= 0 and factor.offset + factor.size_bytes <= blob.size_bytes
                if not fits or factor.dtype not in DTYPE_BITS:
                    raise _damaged(f"{factor.path} does not lie in its blob")


def _damaged(why: str) -> StoreError:
    return StoreError(StoreErrorCode.CORRUPT_STORE, f"{why}; remove the adapter and add it again")
