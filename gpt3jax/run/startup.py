"""A run: what stays the same from its first step to its last, built new or from a checkpoint."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable

import jax

from gpt3jax import step
from gpt3jax.checkpoint import array_names, choosing, metadata, resume, storage
from gpt3jax.config import batch_schedule, layout, schema, validation
from gpt3jax.data import skipped_samples, splits, text_corpus
from gpt3jax.distributed import messages
from gpt3jax.model import dropout
from gpt3jax.run import layout_choice, numerical_faults, replica_checks, step_log
from gpt3jax.sharding import layouts
from gpt3jax.watch import phases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same from the first step to the last, but for the layout."""

    choice: layout_choice.Choice
    """The config as given, and the layouts of its batch sizes."""
    laid: layout_choice.LaidOut
    """The layout of the step now; `layout_change` changes it with the batch size."""
    schedule: batch_schedule.BatchSchedule
    end: step_log.Position
    n_samples: int
    """The run's length that decides schedules and the samples' order, skipped ones included."""
    splits: splits.Splits
    store: storage.Checkpoints | None
    faults: numerical_faults.Faults
    """The losses that spikes are judged by. This and `replicas` are all that changes in a run."""
    replicas: replica_checks.Replicas
    history: tuple[dict[str, object], ...] = ()
    """What starts from checkpoints changed so far, this start included: `resume.history_entry`."""

    @property
    def cfg(self) -> schema.Config:
        """The config, with the fields of the layout of now."""
        return self.laid.cfg

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of now."""
        return self.laid.mesh

    @property
    def program(self) -> step.Program:
        """The program of now."""
        return self.laid.program

    def stretch(self, samples: int) -> tuple[int, int]:
        """Return (batch size, end in samples) of the steps of one size from a position on."""
        return _stretch(self.choice.given, self.schedule, samples, self.end.samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A run that is ready for its next step."""

    run: Run
    state: step.TrainState
    position: step_log.Position
    lines: list[str]
    """Where it starts from, for the log: warnings, source, and what changed since."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """What is known of a run before its position is."""

    choice: layout_choice.Choice
    schedule: batch_schedule.BatchSchedule
    store: storage.Checkpoints | None
    clock: phases.Phases
    say: Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Restored:
    """A checkpoint that was read, and the run that goes on from it."""

    run: Run
    state: step.TrainState
    position: step_log.Position
    meta: metadata.Meta
    only_params: bool
    """The state has `...` in place of all else."""


def start_or_resume(
    cfg: schema.Config,
    clock: phases.Phases,
    lost: Callable[[], str] = lambda: "",
    before_compiling: Callable[[step.Program, schema.Config, int], None] = lambda *_: None,
) -> Started:
    """Start a run from the newest checkpoint that is whole, or else from random weights.

    `lost` says why checkpoint.dir may not be written any more, "" while it may;
    `before_compiling` compares the program of a batch size with those of other processes.

    Raises:
        UserError: the config does not fit the devices, the corpus or the checkpoint, or no
            checkpoint is whole.
    """
    kept = functools.partial(choosing.kept_layouts, cfg.checkpoint)
    choice = layout_choice.decide(cfg, kept, before_compiling)
    text_corpus.ensure_corpus(cfg.data, cfg.model)
    begin = Beginning(
        choice=choice,
        schedule=batch_schedule.from_config(cfg.batch, cfg.model.seq_len),
        store=_open_store(cfg, lost),
        clock=clock,
        say=_say,
    )
    source = choosing.choose_source(begin.store, cfg.checkpoint.load)
    if source is None:
        start = step_log.Position(0, 0)
        run = prepare(begin, start)
        seed = f"starting from random weights (train.seed={cfg.train.seed})"
        return Started(run=run, state=run.program.init(), position=start, lines=[seed])
    with clock.during(phases.RESTORE):
        restored, warnings = _restore_newest(source, begin)
    if restored.only_params:
        return _adopt(restored, source, warnings)
    return _go_on(restored, source, warnings)


def _say(line: str) -> None:
    """Print a line at once in process 0: the recorder opens after the first step is compiled."""
    if jax.process_index() == 0:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _restore_newest(source: storage.Checkpoints, begin: Beginning) -> tuple[_Restored, list[str]]:
    """Restore the newest checkpoint that is whole; return it, and warnings of damaged ones.

    Damaged ones are set aside once a whole one is found, if the folder is the run's own.

    Raises:
        UserError: the checkpoint is of another network or data order, or none is whole.
    """
    damaged: list[int] = []
    problems: list[str] = []
    for step_number in source.steps():
        problem = ""
        try:
            restored = _restore(source, step_number, begin)
        except metadata.DamagedError as error:
            problem = error.message
        if not messages.on_any_process(bool(problem)):
            source.set_aside(damaged)
            return restored, [f"WARNING: {p}; going back to an older one" for p in problems]
        path = source.path(step_number)
        damaged.append(step_number)
        problems.append(problem or f"checkpoint {path}: another process cannot read it")
    lines = "\n".join(f"WARNING: {problem}" for problem in problems)
    raise metadata.DamagedError(f"no whole checkpoint is left in {source.folder}:\n{lines}")


def _restore(source: storage.Checkpoints, step_number: int, begin: Beginning) -> _Restored:
    """Restore one checkpoint, or its parameters alone if no more is wanted or there is no more.

    Raises:
        UserError: it is of another network or data order.
        DamagedError: it cannot be read, or was changed since it was written.
    """
    cfg = begin.choice.given
    starts_anew = cfg.checkpoint.only_params and source is not begin.store
    meta = source.read_meta_together(step_number)
    choosing.check_same_model(cfg, meta)
    position = step_log.Position(*(0, 0) if starts_anew else (meta.step, meta.consumed_samples))
    run = prepare(begin, position)
    if not starts_anew:
        skipped_before = meta.config.get("data.skip_samples")
        stream = skipped_samples.from_config(cfg.data)
        skipped_samples.check_resumed(stream, skipped_before, meta.consumed_samples)
        choosing.check_same_order(cfg, meta, run.splits.order)
    only_params = starts_anew or meta.only_params
    wanted = array_names.is_param if only_params else lambda name: True
    state = source.restore(step_number, run.program.abstract_state, wanted)
    return _Restored(run=run, state=state, position=position, meta=meta, only_params=only_params)


def _adopt(restored: _Restored, source: storage.Checkpoints, warnings: list[str]) -> Started:
    """Start with a checkpoint's parameters and new optimizer state."""
    line = f"starting with the parameters of {source.folder}, step {restored.meta.step}"
    return Started(
        run=restored.run,
        state=restored.run.program.adopt(restored.state.params),
        position=restored.position,
        lines=[*warnings, line],
    )


def _go_on(restored: _Restored, source: storage.Checkpoints, warnings: list[str]) -> Started:
    """Start where a checkpoint ends; the lines have a table of what changed since."""
    run, meta, position = restored.run, restored.meta, restored.position
    run.faults.restore(meta.faults)
    state = resume.with_own_scale(run.cfg, meta, run.program.abstract_state, restored.state)
    changes = resume.changes(meta, restored.state, meta_of(run, position), state)
    history = (*meta.history, *resume.history_entry(meta, changes))
    line = f"resumed from {source.folder} at step {position.step}, {position.samples} samples"
    return Started(
        run=dataclasses.replace(run, history=history),
        state=state,
        position=position,
        lines=[*warnings, line, *resume.table(changes)],
    )


def meta_of(run: Run, position: step_log.Position) -> metadata.Meta:
    """Return what a checkpoint of the run at a position says besides the state."""
    return metadata.Meta(
        step=position.step,
        consumed_samples=position.samples,
        data_order=run.splits.order,
        config=schema.flatten(run.choice.given),
        layout=layout.of(run.cfg),
        layouts=layout_choice.as_json(run.choice),
        faults=run.faults.as_json(),
        history=run.history,
        dropout_generator=dropout.GENERATOR,
        mesh=describe_mesh(run.mesh),
        jax_version=jax.__version__,
    )


def describe_mesh(mesh: jax.sharding.Mesh) -> str:
    """Return the axes of a mesh that cut something, in words."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return axes or "one device"


def _open_store(cfg: schema.Config, lost: Callable[[], str]) -> storage.Checkpoints | None:
    """Open the run's checkpoints to read and write; for a replay, to read those before its step."""
    folder, replay_step = cfg.checkpoint.dir, cfg.train.replay_step
    if not folder or (replay_step and not pathlib.Path(folder).is_dir()):
        return None
    if replay_step:
        return storage.Checkpoints(folder, read_only=True, before=replay_step)
    options = cfg.checkpoint
    return storage.Checkpoints(
        folder,
        options.max_to_keep,
        keep_period=options.keep_period,
        save_timeout=options.save_timeout,
        lost=lost,
    )


def prepare(begin: Beginning, start: step_log.Position) -> Run:
    """Build the program, and map the corpus, of a run that goes on from a position.

    Raises:
        UserError: the config does not fit the devices, the corpus or the run's length.
    """
    cfg, schedule = begin.choice.given, begin.schedule
    stream = skipped_samples.from_config(cfg.data)
    n_steps, n_samples = run_length(cfg, schedule, start)
    end = step_log.Position(*stream.end(schedule, *start, n_samples))
    size, _ = _stretch(cfg, schedule, start.samples, end.samples)
    choice, laid = begin.choice, layout_choice.built_first(begin.choice, size, n_samples)
    if start.samples < end.samples:
        choice, laid = layout_choice.lay_out(
            choice, size, n_samples, begin.clock, begin.say, now=laid
        )
    return Run(
        choice=choice,
        laid=laid,
        schedule=schedule,
        end=end,
        n_samples=n_samples,
        splits=splits.open_splits(cfg, n_steps, n_samples),
        store=begin.store,
        faults=numerical_faults.Faults(
            cfg, layouts.array_names(laid.program.abstract_state.params)
        ),
        replicas=replicas_of(laid),
    )


def run_length(
    cfg: schema.Config, schedule: batch_schedule.BatchSchedule, start: step_log.Position
) -> tuple[int, int]:
    """Return the (steps, samples) of a run that goes on from a position, after checks of both.

    Raises:
        UserError: schedules or skipped samples do not fit the run's length.
    """
    n_steps, n_samples = skipped_samples.run_length(cfg, schedule, *start)
    validation.check_schedule(cfg.optimizer, n_samples)
    skipped_samples.check(skipped_samples.from_config(cfg.data), schedule, n_samples)
    return n_steps, n_samples


def replicas_of(laid: layout_choice.LaidOut) -> replica_checks.Replicas:
    """Return the comparison of the parameters' replicas in a layout."""
    params = laid.program.abstract_state.params
    return replica_checks.Replicas(laid.mesh, params, laid.cfg.train.checksum_interval)


def _stretch(
    cfg: schema.Config, schedule: batch_schedule.BatchSchedule, start: int, end: int
) -> tuple[int, int]:
    """Return (batch size, end) of the batches of one size from sample `start` on; `end` is last."""
    stream = skipped_samples.from_config(cfg.data)
    stretches = stream.schedule(schedule).runs(stream.n_kept(start), stream.n_kept(end))
    if not stretches:  # nothing is left of the run
        return schedule.size(start), end
    return stretches[0].size, stream.position(stretches[0].end_sample)
