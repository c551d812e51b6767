"""The training stages on several hosts, as a gang of nodes that fills the store; distill_flow.py goes on from there.

python flows/gang_flow.py --config config FILE run --with kubernetes --nodes 2
python flows/distill_flow.py --config config FILE run

Each node brings the GPUs of the section `resources`. The store must be one that all of them reach.
"""

import logging
import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_CHECKOUT = not (_HERE / "steps").is_dir()  # as in distill_flow.py
sys.path.insert(0, str(_HERE.parent if _CHECKOUT else _HERE))

from flows import distill_flow as base  # noqa: E402

ROOT, PACKAGES = base.ROOT, base.PACKAGES  # its import completed the environment, which Metaflow reads at its own

from metaflow import Config, FlowSpec, Parameter, current, package_sources, parallel, step  # noqa: E402

from steps import command_line, pipeline  # noqa: E402
from steps.config import parse  # noqa: E402
from steps.gang import Seat  # noqa: E402


@package_sources([f"../{name}" if _CHECKOUT else name for name in PACKAGES], suffixes=list(base.SUFFIXES))
class GangFlow(FlowSpec):
    """Make every student of a configuration on several nodes at once: up to and with the stage dpo."""

    config = Config("config", default=str(command_line.default_config(ROOT)), parser=base.configuration)
    nodes = Parameter("nodes", default=2, help="Hosts that train together.")

    @step
    def start(self):
        """As many nodes as were asked for."""
        self.next(self.train, num_parallel=self.nodes)

    @base.declared("kl_distill")
    @parallel
    @step
    def train(self):
        """On every node; what is no training, the first one does while the others wait for it."""
        gang = current.parallel
        seat = Seat(gang.node_index, gang.num_nodes, gang.main_ip)
        with base.plainly():
            pipeline.make_students(parse(self.config.to_dict()), pipeline.Run(current.run_id, ROOT, seat=seat))
        self.next(self.trained)

    @step
    def trained(self, inputs):
        """The nodes have nothing to hand on: it lies in the store."""
        self.next(self.end)

    @step
    def end(self):
        """Every student is in the store."""


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.argv[0] = str(Path(__file__).resolve())
    if "step" in sys.argv:
        command_line.end_with(os.getppid())  # the scheduler, or the gang's first task
        if _CHECKOUT:
            os.chdir(ROOT)
    else:
        command_line.stop_when_told()
    GangFlow()
