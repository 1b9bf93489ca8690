"""Before and after, on clips that were held out, judged by a network that was not the reward.

`python -m rfl_jax.evaluate --workdir=RUN [--data=FILE.csv] [--step=best]` writes RUN/evaluation.json and RUN/evaluation/.
"""

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rfl_jax import cli
from rfl_jax.config import parse
from rfl_jax.errors import UserError
from rfl_jax.evaluation.evaluate import evaluate, show
from rfl_jax.hosts import is_writer
from rfl_jax.runs import BEST, RunFolder, find_checkpoint
from rfl_jax.terminal import command_line, tell_next
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.setup import set_up


def main() -> None:
    folder = RunFolder(epath.Path(_WORKDIR.value or ""))
    if not _WORKDIR.value or not folder.exists():
        raise UserError(f"--workdir: {_WORKDIR.value}: expected the folder of a run, with its {folder.config.name}")
    values = folder.read_config()
    if _DATA.value:
        values["eval"]["file_name"] = _DATA.value
    cfg = parse(ConfigDict(values))
    if not cfg.eval.file_name:
        raise UserError("--data: expected a csv of held-out clips, as the run's config names none")
    checkpoint = find_checkpoint(folder, _STEP.value)
    run = set_up(cfg, folder)
    with Checkpoints(checkpoint.parent) as checkpoints:
        state, _, _ = checkpoints.restore(int(checkpoint.name), run.state)
    held_out = run.open_held_out()
    params = {"base": held_out.untrained(state.tuned), "tuned": state.tuned}
    result = evaluate(held_out, params, folder, int(checkpoint.name))
    if is_writer():
        show(result)
        print(f"written: {folder.evaluation}, {folder.evaluation_files}/")
        tell_next(command_line("rfl_jax.report", [str(folder), "-o", "report.html"]))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    cli.define_distributed()
    _DATA = flags.DEFINE_string("data", None, "csv of held-out clips; default: the run's eval.file_name.")
    _STEP = flags.DEFINE_string("step", "", f"Checkpoint: a number, or {BEST}; default: the last.")
    cli.run(main, "evaluate")
