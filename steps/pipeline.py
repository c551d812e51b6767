"""The stages as one table, what each one's result depends on, and how one is run or reused.

A key is computed from what goes into a stage, never from what came out, so the plan of a whole run (`steps.plan`) is
known before anything runs. `run_stage` computes the key again from the references that it is handed: a resumed run
whose code has changed since gets keys that say so.
"""

from __future__ import annotations

import errno
import importlib
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora import sources
from stage_store import SCHEMA, Checkpoints, StageRef, Store, code_modules, stage_key
from steps import device, provenance
from steps.config import Config, InitStageConfig, Model, SpeculativeStageConfig, TrainConfig, store_url
from steps.stage import Progress, StageContext

logger = logging.getLogger(__name__)

FIRST_PARTY = ("steps", "evals", "hybrid", "corpora", "reports", "stage_store", "kernels_ext")
# What these say enters a key by value: the configuration with its defaults filled in, the hardware by its name.
NOT_CODE = ("steps.config", "steps.stage", "steps.device")
PROGRESS_SECONDS = 5.0

Refs = Mapping[str, Mapping[str, Any]]
"""Stage name → fields of its StageRef, as `run_stage` returns them. A stage that is switched off is not in it."""


NO_RESULT = {"enabled", "checkpoint_every"}
"""Leaves of a stage's section that cannot change what it writes, so they are no part of its key."""


class StageFailed(RuntimeError):
    """A stage ended for a reason that its user can act on; the message is one line."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    name:            also the flow's step and the entry in `resources`.
    module:          has `run(config, inputs, out, context) -> summary`.
    inputs:          roles: stage names, "student" (the nearest enabled stage before it that makes one) and
                     "teacher_rows" (benchmark_teacher).
    optional:        roles that it can do without, where the stage that plays them is switched off.
    section:         the part of the configuration that it is handed, its name if empty.
    settings:        top-level leaves that the result depends on besides; they reach it through the context.
    sources:         attributes of its section that hold source strings: what these name enters the key by content.
    no_result:       leaves of its section, besides NO_RESULT, that cannot change what it writes.
    per_variant:     False for what all variants share.
    hardware_in_key: True where speed is measured.
    version:         raised by hand where a result changes and the code hash cannot see why.
    """

    name: str
    module: str
    inputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    section: str = ""
    settings: tuple[str, ...] = ("seed", "compute")
    sources: tuple[str, ...] = ()
    no_result: tuple[str, ...] = ()
    per_variant: bool = True
    hardware_in_key: bool = False
    version: int = 1

    def config(self, config: Config, variant: str) -> Model:
        """Its slice; `config` is the variant's own.

        init_from_attention is handed the variant's `attention` besides its section, speculative_profile what it needs
        of the section `draft`.
        """
        section: Model = getattr(config, self.section or self.name)
        if self.name == "init_from_attention":
            return InitStageConfig(**section.model_dump(), attention=config.variants[variant].attention)
        if self.name == "speculative_profile":
            draft = config.draft
            return SpeculativeStageConfig(
                **section.model_dump(), ngram=draft.ngram, draft=draft.kind if draft.runs else "ngram"
            )
        return section

    def enabled(self, config: Config) -> bool:
        section = getattr(config, self.section or self.name)
        return section.runs if isinstance(section, TrainConfig) else getattr(section, "enabled", True)


STAGES = (
    Stage("teacher", "steps.teacher", settings=(), sources=("source",), per_variant=False),
    Stage(
        "corpus",
        "steps.corpus",
        ("teacher",),
        sources=("sources", "preferences", "natural_text"),
        per_variant=False,
    ),
    Stage(
        "benchmark_teacher",
        "steps.benchmark",
        ("teacher", "corpus"),
        section="benchmark",
        per_variant=False,
        hardware_in_key=True,
    ),
    Stage("init_from_attention", "steps.init_from_attention", ("teacher", "corpus")),
    Stage("align", "steps.align", ("teacher", "corpus", "student")),
    Stage("kl_distill", "steps.kl_distill", ("teacher", "corpus", "student")),
    Stage("sft", "steps.sft", ("teacher", "corpus", "student")),
    Stage("dpo", "steps.dpo", ("teacher", "corpus", "student")),
    Stage("draft", "steps.draft", ("corpus", "student"), sources=("source",), no_result=("ngram",)),
    Stage("benchmark", "steps.benchmark", ("teacher", "corpus", "student", "teacher_rows"), hardware_in_key=True),
    Stage(
        "speculative_profile",
        "steps.speculative_profile",
        ("corpus", "student"),
        optional=("draft",),
        hardware_in_key=True,
    ),
)
"""In the order of the flow. The report is not among them: it tells of one run, so it is made anew (`steps.lineage`)."""

BY_NAME = {stage.name: stage for stage in STAGES}
STUDENT_STAGES = ("init_from_attention", "align", "kl_distill", "sft", "dpo")


@dataclass(frozen=True)
class Run:
    """What running a stage needs besides the configuration.

    id:       of the run, as Metaflow names it.
    root:     project root, against which relative paths count.
    command:  as typed, for the report.
    progress: told every few seconds how far a long stage is, besides the log.
    """

    id: str
    root: Path
    command: str = ""
    progress: Callable[[Progress], None] = lambda _: None


def label(stage: str, variant: str) -> str:
    return f"{variant}/{stage}" if variant else stage


def run_stage(name: str, variant: str, config: Config, refs: Refs, run: Run) -> dict[str, Any] | None:
    """Run a stage or take its stored result.

    variant: "" for what all variants share.
    refs:    what the stages before it returned.
    Returns its StageRef's fields and `hit`, or None if it is switched off. Raises StageFailed.
    """
    stage = BY_NAME[name]
    own = config.for_variant(variant) if variant else config
    if not stage.enabled(own):
        logger.info("%s: switched off", label(name, variant))
        return None
    with one_line(label(name, variant)):
        store = Store(store_url(config, run.root))
        payload = payload_of(stage, variant, own, refs, run.root)
        ref, hit = store.compute(
            name,
            stage_key(payload),
            payload,
            lambda out, checkpoints: _execute(stage, variant, own, refs, store, run, out, checkpoints),
        )
    logger.info("%s: %s %s", label(name, variant), "reused" if hit else "stored as", ref.key[:12])
    return {**ref.to_dict(), "hit": hit}


def walk(config: Config) -> Iterator[tuple[Stage, str, Config]]:
    """Every stage, shared ones first, with its variant and the variant's configuration."""
    for variant in ("", *config.variants):
        own = config.for_variant(variant) if variant else config
        for stage in STAGES:
            if stage.per_variant == bool(variant):
                yield stage, variant, own


def _upstream(stage: Stage, refs: Mapping[str, Any]) -> dict[str, Any]:
    """Role → reference of the stage that plays it."""
    students = [name for name in STUDENT_STAGES if name in refs and name != stage.name]
    roles = {**refs, "teacher_rows": refs.get("benchmark_teacher")}
    if students:
        roles["student"] = refs[students[-1]]
    present = [role for role in stage.optional if role in roles]
    return {role: roles[role] for role in (*stage.inputs, *present)}


def payload_of(stage: Stage, variant: str, own: Config, refs: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """All that the stage's result depends on; its sha256 is the key."""
    section = stage.config(own, variant)
    leaves = section.model_dump(mode="json", exclude=NO_RESULT | set(stage.no_result))
    code = code_modules(stage.module, root, FIRST_PARTY)
    payload = {
        "schema": SCHEMA,
        "stage": stage.name,
        "version": stage.version,
        "config": leaves | {leaf: getattr(own, leaf) for leaf in stage.settings},
        "code": {name: digest for name, digest in code.items() if name not in NOT_CODE},
        "data": {text: sources.fingerprint(text, root) for text in _source_texts(stage, section)},
        "upstream": {role: ref["key"] for role, ref in _upstream(stage, refs).items()},
    }
    if stage.hardware_in_key:
        payload["hardware"] = device.hardware(device.resolve(own.device))
    return payload


def _source_texts(stage: Stage, section: Model) -> list[str]:
    texts: list[str] = []
    for name in stage.sources:
        value = getattr(section, name)
        texts += [value] if isinstance(value, str) else value
    return [text for text in texts if text]


def _execute(
    stage: Stage,
    variant: str,
    own: Config,
    refs: Refs,
    store: Store,
    run: Run,
    out: Path,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Fetch the inputs, take the device, run, and say how it went."""
    inputs = {role: fetch(store, ref) for role, ref in _upstream(stage, refs).items()}
    kind = device.resolve(own.device)
    with device.hold(kind), tempfile.TemporaryDirectory(prefix="mamballama-") as scratch:
        logger.info("%s: running on %s", label(stage.name, variant), kind)
        report = _Reporter(label(stage.name, variant), run.progress)
        context = StageContext(kind, own.compute, own.seed, Path(scratch), checkpoints, report)
        started = time.monotonic()
        summary = importlib.import_module(stage.module).run(stage.config(own, variant), inputs, out, context)
        seconds = time.monotonic() - started
        hardware = device.hardware(kind)
        return {
            "summary": summary,
            "seconds": round(seconds, 3),
            "device": hardware["name"],
            "hardware": hardware,
            **provenance.peak_memory(),
            "host": platform.node(),
            "git_commit": provenance.git_commit(run.root),
            "versions": provenance.versions(),
            "run": run.id,
        }


class _Reporter:
    """Passes on what a stage says of its progress, at most every PROGRESS_SECONDS and at the end."""

    def __init__(self, name: str, also: Callable[[Progress], None]) -> None:
        self.name, self.also, self.last = name, also, float("-inf")

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.done < progress.total and now - self.last < PROGRESS_SECONDS:
            return
        self.last = now
        logger.info("%s: %s", self.name, progress)
        self.also(progress)


def fetch(store: Store, ref: Mapping[str, Any]) -> Path:
    return store.fetch(store.manifest(stored_ref(ref)))


def stored_ref(value: Mapping[str, Any]) -> StageRef:
    return StageRef.from_dict({field: value[field] for field in ("stage", "key", "digest", "url")})


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """One line for this project's own errors, a full disk and too little GPU memory; all else is a bug to trace."""
    try:
        yield
    except Exception as error:
        ours = type(error).__module__.split(".")[0] in FIRST_PARTY
        disk_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if ours or disk_full or type(error).__name__ == "OutOfMemoryError":
            raise StageFailed(f"{name}: {type(error).__name__}: {error}") from error
        raise
