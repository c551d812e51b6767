"""The pipeline as a Metaflow flow: which stage follows which, on what resources. The work is in `steps`.

python flows/distill_flow.py run
python flows/distill_flow.py run --set dpo.beta=0.05 --set kl_distill.steps=60
python flows/distill_flow.py --config config configs/smollm2_gpu.toml run
python flows/distill_flow.py resume
"""

import logging
import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# In a code package the contents of flows/ lie beside steps/, in a checkout one level below it.
_CHECKOUT = not (_HERE / "steps").is_dir()
ROOT = _HERE.parent if _CHECKOUT else _HERE
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from steps import command_line  # noqa: E402

command_line.complete_environment(ROOT, _CHECKOUT)

from metaflow import (  # noqa: E402
    Config,
    FlowSpec,
    Parameter,
    card,
    config_expr,
    current,
    package_sources,
    resources,
    step,
)
from metaflow.exception import MetaflowException  # noqa: E402

from flows.live_card import LiveCard, leave_out_cards  # noqa: E402
from steps import lineage, pipeline, plan  # noqa: E402
from steps.config import ConfigError, parse, parse_text  # noqa: E402

COMMAND = "MAMBALLAMA_COMMAND"
PACKAGES = ("flows", *pipeline.FIRST_PARTY, "configs")
SUFFIXES = (
    ".py",
    ".toml",
    ".json",
    ".jsonl",
    ".jsonl.gz",
    ".yaml",
    ".html",
    ".css",
    ".js",
    ".cu",
    ".cuh",
    ".cpp",
    ".h",
)


class Stopped(MetaflowException):
    """One line for the user instead of a traceback."""

    headline = "Stopped"


@contextmanager
def plainly():
    """Errors that were foreseen, as Metaflow prints its own."""
    try:
        yield
    except (ConfigError, pipeline.StageFailed) as error:
        raise Stopped(str(error)) from None


def configuration(text):
    """Parser of the flow's `config`: every key with its default filled in."""
    with plainly():
        return parse_text(text).model_dump(mode="json")


def declared(stage):
    """`@resources` of a step as the configuration's section `resources` has them."""
    return resources(**{name: config_expr(f"config.resources.{stage}.{name}") for name in ("gpu", "cpu", "memory")})


def live(step_function):
    """A card that follows the stage's progress; MAMBALLAMA_LIVE_CARDS=0 saves the two seconds of drawing it."""
    if os.environ.get("MAMBALLAMA_LIVE_CARDS") == "0":
        return step_function
    return card(type="blank", id="progress", refresh_interval=5)(step_function)


@package_sources([f"../{name}" if _CHECKOUT else name for name in PACKAGES], suffixes=list(SUFFIXES))
class DistillFlow(FlowSpec):
    """Distil a Transformer into hybrids of attention and Mamba-2 layers, and report what was kept.

    teacher → corpus → layer_scores → for each variant: init_from_attention → align → kl_distill → sft → dpo →
    benchmark, and beside it draft → speculative_profile → report. The method is that of "The Mamba in the Llama" (arXiv
    2408.15237); every stage is kept under a key of all that it depends on and is run only if nothing is stored under
    that key.
    """

    config = Config(
        "config",
        default=str(command_line.default_config(ROOT)),
        parser=configuration,
        help="TOML file; by default configs/smollm2_gpu.toml where an NVIDIA GPU is visible, else smollm2_cpu.toml",
    )
    force = Parameter("force", default="", help="Run this stage and all that depend on it anew, stored or not.")

    @step
    def start(self):
        """Say beforehand which stages will run and which stored results will be reused."""
        with plainly():
            lines = plan.make_plan(self._config(), ROOT, self.force)
            plan.set_aside_forced(lines, self._config(), ROOT)
        print(plan.plan_table(lines))
        self.plan = [vars(line) for line in lines]
        self.refs = {}
        self.next(self.teacher)

    @declared("teacher")
    @step
    def teacher(self):
        """Bring the Transformer to be distilled into one form: configuration, bf16 weights, tokenizer."""
        self._stage("teacher")
        self.next(self.corpus)

    @declared("corpus")
    @live
    @step
    def corpus(self):
        """Collect the teacher's own conversations and other sources as token shards: train and held out."""
        self._stage("corpus")
        self.next(self.layer_scores)

    @declared("layer_scores")
    @live
    @step
    def layer_scores(self):
        """Rank the layers by how much their attention is needed; off where ratios interleave."""
        self._stage("layer_scores")
        self.next(self.benchmark_teacher)

    @declared("benchmark_teacher")
    @live
    @step
    def benchmark_teacher(self):
        """Measure the teacher once; every student is compared with it on the same items."""
        self._stage("benchmark_teacher")
        self.variants = list(self._config().variants)
        self.next(self.init_from_attention, foreach="variants")

    @declared("init_from_attention")
    @step
    def init_from_attention(self):
        """Replace chosen attention layers by Mamba-2 mixers that start from them: q → C, k → B, v → x, o → out_proj.

        They are the teacher's, or, of a variant with `from`, those of another variant's student: where that is not
        stored yet, this step makes it or waits until its own branch has.
        """
        self.variant = self.input
        self._stage("init_from_attention")
        self.next(self.align)

    @declared("align")
    @live
    @step
    def align(self):
        """Fit every mixer to the attention that it replaces; nothing else trains."""
        self._stage("align")
        self.next(self.kl_distill)

    @declared("kl_distill")
    @live
    @step
    def kl_distill(self):
        """Distil the teacher's distribution over the next token into the student."""
        self._stage("kl_distill")
        self.next(self.sft)

    @declared("sft")
    @live
    @step
    def sft(self):
        """Train on the assistant's tokens by cross entropy."""
        self._stage("sft")
        self.next(self.dpo)

    @declared("dpo")
    @live
    @step
    def dpo(self):
        """Prefer the better of two replies, measured against a reference model (direct preference optimisation)."""
        self._stage("dpo")
        self.next(self.benchmark, self.draft)

    @declared("benchmark")
    @live
    @step
    def benchmark(self):
        """Measure the student beside the teacher: fidelity, tasks, speed, memory, sample answers."""
        self._stage("benchmark")
        self.next(self.evaluated)

    @declared("draft")
    @live
    @step
    def draft(self):
        """Make the small model that proposes tokens: some of the student's layers, trained against the student."""
        self._stage("draft")
        self.next(self.speculative_profile)

    @declared("speculative_profile")
    @live
    @step
    def speculative_profile(self):
        """Decode speculatively with drafts of several lengths: acceptance, speed, and equality with plain decoding."""
        self._stage("speculative_profile")
        self.next(self.evaluated)

    @step
    def evaluated(self, inputs):
        """Bring the two measurements of one variant together."""
        self.variant = inputs.benchmark.variant
        self.refs = inputs.benchmark.refs | inputs.speculative_profile.refs
        self.next(self.report)

    @declared("report")
    @card(type="html")
    @step
    def report(self, inputs):
        """Show teacher and students side by side, with the lineage of every figure, in one HTML file."""
        with plainly():
            refs = {"": inputs[0].refs} | {i.variant: i.refs for i in inputs}
            path = lineage.make_report(self._config(), refs, self._run())
        self.html = path.read_text(encoding="utf-8")
        self.report_path = str(path)
        self.next(self.end)

    @step
    def end(self):
        """Say where the report is."""
        print(f"report: {self.report_path}")

    def _config(self):
        return parse(self.config.to_dict())

    def _run(self, progress=lambda _: None):
        return pipeline.Run(current.run_id, ROOT, os.environ.get(COMMAND, ""), progress)

    def _stage(self, name):
        """Run or reuse one stage; its reference joins `refs`."""
        with plainly():
            ref = pipeline.run_stage(
                name, getattr(self, "variant", ""), self._config(), self.refs, self._run(LiveCard())
            )
        if ref:
            self.refs = {**self.refs, name: ref}
        if not ref or ref["hit"]:
            leave_out_cards(getattr(self, name))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.argv[0] = str(Path(__file__).resolve())  # Metaflow starts tasks and cards with it, from other folders too
    if "step" in sys.argv and "--task-id" in sys.argv:
        command_line.stop_with_scheduler()
        if _CHECKOUT:
            os.chdir(ROOT)  # Metaflow looks for its cards from the current folder upwards
    else:
        os.environ[COMMAND] = shlex.join(["python", "flows/distill_flow.py", *sys.argv[1:]])
        command_line.stop_when_told()
        try:
            stages = [stage.name for stage in pipeline.STAGES]
            sys.argv[1:] = command_line.translate(sys.argv[1:], command_line.default_config(ROOT), stages)
        except (ConfigError, command_line.CommandLineError) as error:
            sys.exit(f"configuration: {error}")
    DistillFlow()
