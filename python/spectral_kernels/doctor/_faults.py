"""Faults that users of matrix optimizers have reported, each as a check of any optimizer.

A check makes the optimizer it is given, lets it take a few steps on small parameters and returns a
sentence, or raises `Wrong` with one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from . import _faults_of_inputs, _faults_of_runs, _faults_of_state
from ._accuracy import one_thread
from ._outcome import BY_DESIGN, FAILED, Finding, examine
from ._subjects import Subject
from ._trial import Check

# In the order in which they are run.
FAULTS: dict[str, Check] = {
    **_faults_of_inputs.FAULTS,
    **_faults_of_state.FAULTS,
    **_faults_of_runs.FAULTS,
}


def run_faults(subject: Subject, names: Iterable[str] | None = None) -> list[Finding]:
    """Every fault, or the named ones, on one optimizer."""
    findings = []
    for name in FAULTS if names is None else names:
        check = FAULTS[name]
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(0)
            finding = examine("optimizers", name, subject.name, partial(check, subject))
        reason = subject.by_design.get(name)
        if finding.outcome == FAILED and reason is not None:
            sentence = f"{finding.sentence}; {reason}"
            finding = Finding(finding.section, name, subject.name, BY_DESIGN, sentence)
        findings.append(finding)
    return findings
