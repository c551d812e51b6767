"""The stages as one table, what each one's result depends on, and how one is run or reused.

A key is computed from what goes into a stage, never from what came out, so the plan of a whole run (`steps.plan`) is
known before anything runs. `run_stage` computes the key again from the references that it is handed: a resumed run
whose code has changed since gets keys that say so.
"""

from __future__ import annotations

import errno
import functools
import importlib
import itertools
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from corpora import sources
from stage_store import SCHEMA, Checkpoints, StageRef, Store, code_modules, stage_key
from steps import device, gang, provenance
from steps.config import (
    BenchmarkStageConfig,
    Config,
    InitStageConfig,
    LayerScoresStageConfig,
    Model,
    SpeculativeStageConfig,
    StudentStage,
    TrainConfig,
    store_url,
)
from steps.stage import Progress, StageContext

logger = logging.getLogger(__name__)

FIRST_PARTY = ("steps", "evals", "hybrid", "corpora", "reports", "stage_store", "kernels_ext")
# What these say enters a key by value: the configuration with its defaults filled in, the hardware by its name.
NOT_CODE = ("steps.config", "steps.stage", "steps.device")
PROGRESS_SECONDS = 5.0
ASSIST_SECONDS = 2.0
"""Between looks of a host that waits for the first one."""

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
    inputs:          roles: stage names, "student" (the nearest enabled stage before it that makes one),
                     "teacher_rows" (benchmark_teacher) and "previous" (the student that a variant with `from`
                     continues from).
    optional:        roles that it can do without, where the stage that plays them is switched off or the variant has
                     no use for it.
    section:         the part of the configuration that it is handed, its name if empty.
    settings:        top-level leaves that the result depends on besides; they reach it through the context.
    sources:         attributes of its section that hold source strings: what these name enters the key by content.
    no_result:       leaves of its section, dotted where they lie deeper, besides NO_RESULT, that cannot change what it
                     writes.
    per_variant:     False for what all variants share.
    hardware_in_key: True where speed is measured.
    spreads:         True where it can train on several GPUs, in a process for each (`steps.gang`).
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
    spreads: bool = False
    version: int = 1

    def config(self, config: Config, variant: str) -> Model:
        """Its slice; `config` is the variant's own.

        init_from_attention is handed the variant's `attention` and `checkpoint` besides its section, layer_scores how
        the mixers start that it tries, the benchmarks what the student was trained on, speculative_profile what it
        needs of the section `draft`.
        """
        section: Model = getattr(config, self.section or self.name)
        if self.name == "init_from_attention":
            own = config.variants[variant]
            return InitStageConfig(**section.model_dump(), attention=own.attention, checkpoint=own.checkpoint)
        if self.name == "layer_scores":
            start = config.init_from_attention.model_copy(update={"method": "calibrated", "measure_paper": False})
            return LayerScoresStageConfig(**section.model_dump(), init=start)
        if self.section == "benchmark" or self.name == "benchmark":
            return BenchmarkStageConfig(**section.model_dump(), train_length=config.train_length)
        if self.name == "speculative_profile":
            draft = config.draft
            return SpeculativeStageConfig(
                **section.model_dump(), ngram=draft.ngram, draft=draft.kind if draft.runs else "ngram"
            )
        return section

    def wants(self, role: str, config: Config, variant: str) -> bool:
        """Whether it can make use of an optional role: a variant that lists its layers needs no ranking of them."""
        return role != "layer_scores" or config.variants[variant].by_ratio

    def processes(self, config: Config, kind: str) -> int:
        """On how many it runs on a device of this kind: the `processes` of its resources, else one for each `gpu`."""
        if not self.spreads:
            return 1
        resources = getattr(config.resources, self.name)
        return resources.processes or (max(1, resources.gpu) if kind == "cuda" else 1)

    def enabled(self, config: Config) -> bool:
        section = getattr(config, self.section or self.name)
        return section.runs if isinstance(section, TrainConfig) else getattr(section, "enabled", True)


JUDGE_AT_WORK = ("judge.api_key_env", "judge.concurrency", "judge.timeout_seconds", "judge.retries")
"""How its endpoint is asked, not what."""
DELTAS = ("non_inferiority", "non_inferiority_nats", "non_inferiority_points")
"""What a student may differ by; the teacher is compared with nobody."""

STAGES = (
    Stage("teacher", "steps.teacher", settings=(), sources=("source", "chat_template"), per_variant=False),
    Stage(
        "corpus",
        "steps.corpus",
        ("teacher",),
        sources=("sources", "texts", "preferences", "natural_text"),
        per_variant=False,
    ),
    Stage("layer_scores", "steps.layer_scores", ("teacher", "corpus"), per_variant=False),
    Stage(
        "benchmark_teacher",
        "steps.benchmark",
        ("teacher", "corpus"),
        section="benchmark",
        sources=("sources",),
        no_result=(*JUDGE_AT_WORK, *DELTAS),
        per_variant=False,
        hardware_in_key=True,
    ),
    Stage(
        "init_from_attention",
        "steps.init_from_attention",
        ("teacher", "corpus"),
        optional=("layer_scores", "previous"),
        sources=("checkpoint",),
    ),
    Stage("align", "steps.align", ("teacher", "corpus", "student"), optional=("previous",), spreads=True),
    Stage("kl_distill", "steps.kl_distill", ("teacher", "corpus", "student"), sources=("teacher",), spreads=True),
    Stage("sft", "steps.sft", ("teacher", "corpus", "student"), spreads=True),
    Stage("dpo", "steps.dpo", ("teacher", "corpus", "student"), spreads=True),
    Stage("draft", "steps.draft", ("corpus", "student"), sources=("source",), no_result=("ngram",)),
    Stage(
        "benchmark",
        "steps.benchmark",
        ("teacher", "corpus", "student", "teacher_rows"),
        sources=("sources",),
        no_result=JUDGE_AT_WORK,
        hardware_in_key=True,
    ),
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
STUDENT_STAGES: tuple[str, ...] = get_args(StudentStage)


@dataclass(frozen=True)
class Run:
    """What running a stage needs besides the configuration.

    id:       of the run, as Metaflow names it.
    root:     project root, against which relative paths count.
    command:  as typed, for the report.
    progress: told every few seconds how far a long stage is, besides the log.
    seat:     which of the hosts this is that run a training stage together.
    """

    id: str
    root: Path
    command: str = ""
    progress: Callable[[Progress], None] = lambda _: None
    seat: gang.Seat = gang.ALONE


def label(stage: str, variant: str) -> str:
    return f"{variant}/{stage}" if variant else stage


def run_stage(name: str, variant: str, config: Config, refs: Refs, run: Run) -> dict[str, Any] | None:
    """Run a stage or take its stored result.

    variant: "" for what all variants share.
    refs:    what the stages before it returned.
    Returns its StageRef's fields and `hit`, or None if it is switched off. Raises StageFailed. The first stage of a
    variant that continues from another runs that one's stages as far as it needs them, wherever they are not stored
    yet; where another process is at them, it waits.
    """
    stage = BY_NAME[name]
    own = config.for_variant(variant) if variant else config
    if not stage.enabled(own):
        logger.info("%s: switched off", label(name, variant))
        return None
    if "previous" in stage.optional and "previous" not in refs:
        refs = {**refs, **_run_previous(config, variant, refs, run)}
    with one_line(label(name, variant)):
        store = Store(store_url(config, run.root))
        payload = payload_of(stage, variant, own, refs, run.root)
        key = stage_key(payload)
        if run.seat.index:
            return {**_assist(stage, variant, own, refs, store, key, run).to_dict(), "hit": True}
        ref, hit = store.compute(
            name,
            key,
            payload,
            lambda out, checkpoints: _execute(stage, variant, own, refs, store, key, run, out, checkpoints),
        )
    logger.info("%s: %s %s", label(name, variant), "reused" if hit else "stored as", ref.key[:12])
    return {**ref.to_dict(), "hit": hit}


def _run_previous(config: Config, variant: str, refs: Refs, run: Run) -> Refs:
    """`previous_student` of the variant, once the variants before it have their stages up to its `from_stage`."""
    shared = {name: ref for name, ref in refs.items() if not BY_NAME[name].per_variant}
    previous: Refs = {}
    for earlier, later in itertools.pairwise(config.chain(variant)):
        made = {**shared, **previous}
        for name in STUDENT_STAGES[: STUDENT_STAGES.index(config.variants[later].from_stage) + 1]:
            if ref := run_stage(name, earlier, config, made, run):
                made[name] = ref
        previous = previous_student(config, later, made)
    return previous


def previous_student(config: Config, variant: str, refs: Mapping[str, Any]) -> dict[str, Any]:
    """{"previous": the student that a variant continues from}, empty if that is the teacher.

    refs: what the stages of the variant that it continues from returned.
    """
    start = config.variants[variant]
    if not start.previous:
        return {}
    up_to = STUDENT_STAGES[: STUDENT_STAGES.index(start.from_stage) + 1]
    return {"previous": [refs[name] for name in up_to if name in refs][-1]}


def _assist(stage: Stage, variant: str, own: Config, refs: Refs, store: Store, key: str, run: Run) -> StageRef:
    """What the first host stores, once it has; if the stage trains, with the help of this one."""

    def stored() -> bool:
        return store.lookup(stage.name, key) is not None

    if stage.spreads and not stored():
        kind = device.resolve(own.device)
        processes = stage.processes(own, kind)
        gpus = device.hold(kind, processes) if kind == "cuda" else nullcontext()
        with gpus, tempfile.TemporaryDirectory(prefix="mamballama-") as folder:
            scratch, out = Path(folder), Path(folder) / "out"
            out.mkdir()
            job = _job(stage, variant, own, refs, store, key, scratch, out)
            gang.run(job, processes, lambda _: None, run.seat, stored)
    while not (found := store.lookup(stage.name, key)):
        time.sleep(ASSIST_SECONDS)
    return found.ref


def _job(
    stage: Stage, variant: str, own: Config, refs: Refs, store: Store, key: str, scratch: Path, out: Path
) -> gang.Job:
    inputs = {role: fetch(store, ref) for role, ref in _upstream(stage, variant, own, refs).items()}
    return gang.Job(
        stage.module,
        stage.config(own, variant),
        inputs,
        out,
        scratch,
        device.resolve(own.device),
        own.compute,
        own.seed,
        store.url,
        stage.name,
        key,
    )


def make_students(config: Config, run: Run) -> None:
    """Every variant's student, and what it takes to make it, on the hosts of a gang (`run.seat`), all of which call
    this. What is no training, the first does while the others wait. Raises StageFailed."""
    refs: dict[str, dict[str, Any]] = {variant: {} for variant in ("", *config.variants)}
    for stage, variant, _ in walk(config):
        if stage.name in ("teacher", "corpus", "layer_scores", *STUDENT_STAGES):
            ref = run_stage(stage.name, variant, config, {**refs[""], **refs[variant]}, run)
            if ref:
                refs[variant][stage.name] = ref


def walk(config: Config) -> Iterator[tuple[Stage, str, Config]]:
    """Every stage, shared ones first, with its variant and the variant's configuration; no variant comes before the
    one that it continues from."""
    for variant in ("", *sorted(config.variants, key=lambda name: len(config.chain(name)))):
        own = config.for_variant(variant) if variant else config
        for stage in STAGES:
            if stage.per_variant == bool(variant):
                yield stage, variant, own


def _upstream(stage: Stage, variant: str, own: Config, refs: Mapping[str, Any]) -> dict[str, Any]:
    """Role → reference of the stage that plays it."""
    students = [name for name in STUDENT_STAGES if name in refs and name != stage.name]
    roles = {**refs, "teacher_rows": refs.get("benchmark_teacher")}
    if students:
        roles["student"] = refs[students[-1]]
    present = [role for role in stage.optional if role in roles and stage.wants(role, own, variant)]
    return {role: roles[role] for role in (*stage.inputs, *present)}


def payload_of(stage: Stage, variant: str, own: Config, refs: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """All that the stage's result depends on; its sha256 is the key."""
    section = stage.config(own, variant)
    leaves = section.model_dump(mode="json", exclude=NO_RESULT)
    for leaf in stage.no_result:
        *parents, last = leaf.split(".")
        functools.reduce(dict.__getitem__, parents, leaves).pop(last)
    code = code_modules(stage.module, root, FIRST_PARTY)
    payload = {
        "schema": SCHEMA,
        "stage": stage.name,
        "version": stage.version,
        "config": leaves | {leaf: getattr(own, leaf) for leaf in stage.settings},
        "code": {name: digest for name, digest in code.items() if name not in NOT_CODE},
        "data": {text: sources.fingerprint(text, root) for text in _source_texts(stage, section)},
        "upstream": {role: ref["key"] for role, ref in _upstream(stage, variant, own, refs).items()},
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
    key: str,
    run: Run,
    out: Path,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Fetch the inputs, take the device or several, run, and say how it went."""
    kind = device.resolve(own.device)
    processes = stage.processes(own, kind)
    several = stage.spreads and processes * run.seat.hosts > 1
    with device.hold(kind, processes), tempfile.TemporaryDirectory(prefix="mamballama-") as folder:
        logger.info("%s: running on %s%s", label(stage.name, variant), kind, f" × {processes}" if processes > 1 else "")
        report, scratch = _Reporter(label(stage.name, variant), run.progress), Path(folder)
        job = _job(stage, variant, own, refs, store, key, scratch, out)
        started = time.monotonic()
        if several:
            summary, memory = gang.run(job, processes, report, run.seat) or ({}, {})
        else:
            context = StageContext(kind, own.compute, own.seed, scratch, checkpoints, report)
            summary = importlib.import_module(stage.module).run(job.config, job.inputs, out, context)
            memory = provenance.peak_memory()
        seconds = time.monotonic() - started
        hardware = device.hardware(kind)
        return {
            "summary": summary,
            "seconds": round(seconds, 3),
            "device": hardware["name"],
            "hardware": hardware,
            "processes": processes * run.seat.hosts if stage.spreads else 1,
            **memory,
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


def foreseen(error: Exception) -> bool:
    """Whether its one line says enough."""
    ours = type(error).__module__.split(".")[0] in FIRST_PARTY
    disk_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return ours or disk_full or type(error).__name__ == "OutOfMemoryError"


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """One line for this project's own errors, a full disk and too little GPU memory; all else is a bug to trace."""
    try:
        yield
    except Exception as error:
        if foreseen(error):
            raise StageFailed(f"{name}: {type(error).__name__}: {error}") from error
        raise
