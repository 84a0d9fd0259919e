"""The folder DIR of a pool: what a server leaves there, and how the next one goes on from it.

    DIR/private/lock            held by the process that may change the state
    DIR/private/base.json       where the state starts: the pool's description, or all tables of a folded log
    DIR/private/changes-N.jsonl every change since then
    DIR/private/disks/          the blocks that imports wrote
"""

import fcntl
import json
import os
import time
from typing import Any, Dict, List, Optional

import pool_file
import storage
from database import FOLD_BYTES, VOLATILE, read_log
from model import Pool
from schema import NULL

STORAGE_ENTRIES = ("content", "snapshot", "mark", "size", "stray")


class InUse(Exception):
    """Another process holds the folder."""


def private(folder: str, *names: str) -> str:
    return os.path.join(folder, "private", *names)


class Lock:
    """The right to change a folder's state, for as long as the process lives or until `release`."""

    def __init__(self, folder: str) -> None:
        os.makedirs(private(folder), mode=0o700, exist_ok=True)
        self._descriptor = os.open(private(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise InUse("%s is in use by a running server" % folder)

    def release(self) -> None:
        os.close(self._descriptor)


def begin(folder: str, description: Dict[str, Any]) -> None:
    """Let the folder start from this (checked) description, unless it was used before."""
    if not os.path.exists(private(folder, "base.json")):
        _write_base(folder, {"description": description, "time": time.time(), "log": 1})


def is_begun(folder: str) -> bool:
    return os.path.exists(private(folder, "base.json"))


def _write_base(folder: str, base: Dict[str, Any]) -> None:
    os.makedirs(private(folder), mode=0o700, exist_ok=True)
    path = private(folder, "base.json")
    with open(path + ".new", "w", encoding="ascii") as stream:
        json.dump(base, stream, separators=(",", ":"))
    os.rename(path + ".new", path)


def _read_base(folder: str) -> Dict[str, Any]:
    with open(private(folder, "base.json"), encoding="ascii") as stream:
        return json.load(stream)


def _log_path(folder: str, base: Dict[str, Any]) -> str:
    return private(folder, "changes-%d.jsonl" % base["log"])


def load(folder: str, pool: Optional[Pool] = None, until: Optional[float] = None) -> Pool:
    """The pool as the folder has it, not yet writing to it.

    `until`: leave out what the database learned after that time. What happened to the storage stays, so disks may remain
    that no row tells of; they become the pool's strays.
    """
    base = _read_base(folder)
    version = base["version"] if "tables" in base else base["description"]["xapi_version"]
    if pool is None:
        pool = Pool(version)
    with pool.lock, pool.without_recording():
        pool.clear()
        pool.strays.clear()
        pool.storage = storage.Storage(private(folder, "disks"), pool.log)
        if "tables" in base:
            _unfold(pool, base)
        else:
            pool_file.build(base["description"], pool, base["time"])
        for when, entries in read_log(_log_path(folder, base)):
            for entry in entries:
                if entry[0] in STORAGE_ENTRIES:
                    _replay_storage(pool, entry)
                elif until is None or when <= until:
                    pool.replay(entry)
        if until is not None:
            known = {record["uuid"] for record in pool.tables["VDI"].values()}
            for uuid, content in pool.storage.contents.items():
                if uuid not in known:
                    pool.strays[uuid] = content.sr
    return pool


def _replay_storage(pool: Pool, entry: List[Any]) -> None:
    if entry[0] == "stray":
        if entry[2] is None:
            pool.strays.pop(entry[1], None)
        else:
            pool.strays[entry[1]] = entry[2]
    else:
        pool.storage.replay(entry)


def _fold(folder: str, pool: Pool) -> None:
    """Write all tables as the new base, with an empty log."""
    old = _read_base(folder)
    base = {"version": pool.version_text, "tables": pool.tables, "strays": pool.strays, "log": old["log"] + 1,
            "srs": [[uuid, size, pool.storage.kinds_of(uuid)] for uuid, size in pool.storage.sizes.items()],
            "files": {name: sorted(blocks) for name, blocks in pool.storage.files.items()},
            "contents": {uuid: content.to_json() for uuid, content in pool.storage.contents.items()}}
    _write_base(folder, base)
    try:
        os.unlink(_log_path(folder, old))
    except FileNotFoundError:
        pass


def _unfold(pool: Pool, base: Dict[str, Any]) -> None:
    for uuid, size, kinds in base["srs"]:
        pool.storage.add_sr(uuid, size, kinds)
    pool.restore_tables(base["tables"])
    pool.strays.update(base["strays"])
    pool.storage.files.update((name, frozenset(blocks)) for name, blocks in base["files"].items())
    # the accounting is additive, disk by disk of a family; the first one pays for what is shared
    for uuid, fields in base["contents"].items():
        pool.storage.add(uuid, storage.Content.from_json(fields))


def open_for_serving(folder: str) -> Pool:
    """The pool as a starting server has it: sessions and tasks are gone, changes are written from now on."""
    pool = load(folder)
    _begin_writing(folder, pool)
    return pool


def open_for_writing(folder: str) -> Pool:
    """The pool for one change from outside, without a server: nothing but that change is written."""
    pool = load(folder)
    path = _log_path(folder, _read_base(folder))
    _cut_torn_line(path)
    pool.open_log(path)
    return pool


def _begin_writing(folder: str, pool: Pool) -> None:
    base = _read_base(folder)
    path = _log_path(folder, base)
    if os.path.exists(path) and os.path.getsize(path) > FOLD_BYTES:
        _fold(folder, pool)
        path = _log_path(folder, _read_base(folder))
    else:
        _cut_torn_line(path)
    pool.open_log(path)
    with pool.lock:
        for cls in VOLATILE:
            for ref in list(pool.tables[cls]):
                pool.destroy_row(cls, ref)
        pool.forget_current_operations()
        for record in pool.tables["VM"].values():
            host = record["resident_on"]
            pool.last_domid[host] = max(pool.last_domid.get(host, 0), int(record["domid"]))


def lose(folder: str, pool: Pool, seconds: float) -> None:
    """The server is restarted without the last seconds of its database (a hard kill loses what was not flushed)."""
    with pool.lock:
        pool.die()
        load(folder, pool, until=time.time() - seconds)
        _fold(folder, pool)
        _begin_writing(folder, pool)
        pool.local_sessions.clear()
        pool.changed.notify_all()


def replace(folder: str, pool: Pool, tables: Dict[str, Dict[str, Dict[str, Any]]]) -> None:
    """The master came up with this database: every other host is forgotten, no VM runs, the master's PBDs are plugged.

    Disks that this database does not tell of stay in their SRs (pool_db_backup.ml prepare_database_for_restore, dbsync_master.ml).
    """
    with pool.lock:
        mine = pool.master()
        uuids = [(cls, pool.record(cls, ref)["uuid"]) for cls, ref in (("host", mine), ("VM", pool.record(
            "host", mine)["control_domain"]))]
        master = next(iter(tables["pool"].values()))["master"]
        pool.die()
        with pool.without_recording():
            pool.clear()
            pool.restore_tables(json.loads(json.dumps(tables).replace(master, mine)))
            domain = pool.record("host", mine)["control_domain"]
            for ref in [ref for ref in pool.tables["host"] if ref != mine]:
                for cls in ("PIF", "PBD"):
                    for device in [device for device, record in pool.tables[cls].items() if record["host"] == ref]:
                        pool.destroy_row(cls, device)
                if pool.exists("VM", pool.record("host", ref)["control_domain"]):
                    pool.drop_vm_row(pool.record("host", ref)["control_domain"])
                pool.destroy_row("host", ref)
            for (cls, uuid), ref in zip(uuids, (mine, domain)):
                pool.set_field(cls, ref, "uuid", uuid)
            for ref in [ref for ref, record in pool.tables["VM"].items() if not record["is_control_domain"]
                        and record["power_state"] in ("Running", "Paused")]:
                pool.set_fields("VM", ref, {"power_state": "Halted", "resident_on": NULL, "domid": "-1"})
                pool.plug_devices(ref, False)
            for record in pool.tables["SR"].values():
                if record["uuid"] not in pool.storage.sizes:
                    pool.storage.add_sr(record["uuid"], int(record["physical_size"]), storage.kinds_of_type(record["type"]))
            for ref in pool.tables["PBD"]:
                pool.set_field("PBD", ref, "currently_attached", True)
            known = {record["uuid"] for record in pool.tables["VDI"].values()}
            pool.strays.clear()
            pool.strays.update({uuid: content.sr for uuid, content in pool.storage.contents.items() if uuid not in known})
            for ref in pool.tables["VM"]:
                pool.update_allowed_operations("VM", ref)
        _fold(folder, pool)
        _begin_writing(folder, pool)
        pool.local_sessions.clear()
        pool.changed.notify_all()


def _cut_torn_line(path: str) -> None:
    """Take away a last line that a kill cut short, so that the next one starts on its own."""
    try:
        with open(path, "r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            keep = size
            while keep and _byte_at(stream, keep - 1) != b"\n":
                keep -= 1
            if keep != size:
                stream.truncate(keep)
    except FileNotFoundError:
        pass


def _byte_at(stream: Any, offset: int) -> bytes:
    stream.seek(offset)
    return stream.read(1)
