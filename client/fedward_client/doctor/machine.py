"""The machine and what site.toml says of it: disk, memory, device, walls, datasets, policy."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedward.errors import FedwardError
from fedward_client.config import DatasetSection, SiteConfig, hidden_places, trusted_places
from fedward_client.daemon.isolation import Finding
from fedward_client.doctor.line import Line

_WALLS: Final = "Run under systemd or as containers; see the install page"
_FREE: Final = 5 << 30
_FULL: Final = 256 << 20
_MEMORY: Final = 4 << 30
_MUCH: Final = 10.0  # an ε that hardly bounds anything
_MUCH_DELTA: Final = 1e-3  # a patient in a thousand, published whole


def disk(config: SiteConfig) -> Line:
    """Room for prepared images, ledger and audit log."""
    place = config.site.state
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < _FULL:
        return Line("disk", "fail", "full: no round can be written down", "Make room")
    if free < _FREE:
        return Line("disk", "warn", f"{free / 2**30:.1f} GiB free", "Make room for prepared images")
    return Line("disk", "pass", f"{free >> 30} GiB free")


def memory() -> Line:
    """What is left of the machine's memory."""
    free = _available()
    if free < _MEMORY:
        return Line(
            "memory",
            "warn",
            f"{free / 2**30:.1f} GiB available",
            "Give the machine more, or train with fewer threads",
        )
    return Line("memory", "pass", f"{free >> 30} GiB available")


def _available() -> int:
    """Bytes (MemAvailable of proc(5)); where that is not told, all of them."""
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device(config: SiteConfig) -> Iterator[Line]:
    """Where training runs, and its memory."""
    import torch

    from fedward_client.training.device import choose_device

    try:
        chosen = choose_device(config.trainer.device)
    except FedwardError as error:
        yield Line("device", "fail", error.rule, error.fix)
        return
    if chosen.type != "cuda":
        yield Line(
            "device", "warn", "no GPU; training runs on the CPU", "Install a CUDA build of torch"
        )
        return
    free, total = torch.cuda.mem_get_info(chosen)
    found = f"a GPU with {total >> 30} GiB, {free >> 30} of them free"
    if free < total / 2:
        yield Line("device", "warn", found, "End what else uses it, or lower max_gpu_memory_gib")
    else:
        yield Line("device", "pass", found)


def walls(config: SiteConfig) -> Iterator[Line]:
    """Build the walls in two processes of their own, and let each say what it finds."""
    begin = "from pathlib import Path; from fedward_client.daemon.isolation import *; "
    code = begin + "enter_no_network(); drop_privileges(); f = find_network()"
    yield _wall("trainer's network", code, allowed=config.trainer.allow_networked_trainer)
    hidden = [str(place) for place in hidden_places(config)]
    begin += f"p = [Path(x) for x in {hidden!r}]; cover(p); "
    code = begin + "drop_privileges(); f = find_readable(p)"
    yield _wall("connector and images", code, allowed=config.trainer.allow_unconfined_connector)
    trusted = [str(place) for place in trusted_places(config)]
    # As at the start: on an older kernel the connector goes on without, and is told to be so.
    code = (
        f"from contextlib import suppress; {begin}\n"
        "with suppress(OSError): keep_from_writing([Path.cwd()])\n"
        f"drop_privileges(); f = find_writable({trusted!r})"
    )
    yield _wall("connector and code", code, allowed=True)


def _wall(name: str, code: str, *, allowed: bool) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", f"{code}; print(f.holds, f.text)"],
            cwd=folder,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
    holds, _, text = done.stdout.strip().partition(" ")
    if done.returncode == 0 and holds == "True":
        return Line(name, "pass", text)
    found = text if done.returncode == 0 else "the kernel makes no namespaces for this user"
    return wall_line(name, Finding(False, found), allowed=allowed)


def wall_line(name: str, finding: Finding, *, allowed: bool) -> Line:
    """What a process found of its walls, as a line."""
    if finding.holds:
        return Line(name, "pass", finding.text)
    return Line(name, "warn" if allowed else "fail", finding.text, _WALLS)


def connector_user(config: SiteConfig) -> Iterator[Line]:
    """Who the connector will be, where root starts the daemon."""
    user = config.server.user if config.server else ""
    if user and _entry(user) is None:
        yield Line(
            "connector's user",
            "fail",
            "is not on this machine",
            "Make it, or name another in server.user",
        )
    elif os.geteuid() == 0 and not user:
        yield Line(
            "connector's user",
            "warn",
            "root, which owns what others protect",
            "Name a user of its own in server.user",
        )


def _entry(user: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        return None


def datasets(config: SiteConfig) -> Iterator[Line]:
    """Whether the trainer reads each, nobody else does, and a cohort is frozen."""
    user = config.server.user if config.server else ""
    for name, one in config.datasets.items():
        yield _dataset(config, f"dataset {name}", name, one, user)


def _dataset(
    config: SiteConfig, title: str, name: str, one: DatasetSection, connector: str
) -> Line:
    from fedward_client.cohort.open import cohort_path

    if not os.access(one.root, os.R_OK):
        return Line(
            title, "fail", "cannot be read", "Check the mount; give the trainer's user access"
        )
    if connector and _reads(connector, one.root):
        return Line(title, "fail", "the connector's user can read it", "Take that access away")
    if _open_to_all(one.root):
        return Line(
            title,
            "warn",
            "every user of this machine can read it",
            "Leave it to the trainer's user: chmod o-rwx",
        )
    try:
        cohort_path(config.site.state, name)
    except FedwardError:
        fix = f"fedward-client data freeze {name}"
        return Line(title, "warn", "readable, but no cohort is frozen", fix)
    return Line(title, "pass", "readable by the trainer only, with a frozen cohort")


def _reads(user: str, root: Path) -> bool:
    """Whether a user can read a place, tried as that user where this one is root."""
    if os.geteuid() != 0:
        return False
    entry = _entry(user)
    if entry is None:
        return False
    done = subprocess.run(
        ["test", "-r", str(root)],
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        cwd="/",
        check=False,
    )
    return done.returncode == 0


def _open_to_all(root: Path) -> bool:
    place = root.resolve()
    way = all(parent.stat().st_mode & stat.S_IXOTH for parent in place.parents)
    return way and bool(place.stat().st_mode & stat.S_IROTH)


def policy(config: SiteConfig) -> Iterator[Line]:
    """What a policy may have been meant otherwise."""
    own = config.policy
    much = max(own.max_epsilon_per_study, own.max_epsilon_per_cohort)
    delta = max(own.max_delta or 0.0, *(rule.max_delta or 0.0 for rule in own.studies), 0.0)
    checks = (
        (not own.studies, "serves no study", "Add [[policy.studies]]"),
        (
            not own.coordinators and not own.any_coordinator,
            "accepts no coordinator",
            "Add the coordinator's fingerprint",
        ),
        (own.any_coordinator, "accepts every coordinator", "Name those you trust"),
        (
            _open_rounds(config),
            "lets updates leave without privacy: unbounded, in no budget",
            "Set require_privacy = true",
        ),
        (much > _MUCH, f"lets studies spend ε = {much:.4g}", "Above 10 it protects little"),
        (
            delta > _MUCH_DELTA,
            f"lets promises fail with a chance of δ = {delta:.4g}",
            "Remove max_delta: it then follows the cohort's size",
        ),
        (own.minimum_count == 1, "lets counts of a single image leave", "Raise minimum_count"),
    )
    wrong = [Line("policy", "warn", found, fix) for bad, found, fix in checks if bad]
    yield from wrong
    if not wrong:
        yield Line("policy", "pass", f"{len(own.studies)} rules, approval {own.approval}")


def _open_rounds(config: SiteConfig) -> bool:
    own = config.policy
    rules = [own.require_privacy, *(rule.require_privacy for rule in own.studies)]
    return False in rules
