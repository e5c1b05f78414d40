"""What `conserve doctor` finds: each with its subject, in plain words, and what to type."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Level(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    #: Works, but not as well as it could, or not for certain.
    WARN = "warning"
    #: Would not work.
    BAD = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: how bad it is.
        subject: what was looked at: a group's heading.
        what: what was found.
        remedy: what to do about it; empty where nothing need be done.
    """

    level: Level
    subject: str
    what: str
    remedy: str = ""


class Findings:
    """Collects findings about one subject.

    Args:
        subject: of all of them.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self.all: list[Finding] = []

    def ok(self, what: str) -> None:
        """This is well."""
        self.all.append(Finding(level=Level.OK, subject=self._subject, what=what))

    def warn(self, what: str, remedy: str) -> None:
        """This could be better."""
        self.all.append(Finding(level=Level.WARN, subject=self._subject, what=what, remedy=remedy))

    def bad(self, what: str, remedy: str) -> None:
        """This would not work."""
        self.all.append(Finding(level=Level.BAD, subject=self._subject, what=what, remedy=remedy))


def size(bytes_: int) -> str:
    """Bytes for people, in powers of ten."""
    return f"{bytes_ / 1e9:.1f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.0f} MB"


def as_lines(findings: Sequence[Finding]) -> list[str]:
    """The findings as text, grouped under their subjects in the order they come."""
    lines: list[str] = []
    subject = None
    for finding in findings:
        if finding.subject != subject:
            subject = finding.subject
            lines.append(subject)
        lines.append(f"  {finding.level.value:8} {finding.what}")
        if finding.remedy:
            lines.append(f"  {'':8} fix: {finding.remedy}")
    return lines


def verdict(findings: Iterable[Finding]) -> str:
    """The last line: whether all is well."""
    levels = [finding.level for finding in findings]
    bad, warnings = levels.count(Level.BAD), levels.count(Level.WARN)
    if not bad and not warnings:
        return "all is well"
    parts = [f"{bad} missing"] if bad else ["nothing is missing"]
    if warnings:
        parts.append(f"{warnings} warning{'s' * (warnings != 1)}")
    return ", ".join(parts)


def works(findings: Iterable[Finding]) -> bool:
    """Whether nothing that was found keeps it from working."""
    return all(finding.level is not Level.BAD for finding in findings)


__all__ = ["Finding", "Findings", "Level", "as_lines", "size", "verdict", "works"]
