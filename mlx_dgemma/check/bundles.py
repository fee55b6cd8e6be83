"""Parity: recorded runs of the reference, replayed on every device that MLX has here."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from ..errors import InputError
from ..parity import bundle, check
from .budget import Budget
from .machine import on
from .report import Column, Section
from .subject import Subject

TITLE = "Parity with the reference: shipped bundles replayed"
COLUMNS = (
    Column("bundle", "bundle"),
    Column("device", "device"),
    Column("ratio", "worst ratio", ".2f"),
    Column("passed", "passed"),
    Column("first", "first failure"),
    Column("seconds", "s", ".1f"),
)
CANVASES = 64  # prompt tokens that the canvases of a bundle take about as long as


def measure(subject: Subject, section: Section, budget: Budget) -> None:
    """A row per bundle and device, short ones first."""
    section.notes.append(
        "Worst ratio: error against float64 over that of the reference in the same dtype; "
        f"{_limits(subject)}. Independent of the model given."
    )
    took: dict[Path, float] = {}
    lengths = shipped()
    if not lengths:
        section.faults.append("no bundle was found; install the package again")
    for device in subject.devices:
        for folder in lengths:
            if not budget.has(_expected(folder, took, lengths)):
                section.missing.append(f"{folder.name} on {device}")
                continue
            subject.tell(f"parity: {folder.name} on {device}")
            started = budget.clock()
            try:
                with on(device):
                    report = check.check(folder, None, _max_ratio(subject, device))
                section.notes += _dtypes(folder, report, device)
                found = (report.worst_ratio, report.passed, report.first_failure)
                wrong = f"parts from the reference at {report.first_failure}"
            except (InputError, RuntimeError) as error:  # damaged; a kernel that this device lacks
                wrong = " ".join(str(error).split())[:200]
                found = (None, False, "not replayed")
            took[folder] = budget.clock() - started
            section.add(folder.name, device, *found, took[folder])
            if not found[1]:
                section.faults.append(f"bundle {folder.name} on {device}: {wrong}")


def _max_ratio(subject: Subject, device: str) -> float | None:
    """A CPU rounds as the reference's does: what is given is for GPUs alone."""
    return subject.max_ratio if device == "gpu" else None


def _limits(subject: Subject) -> str:
    """What passes: on all devices, or device by device where they differ."""
    limits = {device: f"{check.limit_of(_max_ratio(subject, device)):g}" for device in subject.devices}
    if len(set(limits.values())) == 1:
        return f"up to {next(iter(limits.values()))} passes"
    return "what passes: " + ", ".join(f"up to {limit} on the {device.upper()}" for device, limit in limits.items())


def _dtypes(folder: Path, report: check.Report, device: str) -> list[str]:
    """A note, if the bundle was replayed in another dtype than it was recorded in."""
    note = f"{folder.name}: recorded in {report.recorded}, replayed in {report.replayed} on a {device.upper()}."
    return [note] if report.replayed != report.recorded else []


def _expected(folder: Path, took: dict[Path, float], lengths: dict[Path, int]) -> float:
    """Seconds: what it took on the device before, or else at the usual rate of those that were replayed."""
    rates = [took[other] / (CANVASES + lengths[other]) for other in took]
    return took.get(folder, (CANVASES + lengths[folder]) * (median(rates) if rates else 0.0))


def shipped() -> dict[Path, int]:
    """Folders of the bundles that come with the package, and the length of their prompts; short ones first."""
    folders = {path.parent: _length(path.parent) for path in bundle.SHIPPED.glob("*/bundle.json")}
    return dict(sorted(folders.items(), key=lambda item: (item[1], item[0].name)))


def _length(folder: Path) -> int:
    """Ids of the prompt; what cannot be read is soon replayed."""
    try:
        return bundle.read(folder).arrays["prompt"].size
    except InputError:
        return 1
