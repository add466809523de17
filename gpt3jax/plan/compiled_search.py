"""The search for each batch size's best layout with the compiler: `gpt3jax.plan --search`.

Closed forms say which layouts are compiled; the compiled steps say which is best.
"""

import dataclasses
from collections.abc import Callable, Sequence

from gpt3jax import errors
from gpt3jax.config import layout
from gpt3jax.plan import ranking, report, search, step_choice, step_report

MORE_COMPILED = 4  # layouts of a batch size that are compiled beyond what was asked, if none fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tried:
    """A layout, and its step unless that failed."""

    candidate: search.Candidate
    step: step_report.StepReport | None
    failed: str = ""

    @property
    def fits(self) -> bool:
        return self.step is not None and self.step.peak.fits

    @property
    def seconds(self) -> float:
        return self.step.time.step_seconds.expected if self.step else 0.0


def find(
    planner: step_choice.Planner, n_gpus: int, n_compiled: int, note: Callable[[str], None]
) -> tuple[ranking.Ranking, list[report.SearchedLayout]]:
    """Return the layouts of each batch size, best first, and the figures of those that were tried.

    `note` gets a line where GPUs idle.

    Raises:
        UserError: as `ranking.all_candidates`; or no layout of a batch size compiled.
    """
    cfg, target = planner.cfg, planner.target
    found = ranking.all_candidates(cfg, n_gpus, target.gpu, target.network, note)
    before: layout.Layout = {}
    by_size: dict[int, Sequence[ranking.Ranked]] = {}
    searched = []
    for size, candidates in found.items():
        planner.say(f"Batch of {size:,}: {len(candidates):,} layouts fit, by closed forms.")
        tried = _best_first(_try(planner, size, candidates, before, n_compiled), before)
        by_size[size] = _ranked(tried, candidates)
        searched += [_searched(size, each) for each in tried]
        before = by_size[size][0].fields
    kind = "compiled steps" if planner.compiles else "closed forms"
    ranked = ranking.Ranking(
        origin=f"found by gpt3jax.plan --search, by {kind}",
        n_devices=n_gpus,
        device=target.gpu.name,
        given=layout.given(cfg),
        by_size=by_size,
    )
    return ranked, searched


def _try(
    planner: step_choice.Planner,
    size: int,
    candidates: Sequence[search.Candidate],
    before: layout.Layout,
    n_compiled: int,
) -> list[_Tried]:
    """Return the layouts of a batch size that were tried: what closed forms choose comes first."""
    first = ranking.first_choice(candidates, before)
    others = [candidate for candidate in candidates if candidate is not first]
    queue = search.Queue([first, *others], planner.target.gpu)
    tried: list[_Tried] = []
    while candidate := queue.next():
        if len(tried) >= n_compiled and any(each.fits for each in tried):
            break
        if len(tried) >= max(n_compiled, 1) + MORE_COMPILED:
            break
        tried.append(_tried(planner, size, candidate))
        if step := tried[-1].step:
            queue.note(candidate, step.peak.peak_bytes_per_gpu)
    return tried


def _tried(planner: step_choice.Planner, size: int, candidate: search.Candidate) -> _Tried:
    """Return a layout with its step; a search goes on after one that does not compile."""
    try:
        return _Tried(candidate=candidate, step=planner.step(size, candidate.fields))
    except errors.UserError as error:
        return _Tried(candidate=candidate, step=None, failed=error.message)


def _best_first(tried: Sequence[_Tried], before: layout.Layout) -> list[_Tried]:
    """Return what fits first, then by time; the layout of the size before is first where near.

    Raises:
        UserError: none compiled.
    """
    if all(each.failed for each in tried):
        raise errors.UserError(
            f"none of {len(tried)} layouts compiled: {tried[0].failed}",
            page="plan.md#where-the-figures-come-from",
        )
    limit = ranking.NEAR * min((each.seconds for each in tried if each.fits), default=0.0)

    def rank(each: _Tried) -> tuple[bool, bool, bool, float]:
        is_kept = each.seconds <= limit and each.candidate.fields == before
        return bool(each.failed), not each.fits, not is_kept, each.seconds

    return sorted(tried, key=rank)


def _ranked(
    tried: Sequence[_Tried], candidates: Sequence[search.Candidate]
) -> list[ranking.Ranked]:
    """Return the layouts that fit, best first, then smaller ones that were not tried."""
    fitting = [each.step for each in tried if each.step and each.fits]
    steps = fitting or [each.step for each in tried if each.step]
    known = [each.candidate for each in tried]
    smaller = ranking.chain(known[0], candidates)[1:]
    return [
        *(step_choice.ranked(step) for step in steps),
        *(ranking.as_ranked(each) for each in smaller if each not in known),
    ]


def _searched(size: int, tried: _Tried) -> report.SearchedLayout:
    row = report.SearchedLayout(
        overrides=list(layout.options(tried.candidate.fields)),
        batch_size=size,
        layout=tried.candidate.fields,
        step_seconds_closed_form=tried.candidate.seconds,
        failed=tried.failed,
    )
    if tried.step is None:
        return row
    return dataclasses.replace(
        row,
        fits=tried.fits,
        peak_bytes_per_gpu=tried.step.peak.peak_bytes_per_gpu,
        step_seconds=tried.seconds,
        mfu=tried.step.time.mfu,
    )
