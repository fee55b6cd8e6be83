"""What is printed and drawn of runs: settings, a table, notes, a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .intervals import Paired, fewest_prompts, p_value, share
from .quality_plot import Mark, svg
from .records import Run


def verdict(paired: Paired, margin: float) -> str:
    difference, points = paired.difference(), shown_points(margin)
    if difference.low > -margin:
        return f"no damage > {points}"
    if difference.high < 0:
        return "damage"
    return f"cannot tell {points}: about {paired.prompts_needed(margin):,} prompts are needed"


def shown_points(margin: float) -> str:
    """A share as points of 100."""
    return f"{100 * margin:g} point{'' if margin == 0.01 else 's'}"


def shown_task(task: str | None) -> str:
    """None: all of them together."""
    return "all" if task is None else task


def cells(run: Run, task: str | None, against: Run | None, margin: float) -> dict[str, str]:
    """Title -> text of a row; `against` has the same task's records."""
    row = {
        "run": run.label,
        "task": shown_task(task),
        "prompts": str(len(run.rights)),
        "seeds": str(len(run.seeds)),
        "exact, 95 % interval": share(run.rights).shown(),
        "steps a canvas": run.steps_a_canvas(),
        "forwards a token": run.forwards_a_token(),
        "accepted a pass": run.accepted_a_pass(),
    }
    if against is not None:
        paired = Paired.of(run.rights, against.rights, run.seeds == against.seeds)
        row |= {
            f"{against.label}, exact": f"{against.rights.mean():.3f}",
            "difference, 95 % interval": paired.difference().shown("+"),
            "p": f"{p_value(run.rights, against.rights):.2g}",
            "verdict": verdict(paired, margin),
        }
    return row


QUANTITIES = ("exact, 95 % interval", "steps a canvas", "forwards a token", "accepted a pass")


def table(runs: Sequence[Run], against: Run | None, margin: float) -> str:
    """Markdown: a row per task; of several runs, if they are not compared with another one, side by side."""
    if against is None and len(runs) > 1:
        return as_table(side_by_side(runs))
    others = dict(against.tasks) if against is not None else {}
    rows = [cells(run, task, others.get(task), margin) for run in runs for task, run in run.tasks]
    if len(runs) == 1:
        rows = [{title: text for title, text in row.items() if title != "run"} for row in rows]
    return as_table(rows)


def side_by_side(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Of runs with the same tasks: what tasks have alike, then what each run did."""
    rows: dict[str | None, dict[str, str]] = {}
    for run in runs:
        for task, part in run.tasks:
            found = cells(part, task, None, 0)
            row = rows.setdefault(task, {title: found[title] for title in ("task", "prompts")})
            row |= {f"{run.label}: {title}": found[title] for title in QUANTITIES}
    return list(rows.values())


def as_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Columns that say nothing are left out."""
    titles = [title for title in rows[0] if {row[title] for row in rows} != {"-"}]
    lines = [titles, *([row[title] for title in titles] for row in rows)]
    head, *body = (" | ".join(text.replace("|", "\\|") for text in line) for line in lines)
    return "\n".join(f"| {line} |" for line in (head, " | ".join(["---"] * len(titles)), *body))


def notes(runs: Sequence[Run], against: Run | None, margin: float) -> list[str]:
    """What a reader of the table should know."""
    said = []
    for run in runs:
        failed = [record.drafter_failure for record in run.records if record.drafter_failure]
        if failed:
            said.append(f"{run.label}: the drafter was turned off in {len(failed)} answers ({failed[0]})")
    if against is None:
        return said
    said.append(
        f"It takes {fewest_prompts(margin):,} prompts to exclude a damage of {shown_points(margin)} if not one answer "
        "differs; fewer do where answers got better."
    )
    if any(len(run.seeds) != len(against.seeds) for run in runs):
        said.append("Seeds are not equally many: p is nearly exact.")
    return said


def shown_settings(run: Run, first: Run) -> str:
    """A line each; of further runs those alone that are not as the first one's."""
    lines = [f"{run.label}:"]
    for name in dict.fromkeys([*first.settings, *run.settings]):
        value = run.settings.get(name, "-")
        if run is not first and value == first.settings.get(name):
            continue
        if isinstance(value, Mapping):
            value = [f"{key} {part}" for key, part in value.items()]
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f"  {name}: {text or '-'}")
    return "\n".join(lines)


def report(runs: Sequence[Run], against: Run | None, margin: float, markdown: bool = False) -> str:
    """Settings, table and notes."""
    every = [*runs, *([against] if against is not None else [])]
    settings = "\n".join(shown_settings(run, runs[0]) for run in every)
    parts = [f"```\n{settings}\n```" if markdown else settings, table(runs, against, margin)]
    return "\n\n".join([*parts, *notes(runs, against, margin)]) + "\n"


def plot(runs: Sequence[Run]) -> str:
    """An SVG of runs that have the same tasks."""
    marks: dict[str | None, list[Mark]] = {}
    for run in runs:
        for task, part in run.tasks:
            beside = part.steps_a_canvas(), part.forwards_a_token()
            marks.setdefault(task, []).append(Mark(share(part.rights), beside))
    file, seeds = runs[0].settings["examples"].get("file"), {len(run.seeds) for run in runs}
    title = f"{file}: {len(runs[0].rights)} prompts, {' or '.join(map(str, sorted(seeds)))} seeds"
    groups = [(shown_task(task), group) for task, group in marks.items()]
    return svg(title, [run.label for run in runs], ("steps a canvas", "forwards a token"), groups)
