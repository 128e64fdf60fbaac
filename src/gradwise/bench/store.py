"""The results folder: what has been measured, one JSON file a trial, so that a killed comparison loses only what was running.

    OUT/manifest.json               what this folder is a comparison of; a folder of another one is refused
    OUT/trials/METHOD/tuning-3.json, seed-7.json
    OUT/corrupt/                    files that could not be read back, moved here and never deleted
    OUT/results.json, report.html   written at the end

A file appears whole or not at all (written beside, synced, renamed) and carries a checksum and the hash of the manifest it
belongs to. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from gradwise.core.errors import UserError

SCHEMA = 1
_HASHES = {"data_hash": "its data were other numbers", "task_source": "the task's file has changed since"}


class Store:
    """One results folder, opened by one process at a time.

    Args:
        folder: created when it is not there.
        manifest: what decides the numbers, as nested JSON data. A folder that holds another manifest is refused.
        say: told every line the user should read (a corrupt file, a run that continues).

    Raises:
        UserError: the folder belongs to another comparison (which key differs), holds results of unknown origin, or is in use.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with Store(folder, {"task": "wine"}) as store:
        ...     store.put("adamw", "tuning-0", {"validation": 0.5})
        >>> with Store(folder, {"task": "wine"}) as store:
        ...     store.get("adamw", "tuning-0")
        {'validation': 0.5}
        >>> with Store(folder, {"task": "digits"}) as store:
        ...     pass
        Traceback (most recent call last):
        gradwise.core.errors.UserError: ... holds another comparison (task is 'wine' there and 'digits' here); give another
        --out, ...
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], say: Callable[[str], None] = print) -> None:
        self.folder, self.manifest, self.say = Path(folder), dict(manifest), say
        self.identity = _digest(self.manifest)
        self._trials: dict[tuple[str, str], dict[str, Any]] = {}
        self._lock = FileLock(str(self.folder / ".lock"), timeout=0)

    def __enter__(self) -> Store:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise UserError(f"--out: {self.folder} is being written by another gradwise compare") from None
        except OSError as error:
            raise UserError(f"--out: {self.folder} cannot be used: {error.strerror or error}") from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def __len__(self) -> int:
        return len(self._trials)

    def get(self, method: str, name: str) -> dict[str, Any] | None:
        """A trial kept before, or None.

        Example:
            >>> import tempfile
            >>> with Store(Path(tempfile.mkdtemp()), {}) as store:
            ...     store.get("adamw", "tuning-0") is None
            True
        """
        return self._trials.get((method, name))

    def put(self, method: str, name: str, trial: dict[str, Any]) -> None:
        """Keep a trial, for good once this returns.

        Example:
            >>> import tempfile
            >>> with Store(Path(tempfile.mkdtemp()), {}) as store:
            ...     store.put("adamw", "seed-0", {"test": 0.9})
            ...     len(store)
            1
        """
        path = self._path(method, name)
        try:
            write_json(path, self._sealed({"method": method, "name": name, "trial": trial}))
        except OSError as error:
            raise UserError(f"--out: cannot write {path}: {error.strerror or error}") from error
        self._trials[method, name] = trial

    def _open(self) -> None:
        kept = self._read(self.folder / "manifest.json")
        if kept is not None and kept.get("manifest") != self.manifest:
            if any(self.folder.glob("trials/*/*.json")) or (self.folder / "results.json").exists():
                self._refuse(f"another comparison ({_difference(kept.get('manifest'), self.manifest)})")
            kept = None  # one that never measured anything: there is nothing to lose
        trials = {path: self._read(path) for path in sorted(self.folder.glob("trials/*/*.json"))}
        own = [body for body in trials.values() if body is not None and body.get("identity") == self.identity]
        for path, body in trials.items():
            if body is not None and body not in own:
                self._refuse(f"{path.relative_to(self.folder)} of another comparison")
        if kept is None and not own:
            for name in ("results.json", "report.html"):
                if (self.folder / name).exists():
                    self._refuse(f"{name} of unknown origin")
        for leftover in [*self.folder.glob("*.json.partial"), *self.folder.glob("trials/*/*.json.partial")]:
            leftover.unlink()  # a kill interrupted it; the file it was to become is not there
        if kept is None:
            write_json(self.folder / "manifest.json", self._sealed({"manifest": self.manifest}))
        self._trials = {(body["method"], body["name"]): body["trial"] for body in own}

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"--out: {self.folder} holds {what}; give another --out, or remove that folder")

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A sealed file; one that cannot be read back is said and moved aside."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(body, dict):
                raise ValueError("it holds no table")
            if "checksum" not in body and path.parent == self.folder:
                self._refuse(f"a {path.name} that is not gradwise's")
            if body.pop("checksum", None) != _digest(body):
                raise ValueError("its checksum does not match")
            if path.parent != self.folder and self._path(body["method"], body["name"]) != path:
                raise ValueError("it belongs to another trial")
        except FileNotFoundError:
            return None
        except UserError:
            raise
        except (OSError, KeyError, ValueError) as error:  # not JSON and not UTF-8 are ValueErrors
            aside = self._aside(path)
            self.say(f"{path} is corrupt or truncated ({error}): moved to {aside}; what it held is measured again")
            return None
        return body

    def _aside(self, path: Path) -> Path:
        name = "-".join(path.relative_to(self.folder).parts)
        target = self.folder / "corrupt" / name
        count = 1
        while target.exists():
            target = target.with_name(f"{name}.{count}")
            count += 1
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        return target

    def _sealed(self, body: dict[str, Any]) -> dict[str, Any]:
        body = {"schema": SCHEMA, "identity": self.identity, **body}
        return {**body, "checksum": _digest(body)}

    def _path(self, method: str, name: str) -> Path:
        return self.folder / "trials" / method / f"{name}.json"


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is there whole or not at all, whatever happens meanwhile. NaN and infinities are refused.

    Raises:
        ValueError: a number that is not finite.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "x.json")
        >>> write_json(path, {"a": 1})
        >>> json.loads(path.read_text())
        {'a': 1}
    """
    text = json.dumps(data, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if os.name == "posix":  # the new name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _difference(there: Any, here: Any, path: str = "") -> str:
    """The first key in which two manifests differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in there or key not in here:
                return f"{inner} is only {'here' if key in here else 'there'}"
            if there[key] != here[key]:
                if inner in _HASHES:
                    return _HASHES[inner]
                return _difference(there[key], here[key], inner)
    return f"{path or 'the manifest'} is {there!r} there and {here!r} here"
